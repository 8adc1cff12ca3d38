"""The recipe: an immutable description of a whole study.

A recipe names models, data, a method and arms (paths of models to compare). `tadistill.plan.arms` turns it into stages, the single steps of
work. Unknown keys are errors. All defaults are in this package.
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
    """The fictional world of the data sets whose names begin with tinyworld. These data sets are generated and need no download."""

    seed: int = 0
    """Seed of the world's facts and rows."""
    people: int = Field(default=120, ge=10, le=200)
    """Number of people in the world. With more people, there are more facts to learn."""


_LONGEST_SET = 200
Column = Literal["instruction", "input", "output", "prompt", "completion", "messages", "text", "choices", "facts",
                 "numeric", "choice", "math", "checks"]  # fmt: skip


class DataRef(Strict):
    """A data set. In a recipe, `NAME` is short for `{load: NAME}`."""

    text_sets: ClassVar[str] = "load"
    load: str
    """The data set: a known name (dolly, self_inst, vicuna, sinst, uinst, sinst/0_2, tinyworld…), a .jsonl file, a folder with SPLIT.jsonl
    files, or a hub id."""
    split: str | None = None
    """Name of the split to read. By default, it is the name of the key that uses the data set: train, dev or test."""
    revision: str = "main"
    """Hub revision: a branch, tag or commit."""
    columns: dict[Column, str] = {}
    """Maps our name of a column to the file's name. It is only needed if the names differ. The columns `choices`, `facts` and those of
    right answers (`numeric`, `choice`, `math`, `checks`) are read only if they are given here: {choices: choices, numeric: answer}."""
    choices: tuple[str, ...] = ()
    """Possible answers of a multiple-choice set, if they are the same for every row. An output that is an integer or a boolean is then an
    index of this list."""
    instruction: str | None = None
    """The instruction of every row, for a data set without instructions."""

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        return {cls.text_sets: value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check(self):
        if self.choices and (len(set(self.choices)) < max(2, len(self.choices)) or "" in self.choices):
            raise ValueError(f"`choices` are {list(self.choices)}; give at least two choices, all different and none of them empty")
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
        """The paths at which a local data set is looked for: beside the recipe's file, and then in the working directory."""
        path = Path(self.load).expanduser()
        return tuple(dict.fromkeys([self._folder / path, Path.cwd() / path])) if self._folder else (path,)

    @property
    def name(self) -> str:
        """The short name of the data set in tables and file names."""
        if self.load.startswith(("sinst/", "uinst/")):  # `0_2` alone would not name the set
            return self.load.replace("/", "_")
        return self.load.rsplit("/", 1)[-1].removesuffix(".jsonl")


class Limit(Strict):
    """The number of rows to use from the start of each data set, for quick trials. By default, all rows are used."""

    train: int | None = Field(default=None, ge=1, le=MOST)
    """Number of rows of the training set."""
    dev: int | None = Field(default=None, ge=1, le=MOST)
    """Number of rows of the dev set."""
    test: int | None = Field(default=None, ge=1, le=MOST)
    """Number of rows of each test set."""


Template = Literal["alpaca", "chat", "plain"]
LongPrompts = Literal["drop", "cut"]


class Data(Strict):
    """The data sets of a study, and how their rows become token sequences."""

    train: DataRef
    """The data set on which models are trained. Write a name, a file, a folder or a hub id, or the keys of a data set."""
    dev: DataRef
    """The data set on which checkpoints and paths are chosen."""
    test: tuple[DataRef, ...]
    """The data sets on which trained models are measured."""
    corpus: DataRef | None = None
    """Plain text for the language-modelling part of MiniLLM's loss."""
    root: str | None = None
    """Folder of local data sets. The default is the environment variable TADISTILL_DATA."""
    template: Template = "alpaca"
    """Text around an instruction. `alpaca`: the Alpaca prompt, as in MiniLLM. `chat`: the tokenizer's chat template. `plain`: only a line
    break."""
    max_prompt: int = Field(default=256, ge=1, le=MOST)
    """Largest number of tokens in a prompt. The default is MiniLLM's value."""
    long_prompts: LongPrompts = "drop"
    """What happens to a row whose prompt is longer than `max_prompt`. `drop`: the row is left out and counted. `cut`: the first
    `max_prompt` tokens are kept, as in MiniLLM's tests."""
    max_length: int = Field(default=512, ge=2)
    """Largest number of tokens in a prompt together with its reference response. A longer response is cut. Sampled responses are not
    limited by it."""
    bos: Literal["auto", "never"] = "auto"
    """Whether prompts and plain text begin with the token BOS. `auto`: as the tokenizer does it. `never`: no BOS, as in MiniLLM. With the
    template `chat`, the chat template decides this."""
    limit: Limit = Limit()
    world: World = World()

    @field_validator("test")
    @classmethod
    def _distinct(cls, test: tuple[DataRef, ...]) -> tuple[DataRef, ...]:
        names = [ref.name for ref in test]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two data sets have the name `{name}`; rename one of the files, or remove one data set")
        return test


class Runtime(Strict):
    """Settings of a run on this machine. After a change, stored results stay valid, because the settings change results only by
    rounding."""

    jobs: int | None = Field(default=None, ge=1, le=1024)
    """Number of stages (single steps of work) that run at the same time. The default is the number of GPUs, or else of cores."""
    checkpoint_seconds: float | None = Field(default=None, gt=0, le=1e6)
    """Seconds between two saves of the state of a training. The default is 30, or 20 times the duration of the last save if this is
    longer."""
    trackers: tuple[Literal["wandb", "trackio", "tensorboard"], ...] = ()
    """Experiment trackers to which training writes its curves."""
    code: str | None = None
    """Folder of the user's own Python modules (for `metrics`, and for the objective `custom`). The default is the recipe's folder."""


class Resources(Strict):
    """Devices and limits of stages (single steps of work). Changing them affects only rounding, so stored results stay valid.

        resources:
          default: {hours: 3}
          sft: {processes: 4, parallel: fsdp}          # all stages of the kind `sft`
          sft xl: {gpu: h100, processes: 8, nodes: 2}  # the stages of the kind `sft` for the model xl

    On a cluster, missing values are chosen automatically, from the plan's estimates and the description of the cluster.
    """

    processes: int = Field(default=1, ge=1, le=MOST)
    """Number of processes (ranks) of a training or a recording. Each has its own GPU if there are GPUs. Other stages use one process."""
    nodes: int = Field(default=1, ge=1, le=MOST)
    """Number of machines on which the processes run."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Place of the student's weights. `ddp`: every process has all weights. `fsdp`: the weights are sharded over the processes (FSDP2)."""
    teacher: Literal["replicated", "sharded", "offloaded"] = "replicated"
    """Place of the teacher's weights. `replicated`: every device has all weights. `sharded`: the weights are split over the processes
    (FSDP2), except while the teacher helps to sample. `offloaded`: the weights are in host memory, and are loaded layer by layer."""
    gpu: str | None = None
    """Name of a GPU, or of a slice of a GPU, in the cluster's profile. The default is the smallest one that is large enough."""
    cpus: int | None = Field(default=None, ge=1, le=MOST)
    """Number of CPU cores per process."""
    memory: float | None = Field(default=None, gt=0, le=1e6)
    """Host memory of each process, in GB."""
    hours: float | None = Field(default=None, gt=0, le=1e5)
    """Time limit of a job. A step that needs more time saves its state, is queued again, and continues."""

    @model_validator(mode="after")
    def _check(self):
        if self.processes % self.nodes:
            raise ValueError(f"processes {self.processes} is not a multiple of nodes {self.nodes}; change one of them")
        if self.processes == 1 and (self.parallel == "fsdp" or self.teacher == "sharded"):
            given = "parallel fsdp" if self.parallel == "fsdp" else "teacher sharded"
            raise ValueError(f"{given} splits a model over several processes, but `processes` is 1; set `processes` to 2 or more")
        return self


class Recipe(Strict):
    """The description of a whole study."""

    study: Annotated[Name, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Name of the study. Its folder has the same name."""
    seeds: tuple[int, ...] = Field(min_length=1)
    """Training seeds. Every arm is trained once with each seed."""
    models: dict[Name, ModelConfig] = Field(min_length=1)
    """The models of the study. Each has a name of your choice, which paths and reports use."""
    data: Data
    method: Method = Method()
    """The method of all distillations. A model (`models.X.distill`) or an arm can change parts of it."""
    evaluate: Evaluate = Evaluate()
    metrics: tuple[OwnMetric, ...] = ()
    """Additional metrics of the answers on test sets, computed by functions of your own."""
    arms: dict[Name, Arm] = {}
    """The paths to compare, each with a name. This key can be left out if `search` is given."""
    budgets: Budgets | None = None
    """Training budgets at which every arm is trained and compared."""
    teacher: str | None = None
    """The original teacher. The report compares all students with it (KL divergence). The key is only needed if the paths start with
    different models, or if there are no paths."""
    analyse: bool = True
    """Compare every trained model with the original teacher and with its assistants. The report then shows KL divergences, the error that
    each distillation adds, and the exposure bias."""
    margin: float = Field(default=0.3, gt=0, le=1000)
    """Smallest difference in the primary metric that matters, in points."""
    search: Search | None = None
    runtime: Runtime = Runtime()
    resources: dict[str, Resources] = {}
    """Devices and limits of the steps of a study. A name is `default`, a kind of step (`sft`), or a kind with a model (`sft xl`)."""

    @model_validator(mode="after")
    def _check(self):
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds {list(self.seeds)} contain a seed twice; give each seed only once")
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
        if wrong := [*_wrong_names(self)]:
            raise ValueError("\n".join(wrong))
        check_acyclic({n: m.parent for n, m in self.models.items() if m.parent}, "models")
        check_acyclic({n: a.like[1] for n, a in self.arms.items() if a.like}, "compute")
        return self

    _origin: "Origin | None" = PrivateAttr(default=None)

    def written(self, source: str | None) -> str | None:
        """Return a model's source as the recipe's file has it. `source` is the value after loading, which can be an absolute path."""
        return self._origin.written.get(source, source) if self._origin and source else source

    @property
    def first_seed(self) -> int:
        return self.seeds[0]

    @field_validator("study")
    @classmethod
    def _not_reserved(cls, study: str) -> str:
        if study.lower() == "store":
            raise ValueError("the folder runs/store is reserved for the results of all studies; choose another name")
        return study

    @field_validator("models")
    @classmethod
    def _no_arrows(cls, models: dict[str, ModelConfig]) -> dict[str, ModelConfig]:
        for name in models:
            if ">" in name or " then " in f" {name} ":
                raise ValueError(f"`{name}` cannot be used in a path, because paths are written with `>` and `then`; choose another name")
        return models


def methods(recipe: Recipe) -> list[Method]:
    """Return the methods of all trainings after `sft`: one for each distillation, and one for each arm that continues the training of a
    model.

    Raises:
        ConfigError: parts of a method do not fit together.
    """
    targets = [(model, arm) for arm in recipe.arms.values() for model in (arm.learners or (arm.last if arm.objective else ()))]
    return [apply(recipe.method, recipe.models[model].distill, arm.patch) for model, arm in targets]


def own_functions(recipe: Recipe) -> list[str]:
    """Return the names of all functions in the user's own code that a recipe uses."""
    objectives = [recipe.method.objective, *(arm.objective for arm in recipe.arms.values())]
    objectives += [model.distill.objective for model in recipe.models.values()]
    return [*(metric.function for metric in recipe.metrics), *(each.function for each in objectives if isinstance(each, Custom))]


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
        yield from _unknown(recipe, model.parent, f"models.{name} is made of")
        if model.checkpoint and model.checkpoint.of in recipe.models and model.checkpoint.step not in _kept(recipe, model.checkpoint.of):
            of, step = model.checkpoint.of, model.checkpoint.step
            yield f"models.{name} is `{of}` after update {step}, but this checkpoint is not stored; add {step} to models.{of}.sft.keep"
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
            yield f"arms.{name}.compute is `{arm.compute}`, but `{arm.like[1]}` is not an arm; {_choice(arm.like[1], recipe.arms)}"


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
