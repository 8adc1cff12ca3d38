"""Send requests to an endpoint in several threads, and keep every reply in a file, so that no request is sent (and paid for) twice.

    with open_cache(path, waiting) as cache:
        in_threads(requests, lambda request: cache.put(request.key, ask(request)), threads=8, stop=Event())

Every reply becomes one line of the file, a JSON object. `Cache.put` returns when this line is on the disk.
"""

import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO, TypeVar

from tadistill.errors import StoreError, cause
from tadistill.models.chat_api import Reply

_LOOK = 0.2  # the longest time between two calls of `look`, in seconds
Item = TypeVar("Item")


class Cache:
    """The replies of an endpoint, in memory and in a file. Several threads may add replies at the same time."""

    def __init__(self, file: TextIO, replies: dict[str, Reply]):
        self._file, self._replies, self._lock = file, replies, threading.Lock()

    def get(self, key: str) -> Reply | None:
        return self._replies.get(key)

    def put(self, key: str, reply: Reply) -> None:
        """Add a reply. When this function returns, the reply is on the disk."""
        row: dict[str, Any] = {"key": key, "text": reply.text, "in": reply.tokens_in, "out": reply.tokens_out}
        row |= {} if reply.finish == "stop" else {"finish": reply.finish}
        row |= {"model": reply.model} if reply.model else {}
        with self._lock:
            self._replies[key] = reply
            try:
                self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
                self._file.flush()
                os.fsync(self._file.fileno())
            except OSError as error:
                raise StoreError(f"{self._file.name} cannot be written ({cause(error)}); check disk space and quota") from error


@contextmanager
def open_cache(path: Path, waiting: Callable[[], None] | None = None) -> Iterator[Cache]:
    """Open a file of replies. Only one process at a time can open it.

    Args:
        waiting: called about once a second while another process has opened the file. It may raise an error to give up. Without
            `waiting`, this function does not wait.

    Raises:
        StoreError: another process has opened the file and there is no `waiting`, a line of the file is damaged, or the file cannot be
            opened or written.
    """
    from filelock import FileLock, Timeout  # imported here because it loads asyncio, and a plan needs no lock

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{path}.lock")
        while True:
            try:
                lock.acquire(timeout=1 if waiting else 0)
                break
            except Timeout as error:
                if waiting is None:
                    raise StoreError(f"another process is writing replies to {path}; wait until that process has finished") from error
                waiting()
        try:
            replies = read_replies(path, mend=True)
            with path.open("a", encoding="utf-8") as file:
                yield Cache(file, replies)
        finally:
            lock.release()
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"{path} cannot be opened ({cause(error)}); check the directory's permissions") from error


def read_replies(path: Path, *, mend: bool = False) -> dict[str, Reply]:
    """Return the replies in a file, by their keys, or an empty dict if there is no file. An incomplete last line is left out: another
    process is writing it, or a killed process left it. With `mend`, such a line is removed from the file.

    Raises:
        StoreError: a line is damaged.
    """
    content = path.read_bytes() if path.is_file() else b""
    whole = content.rfind(b"\n") + 1
    if mend and whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)
    replies: dict[str, Reply] = {}
    for number, line in enumerate(content[:whole].split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            more = str(row.get("finish", "stop")), str(row.get("model", ""))
            reply = Reply(str(row["text"]), int(row["in"]), int(row["out"]), *more)
            replies.setdefault(row["key"], reply)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(
                f"{path}, line {number} is not a reply ({error}); delete this line, so that its request is sent again"
            ) from error
    return replies


def in_threads(
    items: Iterable[Item], work: Callable[[Item], None], *, threads: int, stop: threading.Event, look: Callable[[], None] = lambda: None
) -> list[Future[None]]:
    """Call `work` with each item, in several threads, and return the futures of all calls. A future contains the error of its call.

    After the first error, no further call begins. Running calls are awaited, also after Ctrl-C, because their requests are paid for.

    Args:
        stop: an event that this function sets before it awaits the running calls. `work` can check it to end early.
        look: called a few times a second by this thread. It may raise an error to stop the work.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="asking")
    futures: list[Future[None]] = []
    try:
        futures = [pool.submit(work, item) for item in items]
        waiting = set(futures)
        while waiting:
            done, waiting = wait(waiting, timeout=_LOOK, return_when=FIRST_EXCEPTION)
            look()
            if any(future.exception() for future in done):
                break
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)
    return futures
