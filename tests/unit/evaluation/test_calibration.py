"""Calibration against direct loops; label probabilities against whole logits."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tests.conftest import tiny_model

from tadistill.errors import DataError
from tadistill.evaluation.token_scores import Subject, bins, ece, label_probabilities, likeliest

RNG = np.random.default_rng(0)
CONFIDENCE = np.concatenate([RNG.random(400), np.arange(16) / 15, [0.0, 1.0, 1.0]])
CORRECT = RNG.random(len(CONFIDENCE)) < CONFIDENCE**2


def direct(confidence, correct, count: int) -> tuple[float, list[int]]:
    """The definition, by a double loop over bins and predictions."""
    error, sizes, edges = 0.0, [], np.linspace(0, 1, count + 1)
    for k in range(count):
        inside = [i for i, c in enumerate(confidence) if edges[k] <= c < edges[k + 1] or (k == count - 1 and c == 1)]
        sizes.append(len(inside))
        if inside:
            sure = sum(confidence[i] for i in inside) / len(inside)
            right = sum(bool(correct[i]) for i in inside) / len(inside)
            error += len(inside) / len(confidence) * abs(right - sure)
    return 100 * error, sizes


@pytest.mark.parametrize("count", [1, 4, 15])
def test_ece_equals_a_double_loop(count):
    error, sizes = direct(CONFIDENCE, CORRECT, count)
    found = bins(CONFIDENCE, CORRECT, count)
    assert found.count.tolist() == sizes
    assert ece(found) == pytest.approx(error)
    assert error > 1


@pytest.mark.parametrize(
    ("confidence", "correct", "error"),
    [
        ([1.0, 1.0], [True, True], 0),
        ([1.0, 1.0], [False, False], 100),
        ([0.0], [False], 0),
        ([0.75] * 4, [True, True, True, False], 0),
        ([0.5] * 4, [True] * 4, 50),
        ([0.9, 0.1], [True, False], 10),
        ([0.61, 0.65], [True, False], 13),  # one bin: 50 right, 63 sure
    ],
)
def test_ece_by_hand(confidence, correct, error):
    assert ece(bins(confidence, correct)) == pytest.approx(error)


def test_bins_hold_means():
    found = bins([0.1, 0.3, 0.9, 1.0], [True, False, True, True], 2)
    assert json.loads(json.dumps(found.as_json())) == {"count": [2, 2], "confidence": [0.2, 0.95], "correct": [0.5, 1.0]}
    empty = bins([1.0], [False]).as_json()
    assert empty == {"count": [0] * 14 + [1], "confidence": [0.0] * 14 + [1.0], "correct": [0.0] * 15}


def test_rounded_certainty_is_certainty():
    assert bins(np.array([1 + 1e-7], np.float32), [True]).count[-1] == 1


def test_what_is_not_a_prediction_is_refused():
    for bad in (-0.1, 1.1, float("nan")):
        with pytest.raises(DataError, match="not a probability"):
            bins([0.5, bad], [True, True])


PROMPTS = [(5, 6, 7), (8,), (9, 10, 11, 12, 13)]
CHOICES = [((3,), (4,), (2, 1)), ((1, 2), (1, 3), (1,), (4, 2, 3)), ((20,), (21,))]


def spoken(model, prompt, label, vocab) -> float:
    """log p(label | prompt), one token at a time."""
    total = 0.0
    for j, token in enumerate(label):
        logits = model(torch.tensor([prompt + label[:j]])).logits[0, -1, :vocab].double()
        total += float(logits.log_softmax(-1)[token])
    return total


@pytest.mark.parametrize(("batch", "vocab"), [(1, 31), (3, 31), (64, 31), (64, 25)])
def test_label_probabilities_equal_a_direct_computation(kind, batch, vocab):
    model = tiny_model(kind)
    found = label_probabilities(Subject(model, SimpleNamespace(eos_token_id=0), vocab, (0,)), PROMPTS, CHOICES, batch=batch)
    for probabilities, prompt, labels in zip(found, PROMPTS, CHOICES, strict=True):
        with torch.no_grad():
            expected = torch.tensor([spoken(model, prompt, label, vocab) for label in labels]).double().softmax(0)
        np.testing.assert_allclose(probabilities, expected.numpy(), atol=1e-4)
        assert probabilities.sum() == pytest.approx(1)


def test_the_likeliest_choice_is_judged():
    probabilities = [np.array([0.2, 0.8]), np.array([0.6, 0.3, 0.1]), np.array([0.5, 0.5])]
    choices = [("no", "yes"), ("a", "b", "c"), ("no", "yes")]
    confidence, correct = likeliest(probabilities, choices, [("yes",), ("b", "c"), ("yes", "no")])
    assert confidence.tolist() == [0.8, 0.6, 0.5]
    assert correct.tolist() == [True, False, True]
