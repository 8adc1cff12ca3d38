"""Verdicts -> wins, win rates and scores with 95 % intervals, by bootstrap over prompts (and training seeds, if several).

Axes: S training seeds, N prompts. A prompt counts for an arm when all its questions (both orders, every seed) were answered in
the asked form; the rest is counted, not guessed.
"""

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tadistill.disk import write_json
from tadistill.judge.answers import REFERENCE, Answers
from tadistill.judge.asking import Scores, Verdicts
from tadistill.judge.questions import Question
from tadistill.results.collect import MEAN
from tadistill.statistics import macro_interval

Array = NDArray[np.float64]
Row = dict[str, Any]


def summarise(answers: Answers, questions: Sequence[Question], verdicts: Verdicts, *, mode: str, against: str = REFERENCE) -> list[Row]:
    """The rows of a summary: one for each arm and set, and one for the mean over sets where there are several.

    pair: a win counts only when both orders agree, anything else is a tie; win_rate = 100 (wins + ties / 2) / n.
    score: MiniLLM's number, 100 x sum of the arm's scores / sum of the reference's, over both orders.
    n counts pairs of answers (prompts x training seeds).
    """
    scores = {(q.set, q.index, q.seed, q.left, q.right): verdicts.scores[q.text] for q in questions if q.text in verdicts.scores}
    make = _pair_rows if mode == "pair" else _score_rows
    rows: list[Row] = []
    for arm in (name for name in answers.arms if name != against):
        strata = {name: _complete(scores, answers, name, arm, against) for name in dict.fromkeys(item.set for item in answers.items)}
        rows += make(arm, against, {name: values for name, values in strata.items() if values.size})
    return rows


def verdict(first: Scores, second: Scores) -> int:
    """1 when both orders prefer the arm, -1 when both prefer the other, else 0.

    Args:
        first: the scores with the arm shown first; `second`: with the arm shown second.
    """
    signs = {_sign(first[0] - first[1]), _sign(second[1] - second[0])}
    return signs.pop() if len(signs) == 1 else 0


def ratio_interval(strata_SN2: Sequence[Array], *, replicates: int = 2000, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Percentile interval of the mean over strata of sum(arm) / sum(other); the last axis holds arm and other.

    Training seeds are drawn jointly for all strata, prompts within each; both sums use the same draws.
    """
    rng = np.random.default_rng(seed)
    n_seeds = strata_SN2[0].shape[0]
    total_R = np.zeros(replicates)
    for r in range(replicates):
        seeds = rng.integers(n_seeds, size=n_seeds)
        for values in strata_SN2:
            n_prompts = values.shape[1]
            arm, other = values[seeds][:, rng.integers(n_prompts, size=n_prompts)].sum(axis=(0, 1))
            total_R[r] += arm / other / len(strata_SN2)
    low, high = np.quantile(total_R, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def write_summary(path: Path, *, mode: str, judge: str, arms: Sequence[str], rows: Sequence[Row], command: str, **more: Any) -> None:
    """Writes ``judge-NAME.json``, which the report reads."""
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    content = {"mode": mode, "judge": judge, "arms": list(arms), "rows": list(rows), **more, "created": created, "command": command}
    write_json(path, content, allow_nan=False)


def pair_row(arm: str, other: str, name: str, outcomes_SN: Array) -> Row:
    """One row of wins (1), ties (0) and losses (-1)."""
    wins, losses, n = int((outcomes_SN > 0).sum()), int((outcomes_SN < 0).sum()), int(outcomes_SN.size)
    rate_SN = 50.0 * (outcomes_SN + 1)
    low, high = macro_interval([rate_SN[..., None]])
    row = {"arm": arm, "other": other, "set": name, "wins": wins, "ties": n - wins - losses, "losses": losses}
    return row | _rounded(win_rate=float(rate_SN.mean()), low=low, high=high) | {"n": n}


def pair_rows(arm: str, other: str, strata_SN: Mapping[str, Array]) -> list[Row]:
    """A row a set; with several sets, their sums and the unweighted mean of their win rates."""
    rows = [pair_row(arm, other, name, outcomes) for name, outcomes in strata_SN.items()]
    if len(rows) > 1:
        sums = {field: sum(row[field] for row in rows) for field in ("wins", "ties", "losses")}
        low, high = macro_interval([50.0 * (outcomes[..., None] + 1) for outcomes in strata_SN.values()])
        rate = float(np.mean([row["win_rate"] for row in rows]))
        mean = _rounded(win_rate=rate, low=low, high=high)
        rows.append({"arm": arm, "other": other, "set": MEAN} | sums | mean | {"n": sum(row["n"] for row in rows)})
    return rows


def _pair_rows(arm: str, other: str, strata: Mapping[str, Array]) -> list[Row]:
    outcomes = {name: np.asarray([[verdict(*both) for both in of_seed] for of_seed in values], float) for name, values in strata.items()}
    return pair_rows(arm, other, outcomes)


def _score_rows(arm: str, other: str, strata: Mapping[str, Array]) -> list[Row]:
    # (S, N, order, assistant) -> (S, N, [arm, other]): the arm is Assistant 1 in the first order, 2 in the second
    both = {
        name: np.stack([v[..., 0, 0] + v[..., 1, 1], v[..., 0, 1] + v[..., 1, 0]], axis=-1) for name, v in strata.items()
    }  # fmt: skip
    groups = [(name, [values]) for name, values in both.items()] + ([(MEAN, list(both.values()))] if len(both) > 1 else [])
    rows = []
    for name, group in groups:
        score = float(np.mean([values[..., 0].sum() / values[..., 1].sum() for values in group]))
        low, high = ratio_interval(group)
        row = {"arm": arm, "set": name} | _rounded(score=100 * score, low=100 * low, high=100 * high)
        rows.append(row | {"n": sum(values[..., 0].size for values in group)})
    return rows


def _complete(scores: Mapping[tuple, Scores], answers: Answers, name: str, arm: str, other: str) -> Array:
    """(S, N, order, assistant): the scores of the set's prompts that have all of them."""
    kept = []
    for index in (item.index for item in answers.items if item.set == name):
        keys = [[(name, index, seed, *names) for names in ((arm, other), (other, arm))] for seed in range(len(answers.seeds))]
        if all(key in scores for of_seed in keys for key in of_seed):
            kept.append([[scores[key] for key in of_seed] for of_seed in keys])
    return np.asarray(kept, float).swapaxes(0, 1) if kept else np.empty(0)


def _sign(value: float) -> int:
    return int(value > 0) - int(value < 0)


def _rounded(**values: float) -> dict[str, float]:
    return {name: round(value, 4) + 0.0 for name, value in values.items()}
