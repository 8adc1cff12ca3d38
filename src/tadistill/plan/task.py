"""The task that a process or cluster job receives, and what a stage needs: its resources, its memory, and vLLM (`engine: vllm`).

A task has a stage of the study and the stage's resources, and it can be pickled.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from pydantic import ValidationError

from tadistill.config import Recipe
from tadistill.config.common import DTYPES, Decoding, message_of
from tadistill.config.machine import Resources, Vllm, entries_of, given_resources
from tadistill.data import survey
from tadistill.data.tinyworld import TOKENIZERS
from tadistill.errors import ConfigError, Gathering
from tadistill.models import sources
from tadistill.models.flops_and_memory import TOKENIZER_BYTES, Memory, weight_bytes
from tadistill.plan.costs import Ledger
from tadistill.plan.graph import Spec, Stage
from tadistill.plan.inputs import BehindApi, FromStage, Handle, Loaded, is_served
from tadistill.plan.kinds import KINDS, DistillSpec, TrainingSpec
from tadistill.store import Store

if TYPE_CHECKING:
    from tadistill.plan.arms import Plan


@dataclass(frozen=True)
class Task:
    """Everything that a process needs to run one stage."""

    spec: Spec
    key: str
    label: str
    store: str
    study: str
    data_root: str | None
    checkpoint_seconds: float | None
    resources: Resources = field(default_factory=Resources)
    """Number of processes and nodes, and where the models' weights are."""
    code: str | None = None
    """Folder of the user's own modules."""
    vllm: Vllm = field(default_factory=Vllm)
    """Settings of vLLM, if it samples the stage's text."""
    gpus: int = 1
    """Number of GPUs of all processes together, if this machine has GPUs."""


def make_task(plan: "Plan", stage: Stage, store: Store) -> Task:
    """Return the task of a planned stage."""
    recipe, resources = plan.recipe, resources_of(plan.recipe, stage)
    return Task(
        spec=stage.spec,
        key=stage.key,
        label=stage.label,
        store=str(store.root),
        study=recipe.study,
        data_root=recipe.data.root,
        checkpoint_seconds=recipe.runtime.checkpoint_seconds,
        resources=resources,
        code=recipe.runtime.code,
        vllm=recipe.runtime.vllm,
        gpus=gpus_of(recipe, stage.spec, resources.processes),
    )


def split_entry(name: str) -> tuple[str, str]:
    """Return the kind and the model in the name of an entry of `resources`, such as `sft xl`. The model is empty if there is none."""
    kind, _, model = name.partition(" ")
    return kind, model


def check_entries(recipe: Recipe) -> None:
    """Check the recipe's `resources`. An entry's name must be `default`, a kind of stage (`sft`), or a kind and a model (`sft NAME`).

    Raises:
        ConfigError: an entry has another name, or sets several processes for a kind that runs in one process.
    """
    kinds = [kind for kind, spec in KINDS.items() if spec.in_recipes]
    for name, entry in recipe.resources.items():
        kind, model = split_entry(name)
        if name != "default" and kind not in kinds:
            raise ConfigError(f"resources.{name} is neither `default` nor a kind of stage; the kinds are {', '.join(kinds)}")
        if model and model not in recipe.models:
            raise ConfigError(
                f"resources.{name} names the model `{model}`, which is not in the recipe; the models are {', '.join(recipe.models)}"
            )
        if kind in kinds and not KINDS[kind].shared and entry.processes > 1:
            raise ConfigError(
                f"resources.{name}.processes is {entry.processes}, but stages of kind {kind} run in one process; remove this setting"
            )


def check_sources(recipe: Recipe) -> None:
    """Check that the recipe's models and data sets exist on this disk. A name that may be a Hub id is accepted too. No file is read.

    Raises:
        DataError, ModelError: some models or data sets do not exist. The message names all of them.
    """
    found = Gathering()
    for name, model in recipe.models.items():
        for source in (model.load, model.tokenizer):
            if source and source not in TOKENIZERS:
                with found.about(f"models.{name}"):
                    sources.check_source(source)
    with found.about():
        survey.check_sources(recipe.data)
    found.finish()


def resources_of(recipe: Recipe, stage: Stage) -> Resources:
    """Return the resources of a stage. The entry `KIND MODEL` of the recipe overrides `KIND`, and `KIND` overrides `default`.

    Raises:
        ConfigError: the merged settings contradict each other.
    """
    given, names = given_resources(recipe.resources, stage.kind, stage.model), entries_of(recipe.resources, stage.kind, stage.model)
    if not stage.spec.trains:  # no weights are updated or spread over processes in such a stage, whatever `default` sets
        unused = ("parallel",) if stage.spec.shared else ("processes", "nodes", "parallel")
        given = {f: v for f, v in given.items() if f not in unused and (f, v) != ("teacher", "sharded")}
    if isinstance(stage.spec, TrainingSpec) and stage.spec.method.ema is not None:  # a moving average is placed like its student
        given["teacher"] = "sharded" if given.get("parallel") == "fsdp" else "replicated"
    try:
        return Resources.model_validate(given)
    except ValidationError as error:
        found = f"resources of `{stage.kind} {stage.model}` (merged from the entries {', '.join(names)})"
        raise ConfigError(f"{found}: {message_of(error.errors()[0])}") from error


def process_bytes(plan: "Plan", stage: Stage, *, cuda: bool, of_gpu: float = 0.0) -> float | None:
    """Return the estimated peak memory of one process of a stage, in bytes, on a GPU (`cuda`) or on a CPU. Return None if it is not known.

    `of_gpu` is the size of the GPU's memory in bytes. vLLM takes a share of it (`runtime.vllm.memory`), which is counted only with
    `of_gpu`.

    Raises:
        ConfigError: as in `layout`.
    """
    memory, vllm = planned_memory(plan, stage), plan.recipe.runtime.vllm
    if memory and cuda and uses_vllm(stage.spec):
        share = vllm.memory * of_gpu
        if vllm.sleep and isinstance(stage.spec, TrainingSpec):  # then it has this memory only while it samples
            memory = replace(memory, sampling=max(memory.sampling, share))
        else:
            memory = replace(memory, frozen=memory.frozen + share)
    return memory.peak(cuda=cuda) if memory else None


def planned_memory(plan: "Plan", stage: Stage) -> Memory | None:
    """Return the estimated memory of one process of a stage, with the stage's resources. Return None if it is not known.

    Raises:
        ConfigError: as in `layout`.
    """
    wanted, ledger = layout(plan.recipe, stage), Ledger(plan.recipe)
    memory = _memory(plan, stage, ledger)
    if memory is None:
        return None
    if wanted.processes > 1 and wanted.parallel == "ddp":  # DDP's gradients are in memory all the time
        memory = replace(memory, several=True, sampling=memory.sampling + memory.gradients)
    if wanted.parallel == "fsdp" and (size := ledger.size(stage.model)):
        layer = (size.matmul - size.head) / size.layers
        memory = memory.sharded(wanted.processes, 4 * (size.total - layer * max(size.layers - 2, 0)))
    if wanted.teacher == "sharded":
        part = memory.frozen / wanted.processes
        guided = isinstance(stage.spec, TrainingSpec) and stage.spec.method.sampler.guided  # then the teacher is whole while it samples
        memory = replace(memory, frozen=part, sampling=memory.sampling + (memory.frozen - part if guided else 0.0))
    return replace(memory, frozen=0.0) if wanted.teacher == "offloaded" else memory


def trainings(plan: "Plan") -> Iterator[tuple[Stage, TrainingSpec]]:
    """Yield the stages that train a model, with their contents."""
    for stage in plan.stages.values():
        if isinstance(stage.spec, TrainingSpec):
            yield stage, stage.spec


def host_bytes(plan: "Plan", stage: Stage, *, cuda: bool) -> float:
    """Return the estimated bytes of host memory that all processes of a stage need together on one machine. It is 0 if it is not known.

    With `cuda`, models only pass through host memory, one after the other. Offloaded teachers and recorded rollouts stay in it.
    """
    wanted, ledger = layout(plan.recipe, stage), Ledger(plan.recipe)
    names = dict.fromkeys(filter(None, (name_of(plan, handle) for handle in stage.spec.models.values())))
    tokenizers = TOKENIZER_BYTES * sum((ledger.config(name) or {}).get("vocab_size", 0) for name in names)
    if not cuda:
        known = process_bytes(plan, stage, cuda=False)
        return (known + tokenizers) * wanted.processes / wanted.nodes if known else 0.0
    memory, size = _memory(plan, stage, ledger), ledger.size(stage.model)
    if memory is None or size is None:
        return 0.0
    each = max(memory.weights, memory.frozen) + (memory.frozen if wanted.teacher == "offloaded" else 0.0) + memory.rollouts + tokenizers
    gathered = 12.0 * size.total if wanted.parallel == "fsdp" else 0.0  # the main process saves the whole state
    return each * wanted.processes / wanted.nodes + gathered


def _memory(plan: "Plan", stage: Stage, ledger: Ledger) -> Memory | None:
    if stage.cost:
        return stage.cost.memory
    models, dtype = stage.spec.models, DTYPES[plan.recipe.evaluate.precision]
    others = [handle for role, handle in models.items() if role != "model" and not is_served(handle)]
    handles = [handle for i, handle in enumerate(others) if handle not in others[:i]]
    names = [*([stage.model] if "model" in models else []), *filter(None, (name_of(plan, handle) for handle in handles))]
    sizes, working = [ledger.size(name) for name in names], ledger.measuring(stage.model)
    if working is None or None in sizes:
        return None
    weights = [weight_bytes(size.total, dtype) for size in sizes if size]
    return Memory(weights=sum(weights[:1]), frozen=sum(weights[1:]), sampling=working)


def name_of(plan: "Plan", handle: Handle) -> str | None:
    """Return the name of a model in the recipe. None if the recipe has no such model."""
    if isinstance(handle, FromStage):
        return plan.stages[handle.stage].model
    if isinstance(handle, BehindApi):
        return next((name for name, model in plan.recipe.models.items() if model.api == handle.api), None)
    if not isinstance(handle, Loaded):
        return name_of(plan, handle.of)
    alike = [(name, m) for name, m in plan.recipe.models.items() if (m.load, m.revision) == (handle.source, handle.revision)]
    alike.sort(key=lambda found: found[1].serve != handle.serve)
    return next((name for name, m in alike if handle.seed is None or m.config == handle.config), None)  # a seed: new, random weights


def layout(recipe: Recipe, stage: Stage) -> Resources:
    """Return the resources of a stage, after checking that the stage can run with them.

    Raises:
        ConfigError: the batch is not a multiple of the number of processes, or the student or the teacher is sharded although each process
            needs the whole model, or vLLM cannot run with the resources.
    """
    given, spec = resources_of(recipe, stage), stage.spec
    check_vllm(recipe, stage, given)
    if not isinstance(spec, TrainingSpec):
        return given
    if spec.optim.batch % given.processes:
        raise ConfigError(
            f"{stage.label}: `optim.batch` is {spec.optim.batch}, but it must be a multiple of the {given.processes} processes in "
            "`resources`; change one of the two numbers"
        )
    if given.teacher == "sharded" and isinstance(spec, DistillSpec) and spec.route:
        raise ConfigError(
            f"{stage.label}: `resources` has teacher: sharded, for which all processes must run the same teacher at the same time, but "
            "with a route, each process runs only the teachers of its own rows; set teacher: replicated or offloaded"
        )
    if given.parallel == "fsdp" and spec.lora:
        raise ConfigError(
            f"{stage.label}: `resources` has parallel: fsdp, but `lora` needs whole weights in each process; set parallel: ddp"
        )
    return given


# --- vLLM -----------------------------------------------------------------------------------------------------------------


def sampling(spec: Spec) -> Decoding | None:
    """Return the settings with which a stage samples text. Return None if the stage samples no text.

    Answers to dev prompts during a training do not count, because vLLM never samples them.
    """
    found = (spec.method.sampler,) if isinstance(spec, TrainingSpec) and spec.method.samples else ()
    fields = found if isinstance(spec, TrainingSpec) else (value for _, value in spec)
    return next((value for value in fields if isinstance(value, Decoding)), None)


def uses_vllm(spec: Spec) -> bool:
    """Return True if vLLM samples the text of a stage."""
    settings = sampling(spec)
    return settings is not None and settings.engine == "vllm"


def gpus_of(recipe: Recipe, spec: Spec, processes: int) -> int:
    """Return the number of GPUs of a stage: one for each of its `processes`, or more if vLLM splits the weights over more GPUs."""
    return max(processes, recipe.runtime.vllm.tensor_parallel if uses_vllm(spec) else 1)


def check_vllm(recipe: Recipe, stage: Stage, given: Resources) -> None:
    """Check that vLLM can run in a stage with its resources.

    Raises:
        ConfigError: the student is sharded, or each of several processes would need several GPUs.
    """
    if not uses_vllm(stage.spec):
        return
    if given.parallel == "fsdp":
        raise ConfigError(
            f"{stage.label}: `resources` has parallel: fsdp, but engine vllm needs the whole student in each process; set parallel: ddp"
        )
    if given.processes > 1 and recipe.runtime.vllm.tensor_parallel > 1:
        raise ConfigError(
            f"{stage.label}: it has {given.processes} processes, each with a vLLM on its own GPU, but `runtime.vllm.tensor_parallel` is "
            f"{recipe.runtime.vllm.tensor_parallel}; set this key to 1, or use one process"
        )


def vllm_stages(stages: Iterable[Stage]) -> list[Stage]:
    """Return the stages whose text vLLM samples."""
    return [stage for stage in stages if uses_vllm(stage.spec)]
