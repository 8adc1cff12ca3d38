"""Scores of text: ROUGE-L equals the library's, the others by hand, errors."""

import json
import random
import string
from pathlib import Path

import pytest
from rouge_score import rouge_scorer
from tests.environment import USER

from tadistill.data import tinyworld
from tadistill.data.rows import Example
from tadistill.evaluation.text_scores import (
    _f_measure,
    exact_match,
    fact_accuracy,
    repetition,
    rouge_l,
    rouge_l_unicode,
    score_quality,
    unseen,
)


def test_rouge_l_is_the_best_stemmed_f_measure():
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    predictions = ["the cats are running home", "", "Ünïcode, naïve!", "one two three"]
    references = [["a cat runs home", "the cat is running"], ["something"], ["naive unicode", "Ünïcode naïve"], ["three two one"]]
    for found, prediction, refs in zip(rouge_l(predictions, references), predictions, references, strict=True):
        assert found == 100 * max(scorer.score(r, prediction)["rougeL"].fmeasure for r in refs)
    assert rouge_l([""], [["x"]]) == [0.0]
    assert rouge_l(["the runner runs"], [["the runner runs"]]) == [100.0]


def test_rouge_l_equals_the_library_on_random_texts():
    """Repeated and unknown words, several references, empty texts, words of other scripts, words that the stemmer shortens."""
    scorer, draw = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True), random.Random(1)
    words = ["the", "run", "running", "runs", "happily", "naïve", "红色", "x1", "—", "A", "nation's", "Ünïcode", "relational", "no"]

    def text() -> str:
        return " ".join(draw.choices(words[: draw.randint(1, len(words))], k=draw.choice([0, 1, 2, 5, 20, 70])))

    predictions = [text() for _ in range(150)]
    references = [[text() for _ in range(draw.randint(1, 3))] for _ in predictions]
    expected = [100 * max(scorer.score(r, p)["rougeL"].fmeasure for r in refs) for p, refs in zip(predictions, references, strict=True)]
    assert rouge_l(predictions, references) == expected
    assert len(set(expected)) > 60


class Looked(str):
    """A word that counts how often words are compared or hashed."""

    times = 0

    def __eq__(self, other: object) -> bool:
        Looked.times += 1
        return str.__eq__(self, other)

    def __hash__(self) -> int:
        Looked.times += 1
        return str.__hash__(self)


def test_rouge_l_looks_at_each_word_a_few_times():
    """rouge_score compares each pair of words, which takes half a minute and 190 MB for 4,000 and 6,000 words."""
    draw, words = random.Random(0), [f"w{i}" for i in range(200)]
    one = [Looked(word) for word in draw.choices(words, k=600)]
    part = [word for i, word in enumerate(one) if i % 3]
    Looked.times = 0
    assert _f_measure(part, one) == pytest.approx(0.8)  # the precision is 1, the recall 2/3
    assert Looked.times <= 6 * (len(part) + len(one)) < len(part) * len(one) / 30


TEXTS = [
    "红色的苹果",
    "красное яблоко",
    "تفاحة حمراء",
    "हिन्दी में",
    "ภาษาไทย",
    "한국어 시험",
    "日本語のテスト",
    "été à Québec",
    "the cats",
    "😀👍🏽",
    "→ ∑ €",
]


@pytest.mark.parametrize("text", TEXTS)
def test_equal_texts_score_100_in_every_script(text):
    assert rouge_l_unicode([text], [[text]]) == [100]


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        ("pêche", "pâche", 0),
        ("pe\u0302che", "PÊCHE", 100),  # a combining accent, another case
        ("红苹果", "红色的苹果", 75),  # three of three and of five characters
        ("красное", "красное яблоко", 200 / 3),
        ("ＡＢＣ１", "abc1", 100),  # full width
        ("你好 world", "你好, World!", 100),
        ("", "я", 0),
        ("👍", "👍👎", 200 / 3),  # one of one and of two symbols
        ("well done👍", "well done 👍", 100),
        ("❤\ufe0f", "❤", 100),  # the colour form of a symbol
        ("👍", "👎", 0),
        ("...", "...", 0),  # punctuation is no word
    ],
)
def test_rouge_l_of_other_scripts(prediction, reference, score):
    assert rouge_l_unicode([prediction], [[reference]]) == [pytest.approx(score)]


def test_on_ascii_text_both_rouges_are_equal():
    draw = random.Random(0)
    texts = ["".join(draw.choices(string.printable + "aeinrst   ", k=50)) for _ in range(60)]
    references = [[text[:25] + other, other] for text, other in zip(texts, reversed(texts), strict=True)]
    assert rouge_l_unicode(texts, references) == rouge_l(texts, references)


def test_the_share_that_rouge_l_drops():
    assert unseen([["红色"], ["abc"]]) == 0.5
    assert unseen([["pêche"]]) == 0.2
    assert unseen([["abc 12 …"], ["—"]]) == 0
    assert unseen([["😀"], ["ok 👍"], ["a+b"]]) == pytest.approx((1 + 1 / 3) / 3)


def test_the_second_rouge_is_measured_where_it_differs_or_is_asked_for():
    def rows(reference: str) -> list[Example]:
        return [Example("say", "", (reference,))]

    assert score_quality(["красное"], rows("красное")) == {"rouge_l": [0], "rouge_l_unicode": [100]}
    assert score_quality(["😀"], rows("😀")) == {"rouge_l": [0], "rouge_l_unicode": [100]}
    assert score_quality(["red"], rows("red")) == {"rouge_l": [100]}
    assert score_quality(["red"], rows("red"), metric="rouge_l_unicode")["rouge_l_unicode"] == [100]


def real_references() -> list[list[str]]:
    """Reference lists of MiniLLM's test sets where they are at hand, else of tinyworld."""
    root, rows = USER.get("TADISTILL_DATA"), []
    for path in sorted(Path(root).glob("minillm_*/test.jsonl")) if root else ():
        with path.open(encoding="utf-8") as lines:
            rows += [json.loads(line) for line, _ in zip(lines, range(60), strict=False)]
    rows = rows or [row for name in ("tinyworld_multi", "tinyworld_lengths") for row in tinyworld.world_rows(name, "test")]
    answers = [row.get("outputs") or row["output"] for row in rows]
    return [answer if isinstance(answer, list) else [answer] for answer in answers]


def test_rouge_l_equals_the_library_on_real_texts():
    """Predictions like a model's: a cut reference, a neighbour's answer, the right answer in another case, nothing."""
    references, scorer = real_references(), rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    spoiled = [lambda i, r: r[: len(r) // 2], lambda i, r: references[i - 1][0], lambda i, r: f"« {r.upper()} » …", lambda i, r: ""]
    predictions = [spoiled[i % 4](i, refs[0]) for i, refs in enumerate(references)]
    expected = [100 * max(scorer.score(r, p)["rougeL"].fmeasure for r in refs) for p, refs in zip(predictions, references, strict=True)]
    assert rouge_l(predictions, references) == expected
    assert len(references) >= 100
    assert len(set(expected)) > 20


@pytest.mark.parametrize(
    ("prediction", "references", "score"),
    [
        ("  The Cat,\n sat. ", ["the cat sat"], 100),
        ("cat sat", ["the cat sat"], 0),  # articles count
        ("no", ["yes", "No!"], 100),  # the best reference
        ("", [""], 100),
        ("", ["x"], 0),
        ("ünïcode — naïve", ["Ünïcode — NAÏVE"], 100),
        ("don't", ["dont"], 100),
        ("well-known", ["well known"], 0),  # punctuation is removed, not replaced
    ],
)
def test_exact_match(prediction, references, score):
    assert exact_match([prediction], [references]) == [score]


@pytest.mark.parametrize(
    ("ids", "score"),
    [
        ([], 0),
        ([1, 1, 1], 0),  # shorter than one 4-gram
        ([1, 2, 3, 4, 5], 0),
        ([7] * 7, 75),  # four 4-grams, the last three said before
        ([1, 2, 3, 4, 1, 2, 3, 4], 20),  # five, the last said before
    ],
)
def test_repetition(ids, score):
    assert repetition([ids]) == [pytest.approx(score)]


def test_repetition_is_counted_within_an_answer():
    assert repetition([[1, 2, 3, 4], [1, 2, 3, 4]]) == [0, 0]


@pytest.mark.parametrize(
    ("prediction", "score"),
    [
        ("the pet of bavan is a rat .", 100),
        ("the pet of bavan is a cat .", 0),
        ("a rat or a cat", 0),  # naming both is no knowledge
        ("rather", 0),  # whole words only
        ("", 0),
    ],
)
def test_fact_accuracy(prediction, score):
    assert fact_accuracy([prediction], [[("rat", ("cat", "dog"))]]) == [score]


@pytest.mark.parametrize(
    "text", ["The capital is Paris.", "Paris, in France", "(Paris)", "**Paris**", "“Paris”!", "It is Paris's mayor", "首都是Paris。"]
)
def test_a_fact_may_stand_beside_punctuation(text):
    assert fact_accuracy([text], [[("Paris", ("London",))]]) == [100]
    assert fact_accuracy([f"{text} No, London."], [[("Paris", ("London",))]]) == [0]


def test_an_empty_wrong_value_is_in_no_text():
    assert fact_accuracy(["Paris, perhaps"], [[("Paris", ("",))]]) == [100]


def test_fact_accuracy_is_the_share_of_facts():
    facts = [("rat", ("cat",)), ("blue", ("red",)), ("2 5 9", ())]
    assert fact_accuracy(["a rat , 2 5 9 , red"], [facts]) == [pytest.approx(200 / 3)]
