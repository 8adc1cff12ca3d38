"""The lengths of a study's texts in the tokens of two models: how a teacher with another tokenizer reads the student's rows.

Both tokenisations of the references are cut at their common boundaries, as `data.alignment` does it in training, but in characters and
without torch.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tadistill.data.survey import Survey

if TYPE_CHECKING:
    from tadistill.plan.costs.passes import Texts
    from tadistill.plan.costs.stand_in import StandIn


@dataclass(frozen=True)
class SecondLength:
    """One row in the tokens of a teacher with another tokenizer."""

    prompt: int
    response: int
    spans: float
    """The number of spans: parts of the text between boundaries that both tokenisations have."""
    before: float
    """Tokens of the student that are not the last of their span."""

    def scaled(self, by: float) -> "SecondLength":
        """Return the lengths of a response that is `by` times as long."""
        return replace(self, response=max(1, round(self.response * by)), spans=self.spans * by, before=self.before * by)


def second_lengths(mine: "Texts", theirs: "Texts", rows: Survey, student: "StandIn", teacher: "StandIn") -> "Texts":
    """Return the student's lengths of a split with those of its teacher (`Texts.seconds`). A row that only one model reads is left out."""
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
    # the end of the answer is one token on both sides; a response that was cut keeps its share of everything
    ends = sorted({*mine} & {*theirs})
    whole = SecondLength(prompt, len(theirs) + 1, len(ends) + 1, len(mine) - len(ends))
    return whole.scaled(response / (len(mine) + 1)) if response < len(mine) + 1 else whole
