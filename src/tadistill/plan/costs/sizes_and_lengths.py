"""The sizes of a recipe's models, and the lengths in tokens of its texts: of training sets, dev sets and the plain-text corpus.

Sizes come from the models' configurations. Texts are tokenised without transformers (`light_tokenizer`). As in training,
`data.encoding.encode` applies the template, cuts long texts and leaves rows out.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any, Literal, Self, cast

from tadistill.config import DataRef, Recipe
from tadistill.config.data import Turns
from tadistill.config.method_parts import TeacherContext
from tadistill.config.recipe import sampled_tokens
from tadistill.constants import PACKED_FAMILIES
from tadistill.data import datasets, hub, tinyworld
from tadistill.data.encoding import Encoded, encode
from tadistill.data.encoding_rules import Counts, Rules, of_one_turn
from tadistill.data.survey import SAMPLE, Survey, survey, texts
from tadistill.errors import ConfigError, NotHere, about
from tadistill.models import parameter_counts, shapes
from tadistill.models.parameter_counts import Adapters, Described, Size, adapters_of
from tadistill.plan.costs import passes
from tadistill.plan.costs.light_tokenizer import StandIn, vocabulary
from tadistill.plan.costs.passes import SecondLength, Texts

_ENDLESS = 2**31
_READ = ("sets", "context", "weights", "route", "readers", "teachers")
"""The attributes of `SizesAndLengths` that choose the rows and the tokenizers."""
_COUNTED = 2000  # rows of a dev or test set that a plan counts; MiniLLM's S-NI has 1,694


class SizesAndLengths:
    """Computes the sizes of a recipe's models from their configurations, and the lengths of its texts, and caches the lengths."""

    def __init__(self, recipe: Recipe, *, partial: bool = False):
        """With `partial`, a method raises NotHere if it needs a data set that is neither on this disk nor on a Hub that can be reached."""
        self.recipe, self.partial = recipe, partial
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
        self._configs: dict[str, dict | None] = {}

    def unknown(self) -> dict[str, str]:
        """Map the name of each model whose config.json is not on this disk to the text `NAME (SOURCE)`."""
        models = self.recipe.models.items()
        return {name: f"{name} ({model.load})" for name, model in models if model.load and self.config(name) is None}

    def size(self, name: str) -> Size | None:
        """Return the size of a model. Return None if its configuration is not on this disk, or if its family is not supported."""
        config = self.config(name)
        with about(f"models.{name}"):
            return None if config is None else parameter_counts.size_of(config)

    def described(self, name: str) -> Described | None:
        """Return a model's size and configuration. Return None if `size` returns None."""
        size, config = self.size(name), self.config(name)
        return None if size is None or config is None else Described(size, config, self.recipe.models[name].serve)

    def config(self, name: str) -> dict | None:
        """Return a model's configuration, after pruning if the recipe prunes it. Return None if it is not on this disk."""
        if name in self._configs:
            return self._configs[name]
        config = self._config(name)
        positions = shapes.positions_of(config) if config else None
        if positions:
            for key, new in self._new_tokens(name):
                if new >= positions:  # `runner.preflight` also counts the tokens of the longest prompt
                    raise ConfigError(
                        f"models.{name}: the model has {positions} positions, but a prompt plus {key} ({new}) needs more; lower {key}"
                    )
        self._configs[name] = config
        return config

    def _config(self, name: str) -> dict | None:
        model = self.recipe.models[name]
        with about(f"models.{name}"):
            if model.parent:
                parent = self._config(model.parent)
                if parent is None or model.init is None:
                    return parent
                if not model.init.measured:
                    shapes.check_layers(parent, model.init.layers, f"models.{name}.init.layers", model.init.from_)
                    return parameter_counts.with_layers(parent, model.init.sizes["layers"])
                shape = shapes.resized(shapes.shape_of(parent), **model.init.sizes)
                with about(f"models.{name}.init"):
                    shapes.check_shape(parent, shape)
                return shapes.with_shape(parent, shape)
            if model.api:
                return None
            assert model.load is not None
            found = vocabulary(model.tokenizer, model.revision, self.recipe.data.world) if model.tokenizer else None
            return parameter_counts.read_config(model.load, model.revision, model.config, found.size if found else None)

    def _new_tokens(self, model: str) -> Iterator[tuple[str, int]]:
        # the longest answers that a model writes or reads, by the key that sets them; a check before a run names the key of a control's
        # sampler
        yield "evaluate.max_new_tokens", self.recipe.evaluate.max_new_tokens
        recipe = self.recipe.model_copy(update={"arms": {name: arm for name, arm in self.recipe.arms.items() if not arm.controls}})
        yield "sampler.max_new_tokens", sampled_tokens(recipe, model)

    def adapters(self, name: str) -> Adapters | None:
        """Return the parameter counts of a model's LoRA adapters. Return None if the model has no `lora`, or if its size is not known.

        Raises:
            ConfigError: an entry of `lora.targets` is not a linear layer of the model.
        """
        lora, config = self.recipe.models[name].lora, self.config(name)
        if lora is None or config is None:
            return None
        with about(f"models.{name}.lora.targets"):
            return adapters_of(config, lora.r, lora.targets)

    def _packs(self, name: str) -> bool:
        return (self.config(name) or {}).get("model_type") in PACKED_FAMILIES

    def untrained(self, name: str) -> bool:
        """Return True if a model has random weights before its distillation. Such a model never ends an answer."""
        model = self.recipe.models[name]
        if model.sft:
            return False
        return self.untrained(model.parent) if model.parent else str(model.load).startswith("scratch:")

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
        """Number of tokens in one row of the plain-text corpus. It is `data.max_length`, or less if the whole corpus is shorter."""
        data = self.recipe.data
        assert data.corpus is not None
        if data.corpus.load not in tinyworld.SPLITS:
            return data.max_length  # counting its tokens could need the network
        tokenizer, total = StandIn(self.reading), 0
        for text in texts(data.corpus, data.world, data.root):
            total += len(tokenizer.ids([text])[0]) + 1
            if total >= data.max_length:
                return data.max_length
        return total


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
    found, _ = encode(sample, cast(Any, asked.tokenizer), asked.rules, name=asked.name, rows=rows.places)
    sizes = [(len(e.prompt) + len(e.response) - counted, counted) for e in found for counted in [_counted(e)]]
    sizes = [(min(other, max_prompt, max_length - 1), counted) for other, counted in sizes]
    own = tuple(min(len(e.teacher_prompt), max_context) for e in found if e.teacher_prompt and max_context)
    places = tuple(e.row for e in found)
    return Texts(tuple((p, min(r, max_length - p)) for p, r in sizes), rows.rows * len(sizes) / len(sample), own, places)


def _counted(encoded: Encoded) -> int:
    return sum(end - start for start, end in encoded.spans) if encoded.spans else len(encoded.response)


def second_lengths(mine: Texts, theirs: Texts, rows: Survey, student: StandIn, teacher: StandIn) -> Texts:
    """Return a split's lengths for the student (`mine`), with the attribute `seconds`: the lengths of the same rows for the teacher.

    As in training (`data.alignment`), both tokenisations of a reference are cut into spans at their common token boundaries. Here,
    boundaries are positions of characters, not of bytes, and torch is not needed.

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


def count_first_rows(
    recipe: Recipe, ref: DataRef, role: Literal["train", "dev", "test"], context: TeacherContext | None = None
) -> Counts | None:
    """Count how many of a split's first rows are left out or shortened. Return None if the split or the tokenizer is not on this disk.

    Raises:
        DataError: the recipe refuses long rows, and one of these rows is too long.
    """
    data, tokenizer = recipe.data, StandIn(recipe)
    if not tokenizer.known or datasets.on_hub(ref, role, data) is not None:
        return None
    most = most_counted(role)
    rows = datasets.SplitRows(ref, role, data.world, data.root, min(most, getattr(data.limit, role) or most))
    sample = [replace(row, choices=()) for row in rows.read()]
    rules = tokenizer.readable(Rules.of(data, role, bos=False, context=context))
    return encode(sample, cast(Any, tokenizer), rules, name=f"data set `{ref.name}` ({role})")[1]


def most_counted(role: str) -> int:
    """Return the largest number of rows of a split that `count_first_rows` reads."""
    return SAMPLE if role == "train" else _COUNTED
