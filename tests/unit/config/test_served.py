"""`serve` in recipes: what it accepts, and one sentence for every method that a server cannot serve."""

import html
import io
import json
import os
import re
from pathlib import Path

import pytest

from tadistill.config import load, parse
from tadistill.config.remote import LONGER, Serve
from tadistill.errors import ConfigError
from tadistill.plan.arms import make_plan
from tadistill.plan.notes import approximations
from tadistill.plan.preview import preview
from tadistill.plan.remote import running
from tadistill.plan.task import name_of
from tadistill.report.model_card import model_card
from tadistill.report.page import render_page
from tadistill.report.plain_text import render_markdown
from tadistill.results.collect import read_results
from tadistill.runner.remote import check_model, examined, longest_text, server_command, start_server
from tadistill.runner.run_study import save_plan
from tadistill.store import Store
from tadistill.terminal import Terminal

SHAPE = "{hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 2}"
RECIPE = f"""
study: served
seeds: [1]
analyse: false
models:
  xl: {{load: DIRECTORY, serve: "http://127.0.0.1:8001"}}
  s: {{load: "scratch:llama", tokenizer: tinyworld, config: {SHAPE}}}
data: {{train: tinyworld, dev: tinyworld, test: [tinyworld], template: plain, limit: {{train: 8, dev: 4, test: 4}}}}
evaluate: {{seeds: [1], max_new_tokens: 4, also: {{}}}}
method:
  objective: {{type: reverse_kl}}
  sampler: {{type: student, max_new_tokens: 4}}
  optim: {{steps: 2, batch: 2}}
  select: {{metric: last}}
arms: {{direct: xl > s}}
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A saved model with the tokenizer of the built-in data set."""
    from tests.byte_models import SHAPE as SIZES
    from tests.byte_models import save
    from transformers import AutoConfig, AutoModelForCausalLM

    from tadistill.models.loading import load_tokenizer

    tokenizer = load_tokenizer("tinyworld")
    config = AutoConfig.for_model("llama", vocab_size=len(tokenizer), **(SIZES | {"hidden_size": 64}))
    return save(tmp_path_factory.mktemp("xl"), AutoModelForCausalLM.from_config(config), tokenizer)


@pytest.fixture
def recipe(directory):
    return lambda *overrides: parse(RECIPE.replace("DIRECTORY", directory), overrides, source="test")


@pytest.mark.parametrize(
    ("given", "addresses"),
    [
        ("http://127.0.0.1:8001", ("http://127.0.0.1:8001",)),
        ("https://gpu7/v1/", ("https://gpu7",)),
        (["http://a:1", "http://b:2"], ("http://a:1", "http://b:2")),
        ({"at": "http://a:1"}, ("http://a:1",)),
    ],
)
def test_addresses(given, addresses):
    assert Serve.model_validate(given).at == addresses


WRONG = {
    "models.xl.serve=gpu7:8001": "write an address of the form http://HOST:PORT",
    "models.xl.serve=ftp://gpu7": "write an address of the form http://HOST:PORT",
    "models.xl.serve=http://gpu7:eight": "write an address of the form http://HOST:PORT",
    "models.xl.serve=http://me:s3cret@gpu7": "name this variable in `serve.key`",
    "models.xl.serve=[http://a:1,http://a:1/]": "names an address twice",
    "models.xl.serve=[]": "serve",
    "models.xl.sft={optim: {steps: 1}}": "a model with `serve` is not trained",
    "models.s.serve=http://a:1": "`serve` needs `load` with the files of the model that the server runs",
}


@pytest.mark.parametrize("override", WRONG)
def test_wrong_values_have_one_sentence(override, recipe):
    with pytest.raises(ConfigError, match=re.escape(WRONG[override])):
        recipe(override)


def test_a_password_is_not_repeated():
    with pytest.raises(ConfigError, match=r"name this variable in `serve\.key`") as caught:
        parse(RECIPE.replace("127.0.0.1:8001", "me:s3cret@gpu7"), source="test")
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("model", ["serve: {at: http://a:1, key: KEY}, load: x", "api: {at: https://a/v1, model: m, key: KEY}"])
def test_a_key_in_place_of_its_variable_is_not_repeated(model):
    text = RECIPE.replace('{load: DIRECTORY, serve: "http://127.0.0.1:8001"}', "{" + model.replace("KEY", "sk-s3cret-1") + "}")
    with pytest.raises(ConfigError, match=r"key` must be the name of an environment variable") as caught:
        parse(text, source="test")
    assert "s3cret" not in str(caught.value)


def test_a_model_has_either_a_server_or_a_temperature(recipe):
    with pytest.raises(ConfigError, match="needs exactly one of `load`"):
        recipe("models.xl={temper: {of: s, tau: 2}, serve: http://a:1, load: x}")
    with pytest.raises(ConfigError, match=r"models\.hot\.temper changes the logits of `xl`, but those of a served model"):
        make_plan(recipe("models.hot={temper: {of: xl, tau: 2}}"))


TOP_K = "models.xl.serve={at: http://a:1, gives: top_k}"
MINILLM = "method.objective={type: minillm, pt_weight: 0}"
REFUSED = {
    ("method.sampler={type: teacher_mixed, max_new_tokens: 4}", MINILLM): "while each token is sampled",
    ("method.sampler={type: speculative, max_new_tokens: 4}",): "while each token is sampled",
    ("method.sampler={type: teacher}",): "needs text that the teacher writes",
    (TOP_K, "arms.direct={path: xl > s, sampler: {type: dataset, signal: {type: hidden}}}"): "is recorded from the teacher's hidden states",
    (TOP_K, "arms.direct={path: xl > s, sampler: {type: dataset, signal: {type: top_k}}}"): "set `signal.k` to 20, or `serve.k` to 64",
    ("arms.alone=xl",): "arms.alone measures `xl`, but this model is served",
    (TOP_K, "analyse=true"): "`analyse` needs the whole distribution of `xl`, but models.xl.serve gives only `top_k`",
    (TOP_K, "method.objective={type: top_k_forward_kl}"): "selects the top tokens itself, but models.xl.serve gives only `top_k`",
    (TOP_K, MINILLM): "or `single_step: false`",
    (TOP_K, "method.objective={type: reverse_kl, temperature: 2}"): "serve.tail `lump` needs objective.temperature 1",
    (TOP_K, "method.select={metric: reverse_kl}"): "needs the teacher's whole distribution",
}


@pytest.mark.parametrize("overrides", REFUSED)
def test_what_a_server_cannot_give_is_refused_before_any_work(overrides, recipe):
    with pytest.raises(ConfigError, match=re.escape(REFUSED[overrides])):
        make_plan(recipe(*overrides))


def test_a_server_of_the_models_files_is_not_a_part_of_the_key(recipe, directory):
    def key(*overrides):
        return next(key for key, stage in make_plan(recipe(*overrides)).stages.items() if stage.kind == "distill")

    named, other = (key(f"models.xl.serve={{at: http://a:1, name: {name}}}") for name in (directory, "xl-int4"))
    assert named == key() != other
    served, local, elsewhere = key(), key("models.xl.serve=null"), key("models.xl.serve=[http://b:1,http://c:2]")
    sparse, k = key(TOP_K), key("models.xl.serve={at: http://a:1, gives: top_k, k: 5}")
    assert served == local == elsewhere
    assert len({served, sparse, k}) == 3


INT4 = "models.xq={load: DIRECTORY, serve: {at: http://b:1, name: xl-int4}}"
BOTH = "arms={quantised: xq > s}"


def test_a_quantised_server_teaches_a_student_of_its_own(recipe, directory, tmp_path):
    given = INT4.replace("DIRECTORY", directory), BOTH
    plan = make_plan(recipe(*given))
    found = {next(iter(stage.arms)): stage for stage in plan.stages.values() if stage.kind == "distill"}
    assert found.keys() == {"direct", "quantised"}
    assert found["quantised"].spec.content()["teacher"]["served_as"] == "xl-int4"
    assert [name_of(plan, found[arm].spec.teacher) for arm in found] == ["xl", "xq"]
    assert "count as one teacher" not in notes(plan, tmp_path)
    of_files, of_server = (  # a student that is pruned from the files learns nothing from the server
        {*make_plan(recipe(*given[:1], f"models.p={{init: {{from: {name}, layers: 1}}}}", "arms={direct: xl > p}")).stages}
        for name in ("xl", "xq")
    )
    assert of_files == of_server


def test_two_arms_that_are_one_training_are_named(recipe, directory, tmp_path):
    plan = make_plan(recipe(INT4.replace("DIRECTORY", directory).replace(", name: xl-int4", ""), BOTH))
    assert sum(stage.kind == "distill" for stage in plan.stages.values()) == 1
    text = " ".join(notes(plan, tmp_path).split())
    assert "xl and xq count as one teacher, because" in text
    assert "so direct and quantised have stages in common. If a server runs other weights, such as quantised ones, give them a name" in text


def test_two_servers_with_one_name_are_one_teacher(recipe, directory, tmp_path):
    """The plan said that these are servers of the model's own files."""
    given = (f"models.{name}={{load: {directory}, serve: {{at: http://{name}:1, name: q4}}}}" for name in ("xq", "xr"))
    text = " ".join(notes(make_plan(recipe(*given, "arms={q: xq > s, r: xr > s}")), tmp_path).split())
    assert "xq and xr count as one teacher, because both have the name `q4`, so q and r have stages in common." in text
    assert "such as quantised ones, give them another name in `models.xr.serve.name`" in text


def test_a_name_of_the_models_files_is_no_other_name(directory, tmp_path):
    """The folder beside the recipe, and its path, are one source: the name shared a key, but no sentence said so."""
    (tmp_path / "models").symlink_to(Path(directory).parent)
    near = f"models/{Path(directory).name}"
    (tmp_path / "r.yaml").write_text(RECIPE.replace("DIRECTORY", near))
    given = f"models.xq={{load: {near}, serve: {{at: http://b:1, name: {near}}}}}", BOTH
    plan = make_plan(load(tmp_path / "r.yaml", given))
    assert sum(stage.kind == "distill" for stage in plan.stages.values()) == 1
    assert "xl and xq count as one teacher, because" in " ".join(notes(plan, tmp_path).split())
    with pytest.raises(ConfigError, match=r"other numbers than the files of models\.xq; give the model on the server a name of its"):
        server_command(plan.recipe, "xq", more=["--quantization", "fp8"])


@pytest.mark.parametrize(
    "more",
    [
        *(["--quantization", "fp8"], ["--quantization=fp8"], ["-q", "fp8"], ["--kv_cache_dtype", "fp8"], ["--dty", "half"]),
        *(["--hf-overrides", "{}"], ["--hf-overrides.rope_theta", "9"], ["--quantization-config", "{}"], ["--lora-modules", "a=b"]),
        *(
            ["--load-format", "dummy"],
            ["--load_format=dummy"],
            ["-qfp8"],
            ["--model=other"],
            ["--revision", "v2"],
            ["--code-revision", "v2"],
        ),
        *(["--tokenizer", "other"], ["--tokenizer-revision", "v2"], ["--hf_config_path", "x"], ["--config", "x"], ["--logprobs-mode", "x"]),
    ],
)
def test_a_server_of_other_numbers_needs_a_name(recipe, directory, more):
    for own in ((), (f"models.xl.serve={{at: http://a:1, name: {directory}}}",)):
        with pytest.raises(ConfigError, match=r"other numbers than the files of models\.xl; give the model on the server a name of its"):
            server_command(recipe(*own), "xl", more=more)
    named = server_command(recipe("models.xl.serve={at: http://a:1, name: xl-fp8}"), "xl", more=more)
    assert named[named.index("--served-model-name") + 1] == "xl-fp8"
    server_command(recipe(), "xl", more=["--load-format", "safetensors", "--tokenizer-mode", "slow", "-r", "1", "--", "-tp", "2"])


def test_a_served_teacher_needs_no_memory_here(recipe):
    def memory(*overrides):
        return next(s.cost.memory.frozen for s in make_plan(recipe(*overrides)).stages.values() if s.kind == "distill")

    assert memory() < memory("models.xl.serve=null")


REVERSE, FORWARD = "method.objective={type: reverse_kl}", "method.objective={type: forward_kl}"


def recorded(signal):
    return f"arms.direct={{path: xl > s, sampler: {{type: dataset, signal: {signal}}}}}"


INEXACT = {
    (REVERSE,): None,
    (TOP_K, REVERSE): "the loss `reverse_kl` of s is approximate: the server of xl sends the 20 most probable tokens, and all other tokens "
    "count as one",
    (TOP_K, "method.objective={type: sampled_kl}"): None,
    (TOP_K, "method.objective={type: minillm, pt_weight: 0, single_step: false}"): None,
    (REVERSE, recorded("{type: hidden}")): None,
    (
        REVERSE,
        recorded("{type: hidden, dtype: bfloat16}"),
    ): "the loss `reverse_kl` of s is approximate: the recording of xl has hidden states in bfloat16",
    (REVERSE, recorded("{type: top_k, k: 9, tail: drop}")): "the loss `reverse_kl` of s is approximate: the recording of xl has the 9 most "
    "probable tokens, and all other tokens are left out",
    (TOP_K, REVERSE, recorded("{type: top_k, k: 9}")): "the loss `reverse_kl` of s is approximate: the recording of xl has the 9 most "
    "probable tokens, and all other tokens count as one",
    (
        FORWARD,
        recorded("{type: sampled}"),
    ): "the loss `forward_kl` of s is an unbiased estimate: the recording of xl has 50 drawn tokens for each position",
}


SHOWN = [*INEXACT][:2] + [*INEXACT][-1:]
"""An exact loss, an approximate one and an estimate: the page, the report and the card write the plan's sentence."""


@pytest.mark.parametrize("overrides", INEXACT)
def test_an_inexact_loss_is_named_in_the_plan_the_report_and_the_model_card(overrides, recipe, tmp_path):
    plan = make_plan(recipe(*overrides))
    sentence = INEXACT[overrides]
    assert approximations(plan, "direct") == ([sentence] if sentence else [])
    texts = {"plan": notes(plan, tmp_path)} | (pages(plan, tmp_path) if overrides in SHOWN else {})
    flat = {name: " ".join(text.replace("\\", "").split()) for name, text in texts.items()}
    for name, text in flat.items():
        if sentence:
            assert sentence.removeprefix("the ") in text, name
        else:
            assert "approximate" not in text, name


def notes(plan, folder):
    console = Terminal(width=400, record=True, file=io.StringIO())
    console.print(preview(plan, Store(folder), 200))
    return console.export_text()


def pages(plan, folder):
    """The report as a page and as Markdown, and the model card of the arm, of a study of which no stage has run."""
    results = read_results(save_plan(plan, folder, recipe_text="", command="tadistill run"), Store(folder))
    card = model_card(results, "direct", 1, folder, "name")
    return {"page": html.unescape(render_page(results)), "report": render_markdown(results), "card": card}


def test_the_plan_says_where_a_teacher_runs_and_what_a_token_costs(recipe, tmp_path):
    def of(*overrides):
        return notes(make_plan(recipe(*overrides)), tmp_path)

    assert "Teacher xl runs on http://127.0.0.1:8001. For each token that it reads, a server sends the hidden state, 256 bytes" in of()
    assert "128 bytes (bfloat16)" in of("method.optim.precision=bf16")
    text = of(TOP_K)
    assert "the 20 most probable tokens as JSON, about 1,470 bytes" in text
    assert "exposure" not in text
    assert "Teacher xl" not in of("models.xl.serve=null")


def test_a_student_is_compared_with_a_served_teacher_but_not_with_its_answers(recipe, tmp_path):
    plan = make_plan(recipe("analyse=true"))
    (spec,) = (stage.spec for stage in plan.stages.values() if stage.kind == "analyse")
    assert (spec.teacher_answers, running(spec)) == (None, (spec.teacher,))
    assert [stage.model for stage in plan.stages.values() if stage.kind == "evaluate"] == ["s"]
    assert "The exposure bias is not measured, because the server of xl writes no answers." in notes(plan, tmp_path)
    local = make_plan(recipe("analyse=true", "models.xl.serve=null"))
    assert {stage.model for stage in local.stages.values() if stage.kind == "evaluate"} == {"s", "xl"}


def test_the_longest_text_contains_the_answers_to_test_prompts(recipe):
    given = "data.max_prompt=60", "data.max_length=64", "evaluate.max_new_tokens=30"
    assert longest_text(recipe(*given)) == 64
    assert longest_text(recipe(*given, "analyse=true")) == 90


def test_the_longest_text_contains_the_context_of_the_teacher(recipe):
    given = "data.max_prompt=60", "data.max_length=64", 'method.context={template: "{output} {prompt}", max_prompt: 200}'
    assert longest_text(recipe(*given)) == 264
    sampled = recipe(*given, "method.sampler={type: student, max_new_tokens: 80}")
    assert longest_text(sampled) == 280
    assert [s.spec.longest for s in make_plan(sampled).stages.values() if s.kind == "distill"] == [280]


def test_a_text_has_more_tokens_for_a_teacher_with_a_tokenizer_of_its_own(recipe):
    across = recipe("models.s.tokenizer=tinyworld-bpe", "analyse=false")
    assert [s.spec.longest for s in make_plan(across).stages.values() if s.kind == "distill"] == [LONGER * longest_text(across)]


def test_a_server_with_another_tokenizer_is_started_for_longer_texts(recipe):
    def length(*overrides):
        command = server_command(recipe("data.max_prompt=60", "data.max_length=64", *overrides), "xl")
        return command[command.index("--max-model-len") + 1]

    assert length() == "64"
    assert length("models.s.tokenizer=tinyworld-bpe") == "256"
    for absent in ("/absent/tokenizer", "none-such/tokenizer"):  # on the server's machine, the other models' files can be absent
        assert length(f"models.s.tokenizer={absent}") == "256"
    assert length("models.q={load: /absent/model}", "arms={direct: xl > q}") == "256"


def test_more_tokens_than_the_model_has_are_refused(recipe):
    given = recipe("models.xl.serve={at: http://127.0.0.1:9, gives: top_k, k: 49500}")
    for work in (make_plan, lambda recipe: server_command(recipe, "xl"), lambda recipe: check_model(recipe, "xl")):
        with pytest.raises(ConfigError, match=r"models\.xl\.serve\.k is 49,500, but the model has only \d+ tokens; set `k` to at most \d+"):
            work(given)


def test_all_tokens_are_exact(recipe, directory):
    size = json.loads((Path(directory) / "config.json").read_text())["vocab_size"]
    of = {k: approximations(make_plan(recipe(f"models.xl.serve={{at: http://a:1, gives: top_k, k: {k}}}")), "direct") for k in (size, 9)}
    assert of[size] == []
    assert "sends the 9 most probable tokens" in of[9][0]


def test_a_server_that_sends_top_k_needs_no_head_here_and_has_speeds_of_its_own(recipe):
    hidden, sparse, other = (
        next(stage.cost for stage in make_plan(recipe(each)).stages.values() if stage.kind == "distill")
        for each in (REVERSE, TOP_K, "models.xl.serve={at: http://a:1, gives: top_k, k: 5}")
    )
    assert hidden.memory.frozen > sparse.memory.frozen == 0
    assert hidden.memory.logits == 2 * sparse.memory.logits
    assert len({hidden.kind, sparse.kind, other.kind}) == 3


def test_a_server_reads_no_padding(recipe):
    def read(*overrides):
        (stage,) = (s for s in make_plan(recipe("method.optim.batch=8", *overrides)).stages.values() if s.kind == "distill")
        return {side: stage.cost.parts[f"training/{side}"].positions for side in ("teacher", "student")}

    served, local, packed = read(), read("models.xl.serve=null"), read("models.xl.serve=null", "method.optim.packed=true")
    assert served["teacher"] == packed["teacher"] < local["teacher"] == local["student"] == served["student"]


def test_the_command_of_a_server(recipe, directory):
    found = server_command(recipe(), "xl", more=["--tensor-parallel-size", "4"])
    assert found[:5] == ["vllm", "serve", directory, "--served-model-name", directory]
    assert found[found.index("--port") + 1] == "8001"
    assert found[found.index("--dtype") + 1] == "float32"
    assert found[found.index("--runner") + 1] == "pooling"
    assert found[-2:] == ["--tensor-parallel-size", "4"]
    sparse = server_command(recipe(TOP_K, "method.optim.precision=bf16"), "xl", host="0.0.0.0", port=9)
    assert sparse[sparse.index("--max-logprobs") + 1] == "20"
    assert "--runner" not in sparse
    assert (sparse[sparse.index("--host") + 1], sparse[sparse.index("--port") + 1], sparse[sparse.index("--dtype") + 1]) == (
        "0.0.0.0", "9", "bfloat16",
    )  # fmt: skip
    with pytest.raises(ConfigError, match="the recipe has no model `l`"):
        server_command(recipe(), "l")
    with pytest.raises(ConfigError, match="is not loaded from files"):
        server_command(recipe(), "s")


def test_a_model_that_the_study_trains_cannot_be_served(recipe, directory):
    """`tadistill serve RECIPE STUDENT --dry-run` printed a command."""
    trained = f"models.q={{load: {directory}}}"
    for change in ("arms.b=xl > q", "models.q.sft={optim: {steps: 1}}", "models.q.lora={r: 2}"):
        with pytest.raises(
            ConfigError, match=r"models\.q is trained by this study, so no server can run it; name a model that only teaches"
        ):
            server_command(recipe(trained, change), "q")


def test_the_length_of_a_server_is_that_of_the_longest_text(recipe):
    """vLLM refuses `--max-model-len` above the positions of a model. A server of hidden states takes texts of this length; one that
    generates takes only shorter ones (`_validate_prompt_len` of vLLM 0.32)."""
    lengths = [server_command(recipe(*given), "xl") for given in ((), (TOP_K,))]
    longest = longest_text(recipe())
    assert [found[found.index("--max-model-len") + 1] for found in lengths] == [str(longest), str(longest + 1)]


def test_serve_starts_the_vllm_that_the_environment_names(recipe, monkeypatch, tmp_path):
    started = []
    monkeypatch.setattr(os, "execve", lambda program, command, _: started.append((program, command)))
    monkeypatch.setenv("TADISTILL_VLLM", str(tmp_path))
    with pytest.raises(
        ConfigError, match=r"\(TADISTILL_VLLM\), but `tadistill serve` needs it.*or run the printed command where vLLM is installed"
    ):
        start_server(recipe(), "xl", ["vllm", "serve"])
    (tmp_path / "bin").mkdir()
    for name in ("vllm", "python"):
        (tmp_path / "bin" / name).touch(mode=0o755)
    start_server(recipe(), "xl", ["vllm", "serve"])
    assert started == [(tmp_path / "bin" / "vllm", ["vllm", "serve"])]


def test_doctor_checks_the_servers(recipe):
    ((title, state, wrong, fix),) = examined(recipe("models.xl.serve={at: http://127.0.0.1:9, key: OUR_KEY}"))
    assert (title, state) == ("teacher xl", "problem")
    assert wrong == "serve.key names the environment variable OUR_KEY, which is not set"
    assert fix == "set this variable to the API key of the server"
    ((_, state, wrong, fix),) = examined(recipe("models.xl.serve=http://127.0.0.1:9"))
    assert state == "problem"
    assert "the server http://127.0.0.1:9 of `" in wrong
    assert fix.startswith("start the server")
