"""Tempered models: logits divided by a temperature, as an ordinary model, and the temperature that gives a certain entropy.

temper(teacher, 0.8)                     # in place; sharper below 1, softer above
"""

from collections.abc import Callable

import torch
from scipy.optimize import brentq
from torch import nn
from transformers import PreTrainedModel

from tadistill.errors import ConfigError, ModelError

_RANGE = (0.05, 20.0)


@torch.no_grad()
def temper(model: PreTrainedModel, tau: float) -> PreTrainedModel:
    """Divide the model's logits by `tau`, in place: its head is scaled or, where that is tied to the embeddings, its last norm.

    Raises:
        ModelError: the logits did not become what they should, for instance because a soft cap follows the head.
    """
    ids = torch.arange(2, device=model.device).unsqueeze(0)
    before = model(input_ids=ids, use_cache=False).logits.float()
    head, rows = model.get_output_embeddings(), model.get_input_embeddings()
    tied = isinstance(head, nn.Module) and head.weight is rows.weight
    for parameter in _last_norm(model).parameters() if tied else head.parameters():  # type: ignore[union-attr]
        parameter.div_(tau)
    after = model(input_ids=ids, use_cache=False).logits.float()
    if not torch.allclose(after * tau, before, rtol=0.02, atol=0.02 * float(before.abs().max())):
        raise ModelError(
            f"models of type {model.config.model_type} cannot be tempered: scaling the head or the last norm does not scale their logits"
        )
    return model


def _last_norm(model: PreTrainedModel) -> nn.Module:
    """The module whose output the head reads, found by running the model."""
    seen: list[nn.Module] = []
    leaves = [m for m in model.modules() if not list(m.children()) and list(m.parameters()) and m is not model.get_output_embeddings()]
    handles = [m.register_forward_hook(lambda module, _, out: seen.append(module)) for m in leaves]
    try:
        model(input_ids=torch.arange(2, device=model.device).unsqueeze(0), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return seen[-1]


def matching_temperature(entropy: Callable[[float], float], wanted: float) -> float:
    """The tau at which `entropy(tau)`, which rises with tau, is `wanted`.

    Raises:
        ConfigError: no tau between 0.05 and 20 gives it.
    """
    low, high = entropy(_RANGE[0]), entropy(_RANGE[1])
    if not low <= wanted <= high:
        raise ConfigError(
            f"the entropy to be matched is {wanted:.3f} nats, but tau between {_RANGE[0]} and {_RANGE[1]} gives {low:.3f} to {high:.3f}; "
            "give a `tau` yourself"
        )
    return float(brentq(lambda tau: entropy(tau) - wanted, *_RANGE, xtol=1e-4))  # type: ignore[arg-type]
