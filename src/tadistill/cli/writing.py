"""Commands that help to write a recipe: recipes, explain."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from tadistill.cli import complete
from tadistill.cli.shared import console

if TYPE_CHECKING:
    from rich.table import Table

app = typer.Typer()


@app.command()
def recipes() -> None:
    """List the recipes that are shipped with tadistill. `tadistill run NAME` runs one from any folder."""
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
    word: Annotated[
        str,
        typer.Argument(help="A key of a recipe, such as lr, method.optim.lr or arms.X.path.", metavar="KEY", autocompletion=complete.keys),
    ],
) -> None:
    """Print what a key of a recipe means: its type, allowed values and default, and the page that says more."""
    from rich.padding import Padding
    from rich.text import Text

    from tadistill.config.lookup import explain as entries

    for entry in entries(word):
        console.print(Text(entry.title, "bold"))
        console.print(Padding(Text(entry.meaning), (0, 0, 0, 2), expand=False))
        for rows in filter(None, (entry.facts, entry.below)):
            console.print(Padding(_two_columns(rows), (0, 0, 0, 4), expand=False))
        console.print()


def _two_columns(rows: Sequence[tuple[str, str]]) -> "Table":
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    for name, text in rows:
        table.add_row(Text(name, "bold"), Text(text))
    return table
