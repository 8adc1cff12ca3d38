"""How text is sampled from a model: one class for training rollouts, a teacher's answers and evaluation."""

from pydantic import Field

from tadistill.config.strict import Strict


class Decoding(Strict):
    """Settings of sampling, in the order in which they act on the logits; the defaults sample from the model itself."""

    no_repeat_ngram: int | None = Field(default=None, ge=1)
    """No n-gram of this size occurs twice in prompt and response. (MiniLLM's test script uses 6, without saying so in the paper.)"""
    temperature: float = Field(default=1.0, ge=0)
    """0 is greedy decoding."""
    top_k: int | None = Field(default=None, ge=1)
    top_p: float = Field(default=1.0, gt=0, le=1)
    min_p: float = Field(default=0.0, ge=0, le=1)
    """Drop tokens less probable than this share of the most probable one."""
    max_new_tokens: int = Field(default=256, ge=1)

    @property
    def plain(self) -> bool:
        """Whether text is drawn from the model's own distribution."""
        return all(getattr(self, name) == Decoding.model_fields[name].default for name in Decoding.model_fields if name != "max_new_tokens")
