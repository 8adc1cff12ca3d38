"""Bits per byte: equal to a direct float64 computation, the same however a text is cut into tokens, and independent of padding."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tests.chat_templates import QWEN3, chat_tokenizer
from tests.conftest import tiny_model

from tadistill.config import DataRef, Evaluate
from tadistill.data import datasets, tinyworld
from tadistill.data.batch import Sequence
from tadistill.data.encoding import EvalSet, encode
from tadistill.data.encoding_rules import Rules
from tadistill.data.rows import example
from tadistill.data.turns import without_thinking
from tadistill.evaluation.model_pairs import cross_read
from tadistill.evaluation.run import score
from tadistill.evaluation.token_scores import Subject, bits_per_byte, reference_sizes, unknown_text

HERE = tinyworld.world(0, 12)
NAME, PLACE = HERE.names[0], HERE.places[0]
TEXTS = ("the home of bodan is kirkham .", "naïve café — 猫 🙂", "z", "")
SETTINGS = Evaluate(seeds=(1,), max_new_tokens=4, batch=3)
RULES = Rules(60, 200, template="plain")


def prepared(source: str, texts: tuple[str, ...], *, longest: int = 200) -> tuple[Subject, EvalSet]:
    tokenizer: Any = tinyworld.tokenizer(source, people=12)
    examples = [datasets.Example("in which town does bodan live ?", "", (text,)) for text in texts]
    rules = replace(RULES, max_length=longest)
    subject = Subject(tiny_model("llama", vocab=len(tokenizer)), tokenizer, len(tokenizer), (tokenizer.eos_token_id,))
    return subject, EvalSet("set", examples, encode(examples, tokenizer, rules)[0])


def measured(subject: Subject, data: EvalSet) -> np.ndarray:
    answers = {1: [Sequence(e.prompt, (subject.eos[0],)) for e in data.encoded]}
    return np.array(score(subject, data, SETTINGS, answers, per_byte=RULES).scores["bits_per_byte"])[:, 0]


@torch.no_grad()
def direct(subject: Subject, prompt: tuple[int, ...], response: tuple[int, ...], text: str) -> float:
    logits = subject.model.double()(torch.tensor([[*prompt, *response]])).logits[0].double()
    log_p = logits.log_softmax(-1)
    subject.model.float()
    bits = -sum(float(log_p[len(prompt) + i - 1, token]) for i, token in enumerate(response)) / np.log(2)
    return bits / max(len(text.encode("utf-8")), 1)


@pytest.mark.parametrize("source", tinyworld.TOKENIZERS)
def test_equals_a_direct_computation_with_the_models_own_tokens(source):
    texts = TEXTS if source == "tinyworld-bpe" else TEXTS[:1]
    subject, data = prepared(source, texts)
    found = measured(subject, data)  # in one padded batch
    for value, encoded, text in zip(found, data.encoded, texts, strict=True):
        assert encoded.response[-1] == subject.eos[0]  # the end belongs to the text
        assert value == pytest.approx(direct(subject, encoded.prompt, encoded.response, text), rel=1e-5)
    alone = [measured(subject, replace(data, encoded=[row]))[0] for row in data.encoded]
    np.testing.assert_allclose(found, alone, rtol=1e-5)  # padding that is masked counts like padding that is not there


def test_a_uniform_model_has_the_same_value_for_every_way_to_spell_a_text():
    # two tokenizers: one writes "ab" as one token with probability 1/4, the other as two tokens with probability 1/2 each
    one, other = bits_per_byte([np.log([4.0])], [2]), bits_per_byte([np.log([2.0, 2.0])], [2])
    assert one == other == 1.0


def test_a_reference_that_was_cut_counts_only_the_bytes_that_are_left():
    subject, data = prepared("tinyworld-bpe", ("naïve café — 猫 🙂",), longest=25)
    (encoded,) = data.encoded
    kept = subject.tokenizer.decode([*encoded.response])
    assert encoded.response[-1] != subject.eos[0]
    (size,) = reference_sizes(data, subject.tokenizer, subject.eos, RULES)
    assert 0 < size < len("naïve café — 猫 🙂".encode())
    assert "naïve café — 猫 🙂".encode()[:size].decode(errors="replace") == kept
    assert measured(subject, data)[0] == pytest.approx(direct(subject, encoded.prompt, encoded.response, "x" * size), rel=1e-5)


@pytest.mark.parametrize(
    ("turns", "thinking", "text"),
    [
        ("answer", "keep", "It's four."),
        ("last", "keep", "<think>\nTwo and two.\n</think>\n\nIt's four."),
        ("last", "mask", "It's four."),
        ("last", "drop", "<think>\n\n</think>\n\nIt's four."),  # the template writes empty thinking
    ],
)
def test_the_bytes_are_those_of_the_text_that_counts(turns, thinking, text):
    tokenizer = chat_tokenizer(QWEN3, words=False)
    said = {"role": "assistant", "reasoning_content": "Two and two.", "content": "It's four."}
    row = example({"messages": [{"role": "user", "content": "2 + 2?"}, said]}, DataRef(load="d"), 0)
    rules = Rules(600, 900, template="chat", turns=turns, thinking=thinking)
    rows = [without_thinking(row)] if thinking == "drop" else [row]
    data = EvalSet("d", rows, encode([row], tokenizer, rules)[0])
    (size,) = reference_sizes(data, tokenizer, {e.response[-1] for e in data.encoded}, rules)
    assert size == len(text)


def test_words_that_a_tokenizer_cannot_read_are_counted():
    subject, data = prepared("tinyworld", ("bodan lives in 猫",))
    assert ": 2 tokens of the references are unknown" in unknown_text(data, subject.tokenizer)  # `lives` and the cat
    subject, data = prepared("tinyworld-bpe", ("bodan lives in 猫",))
    assert unknown_text(data, subject.tokenizer) == ""


def test_only_asked_for():
    subject, data = prepared("tinyworld", TEXTS[:1])
    answers = {1: [Sequence(e.prompt, (subject.eos[0],)) for e in data.encoded]}
    assert "bits_per_byte" not in score(subject, data, SETTINGS, answers).scores


def answers_of(subject: Subject, data: EvalSet, texts: list[str], *, ends: bool = True) -> dict[int, Sequence]:
    ids = [subject.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    return {e.row: Sequence(e.prompt, (*i, *subject.eos[: int(ends)])) for e, i in zip(data.encoded, ids, strict=True)}


def test_each_model_reads_the_others_text_with_its_own_tokens():
    texts = [f"the home of {NAME} is {PLACE} .", NAME, "."]
    (words, of_words), (pieces, of_pieces) = (prepared(source, ("x",) * 3) for source in tinyworld.TOKENIZERS)
    rules = Rules(60, 200, template="plain")
    found = cross_read(words, pieces, of_pieces, rules, answers_of(words, of_words, texts), batch=2)
    assert (found.early, found.unknown) == (0, 0)
    written, read = answers_of(words, of_words, texts), answers_of(pieces, of_pieces, texts)
    for row, text in enumerate(texts):
        assert found.writer[row] == pytest.approx(direct(words, written[row].prompt, written[row].response, text), rel=1e-5)
        assert found.reader[row] == pytest.approx(direct(pieces, read[row].prompt, read[row].response, text), rel=1e-5)
    back = cross_read(pieces, words, of_words, rules, answers_of(pieces, of_pieces, texts), batch=2)
    np.testing.assert_allclose(back.reader, found.writer, rtol=1e-5)  # the same text, whoever wrote it
    same = cross_read(words, words, of_words, rules, answers_of(words, of_words, texts), batch=2)
    np.testing.assert_allclose(same.reader - same.writer, 0, atol=1e-6)


def test_answers_without_an_end_and_without_text():
    (words, of_words), (pieces, of_pieces) = (prepared(source, ("x",) * 2) for source in tinyworld.TOKENIZERS)
    rules = Rules(60, 200, template="plain")
    for texts, ends in (([f"{NAME} is", NAME], False), (["", ""], True)):
        found = cross_read(words, pieces, of_pieces, rules, answers_of(words, of_words, texts, ends=ends), batch=2)
        read = answers_of(pieces, of_pieces, texts, ends=ends)
        for row, text in enumerate(texts):
            assert found.reader[row] == pytest.approx(direct(pieces, read[row].prompt, read[row].response, text), rel=1e-5)
    nothing = cross_read(words, pieces, of_pieces, rules, {e.row: Sequence(e.prompt, ()) for e in of_words.encoded}, batch=2)
    assert nothing.reader.tolist() == nothing.writer.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("source", tinyworld.TOKENIZERS)
def test_both_models_are_measured_on_the_text_before_the_first_thing_that_is_no_text(source):
    subject, data = prepared(source, ("x",) * 3)
    words, more = (answers_of(subject, data, [text] * 3, ends=False)[0].response for text in (f"{NAME} is", f"{PLACE} . {NAME}"))
    special = int(subject.tokenizer.unk_token_id or subject.tokenizer.pad_token_id)
    half = subject.tokenizer("猫", add_special_tokens=False)["input_ids"][:-1] if source == "tinyworld-bpe" else [special]
    answers = [(*words, *half), (*words, special, *more, *subject.eos), (*half, *more)]
    own = {e.row: Sequence(e.prompt, ids) for e, ids in zip(data.encoded, answers, strict=True)}
    found = cross_read(subject, subject, data, RULES, own, batch=2)
    assert found.early == 3
    np.testing.assert_allclose(found.writer, found.reader, rtol=1e-5)  # one model has one value for one text
    assert found.writer[0] == pytest.approx(direct(subject, own[0].prompt, words, f"{NAME} is"), rel=1e-5)
    assert found.writer[2] == 0  # no text at all
