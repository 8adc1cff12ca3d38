"""Base class of all parts of a recipe, settings of sampling, and types of numbers."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Share = Annotated[float, Field(ge=0, le=1)]
"""A number from 0 to 1."""
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Strict(BaseModel):
    """Base of every part of a recipe: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class Decoding(Strict):
    """Settings of sampling from a model, in the order in which they act on the logits. The defaults do not change the distribution."""

    no_repeat_ngram: int | None = Field(default=None, ge=1)
    """No n-gram of this size occurs twice in prompt and response. (MiniLLM's test script uses 6; the paper does not mention this.)"""
    temperature: float = Field(default=1.0, ge=0)
    """The logits are divided by the temperature; 0 is greedy decoding."""
    top_k: int | None = Field(default=None, ge=1)
    """Sample only among the `top_k` most probable tokens."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample only among the most probable tokens that together have this probability (nucleus sampling)."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    """Drop the tokens whose probability is below this fraction of the most probable token's probability."""
    max_new_tokens: int = Field(default=256, ge=1)
    """Largest number of tokens in a response."""

    @property
    def plain(self) -> bool:
        """True if text is drawn from the model's own distribution."""
        return all(getattr(self, name) == Decoding.model_fields[name].default for name in Decoding.model_fields if name != "max_new_tokens")
