"""Read what finished stages measured: the scores of each prompt, the values of each test set as a whole, and the predictions.

The manifests of stages have the rows and FLOPs that were really used, which the plan can only predict. results.json has the differences
of the last report.

If a file cannot be read, a `StoreError` names it, because a report must not leave out numbers silently. The store compares the digests of
these files with those that their stages wrote (`Store.artifact`), so their form is not checked again here.

Arms are compared on rows that all of them answered. A model whose tokenizer makes longer prompts leaves out more rows, so the files of two
arms may have different rows. Scores are therefore paired by the number of the row in its split (from 0), not by their position in a file.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tadistill.config.method_rules import minillm_over_spans
from tadistill.data.encoding_rules import Counts
from tadistill.disk import damaged, read_json, stream_jsonl
from tadistill.errors import StoreError
from tadistill.metrics import MEAN, metric_of
from tadistill.models.flops_and_memory import Cost, CostPart
from tadistill.results.study import ArmRecord, StageRecord, StudyPlan
from tadistill.statistics import ROUNDING
from tadistill.store import MANIFEST, STAGE, Store
from tadistill.text import counted, form

Scores = dict[str, dict[str, NDArray[np.float64]]]  # set -> metric -> (prompts, decoding seeds)
READ = ("scores.json", "corpus.json", "exposure.json", "predictions.jsonl", "metrics.jsonl")
"""The files of stages that a report reads."""


def load_scores(store: Store, key: str) -> Scores:
    """Read the scores of an evaluation as arrays (prompts, decoding seeds).

    Raises:
        StoreError: the file has changed or is damaged, or contains a metric that this version does not know.
    """
    path = store.artifact(key, "scores.json")
    content = read_json(path, fix=store.redo(key))
    if MEAN in content:
        raise StoreError(f"{path} has a test set called `{MEAN}`, which means the mean over all test sets; rename the set and run it again")
    found: Scores = {name: {} for name in content}
    for name, metrics in content.items():
        for metric, values in metrics.items():
            _check_known(path, metric)
            array = np.asarray(values, dtype=np.float64)
            if not np.isfinite(array).all():
                raise damaged(path, f"{name}/{metric} contains NaN or infinite values", store.redo(key))
            _check_bounds(path, metric, array)
            found[name][metric] = array
    return found


def _check_bounds(path: Path, metric: str, values: NDArray[np.float64]) -> None:
    low, high = metric_of(metric).bounds
    if np.isinf(high):
        return
    wrong = values[(values < low - ROUNDING) | (values > high + ROUNDING)]
    if wrong.size:
        raise StoreError(
            f"{path}: {counted(wrong.size, 'score')} of `{metric}` {form(wrong.size, 'lies', 'lie')} outside {low:g} to {high:g}, the "
            f"bounds of its unit `{metric_of(metric).unit}`, for instance {wrong[0]:g}; give the metric another `unit` in the recipe"
        )


def load_corpus(store: Store, key: str) -> dict[str, dict[str, Any]]:
    """Read what an evaluation measured on each test set as a whole. The result maps the name of a set to its values.

    The keys of the values are `numbers`, `calibration`, `reference_length`, `rows` and `unseen`.
    """
    path = store.artifact(key, "corpus.json")
    content = read_json(path, fix=store.redo(key))
    for metric in (metric for found in content.values() for metric in found["numbers"]):
        _check_known(path, metric)
    return content


def _check_known(path: Path, metric: str) -> None:
    try:
        metric_of(metric)
    except StoreError as error:
        raise StoreError(f"{path}: {error}") from error


def stream_predictions(store: Store, key: str) -> Iterator[dict[str, Any]]:
    """Yield the predictions of an evaluation, in the order of the file. The file can be long, so it is read line by line.

    Raises:
        StoreError: the file is missing, damaged or empty.
    """
    row, file, fix = None, store.artifact(key, "predictions.jsonl"), store.redo(key)
    for _, row in stream_jsonl(file, fix=fix):
        yield row
    if row is None:  # an evaluation has at least one prompt
        raise damaged(file, "it is empty", fix)


@dataclass(frozen=True)
class StageManifest:
    """The facts about a finished stage that a report shows. They are in its manifest.json."""

    seconds: float
    versions: Mapping[str, str]
    flops: float | None
    """FLOPs that were counted during training, without evaluations on dev. None if they were not counted."""
    counts: Mapping[tuple[str, str], Counts]
    """Maps a role (train, dev or test) and a set to its numbers of rows. Empty if an earlier version made the stage."""
    checkpoints: int | None
    """Number of dev evaluations of a stage that stopped early. None for other stages."""
    notes: tuple[str, ...] = ()
    """Sentences of the stage about its result, without a full stop."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Maps a test set to the number of rows that were left out. An earlier version recorded only this number, without `counts`."""


def load_manifests(store: Store, stages: Iterable[StageRecord]) -> dict[str, StageManifest]:
    """Read the manifests of all finished stages. The result maps the key of a stage to its manifest.

    Raises:
        StoreError: a manifest is damaged.
    """
    return {stage.key: _load_manifest(store, stage.key) for stage in stages if store.finished(stage.key)}


def _load_manifest(store: Store, key: str) -> StageManifest:
    path = store.folder(key) / MANIFEST
    content = read_json(path)
    try:
        versions = {str(k): str(v) for k, v in content["versions"].items()}
        parts = content["ledger"]["parts"] if "ledger" in content else {}
        metered = {name: CostPart(**part) for name, part in parts.items()}
        rows = [dict(row) for row in content.get("rows", ())]
        counts = {(row.pop("role"), row.pop("set")): Counts(**row) for row in rows}
        metered_flops = Cost(metered).learning if metered else None
        early = int(content["checkpoints"]) if content.get("stopped_early") else None
        notes, left_out = tuple(map(str, content.get("notes", ()))), content.get("left_out", {})
        return StageManifest(float(content["seconds"]), versions, metered_flops, counts, early, notes, left_out)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise damaged(path, f"{type(error).__name__}: {error}", store.redo(key)) from error


_OF_PATH = (
    *("seed", "teacher", "assistants", "responses", "signal", "assistant_responses", "assistant_signals"),
    *("teacher_data", "over_spans"),  # of a teacher with another tokenizer
)
_OF_COMPUTE = ("steps", "epochs", "warmup", "every")  # of a distillation
_OF_MEMORY = ("micro_batch", "tokens", "packed", "gradient_checkpointing")  # they change rounding, and which masks dropout draws


def training_settings(store: Store, key: str) -> dict[str, Any]:
    """Return the settings of a distillation and of the trainings that made its student, without seeds, teachers and numbers of updates. So
    two distillations with equal settings can be compared at equal compute."""
    stage = _stage(store, key)
    kept = {name: value for name, value in stage["spec"].items() if name not in _OF_PATH}
    compute = () if stage.get("kind") == "sft" else _OF_COMPUTE
    for part in ("optim", "select"):
        kept[part] = {name: value for name, value in kept.get(part, {}).items() if name not in (*compute, *_OF_MEMORY)}
    kept["data"] = {name: value for name, value in kept.get("data", {}).items() if name != "context"}
    return kept | {"context": _context(store, stage["spec"]), "student": _origin(store, kept.get("student"))}


def settings_over_spans(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `training_settings` that a distillation has if its teacher has another tokenizer (`config.method_rules.over_spans`)."""
    found = {name: settings_over_spans(value) if isinstance(value, dict) else value for name, value in settings.items()}
    method = found.get("method")
    if isinstance(method, dict) and (objective := method.get("objective") or {}).get("type") == "minillm":
        method["objective"] = objective | minillm_over_spans(objective["length_normalisation"])
    return found


def _stage(store: Store, key: str) -> dict[str, Any]:
    return read_json(store.folder(key) / STAGE, fix=store.redo(key))


def _context(store: Store, spec: Mapping[str, Any]) -> Any:
    # a teacher with another tokenizer reads its own prompt in `teacher_data`, or in a stage before, which has its answers
    found = next((read["context"] for name in ("data", "teacher_data", "asked") if (read := spec.get(name) or {}).get("context")), None)
    before = spec.get("responses") or spec.get("answers")
    if found or not before or not (store.folder(before["stage"]) / STAGE).is_file():
        return found
    return _context(store, _stage(store, before["stage"])["spec"])


def _origin(store: Store, made: Any) -> Any:
    if not isinstance(made, dict):
        return made
    found = {name: _origin(store, value) for name, value in made.items() if name != "seed"}
    return found | {"stage": training_settings(store, made["stage"])} if "stage" in made else found


Rows = NDArray[np.int64]


@dataclass(frozen=True)
class UsedRows:
    """The counts of rows of one split: how many were used, and how many were left out for which reason. Arms (paths of
    models) with different counts have separate `UsedRows`."""

    role: str
    """The part of the data: train, dev or test."""
    set: str
    counts: Counts
    arms: tuple[str, ...]
    """The arms that used these rows. Empty if all arms used the same rows."""
    compared: int
    """Number of rows that all arms answered. Arms are compared on these rows."""

    @property
    def text(self) -> str:
        """Return text such as ``dolly (test): 476 of 500 rows; 24 longer than data.max_prompt (256)``.

        It is empty if no row was left out or cut.
        """
        whole = self.counts.text
        if self.compared < self.counts.used:
            whole = (
                f"{whole or counted(self.counts.used, 'row')}; arms are compared on the {counted(self.compared, 'row')} that all models "
                "answered"
            )
        arms = f", {', '.join(self.arms)}" if self.arms else ""
        return f"{self.set} ({self.role}{arms}): {whole}" if whole else ""

    @property
    def record(self) -> dict[str, Any]:
        """Return the numbers as an entry of ``results.json``."""
        return {
            "role": self.role,
            "set": self.set,
            **asdict(self.counts),
            "used": self.counts.used,
            "compared": self.compared,
            "arms": list(self.arms),
        }


def load_rows(store: Store, key: str, corpus: Mapping[str, Mapping[str, Any]]) -> dict[str, Rows]:
    """Return the numbers of the rows that an evaluation answered, for each test set, in the order of its scores.

    `corpus` is the content of the evaluation's corpus.json. If an earlier version of tadistill wrote it without row numbers, they are read
    from the predictions.
    """
    if all("rows" in found for found in corpus.values()):
        return {name: np.asarray(found["rows"], dtype=np.int64) for name, found in corpus.items()}
    rows: dict[tuple[str, int], list[int]] = {}
    for row in stream_predictions(store, key):
        rows.setdefault((row["set"], row["seed"]), []).append(row["index"])
    first: dict[str, Rows] = {}
    for (name, _), found in rows.items():
        first.setdefault(name, np.asarray(found, dtype=np.int64))
    return first


def shared_rows(rows: Mapping[str, Mapping[str, Rows]], store: Store) -> dict[str, Rows]:
    """Return, for each test set, the row numbers (places in the split, from 0) of the rows that all evaluations answered.

    `rows` maps the stage key of an evaluation and a set to the row numbers that this evaluation answered.

    Raises:
        StoreError: the evaluations of a set have no row in common.
    """
    shared: dict[str, Rows] = {}
    for of_stage in rows.values():
        for name, of_set in of_stage.items():
            shared[name] = np.intersect1d(shared[name], of_set) if name in shared else of_set
    for name, of_set in shared.items():
        if not len(of_set):
            stages = ", ".join(store.label(key) for key, of_stage in rows.items() if name in of_stage)
            raise StoreError(
                f"the evaluations of {name} have no row in common ({stages}), so arms cannot be compared; raise data.max_prompt, so that "
                "fewer long prompts are left out"
            )
    return shared


def places(answered: Rows, chosen: Rows) -> NDArray[np.intp]:
    """Return the indices of the row numbers `chosen` in the array `answered`. The index of the lowest row number comes first."""
    order = np.argsort(answered, kind="stable")
    return order[np.isin(answered[order], chosen)]


def count_rows(
    plan: StudyPlan, manifests: Mapping[str, StageManifest], rows: Mapping[str, Mapping[str, Rows]], shared: Mapping[str, Rows]
) -> tuple[UsedRows, ...]:
    """Count the rows that finished trainings and evaluations read, for every split."""
    found: dict[tuple[str, str], dict[Counts, dict[str, None]]] = {}
    for stage in plan.stages:
        if stage.key not in manifests:
            continue
        manifest, of_stage = manifests[stage.key], rows.get(stage.key)
        for (role, name), counts in (manifest.counts or _counts_of_earlier(plan, manifest, of_stage or {})).items():
            if role != "test" or of_stage is not None:
                found.setdefault((role, name), {}).setdefault(counts, {}).update(dict.fromkeys(stage.arms))
    used: list[UsedRows] = []
    for (role, name), by_counts in found.items():
        for counts, arms in by_counts.items():
            compared = len(shared[name]) if role == "test" and name in shared else counts.used
            used.append(UsedRows(role, name, counts, tuple(arms) if len(by_counts) > 1 else (), compared))
    return tuple(used)


def _counts_of_earlier(plan: StudyPlan, manifest: StageManifest, rows: Mapping[str, Rows]) -> Mapping[tuple[str, str], Counts]:
    left_out, data = manifest.left_out, plan.recipe["data"]
    limits = {"limit": int(data.get("max_prompt", 0)), "max_length": int(data.get("max_length", 0))}
    return {("test", n): Counts(len(of_set) + left_out.get(n, 0), long=left_out.get(n, 0), **limits) for n, of_set in rows.items()}


def with_spent(plan: StudyPlan, manifests: Mapping[str, StageManifest]) -> StudyPlan:
    """Return the plan with measured values (FLOPs, number of checkpoints) for trainings that stopped early.

    A training with `select.patience` may stop before its last update.
    """
    early: dict[str, StageRecord] = {}
    for stage in plan.stages:
        found = manifests.get(stage.key) if stage.checkpoints else None
        if found is not None and found.checkpoints is not None:
            early[stage.key] = replace(stage, checkpoints=found.checkpoints, flops=None if stage.flops is None else found.flops)
    if not early:
        return plan
    spent = replace(plan, stages=tuple(early.get(stage.key, stage) for stage in plan.stages))
    return replace(spent, arms=tuple(replace(arm, flops=_spent(spent, arm)) for arm in plan.arms))


def _spent(plan: StudyPlan, arm: ArmRecord) -> float | None:
    parts = [stage.flops for stage in plan.ancestors(next(iter(arm.final.values())), paid=True)]
    return None if arm.flops is None else math.fsum(part for part in parts if part is not None)
