"""A model that runs on servers: read its configuration and its output head, check the servers, and make the teacher.

    head = read_head("ORG/NAME", "main", torch.bfloat16)        # a training process needs nothing else of the model
    for server in check_servers(servers, ("ORG/NAME",), tokenizer, config, longest=512):
        print(server.at, server.name, server.seconds)

The checks run before work starts: that the servers run the right model, and send what the recipe needs.
"""

import sys
import time
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from tadistill.config.remote import Serve
from tadistill.data import hub
from tadistill.errors import ModelError, ServerFailed
from tadistill.models import sources
from tadistill.models.architectures import build_on_meta, first_line, quiet, read_config, scratch_model
from tadistill.models.forward import Reader, logit_changes, output_head
from tadistill.models.model_files import is_adapter, weight_map
from tadistill.models.served_model_requests import Answer, Broken, Refused, Servers
from tadistill.models.shapes import positions_of
from tadistill.models.teachers import (
    COMPLETIONS,
    POOLING,
    ServedHidden,
    ServedTopK,
    Teacher,
    hidden_request,
    hidden_states,
    prompt_scores,
    top_k_request,
)
from tadistill.models.tokens import vocabulary
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
    directory, config = fetch_head(load, revision), fetch_config(load, revision)
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


def fetch_config(load: str, revision: str) -> PreTrainedConfig:
    """Return the configuration of a model. No weights are needed or downloaded.

    Raises:
        ModelError: the configuration cannot be found or read, or models of its type cannot be distilled.
    """
    return read_config(sources.fetch(load, revision, weights=False), load)


def fetch_head(load: str, revision: str) -> Path:
    """Return the directory of a model. If necessary, first download the configuration, the tokenizer and the files with the output head.
    Raises ModelError as `sources.fetch` does."""
    source = sources.parse_source(load)
    if source.kind == "hub" and sources.locate(load, revision) is None:
        directory = sources.fetch(load, revision, weights=False)
        if (directory / _INDEX).is_file() and not is_adapter(directory):
            places = weight_map(directory / _INDEX)
            for file in sorted({places[key] for key in _wanted(places, _names(fetch_config(load, revision)))}):
                _download(source.name, file, revision)
            return directory
    return sources.fetch(load, revision)


def _download(name: str, file: str, revision: str) -> None:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(name, file, revision=revision), str):
        return
    with hub.explained(ModelError, "model", name, revision):
        hf_hub_download(name, file, revision=revision)


def head_shape(config: PreTrainedConfig) -> tuple[int, int]:
    """Return the number of logits and the width of the hidden states: the output and input sizes of a model's output head."""
    head: Any = output_head(build_on_meta(config))
    return head.weight.shape[0], head.weight.shape[1]


def _names(config: PreTrainedConfig) -> list[str]:
    # returns the names of the head's parameters; if the embedding shares the head's weight, the weight has two names
    model = build_on_meta(config)
    model.tie_weights()
    own = {id(parameter) for parameter in output_head(model).parameters()}
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


# --- checks of the servers --------------------------------------------------------------------------------------------

_PROBE = "Two readers, naïve or not: 3.14 × 2 = 6.28?\n"
_ABSENT = (404, 405)  # HTTP statuses of a server that does not have the path of a request
_UNIT = 1e-3  # hidden states are normalised if their norms differ from 1 by less than this


@dataclass(frozen=True)
class Checked:
    """Facts about a server that passed all checks: it runs the right model, and can send what the recipe needs."""

    at: str
    name: str
    """The model's name on the server."""
    longest: int | None
    """Largest number of tokens of a text that the server accepts. None if the server does not report it."""
    seconds: float
    """Seconds from a request with a short text to its answer."""
    same_tokens: bool
    """True if the server's tokenizer was compared with the model's. False if the server has no `/tokenize`."""
    gives: str

    @property
    def text(self) -> str:
        """Return a description of the server in one line."""
        texts = "" if self.longest is None else f"; texts of at most {self.longest} tokens"
        tokens = "the same tokenizer" if self.same_tokens else "a tokenizer that could not be compared"
        return f"{self.at} runs {self.name} with {tokens}, and gives {self.gives}{texts}; one prompt takes {1000 * self.seconds:.0f} ms"


def served_teacher(
    servers: Servers,
    tokenizer: PreTrainedTokenizerBase,
    *,
    load: str,
    revision: str,
    dtype: torch.dtype,
    device: torch.device,
    longest: int = 0,
) -> Teacher:
    """Check the servers of a model, and return a teacher that sends its requests to them.

    Args:
        load: the source of the model's files. Only the configuration and the output head are loaded.
        dtype: number format of the head, and of hidden states on their way from the server.
        device: device of the head and of the teacher's outputs.
        longest: number of tokens of the longest text that the servers must read.

    Raises:
        ServerFailed: as in `check_servers`.
    """
    serve, config = servers.serve, fetch_config(load, revision)
    found = check_servers(servers, names_of(load, servers.model, revision, serve), tokenizer, config, longest)
    name = found[0].name
    if serve.gives == "top_k":
        return ServedTopK(servers, name, config, device, vocabulary(tokenizer).size)
    head = read_head(load, revision, dtype)
    placed = replace(head, weight=head.weight.to(device), bias=None if head.bias is None else head.bias.to(device))
    return ServedHidden(servers, name, config, placed)


def names_of(load: str, written: str | None, revision: str, serve: Serve) -> tuple[str, ...]:
    """Return the names that the model may have on a server: `serve.name`, or else the source and the directory of the model's files."""
    if serve.name:
        return (serve.name,)
    directory = sources.locate(load, revision, weights=False)
    return tuple(dict.fromkeys(filter(None, (written, load, directory and str(directory), directory and str(directory.resolve())))))


def check_servers(
    servers: Servers, names: Collection[str], tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, longest: int = 0
) -> list[Checked]:
    """Check each server of a teacher with a few short requests.

    Args:
        names: the names that the model may have on a server.
        config: the configuration of the model in the recipe.
        longest: number of tokens of the longest text that the servers must read.

    Raises:
        ServerFailed: a server cannot be reached, runs another model, has another tokenizer or a smaller vocabulary, takes only shorter
            texts, or does not send what the recipe needs.
    """
    listed = servers.get("/v1/models", _models)
    named = {at: _named(servers, at, models, names) for at, models in listed.items()}
    found = [_check(servers, at, name, takes, tokenizer, config, longest) for at, (name, takes) in named.items()]
    if len({server.name for server in found}) > 1:
        raise ServerFailed(
            f"the servers of `{servers.model}` have different names for it ({', '.join(server.name for server in found)}); start them with "
            "the same `--served-model-name`"
        )
    return found


def _models(answer: Answer) -> list[dict[str, Any]]:
    content = answer.json()
    listed = content.get("data") if isinstance(content, dict) else None
    if not isinstance(listed, list) or not all(isinstance(model, dict) and model.get("id") for model in listed):
        raise Broken("the server's answer to /v1/models is not a list of models; start a server of vLLM")
    return listed


def _named(servers: Servers, at: str, models: list[dict[str, Any]], names: Collection[str]) -> tuple[str, int | None]:
    for model in models:
        if model["id"] in names or model.get("root") in names:
            return str(model["id"]), model.get("max_model_len")
    runs = ", ".join(f"`{model['id']}`" for model in models) or "no model"
    fix = "correct `serve.name`" if servers.serve.name else "if it is the same model, set `serve.name` to its name on the server"
    raise ServerFailed(
        f"the server {at} of `{servers.model}` runs {runs}, but the recipe has `{next(iter(names))}`; {fix}, or start the server with "
        "`tadistill serve RECIPE MODEL`"
    )


def _check(
    servers: Servers, at: str, name: str, takes: int | None, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, longest: int
) -> Checked:
    serve = servers.serve
    positions = positions_of(config.get_text_config(decoder=True).to_dict()) or sys.maxsize  # no server takes more
    needed = min(serve.tokens_for(longest), positions)
    if takes is not None and needed > takes:
        raise ServerFailed(
            f"the server {at} of `{servers.model}` takes at most {takes} tokens, but a text of the recipe may have {needed}; start it with "
            f"`--max-model-len {needed}`, or lower `data.max_prompt`, `data.max_length` or `sampler.max_new_tokens`"
        )
    compared = _same_tokens(servers, at, name, tokenizer)
    last = vocabulary(tokenizer).size - 1
    probe = [last // 2, last]
    started = time.monotonic()
    try:
        if serve.gives == "hidden":
            width = head_shape(config)[1]
            servers.one(at, POOLING, hidden_request(name, probe, torch.float32), lambda answer: _whole_states(answer, width))
        else:
            servers.one(at, COMPLETIONS, top_k_request(name, probe, serve.k), lambda answer: prompt_scores(answer, probe, serve.k))
    except Refused as error:
        if error.status not in _ABSENT:
            raise
        option = "`--runner pooling`" if serve.gives == "hidden" else "no `--runner`"
        raise ServerFailed(
            f"the server {at} of `{servers.model}` cannot give `{serve.gives}` ({error.status}); start it with {option}, as `tadistill "
            "serve` does, or change `serve.gives`"
        ) from error
    return Checked(at, name, takes, time.monotonic() - started, compared, serve.gives)


def _same_tokens(servers: Servers, at: str, name: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    wanted = list(tokenizer(_PROBE, add_special_tokens=False)["input_ids"])

    def read(answer: Answer) -> list[int]:
        content = answer.json()
        if not isinstance(content, dict) or not isinstance(content.get("tokens"), list):
            raise Broken("the server's answer to /tokenize has no tokens")
        return content["tokens"]

    try:
        found = servers.one(at, "/tokenize", {"model": name, "prompt": _PROBE, "add_special_tokens": False}, read)
    except Refused as error:
        if error.status in _ABSENT:
            return False
        raise
    if found != wanted:
        place = next((i for i, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b), min(len(found), len(wanted)))
        raise ServerFailed(
            f"the server {at} of `{servers.model}` has another tokenizer than the recipe: token {place} of a test sentence has the id "
            f"{[*found, None][place]} on the server and {[*wanted, None][place]} in the recipe; start it with the model of the recipe"
        )
    return True


def _whole_states(answer: Answer, width: int) -> None:
    states = hidden_states(answer, 2, width, torch.float32)
    if bool(((states.norm(dim=1) - 1).abs() < _UNIT).all()):
        raise Broken(
            'the server normalises the hidden states; start it with `--pooler-config \'{"task": "token_embed", "use_activation": false}\'`'
        )
