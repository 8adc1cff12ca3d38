"""The loss of a batch whose teacher has another tokenizer: divergences over spans, and MiniLLM's rewards of spans.

A span is the text between two neighbouring token boundaries that student and teacher have in common. If the student has the tokens `th` and
`e` where the teacher has `the`, they are one span. `objectives.spans` has the losses, and `data.other_tokenizer` makes the batches. Terms
without a teacher, such as cross-entropy, are summed over the student's tokens, as in any other batch (`train.step`).

Axes: B sequences, T positions, N tokens of the loss, S spans.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tadistill.data.batch import Batch
from tadistill.data.other_tokenizer import CHANGED, STRIPPED, Aligned, Rereader
from tadistill.objectives import Head, Hidden, SpanTokens, span_rewards
from tadistill.objectives.fused_loss import fused_parts, part_of
from tadistill.objectives.next_symbol import SpelledPair
from tadistill.objectives.spans import fused_span_distance, fused_span_divergence, span_log_probs, span_sums
from tadistill.objectives.spelling import SpelledText, SpelledVocabulary
from tadistill.objectives.targets import Target, TeacherTerm
from tadistill.objectives.uld_and_gold import hybrid_distance, sorted_distance

_DELAY = 1  # tokens from a span's end to its reward; then later text can change it at less than 1 % of places (docs/concepts/tokenizers.md)


@dataclass(frozen=True)
class Sides:
    """The outputs of student and teacher at the tokens that count in a batch's loss."""

    student: Tensor
    """(N, H) the student's hidden states, with a graph."""
    head: Head
    teacher: Target
    """The teacher's hidden states that predict its own tokens (`Aligned.tokens`)."""
    again: Rereader
    """The function that encoded the responses with the teacher's tokenizer. It has both vocabularies."""


def divergence(sides: Sides, batch: Batch, term: TeacherTerm, per_span: float) -> Tensor:
    """Return the sum of a term with the teacher over a batch's spans, divided by `per_span`."""
    aligned = batch.aligned
    assert aligned is not None
    assert isinstance(sides.teacher, Hidden), "a teacher with another tokenizer must give hidden states; `tadistill plan` refuses others"
    assert not term.per_token, "a term with `per_token` needs a teacher with the student's tokenizer; `tadistill plan` refuses others"
    kept = aligned.student >= 0
    student = SpanTokens(Hidden(sides.student[kept], sides.head), batch.counted(batch.targets_BT)[kept], aligned.student[kept])
    teacher = SpanTokens(sides.teacher, aligned.tokens, aligned.teacher)
    weights = torch.full((aligned.count,), term.weight / per_span, dtype=torch.float32, device=sides.student.device)
    shared = sides.again.shared_vocabulary
    settings: dict[str, Any] = {**term.settings, "weights": weights, "temperature": term.temperature}
    if term.divergence in (sorted_distance, hybrid_distance):
        settings["weights"] = weights.masked_fill(torch.from_numpy(aligned.unknown).to(weights.device), 0)
        if term.divergence is hybrid_distance:
            settings["shared"] = shared.to(weights.device)
        return fused_span_distance(term.divergence, student, teacher, shared.sizes, **settings)[0]
    if shared.same:  # every span is one token of each model
        part = part_of([term], student.hidden.states, weights.unsqueeze(0), teachers=[teacher.hidden])
        return fused_parts([part], sides.head, vocab=shared.sizes[0])[0]
    pair = _spelled(aligned, sides.again.spelled)
    return fused_span_divergence(term.divergence, student.hidden, teacher.hidden, pair, **settings)[0]


def _spelled(aligned: Aligned, vocabularies: tuple[SpelledVocabulary, SpelledVocabulary]) -> SpelledPair:
    compared = np.ones(aligned.count, bool)
    for text in aligned.texts:
        compared[text.spans[text.marks >= CHANGED]] = False
    # the id of a changed token (one that does not spell its text) can be beyond the head; its span is not compared, so 0 can replace the id
    mine, theirs = (
        SpelledText(v, np.where(t.marks >= CHANGED, 0, t.ids), t.spans, t.marks == STRIPPED, np.zeros(len(t.ids), bool))
        for v, t in zip(vocabularies, aligned.texts, strict=True)
    )
    return SpelledPair.of(mine, theirs, aligned.follows, compared)


def rewards(batches: Sequence[Batch], scaled: Callable[[Tensor], Tensor], total: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Return MiniLLM's rewards log p - log q of spans (texts between common token boundaries) at the student's positions (B, T), for each
    batch of an update.

    `batch.values["teacher"]` has the teacher's log-probability of each span at the span's last token. The reward of a span is placed at the
    first token after the span, because this token of the student can still change where the span ends.

    The teacher cannot judge spans with an unknown token, and tokens in no span. Such text has the mean reward per token of the update's
    other text, times its number of tokens. So it leaves this mean as it is, and counts like any other text of its length with an average
    reward. If an update has no other text, all rewards are 0.

    Args:
        scaled: a function that scales and clips rewards. The mean is that of scaled rewards.
        total: a function that sums a tensor over all processes. Every process calls it, also one without such text.
    """
    places = [_of_rows(batch) for batch in batches]
    judged, sums = list[Tensor](), list[Tensor]()
    for batch, (of_row, unknown_BT) in zip(batches, places, strict=True):
        log_q, log_p = (batch.values[name].masked_fill(unknown_BT, 0) for name in ("student", "teacher"))
        judged.append(scaled(span_rewards(log_q, of_row, log_p, of_row, delay=_DELAY)))
        sums.append(torch.stack([judged[-1].double().sum(), ((of_row >= 0) & ~unknown_BT).sum().double()]))
    reward, tokens = total(torch.stack(sums).sum(0)).unbind()
    mean, found = (reward / tokens.clamp(min=1)).float(), list[Tensor]()
    for own, batch, (of_row, unknown_BT) in zip(judged, batches, places, strict=True):
        in_spans = span_rewards(torch.zeros_like(own), of_row, torch.where(unknown_BT, mean, 0.0), of_row, delay=_DELAY)
        found.append(own + in_spans + torch.where(batch.mask_BT & (of_row < 0), mean, 0.0))
    return found


def _of_rows(batch: Batch) -> tuple[Tensor, Tensor]:
    # (B, T) the number of each token's span in its row, -1 without a span; and whether this span has an unknown token
    assert batch.aligned is not None
    spans_BT = torch.full_like(batch.ids_BT, -1).flatten().index_copy(0, batch.places.loss, batch.aligned.student).view_as(batch.ids_BT)
    first_B1 = torch.where(spans_BT < 0, batch.aligned.count, spans_BT).amin(1, keepdim=True)
    of_row = torch.where(spans_BT < 0, spans_BT, spans_BT - first_B1)
    unknown = torch.from_numpy(np.append(batch.aligned.unknown, False))  # the last element (index -1) is for tokens without a span
    return of_row, unknown.to(spans_BT.device)[spans_BT]


def summed(aligned: Aligned, values: Tensor) -> Tensor:
    """Return the sum (S,) of values (N,) at the student's tokens over each span (text between common token boundaries)."""
    kept = aligned.student >= 0
    return span_sums(values[kept], aligned.student[kept], aligned.count)


def known_rewards(batch: Batch) -> Tensor:
    """Return the sum of log p - log q over a batch's response tokens and their number, as a float64 tensor (2,). If the teacher has another
    tokenizer, these are sum and number of spans (texts between common token boundaries) without an unknown token."""
    found = batch.counted(batch.values["teacher"] - batch.values["student"]).double()
    if batch.aligned is None:
        return torch.stack([found.sum(), found.new_tensor(float(len(found)))])
    known = torch.from_numpy(~batch.aligned.unknown).to(found.device)
    return torch.stack([(summed(batch.aligned, found) * known).sum(), known.sum().double()])


def teacher_log_probs(again: Rereader | None, batch: Batch, teachers: Sequence[Target]) -> Tensor:
    """Return the teacher's log-probability (S,) of each span (text between common token boundaries): from `batch.values["teacher"]` if the
    batch has this value, or else from the teacher's outputs."""
    assert batch.aligned is not None
    if "teacher" in batch.values:
        return summed(batch.aligned, batch.counted(batch.values["teacher"]))
    assert again is not None
    assert isinstance(teachers[0], Hidden)
    return span_log_probs(SpanTokens(teachers[0], batch.aligned.tokens, batch.aligned.teacher), again.sizes[1])


def counts(aligned: Sequence[Aligned]) -> dict[str, int]:
    """Add up the counts of spans and tokens (`Aligned.found`) over several batches. Return an empty dict if there are no counts."""
    names = aligned[0].found if aligned else ()
    return {name: sum(each.found[name] for each in aligned) for name in names}


def metrics(count: Mapping[str, float]) -> dict[str, float]:
    """Return the numbers for the log from the counts of an update. Return an empty dict if student and teacher have one tokenizer.

    spans           number of spans
    single          share of the spans that consist of one token, which is in both vocabularies
    unspelled       share of the spans with a token that does not spell its text. Divergences leave these spans out, and `uld` and `gold`
                    those with an unknown token
    left_out        share of the student's tokens that are in no span or in one with an unknown token
    lone            number of bytes that are not valid UTF-8
    changed         number of bytes that their tokens do not spell
    dropped         number of bytes that are in no token
    """
    if "spans" not in count:
        return {}
    found = {
        "spans": count["spans"],
        "single": count["single"] / max(count["spans"], 1),
        "unspelled": count["unspelled"] / max(count["spans"], 1),
        "left_out": count["left_out"] / max(count["tokens"], 1),
    }
    return {f"spans/{name}": value for name, value in (found | {name: count[name] for name in ("lone", "changed", "dropped")}).items()}
