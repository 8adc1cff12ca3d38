"""Compute the memory of a decoder's forward pass from its config.json, for the model families of `counting.sizes`.

    kept = kept_by_layer({"model_type": "gpt2", "n_embd": 768, ...}, bf16=True, dropout=False)
    kept.position * positions + kept.pair * pairs               # bytes of one layer, until its backward pass

The result is the memory that transformers' modules need under autocast. `tests/unit/models/test_activations.py` compares this result with
the tensors that autograd stores.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tadistill.models.counting.shapes import shape_of

_DROPOUTS = {"gpt2": {"resid_pdrop": 0.1, "attn_pdrop": 0.1}, "opt": {"dropout": 0.1, "attention_dropout": 0.0}}
"""Maps a family to the fields of its residual and attention dropout, with the default values of transformers."""


@dataclass(frozen=True)
class Kept:
    """The bytes of memory that the activations of one decoder layer need during training."""

    position: float
    """Bytes per token position that the layer keeps for its backward pass."""
    pair: float
    """Bytes per query-key pair that the layer keeps: its attention mask."""
    scores: float
    """Bytes per query-key pair that the layer keeps on a CPU, in place of `pair`, if attention has dropout. A CPU has no fused kernel for
    attention with dropout."""
    running: float
    """Bytes per token position of temporary tensors, while one layer runs forward or backward."""


def kept_by_layer(config: Mapping[str, Any], *, bf16: bool, dropout: bool) -> Kept:
    """Return the memory that the activations of one layer need during training.

    Args:
        bf16: True if autocast computes in bfloat16. Then the residual stream and the inputs of norms stay float32.
        dropout: True if the model trains with the dropout of its configuration.
    """
    shape, family, width = shape_of(config), config["model_type"], 2 if bf16 else 4
    hidden, inner = shape.hidden, shape.intermediate
    queries, keys = shape.heads * shape.head_dim, shape.groups * shape.head_dim
    casts = 1 if bf16 else 0  # autocast casts an input again for each matrix that multiplies it
    sums = 4 * shape.heads  # the attention kernel keeps one float32 number per query of each head
    if family in ("gpt2", "opt"):
        # inputs and outputs of two norms; queries, keys, values and the attention's output
        position = 8 * hidden + 6 * width * hidden + sums + 16
        position += 5 * width * inner if family == "gpt2" else width * inner + 2 * casts * width * hidden
        residual, attention = (dropout and config.get(name, rate) for name, rate in _DROPOUTS[family].items())
        position += 2 * width * hidden if residual else 0
        scores = 12.0 * shape.heads if attention else 0.0
        return Kept(position, width, scores, (4 if family == "gpt2" else 2) * width * inner + 12 * hidden)
    # inputs of the norms in two forms; outputs of two norms; queries, keys and values after rotation, attention's output; four tensors of
    # the MLP. Keys and values are repeated for the query heads. A single key-value head is repeated without a copy, but autocast copies
    # the rotated keys.
    norms, alone = 4 if family == "gemma3_text" else 2, shape.groups == 1
    read = 2 * queries + (keys if alone and not bf16 else queries) + (keys if alone else queries)
    position = norms * (8 * hidden + 4) + (2 + 3 * casts) * width * hidden + width * read + 4 * width * inner + sums
    if family in ("qwen3", "gemma3_text"):  # norms of queries and keys
        position += (8 if family == "gemma3_text" else 4 + width) * (queries + keys) + 4 * (shape.heads + shape.groups)
    scores = 12.0 * shape.heads if dropout and config.get("attention_dropout") else 0.0
    return Kept(position, width, scores, 3 * width * inner + 12 * hidden)
