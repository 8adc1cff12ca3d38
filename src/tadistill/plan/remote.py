"""Checks of teachers that run elsewhere, on a server (`serve`) or behind an API (`api`), and estimates of what their answers cost.

A model with `serve` can only teach. Any other use would load the model into a process of the study.

An `ask` stage sends one request to an API for each row of the training set. The requests of all stages, their tokens and their price are
estimated before the first one is sent: from the number of bytes of the prompts, and from the length of the reference answers.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING

from tadistill.config import Method, Recipe
from tadistill.config.arm import routed
from tadistill.config.common import DTYPES, Precision
from tadistill.config.remote import Api, Serve, check_served, check_text_only
from tadistill.data import datasets, hub
from tadistill.data.prompts import messages
from tadistill.data.rows import Example, place
from tadistill.data.survey import survey
from tadistill.data.turns import without_thinking
from tadistill.errors import ConfigError, about
from tadistill.models.chat_api import estimated_tokens
from tadistill.plan.costs import Ledger
from tadistill.plan.graph import Spec
from tadistill.plan.inputs import Handle, Loaded
from tadistill.plan.kinds import AnalyseSpec, AskSpec, DistillSpec, SignalSpec
from tadistill.rollout.api_teacher import Request, requests
from tadistill.store import Store
from tadistill.text import counted, form, listed

if TYPE_CHECKING:
    from tadistill.plan.arms import Plan


_ENTRY = 70
"""Bytes of one token with its log-probability in the JSON of a server of vLLM, on average."""


def running(spec: Spec) -> tuple[Handle, ...]:
    """Return the teachers that must run during a stage to compute probabilities of tokens.

    They are the teachers of a distillation, the teacher whose outputs are recorded, or the models with which a model is compared.
    """
    if isinstance(spec, AnalyseSpec):
        return (spec.teacher, *spec.assistants)
    if isinstance(spec, SignalSpec):
        return (spec.teacher,)
    return (spec.teacher, *spec.assistants) if isinstance(spec, DistillSpec) and spec.method.runs_teacher else ()


def from_files(handle: Handle) -> Handle:
    """Return a model whose weights are read from its files. The name of a server, on which it only teaches, then does not matter."""
    return handle.model_copy(update={"served_as": None}) if isinstance(handle, Loaded) and handle.served_as else handle


def check_teaching(ledger: Ledger, arm: str, teachers: Iterable[str], method: Method) -> None:
    """Check that served models can teach with a method.

    Raises:
        ConfigError: the method needs an output that a server does not send, or a server is asked for more tokens than its model has.
    """
    with about(f"arms.{arm}"):
        for name in teachers:
            model = ledger.recipe.models[name]
            if model.serve:
                model.serve.check_k(name, (ledger.config(name) or {}).get("vocab_size"))
                check_served(name, model.serve, method)
            if model.api:
                check_text_only(name, model.api, method)


def check_not_run(recipe: Recipe, arm: str, teacher: str | None) -> None:
    """Check that an arm does not run a served model, or one behind an API, in a process of the study.

    Args:
        teacher: the original teacher with which the arm's model is compared; None if nothing is compared.

    Raises:
        ConfigError: the arm trains or measures a served model; or its model is compared with a served one that sends only top-k tokens; or
            the `temper` of a model refers to a served model.
    """
    check_only_writes(recipe, arm)
    served, path = {name for name, model in recipe.models.items() if model.serve}, recipe.arms[arm]
    for name, model in recipe.models.items():
        if model.temper and model.temper.of in served:
            raise ConfigError(
                f"models.{name}.temper changes the logits of `{model.temper.of}`, but those of a served model cannot be changed; remove "
                f"`serve` of `{model.temper.of}`"
            )
    if own := served.intersection((*path.learners, *(path.last if len(path.last) == 1 else ()))):
        what = "trains" if own & {*path.learners} else "measures"
        raise ConfigError(
            f"arms.{arm} {what} `{min(own)}`, but this model is served, and a served model can only teach; remove its `serve`, or this arm"
        )
    if teacher and recipe.data.test:
        for name in (teacher, *(() if routed(path.path) else path.last[:-1])):
            if (serve := recipe.models[name].serve) and serve.gives != "hidden":
                raise ConfigError(
                    f"`analyse` needs the whole distribution of `{name}`, but models.{name}.serve gives only `{serve.gives}`; use `gives: "
                    "hidden`, or set `analyse: false`"
                )


def check_measured(recipe: Recipe, models: Iterable[str]) -> None:
    """Check that none of the models that `tadistill advise` measures is served. Raises ConfigError if one of them is served."""
    for name in models:
        if recipe.models[name].serve:
            raise ConfigError(
                f"models.{name} is served, but `tadistill advise` samples answers of every model; remove `serve`, or use "
                "another recipe in which the model has no `serve`"
            )


def served_notes(plan: "Plan") -> Iterator[str]:
    """Yield a sentence for each served teacher. It says where the teacher runs, and how many bytes a server sends for each token."""
    ledger = Ledger(plan.recipe)
    for name, model in plan.recipe.models.items():
        if model.serve is None:
            continue
        specs = [stage.spec for stage in plan.stages.values()]
        own = model.serve, model.load
        taught = [s for s in specs if any(isinstance(h, Loaded) and (h.serve, h.source) == own for h in running(s))]
        if not taught:
            continue
        where, config = ", ".join(model.serve.at), ledger.config(name) or {}
        width = config.get("hidden_size", config.get("n_embd"))
        precisions: list[Precision] = [*dict.fromkeys(_precision(spec) for spec in taught)]
        yield f"Teacher {name} runs on {where}. For each token that it reads, a server sends {_bytes(model.serve, width, precisions)}."
        if name == plan.teacher and any(isinstance(spec, AnalyseSpec) for spec in specs):
            yield f"The exposure bias is not measured, because the server of {name} writes no answers."


def shared_notes(plan: "Plan") -> Iterator[str]:
    """Yield a sentence for each pair of models that count as one teacher, because they differ only in `serve`."""
    for (one, first), (two, second) in combinations(plan.recipe.models.items(), 2):
        if first.serve == second.serve or _without_addresses(plan.recipe, one) != _without_addresses(plan.recipe, two):
            continue
        of_one, of_two = ({arm.name for arm in plan.arms if name in arm.arm.models} for name in (one, two))
        shared = (s.arms for s in plan.stages.values() if running(s.spec) and s.arms & of_one and s.arms & of_two)
        if arms := {name for names in shared for name in names}:
            own = plan.recipe.served_as(one)
            why = f"both have the name `{own}`" if own else "a server of a model's own files changes results only by rounding"
            yield (
                f"{one} and {two} count as one teacher, because {why}, so {listed(sorted(arms))} have stages in common. If a server runs "
                f"other weights, such as quantised ones, give them {'another' if own else 'a'} name in "
                f"`models.{two if second.serve else one}.serve.name`."
            )


def _without_addresses(recipe: Recipe, name: str) -> tuple[object, ...]:
    model = recipe.models[name]
    return (
        model.serve and model.serve.signal,
        recipe.served_as(name),
        model.model_dump(include={"load", "revision", "tokenizer", "config", "sft"}),
    )


def _precision(spec: Spec) -> Precision:
    assert isinstance(spec, SignalSpec | DistillSpec | AnalyseSpec)
    return spec.optim.precision if isinstance(spec, DistillSpec) else spec.precision


def _bytes(serve: Serve, width: int | None, precisions: Sequence[Precision]) -> str:
    if serve.gives == "top_k":
        return f"the {serve.k} most probable tokens as JSON, about {_ENTRY * (serve.k + 1):,} bytes"
    if width is None:
        return "the hidden state"
    each = {"float32": 4 * width, "bfloat16": 2 * width}
    return f"the hidden state, {' or '.join(f'{each[DTYPES[name]]:,} bytes ({DTYPES[name]})' for name in precisions)}"


def check_only_writes(recipe: Recipe, arm: str) -> None:
    """Check that a model behind an API only writes text for the models of an arm.

    Raises:
        ConfigError: the arm trains or measures such a model or starts from its weights, or the training set has descriptions of tools.
    """
    apis, path = {name for name, model in recipe.models.items() if model.api}, recipe.arms[arm]
    if wrong := apis.intersection((*path.learners, *path.init.values(), *(path.last if len(path.last) == 1 else ()))):
        name = min(wrong)
        what = "trains" if name in path.learners else "starts from" if name in path.init.values() else "measures"
        raise ConfigError(
            f"arms.{arm} {what} `{name}`, which {Api.has_no}; use it only as the first model of a path, such as {name} > STUDENT"
        )
    if apis.intersection(path.models) and any("tools" in ref.columns for ref in recipe.data.sets.values()):
        raise ConfigError(
            f"data.train.columns names `tools`, but the API of `{min(apis)}` returns only text and no tool calls; remove `tools`"
        )


def wanted_of(spec: AskSpec, examples: Iterable[Example]) -> list[Request]:
    """Return the request for each row of the training set. Raises DataError if a row has no column for a placeholder of the `context`."""
    rows = [without_thinking(each) if spec.data.thinking == "drop" else each for each in examples]
    api, name = spec.teacher.api, f"data set `{spec.train.ref.name}`"
    assert api is not None
    prompts = (messages(each, spec.data.context, f"{name}, {place(row, each.line)}") for row, each in enumerate(rows))
    wanted = requests(prompts, api, spec.sampler, seed=spec.seed or 0)
    return [replace(request, line=each.line) for request, each in zip(wanted, rows, strict=True)]


@dataclass(frozen=True)
class Estimate:
    """The numbers of API requests and of their tokens, estimated from the lengths of texts."""

    requests: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    most_out: int = 0
    """The largest number of tokens that the answers can have."""

    @classmethod
    def of(cls, spec: AskSpec, examples: Sequence[Example], requests: int) -> "Estimate":
        """Return the estimate for a number of `requests` whose prompts are on average as long as those of `examples`."""
        most, times = spec.sampler.max_new_tokens, requests / max(1, len(examples))
        prompts = [messages(example, spec.data.context) for example in examples]
        into = sum(estimated_tokens(*(str(m.get("content") or "") for m in prompt)) for prompt in prompts)
        out = sum(min(most, estimated_tokens(example.references[0]) + 1) for example in examples)
        return cls(requests, round(into * times), round(out * times), requests * most)

    def __add__(self, other: "Estimate") -> "Estimate":
        both = zip(vars(self).values(), vars(other).values(), strict=True)
        return Estimate(*(a + b for a, b in both))

    def text(self, api: Api) -> str:
        """Return the numbers in words, with their price if the recipe has prices."""
        found = f"about {self.tokens_in:,} tokens of prompts and {self.tokens_out:,} of answers (at most {self.most_out:,})"
        if api.price is None:
            return f"{found}; the recipe has no `price`"
        price, most = (_money(api.price.of(self.tokens_in, out)) for out in (self.tokens_out, self.most_out))
        return f"{found}, which cost about {price} {api.price.currency} ({most} with the longest answers)"


def _money(value: float) -> str:
    return f"{value:,.2f}" if value == 0 or value >= 0.01 else f"{value:.1g}"


def asked_notes(plan: "Plan", store: Store) -> Iterator[str]:
    """Yield a sentence for each teacher behind an API: its requests, and what they cost."""
    for name, model in plan.recipe.models.items():
        if model.api is None:
            continue
        stages = [(s.key, s.spec) for s in plan.stages.values() if isinstance(s.spec, AskSpec) and s.spec.teacher.api == model.api]
        if not stages:
            continue
        left = [spec for key, spec in stages if not store.finished(key)]
        where = f"{name} ({model.api.model} at {model.api.at})"
        done = "All its answers are in the store."
        data, ref = plan.recipe.data, stages[0][1].train.ref
        if left and (place := datasets.on_hub(ref, "train", data)) and hub.cached(place[0], ref.revision, place[1]) is None:
            done = f"The number of requests is not known, because data set `{ref.load}` is not on this disk."
        elif left:
            rows = survey(ref, "train", data)
            each = (Estimate.of(spec, rows.sample, min(rows.rows, spec.train.limit or rows.rows)) for spec in left)
            total = sum(each, Estimate())
            sets, wanted = counted(len(left), "set"), f"{total.requests:,} {form(total.requests, 'request', 'requests')}"
            done = f"At most {wanted} for {sets} of answers: {total.text(model.api)}."
            if len({spec.seed for spec in left}) > 1:
                done += f" Each seed asks for its own answers; set `models.{name}.seed` to use one set of answers for all seeds."
        yield f"Teacher {where} writes text. {done}"


def check_asked(plan: "Plan", store: Store) -> None:
    """Check that no job of a cluster has to send requests to an API. Raises ConfigError if answers are missing in the store."""
    for stage in plan.stages.values():
        if isinstance(stage.spec, AskSpec) and not store.finished(stage.key):
            raise ConfigError(
                f"jobs have no API keys, and the answers of {stage.model} are not in the store; run `tadistill fetch RECIPE --answers` on "
                "a login node first"
            )
