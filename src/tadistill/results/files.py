"""What a report reads: the plan of a study and the finished stages in the store, as frozen dataclasses.

A stage counts as finished when its manifest exists (the manifest is written last). Anything that cannot be read is a
`StoreError` that names the file, because a report with a silent hole is worse than none.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tadistill.disk import damaged, read_json, read_jsonl
from tadistill.errors import ConfigError, StoreError
from tadistill.models.counting.cost import Cost, Part

Scores = dict[str, dict[str, NDArray[np.float64]]]  # set -> metric -> (prompts, decoding seeds)


@dataclass(frozen=True)
class Stage:
    """One unit of work of the plan; `arms` are the arms that need it."""

    key: str
    kind: str
    label: str
    model: str
    seed: int
    arms: tuple[str, ...]
    parents: tuple[str, ...]
    """The keys of the stages it builds on."""
    checkpoints: int
    """How many dev evaluations its selection chose among; 0 without selection."""
    flops: float | None
    """Of its training; None where the plan could not tell."""


@dataclass(frozen=True)
class Published:
    """What somebody else reported for an arm: set -> Rouge-L."""

    source: str
    rouge_l: Mapping[str, float]


@dataclass(frozen=True)
class Arm:
    """One named path and method; `evaluate`, `analyse`, `final` and each decoding of `also` map a training seed to a stage key."""

    name: str
    path: tuple[str, ...]
    """The path that ends with its model."""
    path_text: str
    """All of its edges as a recipe writes them: ``xl > l > s``."""
    models: tuple[str, ...]
    """All models that have a part in it."""
    method: str
    model: str
    compute: str | None
    flops: float | None
    evaluate: Mapping[int, str]
    analyse: Mapping[int, str]
    also: Mapping[str, Mapping[int, str]]
    final: Mapping[int, str | None]
    published: Published | None

    def measured_by(self, seed: int) -> tuple[str, ...]:
        """The keys of all stages that measure the arm's model of a training seed."""
        analyse = (self.analyse[seed],) if seed in self.analyse else ()
        return (self.evaluate[seed], *analyse, *(keys[seed] for keys in self.also.values()))

    @property
    def is_trained(self) -> bool:
        """True when the study trained its model, so that its seeds are training seeds."""
        return any(key is not None for key in self.final.values())

    @property
    def is_chain(self) -> bool:
        """True when at least one teacher assistant stands between the teacher and the student."""
        return len(self.path) > 2

    @property
    def is_plain(self) -> bool:
        """True when teaching along one path is all: no turns, no start from another model, one teacher a learner."""
        return self.path_text == " > ".join(self.path)

    @property
    def has_assistant(self) -> bool:
        """True when a teacher assistant has any part in it: as a link, as a start, or as a teacher for some time."""
        return len(self.models) > 2


@dataclass(frozen=True)
class Plan:
    """A study as it was expanded from its recipe."""

    study: str
    created: str
    command: str
    recipe_text: str
    recipe: Mapping[str, Any]
    """The resolved recipe as plain data."""
    teacher: str | None
    margin: float
    """Differences of the primary metric within this margin, in points, count as none."""
    decodings: Mapping[str, Mapping[str, Any]]
    """What each other decoding changes of the main one."""
    parameters: Mapping[str, int]
    stages: tuple[Stage, ...]
    arms: tuple[Arm, ...]

    def ancestors(self, key: str | None) -> list[Stage]:
        """The stage and all that it builds on; none for a model that is loaded as it is."""
        stages = {stage.key: stage for stage in self.stages}
        found: dict[str, Stage] = {}
        todo = [key] if key is not None else []
        while todo:
            at = todo.pop()
            if at in stages and at not in found:
                found[at] = stages[at]
                todo += stages[at].parents
        return list(found.values())


@dataclass(frozen=True)
class Manifest:
    """The part of a finished stage's manifest that a report shows."""

    seconds: float
    versions: Mapping[str, str]
    flops: float | None
    """Metered, of a training stage, without its dev evaluations; None where they were not metered."""


def find_study(study: str, root: Path) -> Path:
    """A study's directory from its name or its path.

    Raises:
        ConfigError: there is none.
    """
    for directory in (Path(study), root / study):
        if (directory / "plan.json").is_file():
            return directory
    raise ConfigError(f"there is no study `{study}` ({root / study / 'plan.json'} does not exist): `tadistill run RECIPE` makes one")


def load_plan(study_dir: Path) -> Plan:
    """Reads ``plan.json``; says what to run when there is none."""
    path = study_dir / "plan.json"
    if not path.is_file():
        raise StoreError(f"{path} does not exist, so there is no study to report: `tadistill run RECIPE` writes it")
    content = read_json(path)
    try:
        plan = Plan(
            study=content["study"],
            created=content["created"],
            command=content["command"],
            recipe_text=content["recipe_text"],
            recipe=content["recipe"],
            teacher=content["teacher"],
            margin=float(content["recipe"]["margin"]),
            decodings=content["recipe"]["evaluate"]["also"],
            parameters={name: int(model["parameters"]) for name, model in content["models"].items()},
            stages=tuple(_stage(entry) for entry in content["stages"]),
            arms=tuple(_arm(entry) for entry in content["arms"]),
        )
        for name in {name for arm in plan.arms for name in (*arm.path, arm.model)}:
            plan.parameters[name]  # an arm over an undeclared model is damage too
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(f"{path} is damaged ({type(error).__name__}: {error}): `tadistill run RECIPE` rewrites it") from error
    return plan


def _stage(entry: Mapping[str, Any]) -> Stage:
    key, kind, label, model = (entry[name] for name in ("key", "kind", "label", "model"))
    parents = tuple(entry["parents"].values())
    return Stage(key, kind, label, model, int(entry["seed"]), tuple(entry["arms"]), parents, int(entry["checkpoints"]), entry["flops"])


def _arm(entry: Mapping[str, Any]) -> Arm:
    published = entry["published"]
    return Arm(
        name=entry["name"],
        path=tuple(entry["path"]),
        models=tuple(entry.get("models", entry["path"])),
        path_text=entry.get("text") or " > ".join(entry["path"]),  # a plan of an earlier version has the path alone
        method=entry["method"],
        model=entry["model"],
        compute=entry["compute"],
        flops=entry["flops"],
        evaluate=_by_seed(entry["evaluate"]),
        analyse=_by_seed(entry["analyse"]),
        also={name: _by_seed(keys) for name, keys in entry["also"].items()},
        published=Published(published["source"], published["rouge_l"]) if published else None,
        final={int(seed): key for seed, key in entry["final"].items()},
    )


def _by_seed(keys: Mapping[str, str]) -> dict[int, str]:
    return {int(seed): key for seed, key in keys.items()}


def stage_dir(store_dir: Path, key: str) -> Path:
    """Where the store keeps a stage."""
    return store_dir / key[:2] / key


def is_finished(store_dir: Path, key: str) -> bool:
    """True when the stage's manifest is in place."""
    return (stage_dir(store_dir, key) / "manifest.json").is_file()


def load_manifest(store_dir: Path, key: str) -> Manifest | None:
    """The manifest of a stage, or None while it is not finished."""
    path = stage_dir(store_dir, key) / "manifest.json"
    if not path.is_file():
        return None
    content = read_json(path)
    try:
        versions = {str(k): str(v) for k, v in content["versions"].items()}
        parts = content["ledger"]["parts"] if "ledger" in content else {}
        metered = {name: Part(**part) for name, part in parts.items()}
        return Manifest(float(content["seconds"]), versions, Cost(metered).learning if metered else None)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise damaged(path, f"{type(error).__name__}: {error}") from error


def load_scores(store_dir: Path, key: str) -> Scores:
    """The scores of an evaluation as arrays (prompts, decoding seeds)."""
    path = stage_dir(store_dir, key) / "scores.json"
    content = read_json(path)
    if not isinstance(content, dict) or not all(isinstance(metrics, dict) for metrics in content.values()):
        raise damaged(path, "it must map sets to metrics")
    return {
        name: {metric: _score_array(path, name, metric, values) for metric, values in metrics.items()} for name, metrics in content.items()
    }


def load_corpus(store_dir: Path, key: str) -> dict[str, dict[str, Any]]:
    """What an evaluation says of whole sets: set -> numbers, calibration, reference_length."""
    path = stage_dir(store_dir, key) / "corpus.json"
    content = read_json(path)
    if not isinstance(content, dict) or not all(
        isinstance(found, dict) and {"numbers", "reference_length"} <= set(found) for found in content.values()
    ):
        raise damaged(path, "it must map sets to their numbers and reference lengths")
    return content


def load_exposure(store_dir: Path, key: str) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Set -> student and teacher -> kl and count, by position in the response."""
    return read_json(stage_dir(store_dir, key) / "exposure.json")


def _score_array(path: Path, name: str, metric: str, values: Any) -> NDArray[np.float64]:
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise damaged(path, f"{name}/{metric} is not a table of numbers") from error
    if array.ndim != 2 or array.size == 0:
        raise damaged(path, f"{name}/{metric} must have one row a prompt and one column a decoding seed")
    if not np.isfinite(array).all():
        raise damaged(path, f"{name}/{metric} holds NaN or infinite values")
    return array


def load_predictions(store_dir: Path, key: str) -> list[dict[str, Any]]:
    """Every prediction of an evaluation, in the order of the file."""
    return read_jsonl(stage_dir(store_dir, key) / "predictions.jsonl")


def load_metrics(store_dir: Path, key: str) -> dict[str, dict[int, float]]:
    """The training log of a stage: metric -> step -> value. After a resume the later line of a step wins."""
    path = stage_dir(store_dir, key) / "metrics.jsonl"
    series: dict[str, dict[int, float]] = {}
    for line in read_jsonl(path):
        if not isinstance(line.get("step"), int):
            raise damaged(path, "a line has no step")
        for name, value in line.items():
            if name != "step" and isinstance(value, int | float):
                series.setdefault(name, {})[line["step"]] = float(value)
    return {name: dict(sorted(points.items())) for name, points in series.items()}
