"""The recipe: an immutable description of a whole study.

A recipe names models, data, a method and arms (paths of models to compare). `tadistill.plan.arms` turns it into stages, the single steps of
work. Unknown keys are errors. All defaults are in this package.
"""

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, PrivateAttr, field_validator, model_validator

from tadistill.config.added_arms import Budgets, with_controls
from tadistill.config.arm import Arm, ModelPath, flat, teachers_of
from tadistill.config.common import MOST, Decoding, Name, Seeds, Strict
from tadistill.config.data import Data
from tadistill.config.evaluate import Evaluate, OwnMetric
from tadistill.config.machine import Resources, Runtime
from tadistill.config.method import Method, MethodPatch
from tadistill.config.method_rules import apply, phases_of
from tadistill.config.model import ModelConfig
from tadistill.config.objective import Custom
from tadistill.config.remote import Api
from tadistill.config.shorthand import with_methods
from tadistill.errors import ConfigError, about, did_you_mean_then
from tadistill.metrics import RECORD

if TYPE_CHECKING:
    from tadistill.config.recipe_files import Origin


class Search(Strict):
    """Settings of `tadistill search` and `tadistill advise`: the models of the paths, and the search strategy. Both commands compare paths
    on the dev set only."""

    teacher: str
    """The first model of every path."""
    assistants: tuple[str, ...] = Field(min_length=1)
    """The models that can be assistants (between teacher and student), from big to small."""
    student: str
    """The last model of every path."""
    strategy: Literal["exhaustive", "single", "best_prefix", "beam", "halving"] = "best_prefix"
    """`exhaustive`: try every path. `single`: try the direct path, and all paths with one assistant. `best_prefix`: for each model, keep
    only the best path to this model, and extend this path. (The result is only right if a better teacher makes a better student.) `beam`:
    for each model, keep and extend the `width` best paths to this model. `halving`: train all paths for a few updates, drop the worse half,
    and repeat with more updates."""
    max_assistants: int | None = Field(default=None, ge=1, le=MOST)
    """Largest number of assistants in a path. By default, there is no limit."""
    budget: float | None = Field(default=None, gt=0)
    """Largest training cost of a path, as a multiple of the training FLOPs of the direct path (without assistants). By default, there is no
    limit."""
    width: int = Field(default=2, ge=1, le=MOST)
    """Number of paths to each model that the strategy `beam` keeps."""
    rungs: tuple[float, ...] = Field(default=(0.1, 0.3, 1.0), min_length=1)
    """The rounds of the strategy `halving`, with one number per round. The number is the length of the training runs in this round, as a
    fraction of all updates. The last number is 1."""

    @property
    def models(self) -> ModelPath:
        """All models of the search, from big to small."""
        return (self.teacher, *self.assistants, self.student)

    @model_validator(mode="after")
    def _check(self):
        for name in self.models:
            if self.models.count(name) > 1:
                raise ValueError(f"search names the model {name} twice; teacher, assistants and student must be different models")
        if self.rungs[-1] != 1 or any(a >= b for a, b in zip(self.rungs, self.rungs[1:], strict=False)) or self.rungs[0] <= 0:
            raise ValueError(f"search.rungs are {list(self.rungs)}; write rising fractions that end with 1, such as [0.1, 0.3, 1]")
        if self.strategy == "halving" and len(self.rungs) < 2:
            raise ValueError(
                "search.strategy is `halving`, which needs at least two rungs; set `search.rungs`, for instance to [0.1, 0.3, 1]"
            )
        return self


class Recipe(Strict):
    """The description of a whole study."""

    study: Annotated[Name, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Name of the study. Its folder has the same name."""
    seeds: Seeds
    """Training seeds. Every arm is trained once with each seed. A recipe in the short form (with `student`) may leave them out; the seed is
    then 10."""
    models: dict[Name, ModelConfig] = Field(min_length=1)
    """The models of the study. Each has a name of your choice, which paths and reports use."""
    data: Data
    method: Method = Method()
    """The method of all distillations. A model (`models.X.distill`) or an arm can change parts of it."""
    methods: dict[Name, MethodPatch] = {}
    """Methods with names of your own. `method`, arms, `models.X.distill` and phases can use these names like those of published methods.
    Each name stands for the keys below it. Other keys beside the name change these keys."""
    evaluate: Evaluate = Evaluate()
    metrics: tuple[OwnMetric, ...] = ()
    """Additional metrics of the answers on test sets, computed by functions of your own."""
    arms: dict[Name, Arm] = {}
    """The paths to compare, each with a name. This key can be left out if `search` is given. On the command line, `arms={new: A > B}` adds
    an arm to those of the recipe. To replace all arms, write `arms={}` before it."""
    fair: bool = False
    """True adds arms to the study. For every arm with a path through assistants (and no `init`), it adds direct distillation with the same
    compute, and one control of each kind (`arms.X.control`). `tadistill plan` shows their cost."""
    budgets: Budgets | None = None
    """Training budgets at which every arm is trained and compared."""
    teacher: str | None = None
    """The original teacher. The report compares all students with it (KL divergence). The key is only needed if the paths start with
    different models, or if there are no paths."""
    analyse: bool = True
    """Compare every trained model with the original teacher and with the assistants of the model's path. The report then shows the
    KL divergences, the exposure bias, and the error budget: how much each distillation of a path adds to the divergence from the original
    teacher."""
    margin: float = Field(default=0.3, gt=0, le=1000)
    """Smallest difference in the primary metric that matters, in points of this metric. Smaller differences count as equal."""
    search: Search | None = None
    runtime: Runtime = Runtime()
    resources: dict[str, Resources] = {}
    """Devices and limits of stages (single steps of work). The name of an entry is `default`, a kind of stage (`sft`), or a kind with a
    model (`sft xl`)."""

    @model_validator(mode="before")
    @classmethod
    def _written_out(cls, raw: Any) -> Any:
        return with_controls(with_methods(raw)) if isinstance(raw, dict) else raw

    @model_validator(mode="after")
    def _check(self):
        if not self.arms and self.search is None:
            raise ValueError("there are no `arms` and no `search`; add one of them, for instance arms: {direct: xl > s}")
        if self.budgets:
            expanded = self.budgets.expand(self.arms)
            self.arms.clear()
            self.arms.update(expanded)
        self.evaluate.check_sets([ref.columns for ref in self.data.test])
        names = [metric.name for metric in self.metrics]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"metrics has two functions with the name `{twice[0]}`; rename one of them")
        if taken := [name for name in names if name in RECORD]:  # not in OwnMetric, because plan.json of an older study may have this name
            raise ValueError(
                f"metrics: predictions.jsonl already has a key `{taken[0]}`, which is not a metric; give your function another name"
            )
        if wrong := [*_wrong_names(self)]:
            raise ValueError("\n".join(wrong))
        check_acyclic({n: m.parent for n, m in self.models.items() if m.parent}, "models")
        check_acyclic({n: a.like.arm for n, a in self.arms.items() if a.like}, "compute")
        check_acyclic({n: a.asks_like for n, a in self.arms.items() if a.asks_like}, "teacher_budget")
        return self

    _origin: "Origin | None" = PrivateAttr(default=None)

    def written(self, source: str | None) -> str | None:
        """Return the source of a model or tokenizer as the recipe's file writes it. `source` is this source, or its resolved path."""
        return self._origin.written.get(source, source) if self._origin and source else source

    def served_as(self, name: str) -> str | None:
        """Return the name of a model on its servers if it is none of its files: such a server may compute other numbers than the files."""
        model = self.models[name]
        return model.serve and model.serve.other_name(model.load, self.written(model.load))

    def data_of(self, names: Iterable[str]) -> Data:
        """Return `data` with the template of the models `names`, which share a tokenizer.

        Raises:
            ConfigError: two of the models name different templates.
        """
        given = {self.models[name].template: name for name in names if self.models[name].template}
        if len(given) > 1:
            (one, first), (other, second) = [*given.items()][:2]
            raise ConfigError(
                f"models.{first}.template is {one}, but models.{second}.template is {other}. Both models have the same tokenizer, so they "
                "read the same prompts; write the same template, or remove one of the two keys"
            )
        return self.data.model_copy(update={"template": next(iter(given))}) if given else self.data

    def root(self, name: str) -> str:
        """Return the model from whose files a model is made, directly or through other models. It may be the model itself."""
        parent = self.models[name].parent
        return self.root(parent) if parent else name

    @property
    def first_seed(self) -> int:
        return self.seeds[0]

    @field_validator("study")
    @classmethod
    def _not_reserved(cls, study: str) -> str:
        if study.lower() == "store":
            raise ValueError("this study would have the folder runs/store, which contains the results of all studies; choose another name")
        return study

    @field_validator("models")
    @classmethod
    def _no_arrows(cls, models: dict[str, ModelConfig]) -> dict[str, ModelConfig]:
        for name in models:
            if ">" in name or any(word in f" {name} " for word in (" then ", " on ")):
                raise ValueError(
                    f"`{name}` cannot be used in a path, because paths are written with `>`, `then` and `on`; choose another name"
                )
        return models


def methods(recipe: Recipe) -> list[Method]:
    """Return the methods of all trainings after `sft`: one for each phase of a distillation, and one for each arm that continues the
    training of a model.

    Raises:
        ConfigError: parts of a method do not fit together.
    """
    found: list[Method] = []
    for arm in recipe.arms.values():
        if arm.learners:
            found += [method for method, _, _ in distillations(recipe, arm)]
        elif arm.objective:
            found.append(apply(recipe.method, recipe.models[arm.last[0]].distill, arm.patch))
    return found


def distillations(recipe: Recipe, arm: Arm) -> Iterator[tuple[Method, ModelPath, str]]:
    """Yield the method of each phase of each distillation of an arm, the part of the path that teaches in it, and the student.

    Raises:
        ConfigError: parts of a method do not fit together.
    """
    for path in arm.path:
        for i, learner in enumerate(path[1:], 1):
            for method, _ in phases_of(apply(recipe.method, recipe.models[learner].distill, arm.patch)):
                yield method, path[:i] if method.dense else path[i - 1 : i], learner


def sampled_tokens(recipe: Recipe, model: str) -> int:
    """Return the largest `max_new_tokens` of the samplers of all distillations in which a model teaches, learns or writes the text.

    Raises:
        ConfigError: parts of a method do not fit together.
    """
    most = 0
    for name, arm in recipe.arms.items():
        with about(f"arms.{name}"):
            for method, teachers, learner in distillations(recipe, arm):
                involved = (*(teachers if method.uses_teacher else ()), learner, *(arm.last[-1:] if method.recorded_text else ()))
                if isinstance(method.sampler, Decoding) and model in flat(involved):
                    most = max(most, method.sampler.max_new_tokens)
    return most


def trains(recipe: Recipe) -> bool:
    """Return True if a recipe trains a model, or has no arms yet (as for `search`). Without training, only its test sets are read."""
    trained = any(arm.learners or arm.objective for arm in recipe.arms.values())
    return trained or not recipe.arms or any(model.sft for model in recipe.models.values())


def own_functions(recipe: Recipe) -> dict[tuple, str]:
    """Return the names of all functions in the user's own code that a recipe uses, each with its key."""
    groups: dict[tuple, Method | MethodPatch | Arm] = {("method",): recipe.method}
    groups |= {("methods", name): method for name, method in recipe.methods.items()}
    groups |= {("arms", name): arm for name, arm in recipe.arms.items()}
    groups |= {("models", name, "distill"): model.distill for name, model in recipe.models.items()}
    parts = [(at, group) for at, group in groups.items()]
    parts += [((*at, "phases", i), phase) for at, group in groups.items() for i, phase in enumerate(group.phases or ())]
    metrics = {("metrics", i, "function"): metric.function for i, metric in enumerate(recipe.metrics)}
    return metrics | {(*at, "objective", "function"): each.function for at, part in parts if isinstance(each := part.objective, Custom)}


def check_acyclic(edges: dict[str, str], what: str) -> None:
    """Raise a ValueError if references form a cycle. `edges` maps each name to the name that it refers to. `what` is the
    key with the references; the message names it."""
    for start in edges:
        seen, at = [start], edges.get(start)
        while at is not None:
            if at in seen:
                raise ValueError(f"`{what}` has a cycle: {' -> '.join([*seen, at])}; remove one of these references")
            seen.append(at)
            at = edges.get(at)


def _wrong_names(recipe: Recipe) -> Iterator[str]:
    for name, model in recipe.models.items():
        yield from _wrong_in_model(recipe, name, model)
    yield from _unknown(recipe, recipe.teacher, "teacher is")
    for name in recipe.search.models if recipe.search else ():
        yield from _unknown(recipe, name, "search names")
        if name in recipe.models and recipe.models[name].api:
            yield f"search names `{name}`, which {Api.has_no}, but a search compares probabilities; name models without `api`"
    for name, arm in recipe.arms.items():
        yield from _wrong_in_arm(recipe, name, arm)


def _wrong_in_model(recipe: Recipe, name: str, model: ModelConfig) -> Iterator[str]:
    yield from _unknown(recipe, model.parent, f"models.{name} is made from")
    if model.checkpoint and model.checkpoint.of in recipe.models and model.checkpoint.step not in _kept(recipe, model.checkpoint.of):
        of, step = model.checkpoint.of, model.checkpoint.step
        yield f"models.{name} is `{of}` after update {step}, but this checkpoint is not stored; add {step} to models.{of}.sft.keep"
    if model.temper and model.temper.like is not None and model.temper.like not in recipe.arms:
        yield f"models.{name}.temper.like is `{model.temper.like}`, which is not an arm; {_choice(model.temper.like, recipe.arms)}"
    if model.parent in recipe.models and recipe.models[str(model.parent)].api:
        yield f"models.{name} is made from `{model.parent}`, which {Api.has_no}; name a model without `api`"
    for each in model.sft.sets if model.sft else ():
        if not recipe.data.several or each not in recipe.data.sets:
            what = _choice(each, recipe.data.sets) if recipe.data.several else "`data.train` is one set without a name; remove `sets`"
            yield f"models.{name}.sft.sets names `{each}`, which is not a training set; {what}"


def _wrong_in_arm(recipe: Recipe, name: str, arm: Arm) -> Iterator[str]:
    for model in arm.models:
        yield from _unknown(recipe, model, f"arms.{name}.path names")
    for path in arm.path:
        yield from _wrong_sets(recipe, name, path[0])
    if recipe.teacher in arm.learners:
        yield f"teacher is `{recipe.teacher}`, but arms.{name} trains this model; name a model that no arm trains"
    for key, other in arm.budgets.items():
        if other not in recipe.arms:
            yield f"arms.{name}.{key} is `{getattr(arm, key)}`, but `{other}` is not an arm; {_choice(other, recipe.arms)}"


def _unknown(recipe: Recipe, model: str | None, where: str) -> Iterator[str]:
    if model == "":
        yield f"{where} no model on one side of `>`; write a model on both sides, such as xl > s"
    elif model is not None and model not in recipe.models:
        fix = "write `>` between two models" if re.search(r"[-=–—]$|[→⇒,>]", model) else _choice(model, recipe.models)
        yield f"{where} `{model}`, which is not a model; {fix}"


def _wrong_sets(recipe: Recipe, arm: str, teachers: str) -> Iterator[str]:
    taught, sets = teachers_of(teachers), recipe.data.sets
    if taught and not recipe.data.several:
        yield f"arms.{arm}.path `{teachers}` names training sets, but `data.train` is one set without a name; write sets with names there"
        return
    for name in taught:
        if name not in sets:
            yield f"arms.{arm}.path names the set `{name}`, which is not in `data.train`; {_choice(name, sets)}"
    if taught and (left := [name for name in sets if name not in taught]):
        example = f"+ {[*taught.values()][-1]} on {left[0]}"
        yield f"arms.{arm}.path `{teachers}` has no teacher for the set {left[0]}; add for instance `{example}`"


def _kept(recipe: Recipe, name: str) -> tuple[int, ...]:
    sft = recipe.models[name].sft
    return sft.keep if sft else ()


def _choice(given: str, names: Iterable[str]) -> str:
    return did_you_mean_then(given, names, f"choose one of {', '.join(names)}")
