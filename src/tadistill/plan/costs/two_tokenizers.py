"""The lengths of the student's rows in the tokens of a teacher with another tokenizer.

As in training (`data.alignment`), both tokenisations of a reference are cut into spans at their common token boundaries. Here, boundaries
are positions of characters, not of bytes, and torch is not needed.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tadistill.data.survey import Survey

if TYPE_CHECKING:
    from tadistill.plan.costs.light_tokenizer import StandIn
    from tadistill.plan.costs.passes import Texts


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


def second_lengths(mine: "Texts", theirs: "Texts", rows: Survey, student: "StandIn", teacher: "StandIn") -> "Texts":
    """Return a split's lengths for the student (`mine`), with the attribute `seconds`: the lengths of the same rows for the teacher.

    `theirs` has the lengths of the teacher's prompts. A row that one of the two models leaves out is left out here too.
    """
    prompts = theirs.contexts or tuple(prompt for prompt, _ in theirs.rows)
    read = dict(zip(theirs.places, prompts, strict=True))
    texts = dict(zip(rows.places, (example.references[0] for example in rows.sample), strict=True))
    kept = [i for i, place in enumerate(mine.places) if place in read]
    seconds = [
        _second(read[mine.places[i]], mine.rows[i][1], student.cuts(texts[mine.places[i]]), teacher.cuts(texts[mine.places[i]]))
        for i in kept
    ]
    found = replace(mine, rows=tuple(mine.rows[i] for i in kept), places=tuple(mine.places[i] for i in kept), contexts=())
    return replace(found, count=mine.count * len(kept) / len(mine.rows), seconds=tuple(seconds))


def _second(prompt: int, response: int, mine: list[int], theirs: list[int]) -> SecondLength:
    # each model ends the answer with one token; in a response that was cut, tokens and spans are reduced by the same factor
    ends = sorted({*mine} & {*theirs})
    whole = SecondLength(prompt, len(theirs) + 1, len(ends) + 1, len(mine) - len(ends))
    return whole.scaled(response / (len(mine) + 1)) if response < len(mine) + 1 else whole
