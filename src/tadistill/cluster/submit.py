"""`tadistill submit`: submit all unfinished stages of a study as Slurm jobs at once. No process has to stay on the login node.

Stages that are finished or in the queue are not submitted again. After a failure, run the command again: it submits the failed stages
and the stages that depend on them.
"""

import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from tadistill.cluster import sbatch, slurm
from tadistill.cluster.fetch import compare
from tadistill.cluster.job import (
    Job,
    JobRecord,
    Place,
    ReportJob,
    StageJob,
    arrays,
    bundles,
    families,
    jobs_folder,
    read_record,
    report_name,
)
from tadistill.cluster.sbatch import Request, Requests
from tadistill.cluster.slurm import Profile
from tadistill.cluster.status import report_text
from tadistill.config import Recipe
from tadistill.config.recipe_files import placed
from tadistill.data.survey import check
from tadistill.errors import ConfigError, StageFailed
from tadistill.plan import throughput
from tadistill.plan.arms import Plan, make_plan
from tadistill.plan.remote import check_asked
from tadistill.plan.task import make_task
from tadistill.runner.run_study import save_plan
from tadistill.store import command_for, store_of
from tadistill.terminal import Terminal
from tadistill.text import counted

_WAIT = 120  # seconds to wait for another submission to end


@dataclass(frozen=True)
class Sent:
    """A job or a job array that was submitted, or that a dry run would submit."""

    id: str
    jobs: tuple[Job, ...]
    settings: dict[str, Any]

    @property
    def request(self) -> Request:
        return self.jobs[0].request

    @property
    def text(self) -> str:
        first = self.jobs[0].stages[0].label
        more = f" and {len(self.jobs[0].stages) - 1} more" if len(self.jobs[0].stages) > 1 else ""
        return f"{first}{more}{f', {len(self.jobs)} seeds' if len(self.jobs) > 1 else ''}"


class Submission:
    """Submits the unfinished stages of one plan to one cluster as Slurm jobs."""

    def __init__(self, plan: Plan, profile: Profile, runs: Path, *, account: str | None):
        """Prepare the submission. Raises ConfigError if the account is wrong, or if jobs cannot write to the runs directory."""
        self.plan, self.profile, self.store = plan, profile, store_of(runs.resolve())
        self.study, self.account = runs.resolve() / plan.recipe.study, _account(profile, account)
        _check_place(profile, runs)
        devices = {gpu.device for gpu in profile.gpus.values() if gpu.device}
        speeds = {device: throughput.load_throughput(self.store, plan.stages, 1, device) for device in devices}
        self.requests = Requests(plan, profile, speeds)

    @property
    def todo(self) -> list[str]:
        """Return the keys of the stages that are not finished."""
        return [key for key in self.plan.stages if not self.store.finished(key)]

    def jobs(self, keys: list[str]) -> list[Job]:
        return [Job(stages, self.requests.of(stages), depth) for depth, stages in bundles(self.plan.stages, keys)]

    def scripts(self) -> Iterator[tuple[Sent, str]]:
        """Yield every unfinished job with its batch script. Nothing is submitted, so @1, @2, … stand for the job ids."""
        ids = (f"@{number}" for number in count(1))
        for sent in self._in_order(self.jobs(self.todo), {}, lambda members, dependency: self._sent(next(ids), members, dependency)):
            yield sent, sbatch.script(jobs_folder(self.study), self._elements(sent), sent.settings)

    def run(self, ready: Callable[[bool], None]) -> tuple[list[Sent], int]:
        """Submit the jobs. Return two things: the submitted jobs; and the number of stages that were already in the queue.

        Args:
            ready: called before the first job is submitted. Its argument is False if there is no job to submit.

        Raises:
            ConfigError: the cluster would refuse a job, or another submission is running.
        """
        with self._alone():
            queued = slurm.queued()
            found = {key: record for key in self.todo if (record := read_record(self.store, key))}
            live = {key for key, record in found.items() if record.live(queued)}
            hopeless = {e.id for record in found.values() for e in record.entries(queued) if e.hopeless}
            slurm.cancel(hopeless)
            places = {key: found[key].place for key in live}
            jobs = self.jobs([key for key in self.todo if key not in live])
            self._check_number(jobs, len(queued) - len(hopeless))
            ready(bool(jobs))
            sent = [*self._in_order(jobs, places, self._send)]
            if sent:
                self._report(places, queued)
            return sent, len(live)

    # --- parts ----------------------------------------------------------------------------------------------------------

    @property
    def _chain(self) -> bool:
        return self.profile.resume == "chain"

    def _in_order(self, jobs: list[Job], places: dict[str, Place], send: Callable[[list[Job], str | None], Sent]) -> Iterator[Sent]:
        # `places` gets the places of the stages of each array before the arrays that wait for it are made
        for family in families(jobs):
            for members, dependency in self._arrays(family, places):
                sent = send(members, dependency)
                places |= self._places(sent)
                yield sent

    def _arrays(self, family: list[Job], places: dict[str, Place]) -> list[tuple[list[Job], str | None]]:
        if not self._chain:
            return arrays(family, places)
        # an array has the segments of one job; one may time out although a later one completes the work, hence afterany
        parts = [part for job in family for part in arrays([job], places)]
        return [(members, dependency and dependency.replace("afterok:", "afterany:")) for members, dependency in parts]

    def _sent(self, id: str, members: list[Job], dependency: str | None) -> Sent:
        name, request = members[0].name, members[0].request
        settings = sbatch.parameters(name, request, self.profile, account=self.account, dependency=dependency)
        return Sent(id, tuple(members), settings)

    def _elements(self, sent: Sent) -> int:
        return self._segments(sent.request) if self._chain else len(sent.jobs)

    def _segments(self, request: Request) -> int:
        # twice the estimate plus one, because estimates are uncertain and unneeded segments end within seconds
        return 2 * request.pieces + 1

    def _places(self, sent: Sent) -> dict[str, Place]:
        array = len(sent.jobs) > 1
        return {key: Place(sent.id, i if array else None) for i, job in enumerate(sent.jobs) for key in job.keys}

    def _send(self, members: list[Job], dependency: str | None) -> Sent:
        sent = self._sent("", members, dependency)
        work = [StageJob(tuple(make_task(self.plan, stage, self.store) for stage in job.stages), self._chain) for job in members]
        job = self._sbatch(work * self._elements(sent) if self._chain else work, sent.settings, sent.text)
        sent = Sent(job, sent.jobs, sent.settings)
        for key, place in self._places(sent).items():
            JobRecord(place.job, place.index, members[0].name, self.plan.recipe.study).write(self.store, key)
        time.sleep(self.profile.pause)
        return sent

    def _sbatch(self, work: list[Any], settings: dict[str, Any], text: str) -> str:
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        try:
            return sbatch.send(jobs_folder(self.study), work, settings)
        except (subprocess.CalledProcessError, FailedJobError, FailedSubmissionError) as error:
            said = " ".join(str(getattr(error, "stderr", None) or error).split())
            raise StageFailed(
                f"{self.profile.name} refused the job for {text}: {said}. "
                "Jobs that were submitted before it stay in the queue. Correct the cause, then submit again"
            ) from error

    def _report(self, places: dict[str, Place], queued: dict[str, slurm.Entry]) -> None:
        request, name = self.requests.report(), report_name(self.study)
        if request is None:
            return
        slurm.cancel(i for i, entry in queued.items() if entry.name == name)
        parents = {p for key in places for p in self.plan.stages[key].parents.values()}
        last = sorted({str(place) for key, place in places.items() if key not in parents})
        after = f"afterany:{':'.join(last)}"
        settings = sbatch.parameters(name, request, self.profile, account=self.account, dependency=after)
        self._sbatch([ReportJob(str(self.study), str(self.store.root))], settings, "the report")

    def _check_number(self, jobs: list[Job], queued: int) -> None:
        number = sum(self._segments(job.request) if self._chain else 1 for job in jobs) + (self.requests.report() is not None)
        if jobs and queued + number > self.profile.max_jobs:
            raise ConfigError(
                f"{counted(number, 'new job')} and {counted(queued, 'job')} in the queue are more than the {self.profile.max_jobs} that a "
                f"user may have on {self.profile.name}; submit fewer seeds or arms at a time (for instance with seeds=[10]), or wait"
            )

    @contextmanager
    def _alone(self) -> Iterator[None]:
        seconds = 0  # a second submission waits for the lock, and then sees the jobs of the first

        def waiting() -> None:
            nonlocal seconds
            seconds += 1  # called once a second
            if seconds > _WAIT:
                raise ConfigError(f"another `tadistill submit` uses the store {self.store.root}; wait until it ends, then submit again")

        lock = self.store.acquire("submit", waiting)
        try:
            yield
        finally:
            lock.release()


def _account(profile: Profile, given: str | None) -> str | None:
    environment = slurm.accounts_in(os.environ)
    for name, value in environment.items():
        if given and value != given:
            raise ConfigError(
                f"--account is {given}, but {name}={value} in the environment overrides it; unset {name}, or leave out --account"
            )
    account = given or next(iter(environment.values()), None)
    if profile.account and account is None:
        raise ConfigError(f"{profile.name} needs an account; give --account NAME (or set SBATCH_ACCOUNT), for instance {_example(profile)}")
    if profile.account and not re.fullmatch(profile.account, account or ""):
        raise ConfigError(f"account `{account}` is not an account of {profile.name}; accounts there look like {_example(profile)}")
    return account


def _example(profile: Profile) -> str:
    return "aip-PROF" if profile.account.startswith("aip") else "def-PROF"


def _check_place(profile: Profile, runs: Path) -> None:
    if profile.home == "writable":
        return
    closed = [Path.home().resolve()]
    if profile.home == "read-only":
        closed += [Path("/project"), Path(os.environ.get("PROJECT") or "/project").resolve()]
    looked_at = {"the runs directory is": runs.resolve()} | ({"this folder is": Path.cwd()} if profile.home == "no-jobs" else {})
    for what, path in looked_at.items():
        if any(path.is_relative_to(folder) for folder in closed):
            rule = (
                "home and project folders are read-only in jobs"
                if profile.home == "read-only"
                else "jobs cannot be submitted from the home directory"
            )
            raise ConfigError(f"{what} {path}, but on {profile.name} {rule}; change to $SCRATCH, or set --runs to a folder in $SCRATCH")


# --- the command -------------------------------------------------------------------------------------------------------


@placed
def submit(
    recipe: Recipe, *, text: str, command: str, cluster: str | None, account: str | None, runs: Path, dry_run: bool, console: Terminal
) -> None:
    """Submit the stages of a recipe that are not finished. With `dry_run`, print the batch scripts instead.

    Raises:
        ConfigError: the recipe, the profile or the account is wrong, a model or data set is not downloaded, or the cluster would refuse a
            job.
        StageFailed: sbatch refused a job.
    """
    profile = slurm.load_profile(_cluster(cluster))
    if not recipe.arms:
        raise ConfigError(f"{recipe.study} has no arms, so there is nothing to submit; add arms, or use `tadistill search`")
    absent, changes = compare(recipe, runs)
    if absent:
        more = f" (and {len(absent) - 1} more)" if len(absent) > 1 else ""
        raise ConfigError(f"jobs have no network, and {absent[0]}{more}")
    for change in changes:
        console.say(change)
    check(recipe)
    plan = make_plan(recipe)
    check_asked(plan, store_of(runs))
    submission = Submission(plan, profile, runs, account=account)
    study = runs / recipe.study
    if dry_run:
        if not submission.todo:
            console.say(f"nothing to submit: {_all_done(plan, study)}")
        for sent, script in submission.scripts():
            console.say(f"# {sent.id}: {sent.text}")
            console.say(f"{script}\n")
        return

    def ready(anything: bool) -> None:
        if anything:
            from tadistill.runner.preflight import check_inputs  # imports transformers

            with console.working("checking models and data") as show:
                check_inputs(plan, console, show=show)
        save_plan(plan, runs, recipe_text=text, command=command, console=console)

    sent, waiting = submission.run(ready)
    if sent:
        console.print(_table(sent))
    jobs, stages = sum(len(each.jobs) for each in sent), sum(len(job.stages) for each in sent for job in each.jobs)
    done = len(plan.stages) - waiting - stages
    console.say(
        f"{recipe.study} on {profile.name}: {counted(len(plan.stages), 'stage')}; {counted(done, 'is', 'are')} done, "
        f"{counted(waiting, 'is', 'are')} already queued, and {counted(stages, 'was', 'were')} submitted now as {counted(jobs, 'job')}"
    )
    console.say(_next_step(plan, study, submission, sent=bool(sent), waiting=waiting))


def _next_step(plan: Plan, study: Path, submission: Submission, *, sent: bool, waiting: int) -> str:
    status = command_for("status", study)
    if sent and submission.requests.report():
        return f"a job writes the report after all other jobs have ended; show their state with {status}"
    if sent:
        return f"show the state of the jobs with {status}"
    if waiting:
        return f"nothing was submitted, because all unfinished stages already have a job; show the state of the jobs with {status}"
    return f"nothing was submitted: {_all_done(plan, study)}"


def _all_done(plan: Plan, study: Path) -> str:
    return f"all {counted(len(plan.stages), 'stage is', 'stages are')} done; {report_text(study, store_of(study.parent))}"


def _table(sent: list[Sent]) -> Table:
    table = Table(box=None, expand=True)
    for column in ("job", "gpu", "hours", "waits for", "stages"):
        table.add_column(column, overflow="fold", ratio={"waits for": 1, "stages": 2}.get(column))
    for each in sent:
        request = each.request
        gpu = f"{request.nodes * request.gpus} x {request.gpu}" if request.gpu else "–"
        job = f"{each.id}_[0-{len(each.jobs) - 1}]" if len(each.jobs) > 1 else each.id
        table.add_row(job, gpu, f"{request.minutes / 60:.3g}", each.settings.get("dependency", ""), escape(each.text))
    return table


def _cluster(given: str | None) -> str:
    name = given or os.environ.get("CC_CLUSTER")
    if not name:
        known = ", ".join(slurm.profile_names())
        raise ConfigError(
            f'--cluster is not given; use one of {known}, or write a YAML file, as the documentation explains on the page "On a cluster"'
        )
    return name
