"""Every reply that a judge gave, one JSON object a line, appended as it comes. Nothing that is in it is asked again."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from filelock import FileLock, Timeout

from tadistill.errors import StoreError


@dataclass(frozen=True)
class Settings:
    """What a reply depends on, besides the question; where the endpoint lies does not count."""

    judge: str
    temperature: float
    max_tokens: int


@dataclass(frozen=True)
class Reply:
    """What the endpoint said. Tokens are 0 where it did not count them."""

    text: str
    tokens_in: int
    tokens_out: int


def key_of(settings: Settings, text: str) -> str:
    """The address of the reply to a text."""
    content = [settings.judge, settings.temperature, settings.max_tokens, text]
    return hashlib.sha256(json.dumps(content, ensure_ascii=True).encode()).hexdigest()[:32]


class Cache:
    """The replies in memory, and the open file behind them. Threads may put at the same time."""

    def __init__(self, path: Path, replies: dict[str, Reply]):
        self._replies = replies
        self._lock = threading.Lock()
        self._file = path.open("a", encoding="utf-8")

    def __enter__(self) -> "Cache":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def get(self, key: str) -> Reply | None:
        """The reply, or None where the question was never answered."""
        return self._replies.get(key)

    def put(self, key: str, reply: Reply) -> None:
        """Keeps a reply, on disk before it returns."""
        line = json.dumps({"key": key, "text": reply.text, "in": reply.tokens_in, "out": reply.tokens_out}, ensure_ascii=False)
        with self._lock:
            self._replies[key] = reply
            try:
                self._file.write(line + "\n")
                self._file.flush()
            except OSError as error:
                raise StoreError(f"{self._file.name} cannot be written ({error.strerror}): check the directory's quota") from error


@contextmanager
def open_cache(path: Path) -> Iterator[Cache]:
    """The cache of a study; one process at a time.

    Raises:
        StoreError: another process has it open, or a line of it is damaged.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock", timeout=0), Cache(path, _read(path)) as cache:
            yield cache
    except Timeout as error:
        raise StoreError(f"another process is judging into {path.parent}: wait for it to end") from error
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"{path} cannot be opened ({error.strerror}): check the directory's permissions") from error


def _read(path: Path) -> dict[str, Reply]:
    """Drops a last line that a killed run left half written."""
    if not path.is_file():
        return {}
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)
    replies: dict[str, Reply] = {}
    for number, line in enumerate(content[:whole].split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            replies[row["key"]] = Reply(str(row["text"]), int(row["in"]), int(row["out"]))
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{path}, line {number} is not a reply ({error}): delete that line; its question is asked again") from error
    return replies
