"""The lengths of a study's texts in tokens, without transformers: from the tokenizer's file if it is on this disk.

`data.templates.encode` applies the rules (template, cuts, rows left out). Without a tokenizer's file a token is four characters.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from tadistill.config import DataRef, ModelConfig, Recipe
from tadistill.config.recipe import World
from tadistill.data import datasets, tinyworld
from tadistill.data.templates import encode
from tadistill.models import sources

_SAMPLE = 512  # rows that stand for the distribution of lengths
_ENDLESS = 2**31


@dataclass(frozen=True)
class Texts:
    """Lengths of the rows of a split, or of a sample of them."""

    rows: tuple[tuple[int, int], ...]
    """(prompt, response with its EOS) of evenly spaced rows."""
    count: float
    """Rows of the split that are not left out."""

    @property
    def totals(self) -> list[int]:
        """Tokens of prompt and response, per row."""
        return [prompt + response for prompt, response in self.rows]

    @property
    def mean_prompt(self) -> float:
        """Mean tokens of a prompt."""
        return sum(prompt for prompt, _ in self.rows) / len(self.rows)

    @property
    def mean_response(self) -> float:
        """Mean tokens of a response."""
        return sum(response for _, response in self.rows) / len(self.rows)

    def answered(self, most: int, *, endless: bool = False) -> "Texts":
        """Return the prompts with sampled answers: as long as the references but at most `most` tokens, or all `most` if `endless`."""
        return replace(self, rows=tuple((prompt, most if endless else min(response, most)) for prompt, response in self.rows))

    def drawn(self, count: int) -> list[tuple[int, int]]:
        """Return `count` typical rows, short prompts first; fewer if fewer are known."""
        ordered = sorted(self.rows)
        if count >= len(ordered):
            return ordered
        # neighbours have prompts of similar length, so each row keeps its own response
        return [ordered[int((i + 0.5) * len(ordered) / count)] for i in range(count)]


def read(recipe: Recipe, ref: DataRef, role: str, examples: Sequence[datasets.Example]) -> Texts:
    """Measure the lengths of a split from its examples."""
    data, places = recipe.data, min(_SAMPLE, len(examples))
    sample = [replace(examples[i * len(examples) // places], choices=()) for i in range(places)]
    ids = tokenizer(recipe)
    known = ids is not None
    limits = {"max_prompt": data.max_prompt, "max_length": data.max_length} if known else {"max_prompt": _ENDLESS, "max_length": _ENDLESS}
    stand_in = cast(Any, _StandIn(ids or _pieces))
    found = encode(sample, stand_in, template=data.template, name=f"data set `{ref.name}` ({role})", **limits)
    rows = [(min(len(e.prompt), data.max_prompt, data.max_length - 1), len(e.response)) for e in found]
    return Texts(tuple((p, min(r, data.max_length - p)) for p, r in rows), len(examples) * len(rows) / places)


def chunk(recipe: Recipe) -> int:
    """Return the tokens of a row of the corpus: `max_length`, or fewer if the whole corpus is shorter."""
    data = recipe.data
    assert data.corpus is not None
    if data.corpus.load not in tinyworld.SPLITS:
        return data.max_length  # reading could need the network
    ids, total = tokenizer(recipe) or _pieces, 0
    for text in datasets.texts(data.corpus, world=data.world, root=data.root):
        total += len(ids([text])[0]) + 1
        if total >= data.max_length:
            return data.max_length
    return total


Ids = Callable[[list[str]], Sequence[Sequence[Any]]]
"""Turns texts into tokens, of which only number and equality matter."""


def tokenizer(recipe: Recipe) -> Ids | None:
    """Return the study's tokenizer, or None if its file is not on this disk."""
    model = next(m for m in recipe.models.values() if m.load)  # models that teach each other share their tokenizer
    if model.tokenizer_source == "tinyworld":
        return lambda texts: [re.findall(r"\S+|\n", text) for text in texts]
    file = _tokenizer_file(model)
    return _from_file(file) if file else None


def vocabulary(model: ModelConfig, world: World) -> int | None:
    """Return the number of tokens of a model's tokenizer, or None if its file is not on this disk."""
    if model.tokenizer_source == "tinyworld":
        return len(tinyworld.words(seed=world.seed, people=world.people)) + 3  # and <pad>, <eos>, <unk>
    file = _tokenizer_file(model)
    if file is None:
        return None
    content = json.loads(file.read_text(encoding="utf-8"))
    return len({*content["model"]["vocab"], *(t["content"] for t in content["added_tokens"])})


def _tokenizer_file(model: ModelConfig) -> Path | None:
    """Find the tokenizer.json of a model that is loaded, at the model's revision; None if it is not on this disk."""
    source = model.tokenizer_source
    assert source is not None
    directory = sources.locate(source, model.revision, weights=False)
    file = directory / "tokenizer.json" if directory else None
    return file if file and file.is_file() else None


@lru_cache
def _from_file(file: Path) -> Ids:
    from tokenizers import Tokenizer  # here: not every study has a tokenizer's file

    backend = Tokenizer.from_file(str(file))
    backend.no_truncation()
    backend.no_padding()
    return lambda texts: [e.ids for e in backend.encode_batch(texts, add_special_tokens=False)]


def _pieces(texts: list[str]) -> list[list[str]]:
    return [[text[i : i + 4] for i in range(0, len(text), 4)] for text in texts]


class _StandIn:
    """Stand-in for a tokenizer in `encode`. Conversations are put into ChatML, whatever the model's own template is."""

    eos_token_id = -1
    chat_template = "chatml"

    def __init__(self, ids: Ids):
        self._ids = ids

    def __call__(self, texts: list[str], *, add_special_tokens: bool) -> dict[str, Sequence[Sequence[Any]]]:
        return {"input_ids": [list(ids) for ids in self._ids(texts)]}

    def apply_chat_template(self, messages: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool) -> str:
        turns = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
        return f"{turns}<|im_start|>assistant\n"


def largest(values: Sequence[float], draws: int, *, power: int = 1) -> float:
    """Return the expected largest of `draws` of these values, or of its `power`, drawn without replacement as a batch of rows is."""
    ordered, n = sorted(values), len(values)
    if draws >= n:
        return float(ordered[-1] ** power)
    total, share = 0.0, 1.0  # share: the draws that lie entirely among the k smallest values
    for k in range(n, draws - 1, -1):
        below = share * (k - draws) / k
        total += (share - below) * ordered[k - 1] ** power
        share = below
    return total
