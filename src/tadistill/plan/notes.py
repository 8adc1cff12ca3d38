"""The sentences below the tables of `tadistill plan`, and those about numbers of a study that are not exact.

A loss is not exact if a server or a recording has only a part of a teacher's distribution, or if the teacher has another tokenizer than the
student. FLOPs are not complete if a teacher is behind an API.
"""

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from itertools import product

from rich.markup import escape

from tadistill.config.arm import flat
from tadistill.config.data import DataRef, drawn_text
from tadistill.config.objective import Gold, MiniLLM, Uld
from tadistill.config.recipe import trains
from tadistill.constants import SEEDS_FOR_A_CLAIM, enough_seeds, misses_budget
from tadistill.data.encoding_rules import Counts
from tadistill.data.survey import seen_prompts
from tadistill.errors import TadistillError
from tadistill.models import sources
from tadistill.plan import throughput
from tadistill.plan.arms import Plan, PlannedArm
from tadistill.plan.costs import Ledger
from tadistill.plan.costs.sizes_and_lengths import count_first_rows, most_counted
from tadistill.plan.graph import behind, total_flops
from tadistill.plan.inputs import Loaded
from tadistill.plan.kinds import AskSpec, DistillSpec, SignalSpec
from tadistill.plan.paths import contexts_of, lossy_steps
from tadistill.plan.phases import phases_text
from tadistill.plan.remote import asked_notes, served_notes, shared_notes
from tadistill.plan.task import layout, name_of, trainings, vllm_stages
from tadistill.plan.throughput import Speeds
from tadistill.store import Store
from tadistill.text import counted, listed, size

ASKED = "teacher tokens"
"""The column of the arms' table with the number of answer tokens that the original teacher writes or scores."""


def plan_notes(plan: Plan, store: Store, speeds: Speeds, jobs: int) -> Iterator[str]:
    """Yield all sentences of a plan, with the markup of rich. Warnings are yellow. `jobs` stages run at a time."""
    yield from map(_warning, _absent(plan))
    yield from (_warning(f"{sentence}.") for sentence in seen_notes(plan))
    yield from map(escape, (*_phases(plan), *_scaled(plan)))
    yield from map(escape, row_notes(plan))
    yield from map(escape, _recordings(plan))
    yield from (_warning(f"{sentence}.") for sentence in (*off_budget(plan), *off_teacher_budget(plan)))
    yield from map(escape, _across(plan))
    yield from map(escape, _controls(plan))
    yield from map(_warning, (*_few_seeds(plan), *_unfair(plan)))
    yield (
        "FLOPs include all training in this study that an arm's final model needs, also the fine-tuning of its teachers. "
        "FLOPs of dev evaluations, watching (metrics of rollouts) and tests are not included."
    )
    adapted = {stage.model for stage, spec in trainings(plan) if spec.lora}
    for name, model in plan.recipe.models.items():
        if model.load and (base := sources.adapter_base(model.load, model.revision)):
            yield escape(f"Model {name} is the LoRA adapter {model.load}, merged with its base {base[0]}.")
        if model.lora and name in adapted:
            yield escape(
                f"Model {name} is trained with LoRA: adapters of rank {model.lora.r}, merged into the weights after each training."
            )
    yield from map(escape, dict.fromkeys(_never_stops(plan)))
    yield from map(escape, served_notes(plan))
    yield from map(_warning, shared_notes(plan))
    yield from map(escape, asked_notes(plan, store))
    yield from (escape(f"arms.{arm.name}: {sentence}.") for arm in plan.arms for sentence in approximations(plan, arm.name))
    yield from _engines(plan)
    yield from map(escape, plan.tokens.notes())
    yield from map(escape, _undefined(plan))
    yield from map(_warning, plan.tokens.cautions())
    placed = [layout(plan.recipe, stage) for stage in plan.stages.values()]
    if any(resources.processes > 1 or resources.teacher != "replicated" for resources in placed):
        yield "The memory is that of one process with the given `resources`. An offloaded teacher is in host memory and is not included."
    yield from _times(plan, store, speeds, jobs)


def _warning(sentence: str) -> str:
    return f"[yellow]{escape(sentence)}[/]"


def _absent(plan: Plan) -> Iterator[str]:
    fix = "`tadistill fetch RECIPE` downloads what is missing, and converts GGUF files."
    if plan.unknown:
        one = len(plan.unknown) == 1
        its, sizes = ("its configuration is", "The size of {} is") if one else ("their configurations are", "The sizes of {} are")
        yield f"{sizes.format(listed(plan.unknown))} not known (?), because {its} not on this disk. {fix} Stage keys may then change."
    for name, reason in plan.absent.items():
        yield f"Arm {name} is left out of this plan: {reason}."
    trained = any(stage.spec.trains and stage.cost is None for stage in plan.stages.values())
    if trained and not plan.unknown:
        yield f"FLOPs are not known (?) if a data set is not on this disk, or if FLOPs cannot be counted for a model's family. {fix}"


def _times(plan: Plan, store: Store, speeds: Speeds, jobs: int) -> Iterator[str]:
    todo = [s for s in plan.stages.values() if s.cost and s.cost.parts and not store.finished(s.key)]
    takes = {s.key: t for s in todo if (t := throughput.seconds(s.cost, speeds)) is not None}
    if len(takes) < len(todo):
        of = f" for {len(todo) - len(takes)} of {len(todo)} unfinished stages of training or its preparation" if takes else ""
        known = f"The time is not known{of}" if takes else "No time is known yet"
        yield f"{known}. `tadistill plan RECIPE --measure` measures the speed of this machine."
    if takes:
        total = throughput.spoken(throughput.wall_clock(plan.stages, takes, jobs))
        yield f"Stages with a known time take {total} if {jobs} run at a time. Evaluations and analyses take additional time."


def _phases(plan: Plan) -> Iterator[str]:
    for arm in plan.arms:
        if len(arm.phases) > 1:
            updates = " + ".join(str(phase.method.optim.steps) for phase in arm.phases)
            yield f"arms.{arm.name} has {len(arm.phases)} phases: {phases_text(arm.phases)} ({updates} updates)."


def _never_stops(plan: Plan) -> Iterator[str]:
    # a stop needs one best value and `patience` later ones; the last measurement is at the end
    for stage, spec in trainings(plan):
        select, steps = spec.select, spec.optim.steps or 0
        if select.patience and (measured := -(-steps // select.every)) <= select.patience + 1:
            yield (
                f"`select.patience: {select.patience}` cannot stop a training of {stage.model}, because dev is measured only "
                f"{counted(measured, 'time')} in {counted(steps, 'update')} (`select.every: {select.every}`)."
            )


def _scaled(plan: Plan) -> Iterator[str]:
    usual, found = plan.recipe.method.select.every, list[str]()
    for arm in plan.arms:
        select, own = arm.method.select, arm.arm.select or arm.arm.method or len(arm.phases) > 1
        if arm.arm.budgets and not own and select.chooses and select.every != usual:
            found.append(f"every {select.every} updates for {arm.name}")
    if found:
        yield f"Dev is measured {listed(found)}, not every {usual}, so that all arms choose among as many checkpoints."


def _across(plan: Plan) -> Iterator[str]:
    steps = dict.fromkeys(step for arm in plan.arms for step in lossy_steps(plan.tokens, arm.arm.path))
    for api, why in ((False, "between two models with different tokenizers"), (True, "in which only text passes, because of the API")):
        found = [f"{above} and {below}" for above, below in steps if bool(plan.recipe.models[above].api) == api]
        if found:
            yield f"`~>` is a step {why} ({', '.join(found)})."
    if plan.teacher and counts_asked(plan):
        yield f"{ASKED}: number of answer tokens that {plan.teacher} writes or scores for an arm, for one seed."


def _recordings(plan: Plan) -> Iterator[str]:
    # the number of distillations that read a recording is the number of trainings in which the teacher need not run
    for stage in plan.stages.values():
        if stage.cost is None or stage.cost.disk is None or not isinstance(stage.spec, SignalSpec):
            continue
        disk, readers = stage.cost.disk, sum(stage.key in other.parents.values() for other in plan.stages.values())
        space = f"{disk.token:,.0f} bytes a token and {size(disk.total)} on disk"
        shared = f"{counted(readers, 'distillation reads', 'distillations read')} it"
        losses = stage.spec.signal.inexact("the recording has") or "exact"
        yield f"{stage.label}: losses from this recording are {losses}; {'' if disk.exact else 'at most '}{space}; {shared}."


def _controls(plan: Plan) -> Iterator[str]:
    # stages that the other arms need are not a cost of the controls
    own = {arm.name for arm in plan.arms if arm.arm.control or (arm.arm.compute or "").startswith("as ")}
    if not any(arm.arm.control for arm in plan.arms):
        return
    training = [stage for stage in plan.stages.values() if stage.spec.trains]
    total, extra = total_flops(training), total_flops(stage for stage in training if stage.arms <= own)
    if total is None or extra is None:
        return
    names = ", ".join(arm.name for arm in plan.arms if arm.name in own)
    yield f"Controls and equal-compute baselines ({names}) need {extra:.2e} of the study's {total:.2e} training FLOPs."


def row_notes(plan: Plan) -> Iterator[str]:
    """Yield sentences about the first rows of each data set that are left out or shortened, or that the tokenizer cannot read."""
    data = plan.recipe.data
    if data.several:
        yield drawn_text(data.shares, dev=not isinstance(data.dev, DataRef))
    for family in plan.tokens.families or [()]:
        readers = plan.tokens.readers(family[0]) if family else ()
        who, reading = f", {' and '.join(family)}" if readers else "", Ledger(plan.recipe).of(readers).reading
        for role, ref in data.splits(trains=any(s.spec.trains for s in plan.stages.values())):
            counts = count_first_rows(reading, ref, role)
            texts = filter(None, (counts.text, counts.unknown_text)) if counts else ()
            yield from (f"Rows of {ref.name} ({role}{who}){_first(role, counts)}: {text}." for text in texts if counts)
        for (context, teachers), ref in product(contexts_of(plan.recipe).items(), data.sets.values()):
            reads = sorted(teachers.intersection(family) if readers else teachers)
            counts = count_first_rows(reading, ref, "train", context) if reads else None
            if counts and counts.of_contexts:
                where = f"Rows of {ref.name} (train) with the `context` of {' and '.join(reads)}"
                yield f"{where}{_first('train', counts)}: {counts.of_contexts}."


def _first(role: str, counts: Counts) -> str:
    return f", among the first {counts.rows}" if counts.rows == most_counted(role) else ""  # fewer rows are the whole split


def seen_notes(plan: Plan) -> Iterator[str]:
    """Yield a sentence for each test set with prompts that are also in a training set, or in a dev set that chooses checkpoints. Sets that
    are not on this disk are left out."""
    uses = {"train": trains(plan.recipe), "dev": any(spec.dev for _, spec in trainings(plan))}
    for role in (role for role, used in uses.items() if used):
        found: dict[str, str] = {}
        with suppress(TadistillError):
            found = seen_prompts(plan.recipe.data, role)
        for name, what in found.items():
            yield f"{name} (test) {what}"


def _engines(plan: Plan) -> Iterator[str]:
    found, settings = vllm_stages(plan.stages.values()), plan.recipe.runtime.vllm
    if found:
        kinds = ", ".join(f"{n} {kind}" for kind, n in Counter(stage.kind for stage in found).items())
        awake = "; a training on a GPU needs it only while it samples" if settings.sleep and any(s.spec.trains for s in found) else ""
        yield (
            f"vLLM samples the text of {counted(len(found), 'stage')} ({kinds}), in a process of its own. The table adds its memory "
            f"(`runtime.vllm.memory`) as + {settings.memory:.0%} of a GPU, or of the machine without a GPU{awake}."
        )


def _undefined(plan: Plan) -> Iterator[str]:
    # metrics that are not measured, because they are not defined for models with different tokenizers
    teacher = plan.teacher
    if teacher is None or not plan.recipe.data.test:
        return
    others = [arm for arm in plan.arms if not plan.tokens.alike(arm.arm.last[-1], teacher)]
    if others:
        instead = " The bits per byte of their answers are measured instead." if all(arm.analyse for arm in others) else ""
        yield (
            f"The divergence from {teacher}, the error budget and the exposure bias are not defined across vocabularies, so they are not "
            f"measured for {', '.join(arm.name for arm in others)}.{instead}"
        )
    for arm in plan.arms:
        apart = [name for name in flat(arm.arm.last) if not plan.tokens.alike(name, teacher)]
        if apart and arm not in others and not arm.arm.controls:
            yield f"The error budget of {arm.name} is not measured, because {apart[0]} has another vocabulary than {teacher}."


def _unfair(plan: Plan) -> Iterator[str]:
    # `fair: true` adds no arm to the recipe
    chains = [arm for arm in plan.recipe.arms.values() if len(arm.path) == 1 and len(arm.last) > 2]
    if plan.recipe.fair and not any(not (arm.control or arm.init or arm.compute) for arm in chains):
        yield (
            "`fair: true` adds no arms, because it needs an arm with a single path through an assistant, such as A > B > C, and with "
            "neither `init` nor `compute`."
        )


def _few_seeds(plan: Plan) -> Iterator[str]:
    trained = [any(arm.final.values()) for arm in plan.arms]
    seeds = len(plan.recipe.seeds)
    if len(trained) > 1 and sum(not of_arm for of_arm in trained) < 2 and not enough_seeds(seeds, trained=True):
        yield (
            f"`seeds` has {counted(seeds, 'seed')}, so the report will give no verdict on these arms, only their differences; a verdict "
            f"needs at least {SEEDS_FOR_A_CLAIM} training seeds."
        )


def off_budget(plan: Plan) -> Iterator[str]:
    """Yield a sentence for each arm whose FLOPs differ clearly from its `compute`. The reason is that a training has a whole number of
    updates, or of rounds, each of which samples text and makes several updates."""
    for arm in plan.arms:
        share = arm.of_budget
        if misses_budget(share):
            yield (
                f"arms.{arm.name} has `compute: {arm.arm.compute}`, but it needs {share:.2g} times these FLOPs, because "
                f"{_whole(plan, arm)} or a larger budget"
            )


def _whole(plan: Plan, arm: PlannedArm) -> str:
    # why an arm misses a budget, and what to change
    specs = [stage.spec for stage in behind(plan.stages, next(iter(arm.final.values()))).values()]
    if any(isinstance(spec, DistillSpec) and spec.method.round_updates > 1 for spec in specs):
        return "the arm's updates come in whole rounds; choose smaller rounds (`sampler.rollouts`, `inner_epochs`)"
    return "the arm makes a whole number of updates; choose smaller batches (`optim.batch`)"


def off_teacher_budget(plan: Plan) -> Iterator[str]:
    """Yield a sentence for each arm for which the teacher writes or scores clearly more or fewer tokens than `teacher_budget` sets."""
    arms = {arm.name: arm for arm in plan.arms}
    for arm in (arm for arm in plan.arms if arm.arm.asks_like):
        asked, budget = arm.asked, arms[arm.arm.asks_like or ""].asked
        if asked and budget and misses_budget(asked / budget):
            yield (
                f"arms.{arm.name} has `teacher_budget: {arm.arm.teacher_budget}`, but the teacher writes or scores "
                f"{asked / budget:.2g} times as many tokens, because {_whole(plan, arm)}"
            )


def counts_asked(plan: Plan) -> bool:
    """Return True if the arms' table has the column `asked`."""
    return any(arm.arm.teacher_budget for arm in plan.arms) or len(plan.tokens.families) > 1


# --- numbers that are not exact -------------------------------------------------------------------------------------------


def approximations(plan: Plan, arm: str) -> list[str]:
    """Return one sentence for each teacher whose outputs make a loss of the arm inexact, or whose FLOPs are not known. Empty if all numbers
    are exact."""
    found = (_of_stage(plan, stage.model, stage.spec) for stage in plan.stages.values() if arm in stage.arms)
    return list(dict.fromkeys(sentence for sentences in found for sentence in sentences))


def _of_stage(plan: Plan, model: str, spec: object) -> Iterator[str]:
    if isinstance(spec, AskSpec):
        yield f"teacher FLOPs unknown: {model} is behind an API, so its FLOPs are neither in the FLOPs of the arm nor in `compute`"
    if not isinstance(spec, DistillSpec):
        return
    objective, signal, loss = spec.objective, spec.method.signal, f"the loss `{spec.objective.label}` of {model} is"
    if spec.teacher_data:
        yield f"{loss} {_over_spans(spec, name_of(plan, spec.teacher) or 'its teacher')}"
        return
    if not objective.needs_teacher or not (objective.needs_distribution or objective.compares_on_corpus):
        return
    for teacher in (spec.teacher, *spec.assistants):
        name, sends = name_of(plan, teacher) or "its teacher", teacher.sends if isinstance(teacher, Loaded) else None
        if sends and sends.k >= (Ledger(plan.recipe).config(name) or {}).get("vocab_size", math.inf):
            sends = None  # all tokens
        source, given = (signal, f"the recording of {name} has") if signal is not None else (sends, f"the server of {name} sends")
        if source and (inexact := source.inexact(given)):
            yield f"{loss} {inexact}"


def _over_spans(spec: DistillSpec, teacher: str) -> str:
    why = f"computed over spans of text, because {teacher} has another tokenizer"
    if isinstance(spec.objective, MiniLLM):
        return (
            f"{why}: each token gets the reward of its whole span, and the single-step term (the expected reward of the next token) is "
            "left out; the gradient is unbiased, unless later text changes how the teacher's tokenizer splits a span"
        )
    if isinstance(spec.objective, Uld | Gold):
        return f"{why}, as in GOLD of TRL 1.16"
    return (
        f"{why}: at the start of a span, the loss compares the probabilities of groups of next tokens that begin with the same bytes "
        "(cells); inside a span, it compares the probabilities of the next byte; the loss is exact only if each model gives no probability "
        "to tokenisations that its own tokenizer would not make"
    )
