"""The texts of a study's stages: the data sets of the recipe, and the texts that other stages write.

The stages before a distillation write a model's answers to the training prompts, and a teacher's recorded outputs.

With `sampler: {type: student, recorded: true}`, arms with the same last model train on the same text. The last model writes this text
after its own fine-tuning with the study's first seed, whatever the arm's `init` is. So the text does not depend on the arm or on other
seeds. It depends on the last model's weights, the first seed, the decoding, the training prompts and `evaluate.precision`. A `context`
changes the text too: rows in which the teacher's own prompt is too long are left out. The outputs of every teacher of a path are recorded
on this text.

In a later phase of a distillation, the student itself writes the text, with its weights after the phase before. Then each seed has its own
text.

A student with another tokenizer than the teacher gets the teacher's answers as text, which a stage `retokenise` tokenises again. A teacher
behind an API always writes text (stage `ask`).
"""

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from tadistill.config import DataRef, Method, Recipe
from tadistill.config.common import Decoding
from tadistill.config.method_parts import TeacherContext
from tadistill.data.datasets import SplitRows
from tadistill.data.tinyworld import SPLITS, TOKENIZERS
from tadistill.errors import ConfigError, NotHere, about
from tadistill.plan import kinds
from tadistill.plan.inputs import BehindApi, Dev, DevSets, Encoding, Handle, HashedData, Output, Split, TokenizerFiles
from tadistill.plan.paths import check_writer
from tadistill.plan.phases import Turn

if TYPE_CHECKING:
    from tadistill.plan.builder import StageBuilder


class StudySets:
    """The training sets, the dev sets and the test sets of a recipe. Hundreds of stages use the same rows, so each set is hashed once."""

    def __init__(self, recipe: Recipe):
        self.recipe, self.data = recipe, recipe.data
        self._known: dict[tuple[str, str, int | None, str], Split] = {}

    def training(self, sets: Sequence[str] = (), *, weights: bool = False, rows: int | None = None) -> dict[str, Any]:
        """Return the fields of a stage that name its training sets.

        Args:
            sets: the names of the sets, in any order. By default, they are all sets of the recipe.
            weights: also return the share of each set, if there are several.
            rows: the number of rows of each set. By default, it is the recipe's `data.limit.train`.
        """
        names = [name for name in self.data.sets if name in sets or not sets]
        train, *more = (self._split(self.data.sets[name], "train", rows or self.data.limit.train) for name in names)
        found: dict[str, Any] = {"train": train, "more": tuple(more)}
        return found | {"weights": self._shares(names)} if weights and more else found

    def dev(self, sets: Sequence[str] = (), *, prompts: int | None = None, model: str = "") -> Dev:
        """Return the dev set, or the dev sets of some training sets.

        Args:
            sets: the names of the training sets. By default, they are all sets of the recipe.
            prompts: the number of rows to use, divided among the sets by their shares. By default, each set has `data.limit.dev` rows.
            model: name of the model whose texts the stage scores, if it scores any.
        """
        refs = self.data.dev_sets(sets)
        if len(refs) == 1:
            (ref,) = refs.values()
            return self._split(ref, "dev", prompts or self.data.limit.dev, model)
        shares = self._shares(refs)
        limits = [self.data.limit.dev if prompts is None else max(1, round(prompts * share)) for share in shares]
        splits = tuple(self._split(ref, "dev", limit, model) for ref, limit in zip(refs.values(), limits, strict=True))
        return DevSets(names=tuple(refs), splits=splits, shares=shares)

    def _shares(self, names: Collection[str]) -> tuple[float, ...]:
        total = sum(self.data.shares[name] for name in names)
        return tuple(self.data.shares[name] / total for name in names)

    def test(self, model: str = "") -> tuple[Split, ...]:
        """Return all test sets. `model` is the name of the model whose texts the stage scores, if it scores any."""
        return tuple(self._split(ref, "test", self.data.limit.test, model) for ref in self.data.test)

    def _split(self, ref: DataRef, role: Literal["train", "dev", "test"], limit: int | None, model: str = "") -> Split:
        key = role, ref.name, limit, model
        if key not in self._known:
            self._known[key] = Split.of(SplitRows.of(ref, role, self.data), role=role, limit=limit, scores=self._scores(ref, model))
        return self._known[key]

    def _scores(self, ref: DataRef, model: str) -> dict[str, int]:
        # models of tinyworld learn texts with spaces between words and punctuation, so their facts were found before
        models = self.recipe.models
        scored = [models[model]] if model and models[model].load else models.values()  # without `load`, the tokenizer is another model's
        unspaced = any(each.load and each.tokenizer not in TOKENIZERS for each in scored)
        found = {name for name in ("choice", "numeric") if name in ref.columns}
        return dict.fromkeys(sorted(found | ({"facts"} if unspaced and ("facts" in ref.columns or ref.load in SPLITS) else set())), 2)


def texts(
    stages: "StageBuilder",
    teachers: list[tuple[str, Handle]],
    method: Method,
    seed: int,
    learner: tuple[str, Handle],
    turn: Turn,
    route: Mapping[str, str],
) -> dict[str, Any]:
    """Add the stages that write the texts of a distillation. Return the fields of its `DistillSpec` that refer to these stages.

    Args:
        teachers: names and models of the student's teachers, from big to small.
        learner: name and initial weights of the student.
        route: the teacher of each training set. Empty if every teacher teaches on all rows. Otherwise, each teacher has a text of its own.
    """
    (writer, weights), own = learner, turn.seed(seed)
    sampler, found = method.sampler, dict[str, Any](corpus=_corpus(stages, method))
    sets = [tuple(each for each in route if route[each] == name) for name, _ in teachers] if route else [()]
    answers: list[Output] = []
    if method.recorded_text:
        assert isinstance(sampler, Decoding)
        if turn.phase == 1:
            first, writer = stages.recipe.first_seed, turn.writer
            weights, own = stages.trained(writer, first), stages.seed(writer, first)
            check_writer(stages.tokens, writer, learner[0])
        seeds = own, own if turn.phase == 1 else seed
        answers = [_answers(stages, (writer, weights), sampler, seeds, method.context, sets=each) for each in sets]
        found["text_of"] = writer, sampler.max_new_tokens
    elif sampler.teacher_text:
        assert isinstance(sampler, Decoding)
        if len(stages.recipe.data.sets) > 1:
            _check_one_tokenizer(stages, [name for name, _ in teachers[: len(sets)]], learner[0])
        if stages.recipe.models[teachers[0][0]].api:
            return found | {"responses": _asked(stages, teachers[0], sampler, seed, method.context, learner[0])}
        for teacher, each in zip(teachers, sets, strict=False):
            answers.append(_taught(stages, teacher, learner[0], method, seed, each))
            if not stages.tokens.hands_over_ids(teacher[0], learner[0]):
                found["text_of"] = teacher[0], _tokens_of(stages, teacher[0], learner[0], sampler.max_new_tokens)
    if answers:
        found |= {"responses": answers[0], "assistant_responses": tuple(answers[1:])}
    if method.signal is None or not method.objective.needs_teacher:
        return found
    signals: list[Output] = []
    for number, teacher in enumerate(teachers):
        mine = number if route else 0
        text = {"text_of": found["text_of"], "responses": answers[mine]} if method.recorded_text else {}
        signals.append(_signal(stages, teacher, method, seed, learner[0], sets[mine], text))
    return found | {"signal": signals[0], "assistant_signals": tuple(signals[1:])}


def on_sets(sets: Sequence[str]) -> str:
    """Return the part of a stage's label that names its training sets. Empty for all sets."""
    return f" on {' and '.join(sets)}" if sets else ""


def _answers(
    stages: "StageBuilder",
    model: tuple[str, Handle],
    sampler: Decoding,
    seeds: tuple[int, int],
    context: TeacherContext | None,
    *,
    sets: Sequence[str],
    as_teacher: bool = False,
) -> Output:
    # `seeds`: the seed with which the answers are sampled, and the seed in the stage's label
    (name, handle), (seed, shown) = model, seeds
    how = stages.only_runs(name) | {"data": stages.encoding(name, context=context), "as_teacher": as_teacher}
    spec = kinds.GenerateSpec(**how, teacher=handle, sampler=_decoding(sampler), seed=seed, **stages.training(sets))
    return Output(stage=stages.add(spec, f"generate with {name}{on_sets(sets)}, seed {shown}", name, shown))


def _asked(
    stages: "StageBuilder", teacher: tuple[str, Handle], sampler: Decoding, seed: int, context: TeacherContext | None, learner: str
) -> Output:
    (name, handle), seed = teacher, stages.seed(teacher[0], seed)
    assert isinstance(handle, BehindApi)
    decoding, data = _decoding(sampler), stages.recipe.data
    rules = {name: getattr(data, name) for name in ("world", "thinking", "max_prompt", "max_length")}
    messages = Encoding(template="chat", context=context, **rules)
    drawn = None if decoding.temperature == 0 else seed  # without randomness, all seeds have the same answers
    asked = kinds.AskSpec(data=messages, teacher=handle, sampler=decoding, seed=drawn, **stages.training())
    shown = stages.recipe.first_seed if drawn is None else seed
    of_seed = "" if drawn is None else f", seed {seed}"
    answers = Output(stage=stages.add(asked, f"ask {name}{of_seed}", name, shown))
    return _retokenised(stages, answers, learner, f"answers of {name}, tokenised for {learner}{of_seed}", shown)


def _decoding(sampler: Decoding) -> Decoding:
    # without the settings of a sampler that are not about decoding
    return Decoding(**sampler.model_dump(include=set(Decoding.model_fields)))


def _taught(stages: "StageBuilder", teacher: tuple[str, Handle], learner: str, method: Method, seed: int, sets: Sequence[str]) -> Output:
    # a student with the writer's own tokens reads the sampled token ids; any other student reads the text
    (writer, _), tokens, context = teacher, stages.tokens, method.context
    assert isinstance(method.sampler, Decoding)
    answers = _answers(stages, teacher, method.sampler, (seed, seed), context, sets=sets, as_teacher=context is not None)
    if tokens.hands_over_ids(writer, learner):
        return answers
    label = f"answers of {writer}, retokenised for {learner}, seed {seed}"
    return _retokenised(stages, answers, learner, label, seed, tokens.files(writer), stages.asking(writer, context=context))


def _signal(
    stages: "StageBuilder",
    teacher: tuple[str, Handle],
    method: Method,
    seed: int,
    learner: str,
    sets: Sequence[str],
    text: Mapping[str, Any],
) -> Output:
    # `text`: the fields of the recorded text; empty if the training sets have the text
    (name, handle), signal = teacher, method.signal
    assert signal is not None
    spec = kinds.SignalSpec(
        data=stages.encoding(name, samples=False, responses=not text, context=method.context),
        teacher=handle,
        signal=signal,
        precision=method.optim.precision,
        tokens=None if signal.type == "hidden" else stages.tokens.fewer(learner, name),
        **stages.training(sets),
        **text,
    )
    place = f" on the text of {text['text_of'][0]}" if text else ""
    return Output(stage=stages.add(spec, f"{signal.type} signal of {name}{place}{on_sets(sets)}, seed {seed}", name, seed))


def _retokenised(
    stages: "StageBuilder",
    answers: Output,
    learner: str,
    label: str,
    seed: int,
    writer: TokenizerFiles | None = None,
    asked: Encoding | None = None,
) -> Output:
    data, tokenizer = stages.encoding(learner, samples=False), stages.tokens.files(learner)
    spec = kinds.RetokeniseSpec(data=data, answers=answers, writer=writer, asked=asked, tokenizer=tokenizer, **stages.training())
    return Output(stage=stages.add(spec, label, learner, seed))


def _check_one_tokenizer(stages: "StageBuilder", writers: Sequence[str], learner: str) -> None:
    for writer in writers:
        if stages.recipe.models[writer].api or not stages.tokens.hands_over_ids(writer, learner):
            what = "is behind an API" if stages.recipe.models[writer].api else "has another tokenizer"
            raise ConfigError(
                f"{learner} learns from the text of {writer}, which {what}, so there can be only one training set; remove the other sets "
                "of `data.train`, or use models with one tokenizer"
            )


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
    return HashedData.of(SplitRows.of(corpus, "train", stages.recipe.data))
