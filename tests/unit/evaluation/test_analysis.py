"""A model beside teacher and assistants: the budget telescopes, each term is the expectation it claims to be, exposure by position."""

import numpy as np
import pytest
import torch
from tests.conftest import tiny_model

from tadistill.data.batch import Sequence
from tadistill.data.encoding import Encoded, EvalSet
from tadistill.evaluation.model_pairs import analyse
from tadistill.evaluation.token_scores import Subject

VOCAB, PROMPT = 31, (3, 5, 7)


class Tokenizer:
    eos_token_id = 0


@pytest.fixture(scope="module")
def models():
    return [tiny_model("llama", vocab=VOCAB, seed=seed) for seed in range(4)]


@pytest.fixture(scope="module")
def data():
    return EvalSet("set", [], [Encoded(i, PROMPT, (9, 4 + i, 0)) for i in range(3)])


def answers(seed):
    rng = np.random.default_rng(seed)
    return [Sequence(PROMPT, tuple(map(int, rng.integers(1, VOCAB, size)))) for size in (2, 5, 4)]


def log_probs(model, sequence):
    with torch.no_grad():
        logits = model(torch.tensor([sequence.prompt + sequence.response])).logits[0, len(sequence.prompt) - 1 : -1]
    return logits.double().log_softmax(-1)


def run(models, data, assistants):
    student, teacher = models[0], models[1]
    own, of_teacher = {1: answers(1), 2: answers(2)}, {1: answers(3)}
    subject = Subject(student, Tokenizer(), VOCAB, (0,))
    return analyse(subject, data, own, of_teacher, others=[teacher, *assistants], batch=2), own, of_teacher


def test_the_budget_is_the_sum_of_the_expectations_that_define_it(models, data):
    student, teacher, upper, lower = models  # teacher > upper > lower > student
    (scores, _), own, _ = run(models, data, [upper, lower])
    names = ["budget/0", "budget/1", "budget/2"]
    np.testing.assert_allclose(sum(np.array(scores[name]) for name in names), scores["reverse_kl"], atol=1e-6)
    for column, seed in enumerate(own):
        for row, sequence in enumerate(own[seed]):
            q, p, a1, a2 = (log_probs(m, sequence) for m in (student, teacher, upper, lower))
            expected = [q - a2, a2 - a1, a1 - p]
            found = [scores[name][row][column] for name in names]
            assert found == pytest.approx([float((q.exp() * e).sum(-1).mean()) for e in expected], abs=1e-4)


def test_without_assistants_there_is_no_budget(models, data):
    (scores, _), _, _ = run(models, data, [])
    assert set(scores) == {"forward_kl", "reverse_kl"}
    assert np.shape(scores["forward_kl"]) == (3, 1)
    assert np.shape(scores["reverse_kl"]) == (3, 2)


def test_exposure_averages_the_answers_that_are_that_long(models, data):
    student, teacher = models[:2]
    (_, exposure), own, of_teacher = run(models, data, [])
    for role, found in (("student", own), ("teacher", of_teacher)):
        sequences = [s for of_seed in found.values() for s in of_seed]
        assert exposure[role]["count"] == [sum(len(s.response) > t for s in sequences) for t in range(5)]
        at_three = []
        for s in sequences:
            if len(s.response) > 3:
                q, p = log_probs(student, s)[3], log_probs(teacher, s)[3]
                at_three.append(float((p.exp() * (p - q)).sum()))
        assert exposure[role]["kl"][3] == pytest.approx(np.mean(at_three), abs=1e-4)


def test_a_model_has_no_divergence_from_itself(models, data):
    subject = Subject(models[1], Tokenizer(), VOCAB, (0,))
    scores, exposure = analyse(subject, data, {1: answers(1)}, {1: answers(1)}, others=[models[1]], batch=2)
    assert np.abs(scores["forward_kl"]).max() < 1e-5
    assert np.abs(scores["reverse_kl"]).max() < 1e-5
    assert exposure["student"] == exposure["teacher"]


def test_without_answers_of_the_teacher_all_but_the_exposure_is_measured(models, data):
    (expected, _), own, _ = run(models, data, models[2:3])
    found = analyse(Subject(models[0], Tokenizer(), VOCAB, (0,)), data, own, {}, others=models[1:3], batch=2)
    assert found == (expected, None)


def test_each_batch_is_counted(models, data):
    counts, subject = [], Subject(models[0], Tokenizer(), VOCAB, (0,))
    analyse(subject, data, {1: answers(1), 2: answers(2)}, {1: answers(3)}, others=models[1:3], batch=2, tick=counts.append)
    assert max(counts) <= 2
    assert sum(counts) == 3 * (1 + 2 + 1)  # references, two seeds of the subject's answers, the teacher's answers
