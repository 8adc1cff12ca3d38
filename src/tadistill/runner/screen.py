"""The display of a run: a live table in a terminal, else lines of text or JSON events.

Lines of text are printed when a stage ends and, once a minute, for each running stage. They are also written to run.log, even if there is
a table. The run's record, which `tadistill status` reads, is written every few seconds.
"""

import contextlib
import time
from collections.abc import Iterable, Sequence
from typing import Any

from rich.markup import escape

from tadistill.metrics import training_numbers
from tadistill.plan.arms import Plan
from tadistill.plan.graph import labels_of
from tadistill.plan.throughput import spoken
from tadistill.runner.live_table import Board, LiveTable
from tadistill.runner.local import Journal, StageProgress, described
from tadistill.runner.processes import Message
from tadistill.runner.timing import Estimate, workloads
from tadistill.store import Store
from tadistill.terminal import MINUTE, Terminal
from tadistill.text import counted


class Screen:
    """The output of one run. Use it as a context manager. At the end of the block, it prints and logs how the run ended."""

    def __init__(self, plan: Plan, store: Store, terminal: Terminal, *, todo: Sequence[str], jobs: int, needs: Iterable[str] = ()):
        self.plan, self.store, self.terminal, self.jobs = plan, store, terminal, jobs
        self.labels = labels_of(plan.stages)
        done = len(plan.stages) - len(todo)
        study = store.root.parent / plan.recipe.study
        self.journal = Journal(study, done=done, total=len(plan.stages), complain=self.say, needs=dict.fromkeys([*needs, *plan.stages]))
        self.run = self.journal.run
        self.estimate = Estimate(plan.stages, workloads(plan), jobs)
        self.board = Board(plan, self.labels, todo)
        normal = self.terminal.detail != "problems" and not self.terminal.events
        self.live = LiveTable(self.terminal, self.board, self.run) if normal and self.terminal.is_interactive else None
        self.lines = normal and self.live is None
        self.detailed = self.terminal.detail == "everything" and normal
        self.started: dict[str, float] = {}
        self.saved: dict[str, int] = {}
        """For each stage that was started, the update from which it continues, by key. The value is 0 if no state was saved, and for stages
        that train nothing."""
        self.resumed: set[str] = set()
        """Keys of running stages that continue after finished parts, and have not yet reported how much of their work these parts are."""
        self.reminded = False
        self._minute = time.monotonic()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Screen":
        run = self.run
        self.journal.log(f"start: {run.command} ({counted(run.total, 'stage')}, {len(self.board.waiting)} to run)")
        self.journal.save()
        facts = {"study": self.plan.recipe.study, "command": run.command, "stages": run.total, "todo": len(self.board.waiting)}
        self.terminal.event("study_start", **facts, jobs=self.jobs)
        if self.live:
            self._stack.enter_context(self.live)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        self._stack.close()
        run = self.run
        run.ended = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed" if error or run.failed else "finished"
        run.left = None
        self.journal.log(f"end: {run.ended}, {run.done} of {counted(run.total, 'stage is', 'stages are')} done")
        self.journal.save()
        self.terminal.event("study_end", state=run.ended, done=run.done, stages=run.total, seconds=run.seconds)
        if self.live or self.lines:
            self.terminal.note(
                f"{run.done} of {counted(run.total, 'stage is', 'stages are')} done ({run.ended} after {spoken(run.seconds)})"
            )

    def say(self, text: str) -> None:
        """Print a line, and add it to run.log."""
        if self.terminal.events:
            self.terminal.event("note", text=text)
        else:
            self._print(escape(text))
        self.journal.log(text)

    def remind(self) -> None:
        """Make the next `tick` print that the stages are already saving their state. A signal handler may call this."""
        self.reminded = True

    def start(self, key: str) -> None:
        self.started[key] = time.monotonic()
        label, steps = self.labels[key], self.plan.stages[key].steps
        where, saved = self.store.continues(key, steps), self.store.saved_update(key) or 0
        self.saved[key] = saved
        self.run.stages[key] = StageProgress(label, saved, steps or 1, f"continues {where}" if where else "starting")
        self.estimate.begins(key, saved / (steps or 1))
        if where and not steps:
            self.resumed.add(key)
        self.board.start(key)
        if self.live:
            self.live.refresh()  # the first process may take seconds to start
        self._event("start", key, continues_at=saved or None)
        if where and self.lines:
            self._print(f"[cyan]continues[/] {escape(label)} {where}")
        if self.detailed:
            self._print(f"[dim]started[/] {escape(label)} [dim]({key}, {escape(str(self.store.folder(key)))})[/]")
        self.journal.log(f"continues: {label} ({key}) {where}" if where else f"started: {label} ({key})")
        self.journal.save()

    def show(self, key: str, message: Message) -> None:
        """Show a message of a stage: its progress or an alarm."""
        if isinstance(message, str):
            self._event("alarm", key, text=message)
            self._print(f"[bold yellow]alarm[/] {escape(self.labels[key])}: {escape(message)}")
            self.journal.log(f"alarm: {self.labels[key]}: {message}")
            return
        stage = self.run.stages[key]
        done, stage.total, stage.note = message
        stage.done = done or self.saved[key]  # until a stage has read its saved state, it reports 0
        if done and key in self.resumed:
            self.resumed.remove(key)
            self.estimate.begins(key, done / max(stage.total, 1))
        self.board.progress(key, stage.note)
        self.estimate.running(key, stage.done / max(stage.total, 1), time.monotonic() - self.started[key])

    def end(self, key: str, failure: str | None = None) -> None:
        """Report the end of a stage. If it failed, `failure` is the reason."""
        seconds, label = time.monotonic() - self.started.pop(key), self.labels[key]
        del self.run.stages[key]
        self.board.end(key, seconds if failure is None else None)
        if failure is None:
            self.run.done += 1
            self.estimate.finished(key, seconds)
            self._event("end", key, seconds=round(seconds, 1), done=self.run.done, stages=self.run.total)
            if self.lines or self.detailed:
                self._print(f"[dim]{self.run.done:3d}/{self.run.total}[/] {escape(label)} [dim]{seconds:.1f} s[/]")
            self.journal.log(f"{self.run.done:3d}/{self.run.total} {label} {seconds:.1f} s")
        else:
            self.run.failed[key] = failure
            self.estimate.dropped(key)
            self._event("failed", key, seconds=round(seconds, 1), reason=failure)
            self._print(f"[bold red]failed[/] {escape(label)}: {escape(failure)}")
            self.journal.log(f"failed: {label} ({key}): {failure}")
        self._save()

    def tick(self) -> None:
        """Update the table, and write the lines and the record that are due. Call this several times a second."""
        now = time.monotonic()
        if self.reminded:
            self.reminded = False
            self.say("the run is already stopping: the running stages save their state")
        if self.journal.due:
            self._save()
        if self.live:
            self._measure(now)
            self.live.refresh()
        if now - self._minute >= MINUTE:
            self._minute = now
            self._measure(now)
            for line in self._lines():
                self.journal.log(line)
                if self.lines:
                    self._print(escape(f"{time.strftime('%H:%M:%S')} {line}"))
            for key, stage in self.run.stages.items():
                facts = {"done": stage.done, "total": stage.total, "text": stage.note, "seconds": stage.seconds, "left": stage.left}
                numbers = dict(zip(("loss", "tokens_per_second"), training_numbers(stage.note) or (), strict=False))
                self._event("progress", key, **facts, **numbers, study_done=self.run.done, study_left=self.run.left)

    def _measure(self, now: float) -> None:
        self.run.seconds = self.journal.seconds
        for key, stage in self.run.stages.items():
            stage.seconds = round(now - self.started[key], 1)

    def _save(self) -> None:
        self.run.left = self.estimate.total_left(self.board.waiting)
        self._measure(time.monotonic())
        for key, stage in self.run.stages.items():
            stage.left = self.estimate.left(key)
        self.journal.save()

    def _lines(self) -> Iterable[str]:
        for stage in self.run.stages.values():
            yield f"{stage.label}: {described(stage)}"
        whole = f", {spoken(self.run.left)} left" if self.run.left is not None else ""
        yield f"all stages: {self.run.done}/{self.run.total}{whole}"

    def _print(self, markup: str) -> None:
        if self.terminal.events:
            return
        if self.live:
            self.live.print(markup)
        else:
            self.terminal.print(markup, highlight=False, soft_wrap=True)

    def _event(self, name: str, key: str, **facts: Any) -> None:
        stage = self.plan.stages[key]
        about = {"key": key, "label": self.labels[key], "kind": stage.kind, "arms": sorted(stage.arms), "seed": stage.seed}
        self.terminal.event(name, **about, **facts)
