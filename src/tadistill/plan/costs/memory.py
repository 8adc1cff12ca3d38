"""Bytes that a training stage takes at its peak, estimated. Imports no torch.

Weights, gradients and AdamW's moments are exact; activations are an estimate for fused attention, which keeps no scores.
"""

from tadistill.models.counting.sizes import Size

_TILE = 144 * 2**20  # `objectives.fused.TILE_BYTES`
_KEPT = 4 / 3
"""What a layer keeps of a position for its backward pass, over its matrices' entries by the hidden width: 16 of 12 widths in GPT-2."""


def activations(size: Size, positions: float, *, checkpointing: bool) -> float:
    """Of one micro-batch, float32."""
    layer = 4 * positions * _KEPT * (size.matmul - size.head) / size.layers / size.hidden
    return layer + 4 * positions * size.hidden * size.layers if checkpointing else layer * size.layers


def head(size: Size, heads: float, *, teacher: bool, frozen: bool = False) -> float:
    """Tiles of logits, of both models with a live or recorded teacher, and the head's gradient as it adds up, unless it is frozen."""
    rows = 4 * heads * size.head / size.hidden
    return min(rows * (2 if teacher else 1), _TILE) + (0 if frozen else 4 * size.head)


def cache(size: Size, rows: int, length: float) -> float:
    """Keys and values of `rows` sequences, float32."""
    return 8 * rows * length * size.keys * size.layers
