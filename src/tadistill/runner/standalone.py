"""Studies that train nothing: `tadistill eval MODEL` and `tadistill compare MODEL MODEL …` as recipes.

So an evaluated model gets all that an arm of a study gets: the store, resuming, intervals, the report.
"""

import re
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import yaml

from tadistill.errors import ConfigError

SUITE = ("dolly", "self_inst", "vicuna", "sinst", "uinst")
"""MiniLLM's five test sets."""


def recipe_text(models: Seq[str], on: Seq[str], *, seeds: Seq[int], teacher: str | None = None) -> str:
    """The YAML of a study that evaluates models as they are, each an arm of its own, under one decoding.

    Args:
        models: anything that `load:` of a recipe takes.
        on: test sets.
        seeds: decoding seeds.
        teacher: the model that KLs are measured to; it must share the models' tokenizer.
    """
    if not on:
        raise ConfigError(f"--on names no test set; give some, for instance --on {','.join(SUITE[:2])}")
    sources = list(models) + ([teacher] if teacher and teacher not in models else [])
    names = _names(sources)
    arms = names[: len(models)]
    content: dict[str, Any] = {
        "study": f"{'eval' if len(models) == 1 else 'compare'}-{'-'.join(arms)}"[:80],
        "seeds": [0],
        "models": {name: {"load": load} for name, load in zip(names, sources, strict=True)},
        # nothing trains, so train and dev are only there to be checked
        "data": {"train": {"load": on[0], "split": "test"}, "dev": {"load": on[0], "split": "test"}, "test": list(on)},
        "evaluate": {"seeds": list(seeds), "also": {}},
        "runtime": {"jobs": 1},  # few stages: each gets all cores
        "arms": dict(zip(arms, arms, strict=True)),
    }
    if teacher:
        content["teacher"] = names[sources.index(teacher)]
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _names(models: Seq[str]) -> list[str]:
    """Short names: the last part of each source, numbered where two are the same."""
    if len(set(models)) < len(models):
        raise ConfigError(f"a model is given twice in {', '.join(models)}; every model is one column")
    short = [re.sub(r"[^A-Za-z0-9._-]+", "-", Path(m.rstrip("/")).name).strip("-.") or "model" for m in models]
    names: list[str] = []
    for name in short:
        numbered = (f"{name}-{i}" for i in range(2, len(short) + 2))
        names.append(name if name not in names else next(n for n in numbered if n not in names and n not in short))
    return names
