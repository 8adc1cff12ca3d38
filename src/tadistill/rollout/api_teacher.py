"""Request a teacher's answers to the training prompts from an OpenAI-compatible API.

    wanted = requests(examples, api, decoding, seed=1)
    with open_cache(replies_file(store.root, api.model), waiting) as cache:
        answers = Asking(api, cache).all(wanted, look)

A request contains the messages of a training row. The API applies its own chat template to them. Two requests with equal messages, settings
and seed are sent once.
"""

import hashlib
import json
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tadistill.config.common import Decoding
from tadistill.config.remote import NOT_SENT, Api
from tadistill.errors import ConfigError, ServerFailed
from tadistill.models.chat_api import PUBLIC, Refused, Reply, Unavailable, complete, connect
from tadistill.models.chat_api_replies import Cache, in_threads
from tadistill.text import counted, form

if TYPE_CHECKING:
    from openai import OpenAI

PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0)
"""Seconds to wait before a failed request is sent again: the first number after its first failure, and so on."""
LONGEST_WAIT = 600.0
"""Longest wait (Retry-After) in seconds that an API may demand. If it demands a longer one, the stage ends."""
# After so many refusals without any answer, the API is assumed to refuse every request. Requests are sent in a random order, because a
# filter or a limit can refuse all rows of one place; it is another order in each run, so a repeated command begins with other rows. If the
# API refuses three quarters of the rows, the first 30 are all refused with a probability of 0.0002. Fewer are enough if a setting is the
# reason: the API names one that it does not accept, or the answer is cut before it begins, which is paid for. Other empty answers are paid
# for, too. If half of the rows have one, the first 15 all have one with a probability of 0.00003.
_REFUSALS, _REFUSALS_OF_A_SETTING, _EMPTY_ROWS = 30, 3, 15
_EMPTY = "the answer is empty"
_CUT = f"{_EMPTY}; raise `max_new_tokens`"
_SEEDS = 2**31  # seeds are below this number, because some servers accept no larger seed
_SHOWN = 5  # largest number of rows that a message names


@dataclass(frozen=True)
class Request:
    """A request for one answer."""

    body: dict[str, Any]
    """The JSON fields that are sent, such as `model` and `messages`. Fields in `api.omit` are left out."""
    key: str
    """A digest that identifies the request. It does not depend on the API's address, nor on `api.omit`, which names fields not to send."""
    characters: int
    """Number of characters of the messages."""
    row: int
    """Number of the row in its data set, from 1."""
    line: int | None = None
    """The line of the row in its file, from 1. None if the data set is not a local file."""


def requests(prompts: Iterable[Sequence[dict[str, Any]]], api: Api, decoding: Decoding, *, seed: int) -> list[Request]:
    """Return one request per prompt, in order.

    The seed of a request depends on `seed`, on the request's messages, and on the number of earlier prompts with the same messages. So
    rows with other messages do not change the seed. With greedy decoding, requests have no seed, so equal prompts give equal requests.

    Args:
        prompts: the messages of each row.
    """
    found, before = [], Counter[str]()
    common = {"model": api.model, "max_tokens": decoding.max_new_tokens, "temperature": decoding.temperature, "top_p": decoding.top_p}
    for row, messages in enumerate(prompts, 1):
        text = json.dumps(messages, sort_keys=True, ensure_ascii=False)
        whole = common | {"messages": [*messages]}
        if decoding.temperature > 0:
            digest = hashlib.sha256(f"{seed} {before[text]} {text}".encode()).digest()
            whole["seed"] = int.from_bytes(digest[:8], "little") % _SEEDS
            before[text] += 1
        key = hashlib.sha256(json.dumps(whole, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:32]
        body = {name: value for name, value in whole.items() if name not in api.omit}
        found.append(Request(body, key, sum(len(str(message.get("content") or "")) for message in messages), row))
    return found


def replies_file(store: Path, model: str) -> Path:
    """Return the file with all answers of a model behind an API. `store` is the folder of all stages."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", model).strip("-.")[:60]
    return store / "api" / f"{plain}-{hashlib.sha256(model.encode()).hexdigest()[:8]}.jsonl"


def usable(reply: Reply) -> str:
    """Return the fault that makes a reply unusable as an answer to train on. Return an empty text if there is none."""
    if reply.finish not in ("stop", "length"):
        return f"the answer ends by `{reply.finish}`"
    if not reply.text.strip():
        return _CUT if reply.finish == "length" else _EMPTY
    return ""


def same_model(asked: str, answered: str) -> bool:
    """Return True if `answered`, the name in an answer, means the model `asked`. The API may add a version or a date to the name. Also
    return True if `answered` is empty."""
    own, other = (name.rsplit("/", 1)[-1].lower() for name in (asked, answered))
    rest = other.removeprefix(own.removesuffix("-latest"))
    return not answered or own == other or (rest != other and re.fullmatch(r"[-@:](v?\d[\w.-]*)?(-latest)?", rest) is not None)


def _place(request: Request) -> int:
    return request.line or request.row


class Pace:
    """A rate limit for the requests of several threads. Times are in seconds."""

    def __init__(self, per_minute: float | None):
        self._between, self._next, self._held, self._lock = 60 / per_minute if per_minute else 0.0, 0.0, 0.0, threading.Lock()

    def delay(self, now: float) -> float:
        """Reserve the next time at which a request may be sent. Return the seconds from `now` to it."""
        with self._lock:
            at = max(now, self._next)
            self._next = at + self._between
            return at - now

    def hold(self, until: float) -> None:
        """Forbid all requests before the time `until`."""
        with self._lock:
            self._held = max(self._held, until)

    def held(self, now: float) -> float:
        """Return the seconds from `now` to the time that `hold` has set. The result is 0 or less if requests are allowed."""
        return self._held - now

    def turn(self, stop: threading.Event) -> bool:
        """Wait until this thread may send its next request, and return True. If `stop` is set before, return False."""
        wait = self.delay(time.monotonic())
        while not stop.wait(max(0.0, wait)):
            if (wait := self.held(time.monotonic())) <= 0:
                return True
        return False


class _Stopped(Exception):
    """Exception that ends a thread without an answer, because another request failed or the user stops the run."""


@dataclass(frozen=True)
class _Refusal:
    number: int  # of the request, in the order in which they were sent
    why: str
    of_a_setting: bool


def _are_enough(found: Sequence[_Refusal], times: int = 1) -> bool:
    of_a_setting, empty = sum(each.of_a_setting for each in found), sum(each.why == _EMPTY for each in found)
    return len(found) >= times * _REFUSALS or of_a_setting >= times * _REFUSALS_OF_A_SETTING or empty >= times * _EMPTY_ROWS


class Asking:
    """A sender of requests to an API. It repeats failed requests, and stores every answer in the cache."""

    def __init__(self, api: Api, cache: Cache, name: str):
        """`name` is the model's name in error messages."""
        self.api, self.cache, self.name = api, cache, name
        self.pace, self.stop, self.lock = Pace(api.requests_per_minute), threading.Event(), threading.Lock()
        self.known, self.answered, self.reason = 0, 0, ""
        self.failed: dict[int, _Refusal] = {}
        """The reason why a row got no usable answer, by the row's line in its file, or by its number."""
        self.noun = "row"
        self._digests: dict[str, str] = {}
        self._sent, self._waiting = 0, set[int]()  # the number of requests sent so far, and the numbers of those without an answer

    def all(self, wanted: Sequence[Request], look: Callable[[int], None] = lambda done: None) -> list[Reply]:
        """Return an answer to every request. Requests whose answers are in the cache are not sent.

        Args:
            look: called a few times a second with the number of finished requests. It may raise an error to stop.

        Raises:
            ConfigError: the `openai` package or the API key is missing.
            ServerFailed: the API stopped answering, or some rows got no usable answer. All answers so far are kept.
        """
        distinct = {request.key: request for request in reversed(wanted)}
        missing = [request for request in distinct.values() if self.cache.get(request.key) is None]
        random.SystemRandom().shuffle(missing)  # no result depends on the order
        self.known = sum(self.cache.get(request.key) is not None for request in wanted)
        look(self.known)
        if missing:
            client = client_of(self.api)
            self._send(client, missing, look)
            # an empty answer is requested only once more, because each request may cost money
            empty = [request for request in missing if (found := self.failed.get(_place(request))) and found.why == _EMPTY]
            if empty and not self.reason:
                self._send(client, empty, look)
        replies = [self.cache.get(request.key) for request in wanted]
        done = [reply for reply in replies if reply is not None]
        if len(done) < len(replies):
            raise ServerFailed(self._sentence(len(done), len(replies)))
        return done

    def _send(self, client: "OpenAI", wanted: Sequence[Request], look: Callable[[int], None]) -> None:
        self.stop.clear()
        futures = in_threads(
            wanted,
            lambda request: self._settle(client, request),
            threads=self.api.requests,
            stop=self.stop,
            look=lambda: look(self.known + self.answered),
        )
        for future in futures:
            if not future.cancelled() and (error := future.exception()) and not isinstance(error, Unavailable | _Stopped):
                raise error

    def _rows(self) -> str:
        rows = sorted(self.failed)
        named = ", ".join(map(str, rows[:_SHOWN])) + (f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else "")
        return f"{form(len(rows), self.noun, f'{self.noun}s')} {named} of the training set"

    def _sentence(self, done: int, total: int) -> str:
        saved = f"{done} of {counted(total, 'answer is', 'answers are')} saved, {counted(total - done, 'is', 'are')} missing"
        if self.reason:
            return f"the API {self.api.at} of {self.name} failed: {self.reason}; {saved}; run the same command to continue"
        first = min(self.failed)
        return (
            f"the API {self.api.at} of {self.name} gives no usable answer to {self._rows()} "
            f"({self.noun} {first}: {self.failed[first].why}); {saved}; run the same command to ask again, or delete the "
            f"{form(len(self.failed), self.noun, f'{self.noun}s')}"
        )

    def _settle(self, client: "OpenAI", request: Request) -> None:
        with self.lock:
            self._sent += 1
            self._waiting.add(number := self._sent)
        try:
            reply = self._ask(client, request)
        except Refused as error:
            self._refused(request, number, str(error))
            return
        except Unavailable as error:
            self._end(str(error))
            raise
        self.cache.put(request.key, reply)
        with self.lock:
            self.answered += 1
            self._waiting.remove(number)
            self.failed.pop(_place(request), None)

    def _refused(self, request: Request, number: int, why: str) -> None:
        named = next((name for name in NOT_SENT if name in request.body and re.search(rf"\b{name}\b", why)), None)
        with self.lock:
            self.failed[_place(request)] = _Refusal(number, why, named is not None or why == _CUT)
            self.noun = "line" if request.line else "row"
            self._waiting.remove(number)
            all_refused = not (self.known or self.answered) and self._enough()
            rows = self._rows() if all_refused else ""
        if all_refused:
            fix = f" (if it does not accept `{named}`, write `omit: [{named}]` below `api`)" if named else ""
            self._end(f"it has given no usable answer so far ({rows}), because {why}{fix}")
            raise Unavailable(why)

    def _enough(self) -> bool:
        # a refusal can come sooner than the answer to an earlier request, so it counts when all earlier requests are settled; so that one
        # request without any reply does not make all others be paid for, it also counts when there are as many for each thread
        found, earliest = [*self.failed.values()], min(self._waiting, default=self._sent + 1)
        return _are_enough([refusal for refusal in found if refusal.number < earliest]) or _are_enough(found, self.api.requests)

    def _end(self, reason: str) -> None:
        with self.lock:
            self.reason = self.reason or reason
        self.stop.set()

    def _ask(self, client: "OpenAI", request: Request) -> Reply:
        for pause in (*PAUSES, None):
            if not self.pace.turn(self.stop):
                raise _Stopped
            try:
                reply = self._checked(complete(client, request.body, self.api.key or "`api.key`, which is not set"), request)
            except Unavailable as error:
                wait = max(pause or 0.0, error.wait or 0.0)
                if not error.again or pause is None or wait > LONGEST_WAIT:
                    raise
                if error.wait is not None:  # the API's limit applies to all requests together
                    self.pace.hold(time.monotonic() + wait)
                elif self.stop.wait(wait):
                    raise _Stopped from error
                continue
            if wrong := usable(reply):
                raise Refused(wrong)
            return reply
        raise AssertionError("the last pause is None, after which a failure is raised")

    def _checked(self, reply: Reply, request: Request) -> Reply:
        if not same_model(self.api.model, reply.model):
            raise Unavailable(
                f"it answers as the model `{reply.model}`, but the recipe has `{self.api.model}` (if both names "
                f"mean the same model, write `model: {reply.model}`)"
            )
        with self.lock:
            other = self._digests.setdefault(reply.digest, request.key)
        if other != request.key:
            raise Unavailable("it sends exactly the same reply to two different requests, as a faulty proxy does", again=True)
        return reply


def client_of(api: Api) -> "OpenAI":
    """Return a client of the API.

    Raises:
        ConfigError: the `openai` package is missing, or the environment variable with the API key is not named or not set.
    """
    if api.key is None and api.at.startswith(PUBLIC):
        raise ConfigError(f"{PUBLIC} needs an API key; name the environment variable with your key in `api.key`")
    return connect(api.at, timeout=api.seconds, retries=0, variable=api.key or "", needed=api.key is not None, extra="api")
