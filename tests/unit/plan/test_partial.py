"""A plan before the models and the data are on this disk: no error, and the reasons for what is missing."""

import io
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import errors

from tadistill.config import DataRef, load, parse
from tadistill.config.recipe import sampled_tokens
from tadistill.data import hub
from tadistill.errors import ConfigError, DataError, ModelError, NotHere
from tadistill.models import sources
from tadistill.plan import preview
from tadistill.plan.arms import make_plan
from tadistill.plan.costs import sizes_and_lengths
from tadistill.plan.task import name_of
from tadistill.runner.preflight import check_inputs
from tadistill.store import Store
from tadistill.terminal import Terminal

RECIPE = "recipes/takd/gpt2-takd.yaml"
SMALL = """
study: small
seeds: [1]
models:
  xl: {{load: org/xl, {xl}}}
  s: {{load: "scratch:gpt2", tokenizer: tinyworld, config: {{n_embd: 8, n_layer: 1, n_head: 1, n_positions: 64}}}}
data: {{train: tinyworld, dev: tinyworld, test: [tinyworld], template: plain}}
method: {{optim: {{steps: 2, batch: 2}}}}
evaluate: {{max_new_tokens: 8}}
arms: {{direct: xl > s}}
"""
GPT2 = {"model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12}


@pytest.fixture(autouse=True)
def nothing_here(monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "reachable", lambda: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(sources, "hub_cached", lambda *_: None)
    monkeypatch.setattr(hub, "cached", lambda *_: None)


def shown(plan, tmp_path):
    console = Terminal(file=io.StringIO(), width=300)
    preview.print_plan(plan, Store(tmp_path), console)
    return console.file.getvalue()


def test_a_published_recipe_is_planned_without_its_models(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "description_file", lambda *_, **__: None)
    plan = make_plan(load(RECIPE), partial=True)
    assert {"2.A", "2.D", "3.D", "4.D-dense"} <= {arm.name for arm in plan.arms}
    assert set(plan.absent) == {"3.A-twin", "3.B-twin", "3.C-twin", "3.D-twin", "4.B-same-size-ta"}
    assert all(stage.arms for stage in plan.stages.values())
    text = shown(plan, tmp_path)
    assert "The sizes of xl (MiniLLM/teacher-gpt2-1.5B), l (MiniLLM/init-gpt2-760M)" in text
    assert "`tadistill fetch RECIPE` downloads what is missing" in text
    reason = "arms.3.A-twin has `compute: as 3.A`, which needs the sizes of models that are not on this disk (xl, l, m, s, same)"
    assert f"Arm 3.A-twin is left out of this plan: {reason}" in text
    assert "data set `dolly` (train) is not on this disk" in text
    with pytest.raises(NotHere, match=re.escape(f"{reason}; run `tadistill fetch RECIPE`")):
        make_plan(load(RECIPE, ["models.same={load: openai-community/gpt2-xl}"]))


def test_an_unknown_size_is_of_a_model_with_its_whole_name(monkeypatch):
    monkeypatch.setattr(sources, "description_file", lambda *_, **__: None)
    named = re.sub(r"(?<!-)\bxl\b", "the teacher", Path(RECIPE).read_text())
    plan = make_plan(parse(named, source="named"), partial=True)
    assert "not on this disk (the teacher, l, m, s, same); " in str(plan.absent["3.A-twin"])


@pytest.mark.slow
def test_config_json_is_enough(tmp_path, monkeypatch):
    data = tmp_path / "minillm_dolly"
    data.mkdir()
    row = json.dumps({"instruction": "what is it", "input": "", "output": "it is red"})
    for split in ("train", "dev", "test"):
        (data / f"{split}.jsonl").write_text(f"{row}\n" * 64)
    monkeypatch.setenv("TADISTILL_DATA", str(tmp_path))
    sizes = {"MiniLLM/teacher-gpt2-1.5B": 48, "openai-community/gpt2-xl": 48, "MiniLLM/init-gpt2-760M": 36, "MiniLLM/init-gpt2-340M": 24}

    def description_file(load, revision="main", *, download=False):
        path = tmp_path / f"{load.replace('/', '-')}.json"
        path.write_text(json.dumps(GPT2 | {"n_layer": sizes.get(load, 12)}))
        return path

    monkeypatch.setattr(sources, "description_file", description_file)
    plan = make_plan(load(RECIPE), partial=True)
    assert not plan.absent
    assert all(arm.flops for arm in plan.arms if arm.arm.learners)
    assert "?" not in shown(plan, tmp_path).split("parts of the most")[0]


def test_sizes_in_the_recipe_are_enough(tmp_path, monkeypatch):
    found: list[str | None] = [None]
    monkeypatch.setattr(sources, "description_file", lambda *_, **__: found[0])
    xl = f"config: {json.dumps(GPT2 | {'n_layer': 48})}"
    plans = {text: make_plan(parse(SMALL.format(xl=text), source="r"), partial=True) for text in ("seed: 1", f"seed: 1, {xl}")}
    without, sized = plans.values()
    assert (without.arms[0].flops, "xl" in str(without.unknown)) == (None, True)
    assert (sized.arms[0].flops or 0) > 0
    assert not sized.unknown
    assert [*sized.stages] == [*without.stages]  # the sizes are in no key
    for plan in plans.values():
        assert [name_of(plan, stage.spec.models["teacher"]) for stage in plan.stages.values() if stage.spec.trains] == ["xl"]
    (tmp_path / "config.json").write_text(json.dumps(GPT2))
    found[0] = tmp_path / "config.json"
    with pytest.raises(ModelError, match=r"models.xl: `config` has n_layer: 48, but config.json of `org/xl` has 12; correct or remove"):
        make_plan(parse(SMALL.format(xl=xl), source="r"), partial=True)
    with pytest.raises(ConfigError, match="has no `model_type`; add this key, or remove `config`"):
        parse(SMALL.format(xl="config: {n_layer: 48}"), source="r")


def test_the_samplers_of_all_arms_are_read_once_for_each_model(monkeypatch):
    asked = []
    monkeypatch.setattr(sizes_and_lengths, "sampled_tokens", lambda recipe, model: asked.append(model) or 8)
    sizes = sizes_and_lengths.SizesAndLengths(parse(SMALL.format(xl="seed: 1"), ["evaluate.max_new_tokens=8"], source="r"))
    assert [sizes.config("s") for _ in range(3)] == [sizes.config("s")] * 3
    assert asked == ["s"]


def test_answers_longer_than_a_model_can_read_are_refused_by_the_plan():
    text = SMALL.format(xl="seed: 1")
    make_plan(parse(text, ["evaluate.max_new_tokens=63"], source="r"), partial=True)
    with pytest.raises(
        ConfigError, match=r"models.s: the model has 64 positions, but a prompt plus evaluate.max_new_tokens .64. needs more"
    ):
        make_plan(parse(text, ["evaluate.max_new_tokens=64"], source="r"), partial=True)
    with pytest.raises(ConfigError, match=r"but a prompt plus sampler.max_new_tokens .64. needs more; lower sampler.max_new_tokens"):
        make_plan(parse(text, ["method.sampler={type: student, max_new_tokens: 64}"], source="r"), partial=True)


WIDE = "{load: 'scratch:gpt2', tokenizer: tinyworld, config: {n_embd: 8, n_layer: 1, n_head: 1, n_positions: 512}}"
OTHERS = [f"models.xl={WIDE}", f"models.l={WIDE}", "models.c={init: {from: s, layers: [0]}}"]
LONG, RECORDED = "{type: student, max_new_tokens: 64}", "{type: student, max_new_tokens: 64, recorded: true}"
DENSE = "dense: {}, objective: {type: reverse_kl}"


@pytest.mark.parametrize("path", [pytest.param("xl > l", marks=pytest.mark.slow), "xl > s", "s > l", "xl > c"])
def test_sampled_answers_must_fit_the_models_of_their_distillation(path):
    """Other models of the recipe can have fewer positions."""
    recipe = parse(SMALL.format(xl="seed: 1"), [*OTHERS, f"arms.op={{path: {path}, sampler: {LONG}}}"], source="r")
    if path == "xl > l":
        return check_inputs(make_plan(recipe))
    with pytest.raises(ConfigError, match=rf"^models.{'c' if 'c' in path else 's'}: the model has 64 positions"):
        make_plan(recipe)


@pytest.mark.parametrize(
    ("arm", "sampler", "models"),
    [
        ("{path: s > xl > l}", LONG, ["xl", "l"]),
        (f"{{path: s > xl > l, {DENSE}}}", LONG, ["xl", "s", "l"]),
        ("{path: xl > l > s}", LONG, ["xl", "l"]),
        ("{path: xl > l > s}", RECORDED, ["xl", "s", "l"]),
        ("{path: xl > l > s, phases: [kd, gkd]}", "{type: dataset}", ["xl", "s", "l"]),
        ("{path: xl > s}", LONG, []),
        ("{path: xl > l, objective: {type: no_teacher}, select: {metric: reverse_kl}}", LONG, ["l"]),
    ],
)
def test_sampled_answers_concern_who_teaches_learns_or_writes(arm, sampler, models):
    given = [*OTHERS, f"models.l.distill.sampler={sampler}", f"arms={{op: {arm}}}"]
    recipe = parse(SMALL.format(xl="seed: 1"), given, source="r")
    assert [name for name in recipe.models if sampled_tokens(recipe, name)] == models


def test_descriptions_are_fetched_where_the_hub_answers(monkeypatch):
    asked = []
    monkeypatch.setattr(hub, "reachable", lambda: True)
    monkeypatch.setattr(sources, "description_file", lambda load, revision, *, download=False: asked.append(load) if download else None)
    preview.fetch_descriptions(load(RECIPE), Terminal(file=io.StringIO()))
    assert len(asked) == 5


@pytest.fixture
def mistyped(tmp_path, monkeypatch):
    """Returns a function: a recipe whose model `xl` has a source. Beside it are the folders llama-s, models/xl and models/l."""
    monkeypatch.chdir(tmp_path)
    for folder in ("llama-s", "models/xl", "models/l"):
        (tmp_path / folder).mkdir(parents=True)
    return lambda load: parse(SMALL.format(xl="seed: 1").replace("org/xl", load), source="r")


PATHS = [("llama-small", "did you mean `llama-s`?"), ("models/x", "did you mean `xl`?"), ("models/large", "correct the path")]


@pytest.mark.parametrize(("load", "meant"), [*PATHS, ("org/name", ""), ("gpt2", "")])
def test_a_hub_id_that_can_be_a_mistyped_path_is_named_without_the_hub(load, meant, mistyped):
    """The id can be right, so the plan is shown."""
    preview.fetch_descriptions(mistyped(load), console := Terminal(file=io.StringIO()))
    said = console.file.getvalue()
    assert (
        said.startswith(f"models.xl: model `{load}` is not on this disk, and the Hub cannot be reached. As a path, ") if meant else not said
    )
    assert meant in said


@pytest.mark.parametrize(
    ("kind", "load", "refused"),
    [
        *(("RepositoryNotFoundError", load, True) for load, _ in PATHS),
        ("RepositoryNotFoundError", "org/name", False),
        ("GatedRepoError", "models/x", False),
        ("HfHubHTTPError", "models/x", False),
    ],
)
def test_a_mistyped_path_that_the_hub_does_not_have_is_refused(kind, load, refused, mistyped, monkeypatch):
    def answer(name, file, **_):
        raise getattr(errors, kind)("no", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr(hub, "reachable", lambda: True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", answer)
    recipe, console = mistyped(load), Terminal(file=io.StringIO())
    if not refused:
        preview.fetch_descriptions(recipe, console)
        assert console.file.getvalue().startswith("models.xl: ")
        return
    wrong = recipe.model_copy(update={"data": recipe.data.model_copy(update={"train": DataRef(load="trian.jsonl")})})
    with pytest.raises(DataError) as error:
        preview.fetch_descriptions(wrong, console)
    assert "data set `trian.jsonl` does not exist" in error.value.problems[0]
    assert f"models.xl: the Hub has no model `{load}` that you can read" in error.value.problems[1]
    assert ". As a path, there is no `" in error.value.problems[1]
    assert not console.file.getvalue()


def test_labels_are_whole_at_80_columns(tmp_path):
    console = Terminal(file=io.StringIO(), width=80)
    preview.print_plan(make_plan(load("recipes/methods/all.yaml")), Store(tmp_path), console)
    lines = console.file.getvalue().split("total training of each arm")[0]
    assert "…" not in lines
    assert max(map(len, lines.splitlines())) <= 80
    words = " ".join(lines.split())
    assert "skew_reverse_kl" in words
    assert "seed 10" in words


def test_the_table_of_arms_is_whole_at_80_columns(tmp_path):
    console = Terminal(file=io.StringIO(), width=80)
    preview.print_plan(make_plan(load("recipes/quickstart.yaml", ["seeds=[10]"])), Store(tmp_path), console)
    shown = console.file.getvalue().split("total training of each arm")[1].split("parts of")[0]
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= 80
    assert "x direct: FLOPs relative to the direct arm with the same student and method, one of kd, seqkd, minillm," in " ".join(
        shown.split()
    )
    assert re.search(r" as *\n +assistant-starts *\n", shown)  # a line ended inside the name
