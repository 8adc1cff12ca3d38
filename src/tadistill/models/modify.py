"""Changes to a loaded model, in place: low-rank adapters (also of peft), gradient checkpointing, a temperature of the logits, and the
layout and the number format of the weights.

tuner = adapt(model, Lora(r=16), seed=1)         # adds adapters to the linear layers; only the adapters are trained
save_model(merged(tuner), tokenizer, folder)     # an ordinary model with the adapters added to its weights
recompute_layers(model)                          # same losses and gradients with less memory, but one more forward pass of the layers
temper_head(teacher, 0.8)                        # below 1 the distributions become sharper, above 1 softer
"""

import copy
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from scipy.optimize import brentq
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from tadistill.config.model import Lora
from tadistill.disk import ordinary_permissions, writing
from tadistill.errors import ConfigError, ModelError
from tadistill.models.architectures import first_line, is_full, quiet
from tadistill.models.forward import evaluating, logit_changes
from tadistill.models.loading import read_model, read_tokenizer
from tadistill.models.model_files import ADAPTER, ADAPTER_WEIGHTS, TOKENIZERS, check_files, read_description
from tadistill.models.parameter_counts import Adapters, adapters_of

if TYPE_CHECKING:
    from peft import LoraModel


_NUMBERED = re.compile(r"\.\d+\.")  # the layer's number in a module name
_DOWN = ".lora_A.default.weight"  # the ending of peft's name for the matrix A of an adapter
_RANGE = (0.05, 20.0)  # the search range of temperatures

# --- low-rank adapters --------------------------------------------------------------------------------------------------


def adapt(model: PreTrainedModel, settings: Lora, *, seed: int) -> "LoraModel":
    """Add low-rank adapters to a model with peft, and freeze all other weights. Before training, the adapters change no outputs.

    `seed` determines the random initial weights of the adapters.

    Raises:
        ConfigError: peft is not installed, for example on the machine of a cluster's job.
        ModelError: `settings.targets` names layers that the model does not have, its head, its embeddings, layers that share a weight with
            others, or layers that do not work with adapters.
    """
    try:
        import peft
    except ImportError as error:
        raise ConfigError(
            "a model of the recipe has `lora`, which needs peft; run `pip install 'tadistill[lora]'`, or remove `lora`"
        ) from error
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
            with evaluating(model), torch.no_grad():  # peft adds its modules in training mode, also to a model in eval mode
                tuner = peft.LoraModel(model, config, "default")
                model(input_ids=torch.arange(2, device=model.device).unsqueeze(0), use_cache=False)
        except Exception as error:  # peft adds adapters to layers that are called in a way of their own, such as routers
            if is_full(error):
                raise
            raise ModelError(
                f"lora does not fit a {model.config.model_type} model; correct lora.targets ({type(error).__name__}: {first_line(error)})"
            ) from error
    _check_shared(model)
    return tuner


def merged(tuner: "LoraModel") -> PreTrainedModel:
    """Return a copy of the model with the adapters merged into its weights. The original keeps its adapters, and can be trained further.

    The copy is made in the memory of the CPU, because the memory of a GPU may be too small for a second model.
    """
    device = next(tuner.parameters()).device
    whole = copy.deepcopy(tuner.cpu()).merge_and_unload()
    tuner.to(device)
    assert isinstance(whole, PreTrainedModel)
    return whole


@torch.no_grad()
def plain_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return a model's weights, by the names that they have in a file. Adapters are added to the weights. A weight that two modules share
    is returned once. Most tensors are those of the model itself, and not copies."""
    single = {name for name, _ in model.named_parameters()}
    shared = {name for name, _ in model.named_parameters(remove_duplicate=False)} - single
    found: dict[str, Tensor] = {}
    for name, weight in model.state_dict().items():
        if name in shared or ".lora_" in name:
            continue
        *owners, own = name.split(".base_layer")  # several for the weights of experts, each of which has a module of peft around the others
        for i in range(len(owners)):
            adapter: Any = model.get_submodule(".base_layer".join(owners[: i + 1]))
            if own == f".{getattr(adapter, 'parameter_name', 'weight')}":
                weight = weight + adapter.get_delta_weight("default")
        found["".join([*owners, own])] = weight
    return revert_weight_conversion(model, found)


def adapters_in(model: PreTrainedModel) -> Adapters | None:
    """Return the parameter counts of the adapters in a model. Return None if there are none, or if
    `models.parameter_counts` does not know the model family."""
    found = {name.removesuffix(_DOWN): weight.shape[0] for name, weight in model.named_parameters() if name.endswith(_DOWN)}
    if not found:
        return None
    names = {_NUMBERED.split(name)[-1] if _NUMBERED.search(name) else name.rpartition(".")[2] for name in found}
    return adapters_of(model.config.get_text_config().to_dict(), next(iter(found.values())), sorted(names))


def _check_ends(model: PreTrainedModel, targets: tuple[str, ...]) -> None:
    # the loss uses the head's weight itself, and would miss an adapter of the head
    for name, module in model.named_modules():
        end = isinstance(module, nn.Embedding) or module is model.get_output_embeddings()
        if end and any(f".{name}".endswith(f".{target}") for target in targets):
            raise ModelError(f"lora.targets names {name}, which is the head or an embedding and must stay frozen; name other layers")


def _check_shared(model: PreTrainedModel) -> None:
    # the adapters of all these places would be merged into the one weight
    places: dict[Tensor, dict[nn.Module, str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        owner = name.partition(".base_layer.")[0] if ".base_layer." in name else name.rpartition(".")[0]
        places.setdefault(weight, {})[model.get_submodule(owner)] = owner
    for owners in places.values():
        if len(owners) > 1 and any(hasattr(module, "base_layer") for module in owners):
            first, second, *_ = owners.values()
            raise ModelError(
                f"lora does not fit a {model.config.model_type} model: {first} and {second} share a weight, so no adapter of one of them "
                "can be merged; name other layers in lora.targets"
            )


_USED = (
    *("r", "lora_alpha", "target_modules", "exclude_modules", "fan_in_fan_out", "bias", "use_rslora", "use_dora", "lora_bias"),
    *("modules_to_save", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "target_parameters"),
)
"""The settings of an adapter that change its outputs. All other settings keep peft's defaults, because they concern only the training, or
could make peft import foreign code."""
_REFUSED = ("megatron_config", "layer_replication", "alora_invocation_tokens", "trainable_token_indices")


def merge(base: Path, base_name: str, adapter: Path, load: str, target: Path) -> None:
    """Merge an adapter into its base model, and write the result to `target` as an ordinary model in float32.

    The result has the adapter's tokenizer, or the tokenizer of the base if the adapter has none. Error messages name the base `base_name`
    and the adapter `load`.

    Raises:
        ModelError: peft is missing, or the adapter is damaged or does not fit its base.
    """
    try:
        import peft
    except ImportError as error:
        raise ModelError(f"the package peft is needed to merge adapter `{load}`; run `pip install 'tadistill[lora]'`") from error
    check_files(adapter, load)
    settings = read_description(adapter / ADAPTER, load)
    if odd := [name for name in _REFUSED if settings.get(name)]:
        raise ModelError(
            f"adapter `{load}` has the setting {odd[0]}, which tadistill cannot merge; merge the adapter with the program that trained it"
        )
    model = read_model(base, base_name, torch.float32)
    own = any((adapter / name).is_file() for name in TOKENIZERS)
    tokenizer = read_tokenizer(adapter if own else base, load if own else base_name)
    with quiet(), warnings.catch_warnings(action="ignore"):  # peft's warnings about transformers
        try:
            chosen = {name: settings[name] for name in _USED if settings.get(name) is not None}
            tuner: Any = peft.get_peft_model(model, peft.LoraConfig(**chosen))  # type: ignore[arg-type]
            safe, pickled = (adapter / name for name in ADAPTER_WEIGHTS)
            weights = load_file(safe) if safe.is_file() else torch.load(pickled, weights_only=True, map_location="cpu")
            found = peft.set_peft_model_state_dict(tuner, weights)
            merged = tuner.merge_and_unload(safe_merge=True)
        except Exception as error:  # a damaged adapter can make peft raise any error
            raise ModelError(
                f"adapter `{load}` cannot be merged with its base `{base_name}` ({first_line(error)}); check that this is the right "
                "base model"
            ) from error
        lacking = [name for name in found.missing_keys if "lora_" in name]
        if lacking or found.unexpected_keys:
            name = (lacking or found.unexpected_keys)[0]
            raise ModelError(
                f"adapter `{load}` does not fit its base `{base_name}` (one of them lacks the weight {name}); correct "
                "`base_model_name_or_path` of the adapter"
            )
        with writing(target):
            merged.save_pretrained(target)
            tokenizer.save_pretrained(target)
            ordinary_permissions(target)


# --- gradient checkpointing ---------------------------------------------------------------------------------------------


def recompute_layers(model: PreTrainedModel) -> None:
    """Turn on gradient checkpointing. Only the input of each layer is stored, and the backward pass computes the layer again.

    This works in training mode and in eval mode. The function of transformers for this purpose works only in training mode, where dropout
    is on and caches are off. Forward passes without gradients (sampling, evaluation) do not change.

    Raises:
        ModelError: transformers does not support gradient checkpointing for this model type.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        kind = model.config.model_type
        raise ModelError(
            f"transformers has no gradient checkpointing for models of type {kind}; remove `gradient_checkpointing`, and lower "
            "`optim.micro_batch` to save memory"
        )
    for layer in layers:  # not `__call__`: its hooks (of FSDP, for instance) would run twice
        layer.forward = partial(_layer, layer.forward)


def _layer(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


# --- tempered logits ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def temper_head(model: PreTrainedModel, tau: float) -> None:
    """Divide the logits of the model by `tau`, in place. This scales the weights of the head. If the head shares its weights with
    the embeddings, the weights of the last norm are scaled instead.

    Raises:
        ModelError: scaling these weights does not scale the logits, for instance because a soft cap follows the head.
    """
    capped = logit_changes(model.config)[1] is not None  # a wide cap bends the logits too little for the comparison below
    ids = torch.arange(2, device=model.device).unsqueeze(0)
    before = model(input_ids=ids, use_cache=False).logits.float()
    head, rows = model.get_output_embeddings(), model.get_input_embeddings()
    tied = isinstance(head, nn.Module) and head.weight is rows.weight
    for parameter in _last_norm(model).parameters() if tied else head.parameters():  # type: ignore[union-attr]
        parameter.div_(tau)
    after = model(input_ids=ids, use_cache=False).logits.float()
    if capped or not torch.allclose(after * tau, before, rtol=0.02, atol=0.02 * float(before.abs().max())):
        raise ModelError(
            f"models of type {model.config.model_type} cannot have a temperature: their logits do not scale with the head or with the "
            "last norm; choose another model"
        )


def _last_norm(model: PreTrainedModel) -> nn.Module:
    # returns the last module with parameters that runs before the head
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
    """Return the temperature tau at which `entropy(tau)` equals `wanted` (in nats). `entropy` must increase with tau.

    Raises:
        ConfigError: no tau between 0.05 and 20 gives this entropy.
    """
    low, high = entropy(_RANGE[0]), entropy(_RANGE[1])
    if not low <= wanted <= high:
        raise ConfigError(
            f"the wanted entropy is {wanted:.3f} nats, but temperatures from {_RANGE[0]} to {_RANGE[1]} give {low:.3f} to {high:.3f} nats; "
            "set the temperature yourself, with `tau` in the recipe"
        )
    return float(brentq(lambda tau: entropy(tau) - wanted, *_RANGE, xtol=1e-4))  # type: ignore[arg-type]


# --- layout and number format of weights --------------------------------------------------------------------------------------------------


def column_major(model: PreTrainedModel) -> PreTrainedModel:
    """Store the weight matrices of a frozen float32 model column by column, in place. A model on a GPU or of another dtype is not changed.

    The values stay the same. Matrix products with few rows, as in decoding, take 10 to 20 % less time.
    """
    if model.device.type == "cpu" and model.dtype == torch.float32:
        rows = model.get_input_embeddings().weight  # a lookup needs whole rows, so a head tied to the embeddings stays
        for module in model.modules():
            if isinstance(module, torch.nn.Linear) and module.weight is not rows:
                module.weight.data = module.weight.data.t().contiguous().t()
    return model


@contextmanager
def in_bfloat16(model: PreTrainedModel) -> Iterator[None]:
    """Let a model compute with a bfloat16 copy of its weights while a `with` block runs, and without autocast.

    Autocast casts every weight again in every forward pass. Here, each weight is cast once. After the block, the model has its
    original, unchanged parameters again. Weights that `from_pretrained(dtype=torch.bfloat16)` keeps in float32 stay in float32.
    """
    kept = [re.compile(rf"(^|\.){re.escape(name)}($|\.)") for name in model._keep_in_fp32_modules_strict or ()]
    held: list[tuple[dict[str, Any], str, Tensor]] = []
    copies: dict[Tensor, Tensor] = {}  # tied weights have one copy
    for path, module in model.named_modules():
        stored = {name: value for name, value in module._buffers.items() if name not in module._non_persistent_buffers_set}
        weights: dict[str, Any] = module._parameters
        for place, values in ((weights, dict(weights)), (module._buffers, stored)):
            for name, value in values.items():
                if value is not None and value.is_floating_point() and not any(rule.search(f"{path}.{name}") for rule in kept):
                    held.append((place, name, value))
                    if value not in copies:
                        copies[value] = value.detach().to(torch.bfloat16)
                    place[name] = copies[value]
    forward = model.__dict__.get("forward")
    if "_original_forward" in model.__dict__:  # accelerate keeps the forward function without autocast under this name
        model.forward = model.__dict__["_original_forward"]
    try:
        with torch.autocast(model.device.type, enabled=False):
            yield
    finally:
        for place, name, value in held:
            place[name] = value
        if forward is not None:
            model.forward = forward
