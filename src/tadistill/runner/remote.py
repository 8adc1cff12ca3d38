"""Check teachers that run elsewhere before a run: on servers (`serve`), or behind an API (`api`). Start such a server.

for sentence in announced(plan, store, missing):      # for each API: the number of requests and their price
    console.note(sentence)
"""

import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from tadistill.config import Recipe
from tadistill.config.common import DTYPES
from tadistill.config.machine import vllm_folder
from tadistill.config.recipe import methods
from tadistill.config.recipe_files import placed
from tadistill.config.remote import LONGER, Api, Serve
from tadistill.data import datasets
from tadistill.errors import ConfigError, Gathering, ModelError, ServerFailed, TadistillError
from tadistill.models import sources
from tadistill.models.chat_api import Unavailable, knock
from tadistill.models.chat_api_replies import read_replies
from tadistill.models.served_model_requests import Servers
from tadistill.models.shapes import positions_of
from tadistill.plan.arms import Plan, make_plan
from tadistill.plan.costs import Ledger
from tadistill.plan.graph import Stage
from tadistill.plan.inputs import Loaded
from tadistill.plan.kinds import AskSpec
from tadistill.plan.remote import Estimate, running, wanted_of
from tadistill.plan.study_tokens import StudyTokens
from tadistill.plan.task import make_task
from tadistill.rollout.api_teacher import client_of, replies_file, same_model
from tadistill.runner.processes import run_in_processes
from tadistill.store import Store
from tadistill.terminal import Terminal
from tadistill.text import form

if TYPE_CHECKING:
    from tadistill.models.served_model import Checked

_OTHER_NUMBERS = (
    *("--quantization", "--quantization-config", "--dtype", "--kv-cache-dtype", "--hf-overrides", "--lora-modules"),
    *("--load-format dummy", "--load-format bitsandbytes", "--logprobs-mode"),
    *("--model", "--revision", "--code-revision", "--tokenizer", "--tokenizer-revision", "--hf-config-path", "--config"),
)
"""Arguments of `vllm serve` with which a server may compute other numbers than the model's files."""
Found = tuple[str, Literal["ok", "warning", "problem"], str, str]
"""A line of `tadistill doctor`: a title, a state, a description of the server or the problem, and a way to mend it."""


def examined(recipe: Recipe) -> Iterator[Found]:
    """Test each server and each API of a recipe. An API gets a request that costs nothing."""
    for name, model in recipe.models.items():
        if model.serve:
            yield from _examined_servers(recipe, name)
    for name, model in recipe.models.items():
        if model.api:
            yield _examined_api(name, model.api)


# --- servers ------------------------------------------------------------------------------------------------------------


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


def check_model(recipe: Recipe, name: str) -> "list[Checked]":
    """Check the servers of one model of the recipe, and return a description of each server. Raises errors as `check_teachers` does."""
    # here: these two modules import torch
    from tadistill.models.loading import load_tokenizer
    from tadistill.models.served_model import check_servers, fetch_config, names_of

    model = recipe.models[name]
    assert model.load is not None
    assert model.serve is not None
    assert model.tokenizer_source is not None
    servers = Servers(recipe.written(model.load) or model.load, model.serve, again=False)
    config = fetch_config(model.load, model.revision)
    model.serve.check_k(name, getattr(config.get_text_config(decoder=True), "vocab_size", None))
    tokenizer = load_tokenizer(model.tokenizer_source, revision=model.revision, world=recipe.data.world.model_dump())
    names = names_of(model.load, servers.model, model.revision, model.serve)
    return check_servers(servers, names, tokenizer, config, _longest_for(recipe, name))


def _examined_servers(recipe: Recipe, name: str) -> Iterator[Found]:
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
    lengths = [method.longest(data.max_prompt, data.max_length) for method in methods(recipe)]
    answer = recipe.evaluate.max_new_tokens if recipe.analyse and data.test else 0  # teachers read the answers to the test prompts
    return max([data.max_prompt + answer, *lengths])


def server_command(recipe: Recipe, name: str, *, host: str | None = None, port: int | None = None, more: Sequence[str] = ()) -> list[str]:
    """Return the command that starts a server of vLLM for a model, with the settings that the recipe's trainings need.

    Args:
        host, port: the address at which the server listens. Default: 127.0.0.1, and the port of the first address in `serve.at`, or 8000.
        more: further arguments of `vllm serve`. They override the computed arguments.

    Raises:
        ConfigError: the recipe has no such model, or the model is not loaded from files, or the study trains it.
        ModelError: the files cannot be found.
    """
    if name not in recipe.models:
        raise ConfigError(f"the recipe has no model `{name}`; its models are {', '.join(recipe.models)}")
    model = recipe.models[name]
    if model.load is None or model.load.startswith("scratch:"):
        raise ConfigError(f"models.{name} is not loaded from files, so no server can run it; name a model whose `load` names files")
    trained = {other for arm in recipe.arms.values() for other in arm.learners or (arm.last if arm.objective else ())}
    if model.sft or model.lora or name in trained | {*(recipe.search.models[1:] if recipe.search else ())}:
        raise ConfigError(f"models.{name} is trained by this study, so no server can run it; name a model that only teaches")
    serve = model.serve or Serve(at=("http://127.0.0.1:8000",))
    config = Ledger(recipe).config(name) or {}
    serve.check_k(name, config.get("vocab_size"))
    if recipe.served_as(name) is None and (other := _other_numbers(more)):
        raise ConfigError(
            f"with `{other}`, the server may compute other numbers than the files of models.{name}; give the model on the server a name of "
            f"its own, such as `serve: {{at: {serve.at[0]}, name: {name}-{other.strip('-').replace(' ', '-')}}}`"
        )
    hub = sources.parse_source(model.load).kind == "hub"
    found = ["vllm", "serve", model.load if hub else str(sources.fetch(model.load, model.revision))]
    found += ["--revision", model.revision] if hub and model.revision != "main" else []
    found += ["--served-model-name", serve.name or recipe.written(model.load) or model.load]
    found += ["--host", host or "127.0.0.1", "--port", str(port or urlsplit(serve.at[0]).port or 8000)]
    # the number format in which a training in this process would run the teacher; bf16 if trainings differ
    precisions = {method.optim.precision for method in methods(recipe)}
    dtype = DTYPES["fp32" if precisions <= {"fp32"} else "bf16"]
    length = min(serve.tokens_for(_longest_for(recipe, name)), positions_of(config) or sys.maxsize)  # vLLM refuses more
    found += ["--dtype", dtype, "--max-model-len", str(length), "--no-enable-prefix-caching"]
    if serve.gives == "top_k":
        return [*found, "--max-logprobs", str(serve.k), *more]
    pooler = json.dumps({"task": "token_embed", "use_activation": False})
    return [*found, "--runner", "pooling", "--convert", "embed", "--pooler-config", pooler, *more]


def _other_numbers(more: Sequence[str]) -> str | None:
    # the first argument with which a server may compute other numbers; vLLM also reads `--a=b`, `--a_b`, `--a.key` and the beginning
    # of a name, but not after one hyphen (`-r` is `--node-rank`), except `-q`
    words = [word for each in more for word in (each.split("=", 1) if each.startswith("-") else [each])]
    for word, value in pairwise([*words, ""]):
        option = "--quantization" if word.startswith("-q") else word.partition(".")[0].replace("_", "-")
        for other in _OTHER_NUMBERS:
            name, _, of = other.partition(" ")
            if option.startswith("--") and option != "--" and name.startswith(option) and of in ("", value):
                return other
    return None


def _longest_for(recipe: Recipe, name: str) -> int:
    # the number of tokens for which a server is started: a text has more tokens than for the student if the tokenizers differ
    longest, tokens = longest_text(recipe), StudyTokens(recipe, recipe.teacher)
    others = [model for arm in recipe.arms.values() if name in arm.models for model in arm.models]
    with suppress(ModelError):  # models that are not on this disk may have another tokenizer
        if all(tokens.alike(name, other) and tokens.known(name, other) for other in others):
            return longest
    return LONGER * longest


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


# --- APIs ---------------------------------------------------------------------------------------------------------------


@dataclass
class _Left:
    # the requests that a run will send to the API of one model, and the number of its answers that the store already has
    api: Api
    cached: int = 0
    estimate: Estimate = field(default_factory=Estimate)


def announced(plan: Plan, store: Store, stages: Iterable[Stage]) -> Iterator[str]:
    """Yield a sentence for each teacher behind an API: how many requests the stages will send, and what they cost. Each API that
    the stages will use is first tested with a request that costs nothing.

    Raises:
        ConfigError: the `openai` package or an API key is missing.
        ServerFailed: an API cannot be reached, or does not accept the key.
    """
    for name, left in _left(plan, store, stages).items():
        new, all_ = left.estimate.requests, left.cached + left.estimate.requests
        known = f"{left.cached:,} of {all_:,} {form(all_, 'answer is', 'answers are')} in the store"
        if not new:
            yield f"{name} ({left.api.model}): {known}, and no request will be sent"
            continue
        _try(name, left.api)
        yield (
            f"{name} ({left.api.model}): {known}; {new:,} {form(new, 'request', 'requests')} will be sent to {left.api.at}: "
            f"{left.estimate.text(left.api)}"
        )


def _left(plan: Plan, store: Store, stages: Iterable[Stage]) -> dict[str, _Left]:
    found, data, seen = dict[str, _Left](), plan.recipe.data, set[str]()
    for stage in stages:
        if not isinstance(stage.spec, AskSpec):
            continue
        spec, api = stage.spec, stage.spec.teacher.api
        assert api is not None
        examples = datasets.SplitRows(spec.train.ref, spec.train.role, data.world, data.root, spec.train.limit).read()
        kept, left = read_replies(replies_file(store.root, api.model)), found.setdefault(stage.model, _Left(api))
        rows = [(request.key, example) for request, example in zip(wanted_of(spec, examples), examples, strict=True)]
        new = {key: example for key, example in rows if key not in kept and key not in seen}
        left.cached += len({key for key, _ in rows if key in kept} - seen)
        seen |= {key for key, _ in rows}
        left.estimate += Estimate.of(spec, [*new.values()], len(new))
    return found


def _try(name: str, api: Api) -> tuple[str, ...]:
    client = client_of(api)
    try:
        return knock(client, api.key or "`api.key`, which is not set")
    except Unavailable as error:
        raise ServerFailed(
            f"models.{name}: the API {api.at} failed: {error}; correct `api`, or run the same command again when the API answers"
        ) from error


def _examined_api(name: str, api: Api) -> Found:
    try:
        listed = _try(name, api)
    except TadistillError as error:
        wrong, _, fix = str(error).rpartition("; ")
        return f"teacher {name}", "problem", wrong, fix
    known = [there for there in listed if same_model(api.model, there) or same_model(there, api.model)]
    accepts = "accepts the key" if api.key else "answers"
    if listed and not known:
        shown = ", ".join(listed[:3]) + (" …" if len(listed) > 3 else "")
        return f"teacher {name}", "warning", f"{api.at} {accepts}, but does not list {api.model} ({shown})", "correct `api.model`"
    lists = f" and lists {known[0]}" if known else ""
    return f"teacher {name}", "ok", f"{api.at} {accepts}{lists}; an API gives text, but no probabilities", ""


@placed
def ask_now(recipe: Recipe, store: Store, console: Terminal) -> None:
    """Run the stages of a recipe that send requests to an API. All other stages then need no network.

    Raises:
        ConfigError: the `openai` package or an API key is missing.
        ServerFailed: an API does not answer, or some rows got no usable answer. All answers so far are kept.
    """
    plan = make_plan(recipe)
    stages = [stage for stage in plan.stages.values() if isinstance(stage.spec, AskSpec) and not store.finished(stage.key)]
    for sentence in announced(plan, store, stages):
        console.note(sentence)
    for stage in stages:
        with console.working(stage.label) as show:
            run_in_processes(make_task(plan, stage, store), threads=1, progress=show, alarm=console.note)
