"""The limits of the house: sizes of files and functions, numbers of parameters, the first words of docstrings."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "src" / "tadistill"
SOURCES = sorted(PACKAGE.rglob("*.py"))
IDS = [str(path.relative_to(PACKAGE)) for path in SOURCES]
FILES, LONGEST, SHORTEST, FUNCTION, PARAMETERS = 211, 350, 30, 60, 7
RIDDLES = ("Of ", "What ", "Whether ", "Which ", "How many ", "Where ", "The same")
"""A docstring starts with a verb, or a class's with a noun."""
LONG = {"train_stage": 100}
SHORT = {
    "__main__.py": "the entry point of `python -m tadistill`",
    "runner/preload.py": "imported by its name in the server that stages are forked from",
    "tuning.py": "constants that plan and training share; plan may not import torch",
}
MANY = {
    ("cli/models.py", "compare"): "options of a command",
    ("cli/models.py", "evaluate"): "options of a command",
    ("cli/studies.py", "human"): "options of a command",
    ("cli/studies.py", "judge"): "options of a command",
    ("cluster/submit.py", "submit"): "options of a command",
    ("objectives/fused.py", "fused_divergence"): "both models and the settings of the loss, all public",
    ("rollout/rounds.py", "__init__"): "what a round draws from, each of a kind of its own",
    ("statistics/tests.py", "detectable"): "the planning values of a formula",
    ("train/loop.py", "train_stage"): "everything that differs between training stages",
}


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Count a function's parameters; `self`, `*args` and `**kwargs` do not count."""
    arguments = function.args
    return len([a for a in arguments.posonlyargs + arguments.args + arguments.kwonlyargs if a.arg not in ("self", "cls")])


@pytest.mark.parametrize("path", SOURCES, ids=IDS)
def test_files_are_small(path):
    text = path.read_text()
    assert text.count("\n") <= LONGEST
    assert ast.get_docstring(ast.parse(text)) or not text.strip() or path.name == "__init__.py"


@pytest.mark.parametrize("path", SOURCES, ids=IDS)
def test_functions_are_small(path):
    for function in functions(path):
        assert function.end_lineno - function.lineno < LONG.get(function.name, FUNCTION), function.name


@pytest.mark.parametrize("path", SOURCES, ids=IDS)
def test_functions_have_few_parameters(path):
    found = {function.name for function in functions(path) if parameters(function) > PARAMETERS}
    assert found == {name for file, name in MANY if file == str(path.relative_to(PACKAGE))}


def test_no_file_is_tiny():
    """The `__init__.py` of a package may be short: it holds what the package offers."""
    sizes = {str(path.relative_to(PACKAGE)): path.read_text().count("\n") for path in SOURCES if path.name != "__init__.py"}
    assert {name for name, lines in sizes.items() if lines < SHORTEST} == set(SHORT)


def test_there_are_few_files():
    assert len(SOURCES) <= FILES


@pytest.mark.parametrize("path", SOURCES, ids=IDS)
def test_docstrings_say_what_comes_back(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node) or ""
            assert not text.startswith(RIDDLES), text
            assert "mports no torch" not in text  # the import contract says so
