"""Packed rows: forward passes without padding. The rows (sequences) of a batch are concatenated, and no token attends to another row.

    model.config._attn_implementation = ROWS                                     # once (`models.forward.pack_rows` also checks the model)
    model(input_ids=ids_1M, position_ids=positions_1M, **rows((5, 3), device))   # two rows, of 5 and of 3 tokens

Attention runs on one row at a time, with its causal flag and without a mask. So no product is computed between two rows, and flash kernels
and grouped-query attention are possible. All other layers get one long row, in which the positions of each row start at 0.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tadistill.errors import ModelError

ROWS = "tadistill_rows"
"""The name under which transformers knows the attention for packed rows. If a forward pass gets no `rows`, it uses transformers' `sdpa`."""
FAMILIES = frozenset(
    ("gemma", "gemma3_text", "gpt2", "gpt_neox", "granite", "llama", "mistral", "olmo2", "opt", "phi", "phi3", "qwen2", "qwen3", "smollm3")
)
"""Types of models that can train on packed rows. Models of other types may carry a state from one row to the next, or build other masks."""
# Add a type only if tests/unit/models/test_packing.py covers it.


def check_packing(kind: Any, model: str) -> None:
    """Raise a ModelError if models of type `kind` cannot train on packed rows. The message names the model."""
    if kind not in FAMILIES:
        raise ModelError(
            f"model `{model}` is of type {kind}, which cannot train on packed rows; remove `optim.packed`, or use a model of type "
            f"{', '.join(sorted(FAMILIES))}"
        )


def is_packed(model: PreTrainedModel) -> bool:
    """Return True if `models.forward.pack_rows` has prepared the model for packed rows."""
    return model.config._attn_implementation == ROWS


def rows(lengths: tuple[int, ...], device: torch.device) -> dict[str, Any]:
    """Return arguments for a forward pass on packed rows. `lengths` are the numbers of tokens of the rows."""
    # transformers does not change a mask with four axes, and models pass unknown arguments on to the attention
    return {"attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device), "rows": lengths}


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    rows: tuple[int, ...] | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    if rows is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    window = settings.get("sliding_window")
    parts = zip(query.split(rows, 2), key.split(rows, 2), value.split(rows, 2), strict=True)
    return torch.cat([sdpa_attention_forward(module, q, k, v, _near(q, window), **settings)[0] for q, k, v in parts], 1), None


def _near(query: Tensor, window: int | None) -> Tensor | None:
    length = query.shape[2]
    if window is None or length <= window:
        return None
    return torch.ones(length, length, dtype=torch.bool, device=query.device).tril().triu(1 - window)[None, None]


AttentionInterface.register(ROWS, _attention)
AttentionMaskInterface.register(ROWS, sdpa_mask)
