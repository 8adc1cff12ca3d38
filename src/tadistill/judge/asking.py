"""What is still to be asked, what that costs, and the asking: several threads, every reply kept as it comes."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from tadistill.errors import JudgeFailed
from tadistill.judge.cache import Cache, Reply, Settings, key_of
from tadistill.judge.endpoint import Refused, Unavailable
from tadistill.judge.questions import ATTEMPTS, Question, again, parse

_CHARACTERS_A_TOKEN = 4  # English text in the usual vocabularies; only for the estimate
_TOKENS_A_REPLY = 50  # two numbers and a sentence; only for the estimate
_REFUSALS = 3  # so many questions refused and none answered: the endpoint refuses all

Scores = tuple[float, float]


@dataclass(frozen=True)
class Estimate:
    """What a run will ask. Tokens are guessed from the length of the text; `most` is the limit on tokens out."""

    questions: int
    cached: int
    tokens_in: int
    tokens_out: int
    most_out: int

    @property
    def requests(self) -> int:
        """Questions that no kept reply answers; a reply that cannot be parsed costs up to two more requests."""
        return self.questions - self.cached

    def cost(self, price_in: float, price_out: float) -> tuple[float, float]:
        """The expected cost, and that with replies of full length, from prices a million tokens."""
        into = self.tokens_in * price_in / 1e6
        return into + self.tokens_out * price_out / 1e6, into + self.most_out * price_out / 1e6


@dataclass(frozen=True)
class Verdicts:
    """The scores of (Assistant 1, Assistant 2) of every question that has them; the others by their text."""

    scores: dict[str, Scores]
    unparsed: frozenset[str]
    refused: dict[str, str]  # text -> the endpoint's reason


def estimate(questions: Sequence[Question], settings: Settings, cache: Cache) -> Estimate:
    """Counts each distinct text once: arms that gave the same answer share their questions."""
    texts = list(dict.fromkeys(question.text for question in questions))
    open_texts = [text for text in texts if not _settled(text, settings, cache)]
    tokens_in = sum(len(text) for text in open_texts) // _CHARACTERS_A_TOKEN
    expected = len(open_texts) * min(_TOKENS_A_REPLY, settings.max_tokens)
    return Estimate(len(texts), len(texts) - len(open_texts), tokens_in, expected, len(open_texts) * settings.max_tokens)


def ask_all(
    questions: Sequence[Question],
    settings: Settings,
    cache: Cache,
    ask: Callable[[str], Reply],
    *,
    jobs: int,
    tick: Callable[[], None] = lambda: None,
) -> Verdicts:
    """Asks what the cache lacks; the result does not depend on the order in which replies come.

    Args:
        ask: text -> reply; raises `Refused` or `Unavailable`. Called from `jobs` threads.
        tick: called after each distinct question that is settled.

    Raises:
        JudgeFailed: the endpoint stopped. Requests on their way are waited for and their replies kept.
    """
    texts = list(dict.fromkeys(question.text for question in questions))
    run = _Run(settings, cache, ask, tick)
    pool = ThreadPoolExecutor(jobs, thread_name_prefix="judge")
    futures: list[Future[None]] = []
    try:
        futures = [pool.submit(run.settle, text) for text in texts]
        wait(futures, return_when=FIRST_EXCEPTION)
    finally:  # also on Ctrl-C: what is on its way is paid for, so it is kept
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
    """The sentence with which a run ends before its time."""
    return f"{reason}: {done} of {total} questions are answered and kept, {total - done} are missing; the same command goes on from there"


class _Run:
    """What the threads of one run share."""

    def __init__(self, settings: Settings, cache: Cache, ask: Callable[[str], Reply], tick: Callable[[], None]):
        self.settings, self.cache, self.ask, self.tick = settings, cache, ask, tick
        self.stop = threading.Event()
        self.lock = threading.Lock()
        self.scores: dict[str, Scores] = {}
        self.unparsed: set[str] = set()
        self.refused: dict[str, str] = {}
        self.answered = 0
        self.failure = ""

    def settle(self, text: str) -> None:
        """Asks one question until its reply can be parsed, at most `ATTEMPTS` times."""
        found = None
        for attempt in range(ATTEMPTS):
            asked = again(text, attempt)
            key = key_of(self.settings, asked)
            reply = self.cache.get(key)
            if reply is None:
                if self.stop.is_set():
                    return
                reply = self._request(text, asked)
                if reply is None:
                    return
                self.cache.put(key, reply)
            found = parse(reply.text)
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
            self._fail(f"refuses every question so far: {error}")
            raise Unavailable(str(error)) from error
        except Unavailable as error:
            self._fail(str(error))
            raise

    def _fail(self, reason: str) -> None:
        with self.lock:
            self.failure = self.failure or reason
        self.stop.set()


def _settled(text: str, settings: Settings, cache: Cache) -> bool:
    """Whether the cache holds a reply that can be parsed, or all attempts."""
    for attempt in range(ATTEMPTS):
        reply = cache.get(key_of(settings, again(text, attempt)))
        if reply is None:
            return False
        if parse(reply.text) is not None:
            return True
    return True
