"""Load the dev results of earlier studies as evidence for forecasts.

`twins.pair_up` pairs each chain (a path with assistants) with direct distillation of the same compute and settings. Test
results are used only for the uncertainty of a difference (`Observation.reported`).
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from itertools import pairwise
from math import isfinite
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tadistill.config import ModelConfig
from tadistill.config.arm import direct_arm
from tadistill.config.model import origin
from tadistill.disk import damaged, read_json
from tadistill.errors import ConfigError, StoreError, TadistillError
from tadistill.metrics import NOT_COMPARABLE, higher_is_better
from tadistill.results.measured import settings_over_spans, training_settings
from tadistill.results.study import ArmRecord, StudyPlan, load_plan
from tadistill.runner.local import ADVICE
from tadistill.statistics import spread_claimed
from tadistill.store import MANIFEST, STAGE, Store, key_of, plan_again, store_of
from tadistill.text import counted


@dataclass(frozen=True)
class EdgeMeasures:
    """Measures of a teacher and a learner. None means not measured. KLs are in nats per token. k is `advise.measures.TOP_K`."""

    size_ratio: float | None = None
    """The teacher's number of parameters divided by that of the model which learns from it."""
    reverse_kl: float | None = None
    """KL(learner || teacher) on the learner's samples, before distillation."""
    forward_kl: float | None = None
    """KL(teacher || learner) on the reference answers."""
    overlap: float | None = None
    """Share of the learner's k most likely tokens that are also among the teacher's, on the learner's samples."""
    mass: float | None = None
    """Total probability that the learner gives to the teacher's k most likely tokens, on the learner's samples."""
    entropy_gap: float | None = None
    """Entropy of the teacher minus entropy of the learner in nats per token, on the learner's samples."""
    loss_ratio: float | None = None
    """Loss of the teacher divided by loss of the learner, on the reference answers."""
    advantage: float | None = None
    """Mean of log p_teacher - log p_learner per token of the reference answers."""
    bias: float | None = None
    """Mean of log p_teacher - log p_original per token of the learner's samples. p_original is the original teacher."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None and not isfinite(value):
                raise ConfigError(f"the measure {name} is {value}; give a finite number, or None if it was not measured")
        for name in ("size_ratio", "loss_ratio"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"the measure {name} is {value}; give a positive number")


@dataclass(frozen=True)
class Edge:
    """A teacher and the model that it teaches (its learner)."""

    teacher: str
    learner: str
    measures: EdgeMeasures = field(default_factory=EdgeMeasures)


@dataclass(frozen=True)
class Candidate:
    """A path that may be run. `cost` is its training compute divided by the training compute of the direct path."""

    path: tuple[str, ...]
    cost: float
    edges: tuple[Edge, ...]
    """One edge for each step of the path, in the same order."""


@dataclass(frozen=True)
class Settings:
    """The settings of a training (`training_settings`), and the updates of direct distillation in its study: JSON texts by field."""

    own: Mapping[str, str] = field(default_factory=dict)
    spans: Mapping[str, str] = field(default_factory=dict)
    """The settings that the training has if its teacher has another tokenizer."""
    over_spans: bool = False
    """True if its teacher has another tokenizer."""

    @classmethod
    def read(cls, store: Store, key: str, direct: int) -> "Settings":
        """Read the settings of a distillation. `direct` is the number of updates of direct distillation in its study."""
        settings = training_settings(store, key) | {"direct": direct}
        own, spans = (dict(_flat(found)) for found in (settings, settings_over_spans(settings)))
        return cls(own, spans, bool(read_json(store.folder(key) / STAGE)["spec"].get("teacher_data")))

    @cached_property
    def digest(self) -> str:
        return key_of(dict(self.own))


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for part, inner in value.items():
            yield from _flat(inner, f"{name}.{part}" if name else part)
    else:
        yield name, json.dumps(value, sort_keys=True)


@dataclass(frozen=True)
class Observation:
    """The dev result of one trained path (an arm of an earlier study) for one training seed."""

    family: str
    """Name of the family (`family_of`). Runs of one family share teacher, data and method, so they are not independent evidence."""
    path: tuple[str, ...]
    seed: int
    edges: tuple[Edge, ...]
    cost: float
    """Training compute divided by the training compute of direct distillation in the same study."""
    quality: float
    """The dev metric of the selected checkpoint. Higher is better."""
    scale: str
    """The name of the metric in `quality`."""
    study: str = ""
    reported: float = 0.0
    """Standard deviation of the arm's difference to its baseline on the test sets, from the study's report. It is 0 without a report."""
    settings: Settings = field(default_factory=Settings)
    """Results are compared if their settings are equal."""


# --- reading studies ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class History:
    """The results of earlier studies (observations), and the reasons why some could not be used."""

    observations: tuple[Observation, ...]
    left_out: tuple[str, ...]
    """One sentence for each study or arm that could not be used."""
    stages: frozenset[str] = frozenset()
    """Keys of the trainings whose results these are."""

    def on(self, scale: str) -> tuple[Observation, ...]:
        """Return the observations whose metric is `scale`."""
        return tuple(o for o in self.observations if o.scale == scale)


def history(runs: Path) -> History:
    """Load the results of all finished arms (distilled paths) of the studies in a directory. Each training seed of an arm is one result.

    The plans that a study had before its last command (STUDY/earlier) count, too. A training that two plans or studies share gives only one
    result. Raises StoreError if `runs` is not a directory.
    """
    if not runs.is_dir():
        raise StoreError(f"{runs} is not a directory; give the --runs directory of earlier studies")
    found: dict[str, Observation] = {}
    left_out: list[str] = []
    for path in sorted(runs.glob("*/plan.json")):
        for plan, folder in _plans(path.parent, left_out):
            try:
                models = _models(plan, folder)
                measures, reported = load_measures(path.parent), _reported(folder)
            except TadistillError as error:
                left_out.append(str(error))
                continue
            for arm in plan.arms:
                if len(arm.path) > 1:
                    _read_arm(plan, arm, models, measures, store_of(runs), found, left_out)
                for key in {key for key in arm.final.values() if key in found and found[key].study == plan.study}:
                    known = found[key].reported or reported.get((arm.name, found[key].scale), 0.0)
                    found[key] = replace(found[key], reported=known)
    return History(tuple(found.values()), tuple(dict.fromkeys(left_out)), frozenset(found))


def _plans(study: Path, left_out: list[str]) -> list[tuple[StudyPlan, Path]]:
    # a command with other arms or seeds moves the plan and the report before it to STUDY/earlier/KEY
    found = []
    for folder in (study, *sorted(path.parent for path in study.glob("earlier/*/plan.json"))):
        try:
            found.append((load_plan(folder), folder))
        except TadistillError as error:
            left_out.append(str(error))
    return sorted(found, key=lambda each: -max((len(arm.final) for arm in each[0].arms), default=0))  # the report of most seeds counts


def family_of(models: Mapping[str, ModelConfig], parameters: Mapping[str, int], teacher: str, train: str, method: str) -> str:
    """Return the name of a run's family. Runs of a family have the same original teacher, training data and last method.

    Args:
        models: the recipe's models.
        parameters: the number of parameters of each model.
        teacher: the first model of the path.
        train: the source of the training data (`data.train.load`).
        method: the method of the path's last step, such as ``minillm (teacher_mixed)``.
    """
    return f"{origin(models, teacher)} ({parameters[teacher]:,} parameters); {train}; {method}"


def edge_record(edge: Edge) -> dict[str, Any]:
    """Convert an edge (teacher, learner and measures) to a dict for JSON. `load_measures` reads it."""
    return {"teacher": edge.teacher, "learner": edge.learner, "measures": asdict(edge.measures)}


def load_measures(study_dir: Path) -> dict[tuple[str, str], EdgeMeasures]:
    """Read the measures of each (teacher, learner) from a study's advice.json. The result is empty if this file does not exist."""
    path = study_dir / ADVICE
    if not path.is_file():
        return {}
    content, known = read_json(path), {f.name for f in fields(EdgeMeasures)}  # other versions may have written other measures
    try:
        return {
            (e["teacher"], e["learner"]): EdgeMeasures(**{name: value for name, value in e["measures"].items() if name in known})
            for e in content["edges"]
        }
    except (KeyError, TypeError, AttributeError, ConfigError) as error:
        raise StoreError(f"{path} is damaged ({type(error).__name__}: {error}); run `tadistill advise RECIPE` to write it again") from error


def _reported(study_dir: Path) -> dict[tuple[str, str], float]:
    """Return the standard error of the difference between each chain (path with assistants) and direct distillation.

    The standard errors are computed from the intervals and p-values in the study's ``results.json``. The keys are (name of the chain,
    metric). The result is empty if the file does not exist.
    """
    path, again = study_dir / "results.json", "write the report again with `tadistill report STUDY`"
    if not path.is_file():
        return {}
    content = read_json(path, fix=again)
    try:
        return {
            (c["arm"], c["metric"]): spread_claimed(c["mean"], (c["high"] - c["low"]) / 2, c["p"])
            for c in content["comparisons"]
            if c["against"] != "pair" and c["low"] is not None
        }
    except (KeyError, TypeError) as error:
        raise damaged(path, f"{type(error).__name__}: {error}", again) from error


def path_edges(path: tuple[str, ...], parameters: Mapping[str, int], measures: Mapping[tuple[str, str], EdgeMeasures]) -> tuple[Edge, ...]:
    """Return an edge (teacher, learner and measures) for each pair of neighbours in a path. Size ratios come from `parameters`. Measures
    with another size ratio are not used, because they are those of other models with the same names."""
    found = []
    for a, b in pairwise(path):
        ratio, known = parameters[a] / parameters[b], measures.get((a, b), EdgeMeasures())
        found.append(Edge(a, b, replace(known if known.size_ratio in (None, ratio) else EdgeMeasures(), size_ratio=ratio)))
    return tuple(found)


def _models(plan: StudyPlan, folder: Path) -> dict[str, ModelConfig]:
    try:
        return {name: ModelConfig.model_validate(model) for name, model in plan.recipe["models"].items()}
    except ValidationError as error:
        problems = counted(error.error_count(), "problem")
        raise StoreError(f"the models in {folder / 'plan.json'} cannot be read ({problems}); {plan_again(folder)}") from error


def _read_arm(
    plan: StudyPlan,
    arm: ArmRecord,
    models: Mapping[str, ModelConfig],
    measures: Mapping[tuple[str, str], EdgeMeasures],
    store: Store,
    found: dict[str, Observation],
    left_out: list[str],
) -> None:
    name = f"{plan.study}: arm {arm.name}"
    if not arm.is_plain:
        left_out.append(f"{name} is `{arm.path_text}`; only a plain path, in which each model teaches the next one, can be used")
        return
    direct = direct_arm(plan.arms, arm.path[0], arm.path[-1], arm.method)
    if direct is None or direct.flops is None or arm.flops is None or not all(plan.parameters[model] for model in arm.path):
        left_out.append(
            f"{name} has an unknown relative cost: the study has no direct arm of the same models and method, or FLOPs or sizes are unknown"
        )
        return
    edges = path_edges(arm.path, plan.parameters, measures)
    family = family_of(models, plan.parameters, arm.path[0], plan.train_source, arm.method)
    cost, updates = arm.flops / direct.flops, sum(phase.updates for phase in direct.phases)
    for seed, key in arm.final.items():
        if key is None or not store.finished(key):
            left_out.append(f"{name}, seed {seed}, is not finished")
            continue
        try:
            metric, value, settings = _dev_result(store, key, updates)
        except StoreError as error:
            left_out.append(str(error))
            continue
        if metric in NOT_COMPARABLE or value is None:
            why = f"its checkpoint was selected by `{metric}`, which cannot compare students of different teachers"
            left_out.append(f"{name}, seed {seed}: {why}")
            continue
        quality = value if higher_is_better(metric) else -value
        result = Observation(family, arm.path, seed, edges, cost, quality, metric, plan.study, settings=settings)
        found.setdefault(key, result)


def _dev_result(store: Store, key: str, direct: int) -> tuple[str, float | None, Settings]:
    folder = store.folder(key)
    try:
        metric = read_json(folder / STAGE)["spec"]["select"]["metric"]
        value = read_json(folder / MANIFEST)["best_value"]
        return str(metric), None if value is None else float(value), Settings.read(store, key, direct)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(f"{folder} is damaged ({type(error).__name__}: {error}); delete this folder and run the recipe again") from error
