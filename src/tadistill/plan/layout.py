"""Whether a stage can be laid out over its processes as the recipe's `resources` say. Imports no torch."""

from tadistill.config import Method, Recipe
from tadistill.config.resources import TRAINING, Resources, resources_of
from tadistill.config.sampling import DatasetSampler, OnPolicy, SpeculativeSampler, TeacherMixedSampler
from tadistill.errors import ConfigError
from tadistill.plan.graph import Stage


def layout(recipe: Recipe, stage: Stage) -> Resources:
    """The resources of a stage.

    Raises:
        ConfigError: the batch cannot be shared by the processes, or what must be whole on each would be cut.
    """
    given, spec = resources_of(recipe.resources, stage.kind, stage.model), stage.spec
    if stage.kind not in TRAINING:
        return given
    if spec["optim"]["batch"] % given.processes:
        raise ConfigError(
            f"{stage.label}: optim.batch {spec['optim']['batch']} is not a multiple of the {given.processes} processes that resources give "
            "it; change one of them"
        )
    sampler = Method.model_validate(spec["method"]).sampler if "method" in spec else DatasetSampler()
    guided = isinstance(sampler, SpeculativeSampler) or (isinstance(sampler, TeacherMixedSampler) and sampler.alpha > 0)
    if given.teacher == "sharded" and guided:
        raise ConfigError(
            f"{stage.label}: resources say teacher sharded, but sampler {sampler.type} asks the teacher for tokens one by one, each "
            "process as often as it needs, and a sharded teacher answers all processes at once; set teacher: offloaded"
        )
    if given.parallel == "fsdp" and isinstance(sampler, OnPolicy) and sampler.engine == "vllm":
        raise ConfigError(f"{stage.label}: resources say parallel fsdp, but engine vllm needs the whole student; set parallel: ddp")
    if given.parallel == "fsdp" and "lora" in spec:
        raise ConfigError(
            f"{stage.label}: resources say parallel fsdp, but lora merges whole weights; set parallel: ddp, adapters have few gradients"
        )
    return given
