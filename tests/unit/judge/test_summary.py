"""From verdicts to rows, with numbers worked out by hand."""

import numpy as np
import pytest

from tadistill.judge.questions import Answers, Item, make_questions
from tadistill.judge.scores import Verdicts, ratio_interval, summarise, verdict
from tadistill.statistics import macro_interval


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((8, 5), (4, 9), 1),
        ((3, 5), (6, 2), -1),
        ((8, 5), (9, 4), 0),  # Assistant 1 both times: a favourite position, no win
        ((8, 5), (6, 6), 0),
        ((6, 6), (6, 6), 0),
    ],
)
def test_a_win_needs_both_orders(first, second, expected):
    assert verdict(first, second) == expected


def answers_of(sets: dict[str, int], seeds: tuple[int, ...] = (10,)) -> Answers:
    items = [
        Item(name, i, f"{name} {i}", "", {who: tuple(f"{who} {name} {i} {s}" for s in seeds) for who in ("a", "reference")})
        for name, count in sets.items()
        for i in range(count)
    ]
    return Answers(None, ("a",), seeds, tuple(items), ())


def verdicts_of(questions, score) -> Verdicts:
    """`score(question, who)` -> what that side gets, or None for a reply that cannot be parsed."""
    pairs = {q.text: (score(q, q.left), score(q, q.right)) for q in questions}
    lost = {text for text, pair in pairs.items() if None in pair}
    return Verdicts({text: pair for text, pair in pairs.items() if text not in lost}, lost)


def test_pair_rows():
    answers = answers_of({"one": 4, "two": 2})
    questions = make_questions(answers, mode="pair")
    table = {("one", 0): (9, 5), ("one", 1): (5, 5), ("one", 2): (2, 5), ("one", 3): (9, 5), ("two", 0): (9, 5), ("two", 1): (None, 5)}
    found = summarise(answers, questions, verdicts_of(questions, lambda q, who: table[q.set, q.index][who == "reference"]), mode="pair")
    one, two, mean = found
    assert {k: one[k] for k in ("arm", "other", "set", "wins", "ties", "losses", "win_rate", "n")} == {
        "arm": "a", "other": "reference", "set": "one", "wins": 2, "ties": 1, "losses": 1, "win_rate": 62.5, "n": 4,
    }  # fmt: skip
    assert one["low"] < 62.5 < one["high"]
    assert (two["wins"], two["n"], two["win_rate"], two["low"], two["high"]) == (1, 1, 100, 2.5, 100)  # one prompt says little
    assert (mean["set"], mean["wins"], mean["n"], mean["win_rate"]) == ("mean", 3, 5, 81.25)


def test_score_rows_are_ratios_of_sums_over_both_orders():
    answers = answers_of({"one": 2}, seeds=(10, 20))
    questions = make_questions(answers, mode="score")

    def score(q, who):
        if who == "reference":
            return 8.0
        return 4.0 + 2 * q.index + (q.left == "a")  # Assistant 1 gets a point more

    (row,) = summarise(answers, questions, verdicts_of(questions, score), mode="score")
    assert row["score"] == pytest.approx(100 * (5 + 4 + 7 + 6) / (4 * 8))
    assert (row["arm"], row["set"], row["n"]) == ("a", "one", 4)
    # both seeds say the same, so the interval is that of two prompts with 56.25 and 81.25, around their mean
    low, high = macro_interval([np.array([[[56.25], [81.25]]] * 2)])
    assert low < 0
    assert row["low"] == 0  # no score is below 0
    assert row["high"] == pytest.approx(high, abs=1e-3)


def test_a_prompt_with_a_missing_reply_is_left_out_whole():
    answers = answers_of({"one": 2})
    questions = make_questions(answers, mode="pair")
    verdicts = verdicts_of(questions, lambda q, who: None if (q.index, q.left) == (1, "a") else 9 if who == "a" else 5)
    (row,) = summarise(answers, questions, verdicts, mode="pair")
    assert row["n"] == 1
    assert summarise(answers, questions, Verdicts({}, frozenset(q.text for q in questions), {}), mode="pair") == []


def test_ratio_interval_agrees_with_the_delta_method():
    rng = np.random.default_rng(0)
    other = rng.uniform(6, 10, 400)
    arm = 0.7 * other + rng.normal(0, 1, 400)
    values = np.stack([arm, other], axis=-1)[None]
    low, high = ratio_interval([values])
    ratio = arm.sum() / other.sum()
    error = np.std(arm - ratio * other) / np.sqrt(400) / other.mean()
    assert low == pytest.approx(ratio - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(ratio + 1.96 * error, abs=0.15 * error)


def test_a_ratio_interval_of_three_seeds_holds_the_truth():
    """Training seeds move all prompts together. Resampling three of them, as before, held the truth in about 71 % of the studies."""
    rng, held = np.random.default_rng(1), 0
    for _ in range(150):
        arm = 6 + 0.5 * rng.normal(size=(3, 1)) + 0.3 * rng.normal(size=(3, 40))
        low, high = ratio_interval([np.stack([arm, np.full((3, 40), 8.0)], axis=-1)])
        held += low <= 6 / 8 <= high
    assert held / 150 >= 0.9
