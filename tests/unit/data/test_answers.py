"""Right answers of rows: how an answer is taken out of a text, each rule by hand, and rows without one."""

import builtins
import json
import threading
import time
from decimal import Decimal

import pytest

from tadistill.config import Data, DataRef
from tadistill.data import answers, datasets
from tadistill.data.answers import RULES, chosen, final_number
from tadistill.errors import ConfigError, DataError
from tadistill.evaluation.text_scores import score_quality
from tadistill.text import named

NAMES = ["fine", "not fine"]
CITIES = ("Paris", "London", "Rome", "Berlin")


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
        (r"\boxed{10,\!080}", "10080"),
        (r"\boxed{1{,}234}, so 1\,234", "1234"),
        ("1\u202f234 km", "1234"),
        (r"\boxed{3 + 4 = 7}", "7"),
        (r"\boxed{12\text{ cm}^2}", "12"),
        (r"\boxed{90^\circ}", "90"),
        (r"\boxed{\$18}", "18"),
        (r"10/2 = 5", "5"),
        (r"\boxed{5/2}", None),  # a fraction is no number
        ("there are 3, so 1/2", None),
        (r"it is $\frac{1}{2}$", None),
        ("#### 1/2", None),
        (r"\boxed{2^{10}} is more than 10", None),
        (r"\boxed{3\sqrt{2}}", None),
        (r"\boxed{2\pi}", None),
        (r"\boxed{3, 4}", None),
        (r"\boxed{\text{none of these}}, but 4", "4"),
        (r"<think>\boxed{5}? No.</think>The answer is 6.", "6"),
        ("<think>Is it 5", None),
        ("٣", "3"),
        ("the answer is 2^{10}", None),
        (r"It is $3\sqrt{2}$", None),
        (r"It is $2\pi$", None),
        ("2^{10} = 1024", "1024"),
        ("3 apples and x^2", "3"),
        (r"\boxed{\bf 18}", "18"),
        (r"\boxed{\displaystyle 18}", "18"),
        (r"\boxed{18\dots}", "18"),
        (r"\boxed{18\degree}", "18"),
        (r"\boxed{18^{\text{th}}}", "18"),
        (r"\boxed{18 m^2}", "18"),
        (r"\boxed{3x^2}", None),
        (r"\boxed{5 = x}", "5"),
        ("#### 18\n\nQuestion: How many?\n#### 5", "18"),
        ("Question: How many? 5\nQuestion: And now? 18", "18"),  # without a mark, the last one
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


# fmt: off
CHATS = {
    0: (
        "The answer is A, B is wrong.",
    ),
    1: (
        "B", "B.", "(B)", "**B**", "B) London", "**B. London**", "B: London", "b) London", "(b)", "`B`", "[B]", "B - London", "London",
        "**London**", "London.", "Option B", "**Option B: London**", "B\n\nLondon is the capital of the UK.", "The answer is B.",
        "The correct answer is (B) London.", "The correct answer is **B) London**.", "The correct answer is option B.", "Answer: B",
        "Answer: Option B", "**Answer:** B", "**Answer: B**", "**Answer:**\nB", "### Answer\n\n**B. London**", "Final answer: B",
        "**Final Answer**\n\nB", "answer: b", "The answer is: \n\n**B**", "The answer to this question is B.",
        "The answer would be B) London.", "The answer should be London.", "The best option is B.", "My choice is B.",
        "The right choice: B", "The answer is most likely London.", "The answer is, therefore, B.", "I choose B.",
        "I'd go with option B because London is in the UK.", "I would pick (B).", "The answer is the letter B.",
        r"Therefore, the answer is $\boxed{B}$.", r"\boxed{\text{B}}", "\\[\n\\boxed{\\textbf{(B)}\\ London}\n\\]", r"\boxed{B. London}",
        "Option B is correct.", "**B** is the correct answer.", "B) London is the right answer.", "So London is the correct choice.",
        "(B) is clearly the best answer, since A is in France.", "London is the answer.",
        "The answer is B.\n\nOption A is wrong because it is in France. Option C is in Italy.",
        "The answer is B.\n- Option C: Rome is the capital of Italy.", "B. London\n\nOption A: Paris is in France, so it is wrong.",
        "The answer is **B**.\n\nLet me know if you want another option!", "The answer is B. If this answer is unclear, please ask.",
        "The correct answer is B. The other options are wrong:\n\nA) Paris is the capital of France.\nC) Rome is the capital of Italy.",
        "Answer: B\n\nExplanation: Paris (A), Rome (C) and Berlin (D) are not in the UK.",
        "B is right. A is not the answer, because Paris is in France.",
        "Why not the others? Paris is French and Rome is Italian. So the answer isn't A or C.\n\nAnswer: London",
        "Paris is in France and Rome is in Italy. London is in the UK. So the answer is B.",
        "Let's go through the options:\n\nA) Paris is French.\nB) London is in the UK.\nC) Rome is Italian.\n\nThe answer is B.",
        "A. Paris: in France\nB. London: in the UK\nC. Rome: in Italy\n\nSo the correct option is **B**.",
        "Option A is Paris. Option B is London. Option B is correct.", "At first the answer is A. Wait, no: the answer is B.",
        "The answer is not A. It is in France. The answer is B.",
        "Paris is French, Rome is Italian, London is British. I choose option B.", "Paris is in France, Rome in Italy, so B.",
        "Only London is in the UK.", "The question asks for the UK, so it must be (B).", "Paris is wrong and Rome is wrong. **B**",
        "<think>\nIs the answer A? The answer is A, perhaps. No, Paris is in France.\n</think>\n\nB. London",
        "Hmm, the answer is A? No.</think>\n\n**B**",
        "答案：B", "答案是：（B）", "（B）London", "Ｂ", "B。", "【B】", "Antwort: **B**", "Réponse : B",
        "La respuesta es: B.", "«London»", "Die Antwort ist B.", "Paris is in France, but London is the correct choice; Rome is not.",
        "The answer is B.\n", "The answer is London, and Paris is wrong.", "Paris is partly correct. The answer is London.",
        "The answer is London and not Paris.", "London is the only right answer, and Paris is not.", "B is the only correct option.",
    ),
    2: (
        "Let's think step by step. Italy's capital is asked. Hence, option (C) is the right answer.",
        "The correct answer is:\n\n**C) Rome**\n\nExplanation: Rome has been the capital of Italy since 1871, after Florence.",
        "Sure! The answer to your question is option C, Rome.", "Answer: C (Rome)", "The answer: Rome (C)", "It's C.",
        "The capital is Rome, i.e. option C.", "Among the options, only C is correct.",
        "The answer is therefore C because A and B are not in Italy.", "Choice C: Rome", "C – Rome", "> **C**",
        "1. A is wrong.\n2. C is right.", '{"answer": "C"}', "<answer>C</answer>", "<answer>\nC\n</answer>", "The answer is `C`.",
        "The answer is “C”.", "**The correct answer is C: Rome.**", "The answer is C) Rome, not A) Paris.", "Rome (C), not Paris (A).",
        "Final Answer: The final answer is C. I hope it is correct.", r"The final answer is $\boxed{\text{C}}$.", "选C。", "答案是C。",
        "因此，正确答案是选项C。", "정답: C", "Ответ: C", "La réponse correcte est C) Rome.", "C is the answer.", "ANSWER: C", "Answer:C",
        "The answer is C. A and B are in other countries.", "The answer is C (A and B are wrong).", "\\boxed{C}\n\nNot A.", "So, C.",
        "The answer is I think C", "I would say Rome.", "I'd say it is C", "*C*", "_C_", "__C__", "# C", "- C", "C,", "C;", "C!", "C?",
        "“C”", "c)", r"\boxed{C}.", "C\n", "Answer: C\n\nQuestion: and Spain?", "I'll go with C, since A and B are not in Italy.",
        "Well, C", "C is the most likely answer.", "c", "c.", "The correct choice among A, B, C, and D is C.",
        "C. Rome\n\nQuestion: What is the capital of Spain?\nAnswer: A", "Answer: C\n\nQ: And of the UK?\nAnswer: B",
        " C\n\n### Instruction:\nWhich is in France?\n\n### Response:\nA", "The answer is C.\nUser: why not A?\nAssistant: A is correct.",
        "It is false that A is correct, C", "It isn't true that Paris is the best answer. Rome",
        "I don't think A is correct. I think C is.",
        "Many would say Paris is the answer, but it's Rome.", "If the answer is A, then x = 2, which is impossible. So C.",
        "The final answer is C. Is there anything else? If my answer is A mistake, tell me.", "The answer is not A but C.",
        "The correct answer is therefore not A, B or D, but C.", "I'd rule out A, B and D. That leaves C.",
        "Not A, not B, not D: C", "Some might think A is correct. C is right.", "A: Paris - no. B: London - no. C: Rome - yes.\n\nSo C.",
    ),
    3: (
        "Based on the information, the most accurate answer is **D**.", "Looking at the choices, D is the best fit.",
    ),
    None: (
        "<think>\nThe answer is A, or is it", "I'm sorry, but I can't help with that.", "I don't know.", "As an AI, I have no opinion.",
        "", "None of the above.", "It is either Paris or London.", "The answer is A or B.", "Answer: A and C",
        "Both (A) and (B) are possible.", "A, B and C", "A/B", "Neither A nor B is correct.", "A) Paris\nB) London\nC) Rome\nD) Berlin",
        "A good question! It depends.", "The answer is E.", "I cannot answer: information is missing.",
        "Which option is correct? I am not sure.", "What is the correct answer? Hard to say.",
        "A. Paris is not in Italy.\nB. London is not in Italy.\nC. Rome is in Italy.\nD. Berlin is not in Italy.",
        "The answer is C & D.", "I think it's C, but it could be D.", r"\boxed{A and C}",
        "Statement A is correct, but statement B is not.", "USA and vitamin C in the USA",
        "Neither Paris nor London is correct.", "Answer: Paris or London", "A is partly right, but the answer is unclear.",
        "If London is correct, then Paris is wrong.", "The answer is Rome/Berlin", "It is not A.", "It can't be B.", "The answer isn't A",
        "The answer can't be C.", "Definitely not C", "I can't choose A.", "I would rule out D", "See appendix A",
        "The answer is vitamin C",
        "I need more information about vitamin C.", "I cannot answer this. Please provide option B.", "The question is missing option D",
        "Option A is wrong.", "(B) is wrong.", "We can exclude (C).", "Paris is wrong.", "It is certainly not Paris.",
        "A - wrong. B - wrong.",
        "I think that B is correct, but A could be correct too.", "Vitamin C is the answer.",
    ),
}
"""Answers of chat models to the question which of the four cities is meant, by the index of the choice that a person reads in them."""
# fmt: on


@pytest.mark.parametrize("index", CHATS)
def test_the_choice_of_a_chat_model(index):
    assert {text: chosen(text, CITIES) for text in CHATS[index]} == dict.fromkeys(CHATS[index], index)


def test_a_letter_is_read_without_the_choices():
    letters = {text: index for index in (1, 2) for text in CHATS[index] if not any(city in text for city in CITIES)}
    assert len(letters) > 60
    assert {text: chosen(text, ()) for text in letters if "I think" not in text} == {t: i for t, i in letters.items() if "I think" not in t}


@pytest.mark.parametrize(
    ("options", "text", "index"),
    [
        (("yes", "no"), "No, that is wrong.", 1),
        (("2", "2.5", "-2"), "It is 2.5.", 1),
        (("2", "2.5", "-2"), "x = -2", 2),
        (("The Sun.", "The Moon."), "The answer is the Moon", 1),
        (("巴黎", "伦敦"), "答案是伦敦。", 1),
        (("B", "A"), "The answer is A.", 1),  # letters in another order
        (("O", "A", "AB"), "The answer is AB.", 2),
        (("Scurvy", "Rickets", "Gout"), "Scurvy comes from a lack of vitamin C.", 0),
        (("positive", "negative"), "The answer is not positive.", None),
        (("positive", "negative"), "Not positive", None),
        (("positive", "negative"), "It isn't negative.", None),
        (("positive", "negative"), "It is not positive, it is negative.", 1),
        (("true", "false"), "It is not true.", None),
        (("true", "false"), "This is false.", 1),
        (("yes", "no"), "I have no idea.", None),
        (("yes", "no"), "No doubt about it: yes.", 0),
        (("yes", "no"), "The answer is no longer unclear: yes.", 0),
    ],
)
def test_choices_of_many_kinds(options, text, index):
    assert chosen(text, options) == index


@pytest.mark.slow
def test_looped_answers_are_read_in_linear_time():
    parts = ("-", ": ", "answer is ", "answer\n", "The answer\n\n", "the ", "A. ", "A or ", "Paris is the best ", "1,", "1/", "Question:\n")
    for part in parts:
        for read in (lambda text: chosen(text, CITIES), final_number):
            short, long = (min(_seconds(read, part * (size // len(part))) for _ in range(3)) for size in (2000, 16000))
            assert long < 24 * short + 0.02, part  # 64 times, if the work were quadratic


def _seconds(read, text):
    start = time.process_time()
    read(text)
    return time.process_time() - start


@pytest.mark.parametrize(
    ("phrase", "text", "found"),
    [
        ("Paris", "(Paris)", True),
        ("Paris", "_Paris_, France", True),
        ("Paris", "Parisian", False),
        ("5", "5.5 or -5 or 15 or 1,5", False),
        ("5", "It is 5.", True),
        ("巴黎", "首都是巴黎。", True),
        ("Paris", "首都是Paris。", True),
        ("é", "cafe\u0301 é", True),
        ("cafe", "cafe\u0301", False),  # with an accent
    ],
)
def test_phrases_stand_as_words_of_their_own(phrase, text, found):
    assert any(named(phrase, text)) == found


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


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        (r"so \boxed{10,\!080}", 10080),
        (r"\boxed{1{,}234}", 1234),
        (r"\boxed{x = 5}", 5),
        ("2 + 3\n#### $5", 5),
        (r"\boxed{18\text{ cm}^2}", 18),
    ],
)
def test_a_right_number_in_latex(read, answer, number):
    assert read({"a": answer}, columns={"numeric": "a"})[0].answers == {"numeric": number}


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
        ("numeric", r"\boxed{\frac{1}{2}}", "write one number"),
        ("numeric", r"\boxed{2^{10}}", "write one number"),
        ("numeric", r"\boxed{3\sqrt{2}}", "write one number"),
        ("numeric", r"\sqrt{2}", "write one number"),
        ("numeric", r"\boxed{(3,4)}", "write one number"),
        ("numeric", "2 + 3\n#### 5 to 6", "write one number"),
        ("numeric", "#### 1/2", "for fractions and other expressions, use the column `math`"),
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
    with pytest.raises(DataError, match=r"x\.jsonl`, line 2: ") as error:
        read({"a": good}, {"a": value}, columns={column: "a"})
    assert words in str(error.value)


def test_a_row_without_an_answer(read):
    with pytest.raises(DataError, match=r"x\.jsonl`, line 2 has no column `a`, which the recipe reads \(columns: \{numeric: a\}\)"):
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
