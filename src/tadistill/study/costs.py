"""What a stage costs, before it runs: forward FLOPs times passes times tokens. Imports no torch.

Forward FLOPs per token are 2 x the matrix parameters (head included) plus attention; a backward pass counts as two
forwards (Kaplan et al. 2020). Tokens are estimated from the text: words in tinyworld, characters / 4 elsewhere. A rollout is
taken to be as long as the mean reference answer.
"""

import json
from functools import cached_property
from itertools import islice

from tadistill.config import Method, Recipe
from tadistill.config.method import Optim
from tadistill.config.objective import CrossEntropy, MiniLLM
from tadistill.config.recipe import methods
from tadistill.config.sampling import MixSampler, PairSampler, ReplaySampler, Rounds
from tadistill.data import datasets, tinyworld
from tadistill.errors import ConfigError, DataError
from tadistill.models import shapes, sizes, sources

_ALPACA_TOKENS = 40
_SAMPLE = 500  # rows read to estimate lengths


class Ledger:
    """Estimates for one recipe."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe

    @cached_property
    def _train(self) -> list[datasets.Example]:
        return datasets.load(self.recipe.data.train, "train", self.recipe.data)

    @property
    def rows(self) -> int:
        """Training rows, before the length filter."""
        return len(self._train)

    @cached_property
    def tokens(self) -> float:
        """Mean tokens of a training sequence, prompt and response."""
        data = self.recipe.data
        tiny = data.train.load in tinyworld.SPLITS
        prompts = _ALPACA_TOKENS if data.template == "alpaca" else 2
        sample = list(islice(self._train, _SAMPLE))

        def length(text: str) -> float:
            return len(text.split()) if tiny else len(text) / 4

        total = sum(length(e.instruction) + length(e.input) + length(e.references[0]) + prompts for e in sample)
        return min(total / len(sample), data.max_length)

    @cached_property
    def corpus_tokens(self) -> float:
        """Tokens of one corpus chunk."""
        return float(self.recipe.data.max_length)

    def size(self, name: str) -> sizes.Size | None:
        """The size of a model, or None while its configuration is not on this disk."""
        config = self.config(name)
        return None if config is None else sizes.size_of(config)

    def config(self, name: str) -> dict | None:
        """A model's configuration as a dict, or None while it is not on this disk."""
        model = self.recipe.models[name]
        if model.parent:
            parent = self.config(model.parent)
            if parent is None or model.init is None:
                return parent
            if not model.init.measured:
                return sizes.with_layers(parent, model.init.sizes["layers"])
            shape = shapes.resized(shapes.shape_of(parent), **model.init.sizes)
            try:
                shapes.check_shape(parent, shape)
            except ConfigError as error:
                raise ConfigError(f"models.{name}.init: {error}") from error
            return shapes.with_shape(parent, shape)
        assert model.load is not None
        vocab = self._vocabulary(model.tokenizer) if model.tokenizer else None
        return sizes.read_config(model.load, model.revision, model.config, vocab)

    def _vocabulary(self, tokenizer: str) -> int | None:
        """The number of tokens, read from the tokenizer's file; None while it is not on this disk."""
        if tokenizer == "tinyworld":
            world = self.recipe.data.world
            return len(tinyworld.words(seed=world.seed, people=world.people)) + 3  # and <pad>, <eos>, <unk>
        directory = sources.locate(tokenizer, weights=False)
        file = directory / "tokenizer.json" if directory else None
        if file is None or not file.is_file():
            return None
        content = json.loads(file.read_text(encoding="utf-8"))
        return len({*content["model"]["vocab"], *(t["content"] for t in content["added_tokens"])})

    def forward(self, name: str) -> float | None:
        """Forward FLOPs of one token."""
        size = self.size(name)
        return None if size is None else sizes.flops_per_token(size, self.tokens)

    def _teachers(self, names: list[str], method: Method) -> float | None:
        """Forward FLOPs of one token through all teachers that are not left out."""
        each = [self.forward(name) for name in names]
        share = 1 - method.dense.drop if method.dense and len(names) > 1 else 1.0
        return None if any(f is None for f in each) else share * sum(f for f in each if f is not None)

    def sft(self, name: str, optim: Optim) -> float | None:
        """Student forward and backward on every token."""
        student = self.forward(name)
        return None if student is None or optim.steps is None else 3 * student * optim.steps * optim.batch * self.tokens

    def generate(self, name: str) -> float | None:
        """One forward pass over the training set: an answer to every prompt, or a signal recorded."""
        teacher = self.forward(name)
        return None if teacher is None else teacher * self.rows * self.tokens

    def distill(self, above: list[str], name: str, method: Method) -> float | None:
        """Training passes of student and teachers, and what the sampler samples."""
        student, teacher = self.forward(name), self._teachers(above, method)
        if student is None or teacher is None or method.optim.steps is None:
            return None
        sequences, objective, sampler = method.optim.steps * method.optim.batch, method.objective, method.sampler
        per_sequence = 3 * student + (0 if isinstance(objective, CrossEntropy) or method.signal else teacher)
        if isinstance(sampler, Rounds):  # the teacher runs once over a rollout, however often it is trained on
            per_sequence = 3 * student + (student + teacher) / sampler.inner_epochs
        elif isinstance(sampler, PairSampler):
            per_sequence = 2 * per_sequence + student
        elif isinstance(sampler, MixSampler):
            per_sequence += sampler.lam * student
        elif isinstance(sampler, ReplaySampler):  # phi depends on the run: an upper bound
            per_sequence += student
        total = sequences * self.tokens * per_sequence
        if isinstance(objective, MiniLLM) and objective.pt_weight:
            total += sequences * self.corpus_tokens * (3 * student + (teacher if objective.pt_kd_ratio else 0))
        return total


def check_data(recipe: Recipe) -> None:
    """Read every split, and the start of the corpus, so that a missing file or column is known before any work."""
    data = recipe.data
    objectives = [method.objective for method in methods(recipe)]
    for ref, role in [(data.train, "train"), (data.dev, "dev"), *((r, "test") for r in data.test)]:
        datasets.load(ref, role, data)
    if data.corpus and any(isinstance(o, MiniLLM) and o.pt_weight for o in objectives):
        next(datasets.texts(data.corpus, data), None)
    names = [r.name for r in data.test]
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"data.test has two sets called `{name}`; rename one of the files")
