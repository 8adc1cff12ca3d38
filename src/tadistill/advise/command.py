"""What `tadistill advise` does: probe the models of a recipe, price its paths, read what earlier studies found, and say which to run.

Only dev prompts are read. Everything that is measured is a stage in the store; a second call computes nothing.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from tadistill.advise import Advice, Candidate, EdgeMeasures, History, advise, family_of, history, path_edges
from tadistill.advise.history import MEASURES
from tadistill.advise.measures import PAIR_MEASURES, Measures
from tadistill.advise.page import render_page
from tadistill.advise.probes import Ladder, PathCost, costs, ladder, probe_plan, read_measures, with_search
from tadistill.advise.record import Report, decided, measured
from tadistill.advise.steps import steps
from tadistill.advise.terminal import show
from tadistill.advise.words import lambda_sweeps, notes, rules
from tadistill.config import Recipe
from tadistill.config.method import NOT_COMPARABLE
from tadistill.disk import write_json, write_text
from tadistill.plan.arms import ProbePlan, make_plan
from tadistill.runner.schedule import run_stages
from tadistill.runner.study import describe, fetch_models
from tadistill.search import path_name
from tadistill.store import Store, store_of

NATS_PER_POINT = 1 / 30
"""A recipe's margin is in points; on the loss a margin of 0.3 points is taken as 0.01 nats."""


def advise_recipe(recipe: Recipe, *, source: str, overrides: Sequence[str], runs: Path, prompts: int, console: Console) -> Path:
    """Measure, advise, print, and write RUNS/STUDY/advice.json and advice.html; returns the page's path.

    Args:
        source: the recipe's path, and `overrides` what was changed of it, as commands will repeat them.
        prompts: most dev prompts that are read.

    Raises:
        ConfigError, DataError, ModelError: wrong input, before any work.
        StageFailed: a stage failed; finished ones are kept.
    """
    fetch_models(recipe, console)
    recipe = with_search(recipe)
    found = ladder(recipe)
    limited, priced = costs(recipe)
    probes = probe_plan(limited, found, prompts)
    store = store_of(runs)
    _run(limited, probes, store, console)
    measures = read_measures(probes, store, found)
    study = runs / recipe.study
    command = shlex.join(["tadistill", "advise", source, *overrides])
    record = measured(recipe.study, command, measures, edge_measures(measures))
    write_json(study / MEASURES, record)  # where `history` looks for the measures of this study's own finished arms
    advice, past, metric = _advice(limited, found, priced, measures, runs)
    report = Report(
        study=recipe.study,
        command=command,
        seed=recipe.first_seed,
        dev=recipe.data.dev.name,
        prompts=measures.models[0].loss.n,
        metric=metric,
        ladder=found,
        measures=measures,
        costs=priced,
        sweeps=lambda_sweeps(measures),
        rules=rules(measures, found, recipe.search.max_assistants if recipe.search else None),
        history=past,
        advice=advice,
        steps=steps(recipe, source, overrides, advice, priced),
        notes=notes(recipe, list(priced), measures, advice, past, metric, prompts),
    )
    write_json(study / MEASURES, record | decided(report))
    page = study / "advice.html"
    write_text(page, render_page(report))
    show(report, console)
    for path in (study / MEASURES, page):
        console.print(f"{'page' if path == page else 'data'}: {path}", soft_wrap=True, highlight=False)
    return page


def _run(recipe: Recipe, probes: ProbePlan, store: Store, console: Console) -> None:
    """Run what the store lacks, after the checks that a study gets."""
    missing = [s for s in probes.plan.stages.values() if not store.finished(s.key)]
    if not missing:
        return
    from tadistill.runner.preflight import check  # imports transformers: not for a call that is all hits

    jobs = check(recipe)
    console.print(f"{recipe.study}: {len(probes.plan.stages)} stages to measure, {len(missing)} to run, {jobs} at a time", highlight=False)
    run_stages(probes.plan, store, jobs=jobs, console=console)


def _advice(
    recipe: Recipe, found: Ladder, priced: dict[tuple[str, ...], PathCost], measures: Measures, runs: Path
) -> tuple[Advice, History, str]:
    """The verdict; history on the metric that the direct path's student is selected by, and that metric."""
    plan = make_plan(recipe)
    direct = (found.teacher, found.student)
    arm = next(a for a in plan.arms if a.name in {path_name(path) for path in priced})
    metric = arm.method.select.metric
    described = describe(plan, created="", recipe_text="", command="")
    method = next(a["method"] for a in described["arms"] if a["name"] == arm.name)
    family = family_of(described["recipe"], {n: m["parameters"] for n, m in described["models"].items()}, direct, method)
    past = history(runs)
    used = () if metric in NOT_COMPARABLE else past.on(metric)
    known = edge_measures(measures)
    chains = [Candidate(path, cost.multiple, path_edges(path, found.sizes, known)) for path, cost in priced.items() if len(path) > 2]
    candidates = [Candidate(direct, 1.0, path_edges(direct, found.sizes, known)), *chains]
    return advise(candidates, used, margin=margin_on(recipe, metric), family=family), past, metric


def margin_on(recipe: Recipe, metric: str) -> float:
    """The recipe's margin, which is in points, in the unit of a metric."""
    return recipe.margin * (NATS_PER_POINT if metric == "loss" else 1)


def edge_measures(measures: Measures) -> dict[tuple[str, str], EdgeMeasures]:
    """The means of all pairs, as the predictor reads them; a loss ratio that is not a positive number is left out."""
    found: dict[tuple[str, str], EdgeMeasures] = {}
    for names, pair in measures.pairs.items():
        means = {name: getattr(pair, name).mean for name in PAIR_MEASURES}
        if not 0 < means["loss_ratio"] < float("inf"):
            means["loss_ratio"] = None
        found[names] = EdgeMeasures(size_ratio=pair.size_ratio, **means)
    return found
