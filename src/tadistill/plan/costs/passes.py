"""The lengths of a study's texts in tokens, and the work of running a model on these texts.

Work is a count of token positions, of query-key pairs and of positions with logits. Padding is included.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod

from tadistill.config import Optim
from tadistill.constants import COMPACT_BELOW
from tadistill.models.parameter_counts import Work


@dataclass(frozen=True)
class SecondLength:
    """The lengths of one row for a teacher with another tokenizer."""

    prompt: int
    response: int
    spans: float
    """The number of spans: parts of the text between boundaries that both tokenisations have."""
    before: float
    """Number of the student's tokens that are not the last token of their span."""

    def scaled(self, by: float) -> "SecondLength":
        """Return the lengths of a response that is `by` times as long."""
        return replace(self, response=max(1, round(self.response * by)), spans=self.spans * by, before=self.before * by)


@dataclass(frozen=True)
class Texts:
    """The lengths in tokens of a split's rows, or of a sample of its rows."""

    rows: tuple[tuple[int, int], ...]
    """Pairs (tokens of the prompt, tokens of the response with EOS), for evenly spaced rows."""
    count: float
    """Estimated number of rows of the split, without rows that are too long."""
    contexts: tuple[int, ...] = ()
    """Number of tokens of the teacher's own prompt, for each row. Empty if the teacher reads the student's prompts."""
    places: tuple[int, ...] = ()
    """The index of each row in its split. Empty for several merged sets."""
    seconds: tuple[SecondLength, ...] = ()
    """The lengths of each row in the teacher's tokens. Empty if the teacher has the student's tokenizer."""
    teachers: tuple[int, ...] = ()
    """The index of each row's teacher. Empty if every teacher teaches on all rows."""
    sets: tuple[int, ...] = ()
    """The index of each row's training set. Empty if there is only one set."""

    def taught_by(self, teacher: int) -> tuple["Texts", float]:
        """Return the lengths of the rows that one teacher teaches, in its own tokens, and their share (0 to 1) in all rows.

        `teacher` is the index of the teacher."""
        if not self.teachers:
            return self.of_teacher, 1.0
        places = [i for i, number in enumerate(self.teachers) if number == teacher]
        share, read = len(places) / len(self.rows), self.of_teacher.rows
        return Texts(tuple(read[i] for i in places), self.count * share, sets=tuple(self.sets[i] for i in places)), share

    @property
    def of_teacher(self) -> "Texts":
        """The lengths of the rows as the teacher reads them: in its tokens and, if it has a prompt of its own, with this prompt."""
        if self.seconds:
            return Texts(tuple((s.prompt, s.response) for s in self.seconds), self.count, teachers=self.teachers, sets=self.sets)
        return self._with_prompts([*self.contexts])

    @property
    def longer(self) -> "Texts":
        """The lengths that `optim.tokens` limits. For each row, they are those of the student or of the teacher, whichever reads the longer
        sequence."""
        if self.seconds:
            pairs = zip(self.rows, self.of_teacher.rows, strict=True)
            return Texts(tuple(max(pair, key=sum) for pair in pairs), self.count, teachers=self.teachers, sets=self.sets)
        return self._with_prompts([max(own, prompt) for own, (prompt, _) in zip(self.contexts, self.rows, strict=False)])

    def _with_prompts(self, prompts: list[int]) -> "Texts":
        rows = tuple((prompt, response) for prompt, (_, response) in zip(prompts, self.rows, strict=True)) if prompts else self.rows
        return Texts(rows, self.count, teachers=self.teachers, sets=self.sets)

    @property
    def totals(self) -> list[int]:
        """Number of tokens of prompt and response together, for each row."""
        return [prompt + response for prompt, response in self.rows]

    @property
    def mean_prompt(self) -> float:
        """Mean length of a prompt in tokens."""
        return sum(prompt for prompt, _ in self.rows) / len(self.rows)

    @property
    def mean_response(self) -> float:
        """Mean length of a response in tokens."""
        return sum(response for _, response in self.rows) / len(self.rows)

    def answered(self, most: int, *, endless: bool = False) -> "Texts":
        """Return the lengths with sampled answers in place of the references. The prompts stay the same.

        With `endless`, each answer has `most` tokens. Otherwise it is as long as the reference, up to `most` tokens.
        """
        rows = tuple((prompt, most if endless else min(response, most)) for prompt, response in self.rows)
        scales = [new / old for (_, new), (_, old) in zip(rows, self.rows, strict=True)]
        return replace(self, rows=rows, seconds=tuple(s.scaled(scale) for s, scale in zip(self.seconds, scales, strict=False)))

    def drawn(self, count: int) -> list[tuple[int, int]]:
        """Sort the rows by prompt length and return `count` evenly spaced ones. If there are fewer rows, return all of them."""
        ordered = sorted(self.rows)
        if count >= len(ordered):
            return ordered
        # neighbours have prompts of similar length, so each row keeps its own response
        return [ordered[int((i + 0.5) * len(ordered) / count)] for i in range(count)]


_MIXED = 2048
"""Approximate number of rows in a sample from several merged sets."""


def together(parts: Sequence[Texts], weights: Sequence[float], route: Sequence[int]) -> Texts:
    """Merge the lengths of several data sets, as if they were one set.

    Args:
        weights: the share of each set. Without weights, every row counts once.
        route: the index of the teacher of each set. It is empty if all sets have the same teacher.
    """
    if len(parts) == 1 and not route:
        return parts[0]
    total = sum(part.count for part in parts)
    rows, contexts, teachers, sets = list[tuple[int, int]](), list[int](), list[int](), list[int]()
    seconds = list[SecondLength]()
    for number, part in enumerate(parts):
        wanted = max(1, round(_MIXED * (weights[number] if weights else part.count / total)))
        places = [int((i + 0.5) * len(part.rows) / wanted) for i in range(wanted)]
        rows += [part.rows[i] for i in places]
        contexts += [part.contexts[i] for i in places] if part.contexts else []
        seconds += [part.seconds[i] for i in places] if part.seconds else []
        teachers += [route[number]] * wanted if route else []
        sets += [number] * wanted
    return Texts(tuple(rows), total, tuple(contexts), (), tuple(seconds), tuple(teachers), tuple(sets))


def largest(values: Sequence[float], draws: int, *, power: int = 1) -> float:
    """Return the expected value of (largest drawn value) ** power, if `draws` of the values are drawn at random without replacement."""
    ordered, n = sorted(values), len(values)
    if draws >= n:
        return float(ordered[-1] ** power)
    total, share = 0.0, 1.0  # share: probability that all draws are among the k smallest values
    for k in range(n, draws - 1, -1):
        below = share * (k - draws) / k
        total += (share - below) * ordered[k - 1] ** power
        share = below
    return total


def _longest(texts: Texts, rows: int, drawn: float, *, power: int) -> float:
    # the expected value of (length of the longest of `rows` inputs) ** power. The inputs are a random part of `drawn` sequences, in which
    # each set has its share.
    values = [total - 1 for total in texts.totals]
    if not texts.sets:
        return largest(texts.totals, rows) - 1 if power == 1 else largest(values, rows, power=power)
    groups = [sorted(v for v, own in zip(values, texts.sets, strict=True) if own == number) for number in sorted(set(texts.sets))]
    shares, part = [len(group) / len(values) for group in groups], min(1.0, rows / drawn)
    found = before = 0.0
    for value in sorted(set(values)):
        below = [bisect_right(group, value) / len(group) for group in groups]
        exact = prod(q ** (rows * share) for q, share in zip(below, shares, strict=True))
        mixed = sum(q * share for q, share in zip(below, shares, strict=True)) ** rows
        share = part * exact + (1 - part) * mixed  # probability that no sequence is longer
        found, before = found + (share - before) * value**power, share
    return found


_CALLS = 1.5  # padding factor of attention in `rollout.teacher_mixed_fast`: each call pads its rows to the same number of tokens


@lru_cache
def training_batch(texts: Texts, rows: int, *, packed: bool, drawn: float = 0.0) -> tuple[Work, float]:
    """Return the work of a model on one batch of `rows` shuffled sequences, and the number of padding positions in the batch.

    Sequences are padded to the longest one, as in `models.forward.Reader.hidden`, unless they are `packed`. The last token of a sequence is
    not an input. Logits are computed for responses only.

    Args:
        drawn: with several training sets, the number of sequences that are drawn together. In these sequences, each set has its share. The
            batch is a random part of them.
    """
    if packed:
        read = [total - 1 for total in texts.totals]
        squares = sum(n * n for n in read) / len(read)
        return Work(rows * sum(read) / len(read), rows * squares, rows * texts.mean_response), 0.0
    width, square = (_longest(texts, rows, max(drawn, rows), power=power) for power in (1, 2))
    real = texts.mean_prompt + texts.mean_response - 1
    return Work(rows * width, rows * square, rows * texts.mean_response), rows * (width - real)


def rows_in_pass(optim: Optim, texts: Texts) -> int:
    """Return the number of sequences in a forward pass of training. With `optim.tokens`, it is the number that fits on average."""
    if optim.tokens is None:
        return optim.micro_batch or optim.batch
    texts = texts.longer
    if optim.packed:
        fits = optim.tokens // (sum(texts.totals) / len(texts.totals))
    else:
        fits = next((n - 1 for n in range(1, optim.batch + 1) if n * largest(texts.totals, n) > optim.tokens), optim.batch)
    return max(1, min(optim.batch, int(fits)))


def largest_batch(optim: Optim, texts: Texts, times: float) -> Work:
    """Return the work of one forward pass of training on the largest possible batch. The batch has `times` x `rows_in_pass` sequences.

    Without packing, each sequence is assumed to be as long as the longest text. `optim.tokens` limits the number of token positions.
    """
    width, rows = max(texts.totals) - 1, rows_in_pass(optim, texts) * times
    if optim.packed:
        return training_batch(texts, round(rows), packed=True)[0]
    positions = rows * width if optim.tokens is None else max(min(rows * width, optim.tokens), width)
    return Work(positions, positions * width, rows * texts.mean_response)


def plain_batch(length: int, rows: int) -> Work:
    """Return the work of a model on `rows` rows of the plain-text corpus. All tokens except the first are predicted."""
    return Work(rows * (length - 1), rows * (length - 1) ** 2, rows * (length - 1))


@lru_cache
def pass_by_length(texts: Texts, batch: int, count: float, *, packed: bool = False) -> Work:
    """Return the work of one forward pass over `count` sequences. They are sorted by length and, unless they are `packed`, padded within
    each batch."""
    if packed:
        return training_batch(texts, 1, packed=True)[0] * count
    ordered = sorted(texts.totals)
    most = min(round(count), len(ordered))
    rows = [ordered[int((i + 0.5) * len(ordered) / most)] for i in range(most)]
    total = Work()
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        width = part[-1] - 1
        total += Work(len(part) * width, len(part) * width**2)
    return total * (count / most) + Work(heads=texts.mean_response * count)


@lru_cache
def sampling(texts: Texts, chunk: int, count: int) -> Work:
    """Return the work of sampling answers to `count` prompts with `rollout.engine`, in chunks of prompts of similar length.

    Prompts are padded on the left. Finished answers are removed from the batch, several at a time.
    """
    rows = texts.drawn(count)
    return sum((_decoded(rows[start : start + chunk]) for start in range(0, len(rows), chunk)), Work()) * (count / len(rows))


def _decoded(rows: Sequence[tuple[int, int]]) -> Work:
    width, ends = max(prompt for prompt, _ in rows), sorted(response for _, response in rows)
    alive = len(rows)
    positions, pairs, heads = float(alive * width), float(alive * width**2), float(alive)
    for t in range(1, ends[-1]):  # the last token of an answer is not an input
        going = len(rows) - bisect_right(ends, t)
        if going < COMPACT_BELOW * alive:
            alive = going
        positions, pairs, heads = positions + alive, pairs + alive * (width + t), heads + alive
    return Work(positions, pairs, heads)


@lru_cache
def lazy_sampling(texts: Texts, chunk: int, count: int) -> Work:
    """Return the work of one of the two models in `rollout.teacher_mixed_fast`, which samples from a mixture of student and teacher.

    Each model reads each token once, and computes logits once per response token.
    """
    rows = texts.drawn(count)
    total = Work()
    for start in range(0, len(rows), chunk):
        part = rows[start : start + chunk]
        width = max(prompt for prompt, _ in part)
        total += Work(pairs=len(part) * width**2)
        for prompt, response in part:
            attended = (response - 1) * (prompt + response / 2)
            total += Work(prompt + response - 1, _CALLS * attended, response)
    return total * (count / len(rows))
