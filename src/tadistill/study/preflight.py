"""Everything that can be checked before a study starts: data, models on disk, tokenizers, memory.

A mistake found here costs a second; found in the sixth stage it costs the first five.
"""

import os

import torch

from tadistill.config import Recipe
from tadistill.models import sizes
from tadistill.models.loading import check_same_tokenizer, load_tokenizer
from tadistill.models.memory import check_memory, resident_bytes
from tadistill.study.costs import Ledger, check_data


def check(recipe: Recipe) -> int:
    """Check a recipe against this machine; returns how many stages may run at the same time.

    Raises:
        ConfigError, DataError, ModelError: in one sentence, before anything is written.
    """
    check_data(recipe)
    used = [name for name in recipe.models if any(name in arm.path for arm in recipe.arms.values())]
    world = recipe.data.world.model_dump()
    tokenizers = {}
    for name in used:
        model = recipe.models[_root(recipe, name)]
        assert model.load is not None
        tokenizers[name] = load_tokenizer(model.tokenizer or model.load, revision=model.revision, world=world)
    check_same_tokenizer(tokenizers)
    _check_memory(recipe, used)
    return recipe.runtime.jobs or _default_jobs()


def _root(recipe: Recipe, name: str) -> str:
    """The model whose weights a pruned model comes from in the end."""
    init = recipe.models[name].init
    return _root(recipe, init.from_) if init else name


def _default_jobs() -> int:
    """One stage a core, or one in all on a GPU. It must not depend on how many stages are left: a stage's number of
    threads follows from it, and a resumed run has to add up its floats in the same order.
    """
    if torch.cuda.is_available():
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_memory(recipe: Recipe, used: list[str]) -> None:
    """The dearest stage needs its learner in training and its teacher at rest."""
    ledger = Ledger(recipe)
    found: dict[str, sizes.Size | None] = {name: ledger.size(name) for name in used}
    for arm in recipe.arms.values():
        for above, name in zip((None, *arm.path), arm.path, strict=False):
            size, teacher = found[name], found[above] if above else None
            if size is None:
                continue
            trains = above is not None or recipe.models[name].sft is not None or arm.objective is not None
            needs = {name: resident_bytes(size.total, training=trains)}
            if above and teacher:
                needs[above] = resident_bytes(teacher.total, training=False)
            check_memory(needs)
