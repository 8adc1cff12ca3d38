"""Write a log and a record of each run on this machine, and keep the reports of earlier runs. Users read the log. Commands such as
`tadistill status` read the record.

    RUNS/STUDY/run.log                 every line of every run of the study, with the time and the process id
    RUNS/STUDY/local/HOST-PID.json     the state of one run; it is written again every few seconds while the run goes on
    RUNS/STUDY/local/VERB-stages.json  the stages of `tadistill search` or `advise`, until the result, which names them, is written
    RUNS/STUDY/earlier/KEY/            the plan and the report of a run with other evaluations than the newest

A record stays after its run has ended. The next run of the study deletes the records of ended runs.
"""

import contextlib
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from tadistill.disk import replacing, write_json, writing
from tadistill.errors import NotPlanned, StoreError, cause
from tadistill.plan.throughput import spoken
from tadistill.store import key_of
from tadistill.text import this_command

LOG = "run.log"
SEARCH = "search.json"
"""Name of a study's file with the result of `tadistill search`."""
ADVICE = "advice.json"
"""Name of a study's file with the result of `tadistill advise`."""
_RECORDS = "local"
_RESULTS = {"search": SEARCH, "advise": ADVICE}  # of commands whose result names their stages; others write plan.json before
_EVERY = 5.0
"""The record is written again after this number of seconds, even if no stage has started or ended."""
_SILENT, _PLANNING = 120.0, 3600.0
"""A run on another machine counts as killed if its record is older than this number of seconds. The record of a run that plans its study,
and may download models, is not written again."""
State = Literal["running", "killed", "finished", "failed", "interrupted"]


@dataclass
class StageProgress:
    """The progress of an unfinished stage. If its run has ended, this is the last progress."""

    label: str
    done: int = 0
    total: int = 1
    note: str = ""
    """The newest text of the stage, for instance the loss and the tokens per second."""
    seconds: float = 0.0
    """Seconds since the stage started."""
    left: float | None = None
    """The predicted seconds until the stage is finished. None if they are not known yet."""


@dataclass
class LocalRun:
    """The state of one run of a study, as its process last wrote it."""

    pid: int
    host: str
    born: str | float
    """The boot of the machine and the time from then to the start of the process, as a text. It distinguishes the process from a later one
    with the same id. Where there is no /proc, and in older records, it is the start time in seconds since the epoch."""
    command: str
    started: str
    """Local date and time at which the run started."""
    seen: float = 0.0
    """Time of the last writing of the record, in seconds since the epoch."""
    ended: State | None = None
    done: int = 0
    total: int = 0
    seconds: float = 0.0
    left: float | None = None
    """The predicted seconds until the whole run is finished. None if they are not known yet."""
    stages: dict[str, StageProgress] = field(default_factory=dict)
    """The running stages by key."""
    failed: dict[str, str] = field(default_factory=dict)
    """Failed stages by key, each with the reason."""
    needs: list[str] = field(default_factory=list)
    """Keys of all stages of the run, for a search also those of its earlier rounds, which `tadistill clean` keeps."""

    @property
    def name(self) -> str:
        return f"{self.host}:{self.pid}"

    @property
    def verb(self) -> str:
        """The name of the run's command, such as `search`."""
        return " ".join(self.command.split()[1:2])

    @property
    def searches(self) -> bool:
        """True if the run is one of `tadistill search`."""
        return self.verb == "search"

    @property
    def planning(self) -> bool:
        """True if the process still plans the study, or checks its models and data, so it has no stages yet."""
        return self.state == "running" and not self.total

    @property
    def state(self) -> State:
        """How the run ended, or `running`. A run is `killed` if its process no longer exists and has not recorded an end."""
        if self.ended:
            return self.ended
        if self.host != platform.node():
            return "running" if time.time() - self.seen < (_SILENT if self.total else _PLANNING) else "killed"
        return "running" if _born(self.pid, in_epoch=not isinstance(self.born, str)) == self.born else "killed"


def local_runs(study: Path) -> list[LocalRun]:
    """Return the runs of a study on this and other machines, sorted by `seen`. A run without a readable record is left out."""
    found = []
    for path in (study / _RECORDS).glob("*.json"):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            stages = {key: StageProgress(**stage) for key, stage in content.pop("stages").items()}
            found.append(LocalRun(**content, stages=stages))
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            continue  # a damaged record is skipped, because it only shows the state of a run
    return sorted(found, key=lambda run: run.seen)


def is_search(study: Path) -> bool:
    """Return True if `tadistill search` has begun or finished in a study's directory."""
    return any(map(os.path.isfile, (study / SEARCH, _stages(study, "search")))) or any(run.searches for run in local_runs(study))


@contextlib.contextmanager
def planning(study: Path) -> Iterator[None]:
    """While the `with` block runs, a record says that this process plans the study, so that `tadistill status` knows of it before plan.json
    exists. Folders that are empty afterwards are removed."""
    run = _this_process()
    path = _record(study, run)
    new = [folder for folder in path.parents if not folder.exists()]  # from the lowest to the highest
    with contextlib.suppress(StoreError):  # the plan cannot be written either, and its error says so
        for old in local_runs(study):
            _keep_stages(study, old)  # before a record of an earlier process with the same id is replaced
        write_json(path, asdict(run))
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # a folder that is not empty has the plan or the record of another run
            path.unlink(missing_ok=True)
            for folder in new:
                folder.rmdir()


def not_planned(*studies: Path) -> NotPlanned | None:
    """Return an error that says so if a process is just planning one of the studies. Return None if none does."""
    runs = ((study, run) for study in studies for run in local_runs(study) if run.planning)
    return next((NotPlanned(f"study {study.name} has no stages yet: {about_planning(run)}") for study, run in runs), None)


def about_planning(run: LocalRun) -> str:
    """Return a clause about a run that has no stages yet."""
    return f"process {run.pid} on {run.host} (started {run.started}) is planning the study, and checks its models and data"


def result_written(study: Path, verb: str) -> None:
    """Delete the file that names the stages of a command's runs: its result, which has just been written, names those it needs."""
    with contextlib.suppress(OSError):  # the stages are kept longer
        _stages(study, verb).unlink(missing_ok=True)


def unfinished_stages(study: Path, verb: str) -> list[str]:
    """Return the keys of the stages of a command's runs, or none if its result has been written."""
    return _named(_stages(study, verb))


def _named(file: Path) -> list[str]:
    try:
        return [*map(str, json.loads(file.read_text(encoding="utf-8"))["stages"])]
    except (OSError, ValueError, TypeError, KeyError):
        return []


def _keep_stages(study: Path, run: LocalRun) -> None:
    """Name the stages of an ended run in VERB-stages.json, if its result does not name them. Earlier versions named them only in its
    record."""
    if run.verb in _RESULTS and run.state != "running" and not {*run.needs} <= {*_named(study / _RESULTS[run.verb])}:
        _name_stages(study, run)


def _name_stages(study: Path, run: LocalRun) -> None:
    known = unfinished_stages(study, run.verb)
    if not {*run.needs} <= {*known}:
        write_json(_stages(study, run.verb), {"stages": [*dict.fromkeys([*known, *run.needs])]})


class Journal:
    """Writes run.log and the record of this process's run. If the files cannot be written, this is reported once, and the run goes on."""

    def __init__(self, study: Path, *, done: int, total: int, complain: Callable[[str], None], needs: Iterable[str] = ()):
        self.folder, self._complain, self._told = study, complain, False
        self.run = _this_process(done=done, total=total)
        self._start, self._written = time.monotonic(), float("-inf")
        self.run.needs = list(needs)
        try:
            if self.run.verb in _RESULTS:
                _name_stages(study, self.run)
            for old in local_runs(study):
                own = old.name == self.run.name and old.born == self.run.born  # of an earlier round of a search
                if old.state != "running" and not own:
                    _keep_stages(study, old)
                    with contextlib.suppress(OSError):  # if nothing can be written, `save` says so
                        _record(study, old).unlink(missing_ok=True)
        except StoreError as error:
            self._failed(study / _RECORDS, error)

    def log(self, text: str) -> None:
        """Add a line to run.log."""
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {self.run.pid} {' '.join(text.split())}\n"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / LOG).open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            self._failed(self.folder / LOG, cause(error))

    @property
    def due(self) -> bool:
        """True if it is time to write the record again."""
        return time.monotonic() - self._written >= _EVERY

    @property
    def seconds(self) -> float:
        """Seconds since the run started."""
        return round(time.monotonic() - self._start, 1)

    def save(self) -> None:
        self._written, self.run.seen = time.monotonic(), time.time()
        self.run.seconds = self.seconds
        path = _record(self.folder, self.run)
        try:
            write_json(path, asdict(self.run))
        except StoreError as error:
            self._failed(path, error)

    def _failed(self, path: Path, reason: object) -> None:
        if not self._told:
            self._told = True
            self._complain(
                f"{path} cannot be written ({reason}); check the disk. The run goes on, but its log and its status will be incomplete"
            )


def _this_process(*, done: int = 0, total: int = 0) -> LocalRun:
    pid, started, seen = os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S"), time.time()
    return LocalRun(pid, platform.node(), _born(pid) or 0.0, this_command(), started, seen, done=done, total=total)


def _record(study: Path, run: LocalRun) -> Path:
    return study / _RECORDS / f"{run.host}-{run.pid}.json"


def _stages(study: Path, verb: str) -> Path:
    return study / _RECORDS / f"{verb}-stages.json"


def _born(pid: int, *, in_epoch: bool = False) -> str | float | None:
    if not in_epoch:  # the kernel counts from the boot, so a step of the clock changes nothing
        with contextlib.suppress(OSError, ValueError, IndexError):
            boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
            state, *rest = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b") ")[2].split()
            return None if state == b"Z" else f"{boot} {int(rest[18])}"
    import psutil  # not at the top, because only runs and `tadistill status` need it

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return None


def described(stage: StageProgress) -> str:
    """Return a stage's progress in one line: how much is done, the newest note, and the time left if it is known."""
    parts = [f"{stage.done}/{stage.total}", stage.note, f"{spoken(stage.left)} left" if stage.left is not None else ""]
    return ", ".join(part for part in parts if part)


# --- reports of earlier runs --------------------------------------------------------------------------------------------

REPORT = ("report.html", "report.md", "results.json", "results.csv", "results-summary.csv")
EARLIER = "earlier"
"""Name of the folder, in a study's directory, with the reports that later runs have moved. Each is in a folder `evaluations_key`."""


def evaluations_key(study: Path) -> str:
    """Return a digest of the evaluations that the report of a study's plan.json shows."""
    try:
        return _key_of_shown(json.loads((study / "plan.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        return key_of("damaged")[:8]


def keep_report(study: Path, content: dict) -> Path | None:
    """Move the report of a study to a folder in `earlier` if the plan `content`, which will be written, has other evaluations. Return the
    path of the moved report, or None."""
    path = study / "plan.json"
    files = [name for name in REPORT if (study / name).is_file()]
    if not path.is_file() or not files:
        return None
    old = evaluations_key(study)
    if old == _key_of_shown(content):
        return None
    folder = study / EARLIER / old
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / path.name) as temporary:
            shutil.copy2(path, temporary)
        for name in files:
            os.replace(study / name, folder / name)
    return folder / files[0]


def own_folder(study: Path, content: dict) -> Path:
    """Return the folder with the plan `content`, which a run has written into a study's directory. It is this directory. If another run has
    replaced the plan by one with other evaluations, it is a folder in `earlier`."""
    key = _key_of_shown(content)
    if evaluations_key(study) == key:
        return study
    folder = study / EARLIER / key
    if not (folder / "plan.json").is_file():
        write_json(folder / "plan.json", content)
    return folder


def _key_of_shown(content: dict) -> str:
    arms = [[arm[name] for name in ("name", "evaluate", "analyse", "also", "published")] for arm in content["arms"]]
    return key_of([content["recipe"]["margin"], arms])[:8]
