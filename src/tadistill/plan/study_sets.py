"""The data sets of a study as inputs of stages. Hundreds of stages use the same rows, so each set is hashed only once."""

from collections.abc import Collection, Sequence
from typing import Any, Literal

from tadistill.config import DataRef, Recipe
from tadistill.data import datasets
from tadistill.plan.inputs import Dev, DevSets, Split


class StudySets:
    """The training sets, the dev sets and the test sets of a recipe."""

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
        return found | {"weights": self._shares(names)} if weights and more else found

    def dev(self, sets: Sequence[str] = (), *, prompts: int | None = None) -> Dev:
        """Return the dev set, or the dev sets of some training sets.

        Args:
            sets: the names of the training sets. By default, they are all sets of the recipe.
            prompts: the number of rows to use, divided among the sets by their shares. By default, each set has `data.limit.dev` rows.
        """
        refs = self.data.dev_sets(sets)
        if len(refs) == 1:
            (ref,) = refs.values()
            return self._split(ref, "dev", prompts or self.data.limit.dev)
        shares = self._shares(refs)
        limits = [self.data.limit.dev if prompts is None else max(1, round(prompts * share)) for share in shares]
        splits = tuple(self._split(ref, "dev", limit) for ref, limit in zip(refs.values(), limits, strict=True))
        return DevSets(names=tuple(refs), splits=splits, shares=shares)

    def _shares(self, names: Collection[str]) -> tuple[float, ...]:
        total = sum(self.data.shares[name] for name in names)
        return tuple(self.data.shares[name] / total for name in names)

    def test(self) -> tuple[Split, ...]:
        """Return all test sets."""
        return tuple(self._split(ref, "test", self.data.limit.test) for ref in self.data.test)

    def _split(self, ref: DataRef, role: Literal["train", "dev", "test"], limit: int | None) -> Split:
        key = role, ref.name, limit
        if key not in self._known:
            self._known[key] = Split(ref=ref, fingerprint=datasets.fingerprint(ref, role, self.data), role=role, limit=limit)
        return self._known[key]
