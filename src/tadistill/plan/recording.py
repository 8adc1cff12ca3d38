"""The stages before a distillation that make its texts: a model's answers to the training prompts, and a teacher's outputs on a text.

Students with `sampler: {type: student, recorded: true}` share one text. The last model of the arm's path writes it, after its own
fine-tuning with the study's first seed, whatever the arm's `init` is. So the text depends on the weights of this model, on the seed, the
decoding, the training prompts and `evaluate.precision`, but on no arm, and on no other seed of the study. Every teacher of a path is
recorded on the same text. A `context` belongs to the text too, because rows with a long teacher's prompt are left out.

A teacher's answers reach a student with another tokenizer as text (`retokenise`). A teacher behind an API always writes text (`ask`).

In a later phase, the student writes the text itself, with the weights that the phase before left. Each seed then has its own text.
"""

from typing import TYPE_CHECKING, Any

from tadistill.config import Method
from tadistill.config.common import Decoding
from tadistill.config.context import TeacherContext
from tadistill.data import datasets
from tadistill.errors import NotHere, about
from tadistill.plan import specs
from tadistill.plan.edges import check_writer
from tadistill.plan.inputs import BehindApi, Encoding, Handle, HashedData, Output
from tadistill.plan.phases import Turn

if TYPE_CHECKING:
    from tadistill.plan.builder import StageBuilder


def texts(
    stages: "StageBuilder", teachers: list[tuple[str, Handle]], method: Method, seed: int, learner: tuple[str, Handle], turn: Turn
) -> dict[str, Any]:
    """Add the stages that write the texts of a distillation. Return the fields of its `DistillSpec` that name them.

    Args:
        teachers: names and models of the student's teachers, from big to small.
        learner: name and initial weights of the student.
    """
    (writer, weights), own = learner, turn.seed(seed)
    sampler, found = method.sampler, dict[str, Any](corpus=_corpus(stages, method))
    if method.recorded_text:
        assert isinstance(sampler, Decoding)
        if turn.phase == 1:
            first, writer = stages.recipe.first_seed, turn.writer
            weights, own = stages.trained(writer, first), stages.seed(writer, first)
            check_writer(stages.tokens, writer, learner[0])
        shown = own if turn.phase == 1 else seed
        found["responses"] = _answers(stages, (writer, weights), sampler, own, method.context, shown=shown)
        found["text_of"] = writer, sampler.max_new_tokens
    elif sampler.teacher_text:
        assert isinstance(sampler, Decoding)
        as_teacher = method.context is not None
        if stages.recipe.models[teachers[0][0]].api:
            return found | {"responses": _asked(stages, teachers[0], sampler, seed, method.context, learner[0])}
        answers = _answers(stages, teachers[0], sampler, seed, method.context, as_teacher=as_teacher, shown=seed)
        found["responses"] = _handed_over(stages, teachers[0][0], learner[0], answers, method.context, seed)
        if found["responses"] != answers:
            found["text_of"] = teachers[0][0], _tokens_of(stages, teachers[0][0], learner[0], sampler.max_new_tokens)
    if method.signal is None or not method.objective.needs_teacher:
        return found
    of_text = {key: found[key] for key in ("responses", "text_of") if method.recorded_text}
    place = f" on the text of {writer}" if of_text else ""
    outputs = []
    for name, teacher in teachers:
        spec = specs.SignalSpec(
            data=stages.encoding(name, samples=False, responses=not of_text, context=method.context),
            teacher=teacher,
            signal=method.signal,
            precision=method.optim.precision,
            train=stages.split("train"),
            **of_text,
        )
        outputs.append(Output(stage=stages.add(spec, f"{method.signal.type} signal of {name}{place}, seed {seed}", name, seed)))
    return found | {"signal": outputs[0], "assistant_signals": tuple(outputs[1:])}


def _answers(
    stages: "StageBuilder",
    model: tuple[str, Handle],
    sampler: Decoding,
    seed: int,
    context: TeacherContext | None,
    *,
    as_teacher: bool = False,
    shown: int,
) -> Output:
    name, handle = model
    decoding = Decoding(**sampler.model_dump(include=set(Decoding.model_fields)))
    how = stages.only_runs(name) | {"data": stages.encoding(name, context=context), "as_teacher": as_teacher}
    spec = specs.GenerateSpec(**how, teacher=handle, sampler=decoding, seed=seed, train=stages.split("train"))
    return Output(stage=stages.add(spec, f"generate with {name}, seed {shown}", name, shown))


def _asked(
    stages: "StageBuilder", teacher: tuple[str, Handle], sampler: Decoding, seed: int, context: TeacherContext | None, learner: str
) -> Output:
    (name, handle), seed = teacher, stages.seed(teacher[0], seed)
    assert isinstance(handle, BehindApi)
    decoding = Decoding(**sampler.model_dump(include=set(Decoding.model_fields)))
    data = stages.recipe.data
    rules = {name: getattr(data, name) for name in ("world", "thinking", "max_prompt", "max_length")}
    messages = Encoding(template="chat", context=context, **rules)
    drawn = None if decoding.temperature == 0 else seed  # without randomness, all seeds have the same answers
    asked = specs.AskSpec(data=messages, teacher=handle, sampler=decoding, seed=drawn, train=stages.split("train"))
    shown = stages.recipe.first_seed if drawn is None else seed
    answers = Output(stage=stages.add(asked, f"ask {name}{'' if drawn is None else f', seed {seed}'}", name, shown))
    spec = specs.RetokeniseSpec(
        data=stages.encoding(learner, samples=False),
        answers=answers,
        writer=None,
        asked=None,
        tokenizer=stages.tokens.files(learner),
        train=stages.split("train"),
    )
    label = f"answers of {name}, tokenised for {learner}{'' if drawn is None else f', seed {seed}'}"
    return Output(stage=stages.add(spec, label, learner, shown))


def _handed_over(stages: "StageBuilder", writer: str, learner: str, answers: Output, context: TeacherContext | None, seed: int) -> Output:
    # a student with the writer's own tokens reads the sampled token ids; any other student reads the text
    tokens = stages.tokens
    if tokens.hands_over_ids(writer, learner):
        return answers
    spec = specs.RetokeniseSpec(
        data=stages.encoding(learner, samples=False),
        answers=answers,
        writer=tokens.files(writer),
        asked=stages.encoding(writer, context=context).model_copy(update={"ends": tokens.ends(writer)}),
        tokenizer=tokens.files(learner),
        train=stages.split("train"),
    )
    return Output(stage=stages.add(spec, f"answers of {writer}, retokenised for {learner}, seed {seed}", learner, seed))


def _tokens_of(stages: "StageBuilder", writer: str, learner: str, most: int) -> int:
    # the largest number of the learner's tokens in an answer of `most` tokens of the writer: in proportion, as in the references
    lengths = []
    for name in (learner, writer):
        try:
            with about(f"models.{name}"):
                lengths.append(stages.ledger.of(stages.tokens.readers(name)).train.mean_response)
        except NotHere:
            return most
    mine, theirs = lengths
    return max(1, round(most * mine / theirs))


def _corpus(stages: "StageBuilder", method: Method) -> HashedData | None:
    corpus = stages.recipe.data.corpus
    if corpus is None or not method.objective.needs_corpus:
        return None
    return HashedData(ref=corpus, fingerprint=datasets.fingerprint(corpus, "train", stages.recipe.data))
