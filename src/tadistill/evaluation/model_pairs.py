"""Compare two models: a student with its teacher and assistants, a learner with a teacher, two models with different tokenizers.

Axes: N tokens, V vocabulary. q is the student, and p_T is the teacher.

The error budget shows how much each model of a path adds to the student's divergence from the teacher. For a path T > A1 > … > Ak > q
with k assistants:

    KL(q ‖ p_T) = KL(q ‖ p_Ak) + E_q[log p_Ak - log p_A(k-1)] + … + E_q[log p_A1 - log p_T]

The first term is the distance to the last assistant, which taught the student. Each other term compares two neighbours of the path: a
(nearer to T) and b (nearer to q). Such a term is KL(q ‖ p_a) - KL(q ‖ p_b), and may be negative. All terms are means over the tokens of
the student's own answers.

Exposure bias follows MiniLLM (arXiv:2306.08543, section 3.4). It compares KL(p ‖ q) after text that the student sampled with KL(p ‖ q)
after text that the teacher sampled. The value at a position is the mean over the answers that are long enough. MiniLLM's released code
differs: it counts an error of 0 where an answer has ended, and it ignores the first token.
"""

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tadistill.data.batch import Sequence, references
from tadistill.data.encoding import Encoded, EvalSet
from tadistill.data.encoding_rules import Counts, Rules
from tadistill.data.retokenised_answers import Answer, Retokenised, retokenised, said
from tadistill.data.token_bytes import token_bytes
from tadistill.evaluation.token_scores import (
    Answers,
    PerToken,
    Subject,
    bits_per_byte,
    divergences,
    likelihood,
    means,
    per_token,
    token_entropy,
)
from tadistill.models.teachers import Teacher
from tadistill.objectives import forward_kl, log_probs, reverse_kl

ON_OWN_TEXT = ("reverse_kl", "overlap", "mass", "entropy_gap")
"""The metrics of `pair_measures` that are computed on the answers of the model that learns."""
Exposure = dict[str, dict[str, list[float]]]
"""Maps `student` and `teacher`, the writers of the answers, to two lists: `kl`, the mean KL(teacher ‖ student) at each position of these
answers; and `count`, the number of answers that reach the position."""


def analyse(
    subject: Subject,
    data: EvalSet,
    answers: Answers,
    teacher_answers: Answers,
    *,
    others: Seq[PreTrainedModel | Teacher],
    batch: int,
    tick: Callable[[int], None] = lambda n: None,
) -> tuple[dict[str, list[list[float]]], Exposure | None]:
    """Compare the subject (the model under evaluation) with the original teacher on one data set.

    Args:
        answers: the subject's own answers.
        teacher_answers: the teacher's answers to the same prompts. Without them, the exposure bias is not measured.
        others: the original teacher, then the assistants between it and the subject. The first assistant is next to the teacher.
        tick: called after each batch with the number of sequences in the batch.

    Returns:
        Two things: values and curves. The values are {metric: [prompt][decoding seed]}. forward_kl is measured on the references, and
        reverse_kl on the subject's answers. If there are assistants, budget/0, budget/1, … are the terms of the error budget: see the
        formula in the docstring of this file. The curves show the exposure bias. They are None if it is not measured.
    """
    teacher, *assistants = others
    (on_references,) = divergences(subject, references(data.encoded), [teacher], batch=batch, tick=tick)
    columns: dict[str, list[np.ndarray]] = {}
    of_student: list[np.ndarray] = []
    for of_seed in answers.values():
        beside = divergences(subject, of_seed, others, batch=batch, tick=tick)
        of_student += beside[0]["forward_kl"]
        kl = [means(found["reverse_kl"]) for found in beside]
        columns.setdefault("reverse_kl", []).append(kl[0])
        if assistants:
            budget = [kl[-1], *(upper - lower for lower, upper in pairwise(reversed(kl)))]
            for j, term in enumerate(budget):
                columns.setdefault(f"budget/{j}", []).append(term)
    scores = {"forward_kl": means(on_references["forward_kl"])[:, None].tolist()}
    scores |= {name: np.stack(column, axis=1).tolist() for name, column in columns.items()}
    if not teacher_answers:
        return scores, None
    of_teacher: list[np.ndarray] = []
    for of_seed in teacher_answers.values():
        of_teacher += divergences(subject, of_seed, [teacher], batch=batch, tick=tick)[0]["forward_kl"]
    return scores, {"student": _by_position(of_student), "teacher": _by_position(of_teacher)}


def _by_position(per_token: Seq[np.ndarray]) -> dict[str, list[float]]:
    total, count = (np.zeros(max(map(len, per_token))) for _ in range(2))
    for values in per_token:
        total[: len(values)] += values
        count[: len(values)] += 1
    return {"kl": (total / count).tolist(), "count": count.tolist()}


# --- how well a teacher suits a learner ---------------------------------------------------------------------------------------


def overlap(student_logits: Tensor, teacher_logits: Tensor, *, k: int) -> Tensor:
    """Return the share (N,) of the teacher's `k` most probable tokens that are also among the student's `k` most probable ones.

    This measure is from Li et al. 2026 (arXiv:2604.13016).
    """
    k = min(k, student_logits.shape[-1])
    mine, theirs = student_logits.topk(k).indices, teacher_logits.topk(k).indices
    return (mine.unsqueeze(-1) == theirs.unsqueeze(-2)).any(-1).float().mean(-1)


def mass(student_logits: Tensor, teacher_logits: Tensor, *, k: int) -> Tensor:
    """Return the total probability (N,) that the student gives to the teacher's `k` most probable tokens.

    A value far below 1 means that the student rarely uses these tokens.
    """
    theirs = teacher_logits.topk(min(k, teacher_logits.shape[-1])).indices
    return log_probs(student_logits).gather(-1, theirs).exp().sum(-1)


def entropy_gap(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Return the teacher's entropy minus the student's entropy at each token (N,), in nats."""
    return token_entropy(teacher_logits) - token_entropy(student_logits)


def pair_measures(
    learner: Subject, teacher: PreTrainedModel | Teacher, *, own: Seq[Sequence], references: Seq[Sequence], k: int, batch: int
) -> PerToken:
    """Return metrics that show how well a teacher suits a learner (a student or an assistant), at each token.

    forward_kl is computed on the references, and all other metrics (`ON_OWN_TEXT`) on the learner's own answers `own`.
    """

    def of_answers(logits: Tensor, teachers: tuple, tokens: Tensor) -> Tensor:
        (other,) = teachers
        found = (reverse_kl(logits, other), overlap(logits, other, k=k), mass(logits, other, k=k), entropy_gap(logits, other))
        return torch.stack(found)

    def of_references(logits: Tensor, teachers: tuple, tokens: Tensor) -> Tensor:
        return forward_kl(logits, teachers[0]).unsqueeze(0)

    found = per_token(learner, own, ON_OWN_TEXT, of_answers, batch=batch, others=[teacher])
    return found | per_token(learner, references, ("forward_kl",), of_references, batch=batch, others=[teacher])


# --- answers of a model with another tokenizer ------------------------------------------------------------------------------


@dataclass(frozen=True)
class CrossReading:
    """The bits per byte of N answers for two models: the writer, which sampled the answers, and the reader, which has another tokenizer."""

    writer: np.ndarray
    """(N,) the bits per byte for the writer, of the tokens that it sampled, up to the first place that is not text."""
    reader: np.ndarray
    """(N,) the bits per byte for the reader. The text of each answer is encoded with its own tokenizer, after its own prompt."""
    early: int
    """Number of answers that contain something other than text: a special token before the end, or bytes that are not UTF-8, such as half a
    character. Only what is before this place counts for both models."""
    unknown: int
    """Number of the reader's tokens of the answers that are its unknown token."""


def cross_read(
    writer: Subject, reader: Subject, data: EvalSet, rules: Rules, answers: Mapping[int, Sequence], *, batch: int
) -> CrossReading:
    """Compute the bits per byte of a model's answers for this model, the writer, and for another model, the reader.

    Args:
        data: the test set, encoded for the reader.
        rules: the rules for encoding text for the reader.
        answers: maps a row number to the prompt and the sampled answer, in the writer's tokens. The rows are in ascending order, and
            `data.encoded` contains all of them.
    """
    own = token_bytes(writer.tokenizer, writer.eos)
    texts = [said(row, answer.response, own) for row, answer in answers.items()]
    losses = likelihood(writer, [*answers.values()], batch=batch)["loss"]
    written = [loss[: text.tokens] for loss, text in zip(losses, texts, strict=True)]
    rules, found = replace(rules, long_responses="cut"), Retokenised((), Counts(0), 0, 0)
    encoded: dict[int, Encoded] = {}
    for found in retokenised(data.examples, [text.answer for text in texts], reader.tokenizer, rules, name=f"data set `{data.name}`"):
        encoded |= {e.row: e for e in found.encoded}
    read = dict(zip(encoded, likelihood(reader, references([*encoded.values()]), batch=batch)["loss"], strict=True))
    assert all(answer.row in encoded or not (answer.text or answer.ended) for answer, *_ in texts)
    theirs = [_kept(answer, encoded.get(answer.row), reader, rules) for answer, *_ in texts]
    nats = [read.get(answer.row, np.zeros(0)) for answer, *_ in texts]
    mine = bits_per_byte(written, [text.size for text in texts])
    return CrossReading(mine, bits_per_byte(nats, theirs), sum(bool(text.why) for text in texts), found.unknown)


def _kept(answer: Answer, encoded: Encoded | None, reader: Subject, rules: Rules) -> int:
    # the number of bytes of an answer in the reader's tokens, because a long answer is cut
    if encoded is None or len(encoded.prompt) + len(encoded.response) < rules.max_length or encoded.response[-1] in reader.eos:
        return len(answer.text.encode())
    pieces = token_bytes(reader.tokenizer, reader.eos).spell(encoded.response).pieces
    return sum(len(piece) for piece in pieces if isinstance(piece, bytes))
