"""Evaluation: batch size changes nothing, KLs are exact, a model has none to itself."""

import numpy as np
import pytest
import torch
from tests.conftest import tiny_model

from tadistill.config import Evaluate
from tadistill.data import datasets, tinyworld
from tadistill.data.templates import encode
from tadistill.evaluation.run import EvalSet, Subject, dev_metrics, evaluate, per_sequence, references
from tadistill.objectives import forward_kl, reverse_kl


@pytest.fixture(scope="module")
def tokenizer():
    return tinyworld.tokenizer(people=20)


@pytest.fixture(scope="module")
def data(tokenizer):
    rows = tinyworld.rows("tinyworld", "test", people=20)[:10]
    examples = [datasets.Example(r["instruction"], r["input"], tuple(r["outputs"]), facts=tuple(map(tuple, r["facts"]))) for r in rows]
    return EvalSet("tinyworld", examples, encode(examples, tokenizer, template="plain", max_prompt=32, max_length=64))


def subject(tokenizer, seed=0):
    return Subject(tiny_model("llama", vocab=len(tokenizer), seed=seed), tokenizer, len(tokenizer), (tokenizer.eos_token_id,))


def settings(**more) -> Evaluate:
    return Evaluate.model_validate({"seeds": [1, 2], "max_new_tokens": 8} | more)


def test_scores_do_not_depend_on_the_batch(tokenizer, data):
    teacher = tiny_model("llama", vocab=len(tokenizer), seed=4)
    one, _ = evaluate(subject(tokenizer), data, settings(batch=1), teacher=teacher)
    many, records = evaluate(subject(tokenizer), data, settings(batch=16), teacher=teacher)
    for metric in ("rouge_l", "fact_accuracy", "loss", "forward_kl", "reverse_kl", "length"):
        np.testing.assert_allclose(one[metric], many[metric], atol=1e-4)
    assert np.shape(many["rouge_l"]) == (10, 2)
    assert np.shape(many["loss"]) == (10, 1)
    assert len(records) == 20
    assert {r["seed"] for r in records} == {1, 2}


def test_divergences_equal_a_direct_computation(tokenizer, data):
    student, teacher = subject(tokenizer), tiny_model("llama", vocab=len(tokenizer), seed=4)
    found = per_sequence(student, references(data), batch=4, teacher=teacher)
    row = data.encoded[3]
    ids, at = torch.tensor([row.prompt + row.response]), slice(len(row.prompt) - 1, len(row.prompt) + len(row.response) - 1)
    with torch.no_grad():
        q, p = student.model(ids).logits[0, at], teacher(ids).logits[0, at]
    assert found["forward_kl"][3] == pytest.approx(float(forward_kl(q, p).mean()), abs=1e-4)
    assert found["reverse_kl"][3] == pytest.approx(float(reverse_kl(q, p).mean()), abs=1e-4)


def test_no_divergence_to_itself(tokenizer, data):
    student = subject(tokenizer)
    scores, _ = evaluate(student, data, settings(), teacher=student.model)
    assert np.abs(scores["forward_kl"]).max() < 1e-5
    assert np.abs(scores["reverse_kl"]).max() < 1e-5


def test_dev_metrics_compute_what_is_asked(tokenizer, data):
    student = subject(tokenizer)
    assert set(dev_metrics(student, data, settings(), "loss")) == {"loss"}
    assert {"loss", "rouge_l", "fact_accuracy"} <= set(dev_metrics(student, data, settings(), "rouge_l"))
    teacher = tiny_model("llama", vocab=len(tokenizer), seed=4)
    assert dev_metrics(student, data, settings(), "reverse_kl", teacher=teacher)["reverse_kl"] > 0
