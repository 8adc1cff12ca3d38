"""Tokenise a student's responses a second time, with the tokenizer of its teacher, and number the spans of both tokenisations.

    again = Rereader(token_bytes(student_tokenizer), token_bytes(teacher_tokenizer), (student_logits, teacher_logits))
    sequences = again.each(references(Behind(encoded, row_numbers(encoded), encoded_for_teacher)))      # adds `second` at the first use
    batch = collate(sequences[:8], pad=pad)         # batch.context is in the teacher's tokens; batch.aligned has the spans

A span is a part of the text between two token boundaries that both tokenisations have (`data.alignment`). Here the spans are numbered in
sequences and batches, as the losses need them.

Axes: N positions of the loss in the student's batch, M in the teacher's batch.
"""

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor

from tadistill.data.alignment import NO_SPAN, align, cells, read_again, shared_tokens
from tadistill.data.token_bytes import END, Reading, TokenBytes
from tadistill.data.token_cache import row_numbers
from tadistill.data.training_sets import Lazy
from tadistill.errors import DataError
from tadistill.objectives import SharedVocabulary
from tadistill.objectives.spelling import SpelledVocabulary

if TYPE_CHECKING:
    from tadistill.data.batch import Sequence
    from tadistill.data.encoding import Encoded

Row = TypeVar("Row", "Sequence", "Encoded")
SPELLED, STRIPPED, CHANGED, UNKNOWN = 0, 1, 2, 3
"""How the bytes that a token has in a text differ from the token's own bytes: not at all, by a missing first space, or in another way.
`UNKNOWN` is the unknown token, which can stand for any bytes."""
_BYTES = 256
_KEPT = 50_000  # number of a data set's second readings in memory; one has about 2 KB for an answer of 200 tokens


@dataclass(frozen=True, eq=False)
class SecondReading:
    """A response in the teacher's tokens, and the spans: the parts of the text between boundaries of both tokenisations."""

    ids: np.ndarray
    """The teacher's tokens, int32."""
    student: np.ndarray
    """For each token of the response, the number of the span that contains it, int32, or `NO_SPAN`."""
    teacher: np.ndarray
    """For each of the teacher's tokens, the number of the span that contains it, int32, or `NO_SPAN`."""
    matched: np.ndarray
    """One bool per token of the response. True if its span is one token of each model, and both are the same token (`shared_tokens`)."""
    student_marks: np.ndarray
    """For each token of the response, int8: `SPELLED`, `STRIPPED`, `CHANGED` or `UNKNOWN`."""
    teacher_marks: np.ndarray
    """The marks of each of the teacher's tokens, int8."""
    lone: int = 0
    changed: int = 0
    dropped: int = 0
    """Numbers of bytes. `lone` counts bytes that are not valid UTF-8, only in the teacher's tokenisation. `changed` counts bytes that their
    tokens do not spell. `dropped` counts bytes that no token covers. `changed` and `dropped` are sums over both tokenisations."""


@dataclass(frozen=True)
class Rereader:
    """A function that adds second readings to sequences: the student's responses in the tokens of its teacher."""

    student: TokenBytes
    teacher: TokenBytes
    sizes: tuple[int, int]
    """The numbers of logits of the student and of the teacher."""
    most: int | None = None
    """The largest number of tokens that the teacher can read, for prompt and response together. Later tokens are in no span. None means no
    limit."""

    @cached_property
    def shared(self) -> dict[int, int]:
        """The student's id of each token in both vocabularies, mapped to the teacher's id of the same token."""
        pairs = zip(*shared_tokens(self.student, self.teacher), strict=True)
        return {mine: theirs for mine, theirs in pairs if mine < self.sizes[0] and theirs < self.sizes[1]}

    @cached_property
    def shared_vocabulary(self) -> SharedVocabulary:
        """The tokens of `shared`, as tensors."""
        return SharedVocabulary(torch.tensor([*self.shared]), torch.tensor([*self.shared.values()]), self.sizes)

    @cached_property
    def spelled(self) -> tuple[SpelledVocabulary, SpelledVocabulary]:
        """The vocabularies of student and teacher, spelled as symbols: bytes, the end of the text, and special tokens that both have."""
        events = [{piece for piece in side.pieces if isinstance(piece, str)} - {END} for side in (self.student, self.teacher)]
        names = {END: _BYTES, **{name: _BYTES + 1 + k for k, name in enumerate(sorted(events[0] & events[1]))}}

        def symbols(side: TokenBytes, token: int) -> Seq[int] | None:
            piece = side.piece(token) if token < len(side.pieces) else None
            return (names[piece],) if isinstance(piece, str) and piece in names else piece if isinstance(piece, bytes) else None

        found = cells(self.student, self.teacher, self.sizes)
        mine, theirs = (
            SpelledVocabulary.of([symbols(side, token) for token in range(size)], _BYTES + len(names), roots)
            for side, size, roots in zip((self.student, self.teacher), self.sizes, found, strict=True)
        )
        return mine, theirs

    @cached_property
    def _partner(self) -> np.ndarray:
        found = np.full(len(self.student.pieces), -1)  # -1 is a token that only the student has
        found[[*self.shared]] = [*self.shared.values()]
        return found

    def __call__(self, sequence: "Sequence") -> "Sequence":
        """Return the sequence, with the teacher's tokens of its response added. The response must follow a prompt.

        Raises:
            DataError: the teacher's prompt leaves no room for a response in the teacher's context length.
        """
        return replace(sequence, second=self._read(sequence))

    def each(self, sequences: Seq["Sequence"]) -> Seq["Sequence"]:
        """Return the sequences with the teacher's tokens of their responses. A response is tokenised when its sequence is first used."""
        second = lru_cache(_KEPT)(lambda i: self._read(sequences[i]))
        return Lazy(len(sequences), lambda i: replace(sequences[i], second=second(i)))

    def _read(self, sequence: "Sequence") -> SecondReading:
        assert sequence.teacher_prompt is not None, "a sequence needs `teacher_prompt` if the teacher has another tokenizer"
        own, found = read_again(sequence.response, self.student, self.teacher)
        if self.most is not None:
            room = self.most - len(sequence.teacher_prompt)
            if room < 1:
                raise DataError(
                    f"a prompt has {len(sequence.teacher_prompt)} tokens of the teacher, but prompt and response together may have only "
                    f"{self.most}; lower data.max_prompt"
                )
            found = found.first(room)
        spans = align(own, found)
        of_student, ids = np.full(len(sequence.response), NO_SPAN, np.int32), np.array(found.ids, np.int32)
        of_student[: len(spans.student)] = spans.student
        of_teacher = np.array(spans.teacher, np.int32)
        mine, theirs, matched = _alone(of_student), _alone(of_teacher), np.zeros(len(of_student), bool)
        read = np.full(len(spans.ends) + 1, -2)  # the only token of the teacher in each span; -2 is no token
        read[of_teacher[theirs]] = ids[theirs]
        matched[mine] = self._partner[np.array(own.ids, np.int64)[mine]] == read[of_student[mine]]
        changed, dropped = (getattr(own, name) + getattr(found, name) for name in ("changed", "dropped"))
        sides = zip((own, found), (self.student, self.teacher), self.sizes, strict=True)
        mine, theirs = (marks(reading, vocabulary, size) for reading, vocabulary, size in sides)
        mine = np.append(mine, np.full(len(of_student) - len(mine), CHANGED, np.int8))
        return SecondReading(ids, of_student, of_teacher, matched, mine, theirs, found.lone, changed, dropped)


class Behind(Lazy[Row]):
    """Rows or responses of a student, together with the prompts of a teacher that has another tokenizer.

    A row is left out if the teacher has no prompt for it, for example because the prompt is too long. `left_out` counts these rows.
    """

    def __init__(self, rows: Seq[Row], numbers: np.ndarray, of_teacher: Seq["Encoded"]):
        """`numbers` are the indices of the rows in their split, without repetition. `of_teacher` are rows of the same split, encoded for
        the teacher."""
        _, mine, theirs = np.intersect1d(numbers, row_numbers(of_teacher), assume_unique=True, return_indices=True)
        order = np.argsort(mine)
        mine, theirs = mine[order], theirs[order]
        self.left_out = len(rows) - len(mine)

        def read(i: int) -> Row:
            teacher = of_teacher[int(theirs[i])]
            return replace(rows[int(mine[i])], teacher_prompt=teacher.teacher_prompt or teacher.prompt)

        super().__init__(len(mine), read)


def marks(reading: Reading, vocabulary: TokenBytes, size: int) -> np.ndarray:
    """Return `SPELLED`, `STRIPPED`, `CHANGED` or `UNKNOWN` for each token of a text. Only the first word of a text may be `STRIPPED`.

    Args:
        size: the model's number of logits. Larger token ids are `CHANGED`.
    """
    found = np.full(len(reading.ids), CHANGED, np.int8)
    for k, (token, piece, exact) in enumerate(zip(reading.ids, reading.pieces, reading.exact, strict=True)):
        if not exact or token >= size:
            found[k] = UNKNOWN if token == vocabulary.tokenizer.unk_token_id and token < size else CHANGED
            continue
        written = vocabulary.piece(token)
        if written == piece:
            found[k] = SPELLED
        elif isinstance(piece, bytes) and written == b" " + piece and (k == 0 or isinstance(reading.pieces[k - 1], str)):
            found[k] = STRIPPED
    return found


def _alone(spans: np.ndarray) -> np.ndarray:
    """Return the indices of the tokens that are alone in their span. `spans` has the number of each token's span."""
    return np.flatnonzero((spans >= 0) & (np.bincount(spans + 1)[spans + 1] == 1)) if len(spans) else np.zeros(0, np.int64)


def counted_spans(sequence: "Sequence") -> tuple[np.ndarray, np.ndarray]:
    """Return two arrays: the number of the span of each of the student's tokens of a response, and of each of the teacher's tokens.

    A span is left out (`NO_SPAN`) if one of its tokens does not count in the loss. The other spans are numbered from 0.
    """
    assert sequence.second is not None, "the sequence has no `second` reading in the teacher's tokens; add it with a `Rereader`"
    mine, theirs = sequence.second.student, sequence.second.teacher
    counts = _counted(sequence)
    kept = np.ones(int(max(mine.max(initial=NO_SPAN), theirs.max(initial=NO_SPAN))) + 2, bool)
    kept[mine[~counts]] = False
    kept[NO_SPAN] = False  # the last element (index -1) is for tokens without a span
    numbers = np.where(kept, kept.cumsum() - 1, NO_SPAN)
    return numbers[mine], numbers[theirs]


def _counted(sequence: "Sequence") -> np.ndarray:
    """Return one bool per token of the response. It is True if the token counts in the loss."""
    counts = np.zeros(len(sequence.response), bool)
    for first, after in sequence.parts:
        counts[first - len(sequence.prompt) : after - len(sequence.prompt)] = True
    return counts


def runs(counts: np.ndarray, start: int) -> tuple[tuple[int, int], ...]:
    """Return the indices (start, end) of each run of True values; `end` is excluded. The first value has the index `start`. If no value is
    True, return one empty run."""
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
    """(N,) for each of the student's tokens that count in the loss, the index of its span, or `NO_SPAN` for a token in no span."""
    teacher: Tensor
    """(M,) the span of each of the teacher's tokens that are in a span. These tokens count in the loss of `Batch.context`."""
    tokens: Tensor
    """(M,) the ids of the tokens of `teacher`."""
    of_rows: tuple[int, ...]
    """Number of spans in each row."""
    texts: "tuple[SpannedTokens, SpannedTokens]"
    """The student's tokens that are in a span, and the teacher's tokens that are in a span. Both are on the CPU."""
    follows: np.ndarray
    """One bool per span. True if the span before it is in the same row, and no token of student or teacher lies between the two spans."""
    found: Mapping[str, int]
    """Counts for the log. `spans` counts all spans, `single` the spans of one shared token, `unspelled` the spans with a token that is
    `CHANGED` or `UNKNOWN`. `tokens` counts the student's tokens that count in the loss, and `left_out` those of them that are in no span or
    in one with an `UNKNOWN` token. `lone`, `changed` and `dropped` count bytes, as in `SecondReading`."""

    @property
    def count(self) -> int:
        """Number of spans."""
        return sum(self.of_rows)

    @property
    def unknown(self) -> np.ndarray:
        """One bool per span. True if one of its tokens is an `UNKNOWN` one."""
        return np.isin(np.arange(self.count), np.concatenate([text.spans[text.marks == UNKNOWN] for text in self.texts]))

    @classmethod
    def of(cls, sequences: Seq["Sequence"]) -> "Aligned":
        """Number the spans of the sequences of a batch. Each sequence must contain the teacher's tokens of its response (`second`)."""
        each = [_of_row(s) for s in sequences]
        of_rows = tuple(row.count for row in each)
        starts = np.cumsum([0, *of_rows])
        at = [torch.where(row.student >= 0, row.student + int(start), NO_SPAN) for row, start in zip(each, starts, strict=False)]
        mine, theirs = (SpannedTokens.joined([row.texts[k] for row in each], starts) for k in range(2))
        found = {name: sum(row.found[name] for row in each) for name in each[0].found}
        follows = np.concatenate([row.follows for row in each])
        return cls(torch.cat(at), torch.from_numpy(theirs.spans), torch.from_numpy(theirs.ids), of_rows, (mine, theirs), follows, found)

    def to(self, device: torch.device) -> "Aligned":
        """Return the spans on `device`."""
        student, teacher, tokens = (part.to(device, non_blocking=True) for part in (self.student, self.teacher, self.tokens))
        return replace(self, student=student, teacher=teacher, tokens=tokens)

    def first(self, rows: int, tokens: int) -> "Aligned":
        """Return the spans of the first `rows` rows, which have the first `tokens` positions of the loss. `found` is not changed."""
        spans = sum(self.of_rows[:rows])
        mine, theirs = (text.first(spans) for text in self.texts)
        more = len(theirs.ids)
        parts = self.student[:tokens], self.teacher[:more], self.tokens[:more]
        return Aligned(*parts, self.of_rows[:rows], (mine, theirs), self.follows[:spans], self.found)


@dataclass(frozen=True)
class SpannedTokens:
    """The tokens of one model that are in a span, on the CPU."""

    ids: np.ndarray
    spans: np.ndarray
    """The span of each token, in ascending order."""
    marks: np.ndarray
    """The mark of each token, as in `SecondReading`."""

    @classmethod
    def joined(cls, texts: Seq["SpannedTokens"], starts: np.ndarray) -> "SpannedTokens":
        """Join the tokens of several texts. `starts` has the number of the first span of each text."""
        spans = np.concatenate([text.spans + start for text, start in zip(texts, starts, strict=False)])
        return cls(np.concatenate([text.ids for text in texts]), spans, np.concatenate([text.marks for text in texts]))

    def first(self, spans: int) -> "SpannedTokens":
        """Return the tokens of the first `spans` spans."""
        count = int(np.searchsorted(self.spans, spans))
        return SpannedTokens(self.ids[:count], self.spans[:count], self.marks[:count])


def _of_row(s: "Sequence") -> Aligned:
    mine, theirs = (spans.astype(np.int64) for spans in counted_spans(s))
    second = s.second
    assert second is not None
    counts = _counted(s)
    kept = [np.flatnonzero(spans >= 0) for spans in (mine, theirs)]
    follows = np.ones(int(theirs.max(initial=NO_SPAN)) + 1, bool)
    for spans, places in zip((mine, theirs), kept, strict=True):
        first, after = (np.searchsorted(spans[places], np.arange(len(follows)), side) for side in ("left", "right"))
        follows[1:] &= places[first[1:]] == places[after[:-1] - 1] + 1
    follows[:1] = False
    parts = (np.array(s.response, np.int64), mine, second.student_marks), (second.ids.astype(np.int64), theirs, second.teacher_marks)
    unspelled, unknown = (
        np.unique(np.concatenate([spans[places][marks[places] >= mark] for (_, spans, marks), places in zip(parts, kept, strict=True)]))
        for mark in (CHANGED, UNKNOWN)
    )
    found = {"spans": len(follows), "single": int((second.matched & (mine >= 0)).sum())}
    found |= {
        "unspelled": len(unspelled),
        "tokens": int(counts.sum()),
        "left_out": int(np.isin(mine[counts], [NO_SPAN, *unknown]).sum()),
    }
    found |= {"lone": second.lone, "changed": second.changed, "dropped": second.dropped}
    own, other = (SpannedTokens(*(part[places] for part in of_one)) for of_one, places in zip(parts, kept, strict=True))
    student, teacher, ids = (torch.from_numpy(part) for part in (mine[counts], other.spans, other.ids))
    return Aligned(student, teacher, ids, (len(follows),), (own, other), follows, found)
