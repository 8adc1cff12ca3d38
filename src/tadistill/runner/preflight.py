"""Everything that can be checked before a study starts: data, models on disk, tokenizers, memory.

A mistake found here costs a second; found in the sixth stage it costs the first five.
"""

import importlib.util

import torch
from transformers import PreTrainedTokenizerBase

from tadistill.config import Recipe
from tadistill.config.common import Decoding
from tadistill.config.method import apply
from tadistill.config.recipe import methods
from tadistill.data import datasets
from tadistill.data.templates import encode
from tadistill.errors import ConfigError
from tadistill.models.counting import sizes
from tadistill.models.counting.adapters import Adapters, with_adapters
from tadistill.models.counting.memory import check_memory, resident_bytes
from tadistill.models.loading import check_same_tokenizer, load_tokenizer, scratch_config
from tadistill.models.pruning import keep_list
from tadistill.plan.arms import make_plan, original_teacher
from tadistill.plan.costs import Ledger
from tadistill.plan.layout import layout
from tadistill.plan.throughput import cores


def check(recipe: Recipe) -> int:
    """Check a recipe against this machine; returns how many stages may run at the same time.

    Raises:
        ConfigError, DataError, ModelError: in one sentence, before anything is written.
    """
    check_inputs(recipe)
    _check_engine(recipe)
    _check_memory(recipe, _used(recipe))
    return recipe.runtime.jobs or _default_jobs()


def check_inputs(recipe: Recipe) -> None:
    """Check what does not depend on the machine that trains: data, tokenizers, encodings, models.

    Raises:
        ConfigError, DataError, ModelError: in one sentence.
    """
    datasets.check(recipe)
    _check_peft(recipe)
    for stage in make_plan(recipe).stages.values() if recipe.resources else ():
        layout(recipe, stage)
    teacher, used = original_teacher(recipe), _used(recipe)
    tokenizers = {name: _tokenizer(recipe, name) for name in used}
    if teacher:  # without one, models are only evaluated, each by itself
        check_same_tokenizer(tokenizers)
    longest = max(_check_encoding(recipe, tokenizers[name]) for name in (used[:1] if teacher else used))
    for name in used:
        _check_model(recipe, name, tokenizers[name], longest)


def _used(recipe: Recipe) -> list[str]:
    """Models that an arm, or every KL, needs."""
    teacher = original_teacher(recipe)
    return [name for name in recipe.models if name == teacher or any(name in arm.models for arm in recipe.arms.values())]


def _check_engine(recipe: Recipe) -> None:
    wanted = any(method.sampler.vllm for method in methods(recipe))
    if wanted and not (importlib.util.find_spec("vllm") and torch.cuda.is_available()):
        raise ConfigError("a sampler has engine vllm, which needs CUDA and `pip install 'tadistill[vllm]'`; set engine: native")


def _check_peft(recipe: Recipe) -> None:
    wanted = [name for name, model in recipe.models.items() if model.lora]
    if wanted and not importlib.util.find_spec("peft"):
        raise ConfigError(f"models.{wanted[0]} has lora, which needs `pip install 'tadistill[lora]'`; install it, or leave lora out")


def _tokenizer(recipe: Recipe, name: str) -> PreTrainedTokenizerBase:
    model = recipe.models[_root(recipe, name)]
    assert model.tokenizer_source is not None
    return load_tokenizer(model.tokenizer_source, revision=model.revision, world=recipe.data.world.model_dump())


def _check_model(recipe: Recipe, name: str, tokenizer: PreTrainedTokenizerBase, prompt: int) -> None:
    """A scratch configuration, a keep-list, and room for the longest prompt with its answer."""
    model = recipe.models[name]
    if model.load and model.load.startswith("scratch:"):
        scratch_config(model.load.removeprefix("scratch:"), model.config, tokenizer)
    ledger = Ledger(recipe)
    config = ledger.config(name)
    if model.init:
        parent = ledger.config(model.init.from_) or {}
        if layers := parent.get("num_hidden_layers", parent.get("n_layer")):
            keep_list(layers if model.init.layers is None or model.init.layers_by == "influence" else model.init.layers, layers)
    positions = (config or {}).get("max_position_embeddings", (config or {}).get("n_positions"))
    samplers = [method.sampler for method in methods(recipe)]
    longest = max([recipe.evaluate.max_new_tokens, *(s.max_new_tokens for s in samplers if isinstance(s, Decoding))])
    if positions and prompt + longest > positions:
        raise ConfigError(
            f"models.{name} has {positions} positions, but the longest prompt, {prompt}, and max_new_tokens, {longest}, are more; "
            "lower data.max_prompt or max_new_tokens"
        )


def _check_encoding(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> int:
    """The template works with the tokenizer, some row is short enough, and dev knows facts if they select.

    Returns the longest prompt, in tokens.
    """
    longest = 0
    data = recipe.data
    lengths = {"template": data.template, "max_prompt": data.max_prompt, "max_length": data.max_length}
    splits = {"train": data.train, "dev": data.dev}
    for role, ref in [*splits.items(), *(("test", r) for r in data.test)]:
        encoded = encode(datasets.load(ref, role, data), tokenizer, name=f"data set `{ref.name}` ({role})", **lengths)
        longest = max(longest, *(len(e.prompt) for e in encoded))
    selects = [*(method.select for method in methods(recipe)), *(m.sft.select for m in recipe.models.values() if m.sft)]
    if any(s.metric == "fact_accuracy" for s in selects) and not all(e.facts for e in datasets.load(data.dev, "dev", data)):
        raise ConfigError(f"a stage selects by fact_accuracy, but the dev set `{data.dev.name}` knows no facts; select by rouge_l or loss")
    return longest


def _root(recipe: Recipe, name: str) -> str:
    """The model whose weights a model comes from in the end."""
    parent = recipe.models[name].parent
    return _root(recipe, parent) if parent else name


def _default_jobs() -> int:
    """One stage a core, or one in all on a GPU. It must not depend on how many stages are left: a stage's number of
    threads follows from it, and a resumed run has to add up its floats in the same order.
    """
    if torch.cuda.is_available():
        return 1
    return cores()


def _check_memory(recipe: Recipe, used: list[str]) -> None:
    """The dearest stage of each arm: its learner in training beside its teacher, or its whole path and the original teacher at rest."""
    ledger, teacher = Ledger(recipe), original_teacher(recipe)
    found: dict[str, sizes.Size | None] = {name: ledger.size(name) for name in used}
    for arm in recipe.arms.values():
        for path in arm.path:
            for i, name in enumerate(path):
                trains = i > 0 or recipe.models[name].sft is not None or arm.objective is not None
                dense = i > 0 and apply(recipe.method, recipe.models[name].distill, arm.patch).dense
                others = list(path[:i] if dense else path[i - 1 : i])
                _check_stage(found, others, name, trains, ledger.adapters(name))
        if teacher:
            _check_stage(found, [teacher, *arm.last[:-1]], arm.last[-1], False)


def _check_stage(found: dict[str, sizes.Size | None], beside: list[str], name: str, trains: bool, adapters: Adapters | None = None) -> None:
    needs = {other: resident_bytes(size.total, training=False) for other in beside if (size := found[other])}
    if size := found[name]:
        total = with_adapters(size, adapters).total
        check_memory(needs | {name: resident_bytes(total, training=trains, adapters=adapters and adapters.trained)})
