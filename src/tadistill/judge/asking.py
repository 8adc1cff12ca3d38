"""Ask the judge (a language model that rates answers) in several threads. The number of tokens is estimated before the first request.

Every reply is appended to a cache file at once (one JSON object per line). A question with a cached reply is not asked again.
"""

import hashlib
import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tadistill.config.evaluate import Judge
from tadistill.errors import JudgeFailed
from tadistill.judge.questions import ATTEMPTS, Question, parse_scores, with_reminder
from tadistill.models.endpoint import Refused, Reply, Unavailable, complete, estimated_tokens
from tadistill.models.replies import Cache, in_threads

if TYPE_CHECKING:
    from openai import OpenAI

_TOKENS_A_REPLY = 50  # two numbers and a sentence; only for the estimate
_REFUSALS = 3  # after so many refusals and no answer, the run assumes that the endpoint refuses everything

Scores = tuple[float, float]


@dataclass(frozen=True)
class RequestEstimate:
    """The numbers of questions and tokens of a run of the judge. The tokens are estimated from the lengths of the texts.

    `cached` is the number of questions that already have a reply. `most_out` is the largest possible number of generated tokens.
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
    """The judge's scores. `scores` maps the text of a question to its scores (Assistant 1, Assistant 2).

    `unparsed` has the texts of the questions to which no reply had readable scores.
    """

    scores: dict[str, Scores]
    unparsed: frozenset[str]
    refused: dict[str, str]
    """Maps the text of a question to the reason why the endpoint refused it."""


def question_key(settings: Judge, text: str) -> str:
    """Return the cache key of a question. It depends on the judge model and its sampling settings.

    It does not depend on the address of the endpoint, so the replies stay valid if the address changes.
    """
    content = [settings.model, settings.temperature, settings.max_tokens, text]
    return hashlib.sha256(json.dumps(content, ensure_ascii=True).encode()).hexdigest()[:32]


def estimate_requests(questions: Sequence[Question], settings: Judge, cache: Cache) -> RequestEstimate:
    """Estimate the requests and tokens of a run. Questions with the same text are asked and counted once."""
    texts = list(dict.fromkeys(question.text for question in questions))
    open_texts = [text for text in texts if not _settled(text, settings, cache)]
    tokens_in = estimated_tokens(sum(map(len, open_texts)))
    expected = len(open_texts) * min(_TOKENS_A_REPLY, settings.max_tokens)
    return RequestEstimate(len(texts), len(texts) - len(open_texts), tokens_in, expected, len(open_texts) * settings.max_tokens)


def ask(client: "OpenAI", settings: Judge, text: str) -> Reply:
    """Send one question to the judge, and return the reply. Raises Refused and Unavailable as `models.endpoint.complete` does."""
    message = {"role": "user", "content": text}
    return complete(
        client,
        {"model": settings.model, "messages": [message], "temperature": settings.temperature, "max_tokens": settings.max_tokens},
    )


def ask_all(
    questions: Sequence[Question], settings: Judge, cache: Cache, ask: Callable[[str], Reply], *, tick: Callable[[], None] = lambda: None
) -> Verdicts:
    """Ask every question that has no cached reply, and return all scores. The scores do not depend on the order of the replies.

    Args:
        ask: sends a question and returns the reply, or raises `Refused` or `Unavailable`. It is called from `settings.jobs` threads.
        tick: called once for each distinct question, after it is answered or refused.

    Raises:
        JudgeFailed: the endpoint stopped answering. The replies to all requests that were sent are awaited and saved first.
    """
    texts = list(dict.fromkeys(question.text for question in questions))
    run = _Run(settings, cache, ask, tick)
    futures = in_threads(texts, run.settle, threads=settings.jobs, stop=run.stop)
    for future in futures:
        if not future.cancelled() and (error := future.exception()) and not isinstance(error, Unavailable):
            raise error
    if run.failure:
        done = sum(_settled(text, settings, cache) for text in texts)
        raise JudgeFailed(stopped(f"the endpoint failed: {run.failure}", done, len(texts)))
    return Verdicts(run.scores, frozenset(run.unparsed), run.refused)


def stopped(reason: str, done: int, total: int) -> str:
    return f"{reason}; {done} of {total} questions are answered and saved, {total - done} are missing; run the same command to continue"


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
            self._fail(f"it has refused all questions so far, because {error}")
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
