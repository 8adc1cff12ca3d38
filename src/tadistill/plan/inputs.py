"""The inputs of a stage: models, data sets, and the outputs of other stages. Each kind of input has a frozen class.

`content` returns an input as plain data. The file stage.json stores this data, and the stage's key is a hash of it. Do not
rename a field: this would change the keys of finished stages.
"""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import BaseModel, Field

from tadistill.config import DataRef, Evaluate, Recipe
from tadistill.config.common import Decoding, ObjectiveBase, Strict
from tadistill.config.data import LongText, Template, Thinking, Turns, World
from tadistill.config.evaluate import TASK_FILE
from tadistill.config.method_parts import Optim, Select, TeacherContext
from tadistill.config.objective import Custom
from tadistill.config.remote import Api, Serve
from tadistill.config.sampling import StudentSampler, TeacherSampler, TopKSignal
from tadistill.data.datasets import Known, SplitRows
from tadistill.disk import digest, from_home
from tadistill.errors import ConfigError, about
from tadistill.user_code import load_function


class Part(Strict):
    """Base class of all objects that a stage's key depends on. The key is a hash of their content."""

    def content(self) -> dict[str, Any]:
        """Return the object as plain data.

        Fields that have their default value are left out. So a new field with a default does not change the keys of finished stages.
        """
        found: dict[str, Any] = {}
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if field.is_required() or (value != field.default and not field.exclude):
                found[name] = _plain(value)
            if isinstance(value, Split):
                found[f"{name}_limit"] = value.limit
        return found


_LATER: dict[type[BaseModel], tuple[str, ...]] = {
    Decoding: ("engine",),
    TeacherSampler: ("engine",),
    Evaluate: ("engine",),
    DataRef: ("choices", "instruction", "extra"),
    Select: ("patience",),
    Optim: ("tokens", "packed"),
    StudentSampler: ("recorded", "signal"),
}
"""Fields that earlier versions did not have. A field with its default value is left out of a stage's content, so that finished stages
keep their keys."""

_ELSEWHERE = {"also", "samples", "pass_at", "precision", "tasks", "fewshot", "bits_per_byte"}
"""Settings of `Evaluate` that are left out of a stage's content. Each decoding in `also` has a stage of its own. `samples` only adds seeds.
Reports compute pass@k (`pass_at`) from stored scores. For the remaining settings, the stage has fields of its own."""


def _plain(value: Any) -> Any:
    if isinstance(value, Part):
        return value.content()
    if isinstance(value, BaseModel):
        elsewhere = _ELSEWHERE if isinstance(value, Evaluate) else set[str]()
        later = {name for name in _LATER.get(type(value), ()) if getattr(value, name) == type(value).model_fields[name].default}
        return value.model_dump(exclude=elsewhere | later)
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


# --- data ---------------------------------------------------------------------------------------------------------------


class Encoding(Part):
    """The settings with which the rows of a data set become token sequences."""

    template: Template
    max_prompt: int
    max_length: int
    world: World
    long_prompts: LongText = "drop"
    long_responses: LongText = "cut"
    turns: Turns = "answer"
    thinking: Thinking = "keep"
    chat_template_kwargs: dict[str, Any] = {}
    ends: tuple[int, ...] = ()
    """Tokens that end an answer. The token that ends the reference answers comes first. Empty if the model's own files give the tokens."""
    bos: bool = False
    """True if BOS comes before texts that no chat template writes."""
    context: TeacherContext | None = None
    """The teacher's own prompt on the training set. None if the teacher reads the student's prompts."""


class HashedData(Part):
    """A data set, and a hash of its content at the time of the plan."""

    ref: DataRef
    fingerprint: str
    known: Known | None = Field(default=None, exclude=True)
    """Size and time of the file. They are not a part of the key, because the fingerprint identifies the content."""

    @classmethod
    def of(cls, rows: SplitRows, **more: Any) -> Self:
        """Return the data set with these rows. `more` are the other fields."""
        return cls(ref=rows.ref, fingerprint=rows.fingerprint(), known=rows.now(), **more)


class OwnCode(Part):
    """A metric or objective from the user's own code."""

    function: str
    source: str
    """Digest of the file that defines the function."""


class Split(HashedData):
    """The first `limit` rows of a data set, or all rows if `limit` is None."""

    role: Literal["train", "dev", "test"]
    limit: int | None
    scores: dict[str, int] = Field(default={}, exclude=True)
    """Versions of scores that were computed otherwise before, by their column. Stages with these scores have them in their content."""

    def content(self) -> dict[str, Any]:
        """Return the data set as plain data, without `limit`. The stage stores the limit in an entry of its own, such as `train_limit`."""
        return {"ref": _plain(self.ref), "fingerprint": self.fingerprint}

    @property
    def splits(self) -> "tuple[Split, ...]":
        """A tuple with only this split. `DevSets` also has `splits`, so code can read both classes in the same way."""
        return (self,)


class DevSets(Part):
    """Several dev sets, each with the name and the share of its training set. Training logs contain the names."""

    names: tuple[str, ...]
    splits: tuple[Split, ...]
    shares: tuple[float, ...]
    """The weight of each set in a mean over the sets. The weights add up to 1."""

    def content(self) -> dict[str, Any]:
        """Return the sets as plain data, with their limits."""
        return super().content() | {"limits": [split.limit for split in self.splits]}


Dev: TypeAlias = Split | DevSets  # the dev data of a stage


# --- models and other outputs of stages ---------------------------------------------------------------------------------


class Output(Part):
    """The answers or the recorded teacher outputs that another stage wrote."""

    stage: str
    """Key of the stage that writes this output. It must finish before a stage that needs the output starts."""


TextOf = Annotated[tuple[str, int] | None, Field(exclude=True)]
"""The name of the model that writes the recorded text, and the largest number of tokens of an answer. It is not a part of the key, because
it only helps to predict costs."""


class FromStage(Part):
    """The model that another stage made."""

    stage: str
    """Key of the stage that makes the model. This stage must finish before a stage that needs the model starts."""
    checkpoint: int | None = None
    """Number of the update after which the weights were stored. None means the selected checkpoint."""


class Loaded(Part):
    """A model that the study does not train: published weights, or random initial weights."""

    load: str
    revision: str
    config: dict[str, Any]
    tokenizer: str | None
    fingerprint: str
    tokenizer_fingerprint: str | None = None
    """None if the tokenizer has the same source as the weights."""
    seed: int | None = None
    """Seed of random weights; None for published weights."""
    tokenizer_revision: str | None = None
    """None if the tokenizer has the same revision as the weights."""
    at: str | None = Field(default=None, exclude=True)
    """Path of the weights, if `load` is a path beside the recipe. It is not a part of the key, because the fingerprint identifies the
    content."""
    tokenizer_at: str | None = Field(default=None, exclude=True)  # path of the tokenizer, if it is beside the recipe
    serve: Serve | None = Field(default=None, exclude=True)
    """The servers that run the model when it teaches. Only `served_as` and `sends` are a part of the key."""
    served_as: str | None = None
    """The model's name on its servers, unless it is `load`. The servers may then run other weights, such as quantised ones."""
    sends: TopKSignal | None = None
    """The outputs that the servers (`serve`) send in place of hidden states. They change the results. None if hidden states are sent."""

    @property
    def source(self) -> str:
        """Path or Hub name of the weights on this machine: `at` if it is set, else `load`."""
        return self.at or self.load

    @property
    def tokenizer_source(self) -> str:
        """Path or Hub name of the tokenizer on this machine. It is the source of the weights if the recipe names no tokenizer."""
        return self.tokenizer_at or self.tokenizer or self.source


class BehindApi(Part):
    """A model behind an API. It gives only text, so it is never loaded."""

    asks: str  # the model's name at the API
    api: Api | None = Field(default=None, exclude=True)
    """The API. Its address, limits and prices are not a part of the key."""


def is_served(handle: "Handle") -> bool:
    """Return True if a server runs the model when it teaches."""
    return isinstance(handle, Loaded) and handle.serve is not None


class TokenizerFiles(Part):
    """The tokenizer of a model, without the model."""

    source: str
    """Path or Hub name as written in the recipe, or the name of a tokenizer of the data set tinyworld. The seed of tinyworld is in the
    stage's `Encoding`."""
    revision: str
    fingerprint: str | None
    at: str | None = Field(default=None, exclude=True)
    """Path or Hub name on this machine. It is not a part of the key, because the fingerprint identifies the content."""


class PrunedDepth(Part):
    """Another model, pruned by removing layers."""

    prune: int | tuple[int, ...]
    """The number of evenly spaced layers to keep, or the indices of these layers."""
    of: "Handle"


class Pruned(Part):
    """Another model, pruned to a smaller shape. Activations on training text decide which weights are kept."""

    prune: dict[str, int]
    """New sizes by name: layers, hidden, intermediate, heads, kv_heads."""
    layers: Literal["influence", "spacing"] | tuple[int, ...]
    """The rule that chooses the layers to keep, or the indices of these layers."""
    of: "Handle"
    data: Encoding
    train: Split
    more: tuple[Split, ...] = ()
    """The other training sets, if there are several."""


class Tempered(Part):
    """Another model with its logits divided by a temperature."""

    temper: float
    of: "Handle"


class RandomWeights(Part):
    """A model with random weights and the architecture of another model. It teaches in a control arm."""

    random: int
    """Seed of the weights."""
    of: "Handle"


Handle: TypeAlias = FromStage | Loaded | BehindApi | PrunedDepth | Pruned | Tempered | RandomWeights
"""The source of a model's weights."""
Input: TypeAlias = Handle | Output  # a model or an output of another stage
for _part in (PrunedDepth, Pruned, Tempered, RandomWeights):  # they refer to `Handle`
    _part.model_rebuild()


def stage_of(part: Input) -> str | None:
    """Return the key of the stage that writes this model or output. Return None if the model does not come from a stage."""
    if isinstance(part, FromStage | Output):
        return part.stage
    return None if isinstance(part, Loaded | BehindApi) else stage_of(part.of)


# --- tasks of lm-eval -------------------------------------------------------------------------------------------------------


class Tasks(Part):
    """The tasks of lm-eval that a stage measures."""

    names: tuple[str, ...]
    lm_eval: str
    """Version of lm-eval, which has the tasks' definitions."""
    files: tuple[str, ...] = ()
    """Digests of the tasks' YAML files."""
    fewshot: int | None = None
    limit: int | None = None


def plan_tasks(recipe: Recipe) -> Tasks | None:
    """Return the tasks of a recipe. Return None if it has no tasks.

    Raises:
        ConfigError: lm-eval is not installed, or a task's file does not exist.
    """
    evaluate = recipe.evaluate
    if not evaluate.tasks:
        return None
    try:
        installed = version("lm-eval")
    except PackageNotFoundError as error:
        raise ConfigError(
            "evaluate.tasks needs lm-eval: `pip install 'tadistill[lm-eval]'`; install it, or remove `evaluate.tasks`"
        ) from error
    files = task_files(evaluate.tasks)
    if missing := [file for file, found in files if not found]:
        raise ConfigError(f"evaluate.tasks names the file {missing[0]}, which does not exist; correct the path")
    digests = tuple(found for _, found in files)
    return Tasks(names=evaluate.tasks, lm_eval=installed, files=digests, fewshot=evaluate.fewshot, limit=recipe.data.limit.test)


def task_files(names: tuple[str, ...]) -> list[tuple[Path, str]]:
    """Return the YAML files of tasks, each with its digest, which is empty if there is no such file."""
    files = (from_home(name, "evaluate.tasks") for name in names if name.endswith(TASK_FILE))
    return [(file, digest(file)[:16] if file.is_file() else "") for file in files]


# --- functions of the user's own code ------------------------------------------------------------------------------------


def plan_objective(objective: ObjectiveBase, folder: str | None) -> OwnCode | None:
    """Return the function of a custom objective. Return None for any other objective. Raises ConfigError if the function is unusable."""
    if not isinstance(objective, Custom):
        return None
    found = load_function(objective.function, folder)
    found.check("an objective is called with", "student_logits", "teacher_logits", **objective.settings)
    return OwnCode(function=found.name, source=found.digest)


def plan_metrics(recipe: Recipe) -> tuple[OwnCode, ...]:
    """Return the functions of the recipe's own metrics. Raises ConfigError if one of them cannot be used."""
    functions = []
    for i, metric in enumerate(recipe.metrics):
        with about(f"metrics.{i}"):
            functions.append(load_function(metric.function, recipe.runtime.code))
            functions[-1].check("a metric is called with", "prediction", "references")
    return tuple(OwnCode(function=found.name, source=found.digest) for found in functions)
