"""Recipes: overrides, and one clear sentence for every kind of mistake."""

import math
import re

import pytest
import yaml

from tadistill.config import load, parse
from tadistill.config.method import Method, MethodPatch
from tadistill.config.method_parts import Optim, TeacherContext
from tadistill.config.method_rules import apply, merge_methods
from tadistill.config.objective import CrossEntropy, ForwardKL, MiniLLM
from tadistill.config.recipe import methods
from tadistill.config.recipe_files import contents
from tadistill.config.sampling import TeacherMixedSampler
from tadistill.errors import ConfigError, TadistillError
from tadistill.plan.arms import make_plan

RECIPE = """\
study: t
seeds: [1, 2]
models:
  xl: {load: "scratch:llama", tokenizer: tinyworld, sft: {optim: {steps: 10}}}
  s: {load: "scratch:llama", tokenizer: tinyworld}
data: {train: tinyworld, dev: tinyworld, test: [tinyworld]}
method:
  objective: {type: minillm, pt_weight: 0}
  sampler: {type: teacher_mixed}
arms:
  a: xl > s
  b: {path: xl > s, compute: as a}
"""
MALFORMED = (".study", "study.", "models..s.load", "models[s]load", "models]s", "models[s", "models[].load", "arms[a[b]]", "[")


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE)
    return path


def test_overrides_and_dotted_names(recipe):
    found = load(recipe, ["method.optim.lr=0.01", "arms[2.D].path=xl > s", "seeds=[7]"])
    assert found.method.optim.lr == 0.01
    assert found.arms["2.D"].path == (("xl", "s"),)
    assert found.seeds == (7,)


def test_an_override_below_a_text_keeps_the_text(recipe):
    found = load(recipe, ["arms.a.optim.lr=0.01", "data.train.columns={instruction: question}"])
    assert found.arms["a"].path == (("xl", "s"),)
    assert found.arms["a"].optim is not None
    assert found.data.train.load == "tinyworld"
    assert found.data.train.columns == {"instruction": "question"}
    recipe.write_text(recipe.read_text().replace("a: xl > s", 'optim: {path: xl > s, context: "{prompt}"}').replace("as a", "as optim"))
    changed = load(recipe, ["arms.optim.context.max_prompt=9", "arms.b.optim.lr=0.5"]).arms
    assert changed["optim"].context == TeacherContext(template="{prompt}", max_prompt=9)
    assert changed["b"].path == (("xl", "s"),)
    short = {"study": "t", "teacher": "org/t", "student": "org/s", "data": "rows.jsonl", "method": "gkd"}
    assert parse(short, ["method.optim.lr=0.5", "student.revision=v1"], source="r").models["student"].revision == "v1"


def test_a_list_and_a_group_of_keys_replace_each_other(recipe):
    with pytest.raises(ConfigError, match=r"^override `seeds=\{load: 1\}`: `seeds` "):
        load(recipe, ["seeds={load: 1}"])
    assert [ref.load for ref in load(recipe, ["data.test={load: x}", "data.test=[tinyworld_open]"]).data.test] == ["tinyworld_open"]


def test_a_link_that_leads_nowhere_is_no_recipe(tmp_path):
    (tmp_path / "r.yaml").symlink_to("gone.yaml")
    with pytest.raises(
        ConfigError, match=r"there is no recipe `.*`: .*r.yaml is a link to gone.yaml, which does not exist; correct the link"
    ):
        load(tmp_path / "r.yaml")


def test_a_file_that_is_no_mapping_is_no_recipe(recipe):
    recipe.write_text("- a\n- b\n")
    with pytest.raises(ConfigError, match=r"r\.yaml is not a recipe; write a YAML mapping"):
        load(recipe, ["study=x"])


def test_references_of_yaml_stay_small():
    found = parse(RECIPE.replace("a: xl > s", "a: &a {path: xl > s, optim: {batch: 8}}\n  c: {<<: *a, optim: {lr: 1e-3}}"), source="r.yaml")
    assert (found.arms["c"].text, found.arms["c"].optim.model_dump(exclude_unset=True)) == ("xl > s", {"lr": 1e-3})
    bomb = "".join(f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 9)}]\n" for n in range(1, 30))
    with pytest.raises(ConfigError, match=r"^r.yaml, line 18: `x5` has more than 10,000 keys and values, with what its references"):
        parse(f"{RECIPE}x0: &x0 1\n{bomb}", source="r.yaml")
    with pytest.raises(ConfigError, match=r"^r.yaml has more than 10,000 keys"):
        parse(RECIPE + "".join(f"x{n}: 1\n" for n in range(5000)), source="r.yaml")


@pytest.mark.parametrize(
    ("text", "place"),
    [("x: &x\n  y: *x\n", "line 14: `x.y`"), ("x: &x {<<: *x}\n", "line 13: `x.<<`"), ("x: &x {? *x : 1}\n", "line 13: `x`")],
)
def test_a_reference_to_the_part_around_it_is_refused_with_its_line(text, place):
    with pytest.raises(ConfigError, match=rf"^r.yaml, {place} is a reference to a part of the recipe that contains it"):
        parse(RECIPE + text, source="r.yaml")


@pytest.mark.parametrize(
    ("value", "read"), [("!!set {a}", "{'a'}"), ("!!binary aGk=", "b'hi'"), ("!!timestamp 2026-01-31", "datetime.date")]
)
def test_a_value_of_another_type_of_yaml_is_refused_with_its_line(value, read):
    with pytest.raises(ConfigError, match=rf"^r.yaml, line 14: `x.y.1` is {read}.*, but a value is a text"):
        parse(f"{RECIPE}x:\n  y: [1, {value}]\n", source="r.yaml")


@pytest.mark.parametrize(
    ("written", "read"),
    [
        *(("1e-3", 1e-3), ("1e3", 1e3), ("1.5E+3", 1500.0), ("1_000e3", 1e6), (".5e+3", 500.0), ("-.inf", -math.inf)),
        *(("010", 8), ("0x1F", 31), ("1_000", 1000), ("1:30", 90), ("12345678901234567890", 12345678901234567890)),
        *(("2026-01-31", "2026-01-31"), ("2026-01-31T10:00:00Z", "2026-01-31T10:00:00Z"), ("???", "???"), ("1e", "1e"), ("nan", "nan")),
        *(("yes", True), ("Off", False), ("y", "y"), ("~", None), ("", None), ("[a, {b: 2.10}]", ["a", {"b": 2.1}])),
    ],
)
def test_values_are_read_as_in_yaml_with_powers_of_ten_and_without_dates(written, read):
    assert contents(f"a: {written}", "r.yaml")[0] == {"a": read}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("arms={c: xl > s, c: xl > s}", "`: the key `c` is already in line 1; keep one of the two"),
        (f"seeds=[{'9' * 5000}]", "cannot be read as YAML: Exceeds the limit"),
        ("seeds=!!set {1, 2}", "`: `seeds` is {1, 2}, but a value is a text, a number, true, false, a list or a group of keys"),
    ],
)
def test_an_override_that_is_no_value_is_refused(recipe, override, words):
    with pytest.raises(ConfigError) as error:
        load(recipe, [override])
    assert words in str(error.value)
    assert str(error.value).startswith("override `")


@pytest.mark.parametrize(("name", "written"), [("7", "arms.7"), ("2.1", "arms[2.1]")])
def test_an_override_finds_a_key_that_yaml_reads_as_a_number(recipe, name, written):
    for arm in ("xl > s", "{path: xl > s, optim: {batch: 8}}"):
        found = load(recipe, [f"arms={{{name}: {arm}}}", f"{written}.optim.lr=1e-3"]).arms[name]
        assert (found.optim.lr, found.text) == (1e-3, "xl > s")
    recipe.write_text(recipe.read_text().replace("\narms:\n", f"\narms:\n  {name}: xl > s\n"))
    assert load(recipe, [f"{written}.optim.lr=1e-3"]).arms[name].optim.lr == 1e-3


def test_an_empty_mapping_empties(recipe):
    recipe.write_text(recipe.read_text() + "evaluate: {also: {hot: {temperature: 2}}}\n")
    assert load(recipe, ["evaluate.also={}"]).evaluate.also == {}
    assert load(recipe, ["evaluate={also: {}, batch: 3}"]).evaluate.also == {}
    assert list(load(recipe, ["evaluate.also={}", "evaluate.also.cold.temperature=0"]).evaluate.also) == ["cold"]
    assert list(load(recipe, ["evaluate.also={cold: {temperature: 0}}"]).evaluate.also) == ["hot", "cold"]


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("method.objective.pt_weigth=1", ["`method.objective.pt_weigth`", "did you mean `pt_weight`?"]),
        ("models.s.sft.optim.stps=1", ["`models.s.sft.optim.stps`", "did you mean `steps`?"]),
        ("data={train: a, dev: b, test: [c], v1.5: d}", ["`data.v1.5`", "the known keys here are"]),
        ("sedes=[1]", ["`sedes`", "did you mean `seeds`?"]),
        ("arms.a=xl > s > xl", ["override `arms.a=xl > s > xl`", "names model xl twice"]),
        ("arms.a=xl > q", ["`arms.a.path` names `q`", "choose one of xl, s"]),
        ("arms.a={path: xl > s, compute: as b}", ["has a cycle"]),
        ("models.s={load: null, tokenizer: null, init: {from: s, layers: 1}}", ["has a cycle"]),
        ("models.s.load=null", ["line 5", "exactly one of `load`, `init`"]),
        ("data.test=[]", ["data.test", "names no set, so nothing can be measured"]),
        ("models.q={temper: {of: xl, temperature: 2}}", ["`models.q.temper.temperature` is not a known key; did you mean `tau`?"]),
        ("method.optim.lr=-1", ["`method.optim.lr` is -1", "greater than 0"]),
        ("method.objective.type=foo", ["'foo'", "forward_kl"]),
        ("data.test=[5]", ["`data.test.0` is 5, but it must be a text (the value of `load`) or a group of keys; write keys in braces"]),
        ("arms=[a]", ['`arms` is `["a"]`, but it must be a group of keys; write lines of the form NAME: … below arms']),
        ("arms.kd=3", ["`arms.kd` is 3, but it must be a text (the value of `path`) or a group of keys; write a path"]),
        ("method.name=3", ["override `method.name=3`: `method.name`: `3` is not a method; the methods are"]),
        ("methods=3", ["`methods` is 3, but it must be a group of keys; "]),
        ("budgets=3", ["`budgets` is 3, but it must be a list (the value of `times`) or a group of keys; "]),
        ("method.sampler.k=2", ["`method.sampler.k` is not a known key; it belongs to another `type` (speculative); the keys of the"]),
        ("metrics=[scores.brief]", ["`metrics.0` is 'scores.brief': a function is named as MODULE:FUNCTION, for instance scores:brief"]),
        ("seeds=[1,1]", ["contain a seed twice"]),
        ("evaluate.also.greedy.seeds=[3,3]", ["`evaluate.also.greedy.seeds` [3, 3] contain a seed twice"]),
        ("study=no", ["`study` is False: YAML reads yes, no, on, off, true and false as true or false; put the text in quotes"]),
        (
            "data.test[0].load=x",
            ["override `data.test[0].load=x` changes a part of the list `data.test`; write the whole list: data.test=[…]"],
        ),
        ("data.test.0=x", ["override `data.test.0=x` changes a part of the list `data.test`"]),
        ("data.train=?", ["override `data.train=?` has a key without a name; write its name, or put the value in quotes"]),
        ("data.train=*a", ["override `data.train=*a`, line 1, column 1, cannot be read as YAML: YAML reads a value that begins with *"]),
        *((f"{key}=x", [f"override `{key}=x`: `{key}` is not a key; write one dot"]) for key in MALFORMED),
        ("nonsense", ["has no `=`"]),
        ("=5", ["has no key before the `=`"]),
        ("arms.a={path: xl > s, compute: 2x}", ["write `as ARM`"]),
        ("arms.a={path: xl > s, compute: 0x kd}", ["`arms.a.compute` is `0x kd`", "the number is above 0"]),
        ("arms.a={path: 5}", ["`arms.a.path` is 5", "a path is a text", "xl > s"]),
        ("arms.a=xl >", ["`arms.a.path` names no model on one side of `>`"]),
    ],
)
def test_a_mistake_is_one_sentence(recipe, override, parts):
    with pytest.raises(ConfigError) as error:
        load(recipe, [override])
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_dots_of_paths_stay_in_a_message(recipe, monkeypatch):
    below = recipe.parent / "below"
    below.mkdir()
    monkeypatch.chdir(below)
    with pytest.raises(ConfigError) as error:
        load("../r.yaml", ["data.train={load: ../rows.jsonl, instruction: ''}"])
    assert str(error.value).startswith("override `data.train={load: ../rows.jsonl, instruction: ''}`: `data.train`: ")
    with pytest.raises(ConfigError, match=r"runtime.trackers.0` is '\.\./x\.\.y': .*'tensorboard'\.$"):
        load("../r.yaml", ["runtime.trackers=[../x..y]"])


@pytest.mark.parametrize(
    ("overrides", "place"),
    [
        (["method.optim.lr=fast"], "override `method.optim.lr=fast`: `method.optim.lr` is 'fast'"),
        (["method.optim={lr: fast}"], "override `method.optim={lr: fast}`: `method.optim.lr` is 'fast'"),
        (["seeds=[a]"], "override `seeds=[a]`: `seeds.0` is 'a'"),
        (["method.optim.learning_rate=1"], "override `method.optim.learning_rate=1`: `method.optim.learning_rate` is not a known key"),
        (["method.optim.lr=fast", "method.optim.lr=0.1", "sed=1"], "override `sed=1`: `sed` is not a known key"),
        (["metod.optim.lr=1"], "override `metod.optim.lr=1`: `metod` is not a known key; did you mean `method`?"),
        (["models.xl.sft.optim.epochs=2"], "LINE with override `models.xl.sft.optim.epochs=2`: `models.xl.sft.optim`: steps is"),
        (
            ["models.xl.revision=v1", "models.xl.lora.r=1"],
            "LINE with overrides `models.xl.revision=v1`, `models.xl.lora.r=1`: models.xl: ",
        ),
        (["arms.b=xl > nobody"], "override `arms.b=xl > nobody`: `arms.b.path` names `nobody`"),
        (["data.train=nowhere.jsonl"], "override `data.train=nowhere.jsonl`: `data.train`: data set `nowhere.jsonl` does not exist"),
    ],
)
def test_a_message_about_an_override_names_it(recipe, overrides, place):
    with pytest.raises(TadistillError) as error:
        make_plan(load(recipe, overrides))
    assert re.sub(r"^\S+, line \d+", "LINE", error.value.problems[0]).startswith(place)


@pytest.mark.parametrize(("line", "key"), [("seeds: [1, 2]\n", "seeds"), (", dev: tinyworld", "data.dev")])
def test_a_missing_key_that_the_short_form_needs_not_is_named_with_the_short_form(recipe, line, key):
    """README leaves out `data.dev`, and a reader who does so in the long form read only "add it"."""
    recipe.write_text(RECIPE.replace(line, ""))
    with pytest.raises(
        ConfigError, match=rf"`{key}` is missing; add it\. Only a recipe in the short form \(with `student`\) may leave it out\.$"
    ):
        load(recipe)


@pytest.mark.parametrize("path", [".", "..", "/", "below"])
def test_a_folder_is_no_recipe(tmp_path, monkeypatch, path):
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "a.yaml").write_text("study: a", encoding="utf-8")
    monkeypatch.chdir(tmp_path / "below" if path == "." else tmp_path)
    with pytest.raises(ConfigError, match=r"is a folder; write the path of a recipe's file") as error:
        load(path)
    assert ("in it (a.yaml)" in str(error.value)) == (path in (".", "below"))


def test_rows_are_no_recipe(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n{"a": 2}\n', encoding="utf-8")
    with pytest.raises(
        ConfigError, match=r"line 2, column 1, cannot be read as YAML: the file is not a YAML mapping; write a mapping with the keys"
    ):
        load(tmp_path / "rows.jsonl")


def test_missing_file_and_bad_yaml(tmp_path):
    with pytest.raises(ConfigError, match="there is no recipe"):
        load(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1,\nb: 2")
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        load(tmp_path / "bad.yaml")


def test_patches_change_only_what_they_name():
    base = Method(objective=ForwardKL(kd_ratio=0.5), optim=Optim(lr=0.1, steps=3))
    patched = apply(base, MethodPatch(optim=Optim(lr=0.2)), MethodPatch(objective=CrossEntropy()))
    assert patched.optim == Optim(lr=0.2, steps=3)
    assert patched.objective == CrossEntropy()
    assert merge_methods(Optim(steps=3), Optim(epochs=2.0), "optim") == Optim(epochs=2.0)
    assert merge_methods(Optim(steps=3, micro_batch=4), Optim(tokens=512), "optim") == Optim(steps=3, tokens=512)
    assert merge_methods(Optim(tokens=512), Optim(micro_batch=4), "optim") == Optim(micro_batch=4)
    with pytest.raises(
        ConfigError, match="changes `context`, but the changed settings do not fit together: `system` needs a chat template"
    ):
        apply(
            base.model_copy(update={"context": TeacherContext(system="x")}), MethodPatch(context=TeacherContext(template="y", chat=False))
        )


def test_one_key_sets_the_size_of_a_forward_pass():
    with pytest.raises(ValueError, match="micro_batch is 4 and tokens is 512, but only one of them can set the size of a forward pass"):
        Optim(micro_batch=4, tokens=512)
    assert [Optim(batch=12, **size).smaller(1) for size in ({}, {"micro_batch": 1}, {"tokens": 512})] == [
        "optim.micro_batch: 6",
        "",
        "optim.tokens: 256",
    ]
    assert [Optim(batch=12, **size).smaller(4) for size in ({}, {"micro_batch": 6}, {"micro_batch": 1})] == ["optim.micro_batch: 1"] * 2 + [
        ""
    ]


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (
            {"objective": {"type": "minillm"}, "sampler": {"type": "dataset"}},
            "`minillm` needs a sampler that works in rounds, but sampler `dataset` does not",
        ),
        ({"objective": {"type": "sampled_kl"}, "sampler": {"type": "teacher_mixed", "alpha": 0.2}}, "use `sampler: {type: student}`"),
        (
            {"objective": {"type": "forward_kl", "kd_ratio": 0.5}, "sampler": {"type": "teacher_mixed"}},
            "set `objective.kd_ratio` to 1",
        ),
        (
            {"objective": {"type": "minillm"}, "sampler": {"type": "mix"}},
            "needs a sampler that works in rounds, but sampler `mix` does not",
        ),
        (
            {"objective": {"type": "cross_entropy"}, "sampler": {"type": "student"}},
            "so the loss must not contain cross-entropy; use a divergence",
        ),
        ({"sampler": {"type": "student", "rollouts": 40}}, "rollouts 40 is not a multiple of optim.batch 32"),
        (
            {"sampler": {"type": "replay"}, "select": {"metric": "last"}},
            "needs the loss on the dev set, but select.metric `last` does not measure it",
        ),
        ({"sampler": {"type": "replay", "capacity": 8}}, "sampler.capacity 8 is less than optim.batch 32"),
        ({"sampler": {"type": "teacher_mixed", "engine": "vllm"}}, "needs the teacher's distribution at every token"),
        ({"sampler": {"type": "mix", "engine": "vllm", "no_repeat_ngram": 3}}, "`vllm` does not support `no_repeat_ngram`"),
        (
            {"sampler": {"type": "teacher", "engine": "vllm", "min_p": 0.1, "top_p": 0.9}},
            "`vllm` applies `min_p` before `top_p`",
        ),
        (
            {"objective": {"type": "minillm"}, "sampler": {"type": "student", "engine": "vllm", "top_k": 5}},
            "`minillm` with engine `vllm` needs temperature 1 and no `top_k`",
        ),
        ({"objective": {"type": "contrastive"}}, "`contrastive` and sampler `pair` work only together"),
        ({"sampler": {"type": "pair"}}, "`contrastive` and sampler `pair` work only together"),
        (
            {"objective": {"type": "cross_entropy"}, "sampler": {"type": "dataset", "signal": {"type": "hidden"}}},
            "objective `cross_entropy` uses no teacher, so sampler.signal",
        ),
        (
            {"objective": {"type": "top_k_reverse_kl"}, "sampler": {"type": "dataset", "signal": {"type": "top_k"}}},
            "use objective `reverse_kl`",
        ),
        (
            {"objective": {"type": "forward_kl", "temperature": 2}, "sampler": {"type": "dataset", "signal": {"type": "top_k"}}},
            "tail: drop",
        ),
        (
            {"objective": {"type": "sampled_kl"}, "sampler": {"type": "student", "recorded": True}},
            "needs new samples of the current student",
        ),
        ({"objective": {"type": "minillm"}, "sampler": {"type": "student", "recorded": True}}, "needs new samples of the current student"),
        ({"sampler": {"type": "student", "signal": {"type": "hidden"}}}, "`signal`, which needs `recorded: true`"),
        ({"sampler": {"type": "student", "recorded": True, "rollouts": 64}}, "`rollouts` has no effect; remove `rollouts`"),
        (
            {"objective": {"type": "reverse_kl"}, "sampler": {"type": "dataset", "signal": {"type": "sampled"}}},
            "unbiased gradient only for objective `forward_kl` at temperature 1, but the objective is `reverse_kl`",
        ),
        (
            {"objective": {"type": "forward_kl", "temperature": 2}, "sampler": {"type": "dataset", "signal": {"type": "sampled"}}},
            "the objective is `forward_kl` at another temperature; use `objective: {type: forward_kl, temperature: 1}`",
        ),
        (
            {"sampler": {"type": "student", "recorded": True, "signal": {"type": "top_k"}}, "dense": {}},
            "`dense` averages the teachers' whole distributions, but sampler.signal `top_k` does not record them",
        ),
    ],
)
def test_objectives_and_samplers_that_do_not_go_together(method, words):
    with pytest.raises(ConfigError, match=words):
        apply(Method.model_validate(method))


@pytest.mark.parametrize(
    "sampler",
    [
        {"type": "teacher_mixed", "alpha": 1.2},
        {"type": "teacher_mixed", "alpha": -0.1},
        {"type": "mix", "lam": 2},
        {"type": "speculative", "k": 0},
        {"type": "student", "min_p": 1.5},
        {"type": "student", "top_p": 0},
        {"type": "student", "no_repeat_ngram": 0},
        {"type": "replay", "schedule": "sometimes"},
    ],
)
def test_a_samplers_settings_have_ranges(sampler):
    with pytest.raises(ValueError, match="validation error"):
        Method.model_validate({"sampler": sampler})


def test_a_preset_in_a_patch_replaces_all_of_the_other():
    official = apply(Method(sampler=TeacherMixedSampler()), MethodPatch(objective=MiniLLM(preset="official", clip=0.3)))
    assert (official.objective.discount, official.objective.whitening, official.objective.clip) == (0.95, "padded", 0.3)
    one = apply(official, MethodPatch(objective=MiniLLM(discount=0.9)))
    assert (one.objective.discount, one.objective.whitening, one.objective.preset) == (0.9, "padded", "official")
    paper = apply(official, MethodPatch(objective=MiniLLM(preset="paper")))
    assert paper.objective.model_dump(exclude={"clip"}) == MiniLLM().model_dump(exclude={"clip"})


@pytest.mark.parametrize(
    "objective",
    [
        {"type": "jensen_shannon", "beta": 1.2},
        {"type": "skew_reverse_kl", "alpha": -0.1},
        {"type": "adaptive_kl", "mu": 2},
        {"type": "alpha_beta", "alpha": float("nan")},
        {"type": "alpha_mixture", "pair": "pq"},
        {"type": "taid", "decay": 1.0},
        {"type": "taid", "start": 0.8, "end": 0.5},
        {"type": "top_k_forward_kl", "k": 0},
        {"type": "forward_kl", "temperature": 0},
        {"type": "reverse_kl", "beta": 0.5},
    ],
)
def test_an_objectives_settings_have_ranges(objective):
    with pytest.raises(ValueError, match="validation error"):
        Method.model_validate({"objective": objective})


# --- limits, names, and what a recipe cannot reach -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("method.optim.lr", [".nan", ".inf", "-1", "0", "1e30", "true"]),
        ("method.optim.betas", ["[.nan,0.9]", "[-1,2]", "[0.9,1]", "[0.9]", "[true,0.9]"]),
        ("method.optim.eps", [".inf", "0", "-1", "5e-324", "2"]),
        ("method.optim.clip", [".inf", "0", ".nan", "false"]),
        ("method.optim.weight_decay", [".inf", "-1", "1e9"]),
        ("method.optim.lr_min", [".inf", "-1"]),
        ("method.optim.steps", ["0", "1e400", "9223372036854775808", "true"]),
        ("method.objective.reward_clip", [".inf", "0"]),
        ("method.sampler.temperature", [".inf", "-1", "5e-324", "1e9"]),
        ("evaluate.temperature", [".inf", ".nan", "-0.1", "true"]),
        ("evaluate.seeds", ["[true]", "[100000000000000000000]", "[1.5]"]),
        ("margin", [".inf", "0", "-1", "true"]),
        ("seeds", ["[100000000000000000000]", "[.nan]", "[true]"]),
        ("models.s.seed", ["99999999999999999999", "true"]),
        ("data.limit.dev", ["1000000000000000000000000000000", "0", "-1"]),
        ("runtime.jobs", ["0", "100000", "true"]),
        ("runtime.checkpoint_seconds", [".inf", "0"]),
    ],
)
def test_numbers_have_physical_limits(recipe, key, values):
    for value in values:
        with pytest.raises(ConfigError) as error:
            load(recipe, [f"{key}={value}"])
        assert all(f"`{key}" in problem for problem in error.value.problems), value


def test_rules_on_two_numbers_hold_after_all_changes(recipe):
    load(recipe, ["method.optim.lr=1e-2", "arms.a={path: xl > s, optim: {lr_min: 1e-3}}"])
    for change, words in (("lr_min: 1", "lr_min 1.0 is above lr"), ("weight_decay: 100", "could change the sign of a weight")):
        with pytest.raises(ConfigError, match=words):
            methods(load(recipe, ["method.optim.lr=1e-2", f"arms.a={{path: xl > s, optim: {{{change}}}}}"]))


@pytest.mark.parametrize("value", ["${oc.env:SECRET}", "${study}", "a${oc.env:SECRET,x}b", "${", "${oc.create:{}}"])
def test_a_recipe_reads_nothing_outside_itself(recipe, value, monkeypatch):
    monkeypatch.setenv("SECRET", "s3cr3t")
    for text, overrides in (
        (RECIPE.replace("study: t", f"study: '{value}'"), []),
        (RECIPE + f"'{value}': 1\n", []),
        (RECIPE, [f"study={value}"]),
    ):
        with pytest.raises(ConfigError, match="write the value itself") as error:
            parse(text, overrides, source="r.yaml")
        assert "s3cr3t" not in str(error.value)


@pytest.mark.parametrize("depth", [41, 120, 500, 3000])
def test_nesting_is_refused_with_its_line(depth):
    for part in ("[" * depth + "]" * depth, "{a: " * depth + "1" + "}" * depth):
        with pytest.raises(ConfigError, match=r"^r.yaml, line 13: keys are nested in more than 40 levels"):
            parse(RECIPE + f"z: {part}\n", source="r.yaml")
    for override in ("z=" + "[" * depth, "z=" + "[" * depth + "]" * depth, "z." + ".".join("a" * depth) + "=1"):
        with pytest.raises(ConfigError, match=r"^override `[^`]*`?(:| has a key)[^`]* more than 40 levels"):
            parse(RECIPE, [override], source="r.yaml")


def test_all_problems_are_shown_unknown_keys_first():
    text = RECIPE.replace("steps: 10", "stps: 10, lr: fast, batch: 0").replace("seeds: [1, 2]", "seed: 1")
    with pytest.raises(ConfigError) as error:
        parse(text, source="r.yaml")
    starts = [problem.split("`: ")[0].split("` is")[0] for problem in error.value.problems]
    assert starts == [
        "r.yaml, line 4: `models.xl.sft.optim.stps",
        "r.yaml, line 2: `seed",
        "r.yaml, line 4: `models.xl.sft.optim.lr",
        "r.yaml, line 4: `models.xl.sft.optim.batch",
    ]
    many = RECIPE + "".join(f"k{i}: 1\n" for i in range(50))
    with pytest.raises(ConfigError, match=r"30 more problems are shown when those above are corrected") as error:
        parse(many, source="r.yaml")
    assert len(error.value.problems) == 21
    with pytest.raises(ConfigError, match=r"r.yaml: 1 more problem is shown when those above are corrected"):
        parse(RECIPE + "".join(f"k{i}: 1\n" for i in range(21)), source="r.yaml")


NAMES = ["../up", "/tmp/x", "-rf", ".", "..", "a\nb", " a", "\u202eabc", "CON", "nul.txt", "com1", "x" * 81, "\x1b[2J", "a\\b", ""]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("place", ["study", "arms", "models"])
def test_absurd_names_are_refused(name, place):
    tree = yaml.safe_load(RECIPE)
    if place == "study":
        tree["study"] = name
    elif place == "arms":
        tree["arms"][name] = "xl > s"
    else:
        tree["models"][name] = tree["models"].pop("s")
        tree["arms"] = {"a": f"xl > {name}"}
    with pytest.raises(ConfigError):
        parse(yaml.safe_dump(tree), source="r.yaml")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"study": "store"}, r"line \d+: `study` is 'store': this study would have the folder runs/store"),
        ({"study": "Store"}, r"line \d+: `study` is 'Store': this study would have the folder runs/store"),
        ({"models": {"a>b": {"load": "gpt2"}}, "arms": {"x": "a>b"}}, "cannot be used in a path"),
        ({"arms": {"x": {"path": [[]]}}}, r"arms.x.path"),
        ({None: 1}, "line 1: a key has no name"),
        ({"arms": {"b": "xl > q"}}, r"line \d+: `arms.b.path` names `q`"),
    ],
)
def test_odd_keys_and_names_are_named_with_their_line(change, words):
    text = yaml.safe_dump({**change, **{k: v for k, v in yaml.safe_load(RECIPE).items() if k not in change}}, sort_keys=False)
    with pytest.raises(ConfigError, match=words):
        parse(text, source="r.yaml")


@pytest.mark.parametrize(("given", "hint"), [("nothere.yaml", "give the path"), ("sfft.yaml", "did you mean `sft.yaml`")])
def test_a_recipe_that_does_not_exist_is_compared_by_its_name_without_suffix(given, hint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sft.yaml").write_text("study: a")
    with pytest.raises(ConfigError, match=hint):
        load(given)
