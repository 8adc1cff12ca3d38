"""The kinds of stages: one frozen class each, which holds everything that the stage's numbers depend on.

A class also says what the rest of the program asks about its kind: the version, the function that does the work, and whether the stage
trains or only measures. `KINDS` is the one table of them. To add a kind, add its class here, its work in `tadistill.stages`, and the
call in `plan.builder` or `plan.arms` that asks for it.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from tadistill.config import Evaluate, Method, Optim
from tadistill.config.common import Decoding
from tadistill.config.method import Dense, Precision, Select
from tadistill.config.model import Lora
from tadistill.config.objective import CrossEntropy, Objective
from tadistill.config.sampling import HiddenSignal, Sampler, TopKSignal
from tadistill.models.counting.cost import Cost
from tadistill.plan.inputs import INPUTS, Encoding, Handle, Output, Part, Source, Split, stage_of
from tadistill.store import key_of

if TYPE_CHECKING:
    from tadistill.plan.costs import Ledger


class Spec(Part):
    """Base of the specs."""

    kind: ClassVar[str]
    version: ClassVar[int]
    """Raised by hand when a stage of this kind gives other numbers for the same settings."""
    work: ClassVar[str]
    """MODULE:FUNCTION in `tadistill.stages`. A name, because the module imports torch and planning must not."""
    trains: ClassVar[bool] = False
    """True if the stage updates weights. Only such a stage may use several processes."""
    measures: ClassVar[bool] = False
    """True if the stage only looks at models. The plan predicts no cost for it."""
    in_recipes: ClassVar[bool] = True
    """False for stages that only `tadistill advise` asks for; `resources` cannot name them."""

    data: Encoding

    @property
    def key(self) -> str:
        """The key of the stage in the store: a hash of the kind, its version, and the content."""
        return key_of({"kind": self.kind, "version": self.version, **self.content()})

    @property
    def models(self) -> dict[str, Handle]:
        """Role -> model that the stage reads. A role is a field's name; assistants are numbered from 1."""
        return {role: part for role, part in self._inputs() if not isinstance(part, Output)}

    @property
    def parents(self) -> dict[str, str]:
        """Role -> key of a stage that must finish first; roles as in `models`, and those of other outputs."""
        keys = {role: stage_of(part) for role, part in self._inputs()}
        return {role: key for role, key in keys.items() if key is not None}

    def _inputs(self) -> Iterator[tuple[str, Handle | Output]]:
        for name, value in self:
            if isinstance(value, INPUTS):
                yield name, value
            elif isinstance(value, tuple):
                yield from ((f"{name.removesuffix('s')} {i}", v) for i, v in enumerate(value, 1) if isinstance(v, INPUTS))

    @property
    def steps(self) -> int | None:
        """Updates of the optimizer; None where nothing is trained."""
        return None

    @property
    def checkpoints(self) -> int:
        """The number of dev evaluations that selection chooses among."""
        return 0

    def cost(self, ledger: "Ledger", model: str, teachers: tuple[str, ...]) -> Cost | None:
        """Return the predicted cost, or None where it is not predicted.

        Args:
            ledger: sizes of the recipe's models and lengths of its texts.
            model: name of the model that the stage makes or runs.
            teachers: names of its teachers, from big to small.
        """
        return None


# --- training -----------------------------------------------------------------------------------------------------------


class TrainingSpec(Spec):
    """Base of the stages that train."""

    work = "training:train"
    trains = True

    student: Handle
    optim: Optim
    select: Select
    seed: int
    train: Split
    dev: Split | None = None
    """None where no dev metric selects."""
    decoding: Evaluate | None = None
    """Settings for answers to dev prompts, and their batch; None where no dev metric selects."""
    lora: Lora | None = None

    @property
    def method(self) -> Method:
        """The whole method, as one object."""
        return Method(objective=CrossEntropy(), optim=self.optim, select=self.select)

    @property
    def steps(self) -> int | None:
        """Updates of the optimizer."""
        return self.optim.steps

    @property
    def checkpoints(self) -> int:
        """Dev evaluations: one every `select.every` updates and one at the end."""
        return 0 if self.optim.steps is None or self.select.metric == "last" else -(-self.optim.steps // self.select.every)

    def content(self) -> dict[str, Any]:
        """Return the plain form, with only the decoding settings that the dev metric reads."""
        found = super().content()
        if self.select.metric == "loss" and self.decoding:
            found["decoding"] = {"batch": self.decoding.batch}
        return found


class SftSpec(TrainingSpec):
    """Supervised fine-tuning on the references."""

    kind = "sft"
    version = 3

    keep: tuple[int, ...] = ()
    """Updates whose weights are kept beside the selected ones, in order."""

    def cost(self, ledger: "Ledger", model: str, teachers: tuple[str, ...]) -> Cost | None:
        """Return the predicted cost."""
        return ledger.sft(model, self.optim, self.select)


class DistillSpec(TrainingSpec):
    """Training a student on what one or several teachers say."""

    kind = "distill"
    version = 3

    teacher: Handle
    responses: Output | None = None
    """The teacher's answers to the training prompts, for samplers that read them."""
    signal: Output | None = None
    """The teacher's recorded outputs, for samplers that read them."""
    objective: Objective
    sampler: Sampler
    dense: Dense | None = None
    assistants: tuple[Handle, ...] = ()
    """The other teachers of dense guidance, from big to small."""
    corpus: Source | None = None
    """Plain text for the language-modelling term of MiniLLM."""

    @property
    def method(self) -> Method:
        """The whole method, as one object."""
        return Method(objective=self.objective, sampler=self.sampler, optim=self.optim, select=self.select, dense=self.dense)

    def content(self) -> dict[str, Any]:
        """Return the plain form, with objective and sampler in an entry `method`."""
        found = super().content()
        return found | {"method": {name: found.pop(name) for name in ("objective", "sampler")}}

    def cost(self, ledger: "Ledger", model: str, teachers: tuple[str, ...]) -> Cost | None:
        """Return the predicted cost."""
        return ledger.distill(teachers, model, self.method)


# --- a teacher's part ---------------------------------------------------------------------------------------------------


class TemperSpec(Spec):
    """A teacher at the temperature at which its mean entropy on dev responses is that of another model."""

    kind = "temper"
    version = 1
    work = "teacher:temper"

    teacher: Handle
    like: Handle
    """The model whose entropy is matched. It teaches nothing, so an arm does not pay for it."""
    dev: Split
    batch: int

    def cost(self, ledger: "Ledger", model: str, teachers: tuple[str, ...]) -> Cost | None:
        """Return a cost of nothing: the stage trains nothing."""
        return Cost()


class GenerateSpec(Spec):
    """A teacher's answer to every training prompt."""

    kind = "generate"
    version = 2
    work = "teacher:generate"

    teacher: Handle
    sampler: Decoding
    seed: int
    train: Split

    def cost(self, ledger: "Ledger", model: str, teachers: tuple[str, ...]) -> Cost | None:
        """Return the predicted cost."""
        return ledger.generate(model, self.sampler)


class SignalSpec(Spec):
    """A teacher's outputs on the training set, recorded for its students."""

    kind = "signal"
    version = 1
    work = "teacher:signal"

    teacher: Handle
    signal: HiddenSignal | TopKSignal = Field(discriminator="type")
    precision: Precision
    """Precision of the students' training, which decides the teacher's dtype."""
    train: Split

    def cost(self, ledger: "Ledger", model: str, teachers: tuple[str, ...]) -> Cost | None:
        """Return the predicted cost."""
        return ledger.signal(model, self.signal)


# --- measuring ----------------------------------------------------------------------------------------------------------


class _OnTestSets(Spec):
    measures = True

    sets: tuple[Split, ...] = Field(min_length=1)
    """The test sets, all with the same limit."""

    def content(self) -> dict[str, Any]:
        """Return the plain form, with the limit of all test sets."""
        return super().content() | {"limit": self.sets[0].limit}


class EvaluateSpec(_OnTestSets):
    """A model by itself on the test sets."""

    kind = "evaluate"
    version = 4
    work = "measuring:evaluate"

    model: Handle
    decoding: Evaluate
    references: bool
    """True if the references are scored too; they depend on no decoding, so one stage of several does it."""


class AnalyseSpec(_OnTestSets):
    """A model beside the original teacher and the assistants of its path, on the test sets."""

    kind = "analyse"
    version = 1
    work = "measuring:analyse"

    teacher: Handle
    model: Handle
    answers: Output
    """The model's own answers."""
    teacher_answers: Output
    assistants: tuple[Handle, ...]
    batch: int


class ProbeSpec(Spec):
    """A model by itself on dev prompts, before any distillation."""

    kind = "probe"
    version = 1
    work = "measuring:probe"
    measures = True
    in_recipes = False

    model: Handle
    decoding: Evaluate
    dev: Split


class PairSpec(Spec):
    """A learner beside a bigger model on dev prompts, before any distillation."""

    kind = "pair"
    version = 1
    work = "measuring:pair"
    measures = True
    in_recipes = False

    teacher: Handle
    model: Handle
    answers: Output
    """The learner's answers in its probe."""
    k: int
    """The number of likeliest tokens that are compared."""
    dev: Split
    batch: int


KINDS: dict[str, type[Spec]] = {
    spec.kind: spec for spec in (SftSpec, DistillSpec, TemperSpec, GenerateSpec, SignalSpec, EvaluateSpec, AnalyseSpec, ProbeSpec, PairSpec)
}
"""Every kind of stage by its name."""
TRAINING = frozenset(kind for kind, spec in KINDS.items() if spec.trains)
"""Names of the kinds that train, for readers of a stored plan."""
