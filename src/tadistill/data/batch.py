"""Sequences of token ids (`Sequence`), and padded batches of them (`Batch`).

Axes: B sequences, T positions. At position t, the model predicts token t + 1. The mask and all values of token t + 1 are therefore stored
at position t. Only this module makes this shift.
"""

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tadistill.data.encoding import Encoded, with_bos
from tadistill.data.other_tokenizer import Aligned, SecondReading, counted_spans, runs
from tadistill.data.token_cache import row_numbers
from tadistill.data.training_sets import Lazy
from tadistill.disk import stream_jsonl
from tadistill.errors import DataError
from tadistill.objectives import Hidden, Sampled, TargetMixture, TopK
from tadistill.objectives.targets import select

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sequence:
    """Token ids of a prompt and its response, with data about the tokens of the response."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]
    """The response to the prompt. In a sequence of several turns, this is the response of the last turn."""
    values: dict[str, np.ndarray] = field(default_factory=dict)
    """Maps a name to an array with one number per response token, for example the log-probability during sampling."""
    states: tuple[Tensor, ...] = ()
    """The teachers' last hidden states at the positions that predict the response: one tensor (response tokens, H) per teacher."""
    teacher_prompt: tuple[int, ...] | None = None
    """The prompt that the teachers get in place of `prompt`. None if they get `prompt`."""
    spans: tuple[tuple[int, int], ...] = ()
    """The parts that count in the loss, as pairs (start, end) of token indices, counted from the start of the prompt; `end` is excluded.
    Empty if the whole response counts. If the teacher has its own prompt, all these parts lie in the response."""
    second: SecondReading | None = None
    """The response in the tokens of a teacher with another tokenizer. None if teacher and student have the same tokenizer."""
    teacher: int | None = None
    """The index of the only teacher that teaches on this sequence. None if all teachers teach on it."""

    @property
    def of_teacher(self) -> "Sequence":
        """The sequence that the teacher gets: its own prompt if it has one, and this response, without values and states.

        If the teacher has another tokenizer, only tokens in a span (`data.alignment`) count in the loss.
        """
        if self.second is not None:
            assert self.teacher_prompt is not None
            kept = counted_spans(self)[1] >= 0
            return Sequence(self.teacher_prompt, tuple(self.second.ids.tolist()), spans=runs(kept, len(self.teacher_prompt)))
        prompt, shift = self.prompt, 0
        if self.teacher_prompt is not None:
            prompt, shift = self.teacher_prompt, len(self.teacher_prompt) - len(self.prompt)
        spans = tuple((start + shift, end + shift) for start, end in self.spans)
        return Sequence(prompt, self.response, spans=spans, teacher=self.teacher)

    @property
    def parts(self) -> tuple[tuple[int, int], ...]:
        """The parts (start, end) of the sequence that count in the loss. The first token of a sequence never counts, because nothing
        predicts it."""
        return self.spans or ((max(len(self.prompt), 1), len(self.prompt) + len(self.response)),)

    @property
    def counted(self) -> int:
        """Number of tokens that count in the loss."""
        return sum(end - start for start, end in self.parts)


@dataclass(frozen=True)
class Places:
    """Indices of the tokens that a batch's loss needs. They are computed on the CPU, so that no forward pass waits for the GPU.

    A position of the loss is an element of the batch (B, T) at which the mask is True. Column t has all rows' elements at position t.
    """

    end: int
    """Number of columns that the loss needs, at least 1. Later columns do not influence the loss."""
    columns: Tensor
    """(C,) the columns that contain a position of the loss."""
    loss: Tensor
    """(N,) the positions of the loss in the flattened batch (B T), in ascending order."""
    tokens: Tensor
    """(M,) the tokens that the loss needs in the flattened batch (B T): those up to the last position of the loss in each row."""
    lengths: tuple[int, ...]
    """The number of `tokens` in each row. Rows without such tokens are left out."""

    @classmethod
    def of(cls, attention_BT: Tensor, mask_BT: Tensor) -> "Places":
        """Compute the indices from the two masks of a batch. If `mask_BT` selects no token, `tokens` is the first token of the batch."""
        columns = mask_BT.any(0).nonzero().squeeze(1)
        needed = (mask_BT.flip(1).cumsum(1).flip(1) > 0) & attention_BT.bool()
        if not len(columns):
            needed[0, 0] = True
        loss, tokens = (mask.flatten().nonzero().squeeze(1) for mask in (mask_BT, needed))
        lengths = tuple(n for n in needed.sum(1).tolist() if n)
        return cls(int(columns[-1]) + 1 if len(columns) else 1, columns, loss, tokens, lengths)

    def to(self, device: torch.device) -> "Places":
        """Return the indices as tensors on `device`."""
        columns, loss, tokens = (index.to(device, non_blocking=True) for index in (self.columns, self.loss, self.tokens))
        return Places(self.end, columns, loss, tokens, self.lengths)


@dataclass(frozen=True)
class Batch:
    """Sequences that are padded on the right, ready for a forward pass and a loss."""

    ids_BT: Tensor
    attention_BT: Tensor
    """1 at real tokens, and 0 at padding."""
    mask_BT: Tensor
    """True at the positions whose prediction of the next token is a part of the loss."""
    values: dict[str, Tensor] = field(default_factory=dict)
    """Maps a name, as in `Sequence.values`, to float32 numbers of shape (B, T). They are 0 where the mask is False."""
    corpus: "Batch | None" = None
    """A batch of plain text for an additional language-modelling loss. None if there is no such loss."""
    targets: tuple[Hidden | TopK | Sampled, ...] = ()
    """The recorded outputs of each teacher at the positions where the mask is True, in row-major order. If the teacher has another
    tokenizer (`aligned`), they are the outputs that predict `Aligned.tokens`, the teacher's tokens in spans. Empty if nothing was recorded
    before training."""
    mixture: TargetMixture | None = None
    """The weights of the teachers in this update, if there are several teachers."""
    context: "Batch | None" = None
    """The batch of the same responses after the teacher's own prompts. None if the teacher gets the student's prompts."""
    aligned: Aligned | None = None
    """The spans that this batch and `context` share, if the teacher has another tokenizer. The responses in `context` are then in the
    teacher's tokens. None if the teacher has the student's tokenizer."""
    route: tuple[int, ...] = ()
    """The index of each row's teacher. Empty if every teacher teaches on all rows. If the route is not empty, recorded `targets` have one
    element for each element of `shares`."""

    @property
    def of_teacher(self) -> "Batch":
        """The batch that the teachers get: `context`, or this batch if `context` is None. In both batches, the same response tokens count
        in the loss, in the same order, unless the teacher has another tokenizer (`aligned`)."""
        return self.context or self

    @property
    def targets_BT(self) -> Tensor:
        """The token that follows each position. It has no meaning where the mask is False."""
        return self.ids_BT.roll(-1, dims=1)

    @property
    def positions_BT(self) -> Tensor:
        """The position ids (B, T). They start at 0 in every sequence."""
        return (self.attention_BT.cumsum(1) - 1).clamp(min=0)

    @cached_property
    def places(self) -> Places:
        """The indices of the batch's tokens. `to` computes them before it moves the batch, and then moves them too."""
        return Places.of(self.attention_BT, self.mask_BT)

    @cached_property
    def shares(self) -> tuple["Share", ...]:
        """The rows of each teacher, in the order of the teachers' indices. Empty without a `route`. `to` computes the shares before it
        moves the batch, and then moves them too."""
        return tuple(Share.of(self, teacher, rows).to(self.ids_BT.device) for teacher, rows in _grouped(self.route).items())

    def of_share(self, number: int) -> "Batch":
        """Return the rows of one teacher as a batch. `number` is the index of the teacher's share in `shares`."""
        share = self.shares[number]
        ids, attention, mask = (t.index_select(0, share.rows) for t in (self.ids_BT, self.attention_BT, self.mask_BT))
        values = {name: value.index_select(0, share.rows) for name, value in self.values.items()}
        context = self.context.of_share(number) if self.context else None
        targets, route = self.targets[number : number + 1], (share.teacher,) * len(share.rows)
        found = Batch(ids, attention, mask, values, None, targets, self.mixture, context, route=route)
        vars(found)["places"] = share.places
        return found

    def counted(self, values_BT: Tensor) -> Tensor:
        """Return the values (N,) at the positions where the mask is True, in row-major order."""
        return values_BT.flatten().index_select(0, self.places.loss)

    def first(self, rows: int) -> "Batch":
        """Return the first `rows` sequences as a batch. Its `corpus` is None."""
        mask, kept = self.mask_BT[:rows], self.route[:rows]
        aligned = self.aligned and self.aligned.first(rows, int(mask.sum()))
        by_teacher = _grouped(kept)
        read = [by_teacher.get(k, []) for k in _grouped(self.route)] if kept else [slice(None)] * len(self.targets)
        known = ((t, mask[own]) for t, own in zip(self.targets, read, strict=False) if not kept or own)
        targets: Any = tuple(select(t, slice(0, len(aligned.teacher) if aligned else int(part.sum()))) for t, part in known)
        values = {k: v[:rows] for k, v in self.values.items()}
        context = self.context.first(rows) if self.context else None
        return Batch(self.ids_BT[:rows], self.attention_BT[:rows], mask, values, None, targets, self.mixture, context, aligned, kept)

    def to(self, device: torch.device) -> "Batch":
        """Return the batch with all its tensors on `device`."""
        ids, attention, mask, *values = (
            t.to(device, non_blocking=True) for t in (self.ids_BT, self.attention_BT, self.mask_BT, *self.values.values())
        )
        corpus, context = (part.to(device) if part else None for part in (self.corpus, self.context))
        named, targets = dict(zip(self.values, values, strict=True)), tuple(t.to(device) for t in self.targets)
        aligned = self.aligned and self.aligned.to(device)
        moved = Batch(ids, attention, mask, named, corpus, targets, self.mixture, context, aligned, self.route)
        vars(moved)["places"] = self.places.to(device)
        vars(moved)["shares"] = tuple(share.to(device) for share in self.shares)
        return moved


@dataclass(frozen=True)
class Share:
    """The rows of a batch on which one teacher teaches. Like `Places`, a share is computed on the CPU."""

    teacher: int
    rows: Tensor
    """(n,) the indices of the rows, in ascending order."""
    loss: Tensor
    """(m,) the tokens of these rows that count in the loss, as indices from 0 to N - 1 of the N tokens that count in the whole batch."""
    places: Places
    """The indices of the tokens in a batch of only these rows."""

    @classmethod
    def of(cls, batch: Batch, teacher: int, rows: list[int]) -> "Share":
        """Return the share of one teacher. `rows` are the indices of its rows in the batch."""
        chosen = torch.zeros(len(batch.ids_BT), dtype=torch.bool)
        chosen[rows] = True
        mask = batch.mask_BT.cpu()
        loss = chosen.unsqueeze(1).expand_as(mask)[mask].nonzero().squeeze(1)
        return cls(teacher, torch.tensor(rows), loss, Places.of(batch.attention_BT.cpu()[rows], mask[rows]))

    def to(self, device: torch.device) -> "Share":
        """Return the share with its indices on `device`."""
        rows, loss = (index.to(device, non_blocking=True) for index in (self.rows, self.loss))
        return Share(self.teacher, rows, loss, self.places.to(device))


def taught(sequences: Seq[Sequence]) -> dict[int, list[int]]:
    """Return a mapping from each teacher's index to the indices of its sequences. Empty if every teacher teaches on all sequences."""
    return _grouped([s.teacher for s in sequences if s.teacher is not None])


def _grouped(route: Seq[int]) -> dict[int, list[int]]:
    return {teacher: [row for row, other in enumerate(route) if other == teacher] for teacher in sorted(set(route))}


def references(encoded: Seq[Encoded]) -> Seq[Sequence]:
    """Return one sequence per prompt. Its response is the first reference. The rows of a large set are read from the disk when they are
    used."""

    def read(i: int) -> Sequence:
        row = encoded[i]
        return Sequence(row.prompt, row.response, teacher_prompt=row.teacher_prompt, spans=row.spans)

    return [*map(read, range(len(encoded)))] if isinstance(encoded, list | tuple) else Lazy(len(encoded), read)


def responses(file: Path, encoded: Seq[Encoded] = ()) -> Seq[Sequence]:
    """Return the prompts and responses in a JSON Lines file. The file is checked now, but each row stays on the disk until it is used.

    Args:
        encoded: the examples that the responses answer, in the order of the file. They are needed if the teacher has its own prompts.

    Raises:
        StoreError: the file is missing or damaged.
    """
    places, _ = _answers_in(file, file.stat().st_mtime_ns if file.is_file() else 0)

    def read(i: int) -> Sequence:
        _, row = next(stream_jsonl(file, start=int(places[i])))
        return Sequence(tuple(row["prompt"]), tuple(row["response"]), teacher_prompt=encoded[i].teacher_prompt if encoded else None)

    return Lazy(len(places), read)


def answered_rows(file: Path, encoded: Seq[Encoded]) -> np.ndarray:
    """Return, for each response in a JSON Lines file, the index of its row in the split.

    If the file leaves out rows, each of its lines contains the index of the line's row. Otherwise, the file has one response for each row
    of `encoded`, in the same order.
    """
    _, numbers = _answers_in(file, file.stat().st_mtime_ns if file.is_file() else 0)
    return row_numbers(encoded) if numbers is None else numbers


@lru_cache(maxsize=1)
def _answers_in(file: Path, mtime_ns: int) -> tuple[np.ndarray, np.ndarray | None]:
    # the offset of each line in bytes, and the index of its row in the split; cached for `responses` and `answered_rows`
    rows = [(place, row.get("row")) for place, row in stream_jsonl(file)]
    places, numbers = [place for place, _ in rows], [number for _, number in rows]
    return np.array(places, np.int64), None if None in numbers else np.array(numbers, np.int64)


def chunks(documents: Iterable[str], tokenizer: "PreTrainedTokenizerBase", length: int, limit: int, *, bos: bool = False) -> list[Sequence]:
    """Return at most `limit` sequences of plain text, each of `length` tokens. The documents are joined, with EOS after each, and then cut.

    A shorter piece at the end is dropped, unless it is the only one. With `bos`, the first token of every sequence is BOS. MiniLLM prepares
    its pre-training text in the same way.

    Raises:
        DataError: the documents contain no text.
    """
    ids: list[int] = []
    length -= bos
    for document in documents:
        ids += [*tokenizer(document, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        if len(ids) >= limit * length:
            break
    if len(ids) < 2:
        raise DataError("the corpus contains no text; set data.corpus to a file with at least one document")
    whole = range(0, min(len(ids) - length, (limit - 1) * length) + 1, length) or [0]
    pieces = [ids[i : i + length] for i in whole]
    return [Sequence((), tuple(with_bos(piece, tokenizer) if bos else piece)) for piece in pieces]


def by_length(sequences: Seq[Sequence], size: int) -> list[list[int]]:
    """Return the indices of the sequences in batches of `size`. Sequences of similar length are in the same batch, so there is little
    padding."""
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i].prompt) + len(sequences[i].response))
    return [order[start : start + size] for start in range(0, len(order), size)]


def collate(sequences: Seq[Sequence], *, pad: int, corpus: Batch | None = None, targets: tuple[Hidden | TopK | Sampled, ...] = ()) -> Batch:
    """Return the sequences as one batch, padded on the right. If a prompt is empty, all tokens except the first are predicted.

    If the teacher has its own prompts and `targets` is empty, the result contains a second batch (`Batch.context`): the teacher's prompts
    with the same responses. If the teacher has another tokenizer, the second batch has the teacher's tokens.
    """
    rows, width = len(sequences), max(len(s.prompt) + len(s.response) for s in sequences)
    ids = np.full((rows, width), pad, np.int64)
    attention = np.zeros((rows, width), np.int64)
    mask = np.zeros((rows, width), bool)
    values = {name: np.zeros((rows, width), np.float32) for name in sequences[0].values}
    for b, s in enumerate(sequences):
        n, end = len(s.prompt), len(s.prompt) + len(s.response)
        ids[b, :end] = (*s.prompt, *s.response)
        attention[b, :end] = 1
        for first, after in s.parts:
            mask[b, first - 1 : after - 1] = True
        for name, array in values.items():
            array[b, n - 1 : end - 1] = s.values[name]
    tensors = {k: torch.from_numpy(v) for k, v in values.items()}
    own = not targets and any(s.teacher_prompt is not None for s in sequences)  # recorded outputs need no teacher
    aligned = Aligned.of(sequences) if any(s.second is not None for s in sequences) else None
    # no model reads the padding, but its embedding is looked up: 0 is a token of every model
    context = collate([s.of_teacher for s in sequences], pad=0 if aligned else pad) if own else None
    route = tuple(s.teacher for s in sequences if s.teacher is not None)
    masks = torch.from_numpy(attention), torch.from_numpy(mask)
    return Batch(torch.from_numpy(ids), *masks, tensors, corpus, targets, context=context, aligned=aligned, route=route)
