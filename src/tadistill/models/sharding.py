"""Functions for models that are split over the processes (FSDP2) or kept in host memory.

    shard(student, device)                  # in place: each decoder layer separately, then everything else
    with whole(student):                    # every process holds the whole model, and forward passes need no other process
        ...
    weights(student)                        # the ordinary state dict; for a sharded model only on the main process

The models are sharded with torch's own API and not with accelerate, for two reasons. First, accelerate supports FSDP on GPUs only, but the
tests run on CPUs. Second, accelerate wraps a whole model at once, but samplers and the fused head must decide when weights are gathered.
Weights are float32 and autocast computes in bf16, as with DDP. Results differ from those of DDP only by the order of sums.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from accelerate import cpu_offload
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from tadistill.errors import ModelError
from tadistill.models.forward import evaluating


def shard(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Shard a model in place over all processes. Its layers move to `device` one after the other.

    The weights of the embeddings, the last norm and the head are gathered together. They stay gathered from the forward pass to the end
    of the backward pass, because the fused head uses the head's weight between the two passes. Without a backward pass, they stay
    gathered until `reshard` is called.

    Raises:
        ModelError: the model has no list of layers, or its layers share weights.
    """
    stacks = _stacks(model)
    held = [id(parameter) for layer in chain(*stacks) for parameter in layer.parameters()]
    if len({*held}) < len(held):
        raise ModelError(
            f"a {model.config.model_type} model has layers that share weights, so it cannot be sharded; set parallel: ddp and teacher: "
            "replicated or offloaded in `resources`"
        )
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in chain(*stacks):
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    # By default, a layer prefetches the layer whose forward pass came before its own. That can differ between processes, because they make
    # different numbers of forward passes when they sample.
    for layers in stacks:
        for before, layer in zip([model, *layers], layers, strict=False):
            layer.set_modules_to_backward_prefetch([before])  # type: ignore[operator]
    placed: PreTrainedModel = model.to(device)  # type: ignore[arg-type]
    for part in (*chain(*stacks), placed):  # buffers that are first made in inference mode could not be used in training
        part.unshard()  # type: ignore[operator]
        part.reshard()  # type: ignore[operator]
    return placed


def sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


@contextmanager
def whole(*models: nn.Module, when: bool = True) -> Iterator[None]:
    """Inside the `with` block, every process has all weights of the models. All processes must enter the block together.

    Models that are not sharded stay as they are. If `when` is False, the block changes nothing. Inside the block, a forward pass does not
    wait for other processes. Sampling needs this, because each process makes a different number of forward passes.
    """
    chosen = [model for model in models if when and sharded(model)]
    for model in chosen:
        for part in _parts(model):
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
    try:
        yield
    finally:
        for model in chosen:
            trained = any(parameter.requires_grad for parameter in model.parameters())
            for part in _parts(model):
                if part is not model or trained:  # the head of a frozen model stays, because losses use it without another forward pass
                    part.reshard()
                part.set_reshard_after_forward(part is not model, recurse=False)


def _parts(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def reshard(model: nn.Module) -> None:
    """Free the gathered weights of a sharded model, for example after a forward pass. `model.parameters()` are then sharded tensors."""
    for part in _parts(model):
        part.reshard()


def offload(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Keep a frozen model's decoder layers in host memory. Each layer is moved to `device` only while it computes."""
    layers = [*chain(*_stacks(model))]
    inside = {module for layer in layers for module in layer.modules()}
    for module in model.modules():
        if module not in inside:
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(device)
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))
    for layer in layers:
        cpu_offload(layer, device, offload_buffers=True, preload_module_classes=[type(layer).__name__])
    return model


# torch.distributed.checkpoint.state_dict could replace the functions below only with guards: taking the state of an optimizer that has not
# stepped yet steps it once, and loading fails for a parameter that never had a gradient.


def weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the ordinary state dict of a model. All processes must call this function.

    If the model is sharded, the main process gets the full tensors on the CPU, and the other processes get empty tensors.
    """
    if not sharded(model):
        return model.state_dict()
    tied = model.all_tied_weights_keys  # gathered tensors share no storage, but the files of a model contain tied weights only once
    found = gathered({name: value for name, value in model.state_dict().items() if name not in tied})
    return found | {name: found[source] for name, source in tied.items() if source in found}


def gathered(value: Any) -> Any:
    """Return a copy of a state (nested dicts and lists) in which each sharded tensor is replaced by its full tensor.

    The main process gets the full tensors on the CPU, and the other processes get empty tensors. All processes must call this function.
    """
    if isinstance(value, DTensor):
        full = value.full_tensor()
        return full.cpu() if dist.get_rank() == 0 else torch.empty(0)
    if isinstance(value, Mapping):
        return {name: gathered(v) for name, v in value.items()}
    return [gathered(v) for v in value] if isinstance(value, list) else value


def number(value: Tensor) -> float:
    """Return the value of a scalar tensor, which may be sharded. All processes must call this function."""
    return float(value.full_tensor() if isinstance(value, DTensor) else value)


def load_weights(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state dict into a model, which may be sharded. Every process must pass the full state dict."""
    own = model.state_dict() if sharded(model) else {}
    model.load_state_dict({name: _like(value, own.get(name)) for name, value in state.items()})


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load a state dict into an optimizer, whose parameters may be sharded. Every process must pass the full state dict."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    moments = {
        number: {name: _like(value, parameter) for name, value in state["state"][number].items()}
        for number, parameter in zip(numbers, parameters, strict=True)
        if number in state["state"]
    }
    optimizer.load_state_dict({**state, "state": moments})


def _like(value: Any, own: Tensor | None) -> Any:
    if not isinstance(own, DTensor) or not isinstance(value, Tensor) or value.shape != own.shape:
        return value.clone() if isinstance(value, Tensor) else value  # a copy, because a tensor of a memory map keeps the whole map open
    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements, src_data_rank=None)


def _stacks(model: PreTrainedModel) -> list[list[nn.Module]]:
    """Return the layers of each stack of a model: of its decoder and, if it has one, of its vision or audio encoder.

    A stack that the text does not pass through stays sharded. Without the decoder's own stack, no backward pass would sum gradients.

    Raises:
        ModelError: the model has no stack of layers.
    """

    def outermost(module: nn.Module) -> Iterator[nn.ModuleList]:
        for part in module.children():
            yield from [part] if isinstance(part, nn.ModuleList) else outermost(part)

    stacks = [[layer for layer in stack if next(layer.parameters(), None) is not None] for stack in outermost(model)]
    if not any(stacks):
        raise ModelError(
            f"models of type {model.config.model_type} have no list of layers, so they cannot be sharded or offloaded layer by layer; set "
            "parallel: ddp and teacher: replicated in `resources`"
        )
    return [layers for layers in stacks if layers]


def uses_all(model: PreTrainedModel) -> bool:
    """Return True if the logits of a text of two tokens depend on all trained parameters.

    They do not depend, for example, on a vision encoder, or on experts that no token is sent to.
    """
    with torch.enable_grad(), evaluating(model):
        logits = model(input_ids=torch.arange(2, device=model.device).unsqueeze(0), use_cache=False).logits
    seen, left = set(), [logits.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left += [before for before, _ in node.next_functions]
    used = {id(node.variable) for node in seen if hasattr(node, "variable")}  # the nodes that add up the gradients of parameters
    return all(id(parameter) in used for parameter in model.parameters() if parameter.requires_grad)
