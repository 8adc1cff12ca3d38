"""Requests to the servers of one teacher: several at the same time, sent again after a failure, and checked.

    servers = Servers("ORG/NAME", serve)
    servers.get("/v1/models", read)                     # sends one request to each server
    servers.post("/pooling", bodies, read)              # sends each body to one server; all servers share the work

Only the servers that the recipe names are contacted, without a proxy, and no redirection is followed.
"""

import json
import os
import threading
import uuid
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import httpx2 as httpx

from tadistill.config.remote import Serve
from tadistill.errors import ConfigError, ServerFailed
from tadistill.text import beginning

PAUSES = (1.0, 2.0, 4.0, 8.0)
"""Seconds to wait before a failed request is sent again: one number for each repetition."""
_SHOWN = 200  # characters of a server's text in an error message
_LATER = frozenset({408, 425, 429})  # HTTP statuses below 500 after which the same request may succeed later
T = TypeVar("T")


class Broken(Exception):
    """A server's answer is not complete, or does not belong to the request. The message says what is wrong with the answer."""


class _Stopped(Exception):
    """Raised instead of sending a request. No more requests are sent after one has failed for good, or after Ctrl-C."""


@dataclass(frozen=True)
class Answer:
    """The answer of a server to one request."""

    content: bytes
    headers: dict[str, str]
    request: str
    """The id of the request. A server of vLLM repeats this id in its answer."""

    def json(self) -> Any:
        """Return the content as JSON. Raises Broken if it is not JSON, for example because its end is missing."""
        return read_json(self.content)


def read_json(text: str | bytes) -> Any:
    """Return the content of a JSON text. Raises Broken if the text is not JSON."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise Broken(f"the server's answer is not complete JSON ({_start(text)})") from error


class Servers:
    """A client for the servers that run one model of the recipe."""

    def __init__(self, model: str, serve: Serve, *, again: bool = True):
        """`model` is the source of the model, for error messages. With `again`, a failed request is sent again after a pause.

        Raises:
            ConfigError: the environment variable with the API key is not set.
        """
        self.model, self.serve, self.pauses = model, serve, PAUSES if again else ()
        self._headers = {}
        if serve.key:
            key = os.environ.get(serve.key)
            if not key:
                raise ConfigError(
                    f"serve.key names the environment variable {serve.key}, which is not set; set this variable to the API key of the "
                    "server"
                )
            self._headers = {"Authorization": f"Bearer {key}"}

    @cached_property
    def _client(self) -> httpx.Client:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=len(self.serve.at) * self.serve.requests)
        settings: Any = {"limits": limits, "headers": self._headers, "trust_env": False, "follow_redirects": False}
        client = httpx.Client(timeout=self.serve.seconds, **settings)
        weakref.finalize(self, client.close)
        return client

    def get(self, path: str, read: Callable[[Answer], T]) -> dict[str, T]:
        """Send a request to each server. Return a mapping from addresses to values `read(answer)`. Raises ServerFailed as `post` does."""
        return {at: self._asked(at, path, None, read, threading.Event()) for at in self.serve.at}

    def post(self, path: str, bodies: Sequence[dict[str, Any]], read: Callable[[int, Answer], T]) -> list[T]:
        """Send one request for each body. Return the list of `read(i, answer)` for all bodies, where i is the index of a body.

        Raises:
            ServerFailed: a server refuses a request, or the last repetition of a request fails. A request fails if the server cannot be
                reached, reports an error, or sends no complete answer in time.
        """
        waiting: SimpleQueue[int] = SimpleQueue()
        for number in range(len(bodies)):
            waiting.put(number)
        found: dict[int, T] = {}
        failed = threading.Event()

        def work(at: str) -> None:
            try:
                while not failed.is_set():
                    number = waiting.get_nowait()
                    found[number] = self._asked(at, path, bodies[number], partial(read, number), failed)
            except (Empty, _Stopped):
                return
            except BaseException:
                failed.set()
                raise

        places = [at for _ in range(self.serve.requests) for at in self.serve.at][: len(bodies)]
        with ThreadPoolExecutor(max(1, len(places))) as pool:
            try:
                for done in [pool.submit(work, at) for at in places]:
                    done.result()
            finally:
                failed.set()  # also after Ctrl-C: threads that wait before a repetition stop waiting
        return [found[number] for number in range(len(bodies))]

    def one(self, at: str, path: str, body: dict[str, Any], read: Callable[[Answer], T]) -> T:
        """Send one request to the server with the address `at`, and return `read(answer)`. Raises ServerFailed as `post` does."""
        return self._asked(at, path, body, read, threading.Event())

    def _asked(self, at: str, path: str, body: dict[str, Any] | None, read: Callable[[Answer], T], stop: threading.Event) -> T:
        reason = fix = ""
        for pause in (0.0, *self.pauses):
            if stop.wait(pause):
                raise _Stopped
            fix = "start the server with `tadistill serve RECIPE MODEL`, or correct its address in `serve.at`"
            id = uuid.uuid4().hex
            try:
                if body is None:
                    response = self._client.get(f"{at}{path}", headers={"X-Request-Id": id})
                else:
                    response = self._client.post(f"{at}{path}", json=body | {"request_id": id}, headers={"X-Request-Id": id})
            except httpx.TimeoutException:
                reason = f"it did not answer within {self.serve.seconds:g} seconds"
                fix = "raise `serve.seconds`, lower `serve.requests`, or start the server again"
                continue
            except httpx.TransportError as error:
                reason = f"it cannot be reached, or broke the connection ({error or type(error).__name__})"
                if "WRONG_VERSION_NUMBER" in str(error):  # TLS reports this if the answer is plain HTTP
                    reason, fix = f"its address begins with https, but it answers without TLS ({error})", "write http:// in `serve.at`"
                continue
            if response.status_code >= 500 or response.status_code in _LATER:
                reason = f"it answers {response.status_code} ({_message(response)})"
                continue
            if response.status_code != 200:
                raise self._refused(at, response)
            try:
                return read(Answer(response.content, dict(response.headers), id))
            except Broken as error:
                reason = str(error)
        again = ", also when the request was repeated" if self.pauses else ""
        raise ServerFailed(f"the server {at} of `{self.model}` failed{again}: {reason}; {fix}")

    def _refused(self, at: str, response: httpx.Response) -> "Refused":
        status, fix = response.status_code, "correct `serve`, or start the server with `tadistill serve RECIPE MODEL`"
        if status in (401, 403):
            variable = self.serve.key
            fix = f"correct the key in {variable}" if variable else "name the environment variable with its API key in `serve.key`"
        if 300 <= status < 400:
            fix = "write the server's own address, because redirections are not followed"
        what = f"refuses a request to {response.request.url.path} ({status}, {_message(response)})"
        return Refused(f"the server {at} of `{self.model}` {what}; {fix}", status)


class Refused(ServerFailed):
    """A server refuses a request, so the same request would fail again. `status` is the HTTP status of the answer."""

    def __init__(self, problem: object, status: int = 0):
        super().__init__(problem)
        self.status = status


def _message(response: httpx.Response) -> str:
    try:
        content = response.json()
    except ValueError:
        return _start(response.text)
    if isinstance(content, dict):
        error = content.get("error")
        content = (error.get("message") if isinstance(error, dict) else error) or content.get("message") or content.get("detail") or content
    return _start(content)


def _start(text: Any) -> str:
    return beginning(text.decode(errors="replace") if isinstance(text, bytes) else str(text), _SHOWN)
