"""Recipes: one frozen, closed description of a study (YAML by hand, JSON by machine).

A recipe names models, data, a method and arms; `tadistill.plan.arms` expands it into stages. Every part refuses unknown
keys, and every default lives in this package and nowhere else. Nothing here imports torch.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_serializer, model_validator

from tadistill.config.arm import Arm
from tadistill.config.common import Decoding
from tadistill.config.method import Method, apply
from tadistill.config.model import ModelConfig
from tadistill.config.resources import Resources
from tadistill.config.search import Search
from tadistill.config.strict import Strict


class World(Strict):
    """The embedded fictional world behind the data sets named tinyworld*."""

    seed: int = 0
    people: int = Field(default=120, ge=10, le=200)


class DataRef(Strict):
    """A data set: a name (dolly, self_inst, vicuna, sinst, uinst, sinst/0_2, tinyworld…), a .jsonl file, or a hub id."""

    load: str
    split: str | None = None
    revision: str = "main"
    columns: dict[Literal["instruction", "input", "output", "prompt", "completion", "messages", "text", "choices"], str] = {}
    """Our column name: the file's. Needed only where they differ."""
    choices: tuple[str, ...] = ()
    """The answers that every row is chosen among; an integer or boolean output is then an index into them."""
    instruction: str | None = None
    """The instruction of every row, for a set that has none."""

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        return {"load": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check(self):
        if self.choices and (len(set(self.choices)) < max(2, len(self.choices)) or "" in self.choices):
            raise ValueError(f"`choices` are {list(self.choices)}; give at least two, all different and none empty")
        for name, given in (("choices", self.choices), ("instruction", self.instruction is not None)):
            if given and name in self.columns:
                raise ValueError(f"`{name}` is given for every row and as a column (`{self.columns[name]}`); keep one of them")
        if self.instruction == "":
            raise ValueError("`instruction` is empty; write what every row is asked, or leave it out")
        return self

    @model_serializer(mode="wrap")
    def _without_what_is_unset(self, handler: Any) -> dict[str, Any]:
        dumped = handler(self)  # part of a stage's key: sets that need neither keep the keys of their stored stages
        return {k: v for k, v in dumped.items() if v or k not in ("choices", "instruction")}

    @property
    def name(self) -> str:
        """The short name used in tables and file names."""
        if self.load.startswith(("sinst/", "uinst/")):  # the bucket alone would not say of what
            return self.load.replace("/", "_")
        return self.load.rsplit("/", 1)[-1].removesuffix(".jsonl")


class Limit(Strict):
    """Use only the first rows of a split (smoke runs)."""

    train: int | None = Field(default=None, ge=1)
    dev: int | None = Field(default=None, ge=1)
    test: int | None = Field(default=None, ge=1)


class Data(Strict):
    """Data sets and how their rows become token sequences."""

    train: DataRef
    dev: DataRef
    test: tuple[DataRef, ...] = Field(min_length=1)
    corpus: DataRef | None = None
    """Plain text for the language-modelling term of MiniLLM."""
    root: str | None = None
    """Folder of local data sets; TADISTILL_DATA when absent."""
    template: Literal["alpaca", "chat", "plain"] = "alpaca"
    max_prompt: int = Field(default=256, ge=1)
    """Rows whose prompt is longer, in tokens, are left out (MiniLLM)."""
    max_length: int = Field(default=512, ge=2)
    """Prompt and reference response are cut to this many tokens; sampled responses by `max_new_tokens`."""
    limit: Limit = Limit()
    world: World = World()


class OtherDecoding(Decoding):
    """What another decoding changes of the main one: only the fields that are given count."""

    seeds: tuple[int, ...] = Field(default=(10,), min_length=1)
    """Its decoding seeds; the main one's first when absent."""


class Evaluate(Decoding):
    """Decoding on the test sets, and on dev for metrics that need text."""

    seeds: tuple[int, ...] = Field(default=(10, 20, 30, 40, 50), min_length=1)
    """Decoding seeds of the test evaluation; dev uses the first."""
    batch: int = Field(default=32, ge=1)
    also: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")], OtherDecoding] = {
        "greedy": OtherDecoding(temperature=0),
        "t0.5": OtherDecoding(temperature=0.5),
    }
    """Other decodings by name, reported as METRIC@NAME: sharper text alone moves Rouge-L, and this shows by how much."""

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) != len(seeds):
            raise ValueError(f"decoding seeds {list(seeds)} repeat; every seed is one more answer to each prompt")
        return seeds

    def other(self, name: str) -> "Evaluate":
        """The settings of one of the other decodings."""
        changes = {field: getattr(self.also[name], field) for field in self.also[name].model_fields_set}
        return self.model_copy(update={"seeds": self.seeds[:1], "also": {}, **changes})


class Runtime(Strict):
    """How, not what: no part of a stage's identity. (`jobs` sets the threads of a stage, and so the order of its sums.)"""

    jobs: int | None = Field(default=None, ge=1)
    """Stages that run at the same time; on CPU the number of cores when absent, on GPU one."""
    checkpoint_seconds: float | None = Field(default=None, gt=0)
    """Between two saves of a training state; when absent 30, and where a save takes long, 20 times as long as the last one took."""
    trackers: tuple[Literal["wandb", "trackio", "tensorboard"], ...] = ()


class Recipe(Strict):
    """A whole study."""

    study: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seeds: tuple[int, ...] = Field(min_length=1)
    models: dict[str, ModelConfig] = Field(min_length=1)
    data: Data
    method: Method = Method()
    evaluate: Evaluate = Evaluate()
    arms: dict[str, Arm] = {}
    """May be left out where `search` says which paths there are."""
    teacher: str | None = None
    """The original teacher, to which every KL is measured; needed only where paths start from several models, or there are no paths."""
    margin: float = Field(default=0.3, gt=0)
    """Differences of the primary metric smaller than this, in points, count as none."""
    search: Search | None = None
    runtime: Runtime = Runtime()
    resources: dict[str, Resources] = {}
    """What stages are given to run on: `default`, a kind of stage, or `KIND MODEL`."""

    @model_validator(mode="after")
    def _check(self):
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds {list(self.seeds)} repeat; every seed is one replicate")
        if not self.arms and self.search is None:
            raise ValueError("there are no `arms` and no `search`; add one of them, for instance arms: {direct: xl > s}")
        self._check_names()
        check_acyclic({n: m.parent for n, m in self.models.items() if m.parent}, "models")
        check_acyclic({n: a.compute[3:] for n, a in self.arms.items() if a.compute}, "compute")
        return self

    def _check_names(self) -> None:
        for name, model in self.models.items():
            self._known(model.parent, f"models.{name} is made of")
            if model.checkpoint and model.checkpoint.step not in self._kept(model.checkpoint.of):
                of, step = model.checkpoint.of, model.checkpoint.step
                raise ValueError(f"models.{name} is `{of}` at update {step}, which is not kept; add {step} to models.{of}.sft.keep")
            if model.temper and model.temper.like is not None and model.temper.like not in self.arms:
                raise ValueError(f"models.{name}.temper.like is `{model.temper.like}`, which is not an arm; {_known(self.arms)}")
        self._known(self.teacher, "teacher is")
        for name in (self.search.teacher, *self.search.assistants, self.search.student) if self.search else ():
            self._known(name, "search names")
        for name, arm in self.arms.items():
            for model in arm.models:
                self._known(model, f"arms.{name}.path names")
            if self.teacher in arm.learners:
                raise ValueError(f"teacher is `{self.teacher}`, which arms.{name} teaches; the original teacher is taught by no arm")
            if arm.compute and arm.compute[3:] not in self.arms:
                raise ValueError(f"arms.{name}.compute is `{arm.compute}`, which is not an arm; {_known(self.arms)}")

    def _known(self, model: str | None, where: str) -> None:
        if model is not None and model not in self.models:
            raise ValueError(f"{where} `{model}`, which is not a model; {_known(self.models)}")

    def _kept(self, name: str) -> tuple[int, ...]:
        sft = self.models[name].sft
        return sft.keep if sft else ()


def methods(recipe: Recipe) -> list[Method]:
    """The method of every distillation of the study, and of every arm that goes on training a model.

    Raises:
        ConfigError: parts of a method cannot work together.
    """
    targets = [(model, arm) for arm in recipe.arms.values() for model in (arm.learners or (arm.last if arm.objective else ()))]
    return [apply(recipe.method, recipe.models[model].distill, arm.patch) for model, arm in targets]


def _known(names: dict[str, Any]) -> str:
    return f"the recipe has {', '.join(names)}"


def check_acyclic(edges: dict[str, str], what: str) -> None:
    """Raise when following `edges` from any name returns to it."""
    for start in edges:
        seen, at = [start], edges.get(start)
        while at is not None:
            if at in seen:
                raise ValueError(f"`{what}` goes round in a circle: {' -> '.join([*seen, at])}; remove one of these edges")
            seen.append(at)
            at = edges.get(at)
