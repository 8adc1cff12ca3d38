"""Compute wins, win rates and scores from the judge's replies, with 95 % intervals.

Axes: S training seeds, N prompts. An arm's row includes a prompt only if the judge scored this arm's answers to this prompt in both orders
and for every seed.
"""

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tadistill.config.evaluate import REFERENCE
from tadistill.disk import write_json
from tadistill.judge.asking import Scores, Verdicts
from tadistill.judge.questions import Answers, Question
from tadistill.results.collect import MEAN
from tadistill.statistics import macro_interval

Array = NDArray[np.float64]
Row = dict[str, Any]
_SHARE = (0.0, 100.0)


def summarise(answers: Answers, questions: Sequence[Question], verdicts: Verdicts, *, mode: str, against: str = REFERENCE) -> list[Row]:
    """Return one row per arm and test set. With several sets, each arm also gets a row for the mean over sets.

    - n is the number of compared pairs of answers (prompts x training seeds).
    - Mode pair: an arm wins if it wins in both orders. If the two orders disagree, it is a tie. win_rate = 100 (wins + ties / 2) / n.
    - Mode score, as in MiniLLM: 100 x (sum of the arm's scores) / (sum of the reference's scores), over both orders.
    """
    scores = {(q.set, q.index, q.seed, q.left, q.right): verdicts.scores[q.text] for q in questions if q.text in verdicts.scores}
    make = _pair_rows if mode == "pair" else _score_rows
    rows: list[Row] = []
    for arm in (name for name in answers.arms if name != against):
        strata = {name: _complete(scores, answers, name, arm, against) for name in dict.fromkeys(item.set for item in answers.items)}
        rows += make(arm, against, {name: values for name, values in strata.items() if values.size})
    return rows


def verdict(first: Scores, second: Scores) -> int:
    """Return 1 if the arm has the higher score in both orders, -1 if the other answer has it in both orders, and 0 otherwise.

    Args:
        first: the scores (arm, other answer) if the arm is shown first.
        second: the scores (other answer, arm) if the arm is shown second.
    """
    signs = {_sign(first[0] - first[1]), _sign(second[1] - second[0])}
    return signs.pop() if len(signs) == 1 else 0


def ratio_interval(strata_SN2: Sequence[Array]) -> tuple[float, float]:
    """Return the 95 % interval of the mean, over test sets, of the ratio sum(scores of the arm) / sum(scores of the other answers).

    There is one array for each set, of shape (training seeds, prompts, 2). The last axis has the arm's score and then the score of the
    other answer.

    For each set, the delta method computes one value for each seed and prompt. The mean of these values is the ratio. To first order,
    the mean also has the variance of the ratio. `macro_interval` therefore computes the interval from these values.
    """
    linear = []
    for values in strata_SN2:
        arm_SN, other_SN = values[..., 0], values[..., 1]
        ratio = arm_SN.sum() / other_SN.sum()
        linear.append((ratio + (arm_SN - ratio * other_SN) / other_SN.mean())[..., None])
    return macro_interval(linear, bounds=(0.0, np.inf))


def write_summary(path: Path, *, mode: str, judge: str, arms: Sequence[str], rows: Sequence[Row], command: str, **more: Any) -> None:
    """Write the summary of the ratings to `path` (``judge-NAME.json``). The report of the study reads this file."""
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    content = {"mode": mode, "judge": judge, "arms": list(arms), "rows": list(rows), **more, "created": created, "command": command}
    write_json(path, content, allow_nan=False)


def pair_row(arm: str, other: str, name: str, outcomes_SN: Array) -> Row:
    """Return the summary of one test set. `outcomes_SN` has one value per training seed and prompt: 1 is a win, 0 a tie, -1 a loss."""
    wins, losses, n = int((outcomes_SN > 0).sum()), int((outcomes_SN < 0).sum()), int(outcomes_SN.size)
    rate_SN = 50.0 * (outcomes_SN + 1)
    low, high = macro_interval([rate_SN[..., None]], bounds=_SHARE)
    row = {"arm": arm, "other": other, "set": name, "wins": wins, "ties": n - wins - losses, "losses": losses}
    return row | _rounded(win_rate=float(rate_SN.mean()), low=low, high=high) | {"n": n}


def pair_rows(arm: str, other: str, strata_SN: Mapping[str, Array]) -> list[Row]:
    """Return one row per test set. With several sets, add a row over all of them.

    That row has the summed counts and the mean of the win rates, in which each set has the same weight.
    """
    rows = [pair_row(arm, other, name, outcomes) for name, outcomes in strata_SN.items()]
    if len(rows) > 1:
        sums = {field: sum(row[field] for row in rows) for field in ("wins", "ties", "losses")}
        low, high = macro_interval([50.0 * (outcomes[..., None] + 1) for outcomes in strata_SN.values()], bounds=_SHARE)
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
