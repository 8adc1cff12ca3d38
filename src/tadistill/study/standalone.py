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
    names = _names(models)
    content: dict[str, Any] = {
        "study": f"{'eval' if len(models) == 1 else 'compare'}-{'-'.join(names)}"[:80],
        "seeds": [0],
        "models": {name: {"load": load} for name, load in zip(names, models, strict=True)},
        # nothing trains, so train and dev are only there to be checked
        "data": {"train": {"load": on[0], "split": "test"}, "dev": {"load": on[0], "split": "test"}, "test": list(on)},
        "evaluate": {"seeds": list(seeds), "also": {}},
        "runtime": {"jobs": 1},  # few stages: each gets all cores
        "arms": dict(zip(names, names, strict=True)),
    }
    if teacher:
        known = dict(zip(models, names, strict=True))
        content["teacher"] = known.get(teacher, "teacher")
        content["models"].setdefault(content["teacher"], {"load": teacher})
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _names(models: Seq[str]) -> list[str]:
    """Short names: the last part of each source, numbered where two are the same."""
    if len(set(models)) < len(models):
        raise ConfigError(f"a model is given twice in {', '.join(models)}; every model is one column")
    short = [re.sub(r"[^A-Za-z0-9._-]+", "-", Path(m.rstrip("/")).name).strip("-.") or "model" for m in models]
    return [name if short.count(name) == 1 else f"{name}-{short[: i + 1].count(name)}" for i, name in enumerate(short)]
