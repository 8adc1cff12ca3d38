"""The tokenizers of the two models at each edge of a path: which edges need the same tokens on both sides.

An edge is a step of a path, such as `A > B`. Its method decides what the two models must have in common:

    only text passes (SeqKD: `cross_entropy` on the teacher's answers)     any two tokenizers
    a loss, a sampler or a metric compares tokens                          tokenizers of one family (`StudyTokens.alike`)

`Method.by_token` names the setting that compares tokens. Weights, temperatures and recorded teacher outputs also pass only within a family.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tadistill.config import Method
from tadistill.errors import ConfigError

if TYPE_CHECKING:
    from tadistill.plan.study_tokens import StudyTokens

_TEXT_ONLY = "use a method that hands over text (`seqkd`), or models with one tokenizer"


def check_edge(tokens: "StudyTokens", arm: str, teachers: Sequence[str], learner: str, method: Method) -> None:
    """Check that a student's tokenizer allows a method with its teachers.

    Raises:
        ConfigError: the method compares tokens, but a teacher has other tokens than the student.
    """
    if method.by_token is None:
        return
    for teacher in teachers:
        if not tokens.alike(teacher, learner):
            raise ConfigError(
                f"arms.{arm}: {teacher} teaches {learner} with {method.by_token}, which compares the two models token by token, but their "
                f"tokenizers differ ({tokens.sizes(teacher, learner)}); {_TEXT_ONLY}"
            )


def check_weights(tokens: "StudyTokens", name: str, source: str) -> None:
    """Check that a model can start from the weights of another one. Raises ConfigError if their tokenizers differ."""
    if not tokens.alike(name, source):
        raise ConfigError(
            f"{name} cannot start from {source}, because their tokenizers differ ({tokens.sizes(name, source)}), so the rows of the "
            "embeddings belong to different tokens; choose models with one tokenizer"
        )


def check_like(tokens: "StudyTokens", name: str, like: str, arm: str) -> None:
    """Check that a model's temperature can be set like that of an arm's last model. Raises ConfigError if their tokenizers differ."""
    if not tokens.alike(name, like):
        raise ConfigError(
            f"models.{name}.temper.like is `{arm}`, whose model {like} has another tokenizer ({tokens.sizes(name, like)}), so their "
            "entropies per token cannot be compared; name an arm with the same tokenizer, or set `temper.tau`"
        )


def check_writer(tokens: "StudyTokens", writer: str, learner: str) -> None:
    """Check that a student can train on text that another model of the path recorded. Raises ConfigError if their tokenizers differ."""
    if not tokens.hands_over_ids(writer, learner):
        raise ConfigError(
            f"{learner} trains on the recorded text of {writer} (sampler `student` with `recorded: true`), but their tokenizers differ "
            f"({tokens.sizes(writer, learner)}), and the teacher's outputs on this text are recorded token by token; remove `recorded`"
        )
