"""The recipe: a frozen description of a whole study.

A recipe names models, data, a method and arms (paths to compare). `tadistill.plan.arms` turns it into stages, the single steps of work.
Unknown keys are errors. All defaults are in this package.
"""

import difflib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, PrivateAttr, field_validator, model_validator

from tadistill.config.arm import Arm, Budgets, Search
from tadistill.config.common import MOST, Name, Strict
from tadistill.config.evaluate import Evaluate, OwnMetric
from tadistill.config.method import Method, apply
from tadistill.config.model import ModelConfig
from tadistill.config.objective import Custom

if TYPE_CHECKING:
    from tadistill.config.places import Origin


class World(Strict):
    """The fictional world of the data sets named tinyworld*. These data sets are generated and need no download."""

    seed: int = 0
    """Seed of the world's facts and rows."""
    people: int = Field(default=120, ge=10, le=200)
    """Number of people. More people have more facts to learn."""


_LONGEST_SET = 200


class DataRef(Strict):
    """A data set. In a recipe, a string is short for `{load: STRING}`."""

    text_sets: ClassVar[str] = "load"
    load: str
    """A name (dolly, self_inst, vicuna, sinst, uinst, sinst/0_2, tinyworld…), a .jsonl file, a folder with SPLIT.jsonl, or a hub id."""
    split: str | None = None
    """Name of the split to read. By default, it is the use of the set: train, dev or test."""
    revision: str = "main"
    """Hub revision: a branch, tag or commit."""
    columns: dict[Literal["instruction", "input", "output", "prompt", "completion", "messages", "text", "choices", "facts"], str] = {}
    """Maps our column name to the file's column name. It is needed only if the names differ. `choices` and `facts` are read only if they
    are named here, as in {choices: choices}."""
    choices: tuple[str, ...] = ()
    """Possible answers of a multiple-choice set, the same for every row. An integer or boolean output is then the index of an answer."""
    instruction: str | None = None
    """The instruction of every row, for a set without instructions."""

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        return {cls.text_sets: value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check(self):
        if self.choices and (len(set(self.choices)) < max(2, len(self.choices)) or "" in self.choices):
            raise ValueError(f"`choices` are {list(self.choices)}; give at least two choices, which must differ and must not be empty")
        for name, given in (("choices", self.choices), ("instruction", self.instruction is not None)):
            if given and name in self.columns:
                raise ValueError(
                    f"`{name}` is set for every row, but `columns` also names a column for it (`{self.columns[name]}`); remove one of the "
                    "two"
                )
        if len(self.name) > _LONGEST_SET:  # it becomes a part of file names
            raise ValueError(
                f"the name of the file or folder has {len(self.name)} characters; rename it, with at most {_LONGEST_SET} characters"
            )
        if self.instruction == "":
            raise ValueError("`instruction` is empty; write the instruction for every row, or remove the key")
        return self

    _folder: Path | None = PrivateAttr(default=None)
    """The folder of the recipe's file."""

    @property
    def paths(self) -> tuple[Path, ...]:
        """The paths where a local data set is looked for: beside the recipe's file, then in the working directory."""
        path = Path(self.load).expanduser()
        return tuple(dict.fromkeys([self._folder / path, Path.cwd() / path])) if self._folder else (path,)

    @property
    def name(self) -> str:
        """The short name used in tables and file names."""
        if self.load.startswith(("sinst/", "uinst/")):  # `0_2` alone would not name the set
            return self.load.replace("/", "_")
        return self.load.rsplit("/", 1)[-1].removesuffix(".jsonl")


class Limit(Strict):
    """The number of rows to use from the start of each set, for quick trials; all rows by default."""

    train: int | None = Field(default=None, ge=1, le=MOST)
    """Number of rows of the training set."""
    dev: int | None = Field(default=None, ge=1, le=MOST)
    """Number of rows of the dev set."""
    test: int | None = Field(default=None, ge=1, le=MOST)
    """Number of rows of each test set."""


Template = Literal["alpaca", "chat", "plain"]
LongPrompts = Literal["drop", "cut"]


class Data(Strict):
    """Data sets, and how their rows become token sequences."""

    train: DataRef
    """The set on which models train: a name, a file, a folder or a hub id, or the keys of a data set."""
    dev: DataRef
    """The data set on which checkpoints and paths are selected."""
    test: tuple[DataRef, ...] = Field(min_length=1)
    """The sets on which trained models are measured."""
    corpus: DataRef | None = None
    """Plain text for the language-modelling term of MiniLLM."""
    root: str | None = None
    """Folder of local data sets; the environment variable TADISTILL_DATA by default."""
    template: Template = "alpaca"
    """Text around an instruction: the Alpaca prompt (as in MiniLLM), the tokenizer's chat template, or only a line break (`plain`)."""
    max_prompt: int = Field(default=256, ge=1, le=MOST)
    """Largest number of tokens in a prompt (MiniLLM's value)."""
    long_prompts: LongPrompts = "drop"
    """What happens to rows with a longer prompt. `drop` leaves them out and counts them. `cut` keeps their first `max_prompt` tokens, as
    MiniLLM's tests do."""
    max_length: int = Field(default=512, ge=2)
    """Largest number of tokens in a prompt with its reference response. A longer response is cut. It does not limit sampled responses."""
    bos: Literal["auto", "never"] = "auto"
    """Whether prompts and plain text begin with BOS. `auto` follows the tokenizer, and `never` adds none, like MiniLLM. A chat template
    decides for itself."""
    limit: Limit = Limit()
    world: World = World()

    @field_validator("test")
    @classmethod
    def _distinct(cls, test: tuple[DataRef, ...]) -> tuple[DataRef, ...]:
        names = [ref.name for ref in test]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two sets are called `{name}`; rename one of the files, or remove one set")
        return test


class Runtime(Strict):
    """Settings of a run on this machine. They do not invalidate stored results. They change results only by rounding."""

    jobs: int | None = Field(default=None, ge=1, le=1024)
    """Number of stages that run at the same time. By default it is the number of cores on a CPU, and 1 on a GPU."""
    checkpoint_seconds: float | None = Field(default=None, gt=0, le=1e6)
    """Seconds between two saves of a training state. By default it is 30, or 20 times the duration of the last save if that is longer."""
    trackers: tuple[Literal["wandb", "trackio", "tensorboard"], ...] = ()
    """Experiment trackers to which training also logs."""
    code: str | None = None
    """Folder of the recipe's own Python modules (`metrics`, objective `custom`); the recipe's folder by default."""


class Resources(Strict):
    """Devices and limits of stages. They do not invalidate stored results. They change results only by rounding.

        resources:
          default: {hours: 3}
          sft: {processes: 4, parallel: fsdp}          # every stage of a kind
          sft xl: {gpu: h100, processes: 8, nodes: 2}  # stages of this kind for one model

    On a cluster, missing values are chosen from the plan's estimates and the cluster's profile.
    """

    processes: int = Field(default=1, ge=1, le=MOST)
    """Number of processes (ranks), each with its own GPU if there are GPUs. Training stages only."""
    nodes: int = Field(default=1, ge=1, le=MOST)
    """Number of machines over which the processes are spread."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Where the student's weights are: whole in every process (`ddp`), or sharded over the processes (`fsdp`, FSDP2)."""
    teacher: Literal["replicated", "sharded", "offloaded"] = "replicated"
    """Where the teacher's weights are. `replicated`: whole on every device. `sharded`: split over the processes (FSDP2). `offloaded`: in
    host memory, from which they are loaded layer by layer."""
    gpu: str | None = None
    """A GPU or GPU slice of the cluster's profile. By default, the smallest one that is large enough is used."""
    cpus: int | None = Field(default=None, ge=1, le=MOST)
    """Number of CPU cores per process."""
    memory: float | None = Field(default=None, gt=0, le=1e6)
    """Host memory per process, in GB."""
    hours: float | None = Field(default=None, gt=0, le=1e5)
    """Time limit of a job. A stage that needs longer saves its state, is queued again and continues."""

    @model_validator(mode="after")
    def _check(self):
        if self.processes % self.nodes:
            raise ValueError(f"processes {self.processes} is not a multiple of nodes {self.nodes}; change one of them")
        if self.processes == 1 and (self.parallel == "fsdp" or self.teacher == "sharded"):
            given = "parallel fsdp" if self.parallel == "fsdp" else "teacher sharded"
            raise ValueError(f"{given} splits a model over several processes, but `processes` is 1; raise `processes`")
        return self


class Recipe(Strict):
    """Description of a whole study."""

    study: Annotated[Name, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Name of the study and of its folder."""
    seeds: tuple[int, ...] = Field(min_length=1)
    """Training seeds. Every arm is trained once per seed."""
    models: dict[Name, ModelConfig] = Field(min_length=1)
    """The models, by names of your choice, which paths and reports use."""
    data: Data
    method: Method = Method()
    """The method of every distillation. A model (`models.X.distill`) or an arm can change parts of it."""
    evaluate: Evaluate = Evaluate()
    metrics: tuple[OwnMetric, ...] = ()
    """More metrics of answers on the test sets, computed by functions of your own."""
    arms: dict[Name, Arm] = {}
    """The paths to compare, by name. They can be left out if `search` is given."""
    budgets: Budgets | None = None
    """Training budgets at which every arm is compared."""
    teacher: str | None = None
    """The original teacher, with which all students are compared by KL. Needed only if paths start from several models, or without paths.
    """
    analyse: bool = True
    """Compare every model with the original teacher and with its assistants (KL divergences, error budget, exposure bias)."""
    margin: float = Field(default=0.3, gt=0, le=1000)
    """Smallest relevant difference in the primary metric, in points."""
    search: Search | None = None
    runtime: Runtime = Runtime()
    resources: dict[str, Resources] = {}
    """Devices and limits of stages. A key is `default`, a kind of stage, or `KIND MODEL`."""

    @model_validator(mode="after")
    def _check(self):
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds {list(self.seeds)} contain a seed twice; give every seed once")
        if not self.arms and self.search is None:
            raise ValueError("there are no `arms` and no `search`; add one of them, for instance arms: {direct: xl > s}")
        if self.budgets:
            expanded = self.budgets.expand(self.arms)
            self.arms.clear()
            self.arms.update(expanded)
        names = [metric.name for metric in self.metrics]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"metrics has two functions called `{twice[0]}`; rename one of them")
        if wrong := [*_wrong_names(self)]:
            raise ValueError("\n".join(wrong))
        check_acyclic({n: m.parent for n, m in self.models.items() if m.parent}, "models")
        check_acyclic({n: a.like[1] for n, a in self.arms.items() if a.like}, "compute")
        return self

    _origin: "Origin | None" = PrivateAttr(default=None)

    def written(self, source: str | None) -> str | None:
        """Return a model's source as the recipe's text has it. In `load`, a source may have become the path that was found for it."""
        return self._origin.written.get(source, source) if self._origin and source else source

    @property
    def first_seed(self) -> int:
        return self.seeds[0]

    @field_validator("study")
    @classmethod
    def _not_reserved(cls, study: str) -> str:
        if study.lower() == "store":
            raise ValueError("the folder runs/store contains the stages of all studies; choose another name")
        return study

    @field_validator("models")
    @classmethod
    def _no_arrows(cls, models: dict[str, ModelConfig]) -> dict[str, ModelConfig]:
        for name in models:
            if ">" in name or " then " in f" {name} ":
                raise ValueError(f"`{name}` cannot be used in a path, because paths are written with `>` and `then`; choose another name")
        return models


def methods(recipe: Recipe) -> list[Method]:
    """Return all methods of a study: one for every distillation, and one for every arm that continues the training of a model.

    Raises:
        ConfigError: parts of a method cannot work together.
    """
    targets = [(model, arm) for arm in recipe.arms.values() for model in (arm.learners or (arm.last if arm.objective else ()))]
    return [apply(recipe.method, recipe.models[model].distill, arm.patch) for model, arm in targets]


def own_functions(recipe: Recipe) -> list[str]:
    """Return the names of all functions of the user's own code that a recipe uses."""
    objectives = [recipe.method.objective, *(arm.objective for arm in recipe.arms.values())]
    objectives += [model.distill.objective for model in recipe.models.values()]
    return [*(metric.function for metric in recipe.metrics), *(each.function for each in objectives if isinstance(each, Custom))]


def check_acyclic(edges: dict[str, str], what: str) -> None:
    """Raise a ValueError if `edges` (name -> name) contain a cycle. `what` is the name of the edges in the message."""
    for start in edges:
        seen, at = [start], edges.get(start)
        while at is not None:
            if at in seen:
                raise ValueError(f"`{what}` has a cycle: {' -> '.join([*seen, at])}; remove one of these references")
            seen.append(at)
            at = edges.get(at)


def _wrong_names(recipe: Recipe) -> Iterator[str]:
    for name, model in recipe.models.items():
        yield from _unknown(recipe, model.parent, f"models.{name} is made of")
        if model.checkpoint and model.checkpoint.of in recipe.models and model.checkpoint.step not in _kept(recipe, model.checkpoint.of):
            of, step = model.checkpoint.of, model.checkpoint.step
            yield f"models.{name} is `{of}` after update {step}, but that checkpoint is not kept; add {step} to models.{of}.sft.keep"
        if model.temper and model.temper.like is not None and model.temper.like not in recipe.arms:
            yield f"models.{name}.temper.like is `{model.temper.like}`, which is not an arm; {_choice(model.temper.like, recipe.arms)}"
    yield from _unknown(recipe, recipe.teacher, "teacher is")
    for name in (recipe.search.teacher, *recipe.search.assistants, recipe.search.student) if recipe.search else ():
        yield from _unknown(recipe, name, "search names")
    for name, arm in recipe.arms.items():
        for model in arm.models:
            yield from _unknown(recipe, model, f"arms.{name}.path names")
        if recipe.teacher in arm.learners:
            yield f"teacher is `{recipe.teacher}`, but arms.{name} trains this model; name a model that no arm trains"
        if arm.like and arm.like[1] not in recipe.arms:
            yield f"arms.{name}.compute is `{arm.compute}`, which is not an arm; {_choice(arm.like[1], recipe.arms)}"


def _unknown(recipe: Recipe, model: str | None, where: str) -> Iterator[str]:
    if model is not None and model not in recipe.models:
        fix = "write `>` between two models" if re.search(r"[-=–—]$|[→⇒,>]", model) else _choice(model, recipe.models)
        yield f"{where} `{model}`, which is not a model; {fix}"


def _kept(recipe: Recipe, name: str) -> tuple[int, ...]:
    sft = recipe.models[name].sft
    return sft.keep if sft else ()


def _choice(given: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(given, list(names), n=1)
    return f"{f'did you mean `{close[0]}`? ' if close else ''}{'Choose' if close else 'choose'} one of {', '.join(names)}"
