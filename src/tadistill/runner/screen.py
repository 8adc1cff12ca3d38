"""The display of a run: progress bars in a terminal, lines elsewhere, and in both cases run.log and the record for `tadistill status`.

A line is printed when a stage ends and, without a terminal, once a minute for each running stage. run.log gets the lines in both cases.
"""

import time
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column

from tadistill.plan.arms import Plan
from tadistill.plan.graph import distinct_labels
from tadistill.plan.throughput import spoken
from tadistill.runner.estimate import Estimate, workloads
from tadistill.runner.local import Journal, StageProgress, State, described
from tadistill.runner.processes import Message
from tadistill.store import Store

_MINUTE = 60.0


class Screen:
    """The output of one run. Use it as a context manager; leaving it writes how the run ended."""

    def __init__(self, plan: Plan, store: Store, console: Console, *, todo: Sequence[str], jobs: int):
        self.console, self.labels = console, distinct_labels((s.key, s.label, s.arms) for s in plan.stages.values())
        self.steps = {key: stage.steps or 1 for key, stage in plan.stages.items()}
        done = len(plan.stages) - len(todo)
        study = store.root.parent / plan.recipe.study
        self.journal = Journal(study, done=done, total=len(plan.stages), complain=self.say, needs=plan.stages)
        self.run, self.waiting = self.journal.run, list(todo)
        self.estimate = Estimate(plan.stages, workloads(plan), jobs)
        wide = Column(no_wrap=True, overflow="ellipsis", ratio=1)
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", table_column=wide),
            BarColumn(bar_width=12),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            TextColumn("{task.fields[note]}", style="dim", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
            console=console,
            transient=True,
            expand=True,
            disable=not console.is_terminal,
        )
        self.all = self.progress.add_task("all stages", total=len(plan.stages), completed=done, note="", left="")
        self.tasks: dict[str, TaskID] = {}
        self.started: dict[str, float] = {}
        self._minute = time.monotonic()

    def __enter__(self) -> "Screen":
        self.journal.log(f"start: {self.run.command} ({self.run.total} stages, {len(self.waiting)} to run)")
        self.journal.save()
        self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        self.progress.stop()
        self.run.ended, self.run.left = _end(error, self.run.failed), None
        self.journal.log(f"end: {self.run.ended}, {self.run.done} of {self.run.total} stages are done")
        self.journal.save()

    def say(self, text: str) -> None:
        """Print a line, and add it to run.log."""
        self.progress.console.print(text, highlight=False, markup=False, soft_wrap=True)
        self.journal.log(text)

    def start(self, key: str) -> None:
        self.waiting.remove(key)
        self.started[key] = time.monotonic()
        label = self.labels[key]
        self.run.stages[key] = StageProgress(label, total=self.steps[key])
        self.tasks[key] = self.progress.add_task(escape(label), total=self.steps[key], note="starting", left="")
        self.journal.log(f"started: {label} ({key})")
        self.journal.save()

    def show(self, key: str, message: Message) -> None:
        """Show a message of a stage: its progress or an alarm."""
        if isinstance(message, str):
            self.progress.console.print(f"[bold yellow]alarm[/] {escape(self.labels[key])}: ", escape(message), highlight=False)
            self.journal.log(f"alarm: {self.labels[key]}: {message}")
            return
        stage = self.run.stages[key]
        stage.done, stage.total, stage.note = message
        self.estimate.running(key, stage.done / max(stage.total, 1), time.monotonic() - self.started[key])

    def end(self, key: str, failure: str | None = None) -> None:
        """Report the end of a stage; `failure` is the reason if it failed."""
        seconds, label = time.monotonic() - self.started.pop(key), self.labels[key]
        self.progress.remove_task(self.tasks.pop(key))
        del self.run.stages[key]
        if failure is None:
            self.run.done += 1
            self.estimate.finished(key, seconds)
            self.progress.update(self.all, completed=self.run.done)
            line = f"{self.run.done:3d}/{self.run.total} {label} {seconds:.1f} s"
            shown = f"[dim]{self.run.done:3d}/{self.run.total}[/] {escape(label)} [dim]{seconds:.1f} s[/]"
            self.progress.console.print(shown, highlight=False, soft_wrap=True)
            self.journal.log(line)
        else:
            self.run.failed[key] = failure
            self.estimate.dropped(key)
            self.progress.console.print(f"[bold red]failed[/] {escape(label)}: ", escape(failure), highlight=False, soft_wrap=True)
            self.journal.log(f"failed: {label} ({key}): {failure}")
        self._save()

    def tick(self) -> None:
        """Update times and bars, and write the record and the lines that are due. Call it several times a second."""
        now = time.monotonic()
        if self.journal.due:
            self._save()
        for key, stage in self.run.stages.items():
            left = f"{spoken(stage.left)} left" if stage.left is not None else ""
            self.progress.update(self.tasks[key], completed=stage.done, total=stage.total, note=escape(stage.note), left=left)
        whole = f"{spoken(self.run.left)} left" if self.run.left is not None else ""
        self.progress.update(self.all, left=whole)
        if now - self._minute >= _MINUTE:
            self._minute = now
            for line in self._lines(whole):
                self.journal.log(line)
                if not self.console.is_terminal:
                    self.console.print(f"{time.strftime('%H:%M:%S')} {line}", highlight=False, markup=False, soft_wrap=True)

    def _save(self) -> None:
        self.run.left = self.estimate.total_left(self.waiting)
        for key, stage in self.run.stages.items():
            stage.seconds, stage.left = round(time.monotonic() - self.started[key], 1), self.estimate.left(key)
        self.journal.save()

    def _lines(self, whole: str) -> Iterable[str]:
        for stage in self.run.stages.values():
            yield f"{stage.label}: {described(stage)}"
        yield f"all stages: {self.run.done}/{self.run.total}{f', {whole}' if whole else ''}"


def _end(error: BaseException | None, failed: object) -> State:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return "failed" if error or failed else "finished"
