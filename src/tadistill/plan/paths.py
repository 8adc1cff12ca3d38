"""Checks of an arm's path, such as `A > B > C`, and of the models that teach in it; and which of them is the original teacher.

A path begins with a route if several models teach its first student, each on some of the training sets.

An edge is one distillation, such as `A > B`. Its method decides which tokenizers the two models may have:

    the student trains only on the teacher's text (SeqKD)       any two tokenizers
    the loss is defined over spans of text                      any two tokenizers (`config.method_rules`)
    another loss, a sampler or a metric compares tokens         two tokenizers of one family: their common tokens have the same ids

`Method.by_token` names the setting that compares tokens. Starting from another model's weights, matching its temperature and training on
recorded teacher outputs also need tokenizers of one family (`StudyTokens.alike`).

The second half is about teachers that differ from their model in the recipe: teachers with a prompt of their own (`context`), models that
teach themselves, and the teacher of a control (`arms.X.control`).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from tadistill.config import Arm, Method, Recipe
from tadistill.config.arm import flat, is_route, members, path_text, routed
from tadistill.config.method_parts import TeacherContext
from tadistill.config.method_rules import check_one_tokenizer, over_spans
from tadistill.config.recipe import distillations
from tadistill.errors import ConfigError, about
from tadistill.plan.costs import Ledger
from tadistill.plan.inputs import BehindApi, Encoding, Handle, RandomWeights, is_served

if TYPE_CHECKING:
    from tadistill.plan.builder import StageBuilder
    from tadistill.plan.study_tokens import StudyTokens


def check_sizes(ledger: Ledger, name: str, arm: Arm) -> None:
    """Raise a ConfigError if a model of the arm `name` teaches a bigger model."""
    pairs = ((above, below) for path in arm.path for teachers, below in pairwise(path) for above in members(teachers))
    for above, below in pairs:
        teacher, learner = ledger.size(above), ledger.size(below)
        if teacher and learner and learner.total > teacher.total:
            raise ConfigError(
                f"arms.{name}: in `{arm.text}`, {above} ({teacher.total:,} parameters) teaches the bigger model {below} "
                f"({learner.total:,} parameters); write the path from big to small"
            )


def with_parents(recipe: Recipe, names: Iterable[str]) -> set[str]:
    """Return the named models, and all models whose weights they start from."""
    found: set[str] = set()
    for name in names:
        at: str | None = name
        while at is not None:
            found.add(at)
            at = recipe.models[at].parent
    return found


def original_teacher(recipe: Recipe) -> str | None:
    """Return the original teacher, with which the report compares students. Return None if no path has a teacher.

    It is the recipe's `teacher`, or else the first model of all paths. Paths whose first model is trained by another path are ignored.

    Raises:
        ConfigError: the paths start from different models.
    """
    if recipe.teacher:
        return recipe.teacher
    taught = {model for arm in recipe.arms.values() for model in arm.learners}
    starts = dict.fromkeys(name for arm in recipe.arms.values() for path in arm.path if len(path) > 1 for name in members(path[0]))
    heads = [name for name in starts if name not in taught]
    if len(heads) > 1:
        raise ConfigError(
            f"the arms' paths start from different models ({', '.join(heads)}); set `teacher:` to the model that students are compared with"
        )
    return heads[0] if heads else None


def given_teachers(recipe: Recipe, arm: Arm, like: Arm) -> set[str]:
    """Return the teachers whose own training is left out when the FLOPs of `arm` are matched to those of the arm `like`.

    It is the original teacher. If a path begins with a route, the two arms can start from different models. Then the models at the start of
    both arms' paths are returned too, except models that one of the arms distils.
    """
    original = {name for name in (original_teacher(recipe),) if name}
    if not routed((*arm.path, *like.path)):
        return original
    starts = {name for path in (*arm.path, *like.path) for name in members(path[0])}
    return (starts | original) - {*arm.learners, *like.learners}


def check_route(tokens: "StudyTokens", arm: str, path: tuple[str, ...], method: Method) -> None:
    """Check that a method works with a path that begins with a route. Any other path passes.

    Raises:
        ConfigError: the method needs one teacher for all rows, or a teacher has another tokenizer than the student.
    """
    if not is_route(path[0]):
        return
    for teacher in members(path[0]):
        if not tokens.hands_over_ids(teacher, path[1]):
            raise ConfigError(
                f"arms.{arm}: in `{path_text(path)}`, {teacher} and {path[1]} have different tokenizers, but all teachers of "
                "a route and their student need the same tokenizer; use models with one tokenizer"
            )
    start = f"arms.{arm}: in `{path_text(path)}`, each teacher has its own training rows"
    if method.dense:
        raise ConfigError(f"{start}, so their distributions cannot be averaged; remove `dense`, or use a path such as A > B > C")
    if method.sampler.guided:
        raise ConfigError(f"{start}, so no single teacher can take part in sampling; use `sampler: {{type: student}}`")
    if method.select.metric == "reverse_kl":
        raise ConfigError(f"{start}, but select.metric reverse_kl needs one teacher on dev; set `select.metric` to loss or rouge_l")
    if method.objective.compares_on_corpus:
        raise ConfigError(f"{start}, but plain text belongs to no set, so it has no teacher; set `pt_kd_ratio: 0` or `pt_weight: 0`")


_TEXT_ONLY = "use a method that trains on the teacher's text (`seqkd`), or models with one tokenizer"


def check_edge(tokens: "StudyTokens", arm: str, teachers: Sequence[str], learner: str, method: Method) -> None:
    """Check that a student's tokenizer allows a method with its teachers.

    Raises:
        ConfigError: the method compares tokens, but teacher and student have different tokenizers. Or the method is made for two
            tokenizers, but teacher and student share one.
    """
    if method.by_token is None:
        return
    for teacher in teachers:
        differ = f"their tokenizers differ ({tokens.sizes(teacher, learner)})"
        if tokens.alike(teacher, learner):
            if tokens.known(teacher, learner):
                with about(f"arms.{arm}"):
                    check_one_tokenizer(method)
        elif method.objective.needs_teacher:
            with about(f"arms.{arm}: {teacher} teaches {learner}, but {differ}"):
                over_spans(method)
                serve = tokens.recipe.models[teacher].serve
                if serve and serve.signal:
                    raise ConfigError(
                        f"the server of {teacher} sends only the most probable tokens, but a loss over spans needs hidden states; set "
                        f"`gives: hidden` in models.{teacher}.serve"
                    )
        else:
            raise ConfigError(
                f"arms.{arm}: {teacher} teaches {learner} with {method.by_token}, which compares the two models token by token, but "
                f"{differ}; {_TEXT_ONLY}"
            )


def teacher_rules(stages: "StageBuilder", teacher: str, learner: str, method: Method) -> Encoding | None:
    """Return the settings with which a teacher tokenises the training prompts for itself.

    Return None if the teacher shares the student's tokenizer, or if the objective does not use its probabilities.

    Raises:
        ConfigError: rows have several answers, or the teacher answers the prompts of several training sets.
    """
    if not method.objective.needs_teacher or stages.tokens.alike(teacher, learner):
        return None
    if stages.recipe.data.several and method.sampler.teacher_text:
        raise ConfigError(
            f"{learner} learns from answers of {teacher}, which has another tokenizer, so there can be only one training set; remove the "
            "other sets of `data.train`, or use another sampler"
        )
    if method.sampler.reads_responses and stages.recipe.data.turns == "all":
        raise ConfigError(
            f"{learner} learns from {teacher}, which has another tokenizer, so a row can have only one answer, but data.turns is `all`; "
            "set data.turns to last"
        )
    found = stages.asking(teacher, context=method.context)
    return found.model_copy(update={"long_responses": "cut"})  # it reads no reference answers


def lossy_steps(tokens: "StudyTokens", paths: Sequence[Sequence[str]]) -> list[tuple[str, str]]:
    """Return the steps of paths, as pairs (teacher, student), whose two models have different tokenizers."""
    steps = ((above, below) for path in paths for names, below in pairwise(path) for above in members(names))
    return [(above, below) for above, below in steps if not tokens.alike(above, below)]


def check_compared(tokens: "StudyTokens", models: Sequence[str]) -> None:
    """Check that `tadistill advise` can compare the probabilities of models. Raises ConfigError if two tokenizers differ."""
    for name in models[1:]:
        if not tokens.alike(models[0], name):
            raise ConfigError(
                f"`tadistill advise` compares models token by token, but the tokenizers of {models[0]} and {name} differ "
                f"({tokens.sizes(models[0], name)}); leave one of them out, or compare their arms with `tadistill run`"
            )


def check_weights(tokens: "StudyTokens", name: str, source: str) -> None:
    """Check that a model can start from the weights of another one. Raises ConfigError if their tokenizers differ."""
    if not tokens.alike(name, source):
        raise ConfigError(
            f"{name} cannot start from {source}, because their tokenizers differ ({tokens.sizes(name, source)}), so the rows of the "
            "embeddings belong to different tokens; choose models with one tokenizer"
        )


def check_like(tokens: "StudyTokens", name: str, like: str, arm: str) -> None:
    """Check that a temperature can be searched at which two models have the same entropy: `name`, which gets it, and `like`.

    Raises ConfigError if their tokenizers differ."""
    if not tokens.alike(name, like):
        raise ConfigError(
            f"the temperature of {name} cannot be set like that of {like} (arm {arm}), because their tokenizers differ "
            f"({tokens.sizes(name, like)}), so their entropies per token cannot be compared; name an arm with the same tokenizer, or set "
            "`temper.tau`"
        )


def check_writer(tokens: "StudyTokens", writer: str, learner: str) -> None:
    """Check that a student can train on recorded text of another model. Raises ConfigError if their tokenizers differ."""
    if not tokens.hands_over_ids(writer, learner):
        raise ConfigError(
            f"{learner} trains on the recorded text of {writer} (sampler `student` with `recorded: true`), but their tokenizers differ "
            f"({tokens.sizes(writer, learner)}), and the teacher's outputs on this text are recorded token by token; remove `recorded`"
        )


# --- teachers that differ from their model in the recipe ------------------------------------------------------------------


def check_itself(recipe: Recipe, name: str, arm: Arm, teacher: str, learner: str, method: Method) -> None:
    """Check that a student of the arm `name` does not learn from an exact copy of itself, and that the arm can use `ema`.

    With `ema`, the teacher is a moving average of the student.

    Raises:
        ConfigError: teacher and student have the same weights and read the same prompts, so the loss would be 0. Or `ema` is set, but the
            teacher is another model than the student. Or `ema` is set in a control.
    """
    if method.ema is not None and teacher != learner:
        raise ConfigError(
            f"arms.{name}: with `ema`, the teacher is a moving average of the student, but in `{arm.text}`, {teacher} teaches {learner}; "
            f"write `{learner} > {learner}`, or remove `ema`"
        )
    if method.ema is not None and arm.controls:
        raise ConfigError(
            f"arms.{name} is a control (`{arm.control}`), whose teacher must not change, but with `ema`, the teacher follows the student; "
            f"set `ema` in arms.{arm.controls.arm}, not in the recipe's `method`"
        )
    same = _is_students_prompt(recipe, method.context)
    if teacher != learner or not method.uses_teacher or (method.context and not same):
        return
    prompt = ", and the teacher's `context` is exactly the student's prompt" if same else ""
    if method.ema is None:
        raise ConfigError(
            f"arms.{name}: in `{arm.text}`, {learner} teaches itself{prompt}, so there is nothing to learn; give the teacher a prompt of "
            "its own (`context`), or name an older checkpoint of the model as teacher (`models.NAME: {checkpoint: {of: MODEL, step: N}}`)"
        )
    if not method.objective.imitates_text:
        raise ConfigError(
            f"arms.{name}: with `ema`, student and teacher begin with the same weights and read the same prompts{prompt}, so there is "
            "nothing to learn; give the teacher a prompt of its own (`context`), such as `{output} {prompt}`"
        )


def _is_students_prompt(recipe: Recipe, context: TeacherContext | None) -> bool:
    if context is None or context.template != "{prompt}" or context.system is not None:
        return False
    return recipe.data.template != "chat" if context.chat is None else not context.chat  # a chat template would write a turn around it


def contexts_of(recipe: Recipe) -> dict[TeacherContext, set[str]]:
    """Return every `context` (own prompt of a teacher) of a recipe, with the names of the models that teach with it.

    Equal contexts are one entry. Models behind an API are left out, because they get messages and not tokens.

    Raises:
        ConfigError: settings of an arm's method do not fit together.
    """
    found: dict[TeacherContext, set[str]] = {}
    for name, arm in recipe.arms.items():
        with about(f"arms.{name}"):
            for method, teachers, _ in distillations(recipe, arm):
                if method.context:
                    names = {name for name in flat(teachers) if not recipe.models[name].api}
                    found.setdefault(method.context, set()).update(names)
    return {context: names for context, names in found.items() if names}


PathOf = Callable[[str, int], list[Handle]]
"""A function that returns the models of an arm's path, given the arm's name and a seed."""


def teaching(
    stages: "StageBuilder", name: str, arm: Arm, head: str, made: Mapping[str, Handle], seed: int, path_of: PathOf
) -> list[tuple[str, Handle]]:
    """Return name and model of each teacher at the start of a path. In a control, a teacher can have random weights or another temperature.

    Args:
        head: the first part of the path: a model, or the teachers of a route.
        made: the models of the arm by name.

    Raises:
        ConfigError: the control changes a teacher that is served, or the teachers of a route.
    """
    control = arm.controls
    if control is None or control.kind == "no_teacher":
        return [(model, made[model]) for model in members(head)]
    if is_route(head):
        raise ConfigError(
            f"arms.{name}.control is `{arm.control}`, but in `{head}` several models teach; use `no_teacher of {control.arm}`, or name an "
            "arm with one teacher"
        )
    teacher = made[head]
    if isinstance(teacher, BehindApi):
        raise ConfigError(
            f"arms.{name}.control is `{arm.control}`, but {head} is behind an API, so its weights and logits cannot be changed; remove "
            f"arms.{name}, or use the control `no_teacher`"
        )
    if is_served(teacher):
        raise ConfigError(
            f"arms.{name}.control is `{arm.control}`, but {head} is served, so its weights and logits cannot be changed here; remove "
            f"`serve` of {head}, or remove arms.{name}"
        )
    if control.kind == "random_teacher":
        return [(head, RandomWeights(random=seed, of=teacher))]
    like = stages.recipe.arms[control.arm].last[-2], path_of(control.arm, seed)[-2]
    return [(head, stages.tempered(head, teacher, like, control.arm, seed))]
