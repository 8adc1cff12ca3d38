"""Send requests to an OpenAI-compatible endpoint. The `openai` package repeats failed requests and obeys Retry-After."""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from pydantic import BaseModel, ValidationError

from tadistill.config.judge import Judge
from tadistill.errors import ConfigError

if TYPE_CHECKING:
    from openai import OpenAI

PUBLIC = "https://api.openai.com/v1"


@dataclass(frozen=True)
class Reply:
    """A reply of the endpoint. The token counts are 0 if the endpoint did not report them."""

    text: str
    tokens_in: int
    tokens_out: int


class Refused(Exception):
    """The endpoint works but refuses one question, for example because it is too long or filtered."""


class Unavailable(Exception):
    """The endpoint cannot answer any question. The message is the end of a sentence about the endpoint, such as "cannot be reached"."""


class _Message(BaseModel):
    content: str | None = None


class _Choice(BaseModel):
    message: _Message


class _Usage(BaseModel):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Completion(BaseModel):
    choices: list[_Choice]
    usage: _Usage | None = None


def check_address(base_url: str) -> str:
    """Check the address of the endpoint, and return it without a trailing slash.

    Raises:
        ConfigError: the address does not begin with http:// or https://, or has no valid host or port.
    """
    try:
        parts = urlsplit(base_url)
        wrong = parts.scheme not in ("http", "https") or not parts.hostname or (parts.port is not None and parts.port < 1)
    except ValueError:
        wrong = True
    if wrong:
        raise ConfigError(f"the endpoint's address is `{base_url}`; write it in the form http://HOST:PORT/v1 or https://HOST/v1")
    return base_url.rstrip("/")


def connect(base_url: str, *, timeout: float, retries: int = 5) -> "OpenAI":
    """Create a client for the endpoint. The API key is read from OPENAI_API_KEY. Only the public OpenAI endpoint requires a key.

    Raises:
        ConfigError: the `openai` package is missing, or the public endpoint has no key.
    """
    try:
        from openai import OpenAI
    except ImportError as error:
        raise ConfigError("a judge needs the package openai; install it with `pip install 'tadistill[judge]'`") from error
    key = os.environ.get("OPENAI_API_KEY", "")
    if not key and base_url.startswith(PUBLIC):
        raise ConfigError(f"{PUBLIC} needs an API key; set the environment variable OPENAI_API_KEY, or give --base-url")
    return OpenAI(base_url=base_url, api_key=key or "none", timeout=timeout, max_retries=retries)


def knock(client: "OpenAI") -> None:
    """Test whether the endpoint answers and accepts the key, with one cheap request (GET /models, no retries).

    An endpoint without /models passes the test.

    Raises:
        Unavailable: the endpoint does not answer, or it rejects the key.
    """
    import openai

    try:
        client.with_options(max_retries=0).models.with_raw_response.list()
    except (openai.AuthenticationError, openai.PermissionDeniedError, openai.APIConnectionError) as error:
        raise Unavailable(reason_of(error)) from error
    except openai.APIStatusError:
        return


def ask(client: "OpenAI", settings: Judge, text: str) -> Reply:
    """Ask one question and return the reply.

    Raises:
        Refused: the endpoint refuses this question.
        Unavailable: the endpoint is down, too slow or out of quota; or it rejects the key or the model; or its answer is not a chat
            completion.
    """
    import openai

    try:
        body = _complete(client, settings, text)
    except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
        raise Refused(reason_of(error)) from error
    except openai.APIError as error:
        raise Unavailable(reason_of(error)) from error
    try:
        completion = _Completion.model_validate_json(body)
    except ValidationError as error:
        raise Unavailable(f"answers with something that is not a chat completion ({_start(body)})") from error
    if not completion.choices:
        raise Unavailable(f"answers without any choice ({_start(body)})")
    usage = completion.usage or _Usage()
    return Reply(completion.choices[0].message.content or "", usage.prompt_tokens or 0, usage.completion_tokens or 0)


def _complete(client: "OpenAI", settings: Judge, text: str) -> str:
    import openai

    create, messages = client.chat.completions.with_raw_response.create, [{"role": "user", "content": text}]
    common = {"model": settings.model, "messages": messages, "temperature": settings.temperature}
    try:
        return create(**common, max_tokens=settings.max_tokens).http_response.text  # type: ignore[call-overload]
    except openai.BadRequestError as error:
        if "max_completion_tokens" not in str(error):
            raise
    # the newest models of the public endpoint accept the limit only under this name; older servers accept only the other name
    return create(**common, max_completion_tokens=settings.max_tokens).http_response.text  # type: ignore[call-overload]


def reason_of(error: Exception) -> str:
    """Describe an error of the `openai` package as the end of a sentence about the endpoint, such as "cannot be reached"."""
    import openai

    if isinstance(error, openai.APITimeoutError):
        return "did not answer in time"
    if isinstance(error, openai.APIConnectionError):
        return f"cannot be reached ({error.__cause__ or error})"
    if isinstance(error, openai.AuthenticationError):
        return "does not accept the key in OPENAI_API_KEY (401)"
    if isinstance(error, openai.PermissionDeniedError):
        return f"forbids the request (403, {_start(error.body)})"
    if isinstance(error, openai.NotFoundError):
        return f"does not know the model or the path (404, {_start(error.body)})"
    if isinstance(error, openai.RateLimitError):
        wait = error.response.headers.get("retry-after")
        return "is at its rate limit or out of quota (429)" + (f" and asks to wait {wait} s" if wait else "")
    if isinstance(error, openai.APIStatusError):
        return f"answers {error.status_code} ({_start(error.body)})"
    return f"answers with something that is not a chat completion ({_start(error)})"


def _start(body: object) -> str:
    text = body.get("message") or body.get("detail") or body if isinstance(body, dict) else body
    words = " ".join(str(text).split())
    return words if len(words) <= 120 else words[:119] + "…"
