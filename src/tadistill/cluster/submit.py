"""`tadistill submit`: a study's missing stages as Slurm jobs, in one go and without a driver that has to live.

What is finished is skipped, what is queued is waited for, the rest is submitted: so a second submission submits nothing, and one after a
failure submits the branch that failed. Imports no torch.
"""

import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tadistill.cluster import queue, records, sbatch
from tadistill.cluster.job import ReportJob, StageJob
from tadistill.cluster.jobs import Job, Place, arrays, bundles, families
from tadistill.cluster.profile import Profile
from tadistill.cluster.request import Request, Requests
from tadistill.errors import ConfigError, StageFailed
from tadistill.plan import throughput
from tadistill.plan.arms import Plan
from tadistill.plan.task import make_task
from tadistill.store import store_of

_WAIT = 120  # seconds for another submission to end


@dataclass(frozen=True)
class Sent:
    """A job or an array that was submitted, or would be."""

    id: str
    jobs: tuple[Job, ...]
    settings: dict[str, Any]

    @property
    def request(self) -> Request:
        """What it asks for."""
        return self.jobs[0].request

    @property
    def text(self) -> str:
        """What it does, in a line."""
        first = self.jobs[0].stages[0].label
        more = f" and {len(self.jobs[0].stages) - 1} more" if len(self.jobs[0].stages) > 1 else ""
        return f"{first}{more}{f', {len(self.jobs)} seeds' if len(self.jobs) > 1 else ''}"


class Submission:
    """One submission of one plan."""

    def __init__(self, plan: Plan, profile: Profile, runs: Path, *, account: str | None):
        """
        Raises:
            ConfigError: the site would refuse a job of this plan.
        """
        self.plan, self.profile, self.store = plan, profile, store_of(runs.resolve())
        self.study, self.account = runs.resolve() / plan.recipe.study, _account(profile, account)
        _check_place(profile, runs)
        devices = {gpu.device for gpu in profile.gpus.values() if gpu.device}
        speeds = {device: throughput.load(self.store, plan.stages, 1, device) for device in devices}
        self.requests = Requests(plan, profile, speeds)

    @property
    def todo(self) -> list[str]:
        """Stages that the store lacks now."""
        return [key for key in self.plan.stages if not self.store.finished(key)]

    def jobs(self, keys: list[str]) -> list[Job]:
        """The jobs of these stages."""
        return [Job(stages, self.requests.of(stages), depth) for depth, stages in bundles(self.plan.stages, keys)]

    def scripts(self) -> Iterator[tuple[Sent, str]]:
        """What would be submitted if nothing were queued, with each batch script; ids are @1, @2 …"""
        places: dict[str, Place] = {}
        number = 0
        for family in families(self.jobs(self.todo)):
            for members, dependency in self._arrays(family, places):
                number += 1
                sent = self._sent(f"@{number}", members, dependency)
                places |= self._places(sent)
                yield sent, sbatch.script(self._folder, self._elements(sent), sent.settings)

    def run(self, ready: Callable[[bool], None], tell: Callable[["Sent"], None]) -> tuple[list[Sent], int]:
        """Submit. Returns what was sent, and how many stages are queued by earlier submissions.

        Args:
            ready: called before the first job, with whether there is one.
            tell: hears of every job.

        Raises:
            ConfigError: the site refuses, or another submission is at work.
        """
        with self._alone():
            queued = queue.queued()
            found = {key: records.read(self.store, key) for key in self.todo}
            live = {key for key, record in found.items() if records.live(record, queued)}
            hopeless = {e.id for record in found.values() if record for e in records.entries(record, queued) if e.hopeless}
            queue.cancel(hopeless)
            places = {key: records.place(record) for key, record in found.items() if record and key in live}
            jobs = self.jobs([key for key in found if key not in live])
            self._check_number(jobs, len(queued) - len(hopeless))
            ready(bool(jobs))
            sent: list[Sent] = []
            for family in families(jobs):
                for members, dependency in self._arrays(family, places):
                    sent.append(self._send(members, dependency))
                    places |= self._places(sent[-1])
                    tell(sent[-1])
            if sent:
                self._report(places, queued)
            return sent, len(live)

    # --- parts ----------------------------------------------------------------------------------------------------------

    @property
    def _folder(self) -> Path:
        return records.jobs_folder(self.study)

    @property
    def _chain(self) -> bool:
        return self.profile.resume == "chain"

    def _arrays(self, family: list[Job], places: dict[str, Place]) -> list[tuple[list[Job], str | None]]:
        if not self._chain:
            return arrays(family, places)
        # the array is the chain of one job's segments, of which one that is cut off may come before one that ends well
        parts = [part for job in family for part in arrays([job], places)]
        return [(members, dependency and dependency.replace("afterok:", "afterany:")) for members, dependency in parts]

    def _sent(self, id: str, members: list[Job], dependency: str | None) -> Sent:
        name, request = members[0].name, members[0].request
        settings = sbatch.parameters(name, request, self.profile, account=self.account, dependency=dependency)
        return Sent(id, tuple(members), settings)

    def _elements(self, sent: Sent) -> int:
        """Segments of a chain, or jobs."""
        return self._segments(sent.request) if self._chain else len(sent.jobs)

    def _segments(self, request: Request) -> int:
        """Twice what the estimate needs, and one more: estimates are guesses, and segments after the end take seconds."""
        return 2 * request.pieces + 1

    def _places(self, sent: Sent) -> dict[str, Place]:
        """Where the stages of a submitted job are."""
        array = len(sent.jobs) > 1
        return {key: Place(sent.id, i if array else None) for i, job in enumerate(sent.jobs) for key in job.keys}

    def _send(self, members: list[Job], dependency: str | None) -> Sent:
        sent = self._sent("", members, dependency)
        work = [StageJob(tuple(make_task(self.plan, stage, self.store) for stage in job.stages), self._chain) for job in members]
        job = self._sbatch(work * self._elements(sent) if self._chain else work, sent.settings, sent.text)
        sent = Sent(job, sent.jobs, sent.settings)
        for key, place in self._places(sent).items():
            records.write(self.store, key, place, members[0].name, self.plan.recipe.study)
        time.sleep(self.profile.pause)
        return sent

    def _sbatch(self, work: list[Any], settings: dict[str, Any], text: str) -> str:
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        try:
            return sbatch.send(self._folder, work, settings)
        except (subprocess.CalledProcessError, FailedJobError, FailedSubmissionError) as error:
            said = " ".join(str(getattr(error, "stderr", None) or error).split())
            raise StageFailed(
                f"{self.profile.name} refused the job for {text}: {said}. What was submitted before stays; correct it and submit again"
            ) from error

    def _report(self, places: dict[str, Place], queued: dict[str, queue.Entry]) -> None:
        """A job that writes the report after everything else, whatever became of it; an earlier one that still waits is cancelled."""
        request, name = self.requests.report(), records.report_name(self.study)
        if request is None:
            return
        queue.cancel(i for i, entry in queued.items() if entry.name == name)
        parents = {p for key in places for p in self.plan.stages[key].parents.values()}
        last = sorted({str(place) for key, place in places.items() if key not in parents})
        after = f"afterany:{':'.join(last)}"
        settings = sbatch.parameters(name, request, self.profile, account=self.account, dependency=after)
        self._sbatch([ReportJob(str(self.study), str(self.store.root))], settings, "the report")

    def _check_number(self, jobs: list[Job], queued: int) -> None:
        number = sum(self._segments(job.request) if self._chain else 1 for job in jobs) + 1  # the report
        if jobs and queued + number > self.profile.max_jobs:
            raise ConfigError(
                f"{number} jobs beside {queued} that are queued are more than the {self.profile.max_jobs} of a user on {self.profile.name}"
                "; submit fewer seeds or arms at a time (seeds=[10]), or wait"
            )

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Two submissions to one store follow each other, so that the second sees the jobs of the first."""
        seconds = 0

        def waiting() -> None:
            nonlocal seconds
            seconds += 1  # called once a second
            if seconds > _WAIT:
                raise ConfigError(f"another `tadistill submit` to {self.store.root} is at work; wait until it has ended")

        lock = self.store.acquire("submit", waiting)
        try:
            yield
        finally:
            lock.release()


def _account(profile: Profile, given: str | None) -> str | None:
    """The account that jobs are charged to.

    Raises:
        ConfigError: none, another one in the environment, or one that the site does not know.
    """
    environment = {name: os.environ[name] for name in ("SBATCH_ACCOUNT", "SLURM_ACCOUNT") if os.environ.get(name)}
    for name, value in environment.items():
        if given and value != given:
            raise ConfigError(
                f"--account is {given}, but {name}={value} in the environment wins over it; unset {name}, or leave --account out"
            )
    account = given or next(iter(environment.values()), None)
    if profile.account and account is None:
        raise ConfigError(
            f"{profile.name} needs an account; give --account NAME (or export SBATCH_ACCOUNT), for instance {_example(profile)}"
        )
    if profile.account and not re.fullmatch(profile.account, account or ""):
        raise ConfigError(f"account `{account}` is none of {profile.name}, which look like {_example(profile)}; correct --account")
    return account


def _example(profile: Profile) -> str:
    return "aip-PROF" if profile.account.startswith("aip") else "def-PROF"


def _check_place(profile: Profile, runs: Path) -> None:
    """Runs, and where the site looks at it the current folder, lie where jobs may write."""
    if profile.home == "writable":
        return
    closed = [Path.home().resolve()]
    if profile.home == "read-only":
        closed += [Path("/project"), Path(os.environ.get("PROJECT") or "/project").resolve()]
    looked_at = {"runs are": runs.resolve()} | ({"this folder is": Path.cwd()} if profile.home == "no-jobs" else {})
    for what, path in looked_at.items():
        if any(path.is_relative_to(folder) for folder in closed):
            rule = "home and project folders are read-only in jobs" if profile.home == "read-only" else "the site takes no jobs from home"
            raise ConfigError(f"{what} {path}, but on {profile.name} {rule}; go to $SCRATCH, or set --runs there")
