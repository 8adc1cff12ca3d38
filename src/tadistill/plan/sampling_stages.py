"""The stages in which a model samples text, and which of them use vLLM (`engine: vllm`)."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from tadistill.config import Recipe
from tadistill.config.common import Decoding
from tadistill.errors import ConfigError
from tadistill.plan.graph import Stage
from tadistill.plan.kinds import Spec, TrainingSpec

if TYPE_CHECKING:
    from tadistill.config.machine import Resources
    from tadistill.plan.arms import Plan


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


def check_vllm(recipe: Recipe, stage: Stage, given: "Resources") -> None:
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


def engine_notes(plan: "Plan") -> Iterator[str]:
    """Yield a sentence that names the kinds of stages whose text vLLM samples. Yield nothing without such stages."""
    found = [stage.kind for stage in vllm_stages(plan.stages.values())]
    if found:
        kinds = ", ".join(f"{found.count(kind)} {kind}" for kind in dict.fromkeys(found))
        yield (
            f"vLLM samples the text of {len(found)} stage{'s' * (len(found) > 1)} ({kinds}), in a process of its own. The memory in "
            "the table does not include the memory of this process (`runtime.vllm.memory`)."
        )
