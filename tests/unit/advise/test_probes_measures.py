"""Pairing measures against float64 references in probability space, their limiting cases, and estimates over prompts."""

import numpy as np
import pytest
import torch
from tests.conftest import tiny_model

from tadistill.advise.measures import estimate, measure, ratio
from tadistill.data.batch import Sequence
from tadistill.evaluation.model_pairs import ON_OWN_TEXT, entropy_gap, mass, overlap, pair_measures
from tadistill.evaluation.token_scores import Subject, likelihood, means
from tadistill.objectives import reverse_kl

N, V, K = 7, 23, 5


@pytest.fixture
def logits():
    draw = torch.Generator().manual_seed(3)
    return torch.randn(N, V, generator=draw) * 3, torch.randn(N, V, generator=draw) * 3


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_measures_are_their_definitions(logits):
    q, p = (softmax(z.double().numpy()) for z in logits)
    top_q, top_p = (np.argsort(-x, axis=-1)[:, :K] for x in (q, p))
    shared = [len(set(a) & set(b)) / K for a, b in zip(top_q, top_p, strict=True)]
    assert overlap(*logits, k=K).numpy() == pytest.approx(np.array(shared), abs=1e-6)
    expected = [q[n, top_p[n]].sum() for n in range(N)]
    assert mass(*logits, k=K).numpy() == pytest.approx(np.array(expected), abs=1e-6)
    gap = -(p * np.log(p)).sum(-1) + (q * np.log(q)).sum(-1)
    assert entropy_gap(*logits).numpy() == pytest.approx(gap, abs=1e-5)


def test_identical_models(logits):
    same = logits[0], logits[0].clone()
    assert (overlap(*same, k=K) == 1).all()
    assert (entropy_gap(*same) == 0).all()
    assert reverse_kl(*same).abs().max() < 1e-6
    assert mass(*same, k=V).numpy() == pytest.approx(np.ones(N), abs=1e-6)


def test_limits(logits):
    student, teacher = logits
    assert (overlap(student, -student, k=K) == 0).all()  # the likeliest tokens of one are the least likely of the other
    assert (overlap(student, teacher, k=10 * V) == 1).all()  # k is at most the vocabulary
    peaked = torch.zeros(1, V)
    peaked[0, 4] = 40.0
    assert entropy_gap(torch.zeros(1, V), peaked).item() == pytest.approx(-np.log(V), abs=1e-5)
    assert mass(peaked, torch.arange(V, 0, -1.0)[None], k=4).item() == pytest.approx(0, abs=1e-6)  # its one token is the fifth there


class Tokenizer:
    eos_token_id = 0


def log_probs(model, sequence):
    with torch.no_grad():
        logits = model(torch.tensor([sequence.prompt + sequence.response])).logits[0, len(sequence.prompt) - 1 : -1]
    return logits.double().log_softmax(-1)


def test_a_pair_of_models_is_measured_on_the_right_prefixes():
    learner, teacher = tiny_model("gpt2", seed=1), tiny_model("llama", seed=2)
    own = [Sequence((1, 2, 3), (4, 5, 6, 7)), Sequence((9,), (8, 2))]
    texts = [Sequence((1, 2, 3), (11, 12)), Sequence((9,), (13, 14, 15))]
    found = pair_measures(Subject(learner, Tokenizer(), 31, (0,)), teacher, own=own, references=texts, k=K, batch=2)
    assert set(found) == {*ON_OWN_TEXT, "forward_kl"}
    for i in range(2):
        q, p = log_probs(learner, own[i]), log_probs(teacher, own[i])
        top_q, top_p = q.topk(K).indices, p.topk(K).indices
        shared = [len(set(a) & set(b)) / K for a, b in zip(top_q.tolist(), top_p.tolist(), strict=True)]
        expected = {
            "reverse_kl": (q.exp() * (q - p)).sum(-1),
            "overlap": torch.tensor(shared),
            "mass": q.exp().gather(-1, top_p).sum(-1),
            "entropy_gap": (q.exp() * q).sum(-1) - (p.exp() * p).sum(-1),
        }
        for name, values in expected.items():
            assert found[name][i] == pytest.approx(values.numpy(), abs=1e-4), name
        q, p = log_probs(learner, texts[i]), log_probs(teacher, texts[i])
        assert found["forward_kl"][i] == pytest.approx((p.exp() * (p - q)).sum(-1).numpy(), abs=1e-4)


def test_a_model_beside_itself():
    model = tiny_model("llama")
    texts = [Sequence((1, 2), (3, 4, 0)), Sequence((5,), (6, 0))]
    subject = Subject(model, Tokenizer(), 31, (0,))
    found = {name: means(values) for name, values in pair_measures(subject, model, own=texts, references=texts, k=K, batch=2).items()}
    assert found["overlap"].tolist() == [1, 1]
    for name in ("reverse_kl", "forward_kl", "entropy_gap"):
        assert np.abs(found[name]).max() < 1e-6


def test_estimates_over_prompts():
    values = [1.0, 2.0, 6.0]
    found = estimate(values)
    assert (found.mean, found.n) == (3.0, 3)
    assert found.se == pytest.approx(np.std(values, ddof=1) / np.sqrt(3))
    assert estimate([2.0]).se is None
    assert ratio([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]) == estimate([2.0, 2.0, 2.0])
    assert ratio([1.0], [0.0]).mean == np.inf


def test_the_ratio_has_the_error_of_repeated_draws():
    draw = np.random.default_rng(0)
    prompts = draw.gamma(4, size=(2000, 50))
    above, below = prompts + draw.normal(size=prompts.shape) / 2, 2 * prompts
    found = [ratio(a, b) for a, b in zip(above, below, strict=True)]
    assert np.mean([f.se for f in found]) == pytest.approx(np.std([f.mean for f in found]), rel=0.05)


def test_bias_is_the_hop_of_the_error_budget():
    """E_q[log p_A - log p_T] on the student's samples is KL(q ‖ p_T) - KL(q ‖ p_A), here taken apart token by token."""
    t, a, s = (tiny_model("llama", seed=seed) for seed in range(3))
    own = [Sequence((1, 2), (3, 4, 0)), Sequence((5,), (6, 0)), Sequence((7, 8), (9, 10, 11))]
    subjects = {name: Subject(m, Tokenizer(), 31, (0,)) for name, m in (("t", t), ("a", a), ("s", s))}
    models = {"t": t, "a": a, "s": s}
    alone = {
        name: {"loss": means(likelihood(subject, own, batch=2)["loss"]).tolist(), "rouge_l": [0.0] * 3, "entropy": [1.0] * 3}
        for name, subject in subjects.items()
    }
    together = {
        (x, y): {n: means(v).tolist() for n, v in pair_measures(subjects[y], models[x], own=own, references=own, k=K, batch=2).items()}
        for x, y in (("t", "a"), ("t", "s"), ("a", "s"))
    }
    found = measure({"t": 40, "a": 20, "s": 5}, alone, together)
    expected = []
    for sequence in own:
        q, p_a, p_t = (log_probs(m, sequence) for m in (s, a, t))
        expected.append(float((q.exp() * (p_a - p_t)).sum(-1).mean()))
    bias = found.pairs["a", "s"].bias
    assert bias.mean == pytest.approx(np.mean(expected), abs=1e-5)
    assert bias.se == pytest.approx(np.std(expected, ddof=1) / np.sqrt(3), abs=1e-5)
    assert (found.pairs["t", "s"].bias.mean, found.pairs["t", "s"].size_ratio) == (0, 8)
    advantage = [s_loss - t_loss for s_loss, t_loss in zip(alone["s"]["loss"], alone["t"]["loss"], strict=True)]
    assert found.pairs["t", "s"].advantage.mean == pytest.approx(np.mean(advantage))
