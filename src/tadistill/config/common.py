"""The base class `Strict` of all parts of a recipe, the base classes of sampling and of objectives (losses), and types for names and
numbers."""

import functools
import re
import typing
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema, field_validator, model_validator

from tadistill.errors import ConfigError

_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
LONGEST_NAME = 80
"""Largest number of characters in the name of a study, a model or an arm."""


def _name(value: str) -> str:
    if not value.isprintable() or value != value.strip() or not value:
        raise ValueError("a name must have only visible characters, and no space at its beginning or end")
    if len(value) > LONGEST_NAME:
        raise ValueError(f"a name has at most {LONGEST_NAME} characters, but this one has {len(value)}; shorten it")
    if re.search(r"[/\\]", value) or value.startswith(("-", ".")) or value.endswith(".") or _DEVICES.fullmatch(value):
        raise ValueError(
            "choose another name: it must not contain a slash, begin with `-` or `.`, end with `.`, or be the name of a Windows device "
            "(con, nul …)"
        )
    return value


Name = Annotated[str, AfterValidator(_name)]
"""The name of a study, a model or an arm. It must also be usable as a file name and as an argument of a command."""


def _distinct(seeds: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds {list(seeds)} contain a seed twice; give each seed only once")
    return seeds


Seeds = Annotated[tuple[int, ...], Field(min_length=1), AfterValidator(_distinct)]
"""One or more random seeds, all different."""
Share = Annotated[float, Field(ge=0, le=1)]
"""A number from 0 to 1."""
Modest = Annotated[float, Field(ge=-100, le=100)]
"""A parameter of a divergence, from -100 to 100. A value outside these bounds would overflow in float32."""
Temperature = Annotated[float, Field(ge=0.01, le=100)]
"""A number by which logits are divided. A value below 0.01 would overflow in float32. A value above 100 would make every distribution
uniform."""
FUNCTION = r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"
FunctionName = Annotated[str, Field(pattern=FUNCTION)]
"""A function in the user's own code, written as MODULE:FUNCTION. `tadistill.user_code` imports it."""
_VARIABLE = "^[A-Za-z_][A-Za-z0-9_]*$"


def _variable(value: str) -> str:
    if not re.fullmatch(_VARIABLE, value):
        raise ValueError(  # a message that begins with the key is shown without the value, which may be an API key
            "key must be the name of an environment variable, with only letters, digits and `_`; put the API key itself into this variable"
        )
    return value


def is_http_address(text: str) -> bool:
    """Return True if the text is an address with http:// or https:// and a host. A port is not needed, but an invalid port gives False."""
    try:
        parts = urlsplit(text)
        return bool(parts.hostname) and parts.scheme in ("http", "https") and parts.port != 0
    except ValueError:  # a port that is no number, or brackets that do not close
        return False


Variable = Annotated[str, AfterValidator(_variable), WithJsonSchema({"type": "string", "pattern": _VARIABLE})]
"""The name of an environment variable that contains an API key. The key `key` of a recipe has this type."""
Precision = Literal["fp32", "bf16"]
"""A number format: float32 or bfloat16."""
DTYPES: dict[Precision, str] = {"fp32": "float32", "bf16": "bfloat16"}
"""Maps each number format to torch's name."""
MOST = 10**9
"""Upper bound for numbers of rows, tokens, updates and processes."""
_LARGEST = 2**63 - 1
"""Largest whole number that torch and Python's loops accept."""


def message_of(problem: Mapping[str, Any]) -> str:
    """Return the message of one of pydantic's errors, without the words that pydantic puts before a message of our own."""
    return problem["msg"].removeprefix("Value error, ")


class Strict(BaseModel):
    """Base class of every part of a recipe. Objects are immutable. Unknown keys and infinite numbers are errors. `true` is not accepted as
    a number."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False)
    text_sets: ClassVar[str] = ""
    """Name of the key that a text alone sets. For example, with `load`, a recipe can have the text TEXT in place of {load: TEXT}. Empty if
    this part of a recipe has no such short form."""
    list_sets: ClassVar[str] = ""
    """Name of the key that a list alone sets, in the same way."""

    @model_validator(mode="before")
    @classmethod
    def _converted(cls, given: Any) -> Any:
        key = cls.text_sets if isinstance(given, str) else cls.list_sets if isinstance(given, list | tuple) else ""
        values = {key: given} if key else given
        # pydantic would convert `true` to 1; it refuses the text "true" with an error that names the key
        return {k: _words(v) if _numbers_only(cls, k) else v for k, v in values.items()} if isinstance(values, dict) else values

    @field_validator("*", mode="after")
    @classmethod
    def _bounded(cls, value: Any) -> Any:
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, int) and abs(part) > _LARGEST:
                raise ValueError(f"the largest whole number is {_LARGEST:,}; write a smaller number")
        return value

    def __setstate__(self, state: dict[Any, Any]) -> None:
        # an earlier version pickled the object, for a Slurm job, when some of the fields did not exist
        had, fields = state["__dict__"], type(self).model_fields
        new = {
            name: field.get_default(call_default_factory=True)
            for name, field in fields.items()
            if name not in had and not field.is_required()
        }
        super().__setstate__(state | {"__dict__": new | had})


def _words(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_words(part) for part in value]
    return str(value).lower() if isinstance(value, bool) else value


@functools.cache
def _numbers_only(cls: type[BaseModel], name: object) -> bool:
    found = [field.annotation for key, field in cls.model_fields.items() if name in (key, field.alias)]
    seen: set[Any] = set()
    while found:
        part = found.pop()
        seen.add(part)
        found += typing.get_args(part)
    return bool(seen & {int, float}) and not seen & {bool, Any}


class Decoding(Strict):
    """Settings of sampling from a model. They are applied to the logits in the order of the fields. The defaults do not change the
    logits."""

    no_repeat_ngram: int | None = Field(default=None, ge=1, le=MOST)
    """No n-gram of this size may occur twice in prompt and response together. (MiniLLM's test script uses 6, but its paper does not mention
    this.)"""
    temperature: float = Field(default=1.0, ge=0, le=100)
    """Number by which the logits are divided. 0 means greedy decoding."""
    top_k: int | None = Field(default=None, ge=1, le=MOST)
    """Sample only among the `top_k` most probable tokens."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample only among the most probable tokens that together have this probability (nucleus sampling)."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    """Drop the tokens whose probability is below this fraction of the most probable token's probability."""
    max_new_tokens: int = Field(default=256, ge=1, le=MOST)
    """Largest number of tokens in a response."""
    engine: Literal["native", "vllm"] = "native"
    """The program that samples. `native`: our own sampling loop. `vllm`: vLLM in a process of its own. With `vllm`, other random numbers
    are drawn, and samplers in which a teacher takes part are refused."""

    @field_validator("temperature")
    @classmethod
    def _not_tiny(cls, value: float) -> float:
        if 0 < value < 0.01:
            raise ValueError("write 0 for greedy decoding, or at least 0.01; smaller numbers overflow in float32")
        return value

    def check_engine(self) -> None:
        """Raise a ConfigError if the engine cannot sample with these settings."""
        if self.engine == "vllm" and self.no_repeat_ngram:
            raise ConfigError("engine `vllm` does not support `no_repeat_ngram`; remove `no_repeat_ngram`, or use `engine: native`")
        if self.engine == "vllm" and self.min_p > 0 and self.top_p < 1:
            raise ConfigError(
                "engine `vllm` applies `min_p` before `top_p`, and not after it; remove `min_p` or `top_p`, or use `engine: native`"
            )

    @property
    def plain(self) -> bool:
        """True if the settings do not change the model's own distribution."""
        changing = ("no_repeat_ngram", "temperature", "top_k", "top_p", "min_p")
        return all(getattr(self, name) == Decoding.model_fields[name].default for name in changing)


class ObjectiveBase(Strict):
    """Base class of all objectives. Plans, checks and samplers read its class attributes."""

    needs_teacher: ClassVar[bool] = True
    """True if the loss compares the student with a teacher."""
    needs_scores: ClassVar[bool] = False
    """True if the loss needs the teacher's log-probability of every sampled token before each update."""
    needs_rounds: ClassVar[bool] = False
    """True if the loss needs a sampler that works in rounds. A round samples many sequences, and then uses them for several updates."""
    needs_pairs: ClassVar[bool] = False
    """True if the loss needs two responses to each prompt: one from the teacher and one from the student."""
    needs_own_samples: ClassVar[bool] = False
    """True if the loss is an estimate that is correct only if every token is sampled from the student's own distribution."""
    only_by_token: ClassVar[str] = ""
    """End of the error message about a student and a teacher with different tokenizers: why the loss needs one tokenizer, and what to use
    instead. Empty if the loss is also defined over spans of text."""

    @property
    def label(self) -> str:
        return self.type  # type: ignore[attr-defined]

    @property
    def needs_distribution(self) -> bool:
        """True if the loss needs the teacher's distribution over the vocabulary at every token."""
        return self.needs_teacher and not self.needs_scores

    @property
    def needs_corpus(self) -> bool:
        """True if a part of the loss is computed on the plain text of `data.corpus`."""
        return False

    @property
    def compares_on_corpus(self) -> bool:
        """True if this part of the loss compares the student with the teacher."""
        return False

    @property
    def imitates_text(self) -> bool:
        """True if cross-entropy on the training text is a part of the loss."""
        return False


class Divergence(ObjectiveBase):
    """Base class of all divergences between the distributions of teacher and student at every token."""

    temperature: Temperature = 1.0
    """Number by which the logits of both models are divided. The loss is not multiplied by the temperature squared."""
    kd_ratio: Share = 1.0
    """Weight of the divergence in the loss. Cross-entropy on the tokens has the weight 1 - kd_ratio. (MiniLLM's KD baseline uses 0.5.)"""

    @property
    def imitates_text(self) -> bool:
        return self.kd_ratio < 1
