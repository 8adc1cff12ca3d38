"""Answers that pass as text: the bytes that the model wrote, and the student's own tokens behind its own prompts."""

from dataclasses import asdict, replace

import pytest
from tests.byte_models import BOS, EOS, IM_END, bpe_tokenizer, byte_tokenizer
from tests.unit.models.conftest import word_tokenizer

from tadistill.data.encoding_rules import Rules
from tadistill.data.retokenised_answers import Answer, read_texts, retokenised, said
from tadistill.data.rows import Example
from tadistill.data.token_bytes import token_bytes
from tadistill.disk import write_rows
from tadistill.errors import StoreError

BYTES = token_bytes(byte_tokenizer(), (EOS, IM_END))
STUDENT = bpe_tokenizer(["the cat sat on the mat " * 3], 280)
ROWS = [Example(f"ask {i}", "", ("never read",)) for i in range(5)]
RULES = Rules(max_prompt=20, max_length=30, template="plain")


def ids(text: str | bytes) -> list[int]:
    return [BYTES.of_byte[byte] for byte in (text.encode() if isinstance(text, str) else text)]


@pytest.mark.parametrize(
    ("tokens", "text", "ended", "why"),
    [
        ([*ids(" the é "), EOS], " the é ", True, None),
        ([*ids("the"), IM_END], "the", True, None),
        (ids("the"), "the", False, None),
        ([EOS], "", True, None),
        ([], "", False, None),
        (ids("the é")[:-1], "the ", False, "bytes"),  # cut inside a character by the limit of new tokens
        ([*ids(b"a\xffb"), EOS], "a", False, "bytes"),
        ([*ids(b"\xff"), EOS], "", False, "bytes"),
        ([*ids("the"), BOS, *ids("cat"), EOS], "the", False, "token"),
    ],
)
def test_the_text_is_the_bytes_that_the_model_wrote(tokens, text, ended, why):
    found = said(3, tokens, BYTES)
    assert found[:2] == (Answer(3, text, ended), why)
    assert (found.tokens, found.size) == (len(text.encode()) + ended, len(text.encode()))  # a token is a byte


def test_words_without_bytes_of_their_own_are_decoded():
    words = word_tokenizer()
    read = token_bytes(words)
    assert said(0, [5, 9, 1], read) == (Answer(0, "w2 w6", True), None, 3, 5)
    assert said(0, [5, 2, 9, 1], read) == (Answer(0, "w2", False), "token", 1, 2)  # <unk> is no text
    assert said(0, [5, 999], read) == (Answer(0, "w2", False), "token", 1, 2)


def parts(answers, rules=RULES, rows=ROWS, tokenizer=STUDENT):
    (found,) = retokenised(rows, answers, tokenizer, rules, name="set")
    return found


def test_the_student_reads_its_own_prompt_and_ends_only_what_has_ended():
    found = parts([Answer(0, "the cat", True), Answer(3, " sat", False), Answer(4, "", False)])
    texts = [(e.row, STUDENT.decode(e.prompt), STUDENT.decode(e.response)) for e in found.encoded]
    assert texts == [(0, "ask 0\n", "the cat<|end|>"), (3, "ask 3\n", " sat")]
    assert (found.counts.rows, found.counts.used, found.counts.empty) == (3, 2, 1)
    assert found.tokens == sum(len(e.response) for e in found.encoded)


def test_the_text_of_a_special_token_in_an_answer_is_ordinary_text():
    text = "the <|end|> cat"
    found = parts([Answer(0, text, True)], replace(RULES, max_length=60))
    (row,) = found.encoded
    assert (STUDENT.decode(row.response), row.response.count(STUDENT.eos_token_id)) == (f"{text}<|end|>", 1)
    assert row.response[-1] == STUDENT.eos_token_id
    assert found.counts.text == ""


def test_white_space_that_the_student_drops_is_an_empty_answer():
    found = parts([Answer(0, "\n\n", False), Answer(1, "w2", False)], tokenizer=word_tokenizer())
    assert [e.row for e in found.encoded] == [1]
    assert (found.counts.rows, found.counts.used, found.counts.empty, found.counts.silent) == (2, 1, 1, 0)


@pytest.mark.parametrize("ended", [True, False])
def test_an_answer_that_is_too_long_is_cut_counted_and_not_ended(ended):
    """The limit is exact: an answer that was cut anyway needs no room for an end token."""
    prompt = len(STUDENT("ask 0\n")["input_ids"])
    fits = "x" * (RULES.max_length - prompt - ended)
    (whole,), counts = parts([Answer(0, fits, ended)]).encoded, parts([Answer(0, fits, ended)]).counts
    assert STUDENT.decode(whole.response) == fits + "<|end|>" * ended
    assert (len(whole.prompt) + len(whole.response), counts.shortened) == (RULES.max_length, 0)
    found = parts([Answer(0, fits + "y", ended)])
    assert STUDENT.decode(found.encoded[0].response) == fits + "y" * ended
    assert (found.counts.shortened, found.counts.used) == (1, 1)
    dropped = parts([Answer(0, fits + "y", ended)], Rules(**{**vars(RULES), "long_responses": "drop"}))
    assert (dropped.encoded, dropped.counts.answers) == ((), 1)


def test_prompts_that_only_the_student_finds_too_long_shift_no_other_row():
    rows = [*ROWS[:2], Example("long " * 20, "", ("",)), *ROWS[3:]]
    found = parts([Answer(i, f"the {i}", True) for i in range(5)], rows=rows)
    assert [(e.row, STUDENT.decode(e.response)) for e in found.encoded] == [(i, f"the {i}<|end|>") for i in (0, 1, 3, 4)]
    assert found.counts.long == 1


def test_unknown_tokens_of_answers_are_counted():
    found = parts([Answer(0, "w1 été w2", True)], tokenizer=word_tokenizer())
    assert (found.unknown, found.tokens) == (1, 4)


def test_thinking_in_an_answer_is_learnt_as_it_is():
    rules = Rules(**{**vars(RULES), "thinking": "drop", "max_length": 60})
    (found,) = parts([Answer(0, "<think>a</think>b", True)], rules).encoded
    assert STUDENT.decode(found.response) == "<think>a</think>b<|end|>"


def test_the_file_is_read_as_it_was_written_and_its_order_is_checked(tmp_path):
    file, answers = tmp_path / "texts.jsonl", [Answer(0, " \u2028é\n", True), Answer(4, "", False)]
    write_rows(file, map(asdict, answers))
    assert [*read_texts(file)] == answers
    for damage in ([*reversed(answers)], [answers[0], answers[0]]):
        write_rows(file, map(asdict, damage))
        with pytest.raises(StoreError, match="is not larger"):
            [*read_texts(file)]
    write_rows(file, [{"row": 0, "text": "a"}])
    with pytest.raises(StoreError, match="ended"):
        [*read_texts(file)]


def test_the_students_chat_template_writes_the_prompt_and_its_own_token_ends_the_answer():
    """The row's own references are not read, and neither is the answer's message in a conversation."""
    student, rules = byte_tokenizer(), Rules(max_prompt=200, max_length=300, template="chat", turns="last")
    turns = ({"role": "user", "content": "ask"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "more"})
    talk = Example("", "", ("x",), messages=turns, last={"role": "assistant", "content": "x"})
    found = parts([Answer(0, " the cat ", True), Answer(1, "sat", False)], rules, [ROWS[0], talk], student).encoded
    prompts = ["user\nask 0", "user\nask<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nmore"]
    assert [student.decode(e.prompt) for e in found] == [f"<|im_start|>{text}<|im_end|>\n<|im_start|>assistant\n" for text in prompts]
    assert [student.decode(e.response) for e in found] == [" the cat <|im_end|>", "sat"]
