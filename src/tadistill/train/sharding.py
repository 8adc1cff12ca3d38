"""Models in parts over the processes (FSDP2), or in host memory: cut, held whole for a while, gathered and put back.

    shard(student, device)                  # in place: each decoder layer by itself, then all the rest
    with whole(student):                    # every process holds all of it, and forward passes need no other process
        …
    weights(student)                        # the ordinary state dict; where the model is cut, on the main process's host alone

torch's own API cuts, and accelerate does everything else: its state knows FSDP on GPUs only, so nothing of it could be tested on a CPU, and
it wraps a model at once, where samplers and the fused head need a say in when the weights are whole. Weights stay in float32 and
autocast makes bf16 of them, as with DDP, so the numbers are DDP's up to the order of sums.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate import cpu_offload
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel


def shard(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Cut a model in place over all processes, one decoder layer after the other going to `device`.

    The rest (embeddings, last norm, head) is one group, which stays whole from a forward pass to the end of its backward pass, or for good
    where no gradient is taken: the fused head reads the head's weight between the two.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    layers = _layers(model)
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    # Named, since by default a layer fetches what ran before it, and that differs between processes where the main one alone has watched
    for before, layer in zip([model, *layers], layers, strict=False):
        layer.set_modules_to_backward_prefetch([before])  # type: ignore[operator]
    return model.to(device)  # type: ignore[arg-type]


def sharded(model: nn.Module) -> bool:
    """Whether a model is cut."""
    return isinstance(model, FSDPModule)


@contextmanager
def whole(model: nn.Module, when: bool = True) -> Iterator[None]:
    """Every process holds all of the model meanwhile; nothing to do where it is not cut. Entered by all processes, or by none.

    For work whose number of forward passes differs between processes, as sampling's does: no pass inside waits for another process.
    """
    if not (when and isinstance(model, FSDPModule)):
        yield
        return
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(part is not model, recurse=False)


def offload(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Keep a frozen model's decoder layers in host memory; each comes to `device` for its part of a forward pass."""
    layers = _layers(model)
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


def weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """The ordinary state dict; of a cut model on the host of the main process, and empty tensors elsewhere. Called by all processes."""
    if not sharded(model):
        return model.state_dict()
    tied = model.all_tied_weights_keys  # parts of a cut model share no storage, and a model's files hold tied weights once
    found = gathered({name: value for name, value in model.state_dict().items() if name not in tied})
    return found | {name: found[source] for name, source in tied.items() if source in found}


def gathered(value: Any) -> Any:
    """A state (dicts and lists of tensors and numbers) with whole tensors for those in parts, as `weights` has them."""
    if isinstance(value, DTensor):
        full = value.full_tensor()
        return full.cpu() if dist.get_rank() == 0 else torch.empty(0)
    if isinstance(value, Mapping):
        return {name: gathered(v) for name, v in value.items()}
    return [gathered(v) for v in value] if isinstance(value, list) else value


def number(value: Tensor) -> float:
    """A scalar that may be in parts, such as the norm of gradients. Called by all processes."""
    return float(value.full_tensor() if isinstance(value, DTensor) else value)


def load_weights(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put an ordinary state dict, which every process has, into a model that may be cut."""
    own = model.state_dict() if sharded(model) else {}
    model.load_state_dict({name: _like(value, own.get(name)) for name, value in state.items()})


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Put an optimizer's ordinary state dict, which every process has, beside parameters that may be cut."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    moments = {
        number: {name: _like(value, parameter) for name, value in state["state"][number].items()}
        for number, parameter in zip(numbers, parameters, strict=True)
        if number in state["state"]
    }
    optimizer.load_state_dict({**state, "state": moments})


def _like(value: Any, own: Tensor | None) -> Any:
    """This process's part of a tensor, where its counterpart is in parts."""
    if not isinstance(own, DTensor) or not isinstance(value, Tensor) or value.shape != own.shape:
        return value
    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements, src_data_rank=None)


def _layers(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder layers: the outermost list of as many modules as the configuration says."""
    total = model.config.get_text_config().num_hidden_layers
    stacks = (module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == total)
    return [*next(stacks, [])]
