"""The work of each way in which the code runs a model: batches of training text, sampling, scoring. Imports no torch.

Each function follows one place of the code, named in its docstring, and counts what that place does, padding included.
"""

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache

from tadistill.models.counting.sizes import Work
from tadistill.plan.costs.lengths import Texts, largest

COMPACT_BELOW = 0.8
"""`rollout.cache.COMPACT_BELOW`."""
PACKED_FAMILIES = frozenset({"gpt2", "llama", "mistral", "opt", "qwen2"})
"""`rollout.packed`'s families: both models of a plain mixture read without padding."""
_CALLS = 1.5
"""In `rollout.lazy` a call attends for every row of its rectangle, also those that have fewer tokens to read, or none."""


@lru_cache
def training_batch(texts: Texts, rows: int) -> tuple[Work, float]:
    """`models.forward.Reader.hidden` on `rows` shuffled sequences: all padded to the longest less its last token, logits at responses.

    Returns:
        The work, and how many of its positions are padding.
    """
    width = largest(texts.totals, rows) - 1
    square = largest([total - 1 for total in texts.totals], rows, power=2)
    real = texts.mean_prompt + texts.mean_response - 1
    return Work(rows * width, rows * square, rows * texts.mean_response), rows * (width - real)


def plain_batch(length: int, rows: int) -> Work:
    """The same on rows of the corpus, which have no prompt: every token but the first is predicted."""
    return Work(rows * (length - 1), rows * (length - 1) ** 2, rows * (length - 1))


@lru_cache
def by_length(texts: Texts, batch: int, count: float) -> Work:
    """One pass over `count` sequences sorted by length (`data.batch.by_length`), each batch padded to its longest; logits at responses."""
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
    """`rollout.generate` on `count` prompts in chunks of like prompts: padded on the left; rows that have ended leave in groups."""
    rows = texts.drawn(count)
    total = Work()
    for start in range(0, len(rows), chunk):
        total += _decoded(rows[start : start + chunk])
    return total * (count / len(rows))


def _decoded(rows: Sequence[tuple[int, int]]) -> Work:
    width, ends = max(prompt for prompt, _ in rows), sorted(response for _, response in rows)
    alive = len(rows)
    positions, pairs, heads = float(alive * width), float(alive * width**2), float(alive)
    for t in range(1, ends[-1]):  # the last token is read by nobody
        going = len(rows) - bisect_right(ends, t)
        if going < COMPACT_BELOW * alive:
            alive = going
        positions, pairs, heads = positions + alive, pairs + alive * (width + t), heads + alive
    return Work(positions, pairs, heads)


@lru_cache
def lazy_sampling(texts: Texts, chunk: int, count: int) -> Work:
    """`rollout.lazy`, for either model: every token but the last is read once, each token of a response has logits once."""
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
