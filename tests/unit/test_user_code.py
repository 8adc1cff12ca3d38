"""Metrics and objectives of the user's own code: found beside the recipe, tried before work, part of a stage's identity."""

import importlib
import os
import sys

import pytest
import torch

from tadistill.config import load
from tadistill.data.rows import Example
from tadistill.errors import ConfigError, DataError
from tadistill.evaluation.text_scores import score_own
from tadistill.metrics import METRICS, declare, higher_is_better, metric_title, metric_unit, names_in
from tadistill.plan.arms import make_plan
from tadistill.runner.own_code import try_metrics, try_objectives
from tadistill.user_code import load_function

RECIPE = """\
study: own
seeds: [1]
models:
  xl: {load: "scratch:llama", tokenizer: tinyworld,
       config: {hidden_size: 8, intermediate_size: 8, num_hidden_layers: 1, num_attention_heads: 1}}
  s: {init: {from: xl, intermediate: 4}}
data: {train: tinyworld, dev: tinyworld, test: [tinyworld], template: plain}
method: {objective: {type: custom, function: "MODULE:loss", settings: {scale: 2}}, optim: {steps: 2}}
metrics: ["MODULE:score", {function: "MODULE:size", title: characters, better: lower}]
arms: {direct: xl > s}
"""
CODE = """\
def score(prediction, references):
    return 100.0 * (prediction in references)

def size(prediction, references):
    return len(prediction)

def loss(student, teacher, scale=1.0):
    return scale * (student - teacher).pow(2).sum(-1)
"""


PLACE = r"r.yaml, line 8: `method.objective.function`: "
BESIDE = "gives a token another value if other tokens are beside it"


def try_own_code(recipe):
    try_metrics(recipe)
    try_objectives(make_plan(recipe), lambda name: 420)


@pytest.fixture
def study(tmp_path):
    """Return a function that writes recipe and module, and reads the recipe. Every test has a module of its own name."""
    module = f"own_{tmp_path.name}".replace("-", "_")

    def read(code=CODE, *overrides):
        (tmp_path / f"{module}.py").write_text(code)
        (tmp_path / "r.yaml").write_text(RECIPE.replace("MODULE", module))
        return load(tmp_path / "r.yaml", overrides)

    return read


def test_code_is_found_beside_the_recipe_and_tried_before_work(study, tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    recipe = study()
    assert recipe.runtime.code == str(tmp_path)
    try_own_code(recipe)
    make_plan(recipe)


def test_the_source_is_part_of_the_identity_of_the_stages_that_use_it(study):
    before, again = make_plan(study()), make_plan(study())
    assert set(before.stages) == set(again.stages)
    changed = make_plan(study(CODE.replace("sum", "mean")))
    assert not set(before.stages) & set(changed.stages)
    plain = make_plan(study(CODE, "metrics=[]", "method={name: kd, objective: null, optim: {steps: 2}}"))
    assert "own" not in {name for stage in plain.stages.values() for name in stage.spec.content()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            ("def score(prediction, references)", "def score(prediction)"),
            r"metrics.0: .* is called with \(prediction, references\)",
        ),
        (
            ("scale=1.0", "scal=1.0"),
            rf"{PLACE}`settings` has `scale`, which `.*:loss` in .*\.py does not take; did you mean `scal`\?$",
        ),
        (("teacher, scale=1.0", "teacher"), r"does not take; it takes no settings; remove the setting, or change the function$"),
        (("(student, teacher, scale=1.0", "(student, teacher, /, scal=1.0"), r"does not take; did you mean `scal`\?$"),
        (("(student, teacher, scale=1.0", "(student, *, scale=1.0"), r"is called with .*: too many positional arguments; change"),
        (("teacher, scale=1.0", "teacher, other, scale=1.0"), r"is called with \(student_logits, teacher_logits, scale=…\)"),
        (
            ("def loss", "def los"),
            rf"{PLACE}`.*:loss`: loss in .*\.py does not exist; did you mean `los`\?",
        ),
        (("def score", "def scor"), r"score in .*\.py does not exist; did you mean `scor`\?"),
        (("def score", "import nowhere\ndef score"), r"cannot be imported: .*\.py, line 1: ModuleNotFoundError"),
        (("def score", "raise SystemExit(3)\ndef score"), r"cannot be imported: .*\.py, line 1: SystemExit: 3"),
        (("def score", "def score("), r"cannot be imported: .*\.py, line 1: SyntaxError"),
    ],
)
def test_mistakes_are_found_by_the_plan(study, change, words):
    with pytest.raises(ConfigError, match=words):
        make_plan(study(CODE.replace(*change)))


@pytest.mark.parametrize("given", ["student, teacher, /", "*logits", "student, /, teacher"])
def test_positions_without_a_name_hide_no_setting(study, given):
    """The first settings of such a loss were unknown."""
    code = CODE.replace("loss(student, teacher", f"loss({given}")
    try_own_code(study(code.replace("student - teacher", "logits[0] - logits[1]") if "*" in given else code))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("return len(prediction)", "return 1 / len(prediction)"), "metrics.1: .* for the answer '' .* failed with ZeroDivisionError"),
        (("return len(prediction)", "return None"), "returned None; return a number"),
        (("return len(prediction)", "if prediction in [*references, '']: return 1"), "returned None; return a number"),
        (("return len(prediction)", "return len(prediction) if prediction != '?' else 'none'"), "returned 'none'; return a number"),
        (("return len(prediction)", "return '5'"), "returned '5'; return a number"),
        (("return len(prediction)", "return b'5'"), "returned b'5'; return a number"),
        (("return len(prediction)", "return 10**400"), "returned a number beyond the range of float64; return a finite number"),
        (("return len(prediction)", "return float('nan')"), "returned nan; return a finite number"),
        ((".sum(-1)", ".sum()"), r"objective `.*` in .* a tensor of shape \(\) for logits of shape \(5, 420\)"),
        (("student - teacher", "teacher - teacher"), "has no gradient to the student's logits"),
        (("student - teacher", "student[:, :99] @ teacher"), r"fails on random logits of shape \(5, 420\): RuntimeError"),
        (("return len(prediction)", "raise SystemExit"), "metrics.1: .* for the answer .* failed with SystemExit"),
        ((".sum(-1)", ".sum(-1) + exit(0)"), r"fails on random logits of shape \(5, 420\): SystemExit"),
        (
            ("return scale * (student - teacher)", "return (student - student.mean(0))"),
            BESIDE,
        ),
        ((".sum(-1)", ".sum(-1).cumsum(0)"), BESIDE),
        ((".sum(-1)", ".sum(-1) * student.new_tensor(range(1, len(student) + 1))"), BESIDE),
        (("scale * (student", "scale / student.abs().max() * (student"), BESIDE),
        ((".sum(-1)", ".sum(-1) if len(student) == 5 else None"), r"returns a NoneType for logits of shape \(1, 420\)"),
    ],
)
def test_functions_that_would_fail_later_are_found_before_work(study, change, words):
    recipe = study(CODE.replace(*change))
    make_plan(recipe)
    with pytest.raises(ConfigError, match=words):
        try_own_code(recipe)


@pytest.mark.parametrize(
    "value",
    [
        "student.topk(64).values.sum(-1)",
        "(student * torch.linspace(0, 1, 420)).sum(-1)",
        "-student.log_softmax(-1)[:, 17]",
        "student[:, 0] * torch.rand(len(student))",
    ],
    ids=["top 64", "weights of the vocabulary", "an end token", "random"],
)
def test_an_objective_is_tried_on_the_vocabulary_of_the_study(study, value):
    """It was tried on seven tokens, so these were refused."""
    recipe = study("import torch\n" + CODE.replace("scale * (student - teacher).pow(2).sum(-1)", value))
    try_objectives(make_plan(recipe), lambda name: 420)


def test_a_file_that_changes_within_a_second_is_read_again(tmp_path, monkeypatch):
    """Python ran the bytecode of a file before, if the file had the same size and second."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    module = f"quick_{tmp_path.name}"
    file = tmp_path / f"{module}.py"
    for value in (1, 2):
        file.write_text(f"def score(p, r): return {value}")
        os.utime(file, (1, 1))
        assert load_function(f"{module}:score", tmp_path).call("", []) == value
    assert not (tmp_path / "__pycache__").exists()


@pytest.mark.parametrize(("tail", "columns"), [("lump", 17), ("drop", 16)])
def test_an_objective_is_tried_on_the_columns_of_a_recording(study, tail, columns):
    """It was tried on the vocabulary, and trained on other columns or failed after the recording."""
    sampler = f"method.sampler={{type: dataset, signal: {{type: top_k, k: 16, tail: {tail}}}}}"
    for value, fits in ((f"student.topk({columns}).values.sum(-1)", True), (f"student.topk({columns + 1}).values.sum(-1)", False)):
        plan = make_plan(study(CODE.replace("scale * (student - teacher).pow(2).sum(-1)", value), sampler))
        if fits:
            try_objectives(plan, lambda name: 420)
        else:
            with pytest.raises(ConfigError, match=rf"fails on random logits of shape \(5, {columns}\): RuntimeError"):
                try_objectives(plan, lambda name: 420)


def test_an_objective_is_tried_on_the_vocabulary_of_its_models(study):
    """It was tried on the smallest vocabulary of the study."""
    code = "import torch\n" + CODE.replace("scale * (student - teacher).pow(2).sum(-1)", "(student * torch.ones(512)).sum(-1)")
    plan, asked = make_plan(study(code)), []
    try_objectives(plan, lambda name: asked.append(name) or {"s": 512}[name])
    assert asked == ["s"]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("metrics=[nowhere:score]", "there is no file .*nowhere.py, and no module nowhere is installed"),
        ("metrics=[score]", "a function is named as MODULE:FUNCTION"),
        ("metrics=['x:rouge_l']", "tadistill already has a metric `rouge_l`; give your function another name"),
        ("metrics=['x:index']", "predictions.jsonl already has a key `index`, which is not a metric; give your function another name"),
        ("metrics=['x:turns']", "predictions.jsonl already has a key `turns`"),
        ("metrics=['x:a', 'y:a']", "`metrics` has two functions with the name `a`"),
        ("metrics=['math:sqrt']", "has no Python source"),
        ("runtime.code=nowhere", "`runtime.code` is `nowhere`, which is not a folder"),
        (f"runtime.code={'a' * 3000}", "which is not a folder"),
    ],
)
def test_mistakes_of_the_recipe(study, override, words):
    with pytest.raises(ConfigError, match=words):
        make_plan(study(CODE, override))


def test_a_module_is_never_mixed_up_with_an_installed_one(tmp_path):
    (tmp_path / "textwrap.py").write_text("def score(p, r): return 0.0")
    with pytest.raises(ConfigError, match=r"textwrap\.py has the same name as .*textwrap\.py, which this process imports"):
        load_function("textwrap:score", tmp_path)


def test_each_study_of_a_process_has_its_own_modules(tmp_path, monkeypatch):
    """The second study's file was refused, and a file that it imports was the first study's."""
    monkeypatch.setattr("sys.path", [*sys.path])
    for name, factor in (("a", 1), ("b", 22)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "own_losses.py").write_text("from own_factor import factor\n\ndef f():\n    return factor\n")
        (tmp_path / name / "own_factor.py").write_text(f"factor = {factor}\n")
    (tmp_path / "a" / "own_more.py").write_text("def f():\n    return 3\n")
    assert load_function("own_more:f", tmp_path / "a").call() == 3
    assert [load_function("own_losses:f", tmp_path / name).call() for name in "abab"] == [1, 22, 1, 22]
    with pytest.raises(ConfigError, match=r"there is no file .*own_more\.py, and no module own_more is installed"):
        load_function("own_more:f", tmp_path / "b")


def test_a_helper_in_a_folder_without_init_is_that_of_the_study(tmp_path, monkeypatch):
    """`from own_parts import number` gave the second study the module of the first."""
    monkeypatch.setattr("sys.path", [*sys.path])
    for name, number in (("a", 1), ("b", 22)):
        (tmp_path / name / "own_parts").mkdir(parents=True)
        (tmp_path / name / "own_parts" / "number.py").write_text(f"n = {number}\n")
        (tmp_path / name / "own_plain.py").write_text("from own_parts import number\n\ndef f():\n    return number.n\n")
    assert [load_function("own_plain:f", tmp_path / name).call() for name in "aba"] == [1, 22, 1]


def test_modules_that_the_user_has_imported_stay(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.path", [str(tmp_path), *sys.path])
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"own_of_{name}.py").write_text("import own_users\n\ndef f():\n    return own_users\n")
    (tmp_path / "a" / "own_users.py").write_text("")
    with monkeypatch.context() as patch:
        patch.setattr("sys.path", [str(tmp_path / "a"), *sys.path])
        users = importlib.import_module("own_users")
    assert load_function("own_of_a:f", tmp_path / "a").call() is users
    assert load_function("own_of_b:f", tmp_path / "b").call() is users is sys.modules["own_users"]


def test_a_file_of_the_users_path_never_runs_in_place_of_the_studys(tmp_path, monkeypatch):
    """A script is beside the first study, so Python finds this study's files first."""
    monkeypatch.setattr("sys.path", [str(tmp_path / "a"), *sys.path])
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "own_first.py").write_text("def f():\n    return 1\n")
        (tmp_path / name / f"own_late_{name}.py").write_text("def f():\n    import own_first\n    return own_first\n")
    for name in ("own_first:f", "own_late_a:f"):
        load_function(name, tmp_path / "a").call()
    there, here = tmp_path / "a" / "own_first.py", tmp_path / "b" / "own_first.py"
    for name in ("own_first:f", "own_late_b:f"):
        with pytest.raises(ConfigError, match=f"{here} has the same name as {there}, which .* in a Python process of its own"):
            load_function(name, tmp_path / "b")


def test_a_changed_package_is_bound_to_its_modules_again(tmp_path, monkeypatch):
    """The second import was refused: the package had no attribute `parts`."""
    monkeypatch.setattr("sys.path", [*sys.path])
    package = tmp_path / "own_package"
    package.mkdir()
    (package / "parts.py").write_text("n = 1\n")
    for factor in (1, 22):
        (package / "__init__.py").write_text(f"import own_package.parts\n\ndef f():\n    return {factor} * own_package.parts.n\n")
        assert load_function("own_package:f", tmp_path).call() == factor


def test_a_changed_module_has_only_what_is_in_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.path", [*sys.path])
    file = tmp_path / "own_changed.py"
    file.write_text("def f():\n    return 1\n\ndef g():\n    return 2\n")
    assert load_function("own_changed:g", tmp_path).call() == 2
    file.write_text("def f():\n    return 3\n")
    with pytest.raises(ConfigError, match=r"g in .*own_changed\.py does not exist"):
        load_function("own_changed:g", tmp_path)
    assert load_function("own_changed:f", tmp_path).call() == 3


def test_a_declared_metric_is_shown_like_any_other(study, monkeypatch):
    monkeypatch.setattr("tadistill.metrics.METRICS", dict(METRICS))
    declare(*(metric.row for metric in study().metrics))
    assert set(names_in("quality")[-2:]) == {"score", "size"}
    assert (metric_title("size@greedy"), metric_unit("size"), higher_is_better("size")) == ("characters, greedy", "", False)
    assert higher_is_better("score")


def test_scores_are_one_number_per_answer(study):
    recipe = study()
    functions = {metric.name: load_function(metric.function, recipe.runtime.code) for metric in recipe.metrics}
    rows = [Example("", "", ("a",)), Example("", "", ("x",))]
    assert score_own(functions, ["a", "bcd"], rows) == {
        "score": [100.0, 0.0],
        "size": [1.0, 3.0],
    }


def test_a_custom_objective_is_divided_by_its_temperature():
    from tadistill.train.step import own_divergence

    student, teacher = torch.randn(2, 3, 5)
    found = own_divergence(lambda s, t, scale: scale * (s - t).sum(-1))(student, teacher, temperature=2.0, scale=3.0)
    torch.testing.assert_close(found, 1.5 * (student - teacher).sum(-1))


def test_a_metric_is_tried_on_every_test_set(study, tmp_path):
    (tmp_path / "numbers.jsonl").write_text('{"instruction": "2 + 3", "output": "five"}\n')
    code = CODE.replace("return len(prediction)", "return None if references == ['five'] else 1")
    with pytest.raises(ConfigError, match=r"metrics\.1: metric .* references \['five'\], returned None; return a number"):
        try_own_code(study(code, "data.test=[tinyworld, numbers.jsonl]"))


def test_two_rows_of_a_test_set_are_enough_to_try_a_metric(study, tmp_path):
    row = '{"instruction": "2 + 3", "output": "5"}\n'
    (tmp_path / "numbers.jsonl").write_text(2 * row + "{}\n")  # other checks find the damaged row
    try_own_code(study(CODE, "data.test=[numbers.jsonl]"))
    (tmp_path / "numbers.jsonl").write_text("{}\n" + row)
    with pytest.raises(DataError, match="numbers"):
        try_own_code(study(CODE, "data.test=[numbers.jsonl]"))
    (tmp_path / "numbers.jsonl").write_text(row)
    try_own_code(study(CODE, "data.test=[numbers.jsonl]"))
