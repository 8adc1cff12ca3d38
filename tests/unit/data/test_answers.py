"""Right answers of rows: how an answer is taken out of a text, each rule by hand, and rows without one."""

import builtins
import json
import threading
from decimal import Decimal

import pytest

from tadistill.config import Data, DataRef
from tadistill.data import answers, datasets
from tadistill.data.answers import RULES, chosen, final_number
from tadistill.errors import ConfigError, DataError
from tadistill.evaluation.text_scores import score_quality

NAMES = ["fine", "not fine"]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She has 3 eggs and sells 2, so 1.", "1"),
        ("5 + 13 = 18\n#### 18 (in 3 days)", "18"),  # GSM8K
        ("#### 7\nNo, wait:\n#### 1,234,567.50", "1234567.5"),
        (r"so \boxed{\frac{1}{2}}, that is \boxed{0.5} of 9", "0.5"),
        (r"\boxed{\text{18 dollars}} in 3 weeks", "18"),
        (r"cut off: \boxed{12", "12"),
        ("#### none, but 4", "4"),
        ("it costs -$12.30.", "-12.3"),
        ("−4 degrees", "-4"),
        ("10-3", "3"),  # a minus between numbers is no sign
        ("2.5e3 and 1e-2", "0.01"),
        ("x2 and H2O", None),
        ("1,2345", "2345"),
        ("50%", "50"),
        ("٣", "3"),
        ("", None),
        ("1e99999999999999999999", None),
    ],
)
def test_the_number_in_which_a_text_ends(text, number):
    assert final_number(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize(
    ("text", "index"),
    [
        ("not fine", 1),
        ("Fine.", 0),
        ("not fine, though fine at first", 1),
        ("The answer is (B) because fine is wrong", 1),
        ("Answer: A\nAnswer: **B**", 1),  # the last one
        ("I think it is fine.", 0),
        ("It is fine and not fine", None),
        (r"fine, no: \boxed{B}", 1),
        ("B.", 1),
        ("B", 1),
        ("(A) fine", 0),
        ("C", None),  # there are two choices
        ("A fine day is not fine", None),  # an article, and both options
        ("finely", None),
        ("", None),
    ],
)
def test_the_choice_of_a_text(text, index):
    assert chosen(text, ("fine", "not fine")) == index


def test_letters_without_options():
    texts = ("the answer is D", "D) Paris", "it must be (D)", "either (A) or (D)", "I know")
    assert [chosen(text, ()) for text in texts] == [3, 3, 3, None, None]


@pytest.fixture
def read(tmp_path):
    def read(*rows, **settings):
        path = tmp_path / "x.jsonl"
        path.write_text("".join(json.dumps({"instruction": "How many?", "output": "…"} | row) + "\n" for row in rows))
        return datasets.SplitRows(DataRef(load=str(path), **settings), "test").read()

    return read


def test_each_named_rule_scores_every_answer(read):
    checks = [{"kind": "max_words", "n": 2}, {"kind": "contains", "text": "Five"}]
    rows = read(
        {"a": "2 + 3\n#### 5", "c": "B", "k": checks},
        {"a": 7, "c": "E", "k": checks},
        columns={"numeric": "a", "choice": "c", "checks": "k"},
    )
    found = score_quality(["five: 5.0", "(E) 7 or 8"], rows)
    assert {name: found[name] for name in ("numeric", "choice", "checks")} == {"numeric": [100, 0], "choice": [0, 100], "checks": [100, 0]}
    assert score_quality(["5"], read({"a": 5})).keys() == {"rouge_l"}  # a column that is not named is not read


@pytest.mark.parametrize("answer", [1, "b", "B", "(B)", ["b"]])
def test_a_choice_is_written_as_label_letter_or_number(read, answer):
    row = {"output": "b", "c": answer, "options": ["a", "b"]}
    (example,) = read(row, columns={"choice": "c", "choices": "options"})
    assert example.answers["choice"].right == 1


def test_label_words_of_the_set_are_options(read):
    rows = read({"output": 0}, {"output": 1}, choices=["negative", "positive"], columns={"choice": "output"})
    assert score_quality(["a negative one", "negative"], rows)["choice"] == [100, 0]


@pytest.mark.parametrize(
    ("right", "text", "score"),
    [
        (r"\frac{1}{2}", r"therefore \boxed{0.5}", 100),
        ("x^2 + 1", "so it is $1 + x^2$", 100),
        (r"$\{1,2\}$", r"\boxed{\{2,1\}}", 100),
        ("so we get\n#### 12", "12", 100),
        (3, "3 or 4", 0),
        ("1", "no idea", 0),
    ],
)
def test_math_is_compared_by_math_verify(read, right, text, score):
    assert score_quality([text], read({"a": right}, columns={"math": "a"}))["math"] == [score]


def test_math_is_compared_in_a_thread_too():
    found = []
    thread = threading.Thread(target=lambda: found.append(RULES["math"].right("1/2", "$0.5$")))
    thread.start()
    thread.join()
    assert found == [True]


@pytest.mark.parametrize(
    ("kind", "passes", "fails"),
    [
        ({"kind": "min_words", "n": 2}, "two words", "one"),
        ({"kind": "max_words", "n": 1}, "one", "two words"),
        ({"kind": "contains", "text": "Cat"}, "a cat", "a dog"),
        ({"kind": "excludes", "text": ","}, "a cat", "a cat, a dog"),
        ({"kind": "starts_with", "text": "dear"}, " Dear you", "you"),
        ({"kind": "ends_with", "text": "."}, "Yes. ", "Yes"),
        ({"kind": "lowercase"}, "no capital", "A capital"),
        ({"kind": "json"}, '```json\n{"a": 1}\n```', "{a}"),
    ],
)
def test_checks(kind, passes, fails):
    rule = RULES["checks"]
    read = rule.read([kind], (), "row 1")
    assert (rule.right(passes, read), rule.right(fails, read)) == (True, False)


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("numeric", None, "the rule `numeric` cannot use the right answer `null`; write one number"),
        ("numeric", "12 or 13", "`12 or 13`; write one number"),
        ("numeric", "many", "write one number"),
        ("numeric", True, "`true`; write one number"),
        ("choice", "b2", "write a letter such as B, or name the column of the choices (columns: {choices: COLUMN})"),
        ("choice", 1, "write a letter such as B, or name the column of the choices (columns: {choices: COLUMN})"),
        ("math", "", "write an expression, for instance"),
        ("math", "???", "write an expression that math-verify can parse"),
        ("checks", [], "write a list of objects such as"),
        ("checks", [{"kind": "max_words"}], "max_words with a number `n`"),
        ("checks", [{"kind": "max_words", "n": 3, "text": "x"}], "max_words with a number `n`"),
        ("checks", [{"kind": "rhymes"}], "the kinds are min_words"),
    ],
)
def test_a_wrong_answer_of_a_row_is_named_with_file_and_row(read, column, value, words):
    good = {"numeric": 1, "choice": "A", "math": "1", "checks": [{"kind": "json"}]}[column]
    with pytest.raises(DataError, match=r"x\.jsonl`, row 2: ") as error:
        read({"a": good}, {"a": value}, columns={column: "a"})
    assert words in str(error.value)


def test_a_row_without_an_answer(read):
    with pytest.raises(DataError, match=r"x\.jsonl`, row 2 has no column `a`, which the recipe reads \(columns: \{numeric: a\}\)"):
        read({"a": 1}, {}, columns={"numeric": "a"})


def test_a_choice_that_is_not_an_option(read):
    with pytest.raises(DataError, match="write one of the choices fine, not fine, its letter or its number from 0"):
        read({"output": "fine", "c": "C"}, columns={"choice": "c"}, choices=NAMES)


def test_without_math_verify_the_extra_is_named(read, monkeypatch):
    monkeypatch.setattr(answers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"the column `math` needs the package math-verify; run `pip install 'tadistill\[math\]'`"):
        read({"a": "1"}, columns={"math": "a"})


def test_reading_other_rules_imports_no_sympy(read, monkeypatch):
    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", lambda name, *rest: pytest.fail(name) if "math_verify" in name else real(name, *rest))
    assert read({"a": 1}, columns={"numeric": "a"})[0].answers == {"numeric": Decimal(1)}


def test_the_recipe_reads_these_columns():
    data = Data.model_validate({"train": "x", "dev": "x", "test": [{"load": "x", "columns": dict.fromkeys(RULES, "answer")}]})
    assert list(data.test[0].columns) == list(RULES)
