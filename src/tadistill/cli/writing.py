"""Commands that help to write a recipe: `new` writes one, `recipes` lists those of the package, `explain` explains a key."""

import difflib
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from tadistill.cli.shared import complete_key, complete_method, console
from tadistill.disk import from_home
from tadistill.errors import ConfigError, TadistillError, cause

if TYPE_CHECKING:
    from rich.table import Table

    from tadistill.config.key_help import Entry


app = typer.Typer()
_QUESTIONS = {
    "teacher": "Teacher (hub id or directory)",
    "student": "Student (hub id or directory)",
    "data": "Data (.jsonl file, folder with train.jsonl, dev.jsonl and test.jsonl, hub id, or a name such as dolly)",
    "method": "Method",
}
_METHODS = "sft, kd, seqkd, imitkd, gkd, on-policy-rkl, minillm, minillm-official, distillm, distillm-2, skd, abkd, taid, amid"
_ROLES = ("train", "dev", "test")
_NO_CORPUS = ("minillm", "minillm-official")


@app.command()
def new(
    file: Annotated[Path, typer.Argument(help="The file to write.", metavar="[FILE]")] = Path("recipe.yaml"),
    teacher: Annotated[str | None, typer.Option("--teacher", help="Hub id or directory of the teacher.")] = None,
    student: Annotated[str | None, typer.Option("--student", help="Hub id or directory of the student.")] = None,
    data: Annotated[str | None, typer.Option("--data", help="A .jsonl file, a folder, a Hub id, or the name of a data set.")] = None,
    method: Annotated[str | None, typer.Option("--method", help=f"Name of the method: {_METHODS}.", autocompletion=complete_method)] = None,
) -> None:
    """Write a commented recipe of one distillation. The command asks for each option that is not given."""
    from tadistill.config.load import parse
    from tadistill.config.method import METHODS, no_method

    file = from_home(file, "the new recipe")
    if file.exists() or file.is_symlink():
        raise ConfigError(f"{file} already exists; choose another name for the new recipe")
    given = {"teacher": teacher, "student": student, "data": data, "method": method}
    missing = [name for name, answer in given.items() if not answer]
    if missing and not _at_terminal():
        raise ConfigError(f"`tadistill new` can ask questions only at a terminal; give the answers with --{' and --'.join(missing)}")
    for name in missing:
        given[name] = _asked(name)
    if given["method"] not in METHODS:
        raise ConfigError(no_method(str(given["method"])))
    text = recipe_text(file, **{name: str(answer).strip() for name, answer in given.items()})
    parse(text, source=str(file), folder=file.absolute().parent)
    try:
        with file.open("x", encoding="utf-8") as content:
            content.write(text)
    except OSError as error:
        raise ConfigError(f"{file} cannot be written ({cause(error)}); give a file in an existing folder with write permission") from error
    console.say(f"wrote {file}")
    if _is_missing(str(given["data"])):
        console.note(f"{given['data']} does not exist yet; write this file, or correct `data` in {file}")
    console.say(f"next: {shlex.join(['tadistill', 'plan', str(file)])}")


def _at_terminal() -> bool:
    return sys.stdin.isatty()


def _asked(name: str) -> str:
    from tadistill.config.method import METHODS, no_method

    if name != "method":
        return typer.prompt(_QUESTIONS[name])
    console.say(f"Methods: {', '.join(METHODS)}")
    while (answer := typer.prompt(_QUESTIONS[name], default="kd")) not in METHODS:
        console.say(no_method(answer))
    return answer


def recipe_text(file: Path, teacher: str, student: str, data: str, method: str) -> str:
    """Return the text of a new recipe.

    Args:
        file: the path of the new recipe. Paths in the recipe are relative to its folder.
        teacher, student, data: the user's answers. Their paths are relative to the working directory.
    """
    from tadistill.config.method import METHODS
    from tadistill.config.schema import schema_file

    study = re.sub(r"[^A-Za-z0-9._-]+", "-", file.stem).strip("-._") or "distillation"
    models = {"teacher": _moved(teacher, file), "student": _moved(student, file)}
    objective = "\n  objective: {pt_weight: 0}   # no language modelling on plain text; to use it, give data.corpus and remove this line"
    rows, name = [_row(role, *_set(data, role, file)) for role in _ROLES], shlex.quote(file.name)
    return f"""# yaml-language-server: $schema={schema_file().as_uri()}
# One distillation: the teacher teaches the student. The student is then measured on the test set.
#   tadistill plan {name}     # shows what will be done, and what it costs
#   tadistill run {name}      # does this work, and writes runs/{study}/report.html
# `tadistill explain KEY` explains a key, for instance optim.lr. The page "The recipe" of the documentation explains all keys.
study: {_scalar(study)}
seeds: [10]                   # one student for each training seed; several seeds show how much the result varies
teacher: {_scalar(models["teacher"])}
student: {_scalar(models["student"])}
data:
{"".join(rows)}  template: {_template(teacher):<18}# chat: the chat template of the models; alpaca or plain: for base models
  max_prompt: 256             # rows with a longer prompt, in tokens, are left out and counted
  max_length: 512             # tokens of a prompt with its answer; a longer answer is cut
method:
  name: {method:<21} # {", ".join(METHODS)}{objective if method in _NO_CORPUS else ""}
  optim:
    lr: 2e-5                  # peak learning rate; small models often need a higher one
    epochs: 1                 # passes over the training rows; or use `steps`, the number of updates
    batch: 16                 # sequences in an update
    micro_batch: 4            # sequences in one forward pass; lower it if memory runs out
    precision: fp32           # bf16: less time and memory on a GPU
evaluate:
  max_new_tokens: 256         # longest answer, in tokens
"""


def _row(role: str, content: Any, same: bool) -> str:
    text = {
        "train": "the rows that the student learns from",
        "dev": "chooses the checkpoint that is kept",
        "test": "measured once, at the end",
    }[role]
    if same:
        why = "a checkpoint must be chosen on other rows" if role == "dev" else "scores on them mean little"
        text = f"CHANGE THIS: these are the training rows; {why}"
    return f"  {f'{role}: {_scalar(content)}':<27} # {text}\n"  # without the space, a long value would contain the comment


def _set(data: str, role: str, file: Path) -> tuple[Any, bool]:
    path = Path(os.path.expanduser(data))
    if path.is_dir():
        names = sorted(found.stem for found in path.glob("*.jsonl"))
        others = [name for name in names if name not in _ROLES]
        split = others[0] if len(others) == 1 and "train" not in names else "train"
        return (_moved(data, file), False) if role in names else ({"load": _moved(data, file), "split": split}, role != "train")
    if path.is_file():
        other = path.with_name(path.name.replace("train", role))
        there = other.is_file() and (role == "train" or other != path)
        return (_moved(str(other) if there else data, file), role != "train" and not there)
    return data, role != "train" and _is_missing(data)


def _is_missing(data: str) -> bool:
    path = Path(os.path.expanduser(data))
    return path.suffix == ".jsonl" and not path.exists()


def _moved(text: str, file: Path) -> str:
    path = Path(os.path.expanduser(text))
    if path.is_absolute() or not path.exists():
        return text
    moved = os.path.relpath(path, file.absolute().parent)
    return moved if path.is_file() or moved.startswith(".") or "/" in moved or not text.startswith(".") else f"./{moved}"


def _template(teacher: str) -> str:
    from tadistill.models import sources, tokens

    try:
        folder = sources.locate(teacher, weights=False)
    except TadistillError:
        folder = None
    if folder is not None:
        return "chat" if tokens.read(folder, folder).template else "alpaca"
    return "chat" if re.search(r"(instruct|chat|[-_]it)\b", teacher, re.IGNORECASE) else "alpaca"


def _scalar(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True).removesuffix("...\n").strip()


@app.command()
def recipes() -> None:
    """List the recipes that are part of tadistill. `tadistill run NAME` runs one from any folder."""
    from tadistill.config.recipe_files import shipped, summary

    listed = [(name, summary(path)) for name, path in shipped().items()]
    if not console.is_terminal:
        width = max(len(name) for name, _ in listed)
        for name, text in listed:
            console.say(f"{name:<{width}}  {text}")
        return
    console.print(_two_columns(listed))


@app.command()
def explain(
    words: Annotated[
        list[str],
        typer.Argument(
            help="A key of a recipe (lr, method.optim.lr, arms.X.path), a metric, or a word of reports (error budget); or several.",
            metavar="KEY",
            autocompletion=complete_key,
        ),
    ],
) -> None:
    """Print what a key of a recipe, or a word of a report, means.

    For a key, its type, allowed values, default and documentation page are printed too.
    """
    from rich.padding import Padding
    from rich.text import Text

    for entry in _explained(words):
        console.print(Text(entry.title, "bold"))
        console.print(Padding(Text(entry.meaning), (0, 0, 0, 2), expand=False))
        for rows in filter(None, (entry.facts, entry.below)):
            console.print(Padding(_two_columns(rows), (0, 0, 0, 4), expand=False))
        console.print()


def _explained(words: Sequence[str]) -> "list[Entry]":
    """Return the explanations of a term of several words (error budget), or else of each word (lr batch)."""
    from tadistill.glossary import GLOSSARY

    try:
        return _entries(" ".join(words))
    except ConfigError as term:
        found, unknown = [], []
        for word in words:
            try:
                found += _entries(word)
            except ConfigError as error:
                unknown.append(error)
        if unknown:
            terms = [word.lower() for word in GLOSSARY if " " in word]
            mistyped = difflib.get_close_matches(" ".join(words).lower(), terms, n=1, cutoff=0.8)
            raise (unknown[0] if found and not mistyped else term) from None
        return found


def _entries(asked: str) -> "list[Entry]":
    """Return the explanations of a word: its sentence in the glossary; then each recipe key and each allowed value that has this name."""
    from tadistill.config.key_help import Entry
    from tadistill.config.key_help import explain as in_recipes
    from tadistill.glossary import ALIASES, GLOSSARY, metric_text
    from tadistill.metrics import METRICS

    said = {word.lower(): Entry(word, text) for word, text in GLOSSARY.items()}
    said |= {alias.lower(): said[word.lower()] for alias, word in ALIASES.items()}
    for name, metric in METRICS.items():
        said[name] = Entry(f"{metric.title} ({name})", metric_text(name), (("more in", 'the page "Evaluation" of the documentation'),))
    word = re.sub(r"^pass@\d+$", "pass@k", asked.lower())
    found = [said[word]] if word in said else []
    try:
        return found + in_recipes(asked, others=said)
    except ConfigError:
        if not found:
            raise
        return found


def _two_columns(rows: Sequence[tuple[str, str]]) -> "Table":
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    for name, text in rows:
        table.add_row(Text(name, "bold"), Text(text))
    return table
