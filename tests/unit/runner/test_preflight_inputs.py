"""What a stage would stumble over is known before the first one: positions, tokens, configurations, and all problems at once."""

import io
import json
from contextlib import nullcontext

import pytest
from tests.families import tiny_config
from tests.unit.models.conftest import random_model, word_tokenizer
from transformers import BloomConfig, BloomForCausalLM

from tadistill import terminal
from tadistill.config import load, validate
from tadistill.data import survey
from tadistill.errors import ConfigError, DataError, ModelError, TadistillError
from tadistill.models.shapes import check_lengths, positions_of
from tadistill.plan.arms import make_plan
from tadistill.runner import preflight, schedule
from tadistill.runner.timing import workloads
from tadistill.store import Store
from tadistill.terminal import Terminal


def check_inputs(recipe, *given):
    return preflight.check_inputs(make_plan(recipe), *given)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TADISTILL_CACHE", str(tmp_path / "cache"))


def rows(name: str, response: int, prompt: int = 3) -> str:
    words = [{"instruction": " ".join(["w1"] * prompt), "output": " ".join(["w2"] * response)}] * 4
    with open(name, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in words)
    return f"./{name}"


def model(kind: str, tokenizer=None, **fields) -> str:
    random_model(kind, **fields).save_pretrained(kind)
    (tokenizer or word_tokenizer()).save_pretrained(kind)
    return f"./{kind}"


def recipe(load: str, train: str, dev: str, **changes):
    content = {
        "study": "t",
        "seeds": [1],
        "models": {"s": {"load": load, "sft": {"optim": {"steps": 2, "batch": 2}}}},
        "data": {"train": train, "dev": dev, "test": [dev], "template": "plain", "max_prompt": 8, "max_length": 40},
        "evaluate": {"seeds": [1], "max_new_tokens": 8, "also": {}},
        "arms": {"sft": "s"},
    }
    return validate({**content, **changes})


def test_data_and_models_beside_the_recipe_are_found_from_any_directory(tmp_path, monkeypatch):
    of = recipe(model("llama"), rows("own.jsonl", 5), rows("dev.jsonl", 2))
    content = of.model_dump(mode="json", by_alias=True, exclude_unset=True)
    content["data"] |= {"train": "own.jsonl", "dev": "dev.jsonl", "test": ["dev.jsonl"]}
    (tmp_path / "r.yaml").write_text(json.dumps(content), encoding="utf-8")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    found = load(tmp_path / "r.yaml")
    assert survey.survey(found.data.train, "train", found.data).rows == 4
    assert all(workloads(make_plan(found)).values())
    check_inputs(found)


def test_a_model_that_cannot_be_packed_is_refused_before_any_work():
    short = rows("short.jsonl", 4)

    def packed(load):
        sft = {"optim": {"steps": 2, "batch": 2, "packed": True}}
        return recipe(load, short, short, models={"s": {"load": load, "sft": sft}})

    check_inputs(packed(model("llama")))
    bloom = BloomForCausalLM(BloomConfig(vocab_size=32, hidden_size=16, n_layer=1, n_head=2))
    bloom.save_pretrained("bloom")
    word_tokenizer().save_pretrained("bloom")
    with pytest.raises(
        ModelError, match=r"^models.s: model `s` is of type bloom, which cannot train on packed rows; remove `optim.packed`"
    ):
        check_inputs(packed("./bloom"))
    check_inputs(recipe("./bloom", short, short))


@pytest.mark.parametrize(
    ("kind", "field"), [("gpt2", "n_positions"), ("opt", "max_position_embeddings"), ("llama", "max_position_embeddings")]
)
def test_prompt_with_reference_must_fit_the_positions(kind, field):
    load, short, long = model(kind, **{field: 32}), rows("short.jsonl", 4), rows("long.jsonl", 60)
    check_inputs(recipe(load, short, short))
    with pytest.raises(
        ConfigError, match=r"^models.s: the model has 32 positions, but the longest prompt with its reference response needs 40"
    ):
        check_inputs(recipe(load, long, short))
    with pytest.raises(ConfigError, match=r"lower data\.max_length"):  # dev and test references are scored too
        check_inputs(recipe(load, short, long))


def test_positions_have_other_names_and_limits_in_other_families():
    """A text beyond them crashed MPT. With LongRoPE, its logits would depend on the other texts of its batch."""
    assert positions_of(tiny_config("mpt").to_dict()) == 128
    assert positions_of(tiny_config("dbrx").to_dict()) == 128
    assert positions_of(tiny_config("kimi_linear", model_max_length=256).to_dict()) == 256
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [1.0, 4.0, 8.0, 16.0]}
    long = tiny_config("phi3", rope_parameters=rope, original_max_position_embeddings=24, partial_rotary_factor=1.0).to_dict()
    with pytest.raises(ConfigError, match="the model has 24 positions with the short factors of LongRoPE, but it needs 30; cut it"):
        check_lengths(long, {"it needs": (30, "cut it")})
    check_lengths(long, {"it needs": (24, "cut it")})
    with pytest.raises(ConfigError, match="the model has 128 positions, but it needs 130; cut it"):
        check_lengths(long | {"original_max_position_embeddings": 24, "rope_parameters": None}, {"it needs": (130, "cut it")})


@pytest.mark.parametrize("kind", [{"type": "longrope"}, {"type": "su"}, {"rope_type": "longrope"}])
def test_a_published_file_has_longrope_in_other_fields(kind):
    """The plan reads a config.json as it is; Phi-3 has the number beside the rope fields."""
    file = {"max_position_embeddings": 131072, "original_max_position_embeddings": 4096, "rope_scaling": kind | {"short_factor": [1.0]}}
    assert positions_of(file) == 4096
    with pytest.raises(ConfigError, match="the model has 4096 positions with the short factors of LongRoPE, but it needs 5000; cut it"):
        check_lengths(file, {"it needs": (5000, "cut it")})
    assert positions_of(file | {"rope_scaling": {"type": "linear"}}) == 131072
    assert positions_of(file | {"rope_scaling": None}) == 131072


def test_a_control_that_samples_more_than_the_model_can_read_is_named_with_its_key():
    load, short = model("llama", max_position_embeddings=32), rows("short.jsonl", 4)
    models = {"t": {"load": load}, "a": {"init": {"from": "t", "layers": 3}}, "s": {"init": {"from": "t", "layers": 2}}}

    def fair(**controls):
        method = {"objective": {"type": "forward_kl"}, "optim": {"steps": 2, "batch": 2}}
        return recipe(load, short, short, models=models, method=method, arms={"chain": "t > a > s", **controls}, fair=True)

    with pytest.raises(ConfigError) as found:
        check_inputs(fair())
    assert str(found.value).splitlines()[0] == (
        "models.s: the model has 32 positions, but the longest prompt (3 tokens) plus sampler.max_new_tokens (256) of the control "
        "chain-no-teacher needs 259; write arms.chain-no-teacher: {control: no_teacher of chain, sampler: {max_new_tokens: 29}}"
    )
    check_inputs(fair(**{"chain-no-teacher": {"control": "no_teacher of chain", "sampler": {"max_new_tokens": 29}}}))


def test_a_large_training_set_is_tokenised_only_if_its_limits_exceed_the_model(tmp_path, monkeypatch):
    monkeypatch.setattr(survey, "LARGE", 3)
    short, long, large = rows("short.jsonl", 4), rows("long.jsonl", 60), rows("large.jsonl", 5)
    survey._known.clear()
    check_inputs(recipe(model("llama", max_position_embeddings=64), large, short), console := Terminal(file=io.StringIO(), width=200))
    note = "large (train): its 4 rows are not checked yet; the first training tokenises them, and counts those that are too long"
    assert note in console.file.getvalue()
    assert not (tmp_path / "cache" / "encoded").exists()
    load = model("llama", max_position_embeddings=32)
    check_inputs(recipe(load, large, short))
    assert len(list((tmp_path / "cache" / "encoded").glob("*.arrow"))) == 1
    with pytest.raises(
        ConfigError, match=r"^models.s: the model has 32 positions, but the longest prompt with its reference response needs 40"
    ):
        check_inputs(recipe(load, long, short))


@pytest.mark.parametrize(("minute", "lines"), [(60.0, []), (0.0, ["checking models and data: 4 of 4 rows of chats tokenised"])])
def test_how_much_of_a_large_set_of_chats_is_tokenised_is_said_once_a_minute(tmp_path, monkeypatch, minute, lines):
    """Chats are tokenised before the first stage, which takes minutes."""
    monkeypatch.setattr(survey, "LARGE", 3)
    monkeypatch.setattr(terminal, "MINUTE", minute)
    monkeypatch.setattr(schedule, "prepared", nullcontext)
    survey._known.clear()
    chat = {"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]}
    (tmp_path / "chats.jsonl").write_text(4 * f"{json.dumps(chat)}\n")
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    load = model("llama", tokenizer, max_position_embeddings=64)
    data = recipe(load, "./chats.jsonl", rows("dev.jsonl", 2)).data.model_dump() | {"template": "chat"}
    plan = make_plan(recipe(load, "./chats.jsonl", "./dev.jsonl", data=data))
    schedule.check_first(plan, Store(tmp_path / "runs"), console := Terminal(file=io.StringIO(), width=200), [])
    said = console.file.getvalue().splitlines()
    assert said[0] == "checking models and data …"
    assert [line for line in said if "tokenised" in line] == lines


def test_corpus_must_fit_the_positions():
    load, short = model("llama", max_position_embeddings=32), rows("short.jsonl", 4)
    with open("corpus.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": " ".join(["w3"] * 50)}) + "\n" for _ in range(3))
    minillm = {
        "models": {"t": {"load": load}, "s": {"init": {"from": "t", "layers": 2}}},
        "method": {"objective": {"type": "minillm"}, "sampler": {"type": "teacher_mixed", "max_new_tokens": 4}, "optim": {"steps": 2}},
        "arms": {"a": "t > s"},
    }
    data = {"train": short, "dev": short, "test": [short], "template": "plain", "corpus": "./corpus.jsonl", "max_prompt": 8}
    check_inputs(recipe(load, short, short, **minillm, data={**data, "max_length": 32}))
    with pytest.raises(ConfigError, match=r"models.t: the model has 32 positions, but a piece of data.corpus needs 48"):
        check_inputs(recipe(load, short, short, **minillm, data={**data, "max_length": 48}))


def test_a_token_beyond_the_embeddings_is_named():
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["extra"])  # id 32, and the model has rows 0 to 31
    load, short = model("llama", tokenizer), rows("short.jsonl", 4)
    check_inputs(recipe(load, short, short))  # it does not occur
    with open("odd.jsonl", "w", encoding="utf-8") as file:
        file.write(json.dumps({"instruction": "w1", "output": "extra"}) + "\n")
    with pytest.raises(ModelError, match=r"models.s: .* token 'extra' of data set `odd` \(train\) the id 32, .* only 32 embeddings"):
        check_inputs(recipe(load, "./odd.jsonl", short))


LLAMA = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32}


@pytest.mark.parametrize(
    "change",
    [
        *({"num_key_value_heads": value} for value in ([1], float("nan"), float("inf"), -1, True, "1", 10**30)),
        *({"head_dim": value} for value in (-1, 0, 3, 1e30)),
        *({"hidden_act": "nope"}, {"initializer_range": -1}, {"initializer_range": float("nan")}, {"num_hidden_layers": 10**9}),
        *({"rms_norm_eps": -1.0}, {"attention_dropout": 1.5}, {"max_position_embeddings": -1}, {"auto_map": {"AutoModel": "x.Y"}}),
        *({"dtype": "nope"}, {"rope_parameters": {"rope_type": "nope"}}, {"rope_parameters": 5}, {"hidden_size": None}),
    ],
)
def test_a_bad_configuration_is_one_sentence_about_the_model(change):
    made = {"s": {"load": "scratch:llama", "tokenizer": "tinyworld", "config": {**LLAMA, **change}, "sft": {"optim": {"steps": 1}}}}
    data = {
        "train": "tinyworld",
        "dev": "tinyworld",
        "test": ["tinyworld"],
        "limit": {"train": 8, "dev": 2, "test": 2},
        "template": "plain",
    }
    with pytest.raises(TadistillError, match=r"^models\.s: .*") as error:
        check_inputs(recipe("", "", "", models=made, data=data))
    assert len(error.value.problems) == 1


def test_damaged_models_are_all_named_before_the_first_stage():
    short, good = rows("short.jsonl", 4), model("llama")
    made = {}
    for name in ("a", "b"):
        random_model("llama").save_pretrained(name)
        word_tokenizer().save_pretrained(name)
        with open(f"{name}/model.safetensors", "r+b") as file:
            file.truncate(500)
        made[name] = {"load": f"./{name}"}
    with pytest.raises(ModelError) as error:
        check_inputs(recipe(good, short, short, models={"t": {"load": good}, **made}, arms={"x": "a", "y": "b", "z": "t"}))
    assert [problem.split(":")[0] for problem in error.value.problems] == ["models.a", "models.b"]


@pytest.mark.parametrize("path", ["~nobody-here/x.jsonl", f"./{'x' * 300}/a.jsonl"])
def test_a_data_path_that_cannot_exist(path):
    with pytest.raises(DataError, match="is not a valid path"):
        check_inputs(recipe(model("llama"), path, rows("short.jsonl", 4)))


def test_right_answers_that_select_a_checkpoint_must_be_named_on_dev():
    load, own = model("llama"), rows("own.jsonl", 3)
    sft = {"models": {"s": {"load": load, "sft": {"optim": {"steps": 2, "batch": 2}, "select": {"metric": "choice"}}}}}
    with pytest.raises(ConfigError, match=r"select\.metric is choice, but the dev set `own` names no column of right answers; name it in"):
        check_inputs(recipe(load, own, own, **sft))
    named = {"load": own, "columns": {"choice": "output"}, "choices": ["w2 w2 w2", "w1"]}
    check_inputs(recipe(load, own, own, **sft, data=recipe(load, own, own).data.model_dump() | {"dev": named}))


def test_an_objective_of_more_tokens_than_there_are_is_refused():
    load, train = model("llama"), rows("own.jsonl", 5)
    method = {"objective": {"type": "top_k_reverse_kl", "k": 5000}, "sampler": {"type": "dataset"}, "optim": {"steps": 1, "batch": 2}}
    models = {"t": {"load": load}, "s": {"load": load}}
    of = recipe(load, train, train, models=models, method=method | {"select": {"metric": "last"}}, arms={"a": "t > s"})
    with pytest.raises(ConfigError, match=r"objective.k is 5000, but the models share only \d+ tokens; write at most \d+"):
        check_inputs(of)
