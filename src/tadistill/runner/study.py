"""A study from recipe to report: the function behind `tadistill run` and `tadistill.run`."""

import contextlib
import datetime
import json
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from tadistill.config import Recipe
from tadistill.disk import write_json
from tadistill.errors import ConfigError
from tadistill.models import sources
from tadistill.plan.arms import Plan, PlannedArm, make_plan
from tadistill.plan.costs import Ledger
from tadistill.plan.layout import check_entries
from tadistill.runner.workers import run_stages
from tadistill.store import store_of


def run(recipe: Recipe, *, runs: Path, recipe_text: str = "", command: str = "", console: Console | None = None) -> Path:
    """Run what the store lacks; returns the study's directory, ready for `tadistill.report.write_report`.

    Raises:
        TadistillError: the input is wrong (before anything starts), or a stage failed.
    """
    console = console or Console()
    if not recipe.arms:
        raise ConfigError(f"{recipe.study} has no arms, so there is nothing to run; add arms, or look for a path with `tadistill search`")
    check_entries(recipe)  # before models are downloaded
    fetch_models(recipe, console)
    plan = make_plan(recipe)
    store = store_of(runs)
    missing = [s for s in plan.stages.values() if not store.finished(s.key)]
    jobs = 0
    if missing:
        from tadistill.runner.preflight import check  # imports transformers: not for a run that is all hits

        jobs = check(recipe)
        console.print(f"{recipe.study}: {len(plan.stages)} stages, {len(missing)} to run, {jobs} at a time", highlight=False)
    study = save_plan(plan, runs, recipe_text=recipe_text, command=command)
    if missing:
        run_stages(plan, store, jobs=jobs, console=console)
    return study


def fetch_models(recipe: Recipe, console: Console) -> None:
    """Bring every model to this disk; the plan needs their sizes."""
    for model in recipe.models.values():
        if model.load and not model.load.startswith("scratch:") and sources.locate(model.load, model.revision) is None:
            console.print(f"fetching {model.load} …", highlight=False)
            sources.fetch(model.load, model.revision)
        if model.tokenizer and model.tokenizer != "tinyworld":
            sources.fetch(model.tokenizer, model.revision, weights=False)


def save_plan(plan: Plan, runs: Path, *, recipe_text: str, command: str) -> Path:
    """Write runs/STUDY/plan.json, from which report and other tools read; keeps the date of the first run."""
    study = runs / plan.recipe.study
    path = study / "plan.json"
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    if path.is_file():
        with contextlib.suppress(json.JSONDecodeError, KeyError):  # a damaged plan is simply written anew
            created = json.loads(path.read_text(encoding="utf-8"))["created"]
    write_json(path, describe(plan, created=created, recipe_text=recipe_text, command=command))
    return study


def describe(plan: Plan, *, created: str, recipe_text: str, command: str) -> dict:
    """The plan as plain data (the contract with `tadistill.report`)."""
    ledger = Ledger(plan.recipe)
    return {
        "study": plan.recipe.study,
        "created": created,
        "command": command,
        "recipe_text": recipe_text,
        "recipe": _as_written(plan.recipe),
        "teacher": plan.teacher,
        "models": {name: {"parameters": _parameters(ledger, name)} for name in plan.recipe.models},
        "stages": [
            {
                "key": s.key,
                "kind": s.kind,
                "label": s.label,
                "model": s.model,
                "parents": s.parents,
                "seed": s.seed,
                "arms": [a.name for a in plan.arms if a.name in s.arms],
                "flops": s.flops,
                "steps": s.steps,
                "checkpoints": s.checkpoints,
            }
            for s in plan.stages.values()
        ],
        "arms": [
            {
                "name": a.name,
                "path": list(a.arm.last),
                "text": _text(a),
                "models": list(a.arm.models),
                "method": _method(a),
                "model": a.arm.last[-1],
                "compute": a.arm.compute,
                "flops": a.flops,
                "evaluate": _by_seed(a.evaluate),
                "analyse": _by_seed(a.analyse),
                "also": {name: _by_seed(keys) for name, keys in a.also.items()},
                "final": _by_seed(a.final),
                "published": a.arm.published.model_dump() if a.arm.published else None,
            }
            for a in plan.arms
        ],
    }


def _parameters(ledger: Ledger, name: str) -> int:
    """Counted by hand for the families that the plan knows, by transformers for others."""
    if size := ledger.size(name):
        return size.total
    from tadistill.models.loading import count_parameters  # imports torch

    return count_parameters(ledger.config(name) or {})


def _by_seed(keys: Mapping[int, str | None]) -> dict[str, str | None]:
    return {str(seed): key for seed, key in keys.items()}


def _as_written(recipe: Recipe) -> dict:
    """All of the recipe, but of another decoding only what it changes: its other fields are the main one's."""
    content = recipe.model_dump(mode="json", by_alias=True)
    content["evaluate"]["also"] = {name: o.model_dump(mode="json", exclude_unset=True) for name, o in recipe.evaluate.also.items()}
    return content


def _text(arm: PlannedArm) -> str:
    """The arm's edges in one line."""
    starts = "".join(f", {learner} from {source}" for learner, source in arm.arm.init.items())
    return f"{arm.arm.text}{starts}{', dense' if arm.method.dense else ''}"


def _method(arm: PlannedArm) -> str:
    """What made the arm's model, in a few words."""
    if arm.arm.learners:
        return f"{arm.method.objective.type} ({arm.method.sampler.type})"
    return "sft, continued" if arm.arm.objective else "sft"
