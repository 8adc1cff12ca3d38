"""The base class of all parts of a recipe, the settings of sampling, and types of numbers."""

import functools
import re
import typing
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
_LONGEST_NAME = 80


def _name(value: str) -> str:
    if not value.isprintable() or value != value.strip() or not value:
        raise ValueError("a name must have only visible characters, and no space at its beginning or end")
    if len(value) > _LONGEST_NAME:
        raise ValueError(f"a name has at most {_LONGEST_NAME} characters, but this one has {len(value)}; shorten it")
    if re.search(r"[/\\]", value) or value.startswith(("-", ".")) or value.endswith(".") or _DEVICES.fullmatch(value):
        raise ValueError(
            "choose another name: it must not contain a slash, begin with `-` or `.`, end with `.`, or be the name of a device (con, nul …)"
        )
    return value


Name = Annotated[str, AfterValidator(_name)]
"""The name of a study, a model or an arm. It may become a file's name and an argument of a command."""
Share = Annotated[float, Field(ge=0, le=1)]
"""A number from 0 to 1."""
Modest = Annotated[float, Field(ge=-100, le=100)]
"""A parameter of a divergence. Beyond these bounds float32 overflows."""
Temperature = Annotated[float, Field(ge=0.01, le=100)]
"""A divisor of logits. Below 0.01 float32 overflows, and above 100 every distribution is uniform."""
FunctionName = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]
"""MODULE:FUNCTION, a function of the user's own code (`tadistill.own_code`)."""
MOST = 10**9
"""Upper bound for numbers of rows, tokens, updates and processes."""
_LARGEST = 2**63 - 1
"""Largest whole number that torch and Python's loops accept."""


class Strict(BaseModel):
    """Base class of every part of a recipe. It is immutable. Unknown keys and infinite numbers are errors, and `true` is not a number."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False)
    text_sets: ClassVar[str] = ""
    """The key that a recipe sets if it gives a text instead of keys; empty if it must give keys."""

    @model_validator(mode="before")
    @classmethod
    def _no_booleans(cls, values: Any) -> Any:
        # pydantic would read `true` as 1; as a word it is refused, with the key
        return {k: _words(v) if _numbers_only(cls, k) else v for k, v in values.items()} if isinstance(values, dict) else values

    @field_validator("*", mode="after")
    @classmethod
    def _bounded(cls, value: Any) -> Any:
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, int) and abs(part) > _LARGEST:
                raise ValueError(f"the largest whole number is {_LARGEST:,}; write a smaller one")
        return value


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
    """Settings of sampling from a model, in the order in which they change the logits. The defaults change nothing."""

    no_repeat_ngram: int | None = Field(default=None, ge=1, le=MOST)
    """No n-gram of this size occurs twice in prompt and response. (MiniLLM's test script uses 6, which the paper does not mention.)"""
    temperature: float = Field(default=1.0, ge=0, le=100)
    """The logits are divided by the temperature. 0 means greedy decoding."""
    top_k: int | None = Field(default=None, ge=1, le=MOST)
    """Sample only among the `top_k` most probable tokens."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample only among the most probable tokens that together have this probability (nucleus sampling)."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    """Drop the tokens whose probability is below this fraction of the most probable token's probability."""
    max_new_tokens: int = Field(default=256, ge=1, le=MOST)
    """Largest number of tokens in a response."""

    @field_validator("temperature")
    @classmethod
    def _not_tiny(cls, value: float) -> float:
        if 0 < value < 0.01:
            raise ValueError("write 0 for greedy decoding, or at least 0.01; smaller numbers overflow in float32")
        return value

    @property
    def plain(self) -> bool:
        """True if the settings do not change the model's own distribution."""
        return all(getattr(self, name) == Decoding.model_fields[name].default for name in Decoding.model_fields if name != "max_new_tokens")
