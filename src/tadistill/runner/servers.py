"""Check the servers that run the teachers of a recipe, and start such a server."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal
from urllib.parse import urlsplit

from tadistill.config import Recipe
from tadistill.config.common import DTYPES
from tadistill.config.machine import vllm_folder
from tadistill.config.method import Method
from tadistill.config.recipe import methods
from tadistill.config.remote import Serve
from tadistill.config.sampling import OnPolicy
from tadistill.errors import ConfigError, Gathering, TadistillError
from tadistill.models import sources
from tadistill.models.head import read_config
from tadistill.models.loading import load_tokenizer
from tadistill.models.remote.client import Servers
from tadistill.models.remote.server_checks import Checked, check_servers, names_of
from tadistill.plan.graph import Stage
from tadistill.plan.inputs import Loaded
from tadistill.plan.remote import running


def check_teachers(recipe: Recipe, stages: Iterable[Stage]) -> None:
    """Check the servers of all teachers that the stages use.

    Raises:
        ConfigError: a variable with an API key is not set.
        ServerFailed: a server cannot be reached, runs another model, or does not send what is needed.
    """
    used = {(handle.source, handle.serve) for stage in stages for handle in running(stage.spec) if isinstance(handle, Loaded)}
    found = Gathering()
    for name, model in recipe.models.items():
        if model.serve and (model.load, model.serve) in used:
            with found.about(f"models.{name}"):
                check_model(recipe, name)
    found.finish()


def check_model(recipe: Recipe, name: str) -> list[Checked]:
    """Check the servers of one model of the recipe, and return a description of each server. Raises errors as `check_teachers` does."""
    model = recipe.models[name]
    assert model.load is not None
    assert model.serve is not None
    assert model.tokenizer_source is not None
    servers = Servers(recipe.written(model.load) or model.load, model.serve, again=False)
    tokenizer = load_tokenizer(model.tokenizer_source, revision=model.revision, world=recipe.data.world.model_dump())
    names = names_of(model.load, servers.model, model.revision, model.serve)
    return check_servers(servers, names, tokenizer, read_config(model.load, model.revision), longest_text(recipe))


def examined(recipe: Recipe) -> Iterator[tuple[str, Literal["ok", "problem"], str, str]]:
    """Yield four texts for each server: a title, `ok` or `problem`, a description of the server or the problem, and a way to mend it."""
    for name, model in recipe.models.items():
        if model.serve is None:
            continue
        try:
            for server in check_model(recipe, name):
                yield f"teacher {name}", "ok", server.text, ""
        except TadistillError as error:
            for problem in error.problems:
                wrong, _, fix = problem.rpartition("; ")
                yield f"teacher {name}", "problem", wrong, fix


def longest_text(recipe: Recipe) -> int:
    """Return the largest number of tokens (prompt and answer) that any teacher of the recipe may have to read at once."""
    data = recipe.data
    lengths = [_longest_of(method, data.max_prompt, data.max_length) for method in methods(recipe)]
    answer = recipe.evaluate.max_new_tokens if recipe.analyse and data.test else 0  # teachers read the answers to the test prompts
    return max([data.max_length, data.max_prompt + answer, *lengths])


def _longest_of(method: Method, max_prompt: int, max_length: int) -> int:
    answer = method.sampler.max_new_tokens if isinstance(method.sampler, OnPolicy) else 0
    if method.context is None:
        return max_prompt + answer
    return method.context.max_prompt + max(answer, max_length)  # a response of the data set may be nearly as long as its row


def server_command(recipe: Recipe, name: str, *, host: str | None = None, port: int | None = None, more: Sequence[str] = ()) -> list[str]:
    """Return the command that starts a server of vLLM for a model, with the settings that the recipe's trainings need.

    Args:
        host, port: the address at which the server listens. Default: 127.0.0.1, and the port of the first address in `serve.at`, or 8000.
        more: further arguments of `vllm serve`. They override the computed arguments.

    Raises:
        ConfigError: the recipe has no such model, or the model is not loaded from files.
        ModelError: the files cannot be found.
    """
    if name not in recipe.models:
        raise ConfigError(f"the recipe has no model `{name}`; its models are {', '.join(recipe.models)}")
    model = recipe.models[name]
    if model.load is None or model.load.startswith("scratch:"):
        raise ConfigError(f"models.{name} is not loaded from files, so no server can run it; name a model whose `load` names files")
    serve = model.serve or Serve(at=("http://127.0.0.1:8000",))
    hub = sources.parse_source(model.load).kind == "hub"
    directory = None if hub else sources.fetch(model.load, model.revision)
    found = ["vllm", "serve", model.load if directory is None else str(directory)]
    found += ["--revision", model.revision] if hub and model.revision != "main" else []
    found += ["--served-model-name", serve.name or recipe.written(model.load) or model.load]
    found += ["--host", host or "127.0.0.1", "--port", str(port or urlsplit(serve.at[0]).port or 8000)]
    found += ["--dtype", _dtype(recipe), "--max-model-len", str(longest_text(recipe) + 1), "--no-enable-prefix-caching"]
    if serve.gives == "top_k":
        return [*found, "--max-logprobs", str(serve.k), *more]
    pooler = json.dumps({"task": "token_embed", "use_activation": False})
    return [*found, "--runner", "pooling", "--convert", "embed", "--pooler-config", pooler, *more]


def start_server(recipe: Recipe, name: str, command: Sequence[str]) -> None:
    """Replace this process with the server that `command` starts. The function never returns.

    Raises:
        ConfigError: vLLM is not installed, or the variable with the API key is not set.
    """
    program = vllm_folder("`tadistill serve`", "run the printed command where vLLM is installed") / command[0]
    environment, serve = dict(os.environ), recipe.models[name].serve
    if serve and serve.key:
        if not environment.get(serve.key):
            raise ConfigError(
                f"models.{name}.serve.key names the environment variable {serve.key}, which is not set; set this variable to an API key"
            )
        environment["VLLM_API_KEY"] = environment[serve.key]
    os.execve(program, [*command], environment)


def _dtype(recipe: Recipe) -> str:
    # the number format in which a training in this process would run the teacher; bf16 if trainings differ
    precisions = {method.optim.precision for method in methods(recipe)}
    return DTYPES["fp32" if precisions <= {"fp32"} else "bf16"]
