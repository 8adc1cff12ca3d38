"""Mistakes that people make in recipes, with the words that a message must have: what is wrong, where, and how to mend it."""

from pathlib import Path

import pytest
import torch

import tadistill
from tadistill.config import load
from tadistill.config.recipe_files import placed
from tadistill.data import survey
from tadistill.errors import ConfigError, DataError, TadistillError
from tadistill.objectives import Head, Hidden, fused_divergence, reverse_kl
from tadistill.plan.arms import make_plan
from tadistill.results.study import find_study
from tadistill.runner.preflight import check_inputs
from tadistill.runner.run_study import fetch_models
from tadistill.terminal import Terminal

RECIPE = """\
study: my
seeds: [10]
models:
  xl:
    load: scratch:llama
    tokenizer: tinyworld
    config: {hidden_size: 32, num_hidden_layers: 4, num_attention_heads: 4, intermediate_size: 64}
  s: {init: {from: xl, layers: 2}}
data:
  train: chat.jsonl
  dev: chat.jsonl
  test: [chat.jsonl]
method:
  optim: {steps: 4, batch: 4, lr: 1e-4}
arms:
  direct: xl > s
"""
ROW = '{"prompt": "a", "completion": "b"}\n'
OWN = RECIPE[RECIPE.index("scratch:") : RECIPE.index("\n  s:")]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "study"
    place.mkdir()
    (place / "chat.jsonl").write_text(ROW * 8)
    (place / "mydir").mkdir()
    monkeypatch.chdir(place)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return place


def problems(folder: Path, text: str, *overrides: str) -> tuple[str, ...]:
    (folder / "my.yaml").write_text(text)
    with pytest.raises(TadistillError) as error:
        make_plan(load("my.yaml", overrides))
    return error.value.problems


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ("lr: 1e-4", "learning_rate: 1e-4", 14, "`method.optim.learning_rate` is not a known key; did you mean `lr`?"),
        ("lr: 1e-4", "per_device_train_batch_size: 4", 14, "did you mean `micro_batch`?"),
        ("lr: 1e-4", "bf16: true", 14, "did you mean `precision`?"),
        ("load: scratch", "model_name_or_path: scratch", 5, "did you mean `load`?"),
        ("arms:", "lora: {r: 8}\narms:", 15, "did you mean `models.NAME.lora`?"),
        ("arms:", "template: chat\narms:", 15, "did you mean `data.template`?"),
        ("train: chat.jsonl", "train: {load: chat.jsonl, weight: 2}", 10, "did you mean `data.train.NAME.weight`?"),
        ("xl > s", "{path: xl > s, phases: [{teacher: s}]}", 16, "did you mean `teacher`, at the top level of the recipe?"),
        ("xl > s", "{path: xl > s, sampler: {max_new_tokens: 9}}", 16, "`arms.direct.sampler` needs a `type`, which decides its"),
        ("[chat.jsonl]", "12", 12, "`data.test` is 12: write a list: [12]"),
        ("[10]", "10", 2, "`seeds` is 10: write a list: [10]"),
        ("[chat.jsonl]", "[chat.jsonl, chat.jsonl]", 12, "`data.test`: two data sets have the name `chat`; rename one of the files"),
        ("[chat.jsonl]", "[chat.jsonl, sets/mean.jsonl]", 12, "`data.test`: a test set cannot be called `mean`, which means the mean"),
        ("optim:", "sampler: {type: teacher_mixed, recorded: true}\n  optim:", 14, "is not a known key; it belongs to another `type`"),
        ("arms:", "runtime: {trackers: wandb}\narms:", 15, "`runtime.trackers` is 'wandb': write a list: [wandb]"),
        ("arms:", "runtime: {trackers: [wandbb]}\narms:", 15, "did you mean 'wandb'?"),
        ("lr: 1e-4", "lr: fast", 14, "`method.optim.lr` is 'fast': write a number, such as"),
        ("steps: 4", "steps: 1.5", 14, "`method.optim.steps` is 1.5: write a whole number"),
        ("lr: 1e-4", "gradient_checkpointing: maybe", 14, "is 'maybe': write true or false"),
        ("lr: 1e-4", "betas: [0.9]", 14, "`method.optim.betas` has 1 value; write 2, such as [0.9, 0.999]"),
        ("{steps: 4, batch: 4, lr: 1e-4}", "4", 14, "`method.optim` is 4, but it must be a group of keys; write keys below optim"),
        ("xl > s", "[xl, s]", 16, "write a path, such as xl > s"),
        ("optim:", "objective: forward_kl\n  optim:", 14, "write {type: forward_kl}"),
        ("optim:", "objective: {type: gkd}\n  optim:", 14, "is a method and not an objective; write `method: gkd`"),
        ("optim:", "objective: {type: revers_kl}\n  optim:", 14, "did you mean `reverse_kl`?"),
        ("study: my", "study: my study", 1, "and begin with a letter or a digit, for instance my-study"),
        ("study: my", "study:", 1, "`study` has no value; write a value after the colon"),
        ("study: my", "study: 010", 1, "`study` is 8: YAML reads this text as a number; put it in quotes"),
        ("  direct:", "  010:", 16, "YAML reads the key `010` as the number 8; put it in quotes"),
        ("  direct:", "  1_000:", 16, "YAML reads the key `1_000` as the number 1000; put it in quotes"),
        ("  direct:", "  1e3:", 16, "YAML reads the key `1e3` as the number 1000.0; put it in quotes"),
        ("  direct:", "  1 ${x}:", 15, "contains `${`, but a recipe cannot refer to environment variables or to other keys"),
        ("arms:", "evaluate: {seeds: []}\narms:", 15, "`evaluate.seeds` is empty; write at least 1"),
        ("xl > s", "xl > ss", 16, "`arms.direct.path` names `ss`, which is not a model; did you mean `s`?"),
        ("xl > s", "xl -> s", 16, "write `>` between two models"),
        ("xl > s", "xl → s", 16, "write `>` between two models"),
        ("xl > s", "xl > s\n  twin: {path: xl > s, compute: as dirct}", 17, "but `dirct` is not an arm; did you mean `direct`?"),
        ("layers: 2", "layers: 60", 8, "models.s.init.layers is 60, but `xl` has 4 layers, and pruning only removes layers; write 1"),
        ("hidden_size", "hiden_size", 4, "has no `hidden_size` (is `hiden_size` a mistyped `hidden_size`?)"),
        ("train: chat", "train: chta", 10, "`data.train`: data set `chta.jsonl` does not exist: there is no `chta.jsonl` in"),
        ("[chat.jsonl]", "[chat.jsonl, no/x.jsonl]", 12, "no does not exist; correct the path"),
        (OWN, "./mydri", 5, "model directory `./mydri` does not exist: there is no `mydri` in"),
        (OWN, "https://huggingface.co/org/name/tree/main", 5, "is a web address; write the hub id `org/name`"),
        ("[chat.jsonl]", "['https://example.org/x.jsonl']", 12, "is a web address; download the file and write its path"),
        ("  direct: xl > s", "  - xl > s", 15, "write lines of the form NAME: … below arms, for instance direct: xl > s"),
        ("tokenizer: tinyworld", "tokenizer: tinyworld-bp", 6, "no tokenizer `tinyworld-bp`; write tinyworld or tinyworld-bpe"),
        ("scratch:llama", "scratch:t5", 4, "models.xl: scratch:t5: transformers has no causal language model of this type; see the"),
        ("scratch:llama", "scratch:bert", 5, "is of type bert, which reads text in both directions unless its config.json has"),
        ("scratch:llama", "scratch:lama", 4, "no causal language model of this type; did you mean `llama`?"),
        ("hidden_size: 32", "hidden_size: 33", 4, "config.hidden_size of scratch:llama is 33, but it must be a multiple of num_"),
        ("tokenizer: tinyworld", "tokenizer: tinywrld", 6, "tinyworld has no tokenizer `tinywrld`; write tinyworld or tinyworld-bpe"),
        ("steps: 4", "steps: 4, epochs: 1", 14, "`method.optim`: steps is 4 and epochs is 1, but only one of them can set the number of"),
        (OWN, "x.gguf", 5, "GGUF file `x.gguf` does not exist: there is no `x.gguf` in"),
    ],
)  # fmt: skip
def test_a_message_says_what_where_and_how(folder, old, new, line, words):
    assert old in RECIPE
    found = problems(folder, RECIPE.replace(old, new, 1))
    assert any(p.startswith(f"my.yaml, line {line}") and words in p for p in found), found
    assert not any("input should" in p or "tuple" in p or "dictionary" in p or "parse" in p for p in found)


def test_a_mistyped_tokenizer_is_refused_before_a_download(folder):
    (found,) = problems(folder, text := RECIPE.replace("tokenizer: tinyworld", "tokenizer: tinywrld"))
    (folder / "my.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        fetch_models(load("my.yaml"), Terminal())
    assert error.value.problems == (found,)


@pytest.mark.parametrize(
    ("old", "new", "place", "words"),
    [
        ("  dev: chat", " dev: chat", "line 11, column 2", "indent it like them"),
        ("  dev: chat", "\tdev: chat", "line 11, column 1", "a tab is used for indentation; indent with spaces only"),
        ("study: my", "study: my: own", "line 1, column 10", "put the text in quotes"),
        ("[10]", "[10", "line 2, column 8", "the list that opens here is never closed; close it with ]"),
        ("1e-4}", "1e-4", "line 14, column 10", "the braces that open here are never closed; close them with }"),
        ("seeds:", "seeds", "line 2, column 1", "a key has no colon; write `key: value`"),
        ("study: my", "study: *my", "line 1, column 8", "put the text in quotes"),
        ("study: my", "study: @my", "line 1, column 8", "put the text in quotes"),
    ],
)
def test_text_that_is_not_yaml_has_line_column_and_reason(folder, old, new, place, words):
    (found,) = problems(folder, RECIPE.replace(old, new, 1))
    assert found.startswith(f"my.yaml, {place}, cannot be read as YAML: ")
    assert words in found
    assert "block mapping" not in found
    assert "unicode string" not in found


def test_all_names_and_sources_that_do_not_exist_are_shown(folder):
    assert len(problems(folder, RECIPE.replace("xl > s", "xl > ss\n  more: q"))) == 2
    found = problems(folder, RECIPE.replace(OWN, "./a").replace("train: chat", "train: b").replace("[chat", "[c"))
    assert [p.split(":")[0] for p in found] == ["my.yaml, line 5", "my.yaml, line 8", "my.yaml, line 10"]
    assert problems(folder, RECIPE.replace("seeds:", "seed:")) == ("my.yaml, line 2: `seed` is not a known key; did you mean `seeds`?",)
    (twice,) = problems(folder, RECIPE + "study: x\n")
    assert twice == "my.yaml, line 17: the key `study` is already in line 1; keep one of the two"
    (override,) = problems(folder, RECIPE, "seeds=[10")
    assert override.startswith("override `seeds=[10`, line 1, column 1, cannot be read as YAML: ")


def test_paths_are_those_beside_the_recipe_and_keys_stay(folder, monkeypatch):
    (folder / "my.yaml").write_text(RECIPE)
    here = [*make_plan(load("my.yaml")).stages]
    (folder.parent / "chat.jsonl").write_text(ROW)  # other rows at the same path of another working directory
    monkeypatch.chdir(folder.parent)
    assert [*make_plan(load("study/my.yaml")).stages] == here
    with pytest.raises(ConfigError, match=r"no recipe `study/myy.yaml` in .*; did you mean `study/my.yaml`\?"):
        load("study/myy.yaml")
    (folder / "chat.jsonl").rename(folder.parent / "chat.jsonl")  # not beside the recipe: in the working directory
    assert [*make_plan(load("study/my.yaml")).stages] == here


def test_a_model_beside_the_recipe_keeps_its_key(folder, monkeypatch):
    (folder / "mydir" / "config.json").write_text('{"model_type": "gpt2"}')
    (folder / "my.yaml").write_text(RECIPE)
    inside = load("my.yaml", ["models.t={load: mydir}"])
    monkeypatch.chdir(folder.parent)
    outside = load("study/my.yaml", ["models.t={load: mydir}"])
    assert inside.models["t"].load == "mydir"
    assert outside.models["t"].load == str(folder / "mydir")
    assert outside.written(outside.models["t"].load) == "mydir"


def test_a_study_is_found_by_its_recipe(folder):
    (folder / "my.yaml").write_text(RECIPE)
    (folder / "runs" / "my").mkdir(parents=True)
    (folder / "runs" / "my" / "plan.json").write_text("{}")
    assert find_study("my.yaml", folder / "runs")[0] == folder / "runs" / "my"
    with pytest.raises(ConfigError, match=r"no study `mya` in .*; did you mean `my`\?"):
        find_study("mya", folder / "runs")


def test_misuse_of_the_python_functions(folder):
    with pytest.raises(ConfigError, match=r"recipe(, line 1)?: `seed` is not a known key; did you mean `seeds`"):
        tadistill.run({"seed": 1})
    with pytest.raises(ConfigError, match=r"settings: `seed` is not a known key; did you mean `seeds`"):
        tadistill.evaluate(None, None, "tinyworld", settings={"seed": 1})  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match=r"`template` is 'cat': did you mean 'chat'"):
        tadistill.evaluate(None, None, "tinyworld", template="cat")  # pyright: ignore[reportArgumentType]
    hidden, layer = torch.zeros(2, 3), torch.nn.Linear(3, 5)
    teacher = Hidden(hidden, Head(layer.weight))
    for head in (layer.weight, layer):
        with pytest.raises(ConfigError, match=r"`student_head` is a .*, but it must be a Head; write Head\("):
            fused_divergence(reverse_kl, hidden, head, teacher)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match=r"the head of `Hidden` is a .*; write Head\("):
        fused_divergence(reverse_kl, hidden, teacher.head, Hidden(hidden, layer))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match=r"`Head` takes the weight of the last layer"):
        Head(layer)  # pyright: ignore[reportArgumentType]


def test_places_in_the_short_form(folder):
    """Its teacher is a model of the long form, and its only arm is named by nobody."""
    text = "study: my\nteacher: ./mydri\nstudent: ./mydri\ndata: chat.jsonl\nmethod: {name: gkd, optim: {epochs: 1}}\n"
    found = problems(folder, text)
    assert [problem.split(": model directory")[0] for problem in found] == [
        "my.yaml, line 2: models.teacher",
        "my.yaml, line 3: models.student",
    ]
    model = "{" + OWN.replace("scratch", "load: scratch", 1).replace("\n    ", ", ") + "}"
    (folder / "chat.jsonl").write_text('{"question": "a"}\n')
    (problem,) = problems(folder, text.replace("./mydri", model))
    assert problem.startswith("my.yaml, line 4: data.train: data set `chat.jsonl`, line 1 has no column")


def test_the_part_of_a_data_set_that_is_wrong_is_named(folder):
    """One folder is the data set of two keys."""
    (folder / "mine").mkdir()
    (folder / "mine" / "train.jsonl").write_text(ROW)
    text = RECIPE.replace("train: chat.jsonl", "train: mine").replace("dev: chat.jsonl", "dev: mine")
    (problem,) = problems(folder, text)
    assert problem.startswith("my.yaml, line 11: `data.dev`: data set `mine` is the folder")


@pytest.mark.parametrize(
    ("problem", "place"),
    [
        ("no row of data set `tinyworld` (dev) has a prompt of at most 12 tokens", "12: `data.dev`"),
        ("no row of data set `tinyworld` (test) has a prompt of at most 12 tokens", "13: `data.test.0`"),
        ("no row of data set `own` (test) has a prompt of at most 12 tokens", "13: `data.test.1`"),
        ("select.metric is numeric, but the dev set `tinyworld` names no column of right answers", "12: `data.dev`"),
        ("data set `tinyworld` has no split `dev`; its splits are train, test", "12: `data.dev`"),
    ],
)
def test_the_line_is_that_of_the_key_whose_data_a_message_is_about(folder, problem, place):
    """Several keys have one data set, and messages have its short name."""
    text = RECIPE.replace("[chat.jsonl]", "[tinyworld, ./data/own.jsonl]").replace("chat.jsonl", "tinyworld")
    (folder / "my.yaml").write_text(text.replace("data:\n", "data:\n  corpus: tinyworld\n"))

    def check(recipe):
        raise DataError(problem)

    with pytest.raises(DataError) as error:
        placed(check)(load("my.yaml"))
    assert str(error.value) == f"my.yaml, line {place}: {problem}"


@pytest.mark.parametrize(
    ("key", "changed", "place"),
    [
        ("train", "columns: {prompt: question}", "line 10: data.train: data set `chat.jsonl` has 8 wrong rows among 8"),
        ("dev", "columns: {prompt: question}", "line 11: data.dev: data set `chat.jsonl` has 8 wrong rows among 8"),
        ("test", "columns: {prompt: question}", "line 12: data.test: data set `chat.jsonl` has 8 wrong rows among 8"),
        ("corpus", "columns: {}", "line 13: data.corpus: data set `chat.jsonl` has 8 wrong rows among 8"),
        ("corpus", "columns: {text: gap}", "line 13: data.corpus: data set `chat.jsonl` contains no text"),
    ],
)
def test_a_wrong_row_has_the_line_of_the_key_that_reads_it(folder, key, changed, place):
    """One file is the data set of all keys. Those of the corpus had the line of the training set."""
    (folder / "chat.jsonl").write_text('{"prompt": "a", "completion": "b", "gap": ""}\n' * 8)
    data = {"train": "chat.jsonl", "dev": "chat.jsonl", "test": "chat.jsonl", "corpus": "{load: chat.jsonl, columns: {text: prompt}}"}
    lines = "".join(f"  {name}: {given}\n" for name, given in (data | {key: f"{{load: chat.jsonl, {changed}}}"}).items())
    method = "method: {name: minillm, optim: {steps: 4, batch: 4, lr: 1e-4}}\n"
    (folder / "my.yaml").write_text(RECIPE[: RECIPE.index("  train:")] + lines + method + RECIPE[RECIPE.index("arms:") :])
    with pytest.raises(DataError) as error:
        placed(lambda recipe: survey.check(make_plan(recipe).recipe))(load("my.yaml"))
    assert error.value.problems[0].startswith(f"my.yaml, {place}")


def test_a_dev_set_whose_prompts_are_too_long_is_found_by_its_line(folder):
    text = RECIPE.replace("[chat.jsonl]", "[tinyworld]").replace("chat.jsonl", "tinyworld")
    (folder / "my.yaml").write_text(
        text.replace("data:\n", "data:\n  max_prompt: 12\n  template: plain\n  world: {people: 20}\n  limit: {dev: 2}\n")
    )
    with pytest.raises(DataError, match=r"^my.yaml, line 15: `data.dev`: no row of data set `tinyworld` .dev."):
        placed(lambda recipe: check_inputs(make_plan(recipe)))(load("my.yaml"))
