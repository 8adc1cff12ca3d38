"""`tadistill list` and `tadistill clean`: the studies of a runs directory, and stored results that no study needs."""

from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tadistill.cluster.fetch import size
from tadistill.runner.inventory import Unneeded, delete, studies, unneeded
from tadistill.store import Store

_SHOWN = 20  # rows of the table before the question


def print_studies(runs: Path, store: Store, console: Console) -> None:
    """Print a table of the studies in a runs directory, and the size of the stored results that no study needs."""
    rows, loose = studies(runs, store), unneeded(runs, store)
    if not rows:
        console.print(f"there is no study in {runs}; start one with `tadistill run RECIPE`", highlight=False, markup=False, soft_wrap=True)
    else:
        table = Table(box=None)
        for column in ("study", "started", "stages done", "size", "state"):
            table.add_column(column, justify="right" if column in ("stages done", "size") else "left", overflow="fold")
        for row in rows:
            when = row.created[:16].replace("T", " ")
            table.add_row(escape(row.name), when, f"{row.done}/{row.stages}", size(row.bytes), row.state)
        console.print(table)
    if loose:
        text = f"no study needs {_counted(loose)} in the store; free the space with `tadistill clean`"
        console.print(text, highlight=False, markup=False, soft_wrap=True)


def clean(runs: Path, store: Store, console: Console, *, dry_run: bool, confirm: Callable[[str], bool]) -> None:
    """Delete the stages that no study needs, after the user has agreed. With `dry_run`, only print them.

    Raises:
        StoreError: a file of a study cannot be read, or a folder cannot be deleted.
    """
    loose = unneeded(runs, store)
    if not loose:
        console.print("nothing to delete: every stage in the store belongs to a study", highlight=False)
        return
    shown = loose if dry_run else loose[:_SHOWN]
    table = Table(box=None)
    for column in ("key", "size", "stage"):
        table.add_column(column, justify="right" if column == "size" else "left", overflow="fold")
    for each in shown:
        table.add_row(each.key[:8], size(each.bytes), escape(each.label))
    console.print(table)
    if len(loose) > len(shown):
        console.print(f"and {len(loose) - len(shown)} smaller ones; --dry-run shows all", highlight=False)
    if dry_run:
        console.print(f"{_counted(loose)} would be deleted", highlight=False)
        return
    if not confirm(f"Delete {_counted(loose)}, which no study needs?"):
        console.print("nothing was deleted")
        return
    still = {each.key for each in unneeded(runs, store)}  # a study may have started during the question
    freed = delete(
        store, [each.key for each in loose if each.key in still], lambda text: console.print(text, highlight=False, markup=False)
    )
    console.print(f"deleted {size(freed)}", highlight=False)


def _counted(loose: list[Unneeded]) -> str:
    return f"{len(loose)} stage{'s' * (len(loose) != 1)} ({size(sum(each.bytes for each in loose))})"
