"""Settings of teachers on servers: the addresses, and the outputs that the servers send. A check refuses methods that need more."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from tadistill.config.common import MOST, Strict, Variable, is_http_address
from tadistill.config.method import Method
from tadistill.config.objective import Divergence, TopKForwardKL, TopKReverseKL
from tadistill.config.sampling import TopKSignal
from tadistill.errors import ConfigError


def _address(text: str) -> str:
    if not is_http_address(text):
        raise ValueError(f"serve.at has `{text}`; write an address of the form http://HOST:PORT or https://HOST")
    return text.rstrip("/").removesuffix("/v1")


Address = Annotated[str, AfterValidator(_address)]


class Serve(Strict):
    """Servers of vLLM that run a teacher, in place of the training process. `tadistill serve RECIPE MODEL` starts such a server.

    `serve: http://HOST:PORT` is short for `serve: {at: [http://HOST:PORT]}`, and a list of addresses is short for `serve: {at: LIST}`.
    These settings change results only by rounding. The exception is `gives: top_k`, with which the results also depend on `k` and `tail`.
    """

    text_sets: ClassVar[str] = "at"
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
    """The model's name on the server. By default, the model on the server is found by its name or its source. One of these two must be the
    value of `load`, or the directory of this model's files."""
    key: Variable | None = None
    """Name of the environment variable with the API key. The key itself is never written anywhere."""
    seconds: float = Field(default=120.0, gt=0, le=86400)
    """Largest number of seconds to wait for one answer. A request without an answer is sent again, at most four times."""
    requests: int = Field(default=8, ge=1, le=1024)
    """Number of requests to one server that wait for an answer at the same time. A request contains one sequence."""

    @model_validator(mode="before")
    @classmethod
    def _from_addresses(cls, value: Any) -> Any:
        return {cls.text_sets: value} if isinstance(value, list | tuple) else value

    @field_validator("at", mode="before", json_schema_input_type=str | list[str])
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check(self):
        if any(part in at for at in self.at for part in "@?#"):
            raise ValueError(  # a message that begins with the key is shown without the value, which may contain a password
                "serve has an address with a user name, a password or a query; write only http://HOST:PORT, put the key into an "
                "environment variable, and name this variable in `serve.key`"
            )
        if len(set(self.at)) < len(self.at):
            raise ValueError("serve.at names an address twice; name each server once")
        return self

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
    objective, sends = method.objective, f"models.{name}.serve gives only `top_k`; use `gives: hidden`"
    if method.select.metric == "reverse_kl":
        raise ConfigError(f"select.metric `reverse_kl` needs the teacher's whole distribution, but {sends}, or another metric")
    if not objective.needs_teacher:
        return
    if method.dense:
        raise ConfigError(f"`dense` averages the teachers' whole distributions, but {sends}, or remove `dense`")
    if objective.needs_distribution and (isinstance(objective, TopKForwardKL | TopKReverseKL) or not isinstance(objective, Divergence)):
        what = "selects the top tokens itself" if isinstance(objective, Divergence) else "needs the teacher's whole distribution"
        other = objective.label.removeprefix("top_k_")
        fix = f"or objective `{other}`" if other != objective.label else "or `single_step: false`"
        raise ConfigError(f"objective `{objective.label}` {what}, but {sends}, {fix}")
    tempered = isinstance(objective, Divergence) and objective.temperature != 1 and method.signal is None
    if tempered and serve.tail == "lump":
        raise ConfigError(f"serve.tail `lump` needs objective.temperature 1, because {sends}, `temperature: 1`, or `tail: drop`")
