"""The live table of a run in a terminal: a line for each finished arm, the running stages, the number of waiting stages, and the time left.

    board = Board(plan, labels, todo)              # what is known about each stage
    with LiveTable(console, board, run) as table:
        table.print("a line above the table")
        table.refresh()                            # a few times a second

The table has at most as many lines as the window. If it would have more, several finished or waiting arms share one line.
"""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, RenderResult
from rich.control import Control
from rich.live import Live
from rich.segment import ControlType
from rich.text import Text

from tadistill.metrics import training_numbers
from tadistill.plan.arms import Plan
from tadistill.plan.throughput import spoken
from tadistill.runner.local import LocalRun, StageProgress
from tadistill.text import counted, form

SHARED = "shared by arms"
"""Name of the group of stages that several arms need."""
_WIDE = 120  # columns; on a narrower screen a running stage has two lines
_NARROW = 72
_PAUSE = 0.1  # seconds
_SPARKS = "▁▂▃▄▅▆▇█"


class Board:
    """The states of a run's stages, grouped by arm (a path of models). One more group has the stages that several arms share."""

    def __init__(self, plan: Plan, labels: Mapping[str, str], todo: Iterable[str]):
        self.stages, self.labels = plan.stages, labels
        self.waiting = dict.fromkeys(todo)
        self.seconds: dict[str, float] = {}
        """Seconds that each finished stage took in this run, by key."""
        self.failed: set[str] = set()
        self.losses: dict[str, list[float]] = {}
        """Losses of each running stage so far, by key."""
        self.groups: dict[str, list[str]] = {SHARED: []} | {arm.name: [] for arm in plan.arms}
        for key, stage in plan.stages.items():
            name = next(iter(stage.arms)) if len(stage.arms) == 1 else SHARED
            self.groups.setdefault(name, []).append(key)
        self.groups = {name: keys for name, keys in self.groups.items() if keys}

    def start(self, key: str) -> None:
        del self.waiting[key]
        self.losses[key] = []

    def progress(self, key: str, text: str) -> None:
        """Read the loss from the newest progress text of a training, and store it. The texts of other stages are ignored."""
        if numbers := training_numbers(text):
            self.losses[key].append(numbers[0])

    def end(self, key: str, seconds: float | None) -> None:
        """Record the end of a stage. It has failed if `seconds` is None, and is finished otherwise."""
        del self.losses[key]
        if seconds is None:
            self.failed.add(key)
        else:
            self.seconds[key] = seconds

    def blocked(self) -> set[str]:
        """Return the keys of waiting stages that cannot run, because an earlier stage failed."""
        found = set(self.failed)
        for key, stage in self.stages.items():  # parents before children
            if found & set(stage.parents.values()):
                found.add(key)
        return found & set(self.waiting)


class LiveTable:
    """Draws a `Board` as a table below the printed lines. Use it as a context manager. The table is removed at the end."""

    def __init__(self, console: Console, board: Board, run: LocalRun):
        self.console, self.board, self.run = console, board, run
        self._live = Live(self, console=console, auto_refresh=False, transient=True, vertical_overflow="crop")
        self._at = 0.0
        self._drawn: tuple[int, list[int]] = (0, [])  # the window's width, and the width of each line, when the table was last drawn

    def __enter__(self) -> "LiveTable":
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._erase_folds()
        self._live.stop()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width, height = options.size
        lines = table_lines(self.board, self.run, width=width, height=height, plain=options.ascii_only or options.legacy_windows)
        self._drawn = width, [line.cell_len for line in lines]
        yield from lines

    def print(self, markup: str) -> None:
        """Print a text above the table."""
        self._erase_folds()
        self.console.print(markup, highlight=False)

    def refresh(self) -> None:
        """Draw the table again, at most ten times a second."""
        if time.monotonic() - self._at >= _PAUSE:
            self._erase_folds()
            self._live.refresh()
            self._at = time.monotonic()

    def _erase_folds(self) -> None:
        width, lines = self._drawn
        now = self.console.width
        if now != width:
            added = sum(max(0, math.ceil(line / now) - 1) for line in lines)
            for _ in range(added):
                self.console.control(Control((ControlType.ERASE_IN_LINE, 2), (ControlType.CURSOR_UP, 1)))
            self._drawn = now, []


# --- the lines of the table -------------------------------------------------------------------------------------------------


def table_lines(board: Board, run: LocalRun, *, width: int, height: int, plain: bool = False) -> list[Text]:
    """Return the table's lines for a window of `width` columns and `height` lines. With `plain`, all characters are ASCII."""
    most = max(1, height - 1)
    lines: list[Text] = []
    for folds in range(4):
        view = _View(board, run, width, plain, folds)
        lines = [*view.groups(), view.bottom()]
        if len(lines) <= most:
            break
    if len(lines) > most:
        lines = [*lines[: most - 1], lines[-1]]
    for line in lines:
        line.no_wrap = True
        line.truncate(width - 1, overflow="ellipsis")  # after a full line, some terminals begin a new line
    return lines


class _View:
    def __init__(self, board: Board, run: LocalRun, width: int, plain: bool, folds: int):
        self.board, self.run, self.width, self.plain = board, run, width, plain
        self.fold_done, self.fold_idle, self.short = folds > 0, folds > 1, folds > 2
        self.blocked, self.tick = board.blocked(), (self._mark("✓", "+"), "green")
        self.pad = min(max(map(cell_len, board.groups)), width // 3)

    def groups(self) -> list[Text]:
        done: dict[str, list[str]] = {}
        idle: dict[str, list[str]] = {}
        shown: list[Text] = []
        for name, keys in self.board.groups.items():
            running = [key for key in keys if key in self.run.stages]
            left = [key for key in keys if key in self.board.waiting]
            failed = [key for key in keys if key in self.board.failed]
            if not (running or left or failed):
                done[name] = keys
            elif not running and not failed and (self.fold_idle or len(left) == len(keys)):
                idle[name] = left
            else:
                shown.append(self._open(name, keys, running, failed))
                for key in running:
                    shown += self._running(key)
        waiting = (
            [Text(f"  {counted(sum(map(len, idle.values())), 'stage waits', 'stages wait')}: {', '.join(idle)}", style="dim")]
            if idle
            else []
        )
        return [*self._done(done), *shown, *waiting]

    def _line(self, mark: str, style: str, name: str, text: str) -> Text:
        return Text.assemble((mark, style), f" {set_cell_size(name, self.pad)}  ", text)

    def _open(self, name: str, keys: Sequence[str], running: Sequence[str], failed: Sequence[str]) -> Text:
        stages = self.board.stages
        done = [key for key in keys if key not in self.board.waiting and key not in (*running, *failed)]
        left = {stages[key].seed for key in keys if key not in done}
        seeds = [str(seed) for seed in dict.fromkeys(stages[key].seed for key in done) if seed not in left]
        finished = f"{form(len(seeds), 'seed', 'seeds')} {', '.join(seeds)} done" if seeds else ""
        parts = [f"{len(done)} of {counted(len(keys), 'stage')}", finished]
        blocked = sum(key in self.blocked for key in keys)
        parts += [f"{len(failed)} failed" if failed else "", f"{blocked} cannot run" if blocked else ""]
        mark, style = (self._mark("✗", "!"), "red") if failed else (self._mark("●", ">"), "cyan")
        return self._line(mark if running or failed else " ", style, name, ", ".join(filter(None, parts)))

    def _done(self, groups: Mapping[str, Sequence[str]]) -> list[Text]:
        took = {name: sum(self.board.seconds.get(key, 0.0) for key in keys) for name, keys in groups.items()}
        old, new = ([name for name in groups if bool(took[name]) is now] for now in (False, True))
        lines = [self._folded("from the store", {name: groups[name] for name in old})] if old else []
        if self.fold_done and len(new) > 1:
            return [*lines, self._folded(f"done, {spoken(sum(took.values()))}", {name: groups[name] for name in new})]
        return [*lines, *(self._line(*self.tick, name, f"{counted(len(groups[name]), 'stage')}, {spoken(took[name])}") for name in new)]

    def _folded(self, text: str, groups: Mapping[str, Sequence[str]]) -> Text:
        return Text.assemble(self.tick, f" {counted(sum(map(len, groups.values())), 'stage')} {text}: {', '.join(groups)}")

    def _running(self, key: str) -> list[Text]:
        head, progress, losses = Text(self._head(key)), self.run.stages[key], self.board.losses[key]
        if self.width < _WIDE and not self.short:
            return [head, Text.assemble("      ", self._facts(progress, losses, self.width - 7))]
        room = min(max(cell_len(self._head(each)) for each in self.run.stages), self.width // 2)
        head.truncate(room, overflow="ellipsis", pad=True)
        return [Text.assemble(head, "  ", self._facts(progress, losses, self.width - room - 3))]

    def _head(self, key: str) -> str:
        label, seed = self.board.labels[key], f"seed {self.board.stages[key].seed}"
        return f"    {seed}  {label.replace(f', {seed}', '', 1)}" if f", {seed}" in label else f"    {label}"

    def _facts(self, stage: StageProgress, losses: Sequence[float], room: int) -> Text:
        numbers, known = training_numbers(stage.note), stage.done or stage.total > 1
        share = stage.done / max(stage.total, 1)
        bar_width, curve_width = (16, 12) if self.width >= _WIDE else (12, 8) if self.width >= _NARROW else (8, 6)
        count = f" {stage.done:{len(str(stage.total))}d}/{stage.total}"
        bar = Text.assemble(self._bar(share, bar_width), count) if known else Text()
        spark = "" if self.plain else sparkline(losses, curve_width)
        left = f", {spoken(stage.left)} left" if stage.left is not None else ""
        parts = [
            (0, bar),
            (1, Text(f"loss {numbers[0]:.3f}" if numbers else stage.note)),
            (3, Text(spark, style="cyan")),
            (4, Text(f"{numbers[1]:,.0f} tokens/s" if numbers else "")),
            (2, Text(f"{spoken(stage.seconds)}{left}", style="dim")),
        ]
        return _fitting(parts, room)

    def bottom(self) -> Text:
        run, waiting = self.run, len(self.board.waiting) - len(self.blocked)
        left = f", about {spoken(run.left)} left" if run.left is not None else ""
        waits = [f"{count} {what}" for count, what in ((waiting, "wait"), (len(self.blocked), "cannot run")) if count]
        bar = self._bar(run.done / max(run.total, 1), 10)
        parts = [
            (0, Text.assemble((f"{run.done}/{counted(run.total, 'stage')}", "bold"), *([" ", bar] if self.width >= 40 else []))),
            (1, Text(f"{spoken(run.seconds)}{left}", style="bold")),
            (2, Text(", ".join(waits))),
        ]
        return _fitting(parts, self.width - 1)

    def _bar(self, share: float, width: int) -> Text:
        halves = round(min(share, 1.0) * width * 2)
        if self.plain:
            return Text("#" * (halves // 2) + "-" * (width - halves // 2))
        full = "━" * (halves // 2) + "╸" * (halves % 2)
        return Text.assemble((full, "cyan"), ("─" * (width - len(full)), "dim"))

    def _mark(self, sign: str, plain: str) -> str:
        return plain if self.plain else sign


def _fitting(parts: Sequence[tuple[int, Text]], room: int) -> Text:
    kept, free = set(), room
    for rank, text in sorted(parts, key=lambda part: part[0]):
        if text.cell_len and text.cell_len + 2 * bool(kept) <= free:
            kept.add(rank)
            free -= text.cell_len + 2 * (len(kept) > 1)
    return Text("  ").join(text for rank, text in parts if rank in kept)


def sparkline(values: Sequence[float], width: int) -> str:
    """Draw the values as a curve of at most `width` characters. Each character shows the mean of some neighbouring values."""
    count = min(len(values), width)
    if count < 2:
        return ""
    edges = [i * len(values) // count for i in range(count + 1)]
    means = [sum(values[start:end]) / (end - start) for start, end in pairwise(edges)]
    low, high = min(means), max(means)
    return "".join(_SPARKS[round((mean - low) / (high - low) * 7) if high > low else 0] for mean in means)
