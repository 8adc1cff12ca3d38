"""Gradient checkpointing in any mode of a model: transformers' own works in training mode alone, where dropout is on and caches are off.

recompute_layers(model)     # same losses and gradients, less memory, one more forward pass of the layers
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from tadistill.errors import ModelError


def recompute_layers(model: PreTrainedModel) -> None:
    """Keep of each layer only its input for the backward pass, which runs the layer again.

    Sampling and evaluation, which take no gradients, are left alone, caches included.

    Raises:
        ModelError: the model has no layers that transformers marks for this.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        kind = model.config.model_type
        raise ModelError(f"models of type {kind} know no gradient_checkpointing in transformers; leave it out and lower optim.micro_batch")
    for layer in layers:  # not `__call__`: hooks, such as FSDP's, stay outside of what runs again
        layer.forward = partial(_layer, layer.forward)


def _layer(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
