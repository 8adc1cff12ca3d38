"""Checks of an arm's path, such as `A > B > C`: no model teaches a bigger one, and the method works with a route.

A path begins with a route if several models teach its first student, each on some of the training sets.
"""

from itertools import pairwise
from typing import TYPE_CHECKING

from tadistill.config import Arm, Method, Recipe
from tadistill.config.arm import path_text
from tadistill.config.objective import MiniLLM
from tadistill.config.route import is_route, members, routed
from tadistill.errors import ConfigError
from tadistill.plan.costs import Ledger
from tadistill.plan.task import original_teacher

if TYPE_CHECKING:
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


def given_teachers(recipe: Recipe, arm: Arm, like: Arm) -> set[str]:
    """Return the teachers whose own training is left out when the FLOPs of `arm` are matched to those of the arm `like`.

    If a path begins with a route, these are the original teacher and the models at the start of both arms' paths, because the two arms can
    start from different models. Without a route, it is the original teacher for `compute: 2x ARM`. For `compute: as ARM`, it is no model,
    because the training of the original teacher usually is in both sums.
    """
    original = original_teacher(recipe)
    if not routed((*arm.path, *like.path)):
        return {original} if original and arm.like and arm.like[0] else set()
    starts = {name for path in (*arm.path, *like.path) for name in members(path[0])}
    return {*starts, *([original] if original else [])} - {*arm.learners, *like.learners}


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
    objective, start = method.objective, f"arms.{arm}: in `{path_text(path)}`, each teacher has its own training rows"
    if method.dense:
        raise ConfigError(f"{start}, so their distributions cannot be averaged; remove `dense`, or use a path such as A > B > C")
    if method.sampler.guided:
        raise ConfigError(f"{start}, so no single teacher can take part in sampling; use `sampler: {{type: student}}`")
    if method.select.metric == "reverse_kl":
        raise ConfigError(f"{start}, but select.metric reverse_kl needs one teacher on dev; set `select.metric` to loss or rouge_l")
    if isinstance(objective, MiniLLM) and objective.needs_corpus and objective.pt_kd_ratio > 0:
        raise ConfigError(f"{start}, but plain text belongs to no set, so it has no teacher; set `pt_kd_ratio: 0` or `pt_weight: 0`")
