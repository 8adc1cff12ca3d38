"""Ask the judge (a language model that rates answers) in several threads. The number of tokens is estimated before the first request.

Every reply is appended to a cache file at once (one JSON object per line). A question with a cached reply is not asked again.
"""

import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from filelock import FileLock, Timeout

from tadistill.config.judge import Judge
from tadistill.errors import JudgeFailed, StoreError
from tadistill.judge.endpoint import Refused, Reply, Unavailable
from tadistill.judge.questions import ATTEMPTS, Question, parse_scores, with_reminder

_CHARACTERS_A_TOKEN = 4  # English text in the usual vocabularies; only for the estimate
_TOKENS_A_REPLY = 50  # two numbers and a sentence; only for the estimate
_REFUSALS = 3  # after so many refusals and no answer, the run assumes that the endpoint refuses everything

Scores = tuple[float, float]


@dataclass(frozen=True)
class RequestEstimate:
    """The numbers of questions and tokens of a run. Tokens are estimated from the length of the texts.

    `cached` is the number of questions that already have a reply. `most_out` is the upper limit of the generated tokens.
    """

    questions: int
    cached: int
    tokens_in: int
    tokens_out: int
    most_out: int

    @property
    def requests(self) -> int:
        """The number of requests if every reply has readable scores: one for each unanswered question.

        Otherwise there are more requests, but at most three times as many.
        """
        return self.questions - self.cached


@dataclass(frozen=True)
class Verdicts:
    """The judge's replies. `scores` maps the text of a question to its scores (Assistant 1, Assistant 2)."""

    scores: dict[str, Scores]
    unparsed: frozenset[str]
    refused: dict[str, str]
    """Maps the text of a question to the reason why the endpoint refused it."""


def question_key(settings: Judge, text: str) -> str:
    """Return the cache key of a question. It depends on the judge model and its sampling settings.

    It does not depend on the address of the endpoint, so an endpoint that moves keeps its replies.
    """
    content = [settings.model, settings.temperature, settings.max_tokens, text]
    return hashlib.sha256(json.dumps(content, ensure_ascii=True).encode()).hexdigest()[:32]


class Cache:
    """The judge's replies, in memory and in a file. Several threads may add replies at the same time."""

    def __init__(self, path: Path, replies: dict[str, Reply]):
        self._replies = replies
        self._lock = threading.Lock()
        self._file = path.open("a", encoding="utf-8")

    def __enter__(self) -> "Cache":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def get(self, key: str) -> Reply | None:
        return self._replies.get(key)

    def put(self, key: str, reply: Reply) -> None:
        line = json.dumps({"key": key, "text": reply.text, "in": reply.tokens_in, "out": reply.tokens_out}, ensure_ascii=False)
        with self._lock:
            self._replies[key] = reply
            try:
                self._file.write(line + "\n")
                self._file.flush()
            except OSError as error:
                raise StoreError(f"{self._file.name} cannot be written ({error.strerror}); check disk space and quota") from error


@contextmanager
def open_cache(path: Path) -> Iterator[Cache]:
    """Open the file with the replies to a study's questions. Only one process at a time can open it.

    Raises:
        StoreError: another process has opened the file, or a line of it is damaged.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock", timeout=0), Cache(path, _read_replies(path)) as cache:
            yield cache
    except Timeout as error:
        raise StoreError(f"another process is writing judgements to {path.parent}; wait until it has finished") from error
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"{path} cannot be opened ({error.strerror}); check the directory's permissions") from error


def _read_replies(path: Path) -> dict[str, Reply]:
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
            raise StoreError(
                f"{path}, line {number} is not a reply ({error}); delete this line; its question is then asked again"
            ) from error
    return replies


def estimate_requests(questions: Sequence[Question], settings: Judge, cache: Cache) -> RequestEstimate:
    """Estimate the requests and tokens of a run. Questions with the same text are asked and counted once."""
    texts = list(dict.fromkeys(question.text for question in questions))
    open_texts = [text for text in texts if not _settled(text, settings, cache)]
    tokens_in = sum(len(text) for text in open_texts) // _CHARACTERS_A_TOKEN
    expected = len(open_texts) * min(_TOKENS_A_REPLY, settings.max_tokens)
    return RequestEstimate(len(texts), len(texts) - len(open_texts), tokens_in, expected, len(open_texts) * settings.max_tokens)


def ask_all(
    questions: Sequence[Question], settings: Judge, cache: Cache, ask: Callable[[str], Reply], *, tick: Callable[[], None] = lambda: None
) -> Verdicts:
    """Ask every question that has no cached reply, and return all scores. The scores do not depend on the order of the replies.

    Args:
        ask: sends a question and returns the reply, or raises `Refused` or `Unavailable`. It is called from `settings.jobs` threads.
        tick: called after each different question that is answered or refused.

    Raises:
        JudgeFailed: the endpoint stopped answering. Replies to requests that are on their way are still awaited and saved.
    """
    texts = list(dict.fromkeys(question.text for question in questions))
    run = _Run(settings, cache, ask, tick)
    pool = ThreadPoolExecutor(settings.jobs, thread_name_prefix="judge")
    futures: list[Future[None]] = []
    try:
        futures = [pool.submit(run.settle, text) for text in texts]
        wait(futures, return_when=FIRST_EXCEPTION)
    finally:  # also after Ctrl-C: pending requests are paid for, so their replies are kept
        run.stop.set()
        pool.shutdown(wait=True, cancel_futures=True)
    for future in futures:
        if not future.cancelled() and (error := future.exception()) and not isinstance(error, Unavailable):
            raise error
    if run.failure:
        done = sum(_settled(text, settings, cache) for text in texts)
        raise JudgeFailed(stopped(f"the endpoint {run.failure}", done, len(texts)))
    return Verdicts(run.scores, frozenset(run.unparsed), run.refused)


def stopped(reason: str, done: int, total: int) -> str:
    return f"{reason}: {done} of {total} questions are answered and saved, {total - done} are missing; run the same command to continue"


class _Run:
    def __init__(self, settings: Judge, cache: Cache, ask: Callable[[str], Reply], tick: Callable[[], None]):
        self.settings, self.cache, self.ask, self.tick = settings, cache, ask, tick
        self.stop = threading.Event()
        self.lock = threading.Lock()
        self.scores: dict[str, Scores] = {}
        self.unparsed: set[str] = set()
        self.refused: dict[str, str] = {}
        self.answered = 0
        self.failure = ""

    def settle(self, text: str) -> None:
        found = None
        for attempt in range(ATTEMPTS):
            asked = with_reminder(text, attempt)
            key = question_key(self.settings, asked)
            reply = self.cache.get(key)
            if reply is None:
                if self.stop.is_set():
                    return
                reply = self._request(text, asked)
                if reply is None:
                    return
                self.cache.put(key, reply)
            found = parse_scores(reply.text)
            if found is not None:
                break
        with self.lock:
            self.answered += 1
            if found is None:
                self.unparsed.add(text)
            else:
                self.scores[text] = found
            self.tick()

    def _request(self, text: str, asked: str) -> Reply | None:
        try:
            return self.ask(asked)
        except Refused as error:
            with self.lock:
                self.refused[text] = str(error)
                self.tick()
                if self.answered or len(self.refused) < _REFUSALS:
                    return None
            self._fail(f"has refused all questions so far: {error}")
            raise Unavailable(str(error)) from error
        except Unavailable as error:
            self._fail(str(error))
            raise

    def _fail(self, reason: str) -> None:
        with self.lock:
            self.failure = self.failure or reason
        self.stop.set()


def _settled(text: str, settings: Judge, cache: Cache) -> bool:
    for attempt in range(ATTEMPTS):
        reply = cache.get(question_key(settings, with_reminder(text, attempt)))
        if reply is None:
            return False
        if parse_scores(reply.text) is not None:
            return True
    return True
