"""`tadistill doctor`: checks of this machine. Each check examines one thing, and reports what it found and how to fix a problem.

    checks = examine(runs=Path("runs"), recipe=None, profile=None)
    console.print(table(checks))

A check calls another program only if the program is on PATH. Each call has a timeout, because login nodes are slow and file systems hang.
"""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from rich.markup import escape
from rich.table import Table

from tadistill.cluster.fetch import compare
from tadistill.cluster.slurm import Profile, accounts_in, output_of
from tadistill.config import Recipe
from tadistill.disk import cache_root
from tadistill.errors import TadistillError, cause
from tadistill.plan.task import check_sources
from tadistill.runner.trackers import missing_trackers
from tadistill.store import store_of
from tadistill.text import size

_STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red"}
_SECONDS = 20
_LITTLE, _NOTHING = 10e9, 1e9  # free bytes; less than _LITTLE is a warning, less than _NOTHING a problem
_SKEW = 5.0  # seconds
_SLURM = ("sbatch", "squeue", "sacct", "scancel")
_UNITS = {"": 1, "b": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "p": 1e15}
_OF = re.compile(r"([\d.]+)\s*([kmgtp]?)i?b?\s*/\s*([\d.]+)\s*([kmgtp]?)i?b?(?=\s|$)", re.IGNORECASE)  # used/limit, in bytes or files


@dataclass(frozen=True)
class Check:
    """The result of one check, and how to fix a problem."""

    name: str
    state: Literal["ok", "warning", "problem"]
    found: str
    fix: str = ""


# --- Python and its packages --------------------------------------------------------------------------------------------


def python(version: str, wanted: str) -> Check:
    """Check that the version of this Python is one that tadistill supports."""
    if SpecifierSet(wanted).contains(version, prereleases=True):
        return Check("python", "ok", version)
    return Check("python", "problem", version, f"create the environment again with a Python version {wanted}")


def packages(requirements: Iterable[str]) -> Check:
    """Check that all required Python packages are installed, in versions that tadistill supports."""
    wrong, fine = [], {}
    for requirement in _here(requirements):
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is not installed (wanted {requirement.specifier})")
            continue
        if requirement.specifier.contains(version, prereleases=True):
            fine[requirement.name] = version
        else:
            wrong.append(f"{requirement.name} {version} (wanted {requirement.specifier})")
    if wrong:
        fix = "run pip install --upgrade tadistill (with --no-index on clusters of the Alliance)"
        return Check("packages", "problem", "; ".join(wrong), fix)
    shown = [f"{name} {fine[name]}" for name in ("torch", "transformers", "accelerate", "datasets") if name in fine]
    return Check("packages", "ok", f"{', '.join(shown)}; all {len(fine)} are new enough")


def wheelhouse(requirements: Iterable[str]) -> Check | None:
    """Check the wheelhouse (the shared folder of Python packages on clusters of the Alliance). Return None on other machines."""
    wanted = _here(requirements)
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("".join(f"{r.name}{r.specifier}\n" for r in wanted))
        file.flush()
        out = output_of("avail_wheels", "-r", file.name, "--not-available")
    if out is None:
        return None
    words = set(map(canonicalize_name, re.findall(r"[\w.-]+", out)))
    gaps = [r.name for r in wanted if canonicalize_name(r.name) in words]
    if not gaps:
        return Check("wheelhouse", "ok", "the wheelhouse has all required packages")
    fix = "download these wheels on a login node (pip download --no-deps) and install the files"
    return Check("wheelhouse", "warning", f"the wheelhouse does not have {', '.join(gaps)}", fix)


def _here(requirements: Iterable[str]) -> list[Requirement]:
    # without those of extras and of other platforms
    return [r for r in map(Requirement, requirements) if not r.marker or r.marker.evaluate({"extra": ""})]


# --- devices, Slurm, modules --------------------------------------------------------------------------------------------


def gpus() -> Check:
    """List the GPUs of this machine. A login node has no GPU."""
    out = output_of("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader")
    found = [line.strip() for line in (out or "").splitlines() if line.strip()]
    return Check("gpus", "ok", "; ".join(found) or "none found; training here uses the CPU, and the jobs of a cluster get their own GPUs")


def slurm(site: str | None) -> Check:
    """Check that Slurm's commands are on PATH, and that `squeue` works. `site` is the name of the cluster, if there is one."""
    absent = [name for name in _SLURM if shutil.which(name) is None]
    if not absent:
        if output_of("squeue", "--me", "--noheader") is None:
            fix = "run `squeue --me`; if it fails too, ask the support team of the cluster"
            return Check("slurm", "problem", "Slurm's controller does not answer", fix)
        return Check("slurm", "ok", (output_of("sbatch", "--version") or "").strip() or "here")
    if len(absent) == len(_SLURM) and site is None:
        return Check("slurm", "ok", "not installed (only cluster commands, such as `tadistill submit`, need it)")
    return Check("slurm", "problem", f"not on PATH: {', '.join(absent)}", "go to a login node of the cluster")


def account(pattern: str | None, environment: Mapping[str, str]) -> Check:
    """Check the Slurm account to which jobs are charged. SBATCH_ACCOUNT and SLURM_ACCOUNT override the account in a batch script."""
    given = accounts_in(environment)
    if len(set(given.values())) > 1:
        found = ", ".join(f"{name}={value}" for name, value in given.items())
        return Check("account", "problem", found, "these variables name different accounts; unset one of them")
    name = next(iter(given.values()), None)
    if name is None:
        known = accounts()
        if not pattern:
            return Check("account", "ok", f"no account is set; your accounts: {', '.join(known)}" if known else "no account is set")
        fitting = [each for each in known if re.fullmatch(pattern, each)]
        shown = f"no account is set; your accounts: {', '.join(fitting)}" if fitting else "no account is set"
        return Check("account", "warning", shown, f"export SBATCH_ACCOUNT={(fitting or ['NAME'])[0]}, or submit with --account")
    if pattern and not re.fullmatch(pattern, name):
        return Check("account", "problem", name, f"account names here must match the pattern {pattern}; correct {next(iter(given))}")
    return Check("account", "ok", name)


def accounts() -> list[str]:
    """Return the names of this user's Slurm accounts. The endings _cpu and _gpu, which a cluster may add, are removed."""
    out = output_of("sshare", "-U", "--noheader", "--parsable2", "--format=Account")
    if out is None:
        user = os.environ.get("USER", "")
        out = output_of("sacctmgr", "--noheader", "--parsable2", "show", "associations", f"user={user}", "format=account")
    names = [line.split("|")[0].strip() for line in (out or "").splitlines()]
    return sorted({re.sub(r"_(cpu|gpu)$", "", name) for name in names if name})


def modules(wanted: Iterable[str], environment: Mapping[str, str]) -> Check:
    """Check that the modules in the cluster's profile are loaded, and that pyarrow can be imported."""
    loaded = {part.split("/")[0] for part in environment.get("LOADEDMODULES", "").split(":")}
    wanted = list(wanted)
    absent = [name for name in wanted if name.split("/")[0] not in loaded]
    if importlib.util.find_spec("pyarrow") is None:
        fix = f"run module load {' '.join(wanted)} before you create and activate the environment" if wanted else "pip install pyarrow"
        return Check("modules", "problem", "pyarrow cannot be imported", fix)
    if absent:
        fix = f"run module load {' '.join(wanted)} (jobs load them automatically)"
        return Check("modules", "warning", f"not loaded: {', '.join(absent)}", fix)
    return Check("modules", "ok", f"{', '.join(wanted) or 'none needed'}; pyarrow can be imported")


# --- disks --------------------------------------------------------------------------------------------------------------


def quota(places: Mapping[str, Path]) -> list[Check]:
    """Check the user's disk quotas. A full quota is a problem. A quota that is more than 90 % full gives a warning.

    The numbers come from the program `diskusage_report`, or else from `lfs quota`. The list is empty if neither program exists.
    """
    report = output_of("diskusage_report")
    if report is not None:
        lines = report.splitlines()
    else:
        user = os.environ.get("USER", "")
        lines = [_lustre(place, output_of("lfs", "quota", "-q", "-u", user, str(_existing(path))) or "") for place, path in places.items()]
    checks = []
    for line in lines:
        pairs = [(float(a) * _UNITS[u.lower()], float(b) * _UNITS[v.lower()]) for a, u, b, v in _OF.findall(line)]
        shares = [used / allowed for used, allowed in pairs if allowed]
        if shares:
            state = "problem" if max(shares) >= 1 else "warning" if max(shares) > 0.9 else "ok"
            fix = "" if state == "ok" else "delete or move files; a job cannot save its state if the quota is full"
            checks.append(Check("quota", state, " ".join(line.split()), fix))
    return checks


def _lustre(place: str, line: str) -> str:
    numbers = [part.rstrip("*") for part in line.split()[1:]]
    if len(numbers) < 7 or not all(numbers[i].isdecimal() for i in (0, 2, 4, 6)):
        return ""
    return f"{place} {numbers[0]}k/{numbers[2]}k {numbers[4]}/{numbers[6]}"


def space(name: str, path: Path) -> Check:
    """Check the free space on the disk of a folder. The folder may not exist yet."""
    free = shutil.disk_usage(_existing(path)).free
    found = f"{size(free)} free at {path}"
    if free < _LITTLE:
        return Check(name, "problem" if free < _NOTHING else "warning", found, "free some space, or move this folder to a larger disk")
    return Check(name, "ok", found)


def cache(name: str, variable: str, path: Path, site: str | None, environment: Mapping[str, str]) -> Check:
    """Check the free space of a cache folder. On a cluster, also check that the environment variable for this folder is set."""
    found = space(name, path)
    if found.state == "ok" and site and not environment.get(variable):
        fix = f"export {variable}=FOLDER, with a folder on $SCRATCH or $PROJECT; jobs may not see the default folder"
        return Check(name, "warning", f"{found.found}; {variable} is not set", fix)
    return found


def _existing(path: Path) -> Path:
    path = Path(os.path.expanduser(path)).resolve()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def store(root: Path) -> list[Check]:
    """Check three things: files in the store can be written; they can be locked; and the disk's clock agrees with this machine's clock."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".doctor.", dir=root) as folder:
            before, written = Path(folder, "before"), Path(folder, "after")
            before.write_text("tadistill doctor\n", encoding="utf-8")
            now = time.time()
            os.replace(before, written)
            skew = written.stat().st_mtime - now
            fault = _lock_fault(Path(folder, "lock"))
    except OSError as error:
        fix = "set --runs (or TADISTILL_RUNS) to a writable folder"
        return [Check("store", "problem", f"{root} cannot be written: {cause(error)}", fix)]
    checks = [Check("store", "ok", f"{root} can be written")]
    if fault:
        fix = "run only one command at a time with this store, or set --runs to a folder on another file system"
        checks.append(Check("locks", "problem", fault, fix))
    else:
        checks.append(Check("locks", "ok", "file locking works"))
    fix = "no action is needed, but the times of files and jobs will look wrong" if abs(skew) > _SKEW else ""
    checks.append(
        Check(
            "clock", "warning" if fix else "ok", f"the disk's clock differs from this machine's clock by {round(skew, 1) + 0.0:+.1f} s", fix
        )
    )
    return checks


def _lock_fault(path: Path) -> str:
    code = f"from filelock import FileLock, Timeout\ntry:\n FileLock({str(path)!r}).acquire(timeout=0)\nexcept Timeout:\n print('held')"
    try:
        with FileLock(path, timeout=1):
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (Timeout, NotImplementedError, subprocess.TimeoutExpired) as error:
        return f"a file cannot be locked ({type(error).__name__})"
    return "" if done.stdout.strip() == "held" else "two processes can have the same file lock at the same time"


# --- a recipe's data and models -----------------------------------------------------------------------------------------


def data_root(root: str | None) -> Check:
    """Check that the folder of local data sets exists."""
    if root is None:
        return Check("data", "ok", "TADISTILL_DATA is not set (data sets are then read from the hub or from their paths)")
    if not os.path.isdir(os.path.expanduser(root)):
        return Check("data", "problem", f"{root} is not a folder", "correct data.root in the recipe or the variable TADISTILL_DATA")
    return Check("data", "ok", root)


def fetched(recipe: Recipe, runs: Path, site: str | None) -> Check:
    """Check that every model and data set of the recipe is on this disk, because jobs have no network, and can be read."""
    try:
        check_sources(recipe)
        absent, changed = compare(recipe, runs)
    except TadistillError as error:
        return Check("fetched", "problem", str(error), "correct the recipe or the file named in this message")
    if absent:
        found = "; ".join(line.split(" is not on this disk")[0] for line in absent)
        return Check("fetched", "problem" if site else "warning", f"not on this disk: {found}", "run `tadistill fetch RECIPE`")
    if changed:
        return Check("fetched", "warning", "; ".join(changed), "run `tadistill fetch RECIPE`, which records the new commits")
    return Check("fetched", "ok", "everything is on this disk")


def trackers(recipe: Recipe) -> Check:
    """Check that the packages of the recipe's experiment trackers, such as wandb, are installed."""
    absent = missing_trackers(recipe)
    names = ", ".join(recipe.runtime.trackers)
    return Check("trackers", "problem", *absent[0].split("; ", 1)) if absent else Check("trackers", "ok", names)


# --- all checks --------------------------------------------------------------------------------------------------------


def examine(*, runs: Path, recipe: Recipe | None = None, profile: Profile | None = None) -> list[Check]:
    """Run all checks. With `profile`, also check the rules of this cluster. With `recipe`, also check the recipe's models and data."""
    from huggingface_hub import constants  # imported here because other commands do not need this package

    site, environment = (profile.name if profile else None), os.environ
    found = [*_package(on_cluster=profile is not None), gpus(), slurm(site)]
    found.append(account(profile.account if profile else None, environment))
    found.append(modules(profile.modules if profile else (), environment))
    places = {"runs": runs} | ({"scratch": Path(environment["SCRATCH"])} if environment.get("SCRATCH") else {})
    hub = Path(constants.HF_HUB_CACHE)
    found += quota(places | {"hub cache": hub})
    found += [space(name, path) for name, path in places.items()]
    found.append(cache("hub cache", "HF_HOME", hub, site, environment))
    found.append(cache("cache", "TADISTILL_CACHE", cache_root(), site, environment))
    found += store(store_of(runs).root)
    found.append(data_root((recipe.data.root if recipe else None) or environment.get("TADISTILL_DATA")))
    if recipe:
        found.append(fetched(recipe, runs, site))
        if recipe.runtime.trackers:
            found.append(trackers(recipe))
    return found


def _package(*, on_cluster: bool) -> list[Check]:
    try:
        wanted, requirements = metadata.metadata("tadistill")["Requires-Python"], metadata.requires("tadistill") or []
    except metadata.PackageNotFoundError:
        fix = "run pip install -e . in the repository of tadistill; without it, the required versions are unknown"
        return [Check("packages", "warning", "the package tadistill is not installed", fix)]
    found = [python(platform.python_version(), wanted), packages(requirements)]
    gaps = wheelhouse(requirements) if on_cluster else None
    return [*found, gaps] if gaps else found


def table(found: list[Check]) -> Table:
    shown = Table(box=None)
    for column in ("check", "state", "found", "what to do"):
        shown.add_column(column, no_wrap=column in ("check", "state"), overflow="fold")
    for check in found:
        shown.add_row(check.name, f"[{_STYLES[check.state]}]{check.state}[/]", escape(check.found), escape(check.fix))
    return shown
