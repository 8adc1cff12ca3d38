"""Tile sizes and matrix products of the fused head, which differ between a CPU and a GPU.

A tile is a group of tokens that are computed together. On a CPU, matrix products have larger tiles than the objective, whose small tiles
stay in the cache. On a GPU, each kernel costs a launch, so all tiles are as large as the free memory allows. Matrix products of
half-precision matrices are summed in float32 on both devices. A GPU returns these sums in float32 (`out_dtype`). A CPU first rounds the
sums to half precision.

Axes: N tokens, n tokens of a tile, H hidden size, V vocabulary size.
"""

import math
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from tadistill.constants import OBJECTIVE, STAGES_PER_GPU, TILE_BYTES, TILE_ROWS

_CACHED = 2**18  # number of logits that stay in a CPU's cache
_LARGEST = 2**31  # bytes of a tile on a GPU with much free memory
_SHARE = 8  # a tile takes at most this fraction of the free memory
_RETURNS_SUMS = ("cuda",)


def free_bytes(device: torch.device) -> int | None:
    """Return the memory of a GPU that this process can still use, including what its allocator holds for later. Return None for a CPU.

    If several stages may use the GPU at the same time, a process can use its share of what is free.
    """
    if device.type != "cuda":
        return None
    free = torch.cuda.mem_get_info(device)[0] // int(os.environ.get(STAGES_PER_GPU, 1))
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def tile_bytes(device: torch.device) -> int:
    """Return the largest size in bytes of a tile: its logits and, on a GPU, the objective's temporary tensors."""
    free = free_bytes(device) if torch.cuda.is_available() else None
    return TILE_BYTES if free is None else max(TILE_BYTES, min(_LARGEST, free // _SHARE))


def tile_rows(count: int, widths: Sequence[int], dtype: torch.dtype, device: torch.device) -> tuple[int, int]:
    """Return two sizes of a tile, in tokens: for a matrix product with the output heads, and for a call of the objective.

    Args:
        count: number of all tokens. They are divided into tiles of nearly equal size.
        widths: the vocabulary size V of each model whose logits (n, V) are computed.
    """
    row = sum(widths) * dtype.itemsize
    if device.type == "cpu":
        rows = _equal(count, min(TILE_BYTES // row, TILE_ROWS))
        return rows, max(1, _CACHED // max(widths))
    rows = _equal(count, tile_bytes(device) // (row * (1 + OBJECTIVE)))
    return rows, rows


def _equal(count: int, most: int) -> int:
    return max(1, math.ceil(count / math.ceil(count / max(1, most)))) if count else 1


def project(hidden_nH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, out: Tensor) -> Tensor:
    """Compute the logits (n, V) of hidden states, write them into the first n rows of `out`, and return these rows."""
    logits = out[: len(hidden_nH)]
    if weight_VH.dtype == out.dtype:
        torch.mm(hidden_nH, weight_VH.t(), out=logits)
    elif out.device.type in _RETURNS_SUMS:
        torch.mm(hidden_nH, weight_VH.t(), out_dtype=out.dtype, out=logits)
    else:
        logits.copy_(hidden_nH @ weight_VH.t())
    if bias_V is not None:
        logits += bias_V.detach()[: logits.shape[1]].to(logits.dtype)
    return logits


def product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Return left @ right: on a GPU in `dtype`, on a CPU in the dtype of the inputs."""
    if left.dtype != dtype and left.device.type in _RETURNS_SUMS:
        return torch.mm(left, right, out_dtype=dtype)
    return left @ right


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to `total` in place. On a CPU, half-precision inputs need extra memory for the product."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif total.device.type in _RETURNS_SUMS:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total += left @ right
