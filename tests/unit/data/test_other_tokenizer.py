"""Rows of a student with the prompts of a teacher that reads other rows, and the lengths of both readings in a plan."""

import numpy as np
import pytest
from tests.byte_models import bpe_tokenizer, byte_tokenizer

from tadistill.data.alignment import align, read_again
from tadistill.data.batch import Sequence, references
from tadistill.data.encoding import Encoded
from tadistill.data.other_tokenizer import Behind
from tadistill.data.rows import Example
from tadistill.data.survey import Survey
from tadistill.data.token_bytes import token_bytes
from tadistill.plan.costs.passes import Texts
from tadistill.plan.costs.sizes_and_lengths import second_lengths


def test_rows_are_matched_by_their_place_in_the_split():
    mine = [Encoded(row, (row,), (9,)) for row in (7, 2, 5, 0)]
    theirs = [Encoded(0, (10,), ()), Encoded(3, (13,), ()), Encoded(5, (15,), (), teacher_prompt=(50, 51)), Encoded(7, (17,), ())]
    found = Behind(mine, np.array([7, 2, 5, 0]), theirs)
    assert [(row.row, row.teacher_prompt) for row in found] == [(7, (17,)), (5, (50, 51)), (0, (10,))]  # in the student's order
    assert found.left_out == 1
    assert found[-1].teacher_prompt == (10,)
    assert [row.row for row in found[1:]] == [5, 0]
    with pytest.raises(IndexError):
        found[3]
    assert [s.teacher_prompt for s in references(found)] == [(17,), (50, 51), (10,)]
    answers = Behind([Sequence((1,), (2,)), Sequence((3,), (4,))], np.array([3, 0]), theirs)
    assert [(s.response, s.teacher_prompt) for s in answers] == [((2,), (13,)), ((4,), (10,))]


class Cutter:
    """A tokenizer of a plan, which only says where tokens end."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def cuts(self, text: str) -> list[int]:
        return [end for _, end in self.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]]


def test_lengths_of_a_plan_are_those_of_the_readings():
    student, teacher = byte_tokenizer(), bpe_tokenizer(["the cat sat on the mat"] * 3, 266)
    texts = ["the cat", "sat on", "a mat the cat"]
    ids = [tuple(student(text)["input_ids"]) for text in texts]
    sample = [Example("say", "", (text,)) for text in texts]
    rows = Survey(3, tuple(sample), conversations=False, instructions=True, choices=False, beyond_ascii=0.0, prompts="")
    mine = Texts(tuple((4, len(i) + 1) for i in ids), 3.0, places=(0, 1, 2))
    theirs = Texts(((6, 1), (7, 1)), 2.0, places=(1, 2))
    found = second_lengths(mine, theirs, rows, Cutter(student), Cutter(teacher))  # pyright: ignore[reportArgumentType]
    assert (found.places, found.count) == ((1, 2), 2.0)
    for second, response, prompt in zip(found.seconds, ids[1:], (6, 7), strict=True):
        own, other = read_again(response, token_bytes(student), token_bytes(teacher))
        spans = align(own, other)
        assert second.prompt == prompt
        assert second.response == len(other.ids) + 1
        assert second.spans == len(spans.ends) + 1  # the end of the text
        assert second.before == len(own.ids) - len(spans.ends)
    assert found.of_teacher.rows == tuple((s.prompt, s.response) for s in found.seconds)
    half = found.answered(3)
    assert [s.response for s in half.seconds] == [
        max(1, round(s.response * 3 / r)) for s, (_, r) in zip(found.seconds, found.rows, strict=True)
    ]
