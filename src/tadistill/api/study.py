"""The objects that `run`, `compare` and `plan` return: a study that has run, and one that has not. A notebook shows their tables."""

import io
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.text import Text

from tadistill.config.evaluate import declare_own_metrics
from tadistill.errors import StoreError
from tadistill.plan import preview
from tadistill.plan.arms import Plan
from tadistill.report import read_results, summary_table
from tadistill.runner.local import EARLIER, evaluations_key
from tadistill.store import Store
from tadistill.text import counted

_WIDTH = 110  # columns of tables in a notebook


class _Shown:
    def __rich__(self) -> RenderableType:
        raise NotImplementedError

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=_WIDTH, color_system=None, force_jupyter=False)  # Jupyter would show it at once
        console.print(self.__rich__())
        return console.file.getvalue().rstrip()  # type: ignore[attr-defined]

    def _repr_html_(self) -> str:
        console = Console(file=io.StringIO(), width=_WIDTH, record=True, force_jupyter=False)
        console.print(self.__rich__())
        return console.export_html(inline_styles=True, code_format='<pre style="font-family:monospace;line-height:1.3">{code}</pre>')


class Study(_Shown):
    """A study that has run: its arms and its numbers. A notebook shows the study's main result and a table of its arms."""

    def __init__(self, directory: Path, store: Store, evaluations: str | None = None):
        self._home, self._store = directory.absolute(), Store(store.root.absolute())
        self._evaluations = evaluations or evaluations_key(self._home)

    def __reduce__(self) -> tuple[type["Study"], tuple[Path, Store, str]]:
        return Study, (self._home, self._store, self._evaluations)  # a copy finds its files after later runs too

    @property
    def directory(self) -> Path:
        """The directory with the study's plan and report. A later run with other evaluations moves both to a folder in `earlier`."""
        moved = self._home / EARLIER / self._evaluations
        return moved if evaluations_key(self._home) != self._evaluations and moved.is_dir() else self._home

    @property
    def page(self) -> Path:
        """Path of the HTML report."""
        return self.directory / "report.html"

    @cached_property
    def _read(self) -> Any:
        directory = self.directory
        found = read_results(directory, self._store)
        if evaluations_key(directory) != self._evaluations:
            raise StoreError(
                f"{directory} has the plan of a later run with other settings, and the plan of this study was not kept; run the study again"
            )
        return found

    @property
    def _results(self) -> Any:
        declare_own_metrics(self._read.plan.recipe)  # another study of this process may have other metrics with the same names
        return self._read

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Every number with its arm, model, training seed, test set, metric and interval, as in results.json."""
        return [asdict(row) for row in self._results.rows]

    @property
    def arms(self) -> list[str]:
        """The names of the arms (paths of models), in the order of the recipe."""
        return [arm.name for arm in self._results.plan.arms]

    def __rich__(self) -> RenderableType:
        """Return the main result, the table of arms and the report's path for `rich.print`."""
        return Group(summary_table(self._results), Text(f"report: {self.page}"))

    def __repr__(self) -> str:
        return f"Study({str(self.directory)!r})"


class PlannedStudy(_Shown):
    """The stages of a study that has not run yet. A notebook shows the tables of `tadistill plan`."""

    def __init__(self, plan: Plan, store: Store):
        self._plan, self._store = plan, Store(store.root.absolute())

    @property
    def stages(self) -> list[dict[str, Any]]:
        """One dict per stage with its key, label, model, seed, predicted FLOPs (or None), and `finished` (True if its result is stored)."""
        return [
            {
                "key": stage.key,
                "label": stage.label,
                "model": stage.model,
                "seed": stage.seed,
                "flops": stage.flops,
                "finished": self._store.finished(stage.key),
            }
            for stage in self._plan.stages.values()
        ]

    def __rich__(self) -> RenderableType:
        """Return the tables of `tadistill plan` for `rich.print`."""
        return preview.preview(self._plan, self._store, _WIDTH)

    def __repr__(self) -> str:
        return f"PlannedStudy({self._plan.recipe.study!r}, {counted(len(self._plan.stages), 'stage')})"
