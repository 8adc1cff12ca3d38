"""Chat completions of an OpenAI-compatible endpoint, through the `openai` package.

    client = connect("https://HOST/v1", variable="MY_KEY", timeout=120)
    complete(client, {"model": NAME, "messages": [{"role": "user", "content": "…"}], "max_tokens": 256})        # a Reply

Judges and teachers behind an API use this module. It contacts only the host that the user names.
"""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from tadistill.config.common import is_http_address
from tadistill.errors import ConfigError
from tadistill.text import beginning

if TYPE_CHECKING:
    from openai import OpenAI

PUBLIC = "https://api.openai.com/v1"
KEY = "OPENAI_API_KEY"
_LATER = (408, 409, 425, 429)  # HTTP statuses below 500 after which the same request may succeed later
_SHOWN = 120  # characters of an answer of the endpoint in a message
_BYTES_A_TOKEN = 4  # English text in the usual vocabularies; only for estimates


@dataclass(frozen=True)
class Reply:
    """The reply of the endpoint to one request, with the numbers of tokens of the request (`tokens_in`) and of the reply (`tokens_out`).

    These numbers are 0 if the endpoint did not report them.
    """

    text: str
    tokens_in: int
    tokens_out: int
    finish: str = "stop"
    """The reason why the text ends (`finish_reason`): `stop` if the model ended it, `length` if it reached the largest number of tokens, or
    another word of the endpoint."""
    model: str = ""
    """The name of the model that answered, as the endpoint reports it."""
    digest: str = field(default="", compare=False)
    """The SHA-256 digest of the whole HTTP body. Two requests with equal digests got the same body."""


class Refused(Exception):
    """The endpoint works but refuses one request, for example because it is too long or filtered."""


class Unavailable(Exception):
    """The endpoint gave no usable answer to a request. In the message, "it" is the endpoint, as in "it cannot be reached"."""

    def __init__(self, reason: str, *, again: bool = False, wait: float | None = None):
        """
        Args:
            again: True if the same request may succeed later.
            wait: number of seconds until the endpoint accepts the next request, from its header Retry-After. None if it does not say.
        """
        super().__init__(reason)
        self.again, self.wait = again, wait


class _Message(BaseModel):
    content: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _Usage(BaseModel):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Completion(BaseModel):
    choices: list[_Choice]
    usage: _Usage | None = None
    model: str | None = None


def check_address(base_url: str) -> str:
    """Check the address of the endpoint, and return it without a trailing slash.

    Raises:
        ConfigError: the address does not begin with http:// or https://, or has no valid host or port.
    """
    if not is_http_address(base_url):
        raise ConfigError(f"the endpoint's address is `{base_url}`; write it in the form http://HOST:PORT/v1 or https://HOST/v1")
    return base_url.rstrip("/")


def connect(
    base_url: str, *, timeout: float, retries: int = 5, variable: str = KEY, needed: bool = False, extra: str = "judge"
) -> "OpenAI":
    """Create a client for the endpoint.

    Args:
        timeout: the longest time to wait for an answer, in seconds.
        retries: how often the `openai` package sends a failed request again.
        variable: name of the environment variable with the API key.
        needed: True if the endpoint needs the key. The public endpoint of OpenAI always needs one.
        extra: name of the pip extra of tadistill that installs the `openai` package. The error message names it.

    Raises:
        ConfigError: the `openai` package is missing, or a key is needed but the environment variable is not set.
    """
    try:
        from openai import DefaultHttpx2Client, OpenAI
    except ImportError as error:
        what = "a judge" if extra == "judge" else "a teacher behind an API"
        raise ConfigError(f"{what} needs the package openai; install it with `pip install 'tadistill[{extra}]'`") from error
    key = os.environ.get(variable, "")
    if not key and (needed or base_url.startswith(PUBLIC)):
        fix = ", or name another endpoint with --base-url" if extra == "judge" else ""
        raise ConfigError(f"{base_url} needs an API key; set the environment variable {variable}{fix}")
    # a redirection could send prompts to a host that the user has not named
    direct = DefaultHttpx2Client(follow_redirects=False, timeout=timeout)
    return OpenAI(base_url=base_url, api_key=key or "none", timeout=timeout, max_retries=retries, http_client=direct)


def knock(client: "OpenAI", variable: str = KEY) -> tuple[str, ...]:
    """Test whether the endpoint answers and accepts the key, with one cheap request (GET /models, no retries).

    Return the names of the models that the endpoint lists. An endpoint without /models passes the test, and the result is empty.

    Raises:
        Unavailable: the endpoint does not answer, or it rejects the key.
    """
    import openai

    try:
        listed = client.with_options(max_retries=0).models.with_raw_response.list().http_response.json()
        return tuple(str(model["id"]) for model in listed["data"])
    except (openai.AuthenticationError, openai.PermissionDeniedError, openai.APIConnectionError) as error:
        raise Unavailable(reason_of(error, variable)) from error
    except (openai.APIStatusError, ValueError, TypeError, KeyError):
        return ()


def complete(client: "OpenAI", body: Mapping[str, Any], variable: str = KEY) -> Reply:
    """Request one chat completion. `body` has the fields of the request: `model`, `messages`, `max_tokens` and others.

    Raises:
        Refused: the endpoint refuses this request.
        Unavailable: the endpoint is down or too slow, its quota is used up, it rejects the key or the model, or its answer is not a chat
            completion.
    """
    import openai

    try:
        content = _complete(client, body)
    except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
        raise Refused(reason_of(error, variable)) from error
    except openai.APIError as error:
        passes = not isinstance(error, openai.APIStatusError) or error.status_code >= 500 or error.status_code in _LATER
        raise Unavailable(reason_of(error, variable), again=passes, wait=_wait(error)) from error
    try:
        completion = _Completion.model_validate_json(content)
    except ValidationError as error:
        raise Unavailable(f"its answer is not a chat completion ({_start(content)})", again=True) from error
    if not completion.choices:
        raise Unavailable(f"its chat completion contains no answer ({_start(content)})", again=True)
    if len(completion.choices) > 1:
        raise Unavailable(f"it sends {len(completion.choices)} answers to one request ({_start(content)})", again=True)
    usage, (first, *_) = completion.usage or _Usage(), completion.choices
    numbers = usage.prompt_tokens or 0, usage.completion_tokens or 0
    digest = hashlib.sha256(content.encode()).hexdigest()
    return Reply(first.message.content or "", *numbers, first.finish_reason or "stop", completion.model or "", digest)


def _complete(client: "OpenAI", body: Mapping[str, Any]) -> str:
    import openai

    create: Any = client.chat.completions.with_raw_response.create
    try:
        return create(**body).http_response.text
    except openai.BadRequestError as error:
        if "max_completion_tokens" not in str(error) or "max_tokens" not in body:
            raise
    # the newest models of the public endpoint accept the limit only under this name; older servers accept only the other name
    limit = {"max_completion_tokens": body["max_tokens"]}
    return create(**{name: value for name, value in body.items() if name != "max_tokens"}, **limit).http_response.text


def estimated_tokens(*texts: str) -> int:
    """Return the estimated number of tokens of some texts. In scripts with several bytes a character, a token has fewer characters."""
    return sum(len(text.encode(errors="replace")) for text in texts) // _BYTES_A_TOKEN


def reason_of(error: Exception, variable: str) -> str:
    """Return a clause that describes an error of the `openai` package. "It" is the endpoint, as in "it cannot be reached".

    `variable` is the name of the environment variable with the API key.
    """
    import openai

    if isinstance(error, openai.APITimeoutError):
        return "it did not answer in time"
    if isinstance(error, openai.APIConnectionError):
        return f"it cannot be reached ({error.__cause__ or error})"
    if isinstance(error, openai.AuthenticationError):
        return f"it does not accept the key in {variable} (401)"
    if isinstance(error, openai.PermissionDeniedError):
        return f"it forbids the request (403, {_start(error.body)})"
    if isinstance(error, openai.NotFoundError):
        return f"it does not know the model or the path (404, {_start(error.body)})"
    if isinstance(error, openai.RateLimitError):
        wait = error.response.headers.get("retry-after")
        return "it is at its rate limit or out of quota (429)" + (f", and it asks for a pause of {wait} s" if wait else "")
    if isinstance(error, openai.APIStatusError) and 300 <= error.status_code < 400:
        return f"it redirects to {error.response.headers.get('location', 'another address')}; write the address of the API itself"
    if isinstance(error, openai.APIStatusError):
        return f"it answers {error.status_code} ({_start(error.body)})"
    return f"its answer is not a chat completion ({_start(error)})"


def _wait(error: Exception) -> float | None:
    import openai

    if not isinstance(error, openai.APIStatusError):
        return None
    try:
        return max(0.0, float(error.response.headers.get("retry-after", "")))
    except ValueError:  # the header is missing, or has a date
        return None


def _start(body: object) -> str:
    text = body.get("message") or body.get("detail") or body if isinstance(body, dict) else body
    return beginning(str(text), _SHOWN)
