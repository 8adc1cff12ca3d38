"""The work behind `tadistill submit`: reads, checks, shows or sends. Imports no torch unless jobs are really sent."""

import os
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tadistill.cluster import profile as profiles
from tadistill.cluster.fetch import missing, moved
from tadistill.cluster.status import again, shortened
from tadistill.cluster.submit import Sent, Submission
from tadistill.config import Recipe
from tadistill.data import datasets
from tadistill.errors import ConfigError
from tadistill.plan.arms import make_plan
from tadistill.runner.study import save_plan


def submit(
    recipe: Recipe, *, text: str, command: str, cluster: str | None, account: str | None, runs: Path, dry_run: bool, console: Console
) -> None:
    """Submit what the store lacks, or print the scripts.

    Raises:
        ConfigError: the recipe, the profile or the account is wrong, something is not fetched, or the site would refuse a job.
        StageFailed: sbatch refused a job.
    """
    profile = profiles.load(_cluster(cluster))
    if not recipe.arms:
        raise ConfigError(f"{recipe.study} has no arms, so there is nothing to submit; add arms, or look for a path: `tadistill search`")
    if absent := missing(recipe, runs):
        more = f" (and {len(absent) - 1} more)" if len(absent) > 1 else ""
        raise ConfigError(f"jobs have no network, and {absent[0]}{more}")
    for change in moved(recipe, runs):
        console.print(change, highlight=False, soft_wrap=True)
    datasets.check(recipe)
    plan = make_plan(recipe)
    submission = Submission(plan, profile, runs, account=account)
    if dry_run:
        for sent, script in submission.scripts():
            console.print(f"# {sent.id}: {sent.text}", soft_wrap=True, highlight=False, markup=False)
            console.print(f"{script}\n", soft_wrap=True, highlight=False, markup=False)
        return

    def ready(anything: bool) -> None:
        if anything:
            from tadistill.runner.preflight import check_inputs  # imports transformers: tokenizers and encodings

            check_inputs(recipe)
        save_plan(plan, runs, recipe_text=text, command=command)

    table, wide = _table(), max(24, (console.width - 40) // 2)
    sent, waiting = submission.run(ready, lambda each: _row(table, each, wide))
    if sent:
        console.print(table)
    jobs, stages = sum(len(each.jobs) for each in sent), sum(len(job.stages) for each in sent for job in each.jobs)
    done = len(plan.stages) - waiting - stages
    console.print(
        f"{recipe.study} on {profile.name}: {len(plan.stages)} stages, of them {done} done, {waiting} queued before, "
        f"{stages} submitted as {jobs} jobs",
        highlight=False,
    )
    study = runs / recipe.study
    if sent:
        report = "a job writes the report when all have ended; " if submission.requests.report() else ""
        console.print(f"{report}{again('status', study)}", highlight=False, soft_wrap=True)
    elif done == len(plan.stages):
        console.print(f"all stages are done: {again('report', study)}", highlight=False, soft_wrap=True)


def _table() -> Table:
    table = Table(box=None, expand=True)
    for column in ("job", "gpu", "hours", "waits for", "stages"):
        table.add_column(column, no_wrap=True, overflow="ellipsis", ratio=1 if column in ("waits for", "stages") else None)
    return table


def _row(table: Table, sent: Sent, wide: int) -> None:
    request = sent.request
    gpu = f"{request.nodes * request.gpus} x {request.gpu}" if request.gpu else "–"
    job = f"{sent.id}_[0-{len(sent.jobs) - 1}]" if len(sent.jobs) > 1 else sent.id
    table.add_row(job, gpu, f"{request.minutes / 60:.3g}", sent.settings.get("dependency", ""), shortened(sent.text, wide))


def _cluster(given: str | None) -> str:
    """--cluster, else the Alliance's own variable."""
    name = given or os.environ.get("CC_CLUSTER")
    if not name:
        raise ConfigError(f"--cluster is not given; use one of {', '.join(profiles.names())}, or a YAML file of your own (docs/cluster.md)")
    return name
