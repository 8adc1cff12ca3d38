"""The lengths in tokens of the texts that stages use: of training sets, dev sets and the plain-text corpus.

Texts are tokenised without transformers (`light_tokenizer`). As in training, `data.encoding.encode` applies the template, cuts long texts
and leaves rows out.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any, Literal, Self, cast

from tadistill.config import DataRef, Recipe
from tadistill.config.data import Turns
from tadistill.config.method_parts import TeacherContext
from tadistill.data import datasets, hub
from tadistill.data.encoding import Encoded, encode_counted
from tadistill.data.prompts import Rules, of_one_turn
from tadistill.data.survey import Survey, survey
from tadistill.errors import NotHere
from tadistill.plan.costs import passes
from tadistill.plan.costs.light_tokenizer import StandIn
from tadistill.plan.costs.model_sizes import ModelSizes
from tadistill.plan.costs.passes import Texts
from tadistill.plan.costs.two_tokenizers import second_lengths

_ENDLESS = 2**31
_READ = ("sets", "context", "weights", "route", "readers", "teachers")
"""The attributes of `TextLengths` that choose the rows and the tokenizers."""


class TextLengths(ModelSizes):
    """Computes the lengths of a recipe's texts and the sizes of its models, and caches the lengths."""

    def __init__(self, recipe: Recipe, *, partial: bool = False):
        """With `partial`, a method raises NotHere if it needs a data set that is neither on this disk nor on a Hub that can be reached."""
        super().__init__(recipe)
        self.partial = partial
        self.sets = tuple(recipe.data.sets)
        """Names of the training sets whose rows are measured."""
        self.context: TeacherContext | None = None
        """The teachers' own prompt. None if they read the student's prompts."""
        self.weights: tuple[float, ...] = ()
        """The share of each set in the rows. Empty if every row counts once."""
        self.route: tuple[int, ...] = ()
        """The index of each set's teacher. Empty if every teacher teaches on all sets."""
        self.readers: tuple[str, ...] = ()
        self.teachers: tuple[str, ...] = ()
        self._others: dict[tuple, Self] = {}

    def _survey(self, ref: DataRef, role: Literal["train", "dev"]) -> Survey:
        data = self.recipe.data
        if self.partial and (place := datasets.on_hub(ref, role, data)):
            here = hub.cached(place[0], ref.revision, place[1]) is not None
            if not here and not hub.reachable():
                raise NotHere(
                    f"data set `{ref.load}` ({role}) is not on this disk; run `tadistill fetch RECIPE` where the Hub can be reached"
                )
        return survey(ref, role, data)

    @property
    def rows(self) -> int:
        """Number of rows of all `sets`, including rows that are too long."""
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
        """The lengths of the training rows with the recipe's `data.turns`. With `all`, they include every answer of a conversation. The
        lengths in `train` include only the last answer."""
        return self._train_texts(self.recipe.data.turns) if self.recipe.data.turns == "all" else self.train

    def _train_texts(self, turns: Turns) -> Texts:
        return passes.together([self._read(ref, rows, turns) for ref, rows in self._train], self.weights, self.route)

    def _read(self, ref: DataRef, rows: Survey, turns: Turns) -> Texts:
        if not self.teachers:
            return read_lengths(self.reading, ref, "train", rows, turns=turns, context=self.context)
        other = self._other(readers=self.teachers, teachers=()).reading
        mine = read_lengths(self.reading, ref, "train", rows, turns=turns)
        theirs = read_lengths(other, ref, "train", rows, turns=of_one_turn(turns), context=self.context)
        return second_lengths(mine, theirs, rows, StandIn(self.reading), StandIn(other))

    def of_texts(
        self, sets: tuple[str, ...], context: TeacherContext | None = None, weights: tuple[float, ...] = (), route: tuple[int, ...] = ()
    ) -> Self:
        """Return a copy for other training texts. Each argument replaces the attribute of the same name."""
        return self._other(sets=sets, context=context, weights=weights, route=route)

    def of(self, readers: tuple[str, ...], teachers: tuple[str, ...] = ()) -> Self:
        """Return a copy that counts tokens with other tokenizers.

        Args:
            readers: models that share the tokenizer to use. If there are none, the tokenizer of the recipe's first model is used.
            teachers: models that share the teachers' tokenizer. Empty or equal to `readers` if the teachers have the student's tokenizer.
        """
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
        """A copy of the recipe with only the models `readers`, or with all models if `readers` is empty. Its data have their template."""
        models = {name: model for name, model in self.recipe.models.items() if name in self.readers or not self.readers}
        return self.recipe.model_copy(update={"models": models, "data": self.recipe.data_of(models)})

    @cached_property
    def dev(self) -> list[Texts]:
        """The lengths of prompts and references: one entry for each dev set of the training sets `sets`."""
        refs = self.recipe.data.dev_sets(self.sets).values()
        return [read_lengths(self.reading, ref, "dev", self._survey(ref, "dev")) for ref in refs]

    @cached_property
    def corpus_length(self) -> int:
        """Number of tokens in one row of the plain-text corpus."""
        return passes.chunk(self.reading)


def read_lengths(
    recipe: Recipe, ref: DataRef, role: str, rows: Survey, *, turns: Turns | None = None, context: TeacherContext | None = None
) -> Texts:
    """Return the lengths of a split's rows, measured on a sample of its examples.

    Args:
        turns: replaces `data.turns`.
        context: the teacher's own prompt, if it has one.
    """
    data, tokenizer = recipe.data, StandIn(recipe)
    rules = tokenizer.readable(Rules.of(data, role, bos=False, context=context)).lenient
    rules = replace(rules, turns=turns or rules.turns)
    if not tokenizer.known:
        own = context.model_copy(update={"max_prompt": _ENDLESS}) if context else None
        rules = replace(rules, max_prompt=_ENDLESS, max_length=_ENDLESS, context=own)
    limits = data.max_prompt, data.max_length, context.max_prompt if context else 0
    name, of_text = f"data set `{ref.name}` ({role})", (tokenizer.identity, str(rules), limits)
    return _read(_Sample(name, of_text, id(rows), rows, tokenizer, rules))


@dataclass(frozen=True)
class _Sample:
    name: str
    how: tuple[Any, ...]
    number: int  # id of the survey; the cache keeps the survey alive, so no other survey gets this id
    rows: Survey = field(compare=False)
    tokenizer: StandIn = field(compare=False)
    rules: Rules = field(compare=False)


@lru_cache(maxsize=32)  # a command makes several plans, most of the same texts
def _read(asked: _Sample) -> Texts:
    rows, (_, _, (max_prompt, max_length, max_context)) = asked.rows, asked.how
    sample = [replace(example, choices=()) for example in rows.sample]
    found, _ = encode_counted(sample, cast(Any, asked.tokenizer), asked.rules, name=asked.name, rows=rows.places)
    sizes = [(len(e.prompt) + len(e.response) - counted, counted) for e in found for counted in [_counted(e)]]
    sizes = [(min(other, max_prompt, max_length - 1), counted) for other, counted in sizes]
    own = tuple(min(len(e.teacher_prompt), max_context) for e in found if e.teacher_prompt and max_context)
    places = tuple(e.row for e in found)
    return Texts(tuple((p, min(r, max_length - p)) for p, r in sizes), rows.rows * len(sizes) / len(sample), own, places)


def _counted(encoded: Encoded) -> int:
    return sum(end - start for start, end in encoded.spans) if encoded.spans else len(encoded.response)
