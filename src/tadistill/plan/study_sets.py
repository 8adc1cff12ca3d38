"""The data sets of a study as inputs of stages. Hundreds of stages use the same rows, so each set is looked at once."""

from collections.abc import Sequence
from typing import Any, Literal

from tadistill.config import DataRef, Recipe
from tadistill.data import datasets
from tadistill.plan.inputs import Split


class StudySets:
    """The training sets, the dev set and the test sets of a recipe."""

    def __init__(self, recipe: Recipe):
        self.data = recipe.data
        self._known: dict[tuple[str, str, int | None], Split] = {}

    def training(self, sets: Sequence[str] = (), *, weights: bool = False, rows: int | None = None) -> dict[str, Any]:
        """Return the fields of a stage that name its training sets.

        Args:
            sets: the names of the sets, in any order. By default, they are all sets of the recipe.
            weights: also return the share of each set, if there are several.
            rows: the number of rows of each set. By default, it is the recipe's `data.limit.train`.
        """
        names = [name for name in self.data.sets if name in sets or not sets]
        train, *more = (self._split(self.data.sets[name], "train", rows or self.data.limit.train) for name in names)
        found: dict[str, Any] = {"train": train, "more": tuple(more)}
        if not (weights and more):
            return found
        total = sum(self.data.shares[name] for name in names)
        return found | {"weights": tuple(self.data.shares[name] / total for name in names)}

    def dev(self, limit: int | None = None) -> Split:
        """Return the dev set. `limit` is the number of rows to use. Its default is the recipe's `data.limit.dev`."""
        return self._split(self.data.dev, "dev", limit or self.data.limit.dev)

    def test(self) -> tuple[Split, ...]:
        """Return all test sets."""
        return tuple(self._split(ref, "test", self.data.limit.test) for ref in self.data.test)

    def _split(self, ref: DataRef, role: Literal["train", "dev", "test"], limit: int | None) -> Split:
        key = role, ref.name, limit
        if key not in self._known:
            self._known[key] = Split(ref=ref, fingerprint=datasets.fingerprint(ref, role, self.data), role=role, limit=limit)
        return self._known[key]
