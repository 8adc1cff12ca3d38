"""Shapes of decoders: the sizes that pruning can change, and the rules of each model family for these sizes.

    have = shape_of(config)                                      # a config.json as a dict, or transformers' own object
    want = dataclasses.replace(have, layers=6, intermediate=1024)
    check_shape(config, want)
    size_of(with_shape(config, want))                            # the parameter counts of the pruned model

`models.pruning.prune` makes the pruned model.

This module also has all rules about types of models that need no torch: the types that cannot be distilled (`REFUSED`), and the check of a
model with random weights (`check_new`).
"""

import difflib
import importlib.util
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from tadistill.errors import ConfigError, ModelError, did_you_mean


class Describes(Protocol):
    def to_dict(self) -> dict[str, Any]: ...


Config = Mapping[str, Any] | Describes


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a decoder that pruning can change, and `head_dim`, which pruning never changes."""

    layers: int
    hidden: int
    """Width of the hidden states (the residual stream)."""
    intermediate: int
    """Number of neurons of each MLP."""
    heads: int
    """Number of query heads of each layer."""
    kv_heads: int | None = None
    """Number of key-value heads of each layer. None means that each query head has its own. It is always None for gpt2 and opt."""
    head_dim: int

    @property
    def groups(self) -> int:
        """Number of key-value heads. If `kv_heads` is None, every query head has its own key-value head."""
        return self.heads if self.kv_heads is None else self.kv_heads


PRUNABLE = ("gpt2", "opt", "llama", "mistral", "qwen2", "qwen3")
"""The model families that can be pruned in width."""
COUNTED = (*PRUNABLE, "gemma3_text")
"""The model families whose parameters, FLOPs and memory can be computed from a configuration."""

_POSITION_FIELDS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "model_max_length", "max_target_positions")
_ROPE_FIELDS = ("rope_scaling", "rope_parameters")  # in a published config.json, and in transformers' own object; the first one counts
_SHORT = "original_max_position_embeddings"  # Phi-3 has it beside the rope fields, and there it counts
_LARGEST = 10**9  # larger than any size of a model; products of much larger numbers overflow a float
_FIXED = ("gpt2", "opt")  # no head_dim in their configurations: it is hidden / heads
_KV_HEADS = {"gemma3_text": 4, "mistral": 8, "qwen2": 32, "qwen3": 32}  # defaults of transformers, if a config.json has no value
_HEAD_DIM = {"gemma3_text": 256, "qwen3": 128}
_MULTIPLES = (
    ("gpt2", "n_embd", "n_head"),
    *((family, "hidden_size", "num_attention_heads") for family in ("gpt2", "opt", "llama")),
    *((family, "num_attention_heads", "num_key_value_heads") for family in COUNTED if family not in _FIXED),
)
"""Rules of the model families: the first size must be a multiple of the second one."""


def shape_of(config: Config) -> Shape:
    """Return the shape of the model that a configuration describes.

    Raises:
        ModelError: the family is not one of `COUNTED`.
        ConfigError: the configuration has no value for a size.
    """
    fields = _fields(config)
    family = fields["model_type"]
    if family == "gpt2":
        hidden, heads = size_in(fields, "n_embd", "hidden_size"), size_in(fields, "n_head", "num_attention_heads")
        layers = size_in(fields, "n_layer", "num_hidden_layers")
        inner = 4 * hidden if fields.get("n_inner") is None else size_in(fields, "n_inner")
        return Shape(layers=layers, hidden=hidden, intermediate=inner, heads=heads, head_dim=hidden // heads)
    hidden, heads = size_in(fields, "hidden_size"), size_in(fields, "num_attention_heads")
    layers, inner = size_in(fields, "num_hidden_layers"), size_in(fields, "ffn_dim" if family == "opt" else "intermediate_size")
    if family == "opt":
        return Shape(layers=layers, hidden=hidden, intermediate=inner, heads=heads, head_dim=hidden // heads)
    # An explicit null means one key-value head per query head; a missing field means the family's default.
    optional = {"num_key_value_heads": _KV_HEADS.get(family), "head_dim": _HEAD_DIM.get(family), **fields}
    kv_heads = heads if optional["num_key_value_heads"] is None else size_in(optional, "num_key_value_heads")
    head_dim = hidden // heads if optional["head_dim"] is None else size_in(optional, "head_dim")
    return Shape(layers=layers, hidden=hidden, intermediate=inner, heads=heads, kv_heads=kv_heads, head_dim=head_dim)


def positions_of(config: Mapping[str, Any]) -> int | None:
    """Return the largest number of positions that a configuration gives to the model. Return None if it names none.

    With LongRoPE (Phi-3-128k), this is the number of positions that have the short factors. For a longer text, transformers changes the
    factors of the whole batch, so that the logits of a text depend on the other texts, and those of a token on its cache.
    """
    found = next((config[name] for name in _POSITION_FIELDS if isinstance(config.get(name), int)), None)
    given = next((config[name] for name in _ROPE_FIELDS if config.get(name)), None)
    rope = given if isinstance(given, Mapping) else {}  # transformers says what is wrong with other values
    short = [config.get(_SHORT) or r.get(_SHORT) for r in (rope, *rope.values()) if _is_long(r)]
    return min((n for n in (found, *short) if isinstance(n, int)), default=None)


def _is_long(rope: Any) -> bool:
    return isinstance(rope, Mapping) and rope.get("rope_type", rope.get("type")) in ("longrope", "su")


def check_ids(top: int, embeddings: int, where: str, token: str = "") -> None:
    """Raise a ModelError if the largest token id of a text is not below the number of a model's embeddings.

    Args:
        where: the text, for the message.
        token: the token with this id. Empty if it is not known.
    """
    if top >= embeddings:
        raise ModelError(
            f"the tokenizer gives {f'the token {token!r}' if token else 'a token'} of {where} the id {top}, but the model has only "
            f"{embeddings} embeddings; use the tokenizer that belongs to the model, or resize its embeddings and save it again"
        )


def check_lengths(config: Mapping[str, Any], needs: Mapping[str, tuple[int, str]]) -> None:
    """Raise a ConfigError if a model has fewer positions than its texts need. `needs` maps the beginning of a sentence to a number of
    positions, and to what lowers it."""
    positions = positions_of(config)
    long = [(what, need, fix) for what, (need, fix) in needs.items() if positions and need > positions]
    if long:
        kind = " with the short factors of LongRoPE" if positions != positions_of({**config, **dict.fromkeys(_ROPE_FIELDS)}) else ""
        raise ConfigError(*(f"the model has {positions} positions{kind}, but {what} {need}; {fix}" for what, need, fix in long))


def size_in(config: Mapping[str, Any], *names: str) -> int:
    """Return the value of a field of a configuration. The field can have several names. The first name that the configuration has is used.

    Raises:
        ConfigError: the configuration has no such field, or the value is not a whole number from 1 to a billion.
    """
    for name in names:
        if (value := config.get(name)) is not None:
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{names[0]} in the {config['model_type']} configuration is {value!r}; write a positive whole number")
            if value > _LARGEST:
                raise ConfigError(f"{names[0]} in the {config['model_type']} configuration is too large; write at most {_LARGEST:,}")
            return value
    close = difflib.get_close_matches(names[0], [name for name in config if name not in names], n=1)
    hint = f" (is `{close[0]}` a mistyped `{names[0]}`?)" if close else ""
    raise ConfigError(
        f"the {config['model_type']} configuration has no `{names[0]}`{hint}; add this field, because it is needed to count parameters"
    )


def resized(shape: Shape, **sizes: int) -> Shape:
    """Return `shape` with new values of `layers`, `hidden`, `intermediate`, `heads` or `kv_heads`.

    If each query head has its own key-value head, a new number of `heads` also sets `kv_heads`.
    """
    if "heads" in sizes and shape.groups == shape.heads:
        sizes.setdefault("kv_heads", sizes["heads"])
    return replace(shape, **sizes) if shape.kv_heads is not None else replace(shape, **{k: v for k, v in sizes.items() if k != "kv_heads"})


def check_layers(config: Mapping[str, Any], layers: int | tuple[int, ...] | None, key: str, model: str) -> None:
    """Check that a model with this configuration has all layers that a recipe wants to keep.

    Args:
        layers: the number of layers to keep, or their indices. None if pruning removes no layers.
        key, model: the recipe's key and the name of the model, for the message.

    Raises:
        ConfigError: the model has too few layers.
    """
    have = config.get("num_hidden_layers", config.get("n_layer"))
    if isinstance(layers, int) and isinstance(have, int) and not 1 <= layers <= have:
        raise ConfigError(f"{key} is {layers}, but `{model}` has {have} layers, and pruning only removes layers; write 1 to {have}")
    if isinstance(layers, tuple) and isinstance(have, int) and (wrong := [i for i in layers if not 0 <= i < have]):
        raise ConfigError(f"{key} names the layer {wrong[0]}, but `{model}` has {have} layers; write indices from 0 to {have - 1}")


def check_shape(config: Config, shape: Shape) -> None:
    """Check that a model with this configuration can be pruned to `shape`.

    Raises:
        ModelError: the family cannot be pruned in width.
        ConfigError: a size is larger than that of the model, or a configuration of this family cannot have the shape.
    """
    fields = _fields(config)
    if fields["model_type"] not in PRUNABLE:
        raise _not_prunable(fields["model_type"])
    have = shape_of(config)
    if shape.head_dim != have.head_dim:
        raise ConfigError(f"head_dim is {shape.head_dim}, but pruning cannot change it; write {have.head_dim}")
    for name, value, limit in (
        ("layers", shape.layers, have.layers),
        ("hidden", shape.hidden, have.hidden),
        ("intermediate", shape.intermediate, have.intermediate),
        ("heads", shape.heads, have.heads),
        ("kv_heads", shape.groups, have.groups),
    ):
        if not 1 <= value <= limit:
            raise ConfigError(f"{name} is {value}, but the model has {limit}, and pruning cannot add any; write a number from 1 to {limit}")
    _check_groups(shape, have)
    _check_hidden(fields, shape)


def with_shape(config: Config, shape: Shape) -> dict[str, Any]:
    """Return the configuration with the sizes of `shape`, for counting parameters only. Fields that have one value per layer do not
    change."""
    return {**_fields(config), **changes(config, shape)}


def changes(config: Config, shape: Shape) -> dict[str, Any]:
    """Return the configuration fields to change for a model with the sizes of `shape`, as a mapping from name to new value."""
    fields = _fields(config)
    family, have = fields["model_type"], shape_of(config)
    if family == "gpt2":
        implied = fields.get("n_inner") is None and shape.intermediate == 4 * shape.hidden
        inner = None if implied else shape.intermediate
        return {"n_layer": shape.layers, "n_embd": shape.hidden, "n_inner": inner, "n_head": shape.heads}
    common = {"num_hidden_layers": shape.layers, "hidden_size": shape.hidden, "num_attention_heads": shape.heads}
    if family == "opt":
        outer = fields.get("word_embed_proj_dim") or have.hidden
        return {**common, "ffn_dim": shape.intermediate, "word_embed_proj_dim": shape.hidden if outer == have.hidden else outer}
    rotary = {**common, "intermediate_size": shape.intermediate, "num_key_value_heads": shape.groups}
    if fields.get("head_dim") is not None or shape.hidden != shape.heads * shape.head_dim:  # qwen2 has no such field of its own
        rotary["head_dim"] = shape.head_dim
    return rotary


# --- types of models --------------------------------------------------------------------------------------------------

_POSITIONS = "counts positions from its padding token and not from 0"
BOTH = "reads text in both directions"
_PART = "is part of a model of images and text, and transformers cannot load this part from files of its own"
_DRAFTS = "drafts tokens for another model and cannot run without it"
REFUSED = {
    **dict.fromkeys(("camembert", "data2vec-text", "roberta", "roberta-prelayernorm"), _POSITIONS),
    **dict.fromkeys(("xlm-roberta", "xlm-roberta-xl", "xmod"), _POSITIONS),
    **dict.fromkeys(("cpmant", "xlnet"), BOTH),
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), _DRAFTS),
    **dict.fromkeys(("musicgen", "musicgen_melody"), "generates audio and no text"),
    **dict.fromkeys(("emu3", "mllama"), _PART),
    "blt": "reads patches of bytes, which a second model computes",
    "prophetnet": "predicts several tokens at once",
    "reformer": "draws random numbers in every forward pass, so its logits cannot be repeated",
}
"""Maps a type of model to the reason why it cannot be distilled. The reason continues the sentence "It is of type T, which …"."""
ENCODERS = frozenset(
    ("bert", "bert-generation", "big_bird", "electra", "ernie", "megatron-bert", "rembert", "roc_bert", "roformer", *REFUSED)
)
"""Types of models whose tokens attend to earlier and later tokens, unless their config.json has `"is_decoder": true`."""


def refusal(model: str, kind: Any, reason: str) -> ModelError:
    """Return the error for a type of model that cannot be distilled. `reason` continues the sentence "It is of type T, which …"."""
    return ModelError(f"model `{model}` is of type {kind}, which {reason}; choose a decoder-only language model")


def check_new(kind: str, fields: Mapping[str, Any], types: Collection[str] = ()) -> None:
    """Check what can be known without torch about a model with random weights.

    Args:
        kind: the model type in `scratch:TYPE`.
        fields: the recipe's `config` of this model.
        types: the types of causal language models of transformers. By default, they are read from its source.

    Raises:
        ConfigError: transformers has no such model type, or two sizes do not fit together.
        ModelError: models of this type cannot be distilled.
    """
    types = types or (() if kind in COUNTED else _causal_types())
    if types and kind not in types:
        hint = did_you_mean(kind, types, "see the list in the transformers documentation")
        raise ConfigError(f"scratch:{kind}: transformers has no causal language model of this type; {hint}")
    if kind in REFUSED:
        raise refusal(f"scratch:{kind}", kind, REFUSED[kind])
    if kind in ENCODERS and not fields.get("is_decoder"):
        raise refusal(f"scratch:{kind}", kind, f'{BOTH} unless its config.json has "is_decoder": true')
    given = {"num_key_value_heads": _KV_HEADS.get(kind), **fields}
    sizes = {name: size for name, size in given.items() if type(size) is int and size > 0}  # other checks refuse other values
    for family, name, part in _MULTIPLES:
        value, divisor = sizes.get(name), sizes.get(part)
        if family == kind and value and divisor and value % divisor:
            raise ConfigError(
                f"config.{name} of scratch:{kind} is {value}, but it must be a multiple of {part} ({divisor}); change one of them"
            )


def _causal_types() -> list[str]:
    # read from the source of transformers, because its import takes seconds
    found = importlib.util.find_spec("transformers")
    assert found is not None
    text = Path(str(found.origin)).with_name("models").joinpath("auto", "modeling_auto.py").read_text(encoding="utf-8")
    table = re.search(r"^MODEL_FOR_CAUSAL_LM_MAPPING_NAMES = OrderedDict\($.*?^\)$", text, re.MULTILINE | re.DOTALL)
    return re.findall(r'\("([^"]+)", "', table[0]) if table else []


def _check_groups(shape: Shape, have: Shape) -> None:
    # a key-value head is removed with all its query heads, and each remaining one keeps the same number of query heads
    kv_heads, most = shape.groups, have.heads // have.groups
    if shape.heads % kv_heads:
        raise ConfigError(f"heads is {shape.heads}, but it must be a multiple of kv_heads ({kv_heads}); change `heads` or `kv_heads`")
    if shape.heads // kv_heads > most:
        raise ConfigError(
            f"heads is {shape.heads}, but at most {most * kv_heads} are possible, because each of the {kv_heads} key-value heads serves "
            f"at most {most} query heads; lower `heads`, or raise `kv_heads`"
        )


def _check_hidden(fields: Mapping[str, Any], shape: Shape) -> None:
    family = fields["model_type"]
    if family in _FIXED and shape.hidden != shape.heads * shape.head_dim:
        raise ConfigError(
            f"hidden {shape.hidden} does not fit {shape.heads} heads: in {family} models, hidden must be heads x head_dim, and head_dim "
            f"is {shape.head_dim}; write `hidden` {shape.heads * shape.head_dim}, or another number of heads"
        )
    if family == "llama" and shape.hidden % shape.heads:
        raise ConfigError(
            f"hidden {shape.hidden} does not fit {shape.heads} heads: in llama models, hidden must be a multiple of heads; "
            f"write hidden {max(shape.hidden // shape.heads, 1) * shape.heads}"
        )
    have, outer = fields["hidden_size"] if family == "opt" else 0, fields.get("word_embed_proj_dim")
    if family == "opt" and outer not in (None, have) and shape.hidden == outer:
        raise ConfigError(
            f"hidden must not be {shape.hidden}, because word_embed_proj_dim is {outer} too, and with equal values "
            "transformers builds no projections of the embeddings; write another size"
        )


def _fields(config: Config) -> Mapping[str, Any]:
    fields = config if isinstance(config, Mapping) else config.to_dict()
    family = fields.get("model_type")
    if family not in COUNTED:
        raise _not_prunable(family)  # callers that do not prune first test whether the family is in COUNTED
    return fields


def _not_prunable(family: Any) -> ModelError:
    return ModelError(f"a {family} model cannot be pruned in width; choose a model of one of the families {', '.join(PRUNABLE)}")
