"""Check data, models, tokenizers and memory before a study starts, so that mistakes are found before any stage has run."""

import importlib.util
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from tadistill.config import Recipe
from tadistill.config.machine import vllm_folder
from tadistill.config.objective import TopKForwardKL, TopKReverseKL
from tadistill.config.recipe import methods
from tadistill.data import survey
from tadistill.errors import ConfigError, Gathering, ModelError, about
from tadistill.metrics import MEAN
from tadistill.models.architectures import check_config, check_scratch, scratch_config
from tadistill.models.flops_and_memory import available_memory, check_memory
from tadistill.models.forward import check_packing
from tadistill.models.loading import check_model, load_tokenizer
from tadistill.models.pruning import check_depth, depth
from tadistill.models.served_model import fetch_config, head_shape
from tadistill.models.sources import description_file
from tadistill.models.tokens import check_same_tokenizer, vocabulary
from tadistill.plan.arms import Plan
from tadistill.plan.graph import Stage, with_ancestors
from tadistill.plan.inputs import plan_tasks
from tadistill.plan.paths import original_teacher
from tadistill.plan.study_tokens import StudyTokens
from tadistill.plan.task import host_bytes, layout, process_bytes, trainings, uses_vllm, vllm_stages
from tadistill.plan.throughput import cores
from tadistill.runner import schedule
from tadistill.runner.data_checks import Read, check_readable, check_texts, read_splits, rows_notes, script_notes
from tadistill.runner.own_code import try_metrics, try_objectives
from tadistill.runner.remote import check_teachers
from tadistill.terminal import Terminal

_LESS_MEMORY = (
    "use smaller models, lower optim.micro_batch, set optim.gradient_checkpointing, set optim.precision to bf16 (a teacher then needs half "
    "the memory), or use a machine with more memory"
)
_OF_GPU = "memory of a GPU"
_STARTS = 10


def _silent(progress: str) -> None:
    pass


def check_study(
    plan: Plan, console: Terminal | None = None, stages: Iterable[Stage] | None = None, *, show: Callable[[str], None] = _silent
) -> int:
    """Check that a plan can run on this machine. Return how many stages may run at the same time.

    Notes on the data are printed: how many rows will be left out or cut, and how much of the references ROUGE-L ignores.

    Args:
        stages: the stages to run (default: all stages of the plan). A teacher's server is checked only if one of these stages
            uses it.
        show: called with how much of a large training set is tokenised.

    Raises:
        ConfigError, DataError, ModelError: the plan cannot run here. Nothing has been written yet.
        ServerFailed: a server of a teacher does not answer, or runs another model.
    """
    check_inputs(plan, console, show=show)
    stages = [*(plan.stages.values() if stages is None else stages)]
    if vllm_stages(stages):
        vllm_folder()
    check_teachers(plan.recipe, stages)
    jobs = plan.recipe.runtime.jobs or _default_jobs()
    _check_memory(plan, jobs)
    return jobs


def check_inputs(plan: Plan, console: Terminal | None = None, *, show: Callable[[str], None] = _silent) -> None:
    """Check everything that does not depend on the machine: data, tokenizers and models. Errors and `show` are those of `check_study`."""
    found, recipe = Gathering(), plan.recipe
    _check_without_models(plan, found)
    tokenizers = _load_tokenizers(plan, found)
    found.finish()
    families = _families(plan, tokenizers)
    read = _read_data(plan, families, show)
    with found.about():
        shared = {name: family.shared for family in families for name in family.models}
        _check_top_k(plan, shared)
        try_objectives(plan, lambda name: shared[name])
    for name in tokenizers:
        with found.about(f"models.{name}"):
            family = next(family for family in families if name in family.models)
            _check_model_and_texts(plan, name, tokenizers[name], family, read, show)
    with found.about():
        unread = dict.fromkeys(of.unread for of in read.values() if of.unread)
        notes = [*unread, *rows_notes(read), *script_notes(recipe)]
    found.finish()
    for note in notes:
        if console:
            console.say(note)


def _check_without_models(plan: Plan, found: Gathering) -> None:
    recipe = plan.recipe
    with found.about():
        survey.check(recipe)
    with found.about():
        _check_peft(recipe)
    with found.about():
        try_metrics(recipe)
    with found.about("evaluate.tasks"):
        _check_tasks(recipe)
    for stage in plan.stages.values() if recipe.resources else vllm_stages(plan.stages.values()):
        with found.about():
            layout(recipe, stage)


def _load_tokenizers(plan: Plan, found: Gathering) -> dict[str, PreTrainedTokenizerBase]:
    # the tokenizer of each model that runs here
    tokenizers, teacher = dict[str, PreTrainedTokenizerBase](), original_teacher(plan.recipe)
    for name, model in plan.recipe.models.items():
        if model.api is None and (name == teacher or any(name in arm.models for arm in plan.recipe.arms.values())):
            with found.about(f"models.{name}"):
                tokenizers[name] = _tokenizer(plan.recipe, name, plan.tokens)
    return tokenizers


@dataclass(frozen=True)
class _Family:
    """Models that share a tokenizer."""

    models: list[str]
    reader: str
    """The model whose tokenizer encodes the texts for all of them. It has the most tokens, so that a text with a token that only some of
    the models have is found."""
    tokenizer: PreTrainedTokenizerBase
    """The tokenizer of the reader."""
    shared: int
    """The number of tokens that all models have."""


def _families(plan: Plan, tokenizers: Mapping[str, PreTrainedTokenizerBase]) -> list[_Family]:
    # without a teacher, models are only evaluated, and each one may have its own tokenizer
    teacher, families = original_teacher(plan.recipe), list[_Family]()
    for family in dict.fromkeys(plan.tokens.family(name) if teacher else (name,) for name in tokenizers):
        of_models = {name: tokenizers[name] for name in family if name in tokenizers}
        check_same_tokenizer(of_models)
        reader = max(of_models, key=lambda name: len(tokenizers[name]))
        shared = min(vocabulary(tokenizer).size for tokenizer in of_models.values())
        families.append(_Family([*of_models], reader, tokenizers[reader], shared))
    return families


def _read_data(plan: Plan, families: list[_Family], show: Callable[[str], None]) -> dict[str, Read]:
    # the splits as the reader of each family tokenises them
    read: dict[str, Read] = {}
    for family in families:
        with about(f"models.{family.reader}" if len(families) > 1 else ""):
            read[family.reader] = read_splits(plan.recipe, family.tokenizer, plan.tokens, family.reader, show)
    if original_teacher(plan.recipe):
        check_readable(read)
    return read


def _check_model_and_texts(
    plan: Plan, name: str, tokenizer: PreTrainedTokenizerBase, family: _Family, read: dict[str, Read], show: Callable[[str], None]
) -> None:
    recipe, reader = plan.recipe, family.reader
    rows, config = _check_model(recipe, name, tokenizer)
    _check_packing(recipe, name, config)
    try:
        check_texts(recipe, name, rows, config, family.tokenizer, read[reader].texts_of(name), family.shared)
    except (ConfigError, ModelError):
        if not read[reader].unread:
            raise
        # a training set was not tokenised yet: only upper limits of its lengths and ids were checked
        read[reader] = read_splits(recipe, family.tokenizer, plan.tokens, reader, show, all_rows=True)
        check_texts(recipe, name, rows, config, family.tokenizer, read[reader].texts_of(name), family.shared)


def _check_top_k(plan: Plan, shared: Mapping[str, int]) -> None:
    for stage, spec in trainings(plan):
        objective = spec.method.objective
        if isinstance(objective, TopKForwardKL | TopKReverseKL) and objective.k > (vocab := shared[stage.model]):
            raise ConfigError(f"objective.k is {objective.k}, but the models share only {vocab} tokens; write at most {vocab}")


def _check_peft(recipe: Recipe) -> None:
    wanted = [name for name, model in recipe.models.items() if model.lora]
    if wanted and not importlib.util.find_spec("peft"):
        raise ConfigError(f"models.{wanted[0]} has `lora`, which needs `pip install 'tadistill[lora]'`; install it, or remove `lora`")


def _check_tasks(recipe: Recipe) -> None:
    if plan_tasks(recipe) is not None:
        from tadistill.evaluation.lm_eval_tasks import load_tasks  # here: it imports lm-eval, which is optional

        tasks = load_tasks(recipe.evaluate.tasks, recipe.data.root)
        if twice := [ref.name for ref in recipe.data.test if ref.name in tasks]:
            raise ConfigError(f"a task of lm-eval and a test set are both called `{twice[0]}`; remove one of them")
        if MEAN in tasks:
            raise ConfigError(f"a task of lm-eval is called `{MEAN}`, which means the mean over all test sets; rename or remove it")


def _tokenizer(recipe: Recipe, name: str, tokens: StudyTokens) -> PreTrainedTokenizerBase:
    model, world = recipe.models[recipe.root(name)], recipe.data.world.model_dump()
    assert model.tokenizer_source is not None
    own = load_tokenizer(model.tokenizer_source, revision=model.revision, world=world)
    if (other := tokens.tokenizer(name)) is None:
        return own
    chosen = load_tokenizer(other[0], revision=other[1], world=world)
    return own if vocabulary(chosen).extra(vocabulary(own)) is None else chosen


def _check_model(recipe: Recipe, name: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, Mapping[str, Any]]:
    model, root = recipe.models[name], recipe.models[recipe.root(name)]
    assert root.load is not None
    if root.load.startswith("scratch:"):
        config = scratch_config(root.load.removeprefix("scratch:"), root.config, tokenizer)
        check_scratch(config)
        rows = config.get_text_config().vocab_size
    elif model.serve:
        config = fetch_config(root.load, root.revision)
        rows = head_shape(config)[0]
    else:
        if described := description_file(root.load, root.revision):
            check_config(described.parent, root.load)  # before its weights are downloaded
        read: Any = check_model(root.load, root.revision)
        config, rows = read.config, read.get_input_embeddings().weight.shape[0]
    _pruned(recipe, name, config)
    return rows, config.get_text_config().to_dict()


def _pruned(recipe: Recipe, name: str, root: PreTrainedConfig) -> PreTrainedConfig:
    # Checks all pruning of layers between the root of a model and the model. Returns the configuration with the layers of the model. Other
    # sizes than the number of layers stay those of the root.
    model = recipe.models[name]
    config = _pruned(recipe, model.parent, root) if model.parent else root
    if model.init is None:
        return config
    layers = model.init.layers
    if layers is None or model.init.layers_by == "influence":  # then training text decides which layers are kept
        layers = range(model.init.sizes.get("layers", depth(config)))
    return check_depth(config, layers)


def _check_packing(recipe: Recipe, name: str, config: Mapping[str, Any]) -> None:
    model = recipe.models[name]
    packed = any(method.optim.packed for method in methods(recipe)) or (model.sft and model.sft.optim.packed)
    if packed and not model.serve:  # a server does not pack
        check_packing(config["model_type"], name)


def _default_jobs() -> int:
    # This number must not depend on the stages that are left. It decides a stage's number of threads, and a resumed run must add floats in
    # the same order.
    return schedule.gpus() or cores()


def _check_memory(plan: Plan, jobs: int) -> None:
    gpus, free = schedule.inspect_gpus(), available_memory()
    if not gpus:
        _check_needs(plan, {key: host_bytes(plan, stage, cuda=False) for key, stage in plan.stages.items()}, free, jobs)
        return
    size = min(gpu.memory for gpu in gpus)
    needs = {key: process_bytes(plan, stage, cuda=True, of_gpu=size) or 0.0 for key, stage in plan.stages.items()}
    _check_needs(plan, needs, min(gpu.free for gpu in gpus), -(-jobs // len(gpus)), where=_OF_GPU, times=len(gpus))
    needs = {key: host_bytes(plan, stage, cuda=True) for key, stage in plan.stages.items()}
    _check_needs(plan, needs, free, jobs, where="memory of this machine")


def _check_needs(plan: Plan, needs: Mapping[str, float], free: int, jobs: int, *, where: str = "memory", times: int = 1) -> None:
    # there are `times` memories (GPUs, or the one of the host) with `free` bytes each, and `jobs` stages share each of them
    if not needs:
        return
    most = max(needs, key=lambda key: needs[key])
    less = f"lower runtime.vllm.memory, {_LESS_MEMORY}" if where == _OF_GPU and uses_vllm(plan.stages[most].spec) else _LESS_MEMORY
    check_memory({plan.stages[most].label: needs[most]}, free, less, where)
    group = _largest_group(plan, needs, jobs)
    if sum(group.values()) > free:
        fits = max(n for n in range(1, jobs) if sum(_largest_group(plan, needs, n).values()) <= free)
        advice = f"set runtime.jobs={fits * times} (now {jobs * times}), or use a machine with more memory"
        check_memory({plan.stages[key].label: need for key, need in group.items()}, free, advice, where)


def _largest_group(plan: Plan, needs: Mapping[str, float], jobs: int) -> dict[str, float]:
    # a greedy search for at most `jobs` stages that can run at the same time and together need the most memory
    above = {key: with_ancestors(plan.stages, [key]) for key in needs}
    order, best = sorted(needs, key=lambda key: -needs[key]), {}
    for first in order[:_STARTS]:
        group = {first: needs[first]}
        for key in order:
            if len(group) < jobs and all(key not in above[other] and other not in above[key] for other in group):
                group[key] = needs[key]
        best = max(best, group, key=lambda group: sum(group.values()))
    return best
