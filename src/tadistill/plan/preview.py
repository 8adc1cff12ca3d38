"""The output of `tadistill plan`: tables of stages (FLOPs, time, memory) and of arms (paths of models, total FLOPs), and notes."""

from collections.abc import Iterable
from itertools import product
from typing import NamedTuple

from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table

from tadistill.config import Recipe
from tadistill.config.arm import direct_arm, marked, routed
from tadistill.config.data import DataRef, drawn_text
from tadistill.data import hub
from tadistill.errors import ModelError
from tadistill.models import sources
from tadistill.plan import throughput
from tadistill.plan.arms import Plan, PlannedArm
from tadistill.plan.contexts import contexts_of
from tadistill.plan.controls import fair_notes
from tadistill.plan.costs import Ledger, passes
from tadistill.plan.graph import Stage, distinct_labels, with_ancestors
from tadistill.plan.inexact import approximations
from tadistill.plan.kinds import SignalSpec
from tadistill.plan.paths import given_teachers, lossy_steps, undefined_notes
from tadistill.plan.phases import phases_text
from tadistill.plan.remote import asked_notes, served_notes
from tadistill.plan.sampling_stages import engine_notes
from tadistill.plan.task import layout, process_bytes
from tadistill.plan.throughput import Speeds
from tadistill.store import Store

_LARGEST = 3  # number of stages whose parts are shown
_OFF = 0.1  # an arm gets a note if its FLOPs differ from its `compute` by more than this share
_WIDE = 130  # columns; a narrower screen shows no `parents`, and short keys and labels


def preview(plan: Plan, store: Store, speeds: Speeds, jobs: int, width: int = 200) -> Group:
    """Return all tables and the notes below them. `width` is the screen's number of columns; a narrow screen gets shorter labels."""
    parts = [_stages(plan, store, speeds, width), "", _arms(plan), ""]
    if any(stage.flops for stage in plan.stages.values()):
        parts += [_largest(plan, width), ""]
    return Group(*parts, *_notes(plan, store, speeds, jobs))


def print_plan(plan: Plan, store: Store, console: Console, accelerator: str | None = None) -> None:
    """Print the tables and the notes. Times and memory are for this machine. `accelerator` is the name of its GPUs, if it is known."""
    jobs = plan.recipe.runtime.jobs or throughput.gpus() or throughput.cores()
    speeds = throughput.load_throughput(store, plan.stages, threads(plan), accelerator)
    console.print(preview(plan, store, speeds, jobs, console.width))


def fetch_descriptions(recipe: Recipe, console: Console) -> None:
    """Download the missing config.json of each hub model, if the Hub can be reached. A plan needs no other file of a model."""
    for name, model in recipe.models.items():
        if not model.load or sources.parse_source(model.load).kind not in ("hub", "adapter"):
            continue
        if sources.description_file(model.load, model.revision) is None and hub.reachable():
            try:
                sources.description_file(model.load, model.revision, download=True)
            except ModelError as error:
                console.print(f"models.{name}: {error}", highlight=False, markup=False, soft_wrap=True)


def threads(plan: Plan) -> int:
    """Return the number of CPU threads per stage: the number of cores divided by the number of parallel jobs."""
    jobs = plan.recipe.runtime.jobs or throughput.cores()
    return max(1, throughput.cores() // jobs)


def off_budget(plan: Plan) -> Iterable[str]:
    """Yield a sentence for each arm whose FLOPs differ clearly from its `compute`. The reason is that a training has a whole number of
    rounds, each of which samples text and makes several updates."""
    arms = {arm.name: arm for arm in plan.arms}
    for arm in plan.arms:
        if arm.arm.like is None:
            continue
        times, other = arm.arm.like[0] or 1.0, arms[arm.arm.like[1]]
        given = {plan.teacher, *given_teachers(plan.recipe, arm.arm, other.arm)}
        own, theirs = _without(plan, arm, given), _without(plan, other, given)
        if own and theirs and abs(own / (times * theirs) - 1) > _OFF:
            ratio = own / (times * theirs)
            yield (
                f"arms.{arm.name} has `compute: {arm.arm.compute}`, but it needs {ratio:.2g} times these FLOPs, because its updates "
                "come in whole rounds; choose smaller rounds (`sampler.rollouts`, `inner_epochs`) or a larger budget"
            )


def off_teacher_budget(plan: Plan) -> Iterable[str]:
    """Yield a sentence for each arm for which the teacher writes or scores clearly more or fewer tokens than `teacher_budget` sets."""
    arms = {arm.name: arm for arm in plan.arms}
    for arm in (arm for arm in plan.arms if arm.arm.asks_like):
        asked, budget = arm.asked, arms[arm.arm.asks_like or ""].asked
        if asked and budget and abs(asked / budget - 1) > _OFF:
            yield (
                f"arms.{arm.name} has `teacher_budget: {arm.arm.teacher_budget}`, but the teacher writes or scores "
                f"{asked / budget:.2g} times as many tokens, because the arm's updates come in whole rounds; choose smaller "
                "rounds (`sampler.rollouts`, `inner_epochs`)"
            )


def _without(plan: Plan, arm: PlannedArm, teachers: set[str | None]) -> float | None:
    final = next(iter(arm.final.values()))
    above = with_ancestors(plan.stages, [final] if final else [], without="like")
    stages = [plan.stages[key] for key in above]
    flops = [stage.flops for stage in stages if not (stage.trains and stage.model in teachers)]  # the answers of these teachers still count
    return None if None in flops else sum(f for f in flops if f is not None)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None)
    for column in columns:
        number = column in _NUMBERS
        table.add_column(column, justify="right" if number else "left", no_wrap=True, overflow="ellipsis", min_width=8 if number else None)
    return table


_NAME = 24
_ASKED = "asked"
_DIRECT = "x direct: FLOPs relative to the direct arm with the same method. The report may use another direct arm, named in its table Cost."
_NUMBERS = (_ASKED, "FLOPs", "time", "memory", "x direct", "assistants", "share", "released")


def _stages(plan: Plan, store: Store, speeds: Speeds, width: int) -> Table:
    wide = width >= _WIDE
    columns = ["key", "", "FLOPs", "time", "memory", "stage", *(["parents"] if wide else [])]
    table = _table(f"{plan.recipe.study}: {len(plan.stages)} stages", *columns)
    table.columns[0].min_width, table.columns[1].min_width = 16 if wide else 8, 4
    table.columns[5].no_wrap, table.columns[5].overflow = False, "fold"  # a cut label could lose the method or the seed
    labels = distinct_labels(((s.key, s.label, s.arms) for s in plan.stages.values()), short=not wide)
    for stage in plan.stages.values():
        done = store.finished(stage.key)
        parents = " ".join(key[:6] for key in dict.fromkeys(stage.parents.values()))
        unknown = stage.cost is not None and stage.cost.elsewhere
        flops = "–" if stage.measures else "?" if unknown else _flops(stage.flops)
        state = "[green]hit[/]" if done else "[yellow]miss[/]"
        needs = process_bytes(plan, stage, cuda=throughput.gpus() > 0)
        memory = f"{needs / 1e9:.2g} GB" if needs else "–"
        key = stage.key if wide else stage.key[:8]
        takes = throughput.seconds(stage.cost, speeds)
        cells = [key, state, flops, "–" if takes is None else throughput.spoken(takes), memory, escape(labels[stage.key])]
        table.add_row(*cells, *([parents] if wide else []))
    return table


def _arms(plan: Plan) -> Table:
    asks = _asks(plan)
    tokens = [_ASKED] if asks else []
    table = _table("total training of each arm, for one seed", "arm", "path", "FLOPs", "x direct", "assistants", *tokens, "compute")
    table.caption, table.caption_justify = _DIRECT, "left"
    for column in table.columns[:2]:
        column.no_wrap, column.overflow = False, "fold"
    table.columns[0].min_width = min(_NAME, max((len(arm.name) for arm in plan.arms), default=1))  # fold the path, not the name
    for arm in plan.arms:
        direct = _direct(plan, arm)
        ratio = f"{arm.flops / direct:.2f}" if arm.flops and direct else "–"
        path = marked(arm.arm.text, lossy_steps(plan.tokens, arm.arm.path))
        if arm.arm.learners:  # without a teacher, these settings have no effect
            path += ", context" if arm.method.context else ""
            path += f", EMA {arm.method.ema:g}" if arm.method.ema is not None else ""
        path += f", {arm.arm.controls.words}" if arm.arm.controls else ""
        asked = ["–" if arm.asked is None else f"{arm.asked:.2e}"] if asks else []
        rule = "\n".join(filter(None, (arm.arm.compute, arm.arm.teacher_budget and f"teacher {arm.arm.teacher_budget}")))
        table.add_row(arm.name, path, _flops(arm.flops), ratio, _assistants(plan, arm), *asked, rule)
    return table


def _asks(plan: Plan) -> bool:
    return any(arm.arm.teacher_budget for arm in plan.arms) or len(plan.tokens.families) > 1


def _direct(plan: Plan, arm: PlannedArm) -> float | None:
    # FLOPs of the arm from the original teacher directly to the same student, with the same method and its own number of updates
    if not arm.arm.learners or plan.teacher is None:
        return None
    found = direct_arm(map(_candidate, plan.arms), plan.teacher, arm.arm.last[-1], arm.taught_with)
    return found.flops if found else None


class _Candidate(NamedTuple):
    path: tuple[str, ...]
    is_plain: bool
    compute: str | None
    method: object
    flops: float | None


def _candidate(arm: PlannedArm) -> _Candidate:
    context = any(phase.method.context for phase in arm.phases)
    is_plain = len(arm.arm.path) == 1 and not (arm.arm.init or context or arm.arm.control or routed(arm.arm.path))
    return _Candidate(arm.arm.last, is_plain, arm.arm.compute, arm.taught_with, arm.flops)


def _assistants(plan: Plan, arm: PlannedArm) -> str:
    key = next(iter(arm.final.values()))
    middle = set(arm.arm.learners) - {arm.arm.last[-1]}
    if not middle or key is None:
        return "–"
    flops = [plan.stages[k].flops for k in with_ancestors(plan.stages, [key]) if plan.stages[k].model in middle]
    return "?" if None in flops else _flops(sum(f for f in flops if f is not None))


def _largest(plan: Plan, width: int) -> Table:
    table = _table("parts of the most expensive kinds of stage", "stage", "part", "FLOPs", "share")
    kinds: dict[str, Stage] = {}
    for stage in sorted(plan.stages.values(), key=lambda s: -(s.flops or 0.0)):
        if stage.cost:
            kinds.setdefault(stage.cost.kind, stage)
    table.columns[0].no_wrap, table.columns[0].overflow = False, "fold"
    largest = list(kinds.values())[:_LARGEST]
    labels = distinct_labels(((s.key, s.label, s.arms) for s in largest), short=width < _WIDE)
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


def _absent(plan: Plan) -> Iterable[str]:
    fix = "`tadistill fetch RECIPE` downloads what is missing, and converts GGUF files."
    if plan.unknown:
        its = "its configuration is not" if len(plan.unknown) == 1 else "their configurations are not"
        yield f"The size of {', '.join(plan.unknown)} is not known (?), because {its} on this disk. {fix} Stage keys may then change."
    for name, reason in plan.absent.items():
        yield f"Arm {name} is left out of this plan: {reason}."
    trained = any(stage.trains and stage.cost is None for stage in plan.stages.values())
    if trained and not plan.unknown:
        yield f"FLOPs are not known (?) if a data set is not on this disk, or if FLOPs cannot be counted for a model's family. {fix}"


def _notes(plan: Plan, store: Store, speeds: Speeds, jobs: int) -> Iterable[str]:
    yield from (f"[yellow]{escape(sentence)}[/]" for sentence in _absent(plan))
    yield from _phases(plan)
    yield from _rows(plan)
    yield from _recordings(plan)
    yield from (f"[yellow]{escape(sentence)}.[/]" for sentence in off_budget(plan))
    yield from (f"[yellow]{escape(sentence)}.[/]" for sentence in off_teacher_budget(plan))
    yield from _across(plan)
    yield from _controls(plan)
    yield from (f"[yellow]{sentence}[/]" for sentence in fair_notes(plan.recipe))
    yield (
        "FLOPs include all training in this study that an arm's final model needs, also the fine-tuning of its teachers. "
        "FLOPs of dev evaluations, rollout metrics and tests are not included."
    )
    for name, model in plan.recipe.models.items():
        if model.load and (base := sources.adapter_base(model.load, model.revision)):
            yield escape(f"Model {name} is the LoRA adapter {model.load}, merged with its base {base[0]}.")
    yield from map(escape, served_notes(plan))
    yield from map(escape, asked_notes(plan, store))
    yield from (escape(f"arms.{arm.name}: {sentence}.") for arm in plan.arms for sentence in approximations(plan, arm.name))
    yield from engine_notes(plan)
    yield from map(escape, plan.tokens.notes())
    yield from map(escape, undefined_notes(plan))
    yield from (f"[yellow]{escape(sentence)}[/]" for sentence in plan.tokens.cautions())
    placed = [layout(plan.recipe, stage) for stage in plan.stages.values()]
    if any(resources.processes > 1 or resources.teacher != "replicated" for resources in placed):
        yield "The memory is that of one process with the given `resources`. An offloaded teacher is in host memory and is not included."
    todo = [s for s in plan.stages.values() if s.cost and s.cost.parts and not store.finished(s.key)]
    takes = {s.key: t for s in todo if (t := throughput.seconds(s.cost, speeds)) is not None}
    if not todo:
        return
    if len(takes) < len(todo):
        unknown = f"{len(todo) - len(takes)} of {len(todo)} stages to run whose FLOPs are counted"
        yield f"The time is not known for {unknown}; `tadistill plan RECIPE --measure` measures the speed on this machine."
    if takes:
        total = throughput.spoken(throughput.wall_clock(plan.stages, takes, jobs))
        yield f"Stages with a known time take {total} if {jobs} run at a time. Evaluations and analyses take additional time."


def _phases(plan: Plan) -> Iterable[str]:
    for arm in plan.arms:
        if len(arm.phases) > 1:
            updates = " + ".join(str(phase.method.optim.steps) for phase in arm.phases)
            yield escape(f"arms.{arm.name} has {len(arm.phases)} phases: {phases_text(arm.phases)} ({updates} updates).")


def _across(plan: Plan) -> Iterable[str]:
    steps = dict.fromkeys(step for arm in plan.arms for step in lossy_steps(plan.tokens, arm.arm.path))
    if steps:
        named = ", ".join(f"{above} and {below}" for above, below in steps)
        yield escape(f"`~>` is a step between two models with different tokenizers ({named}).")
    if plan.teacher and _asks(plan):
        yield escape(f"`{_ASKED}`: number of answer tokens that {plan.teacher} writes or scores for an arm, for one seed.")


def _recordings(plan: Plan) -> Iterable[str]:
    # the number of distillations that read a recording is the number of trainings in which the teacher need not run
    for stage in plan.stages.values():
        if stage.cost is None or stage.cost.disk is None or not isinstance(stage.spec, SignalSpec):
            continue
        disk, readers = stage.cost.disk, sum(stage.key in other.parents.values() for other in plan.stages.values())
        space = f"{disk.token:,.0f} bytes a token and {disk.total / 1e6:,.3g} MB on disk"
        shared = f"{readers} distillation{'s' * (readers != 1)} read{'s' * (readers == 1)} it"
        losses = stage.spec.signal.inexact("the recording has") or "exact"
        yield escape(f"{stage.label}: losses from this recording are {losses}; {'' if disk.exact else 'at most '}{space}; {shared}.")


def _controls(plan: Plan) -> Iterable[str]:
    # stages that the other arms need are not a cost of the controls
    own = {arm.name for arm in plan.arms if arm.arm.control or (arm.arm.compute or "").startswith("as ")}
    if not any(arm.arm.control for arm in plan.arms):
        return
    costs = [(stage.flops, stage.arms <= own) for stage in plan.stages.values() if stage.trains]
    if any(flops is None for flops, _ in costs):
        return
    total, extra = (sum(flops or 0.0 for flops, only in costs if only or every) for every in (True, False))
    names = ", ".join(arm.name for arm in plan.arms if arm.name in own)
    yield escape(f"Controls and equal-compute baselines ({names}) need {extra:.2e} of the study's {total:.2e} training FLOPs.")


def _rows(plan: Plan) -> Iterable[str]:
    data = plan.recipe.data
    if data.several:
        yield drawn_text(data.shares, dev=not isinstance(data.dev, DataRef))
    for readers, family in _readers(plan):
        who, reading = f", {' and '.join(family)}" if readers else "", Ledger(plan.recipe).of(readers).reading
        for role, ref in data.splits(trains=any(s.trains for s in plan.stages.values())):
            counts = passes.count_first_rows(reading, ref, role)
            texts = filter(None, (counts.text, counts.unknown_text)) if counts else ()
            yield from (f"Rows of {ref.name} ({role}{who}), among the first {counts.rows}: {text}." for text in texts if counts)
        for (context, teachers), ref in product(contexts_of(plan.recipe).items(), data.sets.values()):
            reads = sorted(teachers.intersection(family) if readers else teachers)
            counts = passes.count_first_rows(reading, ref, "train", context) if reads else None
            if counts and counts.of_contexts:
                where = f"Rows of {ref.name} (train) with the `context` of {' and '.join(reads)}, among the first {counts.rows}"
                yield f"{where}: {counts.of_contexts}."


def _readers(plan: Plan) -> Iterable[tuple[tuple[str, ...], tuple[str, ...]]]:
    # for each family of models that share a tokenizer: `StudyTokens.readers`, and the family
    families = plan.tokens.families or [()]
    return [(plan.tokens.readers(family[0]) if family else (), family) for family in families]


def _flops(value: float | None) -> str:
    return "?" if value is None else f"{value:.2e}"
