"""`tadistill advise` recommends a path: direct distillation, or distillation through teacher assistants.

It measures the recipe's models on dev prompts, computes the cost of each path, and reads the results of earlier studies. Measurements are
kept on disk, so a second call does not repeat them.
"""

import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from tadistill.advise import words
from tadistill.advise.decide import SEEDS, Advice, Work, advise, improvement
from tadistill.advise.history import Candidate, Edge, EdgeMeasures, History, edge_record, family_of, history, path_edges
from tadistill.advise.measures import (
    TOP_K,
    Ladder,
    Measures,
    PathCost,
    chain_settings,
    costs,
    edge_measures,
    ladder,
    probe_plan,
    read_measures,
    twin_name,
    with_earlier,
    with_search,
    with_seeds,
)
from tadistill.advise.page import render_advice
from tadistill.advise.words import Report
from tadistill.config import Recipe
from tadistill.config.arm import path_text
from tadistill.config.load import parse, read
from tadistill.config.recipe_files import placed
from tadistill.disk import finite, write_json, write_text
from tadistill.errors import TadistillError
from tadistill.metrics import NOT_COMPARABLE
from tadistill.plan.arms import Plan, ProbePlan, make_plan
from tadistill.plan.graph import Stage
from tadistill.results.number_text import TIMES, parameters_text
from tadistill.runner.local import ADVICE, result_written
from tadistill.runner.run_study import fetch_models, method_text
from tadistill.runner.schedule import check_first, run_stages
from tadistill.search.strategies import path_name
from tadistill.store import Store, store_of
from tadistill.terminal import Terminal
from tadistill.text import counted

NATS_PER_POINT = 1 / 30
"""Nats of loss that count as one point of a score from 0 to 100. So a margin of 0.3 points becomes 0.01 nats."""
_STYLES = {"chain": "bold green", "direct": "bold", "inconclusive": "bold yellow"}
Columns = tuple[tuple[str, str, int], ...]  # title, measure, decimals
ON_OWN: Columns = (
    *(("KL(q‖p)", "reverse_kl", 3), ("overlap", "overlap", 2), ("mass", "mass", 2)),
    *(("H(p)−H(q)", "entropy_gap", 3), ("bias", "bias", 3)),
)
ON_REFERENCES: Columns = (("KL(p‖q)", "forward_kl", 3), ("loss p/q", "loss_ratio", 3), ("advantage", "advantage", 3))


@placed
def advise_recipe(
    recipe: Recipe, *, source: str, overrides: Sequence[str], options: Sequence[str], runs: Path, prompts: int, console: Terminal
) -> Path:
    """Measure the models, print the advice, and write RUNS/STUDY/advice.json and advice.html. Return the path of the HTML page.

    Args:
        recipe: the recipe, with the overrides of the command line.
        source: the recipe's file name, as it appears in the proposed commands.
        overrides: the KEY=VALUE arguments of the command line. The proposed commands repeat them.
        options: the other arguments that the proposed commands repeat, such as ``--runs DIR``.
        runs: the directory of all studies and their stored results.
        prompts: the largest number of dev prompts to read.
        console: where the advice is printed.

    Raises:
        ConfigError, DataError, ModelError: the input is wrong (raised before any work).
        StageFailed: a measurement failed. Finished measurements are kept.
    """
    planned = _planner(source, overrides)
    fetch_models(recipe, console)
    with console.working("planning the paths"):
        own = make_plan(recipe)  # a mistake in the recipe's own arms ends the command before any work
        found = ladder(recipe := with_search(recipe))
        paths, priced = costs(recipe)
        probes = probe_plan(paths.recipe, found, prompts)
    _run(paths, probes, store := store_of(runs), console)
    measures = read_measures(probes, store, found)
    study = runs / recipe.study
    command = shlex.join(["tadistill", "advise", source, *(repeated := [*overrides, *options])])
    known = edge_measures(measures)
    record = measured(recipe.study, command, measures, with_earlier(study, known)) | {"stages": list(probes.plan.stages)}
    _save(study, record)  # `history` reads the measures of this study's own finished arms from here
    past = history(runs)
    commands = Commands(recipe, planned, store, past, priced[found.teacher, found.student].flops)
    advice, metric = _advice(paths, found, priced, known, commands)
    report = Report(
        study=recipe.study,
        command=command,
        seed=recipe.first_seed,
        dev=" + ".join(recipe.data.dev_sets()),
        prompts=measures.models[0].loss.n,
        metric=metric,
        ladder=found,
        measures=measures,
        costs=priced,
        sweeps=words.lambda_sweeps(measures),
        rules=words.rules(measures, found, recipe.search.max_assistants if recipe.search else None),
        history=past,
        advice=advice,
        steps=words.steps(recipe, source, repeated, advice, priced, commands.cost, _finished(paths, store)),
        notes=words.notes(recipe, list(priced), measures, advice, past, metric, prompts),
    )
    report = replace(report, notes=(*report.notes, *words.command_notes(list(commands.refused), commands.unpriced(own))))
    write_json(study / ADVICE, record | decided(report))
    page = study / "advice.html"
    write_text(page, render_advice(report))
    print_advice(report, console)
    for path in (study / ADVICE, page):
        console.say(f"{'page' if path == page else 'data'}: {path}")
    return page


def _save(study: Path, record: dict[str, Any]) -> None:
    write_json(study / ADVICE, record)
    result_written(study, "advise")


def _planner(source: str, overrides: Sequence[str]) -> Callable[[Sequence[str]], Plan]:
    text, folder = read(source)  # now, because measuring may take hours
    return lambda settings: make_plan(parse(text, [*overrides, *settings], source=source, folder=folder))


def _run(paths: Plan, probes: ProbePlan, store: Store, console: Terminal) -> None:
    missing = [s for s in probes.plan.stages.values() if not store.finished(s.key)]
    if not missing:
        return
    jobs = check_first(paths, store, console, missing)
    console.note(
        f"{paths.recipe.study}: {counted(len(probes.plan.stages), 'stage measures', 'stages measure')} models; "
        f"{counted(len(missing), 'of them still has', 'of them still have')} to run, {jobs} at a time"
    )
    run_stages(probes.plan, store, jobs=jobs, console=console)


def _finished(plan: Plan, store: Store) -> set[str]:
    """Return the names of the arms whose stages are all in the store."""
    missing = {name for stage in plan.stages.values() if not store.finished(stage.key) for name in stage.arms}
    return {arm.name for arm in plan.arms} - missing


@dataclass(frozen=True)
class Commands:
    """Plans the commands that advice may propose, to know what they cost and which of their seeds are new."""

    recipe: Recipe
    plan: Callable[[Sequence[str]], Plan]
    """Plans the recipe with some KEY=VALUE arguments."""
    store: Store
    past: History
    direct: float
    """Training FLOPs of the direct path for one seed."""
    refused: dict[str, None] = field(default_factory=dict)
    """The errors of commands that cannot be planned, for example because an arm of the recipe may stop early."""

    def cost(self, settings: Sequence[str]) -> float | None:
        """Return the cost (`Experiment.cost`) of the recipe with some KEY=VALUE arguments. None if it is refused."""
        plan = self._plan(settings)
        return self._cost(plan) if plan else None

    def work(self, chain: Candidate) -> Work | None:
        """Return the seeds and the cost of the experiment that compares a chain with direct at equal compute. None if it is refused."""
        seeds = SEEDS
        while plan := self._plan(with_seeds(self.recipe, chain_settings(self.recipe, chain.path), seeds)):
            arms = {arm.name: arm.final for arm in plan.arms}
            pairs = [{arms[name][seed] for name in (path_name(chain.path), twin_name(chain.path))} for seed in plan.recipe.seeds]
            new = sum(not pair <= self.past.stages for pair in pairs)
            if new >= SEEDS:
                return Work(seeds, new, self._cost(plan))
            seeds += SEEDS - new
        return None

    def unpriced(self, plan: Plan) -> list[str]:
        """Return the arms of a plan with unfinished stages whose training FLOPs are not known."""
        unknown = {name for stage in self._todo(plan) if stage.flops is None for name in stage.arms}
        return [arm.name for arm in plan.arms if arm.name in unknown]

    def _plan(self, settings: Sequence[str]) -> Plan | None:
        try:
            return self.plan(settings)
        except TadistillError as error:
            self.refused[str(error)] = None
            return None

    def _cost(self, plan: Plan) -> float:
        return math.fsum(stage.flops or 0.0 for stage in self._todo(plan)) / self.direct

    def _todo(self, plan: Plan) -> list[Stage]:
        return [s for s in plan.stages.values() if not s.spec.measures and not self.store.finished(s.key)]


def _advice(
    paths: Plan,
    found: Ladder,
    priced: dict[tuple[str, ...], PathCost],
    known: Mapping[tuple[str, str], EdgeMeasures],
    commands: Commands,
) -> tuple[Advice, str]:
    recipe, direct = paths.recipe, (found.teacher, found.student)
    arm = next(a for a in paths.arms if a.name in {path_name(path) for path in priced})
    metric = arm.method.select.metric
    source = " + ".join(ref.load for ref in recipe.data.sets.values())
    family = family_of(recipe.models, found.sizes, found.teacher, source, method_text(arm))
    used = () if metric in NOT_COMPARABLE else commands.past.on(metric)
    chains = [Candidate(path, cost.multiple, path_edges(path, found.sizes, known)) for path, cost in priced.items() if len(path) > 2]
    candidates = [Candidate(direct, 1.0, path_edges(direct, found.sizes, known)), *chains]
    work = (lambda chain: None) if metric in NOT_COMPARABLE else commands.work  # no result of it would count
    return advise(candidates, used, margin=margin_on(recipe, metric), family=family, work=work), metric


def margin_on(recipe: Recipe, metric: str) -> float:
    """Convert the recipe's margin (the smallest difference that matters) from points of a score from 0 to 100 to the unit of `metric`."""
    return recipe.margin * (NATS_PER_POINT if metric == "loss" else 1)


# --- advice.json


def measured(study: str, command: str, measures: Measures, edges: Mapping[tuple[str, str], EdgeMeasures]) -> dict[str, Any]:
    """Return the measured values for advice.json. Later calls of `tadistill advise` load them as evidence (`history`)."""
    return {
        "study": study,
        "command": command,
        "edges": [edge_record(Edge(*names, found)) for names, found in edges.items()],
        "models": [finite(asdict(model)) for model in measures.models],
        "pairs": [finite(asdict(pair)) for pair in measures.pairs.values()],
    }


def decided(report: Report) -> dict[str, Any]:
    """Return the part of advice.json that contains the decision and its settings."""
    advice = report.advice
    return finite(
        {
            "dev": report.dev,
            "prompts": report.prompts,
            "seed": report.seed,
            "top_k": TOP_K,
            "metric": report.metric,
            "paths": [{"path": path, **asdict(cost)} for path, cost in report.costs.items()],
            "lambda_sweeps": {name: [asdict(c) for c in chosen] for name, chosen in report.sweeps.items()},
            "rules": [asdict(rule) for rule in report.rules],
            "advice": asdict(advice) | {"reason": words.reason(advice)},
            "steps": [asdict(step) for step in report.steps],
            "history": {"studies": report.studies, "left_out": report.history.left_out},
            "notes": report.notes,
        }
    )


# --- terminal


def print_advice(report: Report, console: Console) -> None:
    """Print the advice: first the verdict, then measures, costs and the commands to run. Lines have at most 80 characters."""
    advice = report.advice
    console.print(Text(f"{report.study}: advice", style="bold"))
    console.print(Text(words.verdict_line(advice), style=_STYLES[advice.verdict]))
    for text in (words.reason(advice), f"{words.basis_line(report)}."):
        console.print(Text(text[0].upper() + text[1:]))
    console.print()
    console.print(_models(report))
    console.print(_pairs(report, "teacher and learner compared on the learner's own dev answers, ± standard error (measured)", ON_OWN))
    console.print(_pairs(report, "teacher and learner compared on the dev references (measured)", ON_REFERENCES))
    console.print(_paths(report))
    for step in report.steps:
        gain = "" if step.gain is None else f". {words.gain_text(step.gain, report)}"
        cost = f": {words.cost_text(step.cost)}{gain}" if step.command else ""
        console.print(Text(f"{step.text}{cost}"))
        if step.command:
            console.print(Text(step.command, style="cyan"), soft_wrap=True)
    console.print()
    for note in report.notes:
        console.print(Text(f"note: {note}", style="yellow"))


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="", box=box.SIMPLE_HEAD, padding=(0, 1))
    for i, column in enumerate(columns):
        table.add_column(escape(column), justify="right" if i else "left", overflow="fold", no_wrap=i > 0, min_width=8 if i == 0 else None)
    return table


def _models(report: Report) -> Table:
    table = _table(
        f"models on {counted(report.prompts, 'dev prompt')} of {report.dev} (measured)", "model", "size", "loss", "ROUGE-L", "entropy"
    )
    for model in report.measures.models:
        cells = (words.plus_minus(model.loss), words.plus_minus(model.rouge_l, 1), words.plus_minus(model.entropy))
        table.add_row(escape(model.name), parameters_text(model.parameters), *cells)
    return table


def _pairs(report: Report, title: str, columns: Columns) -> Table:
    table = _table(title, "p > q", *(name for name, *_ in columns))
    for pair in report.measures.pairs.values():
        cells = [words.plus_minus(getattr(pair, field), decimals).replace(" ± ", "±") for _, field, decimals in columns]
        table.add_row(escape(f"{pair.teacher} > {pair.learner}"), *cells)
    return table


def _paths(report: Report) -> Table:
    advice = report.advice
    title = f"paths: {improvement(report.metric)} on dev, compared with direct at equal compute (predicted)"
    table = _table(title, "path", "compute", "Δ", f"{100 * advice.level:.0f} %", "P(better)", "basis")
    for option in advice.options:
        path = escape(path_text(option.path))
        if option.basis == "reference":
            table.add_row(path, f"{option.cost:.2f}{TIMES}", "0", "", "", "reference")
            continue
        beyond = " *" if option.beyond else ""
        cells = (
            words.signed_number(option.expected),
            escape(words.option_interval(option)),
            f"{option.p_better:.2f}",
            option.basis + beyond,
        )
        table.add_row(path, f"{option.cost:.2f}{TIMES}", *cells)
    if any(option.beyond for option in advice.options):
        table.caption = "* a measure is outside the range of earlier studies, so the interval is wider"
        table.caption_justify = "left"
    return table
