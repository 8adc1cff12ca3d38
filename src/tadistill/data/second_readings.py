"""Second readings: the responses of a student in the tokens of a teacher with another tokenizer, and the spans of both.

    again = Rereader(token_bytes(student_tokenizer), token_bytes(teacher_tokenizer))
    sequences = again.each(references(encoded))     # each sequence gets its `second` reading when it is used
    batch = collate(sequences[:8], pad=pad)         # batch.context is in the teacher's tokens; batch.aligned has the spans

`data.alignment` finds the spans of a text. Here they are numbered in sequences and batches, as the losses need them.

Axes: N positions of the loss in the student's batch, M in the teacher's batch.
"""

from collections import OrderedDict
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor

from tadistill.data.alignment import NO_SPAN, align, read_again, shared_tokens
from tadistill.data.encoded import row_numbers
from tadistill.data.token_bytes import TokenBytes
from tadistill.data.training_sets import Lazy
from tadistill.errors import DataError

if TYPE_CHECKING:
    from tadistill.data.batch import Sequence
    from tadistill.data.templates import Encoded

Row = TypeVar("Row", "Sequence", "Encoded")
_KEPT = 50_000  # second readings of a data set that are kept: about 2 KB for an answer of 200 tokens
_NOTHING: dict[str, int] = dict.fromkeys(("spans", "single", "tokens", "left_out", "lone", "changed", "dropped"), 0)


@dataclass(frozen=True, eq=False)
class SecondReading:
    """A response in the teacher's tokens, and the spans of both tokenisations."""

    ids: np.ndarray
    """The teacher's tokens, int32."""
    student: np.ndarray
    """The span of each token of the response, int32, or `NO_SPAN`."""
    teacher: np.ndarray
    """The span of each of the teacher's tokens, int32, or `NO_SPAN`."""
    matched: np.ndarray
    """True for a token of the response that is a span by itself, if the teacher reads there one token, which both vocabularies share."""
    lone: int = 0
    changed: int = 0
    dropped: int = 0
    """Numbers of bytes, as in `data.token_bytes.Reading`. `changed` and `dropped` count those of both readings."""


@dataclass(frozen=True)
class Rereader:
    """Reads a student's responses with the tokenizer of its teacher."""

    student: TokenBytes
    teacher: TokenBytes
    sizes: tuple[int, int]
    """The number of tokens of both vocabularies that the models' output heads have."""
    most: int | None = None
    """Number of tokens that the teacher can read, prompt and response together. Tokens after them are in no span."""

    @cached_property
    def shared(self) -> dict[int, int]:
        """The teacher's token for each token of the student that both vocabularies have."""
        pairs = zip(*shared_tokens(self.student, self.teacher), strict=True)
        return {mine: theirs for mine, theirs in pairs if mine < self.sizes[0] and theirs < self.sizes[1]}

    @cached_property
    def _partner(self) -> np.ndarray:
        found = np.full(len(self.student.pieces), -1)  # -1 is a token that only the student has
        found[[*self.shared]] = [*self.shared.values()]
        return found

    def __call__(self, sequence: "Sequence") -> "Sequence":
        """Return the sequence, with the teacher's tokens of its response added. The response must follow a prompt.

        Raises:
            DataError: the teacher's prompt leaves no room for a response in the text that the teacher can read.
        """
        return replace(sequence, second=self._read(sequence))

    def each(self, sequences: Seq["Sequence"]) -> Seq["Sequence"]:
        """Return the sequences with the teacher's tokens of their responses, which are made when a sequence is first used."""
        known = OrderedDict[int, SecondReading]()

        def read(i: int) -> "Sequence":
            if i in known:
                return replace(sequences[i], second=known[i])
            found = self(sequences[i])
            assert found.second is not None
            known[i] = found.second
            if len(known) > _KEPT:
                known.popitem(last=False)
            return found

        return Lazy(len(sequences), read)

    def _read(self, sequence: "Sequence") -> SecondReading:
        assert sequence.teacher_prompt is not None, "a teacher with another tokenizer reads a prompt of its own"
        own, found = read_again(sequence.response, self.student, self.teacher)
        if self.most is not None:
            room = self.most - len(sequence.teacher_prompt)
            if room < 1:
                raise DataError(
                    f"a prompt has {len(sequence.teacher_prompt)} tokens of the teacher, but the teacher can read only {self.most}; lower "
                    "data.max_prompt"
                )
            found = replace(found, ids=found.ids[:room], pieces=found.pieces[:room], exact=found.exact[:room])
        spans = align(own, found)
        of_student, ids = np.full(len(sequence.response), NO_SPAN, np.int32), np.array(found.ids, np.int32)
        of_student[: len(spans.student)] = spans.student
        of_teacher = np.array(spans.teacher, np.int32)
        mine, theirs, matched = _alone(of_student), _alone(of_teacher), np.zeros(len(of_student), bool)
        read = np.full(len(spans.ends) + 1, -2)  # the only token of the teacher in each span; -2 is no token
        read[of_teacher[theirs]] = ids[theirs]
        matched[mine] = self._partner[np.array(own.ids, np.int64)[mine]] == read[of_student[mine]]
        changed, dropped = (getattr(own, name) + getattr(found, name) for name in ("changed", "dropped"))
        return SecondReading(ids, of_student, of_teacher, matched, found.lone, changed, dropped)


class Behind(Lazy[Row]):
    """Rows or responses of a student, together with the prompts of a teacher that has another tokenizer.

    A row that only the student can read is left out. `left_out` is their number.
    """

    def __init__(self, rows: Seq[Row], numbers: np.ndarray, of_teacher: Seq["Encoded"]):
        """`numbers` are the indices of the rows in their split, each once. `of_teacher` are rows of the same split, encoded for the
        teacher."""
        _, mine, theirs = np.intersect1d(numbers, row_numbers(of_teacher), assume_unique=True, return_indices=True)
        order = np.argsort(mine)
        mine, theirs = mine[order], theirs[order]
        self.left_out = len(rows) - len(mine)

        def read(i: int) -> Row:
            teacher = of_teacher[int(theirs[i])]
            return replace(rows[int(mine[i])], teacher_prompt=teacher.teacher_prompt or teacher.prompt)

        super().__init__(len(mine), read)


def _alone(spans: np.ndarray) -> np.ndarray:
    """Return the indices of the tokens that are a whole span."""
    return np.flatnonzero((spans >= 0) & (np.bincount(spans + 1)[spans + 1] == 1)) if len(spans) else np.zeros(0, np.int64)


def counted_spans(sequence: "Sequence") -> tuple[np.ndarray, np.ndarray]:
    """Return the index of the span of each of the student's tokens of a response, and of each of the teacher's tokens.

    A span is left out (`NO_SPAN`) if one of its tokens does not count in the loss.
    """
    assert sequence.second is not None, "the sequence has no second reading"
    mine, theirs = sequence.second.student, sequence.second.teacher
    counts = np.zeros(len(mine), bool)
    for first, after in sequence.parts:
        counts[first - len(sequence.prompt) : after - len(sequence.prompt)] = True
    kept = np.ones(int(max(mine.max(initial=NO_SPAN), theirs.max(initial=NO_SPAN))) + 2, bool)
    kept[mine[~counts]] = False
    kept[NO_SPAN] = False  # the last place stands for tokens without a span
    numbers = np.where(kept, kept.cumsum() - 1, NO_SPAN)
    return numbers[mine], numbers[theirs]


def runs(counts: np.ndarray, start: int) -> tuple[tuple[int, int], ...]:
    """Return the start and the end of each run of True values. The first value has the index `start`. Without a True value, return one
    empty run."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], counts, [0]]))) + start
    return tuple(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)) or ((start, start),)


def at_span_ends(sequence: "Sequence", scores: np.ndarray) -> np.ndarray:
    """Return one value per token of the student. The last token of a span has the sum of the teacher's `scores` in the span. All other
    tokens have 0.

    Args:
        scores: one float for each of the teacher's tokens that is in a span.
    """
    mine, theirs = counted_spans(sequence)
    theirs = theirs[theirs >= 0]
    found = np.zeros(len(mine), scores.dtype)
    if len(theirs):
        sums = np.zeros(theirs[-1] + 1, scores.dtype)
        np.add.at(sums, theirs, scores)
        last = np.flatnonzero((mine >= 0) & (mine != np.append(mine[1:], NO_SPAN)))
        found[last] = sums[mine[last]]
    return found


@dataclass(frozen=True)
class Aligned:
    """The spans of a batch whose teacher has another tokenizer. They are numbered from 0 through the whole batch."""

    student: Tensor
    """(N,) the span of each position of the loss in the student's batch, in ascending order. `NO_SPAN` is a token that is in no span."""
    teacher: Tensor
    """(M,) the span of each of the teacher's tokens that are in a span."""
    tokens: Tensor
    """(M,) these tokens. They are those of the loss in the teacher's batch (`Batch.context`)."""
    of_rows: tuple[int, ...]
    """Number of spans in each row."""
    found: Mapping[str, int]
    """Counts for the log: `spans`; `single`, the spans of one shared token; `tokens` of the student that count in the loss;
    `left_out`, those of them in no span; and the bytes `lone`, `changed` and `dropped` of `SecondReading`."""

    @property
    def count(self) -> int:
        """Number of spans."""
        return sum(self.of_rows)

    @classmethod
    def of(cls, sequences: Seq["Sequence"]) -> "Aligned":
        """Return the spans of the sequences of a batch. Each sequence must contain the teacher's tokens of its response."""
        mine, theirs, tokens, of_rows, found = list[np.ndarray](), list[np.ndarray](), list[np.ndarray](), list[int](), _NOTHING
        for s in sequences:
            student, teacher = counted_spans(s)
            assert s.second is not None
            parts = [slice(first - len(s.prompt), after - len(s.prompt)) for first, after in s.parts]
            of_loss, matched = (np.concatenate([values[part] for part in parts]) for values in (student, s.second.matched))
            tokens.append(s.second.ids[teacher >= 0])
            teacher = teacher[teacher >= 0]
            count, start = int(teacher.max(initial=NO_SPAN)) + 1, sum(of_rows)
            new = {"spans": count, "single": int((matched & (of_loss >= 0)).sum()), "tokens": len(of_loss)}
            new |= {"left_out": int((of_loss < 0).sum()), "lone": s.second.lone, "changed": s.second.changed, "dropped": s.second.dropped}
            found = {name: n + new[name] for name, n in found.items()}
            mine.append(np.where(of_loss >= 0, of_loss + start, NO_SPAN))
            theirs.append(teacher + start)
            of_rows.append(count)
        student, teacher, ids = (torch.from_numpy(np.concatenate(part).astype(np.int64)) for part in (mine, theirs, tokens))
        return cls(student, teacher, ids, tuple(of_rows), found)

    def to(self, device: torch.device) -> "Aligned":
        """Return the spans on `device`."""
        student, teacher, tokens = (part.to(device, non_blocking=True) for part in (self.student, self.teacher, self.tokens))
        return replace(self, student=student, teacher=teacher, tokens=tokens)

    def first(self, rows: int, tokens: int) -> "Aligned":
        """Return the spans of the first `rows` rows, which have the first `tokens` positions of the loss. `found` stays as it is."""
        kept = self.teacher < sum(self.of_rows[:rows])
        return Aligned(self.student[:tokens], self.teacher[kept], self.tokens[kept], self.of_rows[:rows], self.found)
