"""Low-rank adapters (LoRA) in a model, put in place by peft (`pip install 'tadistill[lora]'`) and merged again.

    tuner = adapt(model, Lora(r=16), seed=1)         # `model` stays what it is, with adapters beside its linear layers; they alone train
    save_model(merged(tuner), tokenizer, folder)     # an ordinary model, which knows nothing of adapters

The head stays as it is: losses are fused with its weights, which an adapter would not be part of.
"""

import copy
import re
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tadistill.config.model import Lora
from tadistill.errors import ConfigError, ModelError
from tadistill.models.counting.adapters import Adapters, adapters_of

if TYPE_CHECKING:
    from peft import LoraModel

_NUMBERED = re.compile(r"\.\d+\.")  # what comes before a name within a layer
_DOWN = ".lora_A.default.weight"  # peft's name of the half that reads a layer's input


def adapt(model: PreTrainedModel, settings: Lora, *, seed: int) -> "LoraModel":
    """Put adapters into a model, in place, and freeze all else. They change nothing before they are trained.

    Args:
        seed: of the adapters' initial weights.

    Raises:
        ConfigError: peft is not installed.
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
    model.train(model.training)  # new modules are in training mode, whatever the model is in
    return tuner


def merged(tuner: "LoraModel") -> PreTrainedModel:
    """A copy of the adapted model with the adapters added into its weights; the adapted one trains on."""
    whole = copy.deepcopy(tuner).merge_and_unload()
    assert isinstance(whole, PreTrainedModel)
    return whole


def adapters_in(model: PreTrainedModel) -> Adapters | None:
    """The adapters of a model that trains them alone; None without, or for a family that is not counted."""
    found = {name.removesuffix(_DOWN): weight.shape[0] for name, weight in model.named_parameters() if name.endswith(_DOWN)}
    if not found:
        return None
    names = {_NUMBERED.split(name)[-1] if _NUMBERED.search(name) else name.rpartition(".")[2] for name in found}
    return adapters_of(model.config.get_text_config().to_dict(), next(iter(found.values())), sorted(names))


def _check_ends(model: PreTrainedModel, targets: tuple[str, ...]) -> None:
    """Raise where a target is the head or an embedding, whatever the model calls it."""
    for name, module in model.named_modules():
        end = isinstance(module, nn.Embedding) or module is model.get_output_embeddings()
        if end and any(f".{name}".endswith(f".{target}") for target in targets):
            raise ModelError(f"lora.targets names {name}, which is the head or an embedding and stays frozen; name layers between them")
