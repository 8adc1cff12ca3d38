"""Load only the output head of a model. A training process needs nothing else of a teacher that runs on a server.

head = read_head("ORG/NAME", "main", torch.bfloat16)
"""

from collections.abc import Collection
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, PreTrainedConfig

from tadistill.data import hub
from tadistill.errors import ModelError
from tadistill.models import sources
from tadistill.models.architectures import check_architecture, quiet
from tadistill.models.directory import is_adapter, read_description
from tadistill.models.forward import Reader, logit_changes
from tadistill.models.pretrained import first_line
from tadistill.models.scratch import build_on_meta, scratch_model
from tadistill.objectives import Head

_INDEX = "model.safetensors.index.json"
_SMALL = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "num_experts_per_tok"), 1),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 2),
    **dict.fromkeys(("vocab_size", "intermediate_size", "moe_intermediate_size", "ffn_dim", "n_inner"), 64),
}
"""Configuration fields of a small model, with which `_check_logits` tests how a model family computes logits. All other fields of the small
model are those of the real model."""


def read_head(load: str, revision: str, dtype: torch.dtype) -> Head:
    """Return the output head of a model, on the CPU. From the weight files, only the head is read.

    For a model of the Hub, only the configuration, the tokenizer and the file with the head are downloaded.

    Raises:
        ModelError: the files cannot be found or read, or the head alone does not turn the last hidden states of such a model into its
            logits.
    """
    directory, config = fetch_head(load, revision), read_config(load, revision)
    _check_logits(config, load)
    names, tensors = _names(config), dict[str, torch.Tensor]()
    for file in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as content:
                for key in _wanted(content.keys(), names):
                    tensors[key.rpartition(".")[2]] = content.get_tensor(key).to(dtype)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{file.name} of model `{load}` cannot be read ({error}); download it again") from error
    if "weight" not in tensors:
        raise ModelError(
            f"the safetensors files of model `{load}` do not contain its output head ({names[0]}); save the model again with "
            "save_pretrained, or set `gives: top_k` in `serve`"
        )
    scale, softcap = logit_changes(config)
    return Head(tensors["weight"], tensors.get("bias"), scale, softcap)


def read_config(load: str, revision: str) -> PreTrainedConfig:
    """Return the configuration of a model. No weights are needed or downloaded.

    Raises:
        ModelError: the configuration cannot be found or read, or models of its type cannot be distilled.
    """
    directory = sources.fetch(load, revision, weights=False)
    assert directory is not None
    read_description(directory / "config.json", load)
    try:
        with quiet():
            config = AutoConfig.from_pretrained(str(directory), trust_remote_code=False)
    except Exception as error:  # a damaged file can make transformers raise any error
        raise ModelError(f"config.json of model `{load}` cannot be read ({first_line(error)}); correct it") from error
    check_architecture(config, load)
    return config


def fetch_head(load: str, revision: str) -> Path:
    """Return the directory of a model. If necessary, first download the configuration, the tokenizer and the files with the output head.
    Raises ModelError as `sources.fetch` does."""
    source = sources.parse_source(load)
    if source.kind == "hub" and sources.locate(load, revision) is None:
        directory = sources.fetch(load, revision, weights=False)
        assert directory is not None
        if (directory / _INDEX).is_file() and not is_adapter(directory):
            places = read_description(directory / _INDEX, load).get("weight_map") or {}
            for file in sorted({str(places[key]) for key in _wanted(places, _names(read_config(load, revision)))}):
                _download(source.name, file, revision)
            return directory
    directory = sources.fetch(load, revision)
    assert directory is not None
    return directory


def _download(name: str, file: str, revision: str) -> None:
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(name, file, revision=revision), str):
        return
    if constants.HF_HUB_OFFLINE:
        raise hub.offline(ModelError, "model", name, revision)
    with hub.explained(ModelError, "model", name, revision):
        hf_hub_download(name, file, revision=revision)


def head_shape(config: PreTrainedConfig) -> tuple[int, int]:
    """Return the number of logits and the width of the hidden states: the output and input sizes of a model's output head."""
    head = build_on_meta(config).get_output_embeddings()
    assert isinstance(head, nn.Module)
    assert isinstance(head.weight, torch.Tensor)
    return head.weight.shape[0], head.weight.shape[1]


def _names(config: PreTrainedConfig) -> list[str]:
    # returns the names of the head's parameters; if the embedding shares the head's weight, the weight has two names
    model = build_on_meta(config)
    model.tie_weights()
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Module) or not isinstance(getattr(head, "weight", None), torch.Tensor):
        raise ModelError(f"a {config.model_type} model has no linear output head, but the loss needs one; choose another model")
    own = {id(parameter) for parameter in head.parameters()}
    found = [name for name, parameter in model.named_parameters(remove_duplicate=False) if id(parameter) in own]
    return [name.removeprefix(f"{model.base_model_prefix}.") for name in found]


def _wanted(keys: Collection[str], names: list[str]) -> list[str]:
    # in files, the name of a tensor can have the prefix of the model's body, such as `model.`
    return [key for key in keys if any(key == name or key.endswith(f".{name}") for name in names)]


def _check_logits(config: PreTrainedConfig, load: str) -> None:
    # the real model is on a server, so a small model of the same family is tested: are its logits those of the head on the hidden states?
    text = config.get_text_config(decoder=True)
    fields = text.to_dict()
    layers = fields.get("num_hidden_layers")
    less = {name: size for name, size in _SMALL.items() if isinstance(fields.get(name), int) and fields[name] > size}
    lists = {name: value[:1] for name, value in fields.items() if isinstance(value, list) and len(value) == layers}
    ids = {name: 0 for name in ("bos_token_id", "eos_token_id", "pad_token_id") if fields.get(name) is not None}
    try:
        with quiet():
            model = scratch_model(type(text).from_dict(fields | less | lists | ids), seed=0, dtype=torch.float32).eval()
    except Exception as error:  # the code of a model family can raise any error
        raise ModelError(
            f"tadistill cannot check how model `{load}` computes its logits, because transformers cannot build a small model of type "
            f"{text.model_type} ({first_line(error)}); set `gives: top_k` in `serve`"
        ) from error
    Reader(model)
