"""The kinds of stages. Each kind is a frozen class, whose fields contain everything that changes the stage's results.

`KINDS` lists all kinds. A new kind needs a class here, a function in `tadistill.stages`, and a call in `plan.builder` or `plan.arms`.
"""

from typing import TYPE_CHECKING, Any

from tadistill.config import Evaluate, Method, Optim
from tadistill.config.common import Decoding, Precision
from tadistill.config.method import PARTS
from tadistill.config.method_parts import Dense, Select
from tadistill.config.model import Lora
from tadistill.config.objective import CrossEntropy, Objective
from tadistill.config.sampling import OnPolicy, Rounds, Sampler, Signal
from tadistill.metrics import names_in
from tadistill.models.flops_and_memory import Cost
from tadistill.plan.graph import OnTrainingSets, Spec, scores_of
from tadistill.plan.inputs import BehindApi, Dev, Encoding, Handle, HashedData, Output, OwnCode, Split, Tasks, TextOf, TokenizerFiles
from tadistill.text import counted

if TYPE_CHECKING:
    from tadistill.plan.costs import Ledger


# --- training -----------------------------------------------------------------------------------------------------------


class TrainingSpec(OnTrainingSets):
    """Base class of the stages that train a model."""

    work = "training:train"
    trains = shared = True

    student: Handle
    optim: Optim
    select: Select
    seed: int
    weights: tuple[float, ...] = ()
    """The share of each training set in the rows, if there are several."""
    dev: Dev | None = None
    """Data for the dev metric that selects the checkpoint. None if no dev metric selects it."""
    decoding: Evaluate | None = None
    """Settings for sampling answers to dev prompts. None if no dev metric selects the checkpoint."""
    lora: Lora | None = None

    @property
    def method(self) -> Method:
        return Method(objective=CrossEntropy(), optim=self.optim, select=self.select)

    @property
    def steps(self) -> int | None:
        return self.optim.steps

    def saves_memory(self, processes: int) -> list[str]:
        optim, sampler = self.optim, self.method.sampler
        found = [*filter(None, [optim.smaller(processes)])]
        chunk = sampler.chunk if isinstance(sampler, OnPolicy) and self.method.samples else 1
        found += [f"sampler.chunk: {chunk // 2}"] if chunk > 1 else []
        found += ["optim.gradient_checkpointing: true"] if not optim.gradient_checkpointing else []
        return found + (["optim.precision: bf16"] if optim.precision == "fp32" else [])

    @property
    def checkpoints(self) -> int:
        """Number of evaluations on the dev set."""
        return self.select.evaluations(self.optim.steps or 0)

    def content(self) -> dict[str, Any]:
        """Return the stage as plain data. With the dev metric `loss`, no text is sampled, so only `batch` of the decoding is stored."""
        found = super().content()
        if self.select.metric == "loss" and self.decoding:
            found["decoding"] = {"batch": self.decoding.batch}
        return found | (scores_of(*self.dev.splits) if self.dev and self.select.metric in names_in("quality") else {})


class SftSpec(TrainingSpec):
    """Supervised fine-tuning on the reference answers."""

    kind = "sft"
    version = 3

    keep: tuple[int, ...] = ()
    """Numbers of updates after which weights are stored too, in addition to the selected checkpoint. Ascending."""

    def cost(self, ledger: "Ledger", model: str, teachers: tuple[str, ...]) -> Cost | None:
        return self.texts(ledger, self.weights).sft(model, self.optim, self.select)


class DistillSpec(TrainingSpec):
    """Distillation of one or several teachers into a student."""

    kind = "distill"
    version = 3

    teacher: Handle
    responses: Output | None = None
    """Answers to the training prompts, written by a model before training. None if the sampler does not train on such answers."""
    text_of: TextOf = None
    signal: Output | None = None  # the teacher's recorded outputs, if the sampler reads them instead of running the teacher
    assistant_signals: tuple[Output, ...] = ()  # the recorded outputs of `assistants`
    objective: Objective
    sampler: Sampler
    dense: Dense | None = None
    assistants: tuple[Handle, ...] = ()
    """The teachers besides `teacher`, with `dense` or a `route`. With `dense`, they are ordered from big to small."""
    route: tuple[int, ...] = ()
    """For each training set, the index of its teacher in (teacher, *assistants). Empty if every teacher teaches on all rows."""
    assistant_responses: tuple[Output, ...] = ()  # with a route: answers for the sets of each assistant; `responses` are for `teacher`
    corpus: HashedData | None = None  # plain text for MiniLLM's language-modelling loss
    own: OwnCode | None = None  # the function of objective `custom`
    ema: float | None = None
    teacher_data: Encoding | None = None
    """For a loss over spans of text: the settings with which the teacher tokenises prompts for itself. None for any other loss."""

    @property
    def method(self) -> Method:
        context = (self.teacher_data or self.data).context
        return Method(**{part: getattr(self, part) for part in PARTS if part != "context"}, context=context)

    @property
    def summary(self) -> str:
        """The part of the stage's label that describes the loss, the sampler and the number of updates."""
        method, sampler = self.method, self.sampler
        recorded = "recorded, " if method.recorded_text else ""
        detail = f" ({recorded}{method.signal.type} signal)" if method.signal else ""
        if isinstance(sampler, Rounds) and sampler.rollouts:
            detail = f" (rounds of {sampler.rollouts}, {counted(method.round_updates, 'update')} each)"
        own = f"{', with a context' if method.context else ''}{f', EMA {method.ema:g}' if method.ema is not None else ''}"
        own += ", over spans" if self.teacher_data else ""
        return f"{method.objective.label} on {sampler.type}{detail}{own}, {counted(method.optim.steps or 0, 'update')}"

    def content(self) -> dict[str, Any]:
        """Return the stage as plain data. Objective and sampler are in an entry `method`."""
        found = super().content()
        method = {name: found.pop(name) for name in ("objective", "sampler")}
        over_spans = {"over_spans": 3 if self.objective.type in ("minillm", "uld", "gold") else 2} if self.teacher_data else {}
        second = {"behaviour": self.method.keeps_behaviour, "speculation": self.sampler.has_second_law}
        return found | {"method": method} | over_spans | {name: 2 for name, holds in second.items() if holds}

    def cost(self, ledger: "Ledger", model: str, teachers: tuple[str, ...]) -> Cost | None:
        texts = self.texts(ledger, self.weights, self.route)
        if self.teacher_data:
            texts = texts.of_texts(texts.sets, self.teacher_data.context, texts.weights, texts.route)
        return texts.distill(teachers, model, self.method, self.text_of)


# --- preparing a teacher ---------------------------------------------------------------------------------------------------


class TemperSpec(Spec):
    """Search for the temperature at which a teacher's mean entropy on dev responses equals that of another model."""

    kind = "temper"
    version = 1
    work = "teacher:temper"

    teacher: Handle
    like: Handle
    """The model whose mean entropy the temperature shall give. The training of this model is not included in the FLOPs of an arm."""
    dev: Dev
    batch: int

    def cost(self, ledger: "Ledger", model: str, teachers: tuple[str, ...]) -> Cost | None:
        """Return an empty cost, because the stage trains nothing."""
        return Cost()


class GenerateSpec(OnTrainingSets):
    """Sampling of a model's answer to every training prompt."""

    kind = "generate"
    version = 2
    work = "teacher:generate"

    teacher: Handle
    """The model that answers: a teacher, or the student whose text is recorded."""
    sampler: Decoding
    seed: int
    precision: Precision = "fp32"  # number format of the models (`evaluate.precision`)
    as_teacher: bool = False  # True if it answers the teacher's own prompts (`data.context`)

    def cost(self, ledger: "Ledger", model: str, teachers: tuple[str, ...]) -> Cost | None:
        return self.texts(ledger).generate(model, self.sampler, limit=self.limit, as_teacher=self.as_teacher)


class AskSpec(OnTrainingSets):
    """Answers of a model behind an API to every training prompt, as text (`data.retokenised_answers`)."""

    kind = "ask"
    version = 1
    work = "teacher:ask"

    teacher: BehindApi
    sampler: Decoding
    seed: int | None  # None for greedy decoding

    def cost(self, ledger: "Ledger", model: str, teachers: tuple[str, ...]) -> Cost | None:
        """Return a cost with only the number of answer tokens, because the FLOPs of a model behind an API are not known."""
        return ledger.ask(self.sampler, limit=self.limit)


class RetokeniseSpec(OnTrainingSets):
    """Tokenisation of a model's answers for a student with another tokenizer. `data` has the student's settings.

    The answers pass from one tokenizer to the other as text (`data.retokenised_answers`).
    """

    kind = "retokenise"
    version = 1
    work = "teacher:retokenise"

    answers: Output
    writer: TokenizerFiles | None
    """The tokenizer of the answers. None if they are text already, as those of an API."""
    asked: Encoding | None
    """The settings with which the writer's prompts were tokenised. None if the answers are text already."""
    tokenizer: TokenizerFiles  # the student's tokenizer

    def cost(self, ledger: "Ledger", model: str, teachers: tuple[str, ...]) -> Cost | None:
        """Return an empty cost, because the stage runs no model."""
        return Cost()


class SignalSpec(OnTrainingSets):
    """Recording of a teacher's outputs on the training set, or on a model's answers. Students train on the recorded outputs later."""

    kind = "signal"
    version = 1
    work = "teacher:signal"
    shared = True

    teacher: Handle
    signal: Signal
    precision: Precision  # of the students' training: the teacher's dtype depends on it
    responses: Output | None = None  # the answers on which the outputs are recorded; None for the training set's own responses
    text_of: TextOf = None
    tokens: int | None = None  # number of the student's tokens, if the teacher has more and single tokens are recorded

    def cost(self, ledger: "Ledger", model: str, teachers: tuple[str, ...]) -> Cost | None:
        return self.texts(ledger).signal(model, self.signal, self.text_of, limit=self.limit)


# --- measuring ----------------------------------------------------------------------------------------------------------


class _OnTestSets(Spec):
    measures = True

    sets: tuple[Split, ...]
    """The test sets, all with the same limit."""
    precision: Precision = "fp32"  # number format of the models (`evaluate.precision`)

    def content(self) -> dict[str, Any]:
        return super().content() | {"limit": self.sets[0].limit if self.sets else None}


class EvaluateSpec(_OnTestSets):
    """Evaluation of one model on the test sets."""

    kind = "evaluate"
    version = 4
    work = "measuring:evaluate"

    model: Handle
    decoding: Evaluate
    references: bool
    """True if the stage also scores the reference answers. One stage per model is enough, because these scores do not depend on the
    decoding."""
    own: tuple[OwnCode, ...] = ()  # the recipe's own metrics
    tasks: Tasks | None = None  # tasks of lm-eval that are measured too
    per_byte: bool = False  # True if the bits per byte of the references are measured too

    def saves_memory(self, processes: int) -> list[str]:
        return [f"evaluate.batch: {size // 2}"] if (size := self.decoding.batch) > 1 else []

    def content(self) -> dict[str, Any]:
        bytes_of_turns = self.per_byte and self.references and self.data.turns != "answer"
        return super().content() | scores_of(*self.sets) | ({"bits_per_byte": 2} if bytes_of_turns else {})


class AnalyseSpec(_OnTestSets):
    """Comparison of a model with the original teacher and with the teacher assistants in its path, on the test sets."""

    kind = "analyse"
    version = 1
    work = "measuring:analyse"

    teacher: Handle
    model: Handle
    answers: Output  # the model's own answers
    teacher_answers: Output | None  # None if a server runs the teacher: it writes no text, so the exposure bias is not measured
    assistants: tuple[Handle, ...]
    batch: int
    of_teacher: Encoding | None = None
    """The settings with which the teacher tokenises texts. None if teacher and model have one tokenizer. If their tokenizers differ, each
    of the two models scores the other's answers as text, and nothing is compared token by token."""
    tokens: int | None = None  # number of the model's tokens, if the teacher has more: the teacher's answers may contain them

    def content(self) -> dict[str, Any]:
        return super().content() | ({"across_tokenizers": 2} if self.of_teacher else {})

    def saves_memory(self, processes: int) -> list[str]:
        return [f"evaluate.batch: {self.batch // 2}"] if self.batch > 1 else []


class _OnDevSet(Spec):
    measures = True
    in_recipes = False

    dev: Dev
    precision: Precision = "fp32"  # number format of the models (`evaluate.precision`)


class ProbeSpec(_OnDevSet):
    """Measurement of one model on dev prompts, before any distillation."""

    kind = "probe"
    version = 1
    work = "measuring:probe"

    model: Handle
    decoding: Evaluate

    def content(self) -> dict[str, Any]:
        return super().content() | scores_of(*self.dev.splits)


class PairSpec(_OnDevSet):
    """Comparison of a student with a bigger model on dev prompts, before any distillation."""

    kind = "pair"
    version = 1
    work = "measuring:pair"

    teacher: Handle
    model: Handle
    answers: Output  # the student's answers from its probe stage
    k: int  # number of most likely tokens that are compared
    batch: int


KINDS: dict[str, type[Spec]] = {
    spec.kind: spec
    for spec in (
        *(SftSpec, DistillSpec, TemperSpec, GenerateSpec, AskSpec, RetokeniseSpec, SignalSpec),
        *(EvaluateSpec, AnalyseSpec, ProbeSpec, PairSpec),
    )
}
"""Every kind of stage by its name."""
TRAINING = frozenset(kind for kind, spec in KINDS.items() if spec.trains)
"""Names of the kinds that train a model."""
