"""Run all stages of a study. `tadistill eval` uses the same code, with a recipe that trains nothing (`evaluation_recipe`)."""

import contextlib
import datetime
import json
import os
import re
import shlex
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import yaml

from tadistill.config import ModelConfig, Recipe
from tadistill.config.common import Strict
from tadistill.config.data import TestSets
from tadistill.config.load import read_settings
from tadistill.config.recipe_files import placed
from tadistill.data.tinyworld import TOKENIZERS, check_name
from tadistill.disk import write_json
from tadistill.errors import ConfigError, about
from tadistill.models import sources
from tadistill.models.sources import fetch_part, locate_part, needed_part
from tadistill.plan.arms import Plan, PlannedArm, make_plan
from tadistill.plan.costs import Ledger
from tadistill.plan.graph import Stage
from tadistill.plan.notes import approximations, seen_notes
from tadistill.plan.paths import lossy_steps
from tadistill.plan.phases import own_settings, phases_text
from tadistill.plan.task import check_entries, check_sources
from tadistill.runner.local import keep_report, own_folder, planning
from tadistill.runner.schedule import check_first, run_stages
from tadistill.runner.trackers import Trackers, check_trackers
from tadistill.store import Store, command_for, key_of, store_of
from tadistill.terminal import Terminal
from tadistill.text import changes, counted, listed

SUITE = ("dolly", "self_inst", "vicuna", "sinst", "uinst")
"""MiniLLM's five test sets."""
_NAMED = 3  # settings that are named in one sentence


@placed
def run_study(recipe: Recipe, *, runs: Path, recipe_text: str = "", command: str = "", console: Terminal | None = None) -> Path:
    """Run the stages of a recipe that are not in the store. Return the study's directory, from which `tadistill.report` makes the report.
    If another run has replaced the study's plan meanwhile, return the folder in `earlier` with the plan of this run.

    Raises:
        TadistillError: the input is wrong (before any stage starts), or a stage failed.
    """
    console = console or Terminal()
    if not recipe.arms:
        raise ConfigError(f"{recipe.study} has no arms, so there is nothing to run; add arms, or search for a path with `tadistill search`")
    store = store_of(runs)
    with planning(runs / recipe.study):
        plan, missing, jobs = _planned(recipe, store, console)
        study, content = _save_plan(plan, runs, recipe_text, command, console)
    if missing:
        run_stages(plan, store, jobs=jobs, console=console)
    else:  # send the values of stages that other processes ran, for instance jobs of a cluster
        Trackers(plan, store, lambda text: console.note(text, problem=True)).close()
    folder = own_folder(study, content)
    if folder != study:
        console.note(f"another run of {recipe.study} with other settings has begun meanwhile, so the report of this run is in {folder}")
    return folder


def _planned(recipe: Recipe, store: Store, console: Terminal) -> tuple[Plan, list[Stage], int]:
    # the plan, the stages that are not finished, and how many of them run at a time (0 if all are finished)
    check_entries(recipe)  # before models are downloaded
    check_trackers(recipe)
    check_sources(recipe)
    fetch_models(recipe, console)
    with console.working("planning the study"):
        plan = make_plan(recipe)
    missing = [s for s in plan.stages.values() if not store.finished(s.key)]
    if not missing:
        console.note(f"{recipe.study}: {_all(len(plan.stages))} finished before; nothing is run")
        return plan, missing, 0
    jobs = check_first(plan, store, console, missing)
    console.note(_beginning(plan, store, missing, jobs))
    return plan, missing, jobs


def _all(stages: int) -> str:
    return "its only stage was" if stages == 1 else f"all {stages} stages were"


def _beginning(plan: Plan, store: Store, missing: Seq[Stage], jobs: int) -> str:
    """Return sentences that say how many stages the run will continue and start. `Screen` says where each of them continues."""
    begun = sum(bool(store.continues(stage.key, stage.steps)) for stage in missing)
    total, done, new = len(plan.stages), len(plan.stages) - len(missing), len(missing) - begun
    if not done and not begun:
        return f"{plan.recipe.study}: {counted(total, 'stage')}, {total} to run, {jobs} at a time"
    goes_on = f" {begun} will be continued." if begun else ""
    finished = f"{done} of {counted(total, 'stage is', 'stages are')} finished"
    return f"{plan.recipe.study}: {finished}.{goes_on} {new} will be started. {jobs} run at a time."


@placed
def fetch_models(recipe: Recipe, console: Terminal) -> None:
    """Download the models that are not on this disk, because the plan needs their sizes. Of a model that runs on a server, only
    a part of the files is downloaded."""
    for name, model in recipe.models.items():
        if model.load and (gives := needed_part(recipe, name)):
            if locate_part(model.load, model.revision, gives) is None:
                console.note(f"fetching {model.load} without most of its weights …")
                fetch_part(model.load, model.revision, gives)
        elif model.load and not model.load.startswith("scratch:") and sources.locate(model.load, model.revision) is None:
            console.note(f"fetching {model.load} …")
            sources.fetch(model.load, model.revision)
        if model.tokenizer and model.tokenizer not in TOKENIZERS:
            with about(f"models.{name}.tokenizer"):
                check_name(model.tokenizer)
            sources.fetch(model.tokenizer, model.revision, weights=False)


def save_plan(plan: Plan, runs: Path, *, recipe_text: str, command: str, console: Terminal | None = None) -> Path:
    """Write runs/STUDY/plan.json, which reports and other tools read. Its date stays that of the first run.

    If the report of an earlier run shows other evaluations than the plan (for instance other seeds), the report is moved to the folder
    runs/STUDY/earlier/KEY. KEY is a digest of the evaluations that the report shows. The settings that differ are named.
    """
    return _save_plan(plan, runs, recipe_text, command, console or Terminal())[0]


def _save_plan(plan: Plan, runs: Path, recipe_text: str, command: str, console: Terminal) -> tuple[Path, dict]:
    # the study's directory, and the content of its plan.json
    study = runs / plan.recipe.study
    path, old = study / "plan.json", dict[str, Any]()
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    if path.is_file():
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a damaged plan is written again
            found = json.loads(path.read_text(encoding="utf-8"))
            created, old = found["created"], {"recipe": dict(found["recipe"])}
    content = describe(plan, created=created, recipe_text=recipe_text, command=command) | {"runs": str(runs.resolve())}
    kept, changed = keep_report(study, content), _changed(old, content) if old else []
    sentences = [f"{study.name} has other settings than in its last run: {listed(changed)}"] if changed else []
    if kept:
        copies = any(stage.spec.trains for stage in plan.stages.values())
        works = (
            f"`{command_for('export', kept.parent, 'ARM')}` works" if copies else f"`{command_for('report', kept.parent)}` writes it again"
        )
        sentences.append(f"The earlier report shows other evaluations, so it was moved to {kept}; {works}")
    if sentences:
        console.note(". ".join(sentences))
    write_json(path, content)
    return study, content


def _changed(old: dict, new: dict) -> list[str]:
    """Return the settings that differ in two plans. Settings of the machine do not count, because they change no numbers."""
    before, after = (
        {k: v for k, v in plan["recipe"].items() if k not in ("runtime", "resources")} for plan in (old, json.loads(json.dumps(new)))
    )
    found = [*changes(before, after, named=("arms", "models", "methods", "evaluate.also"))]
    return [*found[:_NAMED], *([f"{len(found) - _NAMED} more"] if len(found) > _NAMED else [])]


def describe(plan: Plan, *, created: str, recipe_text: str, command: str) -> dict:
    """Return the plan as plain data for plan.json, which `tadistill.results` reads."""
    ledger = Ledger(plan.recipe)
    return {
        "study": plan.recipe.study,
        "created": created,
        "command": command,
        "recipe_text": recipe_text,
        "recipe": _as_written(plan.recipe),
        "teacher": plan.teacher,
        "tokenizers": plan.tokens.families,
        "seen": [*seen_notes(plan)],
        "models": {name: {"parameters": _parameters(ledger, name), **_base(model)} for name, model in plan.recipe.models.items()},
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
                "checkpoints": s.spec.checkpoints,
            }
            for s in plan.stages.values()
        ],
        "arms": [
            {
                "name": a.name,
                "path": list(a.arm.last),
                "text": _text(a),
                "models": list(a.arm.models),
                "method": method_text(a),
                "phases": _phases(a),
                "inexact": approximations(plan, a.name),
                "model": a.arm.last[-1],
                "compute": a.arm.compute,
                "of_budget": a.of_budget,
                "across": lossy_steps(plan.tokens, a.arm.path),
                "teacher_budget": a.arm.teacher_budget,
                "teacher_tokens": a.asked,
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


def _base(model: ModelConfig) -> dict[str, str]:
    base = sources.adapter_base(model.load, model.revision) if model.load else None
    if not base:
        return {}
    # a local base is written as a path, so that it is none of the Hub in any directory
    is_name = sources.parse_source(base[0]).kind != "hub" and not base[0].startswith((".", "/", "~"))
    return {"base": f"./{base[0]}" if is_name else base[0]}


def _parameters(ledger: Ledger, name: str) -> int:
    if size := ledger.size(name):
        return size.total
    if ledger.recipe.models[name].api:
        return 0
    from tadistill.models.architectures import count_parameters  # imports torch

    return count_parameters(ledger.config(name) or {})


def _by_seed(keys: Mapping[int, str | None]) -> dict[str, str | None]:
    return {str(seed): key for seed, key in keys.items()}


def _as_written(recipe: Recipe) -> dict:
    content = recipe.model_dump(mode="json", by_alias=True)
    content["evaluate"]["also"] = {name: o.model_dump(mode="json", exclude_unset=True) for name, o in recipe.evaluate.also.items()}
    return content


def _text(arm: PlannedArm) -> str:
    starts = "".join(f", {learner} from {source}" for learner, source in arm.arm.init.items())
    methods = [phase.method for phase in arm.phases] if arm.arm.learners else []
    marks = [name for name in ("dense", "context") if any(getattr(method, name) for method in methods)]
    marks += ["ema"] if any(method.ema is not None for method in methods) else []
    marks += [f"control {arm.arm.control}"] if arm.arm.control else []
    return f"{arm.arm.text}{starts}{''.join(f', {mark}' for mark in marks)}"


def method_text(arm: PlannedArm) -> str:
    """Return the methods of an arm's last distillation, such as ``minillm (teacher_mixed)``, or `sft` if no model is a teacher."""
    if arm.arm.learners:
        return phases_text(arm.phases)
    return "sft, continued" if arm.arm.objective else "sft"


def _phases(arm: PlannedArm) -> list[dict[str, Any]]:
    return [
        {
            "objective": phase.method.objective.label,
            "sampler": phase.method.sampler.label,
            "settings": settings,
            "share": phase.share,
            "updates": phase.method.optim.steps,
        }
        for phase, settings in zip(arm.phases, own_settings(arm.phases), strict=True)
        if arm.arm.learners
    ]


# --- evaluation of models as they are -----------------------------------------------------------------------------------


class _On(Strict):
    on: TestSets


def evaluation_recipe(models: Seq[str], on: Seq[str], *, seeds: Seq[int], teacher: str | None = None, tasks: Seq[str] = ()) -> str:
    """Return the YAML of a study that trains nothing and evaluates models as they are. Each model is a separate arm.

    Args:
        models: sources of models, as in `load:` of a recipe.
        on: test sets.
        seeds: decoding seeds.
        tasks: tasks of lm-eval.
        teacher: the KL divergence of each model from this teacher is measured. Models and teacher must have the same tokenizer.

    Raises:
        ConfigError: there is no test set, a model is given twice, or two test sets have one name.
    """
    if not on and not tasks:
        raise ConfigError(f"--on names no test set; give at least one, for instance --on {','.join(SUITE[:2])}")
    read_settings(_On, {"on": list(on)}, (), source="test sets")
    places = [*map(_place, models)]
    if len(set(places)) < len(places):
        raise ConfigError(f"a model is given twice in {', '.join(models)}; give each model once")
    sources = list(models) + ([teacher] if teacher and _place(teacher) not in places else [])
    names = _names(sources)
    arms = names[: len(models)]
    unused = {"load": "tinyworld_open", "split": "test"}
    content: dict[str, Any] = {
        "study": f"{_verb(models)}-{'-'.join(arms)}"[:72] + f"-{key_of(places)[:6]}",
        "seeds": [0],
        "models": {name: {"load": load} for name, load in zip(names, sources, strict=True)},
        # nothing is trained, but a recipe must name a training set and a dev set
        "data": {"train": unused, "dev": unused, "test": list(on)},
        "evaluate": {"seeds": list(seeds), "also": {}, **({"tasks": list(tasks)} if tasks else {})},
        "runtime": {"jobs": 1},  # few stages: each gets all cores
        "arms": dict(zip(arms, arms, strict=True)),
    }
    if teacher:
        content["teacher"] = names[[*map(_place, sources)].index(_place(teacher))]
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def evaluation_command(
    models: Seq[str], on: str, seeds: str, *, teacher: str | None, settings: Seq[str], runs: str | Path | None, tasks: str = ""
) -> str:
    """Return the command that evaluates models as `evaluation_recipe` does. Sets, seeds and tasks are texts, separated by commas."""
    found = ["tadistill", _verb(models), *models]
    found += ["--on", on] if on else []
    found += ["--harness", "lm-eval", "--tasks", tasks] if tasks else []
    found += ["--seeds", seeds, *(part for setting in settings for part in ("--set", setting))]
    found += ["--teacher", teacher] if teacher else []
    return shlex.join(found + (["--runs", str(runs)] if runs else []))


def _verb(models: Seq[str]) -> str:
    return "eval" if len(models) == 1 else "compare"


def _place(model: str) -> str:
    """Return the same text for all spellings of a model's path or hub id."""
    path = Path(os.path.expanduser(model))
    return str(path.resolve()) if path.exists() else model.rstrip("/")


def _names(models: Seq[str]) -> list[str]:
    short = [re.sub(r"[^A-Za-z0-9._-]+", "-", Path(m.rstrip("/")).name).strip("-.") or "model" for m in models]
    names: list[str] = []
    for name in short:
        numbered = (f"{name}-{i}" for i in range(2, len(short) + 2))
        names.append(name if name not in names else next(n for n in numbered if n not in names and n not in short))
    return names
