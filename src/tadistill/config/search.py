"""The settings of the search for the best path of models (`tadistill search` and `tadistill advise`)."""

from typing import Literal

from pydantic import Field, model_validator

from tadistill.config.common import MOST, Strict


class Search(Strict):
    """Settings of `tadistill search` and `tadistill advise`: the models of the paths, and the search strategy. Both commands compare paths
    on the dev set only."""

    teacher: str
    """The first model of every path."""
    assistants: tuple[str, ...] = Field(min_length=1)
    """The models that can be assistants (between teacher and student), from big to small."""
    student: str
    """The last model of every path."""
    strategy: Literal["exhaustive", "single", "best_prefix", "beam", "halving"] = "best_prefix"
    """`exhaustive`: try every path. `single`: try the direct path, and all paths with one assistant. `best_prefix`: for each model, keep
    only the best path to this model, and extend this path. (The result is only right if a better teacher makes a better student.) `beam`:
    for each model, keep and extend the `width` best paths to this model. `halving`: train all paths for a few updates, drop the worse half,
    and repeat with more updates."""
    max_assistants: int | None = Field(default=None, ge=1, le=MOST)
    """Largest number of assistants in a path. By default, there is no limit."""
    budget: float | None = Field(default=None, gt=0)
    """Largest training cost of a path, as a multiple of the training FLOPs of the direct path (without assistants). By default, there is no
    limit."""
    width: int = Field(default=2, ge=1, le=MOST)
    """Number of paths to each model that the strategy `beam` keeps."""
    rungs: tuple[float, ...] = Field(default=(0.1, 0.3, 1.0), min_length=1)
    """The rounds of the strategy `halving`, with one number per round. The number is the length of the training runs in this round, as a
    fraction of all updates. The last number is 1."""

    @model_validator(mode="after")
    def _check(self):
        models = (self.teacher, *self.assistants, self.student)
        for name in models:
            if models.count(name) > 1:
                raise ValueError(f"search names the model {name} twice; teacher, assistants and student must be different models")
        if self.rungs[-1] != 1 or any(a >= b for a, b in zip(self.rungs, self.rungs[1:], strict=False)) or self.rungs[0] <= 0:
            raise ValueError(f"search.rungs are {list(self.rungs)}; write rising fractions that end with 1, such as [0.1, 0.3, 1]")
        if self.strategy == "halving" and len(self.rungs) < 2:
            raise ValueError(
                "search.strategy is `halving`, which needs at least two rungs; set `search.rungs`, for instance to [0.1, 0.3, 1]"
            )
        return self
