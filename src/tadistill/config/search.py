"""Which paths from a teacher to a student may be tried, and what they may cost: for `tadistill search` and `tadistill advise`."""

from typing import Literal

from pydantic import Field, model_validator

from tadistill.config.strict import Strict


class Search(Strict):
    """A lattice of models from big to small, and how to look through it. Paths are compared on the dev set only."""

    teacher: str
    assistants: tuple[str, ...] = Field(min_length=1)
    """Candidates, from big to small."""
    student: str
    strategy: Literal["exhaustive", "single", "best_prefix", "beam", "halving"] = "best_prefix"
    """`exhaustive`: every path; `single`: direct and every single assistant; `best_prefix`: the best way to each model is kept and extended
    (a heuristic: it is right only where a better teacher makes a better student); `beam`: the `width` best ways; `halving`: short runs of
    every path, of which the better half goes on."""
    max_assistants: int | None = Field(default=None, ge=1)
    """Most assistants in a path; any number when absent."""
    budget: float | None = Field(default=None, gt=0)
    """Most that a path may cost, as a multiple of the training FLOPs of the direct path."""
    width: int = Field(default=2, ge=1)
    """Ways kept per model by `beam`."""
    rungs: tuple[float, ...] = Field(default=(0.1, 0.3, 1.0), min_length=1)
    """Shares of every stage's updates in the rungs of `halving`, ending with 1."""

    @model_validator(mode="after")
    def _check(self):
        models = (self.teacher, *self.assistants, self.student)
        for name in models:
            if models.count(name) > 1:
                raise ValueError(f"search names {name} twice; teacher, assistants and student are different models")
        if self.rungs[-1] != 1 or any(a >= b for a, b in zip(self.rungs, self.rungs[1:], strict=False)) or self.rungs[0] <= 0:
            raise ValueError(f"search.rungs are {list(self.rungs)}; write rising shares that end with 1, such as [0.1, 0.3, 1]")
        if self.strategy == "halving" and len(self.rungs) < 2:
            raise ValueError("search.strategy is halving, which needs at least two rungs; write search.rungs, such as [0.1, 0.3, 1]")
        return self
