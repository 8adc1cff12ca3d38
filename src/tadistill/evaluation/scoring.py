"""Compute metrics that have a value at every token of an answer, such as loss or KL. They compare a model with a text or with other models.

To save memory, logits exist only for a few tokens at a time. Axes: N tokens, V vocabulary. q is the student, and p_T is the teacher.

The error budget shows how much each model of a path adds to the student's divergence from the teacher. For a path T > A1 > … > Ak > q
with k assistants:

    KL(q ‖ p_T) = KL(q ‖ p_Ak) + E_q[log p_Ak - log p_A(k-1)] + … + E_q[log p_A1 - log p_T]

The student's training minimised the first term. Each other term compares two neighbours of the path: a (nearer to T) and b (nearer to q).
Such a term is KL(q ‖ p_a) - KL(q ‖ p_b), and may be negative. All terms are means over the tokens of the student's own answers.

Exposure bias follows MiniLLM (arXiv:2306.08543, section 3.4). It compares KL(p ‖ q) after text that the student sampled with KL(p ‖ q)
after text that the teacher sampled. The value at a position is the mean over the answers that are long enough. MiniLLM's released code
differs: it counts an error of 0 where an answer has ended, and it ignores the first token.
"""

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tadistill.data.batch import Sequence, by_length, collate, references
from tadistill.data.encoding import EvalSet
from tadistill.models.forward import Reader
from tadistill.models.teachers import Teacher, teacher_of
from tadistill.objectives import cross_entropy, forward_kl, fused_head, log_probs, reverse_kl

Answers = Mapping[int, Seq[Sequence]]
"""Maps a decoding seed to one answer per prompt."""
PerToken = dict[str, list[np.ndarray]]
"""Maps a metric to one array per sequence. An array has one value per response token."""


@dataclass(frozen=True)
class Subject:
    """The model under evaluation, with its tokenizer, vocabulary size and end tokens."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    vocab: int
    eos: tuple[int, ...]
    """Ids of the tokens that end an answer."""

    @property
    def pad(self) -> int:
        """A token id for padding. Any id works, because padded positions are never read."""
        eos = self.tokenizer.eos_token_id
        assert isinstance(eos, int)
        return eos


def likelihood(subject: Subject, sequences: Seq[Sequence], *, batch: int) -> PerToken:
    """Return three values at each response token: `loss`, `confidence` and `correct`.

    `loss` is -log q of the token, in nats. `confidence` is the largest probability of any token. `correct` is 1 if the token is the most
    probable one, else 0.
    """

    def values(logits: Tensor, targets: tuple, tokens: Tensor) -> Tensor:
        best, token = log_probs(logits).max(-1)
        return torch.stack([cross_entropy(logits, tokens), best.exp(), (token == tokens).float()])

    return per_token(subject, sequences, ("loss", "confidence", "correct"), values, batch=batch)


def token_entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the entropy (N,) of softmax(logits / temperature) in nats. The logits have the shape (N, V)."""
    log_q = log_probs(logits, temperature)
    return -(log_q.exp() * log_q).sum(-1)


def entropy(subject: Subject, sequences: Seq[Sequence], *, batch: int, temperature: float) -> list[np.ndarray]:
    """Return the entropy (nats) of the model's distribution at each token of the answers. It is 0 at temperature 0."""
    if temperature == 0:
        return [np.zeros(len(s.response)) for s in sequences]

    def values(logits: Tensor, targets: tuple, tokens: Tensor) -> Tensor:
        return token_entropy(logits, temperature).unsqueeze(0)

    return per_token(subject, sequences, ("entropy",), values, batch=batch)["entropy"]


def divergences(
    subject: Subject,
    sequences: Seq[Sequence],
    others: Seq[PreTrainedModel | Teacher],
    *,
    batch: int,
    tick: Callable[[int], None] = lambda n: None,
) -> list[PerToken]:
    """Return `forward_kl` and `reverse_kl` at each response token, for each model in `others`.

    forward_kl = KL(p ‖ q) and reverse_kl = KL(q ‖ p), in nats. q is the subject and p is the other model. Both are exact sums over the
    vocabulary. After each batch, `tick` is called with the number of sequences in the batch.
    """
    names = tuple(f"{name} {i}" for i in range(len(others)) for name in ("forward_kl", "reverse_kl"))

    def values(logits: Tensor, targets: tuple, tokens: Tensor) -> Tensor:
        return torch.stack([kl(logits, target) for target in targets for kl in (forward_kl, reverse_kl)])

    found = per_token(subject, sequences, names, values, batch=batch, others=others, tick=tick)
    return [{name: found[f"{name} {i}"] for name in ("forward_kl", "reverse_kl")} for i in range(len(others))]


def means(per_token: list[np.ndarray]) -> np.ndarray:
    """Return one number per sequence: the mean over its tokens."""
    return np.array([values.mean() for values in per_token])


@torch.no_grad()
def per_token(
    subject: Subject,
    sequences: Seq[Sequence],
    names: tuple[str, ...],
    values: Callable[[Tensor, tuple, Tensor], Tensor],
    *,
    batch: int,
    others: Seq[PreTrainedModel | Teacher] = (),
    tick: Callable[[int], None] = lambda n: None,
) -> PerToken:
    """Compute several metrics at every token of the answers.

    `names` are the metrics. `values` computes them for a few tokens at a time. It is called with the subject's logits (N, V), a tuple of
    the other models' logits, and the token ids (N,). It returns a tensor (metrics, N). After each batch, `tick` is called with the number
    of sequences in the batch.
    """
    found: PerToken = {name: [np.empty(0)] * len(sequences) for name in names}
    reader, teachers = Reader(subject.model), [*map(teacher_of, others)]
    for part in by_length(sequences, batch):
        rows = collate([sequences[i] for i in part], pad=subject.pad).to(subject.model.device)
        targets = [teacher.target(rows) for teacher in teachers]
        tokens = rows.counted(rows.targets_BT)

        def of_tile(logits: Tensor, teachers: tuple, at: slice, tokens: Tensor = tokens) -> Tensor:
            return values(logits, teachers, tokens[at])

        hidden, weights = reader.hidden(subject.model, rows), torch.ones(len(names), 1)
        _, tiles = fused_head(hidden, reader.head, of_tile, weights.to(hidden.device), teachers=targets, vocab=subject.vocab)
        ends = rows.mask_BT.sum(1).cumsum(0)[:-1].tolist()
        for name, row in zip(names, tiles.double().cpu().numpy(), strict=True):
            for i, of_sequence in zip(part, np.split(row, ends), strict=True):
                found[name][i] = of_sequence
        tick(len(part))
    return found


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


# --- one teacher and one learner --------------------------------------------------------------------------------------------


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
