"""The lengths of a study's texts in tokens, and the work of running a model on batches of them, padding included.

Lengths need no transformers: they come from the tokenizer's file if it is on this disk, and otherwise a token is four characters.
`data.templates.encode` applies the rules (template, cuts, rows left out). Each function of work follows one place of the code, which its
docstring names.
"""

import json
import re
from bisect import bisect_right
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
from tadistill.models.counting.sizes import Work
from tadistill.tuning import COMPACT_BELOW

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


_CALLS = 1.5
"""Attention of `rollout.lazy` over that of the tokens it reads: a call works on a rectangle, in which some rows have fewer tokens."""


@lru_cache
def training_batch(texts: Texts, rows: int) -> tuple[Work, float]:
    """Count `models.forward.Reader.hidden` on `rows` shuffled sequences: padded to the longest without its last token, logits at responses.

    Returns the work, and the number of its positions that are padding.
    """
    width = largest(texts.totals, rows) - 1
    square = largest([total - 1 for total in texts.totals], rows, power=2)
    real = texts.mean_prompt + texts.mean_response - 1
    return Work(rows * width, rows * square, rows * texts.mean_response), rows * (width - real)


def plain_batch(length: int, rows: int) -> Work:
    """Count the same on rows of the corpus, which have no prompt: every token but the first is predicted."""
    return Work(rows * (length - 1), rows * (length - 1) ** 2, rows * (length - 1))


@lru_cache
def by_length(texts: Texts, batch: int, count: float) -> Work:
    """Count one pass over `count` sequences sorted by length (`data.batch.by_length`): each batch padded, logits at responses."""
    ordered = sorted(texts.totals)
    most = min(round(count), len(ordered))
    rows = [ordered[int((i + 0.5) * len(ordered) / most)] for i in range(most)]
    total = Work()
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        width = part[-1] - 1
        total += Work(len(part) * width, len(part) * width**2)
    return total * (count / most) + Work(heads=texts.mean_response * count)


@lru_cache
def sampling(texts: Texts, chunk: int, count: int) -> Work:
    """Count `rollout.generate` on `count` prompts in chunks of similar length: padded on the left; finished rows are dropped in groups."""
    rows = texts.drawn(count)
    total = Work()
    for start in range(0, len(rows), chunk):
        total += _decoded(rows[start : start + chunk])
    return total * (count / len(rows))


def _decoded(rows: Sequence[tuple[int, int]]) -> Work:
    width, ends = max(prompt for prompt, _ in rows), sorted(response for _, response in rows)
    alive = len(rows)
    positions, pairs, heads = float(alive * width), float(alive * width**2), float(alive)
    for t in range(1, ends[-1]):  # no model reads the last token
        going = len(rows) - bisect_right(ends, t)
        if going < COMPACT_BELOW * alive:
            alive = going
        positions, pairs, heads = positions + alive, pairs + alive * (width + t), heads + alive
    return Work(positions, pairs, heads)


@lru_cache
def lazy_sampling(texts: Texts, chunk: int, count: int) -> Work:
    """Count `rollout.lazy`, for either model: every token but the last is read once, and each token of a response has logits once."""
    rows = texts.drawn(count)
    total = Work()
    for start in range(0, len(rows), chunk):
        part = rows[start : start + chunk]
        width = max(prompt for prompt, _ in part)
        total += Work(pairs=len(part) * width**2)
        for prompt, response in part:
            attended = (response - 1) * (prompt + response / 2)
            total += Work(prompt + response - 1, _CALLS * attended, response)
    return total * (count / len(rows))


def minillm_flops(student: float, teacher: float, *, length: float, corpus: float, epochs: int) -> float:
    """Return the FLOPs of MiniLLM's released code for one rollout, from its call graph (microsoft/LMOps/minillm: sampler.py, trainer.py).

    For every rollout the code runs the student five times and the teacher four times: sampling from the mixture (both), the teacher's
    reward, the student's log-probabilities, a second generation by the student alone with a teacher and a student pass over it (for
    logging), and once more both over the rollout. In each inner epoch the student runs forward and backward on rollout and plain text,
    and the teacher forward on both.

    Args:
        student, teacher: forward FLOPs per token, head included (2 x parameters in the usual estimate).
        length: tokens of a rollout with its prompt; corpus: tokens of a row of plain text, 0 without.
        epochs: PPO epochs on each rollout.
    """
    trained = epochs * (length + corpus)
    return student * (5 * length + 3 * trained) + teacher * (4 * length + trained)
