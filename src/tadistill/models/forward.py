"""The forward pass of training and scoring: the last hidden states at the scored positions, and the LM head that makes logits of them.

    reader = Reader(model)
    hidden = reader.hidden(model, batch)            # (N, H), then tadistill.objectives.fused_head(hidden, reader.head, …)

This module computes no logits, because the loss applies the head itself, tile by tile.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tadistill.data.batch import Batch
from tadistill.errors import ModelError
from tadistill.objectives import Head, Hidden


class Reader:
    """A causal language model, split into its body and its LM head. The split is checked once against the model's own logits."""

    def __init__(self, model: PreTrainedModel):
        """Raise a ModelError if the model's logits are not the output of its head on its last hidden states."""
        module = model.get_output_embeddings()
        if not isinstance(module, nn.Module) or not isinstance(getattr(module, "weight", None), Tensor):
            raise ModelError(f"a {model.config.model_type} model has no linear output head, but the loss needs one; choose another model")
        self._module = module
        self._scale, self._softcap = _after_the_head(model)
        self._check(model)

    @property
    def head(self) -> Head:
        bias = self._module._parameters.get("bias")
        weight = self._module._parameters["weight"]
        assert weight is not None
        return Head(weight, bias, self._scale, self._softcap)

    def hidden(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the last hidden states, (N, H), at the N positions where the mask is True, in row-major order.

        `model` is the model of this reader, or a wrapper around that model (for several processes).
        """
        columns = batch.mask_BT.any(0).nonzero().squeeze(1)
        end = int(columns[-1]) + 1 if len(columns) else 1  # no position in the mask reads later tokens
        with tapped(self._module, skip=True) as seen:
            model(
                input_ids=batch.ids_BT[:, :end],
                attention_mask=batch.attention_BT[:, :end],
                position_ids=batch.positions_BT[:, :end],
                use_cache=False,
                logits_to_keep=columns,
            )
        return seen[0][batch.mask_BT[:, columns]]

    def target(self, model: nn.Module, batch: Batch) -> Hidden:
        """Return a teacher's last hidden states (without gradients) and its head, as a loss takes them."""
        with torch.no_grad():
            return Hidden(self.hidden(model, batch), self.head)

    @torch.no_grad()
    def _check(self, model: PreTrainedModel) -> None:
        ids = torch.arange(2, device=model.device).unsqueeze(0)
        with tapped(self._module, skip=False) as seen:
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.float().nan_to_num()
        # NaN becomes 0 on both sides: this check accepts broken weights, because the training loop reports them
        expected = self.head.logits(seen[0].to(self.head.weight.dtype)).float().nan_to_num()
        if expected.shape != logits.shape or not torch.allclose(expected, logits, rtol=0.02, atol=0.02 * float(logits.abs().max())):
            raise ModelError(
                f"models of type {model.config.model_type} change their logits after the head in a way that the loss does not support; "
                "it supports only a scale, a soft cap and a bias; choose another model"
            )


@contextmanager
def tapped(head: nn.Module, *, skip: bool) -> Iterator[list[Tensor]]:
    """Collect the inputs of the head in a list. With `skip`, the head computes no logits."""
    seen: list[Tensor] = []

    def tap(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        seen.append(inputs[0])
        return (inputs[0][:, :0], *inputs[1:]) if skip else None

    handle = head.register_forward_pre_hook(tap)
    try:
        yield seen
    finally:
        handle.remove()


def _after_the_head(model: PreTrainedModel) -> tuple[float, float | None]:
    """Return (scale, soft cap) of the logits: Cohere multiplies the logits, Granite divides them, Gemma caps them."""
    settings = model.config.get_text_config().to_dict()
    scale = (settings.get("logit_scale") or 1.0) / (settings.get("logits_scaling") or 1.0)
    return float(scale), settings.get("final_logit_softcapping")
