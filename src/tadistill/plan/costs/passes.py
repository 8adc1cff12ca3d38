"""The work of running a model on batches of training text, in sampling and in scoring, padding included.

Each function follows one place of the code, which its docstring names.
"""

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache

from tadistill.models.counting.sizes import Work
from tadistill.plan.costs.lengths import Texts, largest
from tadistill.tuning import COMPACT_BELOW

_CALLS = 1.5
"""Attention of `rollout.lazy` over that of the tokens it reads: a call works on a rectangle, in which some rows have fewer tokens."""


@lru_cache
def training_batch(texts: Texts, rows: int) -> tuple[Work, float]:
    """Count `models.forward.Reader.hidden` on `rows` shuffled sequences: padded to the longest without its last token, logits at responses.

    Returns:
        The work, and the number of its positions that are padding.
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
