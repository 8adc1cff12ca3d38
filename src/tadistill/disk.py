"""Digests, the cache folder, and atomic publication: what `sources`, `wheels`, `gguf`, checkpoints and recorded signals share. Imports no
torch.

Called as `with publishing(target) as temporary: ...`; a reader sees the whole of `target` or nothing of it.
"""

import functools
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from tadistill.errors import StoreError

_BLOCK = 1 << 20
_SAMPLES, _SAMPLE_BYTES = 16, 128 << 10


def cache_root() -> Path:
    """The folder of converted models: TADISTILL_CACHE, else tadistill in the user's cache folder."""
    if given := os.environ.get("TADISTILL_CACHE"):
        return Path(given).expanduser()
    return user_cache() / "tadistill"


def user_cache() -> Path:
    """The user's cache folder, in which programs have theirs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()


def sha256(path: Path) -> str:
    """Hex sha256 of a whole file; hashed again only when its size or modification time changed in this process."""
    stat = path.stat()
    return _sha256(str(path.resolve()), stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _sha256(path: str, size: int, modified: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def sampled_digest(path: Path) -> str:
    """Hex sha256 of a weight file's size and of 2 MiB of it: 16 evenly spaced blocks, the first and last bytes included.

    Blocks in the middle matter: two fine-tunings of one model may share their embeddings and their final layers.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for i in range(_SAMPLES):
            file.seek(max(size - _SAMPLE_BYTES, 0) * i // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Wait until what a file holds is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What goes wrong while the block writes `path`, in words.

    Raises:
        StoreError: it cannot be written.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch reports a full disk as RuntimeError
        raise StoreError(f"cannot write {path}: {error}; free some space or check permissions, then run the same command again") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to, of a fixed name; it becomes `path` when the block ends without an error.

    For files that one process owns and writes again after a kill, which thus overwrites what the kill left. It is on the disk before it is
    renamed: after a power failure `path` is the old file or the new one, whole.

    Raises:
        StoreError: it cannot be written.
    """
    temporary = path.with_suffix(".tmp")
    with writing(path):
        try:
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextmanager
def publishing(target: Path) -> Iterator[Path]:
    """A temporary sibling to write a file or a folder at; it becomes `target` when the block ends without an error.

    Two processes may publish the same target: the first one wins, and both find it whole.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield work / target.name
        try:
            os.replace(work / target.name, target)
        except OSError:
            # A folder cannot replace one that is not empty: another process was first, with the same content.
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
