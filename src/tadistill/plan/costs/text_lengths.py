"""The lengths of the texts that stages read, in tokens: of some training sets, of the dev set and of the corpus."""

from functools import cached_property
from typing import Any, Literal, Self

from tadistill.config import DataRef, Recipe
from tadistill.config.context import TeacherContext
from tadistill.config.data import Turns
from tadistill.data import datasets, hub
from tadistill.data.prompts import of_one_turn
from tadistill.data.survey import Survey, survey
from tadistill.errors import NotHere
from tadistill.plan.costs import passes
from tadistill.plan.costs.model_sizes import ModelSizes
from tadistill.plan.costs.passes import Texts
from tadistill.plan.costs.second_lengths import second_lengths
from tadistill.plan.costs.stand_in import StandIn

_READ = ("sets", "context", "weights", "route", "readers", "teachers")
"""The fields that say what is read, and by whom."""


class TextLengths(ModelSizes):
    """The lengths of a recipe's texts, and the sizes of its models. They are read once and cached."""

    def __init__(self, recipe: Recipe, *, partial: bool = False):
        """With `partial`, a method raises NotHere if it needs a data set that is neither on this disk nor on a Hub that can be reached."""
        super().__init__(recipe)
        self.partial = partial
        self.sets, self.context = tuple(recipe.data.sets), None
        self.weights, self.route = (), ()
        self.readers: tuple[str, ...] = ()
        self.teachers: tuple[str, ...] = ()
        self._others: dict[tuple, Self] = {}

    sets: tuple[str, ...]
    """Names of the training sets that are read."""
    context: TeacherContext | None
    """The prompt of the teachers' own."""
    weights: tuple[float, ...]
    """The share of each set in the rows. Empty if all rows are read."""
    route: tuple[int, ...]
    """The number of each set's teacher. Empty if every teacher reads all sets."""

    def _survey(self, ref: DataRef, role: Literal["train", "dev"]) -> Survey:
        data = self.recipe.data
        if self.partial and (place := datasets.on_hub(ref, role, data)):
            here = hub.cached(place[0], ref.revision, place[1]) is not None
            if not here and not hub.reachable():
                raise NotHere(f"data set `{ref.load}` ({role}) is not on this disk; run `tadistill fetch RECIPE` with a network")
        return survey(ref, role, data)

    @property
    def rows(self) -> int:
        """Number of rows of all these sets, including rows that are too long."""
        return sum(rows.rows for _, rows in self._train)

    @cached_property
    def _train(self) -> list[tuple[DataRef, Survey]]:
        refs = [self.recipe.data.sets[name] for name in self.sets]
        return [(ref, self._survey(ref, "train")) for ref in refs]

    @cached_property
    def train(self) -> Texts:
        """The lengths of the training prompts and their references."""
        return self._train_texts(of_one_turn(self.recipe.data.turns))

    @cached_property
    def fixed(self) -> Texts:
        """The lengths of the training set's own text. With `data.turns: all`, a row has several turns."""
        return self._train_texts(self.recipe.data.turns) if self.recipe.data.turns == "all" else self.train

    def _train_texts(self, turns: Turns) -> Texts:
        return passes.together([self._read(ref, rows, turns) for ref, rows in self._train], self.weights, self.route)

    def _read(self, ref: DataRef, rows: Survey, turns: Turns) -> Texts:
        if not self.teachers:
            return passes.read_lengths(self.reading, ref, "train", rows, turns=turns, context=self.context)
        other = self._other(readers=self.teachers, teachers=()).reading
        mine = passes.read_lengths(self.reading, ref, "train", rows, turns=turns)
        theirs = passes.read_lengths(other, ref, "train", rows, turns=of_one_turn(turns), context=self.context)
        return second_lengths(mine, theirs, rows, StandIn(self.reading), StandIn(other))

    def of_texts(
        self, sets: tuple[str, ...], context: TeacherContext | None = None, weights: tuple[float, ...] = (), route: tuple[int, ...] = ()
    ) -> Self:
        """Return a copy for some training sets, for teachers with prompts of their own, or for teachers with sets of their own."""
        return self._other(sets=sets, context=context, weights=weights, route=route)

    def of(self, readers: tuple[str, ...], teachers: tuple[str, ...] = ()) -> Self:
        """Return a copy that counts tokens with the tokenizer of the models `readers`, which share it. By default, it is that of the
        recipe's first model. `teachers` share the tokenizer of the teachers, if it is another one."""
        return self._other(readers=readers, teachers=() if teachers == readers else teachers)

    def _other(self, **changes: Any) -> Self:
        wanted = {name: changes.get(name, getattr(self, name)) for name in _READ}
        key = tuple(wanted.values())
        if key == tuple(getattr(self, name) for name in _READ):
            return self
        if key not in self._others:
            self._others[key] = other = type(self)(self.recipe, partial=self.partial)
            for name, value in wanted.items():
                setattr(other, name, value)
        return self._others[key]

    @property
    def reading(self) -> Recipe:
        """The recipe with only the models whose tokenizer counts the tokens, and with their template."""
        models = {name: model for name, model in self.recipe.models.items() if name in self.readers or not self.readers}
        return self.recipe.model_copy(update={"models": models, "data": self.recipe.data_of(models)})

    @cached_property
    def dev(self) -> list[Texts]:
        """The lengths of the prompts and references of each dev set of the training sets that are read."""
        refs = self.recipe.data.dev_sets(self.sets).values()
        return [passes.read_lengths(self.reading, ref, "dev", self._survey(ref, "dev")) for ref in refs]

    @cached_property
    def corpus_length(self) -> int:
        """Number of tokens in one row of the plain-text corpus."""
        return passes.chunk(self.reading)
