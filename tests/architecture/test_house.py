"""The limits of the house: sizes of files and functions, numbers of parameters, first words of docstrings, how sentences are printed."""

import ast
import re
import tomllib
from functools import cache
from itertools import pairwise
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "src" / "tadistill"
SOURCES = {str(path.relative_to(PACKAGE)): path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))}
FILES, LONGEST, SHORTEST, FUNCTION, PARAMETERS = 235, 350, 30, 60, 7
RIDDLES = ("Of ", "What ", "Whether ", "Which ", "How many ", "Where ", "The same")
"""A docstring starts with a verb, or a class's with a noun."""
LONG = {"train_stage": 100}
SHORT = {
    "__main__.py": "the entry point of `python -m tadistill`",
}
MANY = {
    ("api/loaded_model.py", "evaluate"): "the model, its test sets and all settings, all public",
    ("cli/running.py", "compare"): "options of a command",
    ("cli/running.py", "evaluate"): "options of a command",
    ("cli/studies.py", "human"): "options of a command",
    ("cli/studies.py", "judge"): "options of a command",
    ("cluster/submit.py", "submit"): "options of a command",
    ("objectives/fused_loss.py", "fused_divergence"): "both models and the settings of the loss, all public",
    ("train/loop.py", "train_stage"): "everything that differs between training stages",
}


@cache
def nodes(name: str) -> list[ast.AST]:
    """Return all nodes of a file; the module is the first."""
    return [*ast.walk(ast.parse(SOURCES[name]))]


def functions(name: str) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in nodes(name) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Count a function's parameters; `self`, `*args` and `**kwargs` do not count."""
    arguments = function.args
    return len([a for a in arguments.posonlyargs + arguments.args + arguments.kwonlyargs if a.arg not in ("self", "cls")])


def test_files_are_small():
    assert [name for name, text in SOURCES.items() if text.count("\n") > LONGEST] == []


def test_files_say_what_they_are_for():
    silent = [name for name, text in SOURCES.items() if text.strip() and not ast.get_docstring(nodes(name)[0])]
    assert [name for name in silent if Path(name).name != "__init__.py"] == []


def test_functions_are_small():
    found = [(name, f.name) for name in SOURCES for f in functions(name) if f.end_lineno - f.lineno >= LONG.get(f.name, FUNCTION)]
    assert found == []


def test_functions_have_few_parameters():
    assert {(name, f.name) for name in SOURCES for f in functions(name) if parameters(f) > PARAMETERS} == set(MANY)


def test_no_file_is_tiny():
    """The `__init__.py` of a package may be short: it holds what the package offers."""
    sizes = {name: text.count("\n") for name, text in SOURCES.items() if Path(name).name != "__init__.py"}
    assert {name for name, lines in sizes.items() if lines < SHORTEST} == set(SHORT)


def test_there_are_few_files():
    assert len(SOURCES) <= FILES


def docstrings(name: str) -> list[str]:
    """Return the docstrings of a file: of the module, its classes, functions and attributes."""
    found = []
    for node in nodes(name):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found.append(ast.get_docstring(node) or "")
        body = getattr(node, "body", None)
        for before, after in pairwise(body if isinstance(body, list) else []):
            if isinstance(before, ast.Assign | ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                found.append(str(after.value.value))
    return found


def test_docstrings_say_what_comes_back():
    for name in SOURCES:
        for text in docstrings(name):
            assert not text.startswith(RIDDLES), (name, text)
            assert "mports no torch" not in text, name  # the import contract says so


def test_plain_sentences_are_printed_by_say():
    """A value in square brackets is no markup: `say` prints sentences, and an f-string with markup escapes its values."""
    for name in SOURCES:
        for call in nodes(name):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "print" and call.args:
                assert name == "terminal.py" or "markup" not in {keyword.arg for keyword in call.keywords}, (name, call.lineno)
                values = call.args[0].values if isinstance(call.args[0], ast.JoinedStr) else []
                for value in (part.value for part in values if isinstance(part, ast.FormattedValue)):
                    assert getattr(getattr(value, "func", None), "id", "") == "escape", (name, call.lineno)


def test_contributing_names_the_layers_of_the_import_contract():
    root = PACKAGE.parents[1]
    contract = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"][0]
    layers = [name for layer in contract["layers"] for name in layer.split(" | ") if name != "__main__"]
    table = (root / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("| layer |")[2].partition("\n\n")[0]
    assert [name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row.split(" | ")[0])] == layers
