"""Settings of teachers that run elsewhere: on servers of the user's own (`serve`), or behind an API (`api`).

A server sends hidden states or the most probable tokens. An API sends text only. A check refuses methods that need more.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from tadistill.config.common import MOST, Decoding, Divergence, Strict, Variable, is_http_address
from tadistill.config.method import Method
from tadistill.config.objective import TopKForwardKL, TopKReverseKL
from tadistill.config.sampling import TopKSignal
from tadistill.errors import ConfigError


def _address(text: str) -> str:
    if not is_http_address(text):
        raise ValueError(f"serve.at has `{text}`; write an address of the form http://HOST:PORT or https://HOST")
    return text.rstrip("/").removesuffix("/v1")


Address = Annotated[str, AfterValidator(_address)]


def _check_no_secrets(what: str, addresses: tuple[str, ...], form: str, key: str) -> None:
    if any(part in address for address in addresses for part in "@?#"):
        raise ValueError(  # a message that begins with the key is shown without the value, which may contain a password
            f"{what} a user name, a password or a query; write only {form}, put the key into an environment variable, and name this "
            f"variable in `{key}`"
        )


LONGER = 4
"""Largest assumed ratio of the numbers of tokens that a text has with two tokenizers. The server of a teacher with another tokenizer than
its student must take texts that are longer by this factor, up to the positions of its model."""


class Serve(Strict):
    """Servers of vLLM that run a teacher, in place of the training process. `tadistill serve RECIPE MODEL` starts such a server.

    `serve: http://HOST:PORT` is short for `serve: {at: [http://HOST:PORT]}`, and a list of addresses is short for `serve: {at: LIST}`.
    A server of the model's own files changes results only by rounding, so its stages are also those of the model in the training process.
    Two settings change results: `name`, and `gives: top_k` with its `k` and `tail`.
    """

    text_sets: ClassVar[str] = "at"
    list_sets: ClassVar[str] = "at"
    at: tuple[Address, ...] = Field(min_length=1)
    """Addresses of the servers. Several servers of the same model share the work."""
    gives: Literal["hidden", "top_k"] = "hidden"
    """The outputs that a server sends. `hidden`: the last hidden states, from which every loss is exact; the training process loads only
    the model's output head. `top_k`: the log-probabilities of the k most probable tokens and of the text's own tokens, which every server
    of vLLM can send."""
    k: int = Field(default=20, ge=1, le=MOST)
    """Number of tokens per position with `gives: top_k`. A server sends at most 20, unless it was started with a larger
    `--max-logprobs`."""
    tail: Literal["lump", "drop"] = "lump"
    """Treatment of all tokens except the k most probable ones, with `gives: top_k`. `lump` treats them as one token. `drop` removes them
    and renormalises the probabilities."""
    name: str | None = None
    """The model's name on the server. By default, the model is looked for in the server's list of models (`/v1/models`). The `id` or the
    `root` of an entry must then be the value of `load`, or the directory of this model's files. A name other than `load` means that the
    server may compute other numbers than the model's files, for example with quantised weights, so stages with this teacher have keys of
    their own. Write a name that always means the same weights."""
    key: Variable | None = None
    """Name of the environment variable with the API key. The key itself is never written anywhere."""
    seconds: float = Field(default=120.0, gt=0, le=86400)
    """Largest number of seconds to wait for one answer. A request without an answer is sent again, at most four times."""
    requests: int = Field(default=8, ge=1, le=1024)
    """Number of requests that wait for an answer from one server at the same time. A request contains one sequence."""

    def tokens_for(self, longest: int) -> int:
        """Return the length that the server must allow for texts of up to `longest` tokens. A server that generates also samples one token
        after a text; one that sends hidden states does not."""
        return longest + (self.gives == "top_k")

    @field_validator("at", mode="before", json_schema_input_type=str | list[str])
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check(self):
        _check_no_secrets("serve has an address with", self.at, "http://HOST:PORT", "serve.key")
        if len(set(self.at)) < len(self.at):
            raise ValueError("serve.at names an address twice; name each server once")
        return self

    def other_name(self, *names: str | None) -> str | None:
        """Return the model's name on the server, unless it is one of the `names` of the model's files."""
        return None if self.name in names else self.name

    def check_k(self, name: str, vocab: int | None) -> None:
        """Raise ConfigError if `k` is larger than the number of logits of the model `name`. `vocab` is None if the number is not known."""
        if self.gives == "top_k" and vocab and self.k > vocab:
            raise ConfigError(f"models.{name}.serve.k is {self.k:,}, but the model has only {vocab:,} tokens; set `k` to at most {vocab}")

    @property
    def signal(self) -> TopKSignal | None:
        """Settings of the top-k outputs that a server sends. None if the server sends hidden states."""
        return TopKSignal(k=self.k, tail=self.tail) if self.gives == "top_k" else None


def check_served(name: str, serve: Serve, method: Method) -> None:
    """Check that a served model can teach with a method.

    Raises:
        ConfigError: the method needs an output of the teacher that the server does not send.
    """
    sampler, signal = method.sampler, method.signal
    if sampler.guided:
        raise ConfigError(
            f"sampler `{sampler.type}` needs the teacher's distribution while each token is sampled, but models.{name} is served; use "
            "`sampler: {type: student}`, or remove `serve`"
        )
    if sampler.teacher_text:
        raise ConfigError(
            f"sampler `{sampler.type}` needs text that the teacher writes, but models.{name} is served, and its server sends only scores; "
            "let the server write the text once, and use it as `data.train`, or remove `serve`"
        )
    if serve.gives == "top_k" and signal is not None and not isinstance(signal, TopKSignal):
        raise ConfigError(
            f"sampler.signal `{signal.type}` is recorded from the teacher's hidden states, but models.{name}.serve gives only `top_k`; use "
            "`gives: hidden`, or `signal: {type: top_k}`"
        )
    if serve.gives == "top_k" and isinstance(signal, TopKSignal) and signal.k > serve.k:
        raise ConfigError(
            f"sampler.signal records the {signal.k} most probable tokens, but models.{name}.serve sends only {serve.k}; set `signal.k` to "
            f"{serve.k}, or `serve.k` to {signal.k} and start the server with `--max-logprobs {signal.k}`"
        )
    if serve.gives == "top_k":
        _check_top_k(name, serve, method)


def _check_top_k(name: str, serve: Serve, method: Method) -> None:
    objective, gives = method.objective, f"models.{name}.serve gives only `top_k`"
    sends = f"{gives}; use `gives: hidden`"
    if method.select.metric == "reverse_kl":
        raise ConfigError(
            f"select.metric `reverse_kl` needs the teacher's whole distribution, but {gives}; use `gives: hidden`, or set "
            "`select.metric` to `loss` or `rouge_l`"
        )
    if not objective.needs_teacher:
        return
    if method.dense:
        raise ConfigError(f"`dense` needs the whole distributions of the teachers, but {sends}, or remove `dense`")
    if objective.needs_distribution and (isinstance(objective, TopKForwardKL | TopKReverseKL) or not isinstance(objective, Divergence)):
        what = "selects the top tokens itself" if isinstance(objective, Divergence) else "needs the teacher's whole distribution"
        other = objective.label.removeprefix("top_k_")
        fix = f"or objective `{other}`" if other != objective.label else "or `single_step: false`"
        raise ConfigError(f"objective `{objective.label}` {what}, but {sends}, {fix}")
    tempered = isinstance(objective, Divergence) and objective.temperature != 1 and method.signal is None
    if tempered and serve.tail == "lump":
        raise ConfigError(
            f"serve.tail `lump` needs objective.temperature 1, because {gives}, and the probability of all other tokens together is known "
            "only at temperature 1; use `gives: hidden`, `temperature: 1`, or `tail: drop`"
        )


NOT_SENT = {"temperature": 1.0, "top_p": 1.0, "seed": None}
"""Maps each sampling setting that `api.omit` can name to the value that an API uses if a request does not contain the setting. The value
of `seed` is None, because the API then chooses a seed itself."""
_NO_FIELD = ("no_repeat_ngram", "top_k", "min_p")  # settings of sampling for which chat completions have no field


def _base(text: str) -> str:
    if not is_http_address(text):
        raise ValueError(f"api.at has `{text}`; write an address of the form https://HOST/v1 or http://HOST:PORT/v1")
    return text.rstrip("/").removesuffix("/chat/completions")


class Price(Strict):
    """The prices of a model behind an API. They are only used to estimate what a study costs."""

    input: float = Field(ge=0, le=1e9)
    """Price of a million tokens of prompts."""
    output: float = Field(ge=0, le=1e9)
    """Price of a million tokens of answers."""
    currency: str = Field(default="USD", min_length=1, max_length=8)
    """The currency of the prices, for messages."""

    def of(self, tokens_in: float, tokens_out: float) -> float:
        """Return the price of `tokens_in` prompt tokens and `tokens_out` answer tokens, in `currency`."""
        return (tokens_in * self.input + tokens_out * self.output) / 1e6


class Api(Strict):
    """A model behind an OpenAI-compatible API (chat completions). The API returns only text, so students train on the model's answers.

    Answers are stored in the runs directory. No study in this directory sends an answered request again.
    """

    at: Annotated[str, AfterValidator(_base)]
    """Address of the API, such as https://HOST/v1. Requests go to AT/chat/completions. Stored answers stay valid if the address changes."""
    model: str = Field(pattern=r"\S")
    """The model's name at the API. Stored answers belong to this name, so write a name that always means the same weights."""
    key: Variable | None = None
    """Name of the environment variable with the API key. The key itself is never written anywhere. By default, no key is sent."""
    price: Price | None = None
    """Prices for estimates of what the requests cost. By default, the plan and the run show only numbers of tokens."""
    requests: int = Field(default=8, ge=1, le=1024)
    """Number of requests that wait for an answer at the same time."""
    requests_per_minute: float | None = Field(default=None, gt=0, le=1e6)
    """Largest number of requests that are sent in a minute. By default, only the API's own rate limit applies."""
    seconds: float = Field(default=120.0, gt=0, le=86400)
    """Largest number of seconds to wait for one answer."""
    omit: tuple[Literal["temperature", "top_p", "seed"], ...] = ()
    """Settings of sampling that are not sent, because the API refuses them. `temperature` and `top_p` must then be 1."""

    has_no: ClassVar[str] = "is behind an API, which gives text only"

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, value: Any) -> Any:
        if isinstance(value, str):
            raise ValueError("write `api: {at: https://HOST/v1, model: NAME, key: VARIABLE}`")
        return value

    @model_validator(mode="after")
    def _check(self):
        _check_no_secrets("api.at has", (self.at,), "https://HOST/v1", "api.key")
        if len(set(self.omit)) < len(self.omit):
            raise ValueError("`omit` names a setting twice; name it once")
        return self


def check_text_only(name: str, api: Api, method: Method) -> None:
    """Check that a model behind an API can teach with a method.

    Raises:
        ConfigError: the method needs the teacher's probabilities, or settings of sampling that the API does not have.
    """
    objective, sampler, select = method.objective, method.sampler, method.select
    what = f"models.{name} {api.has_no}"
    text = "use `method: seqkd`, which trains on the text that the teacher writes"
    if objective.needs_teacher:
        raise ConfigError(f"objective `{objective.label}` needs the teacher's probabilities, but {what}; {text}")
    if sampler.guided:
        raise ConfigError(f"sampler `{sampler.type}` needs the teacher's probabilities while each token is sampled, but {what}; {text}")
    if select.metric == "reverse_kl":
        raise ConfigError(f"select.metric `reverse_kl` needs the teacher's probabilities, but {what}; use `loss` or `rouge_l`")
    if (context := method.context) and (context.chat is False or "prompt" in context.columns):
        given, fix = ("`chat: false`", "remove `chat: false`") if context.chat is False else ("`{prompt}`", "use `{instruction}`")
        raise ConfigError(f"context has {given}, but models.{name} is behind an API, which applies its own chat template; {fix}")
    if sampler.teacher_text and isinstance(sampler, Decoding):
        _check_decoding(name, api, sampler)


def _check_decoding(name: str, api: Api, sampler: Decoding) -> None:
    if given := [key for key in _NO_FIELD if getattr(sampler, key) != Decoding.model_fields[key].default]:
        raise ConfigError(
            f"sampler has `{given[0]}`, but models.{name} is behind an API, and chat completions do not have this setting; remove "
            f"`{given[0]}`, or use `temperature` and `top_p`"
        )
    if sampler.engine != "native":
        raise ConfigError(f"sampler has `engine: {sampler.engine}`, but the API of models.{name} writes the text itself; remove `engine`")
    if sampler.temperature > 2:
        raise ConfigError(
            f"sampler.temperature is {sampler.temperature:g}, but the API of models.{name} accepts at most 2; lower the temperature"
        )
    for key in api.omit:
        value = getattr(sampler, key, None)
        if key != "seed" and value != NOT_SENT[key]:
            raise ConfigError(
                f"sampler.{key} is {value:g}, but models.{name}.api.omit says that the API refuses this setting; set "
                f"`{key}` to 1, or change `omit`"
            )
