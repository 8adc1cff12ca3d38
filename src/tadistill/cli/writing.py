"""Commands that help to write a recipe: recipes, explain."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from tadistill.cli import complete
from tadistill.cli.shared import console
from tadistill.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from tadistill.config.lookup import Entry

app = typer.Typer()


@app.command()
def recipes() -> None:
    """List the recipes that are part of tadistill. `tadistill run NAME` runs one from any folder."""
    from tadistill.config.shipped import shipped, summary

    listed = [(name, summary(path)) for name, path in shipped().items()]
    if not console.is_terminal:
        width = max(len(name) for name, _ in listed)
        for name, text in listed:
            console.print(f"{name:<{width}}  {text}", soft_wrap=True, highlight=False, markup=False)
        return
    console.print(_two_columns(listed))


@app.command()
def explain(
    words: Annotated[
        list[str],
        typer.Argument(
            help="A key of a recipe (lr, method.optim.lr, arms.X.path), a metric, or a word of reports (error budget).",
            metavar="KEY",
            autocompletion=complete.keys,
        ),
    ],
) -> None:
    """Print what a key of a recipe, or a word of a report, means.

    For a key, its type, allowed values, default and documentation page are printed too.
    """
    from rich.padding import Padding
    from rich.text import Text

    for entry in _entries(" ".join(words)):
        console.print(Text(entry.title, "bold"))
        console.print(Padding(Text(entry.meaning), (0, 0, 0, 2), expand=False))
        for rows in filter(None, (entry.facts, entry.below)):
            console.print(Padding(_two_columns(rows), (0, 0, 0, 4), expand=False))
        console.print()


def _entries(asked: str) -> "list[Entry]":
    """Return the explanations of a word: its sentence in the glossary; then each recipe key and each allowed value that has this name."""
    from tadistill.config.lookup import Entry
    from tadistill.config.lookup import explain as in_recipes
    from tadistill.glossary import GLOSSARY, metric_text
    from tadistill.metrics import METRICS

    said = {word.lower(): Entry(word, text, (("more in", 'the page "Glossary" of the documentation'),)) for word, text in GLOSSARY.items()}
    for name, metric in METRICS.items():
        said[name] = Entry(f"{metric.title} ({name})", metric_text(name), (("more in", 'the page "Evaluation" of the documentation'),))
    found = [said[asked.lower()]] if asked.lower() in said else []
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
