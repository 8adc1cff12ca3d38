"""The output of `tadistill plan`: tables of stages (FLOPs, time, memory) and of arms (paths of models, total FLOPs), and `plan.notes`."""

from collections.abc import Sequence
from typing import NamedTuple

from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table

from tadistill.config import Recipe
from tadistill.config.arm import direct_arm, marked, routed
from tadistill.config.recipe_files import placed
from tadistill.data import hub
from tadistill.errors import Gathering, ModelError
from tadistill.models import sources
from tadistill.plan import throughput
from tadistill.plan.arms import Plan, PlannedArm
from tadistill.plan.graph import Stage, labels_of, table_lines, total_flops, with_ancestors
from tadistill.plan.notes import ASKED, counts_asked, plan_notes
from tadistill.plan.paths import lossy_steps
from tadistill.plan.task import check_sources, process_bytes, uses_vllm
from tadistill.plan.throughput import Speeds
from tadistill.store import Store
from tadistill.terminal import Terminal
from tadistill.text import counted

_LARGEST = 3  # number of stages whose parts are shown
_WIDE = 130  # columns; a narrower screen shows no `parents`, and short keys and labels


def preview(plan: Plan, store: Store, width: int, accelerator: str | None = None) -> Group:
    """Return all tables and the notes below them. Times and memory are for this machine.

    Args:
        width: the screen's number of columns. A narrow screen gets shorter labels.
        accelerator: the name of the machine's GPUs, if it is known.
    """
    if not plan.recipe.arms:
        name = escape(plan.recipe.study)
        return Group(f"{name} has no arms to plan. Its section `search` is for `tadistill search` and `tadistill advise`.")
    jobs = plan.recipe.runtime.jobs or throughput.gpus() or throughput.cores()
    speeds = throughput.load_throughput(store, plan.stages, threads(plan), accelerator)
    parts = [_stages(plan, store, speeds, width), "", _arms(plan, width), *_base(plan), ""]
    if any(stage.flops for stage in plan.stages.values()):
        parts += [_largest(plan, width), ""]
    return Group(*parts, *plan_notes(plan, store, speeds, jobs))


def print_plan(plan: Plan, store: Store, console: Console, accelerator: str | None = None) -> None:
    """Print what `preview` returns."""
    console.print(preview(plan, store, console.width, accelerator))


@placed
def fetch_descriptions(recipe: Recipe, console: Terminal) -> None:
    """Download the missing config.json of each hub model, if the Hub can be reached. A plan needs no other file of a model.

    Raises:
        DataError, ModelError: a model or data set does not exist. A hub id is such a model if the Hub has none of this name, and if it can
            be meant as a path. If the Hub cannot be reached, a note says so.
    """
    found = Gathering()
    with found.about():
        check_sources(recipe)
    for name, model in recipe.models.items():
        with found.about(f"models.{name}"):
            if not model.load or sources.parse_source(model.load).kind not in ("hub", "adapter"):
                continue
            if sources.description_file(model.load, model.revision) is not None:
                continue
            if not hub.reachable():
                if other := hub.as_path(model.load):
                    console.say(f"models.{name}: model `{model.load}` is not on this disk, and the Hub cannot be reached{other}")
                continue
            try:
                sources.description_file(model.load, model.revision, download=True)
            except ModelError as error:
                if hub.has_none(error) and hub.as_path(model.load):
                    raise
                console.say(f"models.{name}: {error}")
    found.finish()


def threads(plan: Plan) -> int:
    """Return the number of CPU threads per stage: the number of cores divided by the number of parallel jobs."""
    jobs = plan.recipe.runtime.jobs or throughput.cores()
    return max(1, throughput.cores() // jobs)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, min_width=min(len(title) + 2, 60))
    for column in columns:
        number = column in _NUMBERS
        table.add_column(column, justify="right" if number else "left", no_wrap=True, overflow="ellipsis", min_width=8 if number else None)
    return table


_NAME = 24
_ARM_COLUMNS = ("arm", "path", "FLOPs", "x direct", "assistants", ASKED, "compute")
_NUMBERS = (ASKED, "FLOPs", "time", "memory", "x direct", "assistants", "share", "released")


def _stages(plan: Plan, store: Store, speeds: Speeds, width: int) -> Table:
    wide = width >= _WIDE
    columns = ["key", "", "FLOPs", "time", "memory", "stage", *(["parents"] if wide else [])]
    table = _table(f"{plan.recipe.study}: {counted(len(plan.stages), 'stage')}", *columns)
    table.columns[0].min_width, table.columns[1].min_width = 16 if wide else 8, 6
    table.columns[5].no_wrap, table.columns[5].overflow = False, "fold"  # a cut label could lose the method or the seed
    labels = labels_of(plan.stages, short=not wide)
    by_label = {labels[key]: stage for key, stage in plan.stages.items()}
    states = {label: "done" if store.finished(stage.key) else "to run" for label, stage in by_label.items()}
    for text, members in table_lines(states):
        stages, done = [by_label[label] for label in members], states[members[0]] == "done"
        first, alone = stages[0], len(stages) == 1
        key = (first.key if wide else first.key[:8]) if alone else ""
        state = "[green]done[/]" if done else "[yellow]to run[/]"
        needs = process_bytes(plan, first, cuda=throughput.gpus() > 0)
        share = f" + {plan.recipe.runtime.vllm.memory:.0%}" if uses_vllm(first.spec) else ""
        memory = (f"{needs / 1e9:.2g} GB" if needs else "–") + share
        seconds = [store.manifest(s.key).get("seconds") if done else throughput.seconds(s.cost, speeds) for s in stages]
        parents = " ".join(key[:6] for key in dict.fromkeys(first.parents.values())) if alone else ""
        cells = [key, state, _flops_of(stages), _time(seconds), memory, escape(text)]
        table.add_row(*cells, *([parents] if wide else []))
    if table.row_count < len(states):
        table.caption = "A line of several seeds has the sums of FLOPs and time. With one seed, such as `seeds=[1]`, each stage has a line."
        table.caption_justify = "left"
    return table


def _flops_of(stages: Sequence[Stage]) -> str:
    # the sum over the seeds of a stage
    first = stages[0]
    if first.spec.measures:
        return "–"
    if first.cost is not None and first.cost.elsewhere:
        return "?"
    return _flops(None if first.flops is None else sum(stage.flops or 0.0 for stage in stages))


def _time(seconds: Sequence[float | None]) -> str:
    known = [each for each in seconds if each is not None]
    return throughput.spoken(sum(known)) if len(known) == len(seconds) else "–"


def _arms(plan: Plan, width: int) -> Table:
    cells = {arm.name: _cells(plan, arm) for arm in plan.arms}
    columns = [name for name in _ARM_COLUMNS if name in ("arm", "path", "FLOPs") or any(of[name] not in ("", "–") for of in cells.values())]
    table = _table("total training of each arm, for one seed", *columns)
    for name, column in zip(columns, table.columns, strict=True):
        if name in ("arm", "path"):
            column.no_wrap, column.overflow = False, "fold"
    table.columns[0].width = min(_NAME, max((len(arm.name) for arm in plan.arms), default=len("arm")))  # fold the path, not the name
    for of in cells.values():
        of["compute"] = of["compute"] if width >= _WIDE else of["compute"].replace(" ", "\n")  # no line ends inside a name
        table.add_row(*(of[name] for name in columns))
    return table


def _cells(plan: Plan, arm: PlannedArm) -> dict[str, str]:
    # the cell of an arm in each of the columns _ARM_COLUMNS; a column with nothing in it is not shown
    direct = _direct(plan, arm)
    path = marked(arm.arm.text, lossy_steps(plan.tokens, arm.arm.path))
    if arm.arm.learners:  # without a teacher, these settings have no effect
        path += ", context" if arm.method.context else ""
        path += f", EMA {arm.method.ema:g}" if arm.method.ema is not None else ""
    path += f", {arm.arm.controls.words}" if arm.arm.controls else ""
    return {
        "arm": escape(arm.name),
        "path": escape(path),
        "FLOPs": _flops(arm.flops),
        "x direct": f"{arm.flops / direct.flops:.2f}" if arm.flops and direct and direct.flops else "–",
        "assistants": _assistants(plan, arm),
        ASKED: "–" if arm.asked is None or not counts_asked(plan) else f"{arm.asked:.2e}",
        "compute": "\n".join(filter(None, (arm.arm.compute, arm.arm.teacher_budget and f"teacher {arm.arm.teacher_budget}"))),
    }


def _base(plan: Plan) -> list[str]:
    # the sentence that names the arms whose `x direct` is 1
    found = [*dict.fromkeys(direct.name for arm in plan.arms if arm.flops and (direct := _direct(plan, arm)) and direct.flops)]
    if len(found) < 2:
        return [f"x direct: FLOPs relative to arm {escape(found[0])}."] if found else []
    return [f"x direct: FLOPs relative to the direct arm with the same student and method, one of {escape(', '.join(found))}."]


def _direct(plan: Plan, arm: PlannedArm) -> "_Candidate | None":
    # the arm from the original teacher directly to the same student, with the same method and its own number of updates
    if not arm.arm.learners or plan.teacher is None or len(plan.arms) < 2:
        return None
    return direct_arm(map(_candidate, plan.arms), plan.teacher, arm.arm.last[-1], arm.taught_with)


class _Candidate(NamedTuple):
    name: str
    path: tuple[str, ...]
    is_plain: bool
    compute: str | None
    method: object
    flops: float | None


def _candidate(arm: PlannedArm) -> _Candidate:
    context = any(phase.method.context for phase in arm.phases)
    is_plain = len(arm.arm.path) == 1 and not (arm.arm.init or context or arm.arm.control or routed(arm.arm.path))
    return _Candidate(arm.name, arm.arm.last, is_plain, arm.arm.compute, arm.taught_with, arm.flops)


def _assistants(plan: Plan, arm: PlannedArm) -> str:
    key = next(iter(arm.final.values()))
    middle = set(arm.arm.learners) - {arm.arm.last[-1]}
    if not middle or key is None:
        return "–"
    above = [plan.stages[k] for k in with_ancestors(plan.stages, [key])]
    return _flops(total_flops(stage for stage in above if stage.model in middle))


def _largest(plan: Plan, width: int) -> Table:
    table = _table("parts of the most expensive kinds of stage", "stage", "part", "FLOPs", "share")
    kinds: dict[str, Stage] = {}
    for stage in sorted(plan.stages.values(), key=lambda s: -(s.flops or 0.0)):
        if stage.cost:
            kinds.setdefault(stage.cost.kind, stage)
    table.columns[0].no_wrap, table.columns[0].overflow = False, "fold"
    largest = list(kinds.values())[:_LARGEST]
    labels = labels_of(plan.stages, short=width < _WIDE)
    for stage in largest:
        assert stage.cost is not None
        label = escape(labels[stage.key])
        for name, part in sorted(stage.cost.parts.items(), key=lambda item: -item[1].flops):
            table.add_row(label, name, _flops(part.flops), f"{part.flops / stage.cost.total:.0%}")
            label = ""
        if stage.cost.published:
            share = f"{stage.cost.published / stage.cost.total:.0%}"
            table.add_row("", "[dim]MiniLLM's released code[/]", _flops(stage.cost.published), share)
    return table


def _flops(value: float | None) -> str:
    return "?" if value is None else f"{value:.2e}"
