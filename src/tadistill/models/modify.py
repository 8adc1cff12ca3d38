"""Changes to a loaded model, in place: low-rank adapters, gradient checkpointing, tempered logits.

tuner = adapt(model, Lora(r=16), seed=1)         # adapters beside the model's linear layers; only they are trained
save_model(merged(tuner), tokenizer, folder)     # an ordinary model with the adapters added to its weights
recompute_layers(model)                          # same losses and gradients, less memory, one more forward pass of the layers
temper(teacher, 0.8)                             # sharper below 1, softer above
"""

import copy
import re
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from scipy.optimize import brentq
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from tadistill.config.model import Lora
from tadistill.errors import ConfigError, ModelError
from tadistill.models.counting.sizes import Adapters, adapters_of

if TYPE_CHECKING:
    from peft import LoraModel

_NUMBERED = re.compile(r"\.\d+\.")  # what comes before a name within a layer
_DOWN = ".lora_A.default.weight"  # peft's name of the half that reads a layer's input
_RANGE = (0.05, 20.0)  # temperatures that are tried

# --- low-rank adapters --------------------------------------------------------------------------------------------------


def adapt(model: PreTrainedModel, settings: Lora, *, seed: int) -> "LoraModel":
    """Put adapters into a model with peft and freeze everything else. At first they change no output; `seed` draws their weights.

    Raises:
        ConfigError: peft is not installed (`pip install 'tadistill[lora]'`).
        ModelError: the model has no such layers, or they are its head or its embeddings.
    """
    try:
        import peft
    except ImportError as error:
        raise ConfigError("a model has lora, but peft is not installed; pip install 'tadistill[lora]', or leave lora out") from error
    _check_ends(model, settings.targets)
    config = peft.LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        target_modules=list(settings.targets) or "all-linear",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            tuner = peft.LoraModel(model, config, "default")
        except ValueError as error:
            raise ModelError(f"lora does not fit a {model.config.model_type} model: {error}") from error
    model.train(model.training)  # peft's new modules start in training mode, whatever the model's mode
    return tuner


def merged(tuner: "LoraModel") -> PreTrainedModel:
    """Return a copy of the adapted model with the adapters added to its weights; the adapted model itself can be trained further."""
    whole = copy.deepcopy(tuner).merge_and_unload()
    assert isinstance(whole, PreTrainedModel)
    return whole


def adapters_in(model: PreTrainedModel) -> Adapters | None:
    """Describe the adapters of a model; None if it has none, or for a family that is not counted."""
    found = {name.removesuffix(_DOWN): weight.shape[0] for name, weight in model.named_parameters() if name.endswith(_DOWN)}
    if not found:
        return None
    names = {_NUMBERED.split(name)[-1] if _NUMBERED.search(name) else name.rpartition(".")[2] for name in found}
    return adapters_of(model.config.get_text_config().to_dict(), next(iter(found.values())), sorted(names))


def _check_ends(model: PreTrainedModel, targets: tuple[str, ...]) -> None:
    # losses are fused with the head's own weights, which an adapter would not be part of
    for name, module in model.named_modules():
        end = isinstance(module, nn.Embedding) or module is model.get_output_embeddings()
        if end and any(f".{name}".endswith(f".{target}") for target in targets):
            raise ModelError(f"lora.targets names {name}, which is the head or an embedding and stays frozen; name layers between them")


# --- gradient checkpointing ---------------------------------------------------------------------------------------------


def recompute_layers(model: PreTrainedModel) -> None:
    """Keep only each layer's input for the backward pass, which then runs the layer again. Works in any mode of the model.

    transformers' own gradient checkpointing works in training mode only, where dropout is on and caches are off. Sampling and evaluation,
    which take no gradients, are not affected.

    Raises:
        ModelError: the model has no layers that transformers marks for this.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        kind = model.config.model_type
        raise ModelError(
            f"models of type {kind} do not support gradient_checkpointing in transformers; leave it out and lower optim.micro_batch"
        )
    for layer in layers:  # not `__call__`: hooks, such as FSDP's, must not run again
        layer.forward = partial(_layer, layer.forward)


def _layer(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


# --- tempered logits ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def temper(model: PreTrainedModel, tau: float) -> PreTrainedModel:
    """Divide the model's logits by `tau`: scale its head or, if that is tied to the embeddings, its last norm.

    Raises:
        ModelError: the logits are not scaled by this, for instance because a soft cap follows the head.
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
    """Find the module whose output the head reads, by running the model."""
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
    """Return the tau at which `entropy(tau)`, which rises with tau, is `wanted`.

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
