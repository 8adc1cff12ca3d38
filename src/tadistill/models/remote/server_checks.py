"""Checks of a teacher's servers before work starts: that they run the right model, and send what the recipe needs.

for server in check_servers(servers, ("ORG/NAME",), tokenizer, config, longest=512):
    print(server.at, server.name, server.seconds)
"""

import time
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from tadistill.config.remote import Serve
from tadistill.errors import ServerFailed
from tadistill.models import sources
from tadistill.models.head import head_shape, read_config, read_head
from tadistill.models.remote.client import Answer, Broken, Refused, Servers
from tadistill.models.remote.served import (
    COMPLETIONS,
    POOLING,
    ServedHidden,
    ServedTopK,
    hidden_request,
    hidden_states,
    prompt_scores,
    top_k_request,
)
from tadistill.models.teacher import Teacher

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
    serve: Serve,
    written: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    load: str,
    revision: str,
    dtype: torch.dtype,
    device: torch.device,
) -> Teacher:
    """Check the servers of a model, and return a teacher that sends its requests to them.

    Args:
        written: the source of the model as written in the recipe, for messages.
        load: the source of the model's files. Only the configuration and the output head are loaded.
        dtype: number format of the head, and of hidden states on their way from the server.
        device: device of the head and of the teacher's outputs.

    Raises:
        ConfigError: the variable with the API key is not set.
        ServerFailed: as in `check_servers`.
    """
    servers, config = Servers(written, serve), read_config(load, revision)
    (first, *_) = check_servers(servers, names_of(load, written, revision, serve), tokenizer, config)
    if serve.gives == "top_k":
        return ServedTopK(servers, first.name, config, device, len(tokenizer))
    head = read_head(load, revision, dtype)
    placed = replace(head, weight=head.weight.to(device), bias=None if head.bias is None else head.bias.to(device))
    return ServedHidden(servers, first.name, config, placed)


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
    ahead = serve.gives == "top_k"  # then the server always samples one token after the text
    if takes is not None and longest + ahead > takes:
        raise ServerFailed(
            f"the server {at} of `{servers.model}` takes at most {takes} tokens, but the recipe allows {longest + ahead}; start it with "
            f"`--max-model-len {longest + ahead}`, or lower `data.max_prompt`, `data.max_length` or `sampler.max_new_tokens`"
        )
    compared = _same_tokens(servers, at, name, tokenizer)
    last = max(tokenizer.get_vocab().values())
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
