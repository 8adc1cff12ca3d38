"""The inputs of a stage: models, data sets, and the outputs of other stages. One frozen class for each way to name them.

Each part has a plain form, `content`. stage.json stores it and the stage's key hashes it, so a field keeps its name.
"""

from typing import Any, Literal, TypeAlias

from pydantic import BaseModel

from tadistill.config import DataRef, Evaluate
from tadistill.config.common import Strict
from tadistill.config.recipe import Template, World


class Part(Strict):
    """Base of everything that a stage's key hashes."""

    def content(self) -> dict[str, Any]:
        """Return the part as plain data.

        A field at its default is left out, so a new field with a default changes no key of a finished stage.
        """
        found: dict[str, Any] = {}
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if field.is_required() or value != field.default:
                found[name] = _plain(value)
            if isinstance(value, Split):
                found[f"{name}_limit"] = value.limit
        return found


def _plain(value: Any) -> Any:
    if isinstance(value, Part):
        return value.content()
    if isinstance(value, Evaluate):
        return value.model_dump(exclude={"also"})  # other decodings are stages of their own
    if isinstance(value, DataRef):  # these two are newer than many finished stages, whose keys must not change
        return {k: v for k, v in value.model_dump().items() if v or k not in ("choices", "instruction")}
    if isinstance(value, BaseModel):
        return value.model_dump()
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


# --- data ---------------------------------------------------------------------------------------------------------------


class Encoding(Part):
    """The rules that turn rows into token sequences."""

    template: Template
    max_prompt: int
    max_length: int
    world: World


class Source(Part):
    """A data set, with the fingerprint of its content when the plan was made."""

    ref: DataRef
    fingerprint: str


class Split(Source):
    """The first `limit` rows of a data set, or all of them."""

    role: Literal["train", "dev", "test"]
    limit: int | None

    def content(self) -> dict[str, Any]:
        """Return the data set without the limit, which the part that holds the split adds."""
        return {"ref": _plain(self.ref), "fingerprint": self.fingerprint}


# --- models and other outputs of stages ---------------------------------------------------------------------------------


class Output(Part):
    """The answers or the recorded signal that another stage wrote."""

    stage: str
    """Key of the stage, which must finish first."""


class FromStage(Part):
    """The model that another stage made."""

    stage: str
    """Key of the stage, which must finish first."""
    checkpoint: int | None = None
    """Update whose weights were kept; the selected checkpoint when absent."""


class Loaded(Part):
    """A model that the study did not train: published weights, or random ones."""

    load: str
    revision: str
    config: dict[str, Any]
    tokenizer: str | None
    fingerprint: str
    tokenizer_fingerprint: str | None = None
    """Only for a tokenizer that does not come with the weights."""
    seed: int | None = None
    """Only for random weights."""


class PrunedDepth(Part):
    """Another model without some of its layers."""

    prune: int | tuple[int, ...]
    """The number of layers to keep, at even distances, or their indices."""
    of: "Handle"


class Pruned(Part):
    """Another model cut to a smaller shape. Activations on training text decide what stays."""

    prune: dict[str, int]
    """New sizes by name: layers, hidden, intermediate, heads, kv_heads."""
    layers: Literal["influence", "spacing"] | tuple[int, ...]
    """The rule that chooses the layers, or their indices."""
    of: "Handle"
    data: Encoding
    train: Split


class Tempered(Part):
    """Another model with its logits divided by a temperature."""

    temper: float
    of: "Handle"


Handle: TypeAlias = FromStage | Loaded | PrunedDepth | Pruned | Tempered
"""The source of a model's weights."""
INPUTS = (Output, FromStage, Loaded, PrunedDepth, Pruned, Tempered)
PrunedDepth.model_rebuild()
Pruned.model_rebuild()
Tempered.model_rebuild()


def stage_of(part: Handle | Output) -> str | None:
    """Return the key of the stage that must finish before a model or output can be read; None if there is no such stage."""
    if isinstance(part, FromStage | Output):
        return part.stage
    return None if isinstance(part, Loaded) else stage_of(part.of)
