"""MiniLLM's step against loops in float64 that follow the paper and the released code, each of its fields, and the corpus term."""

import numpy as np
import pytest
import torch
from tests.conftest import response_logits, tiny_model

from tadistill.config.method import Method
from tadistill.config.objective import MiniLLM
from tadistill.config.sampling import TeacherMixedSampler
from tadistill.data.batch import Sequence, collate
from tadistill.objectives import cross_entropy
from tadistill.train.step import counts, make_step

LENGTH = 8
ROWS = [((5, 6), (7, 8, 9, 0)), ((4,), (11, 0)), ((1, 2, 3), (17, 18, 19, 20, 21, 0))]


def rollout_batch(old, teacher):
    """Responses with the log-probabilities that a rollout of `old` mixed with 0.2 of the teacher would have stored."""
    rows = []
    for prompt, response in ROWS:
        ids, at, tokens = torch.tensor([prompt + response]), slice(len(prompt) - 1, len(prompt) + len(response) - 1), torch.tensor(response)
        with torch.no_grad():
            log_q, log_p = (-cross_entropy(m(ids).logits[0, at], tokens) for m in (old, teacher))
        mixed = (0.8 * log_q.exp() + 0.2 * log_p.exp()).log()
        values = {"student": log_q, "teacher": log_p, "behaviour": mixed}
        rows.append(Sequence(prompt, response, {k: v.numpy().astype(np.float32) for k, v in values.items()}))
    return collate(rows, pad=0), rows


def terms(student, teacher, batch, per=1.0, **settings):
    sampler = TeacherMixedSampler(max_new_tokens=LENGTH)
    step = make_step(Method(objective=MiniLLM(**{"pt_weight": 0, **settings}), sampler=sampler), student, (teacher,), 31)
    (ready,) = step.prepare([batch], 0, lambda sums: sums)
    return step.loss(student, ready, {"response": per, "corpus": 1.0})


@pytest.fixture
def models():
    """A student that has moved since the rollout, the student of the rollout, and the teacher."""
    return tiny_model("llama", seed=9), tiny_model("llama"), tiny_model("llama", seed=5).requires_grad_(False)


def distributions(student, teacher, rows):
    """Per row (log q, log p) over the vocabulary in float64."""
    for row in rows:
        batch = collate([Sequence(row.prompt, row.response)], pad=0)
        with torch.no_grad():
            yield (response_logits(m, batch, 31).double().log_softmax(-1).numpy() for m in (student, teacher))


def kl(log_q, log_p):
    return (np.exp(log_q) * (log_q - log_p)).sum(-1)


def test_the_paper_by_hand(models):
    student, old, teacher = models
    batch, rows = rollout_batch(old, teacher)
    found = terms(student, teacher, batch).parts
    policy = single = 0.0
    for row, (log_q, log_p) in zip(rows, distributions(student, teacher, rows), strict=True):
        reward = (row.values["teacher"] - row.values["student"]).astype(float)
        total = len(reward)
        for t in range(1, total + 1):  # as in the paper, from 1
            ratio = np.exp(log_q[t - 1, row.response[t - 1]] - row.values["behaviour"][t - 1])
            weight = min(ratio, np.clip(ratio, 0.8, 1.2))
            policy -= reward[t:].sum() / max(total - t - 1, 1) * weight
            single += weight * kl(log_q, log_p)[t - 1]
    assert float(found["policy"]) == pytest.approx(policy, abs=1e-3)
    assert float(found["single_step"]) == pytest.approx(single, abs=1e-3)
    assert set(found) == {"policy", "single_step"}


def test_the_released_code_by_hand(models):
    """Discounted returns over what is left, whitened over all places of a padded batch, PPO's clip, no weight on the single step."""
    student, old, teacher = models
    batch, rows = rollout_batch(old, teacher)
    found = terms(student, teacher, batch, preset="official").parts
    advantage = np.zeros((len(rows), LENGTH))
    for b, row in enumerate(rows):
        reward = np.clip((row.values["teacher"] - row.values["student"]) / 0.5, -100, 100)
        for t in range(len(reward)):
            left = len(reward) - t
            advantage[b, t] = sum(0.95**k * reward[t + k] for k in range(left)) / left
    advantage = (advantage - advantage.mean()) / np.sqrt(advantage.var() + 1e-8)
    policy = single = 0.0
    for b, (row, (log_q, log_p)) in enumerate(zip(rows, distributions(student, teacher, rows), strict=True)):
        for t, token in enumerate(row.response):
            weight = np.exp(row.values["student"][t] - row.values["behaviour"][t])
            ratio = weight * np.exp(log_q[t, token] - row.values["student"][t])
            policy += max(-advantage[b, t] * ratio, -advantage[b, t] * np.clip(ratio, 0.8, 1.2))
        single += kl(log_q, log_p).sum()
    assert float(found["policy"]) == pytest.approx(policy, abs=1e-3)
    assert float(found["single_step"]) == pytest.approx(single, abs=1e-3)


def test_a_preset_is_its_fields_and_any_of_them_can_be_overridden():
    paper, official = MiniLLM(), MiniLLM(preset="official")
    names = {n for n in MiniLLM.model_fields if getattr(paper, n) != getattr(official, n)} - {"preset"}
    assert names == {
        *("discount", "include_current", "length_normalisation", "whitening", "reward_scale", "reward_clip"),
        *("clipping", "single_step_weight", "pt_kd_ratio"),
    }
    undone = MiniLLM(preset="official", **{n: getattr(paper, n) for n in names})
    assert undone.model_dump(exclude={"preset"}) == paper.model_dump(exclude={"preset"})
    assert MiniLLM(preset="official", discount=0.9).discount == 0.9


CHANGES = [
    {"discount": 0.9},
    {"include_current": True},
    {"length_normalisation": "remaining"},
    {"length_normalisation": "discounts"},
    {"length_normalisation": "none"},
    {"whitening": "tokens"},
    {"whitening": "padded"},
    {"reward_scale": 0.5},
    {"reward_clip": 0.01},
    {"clip": 0.01},
    {"clipping": "ppo", "clip": 0.05},
    {"clip_weight": False, "clip": 0.05},
    {"single_step": False},
    {"single_step_weight": False},
]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_every_field_does_something(models, change):
    student, old, teacher = models
    batch, _ = rollout_batch(old, teacher)
    base = {"clip": 0.05} if "clip" in change else {}
    assert terms(student, teacher, batch, **base).total.item() != terms(student, teacher, batch, **change).total.item()


def test_without_the_weight_only_drift_is_clipped(models):
    """Before the student has moved q = q_old, so nothing is clipped and the weight stays whole."""
    _, old, teacher = models
    batch, rows = rollout_batch(old, teacher)
    found = terms(old, teacher, batch, clip_weight=False, clip=1e-4, length_normalisation="none").parts["policy"]
    expected = 0.0
    for row in rows:
        reward, weight = row.values["teacher"] - row.values["student"], np.exp(row.values["student"] - row.values["behaviour"])
        assert weight.max() <= 1.25 + 1e-5
        expected -= sum(weight[t] * reward[t + 1 :].sum() for t in range(len(reward)))
    assert float(found) == pytest.approx(float(expected), abs=1e-3)


@pytest.mark.parametrize("preset", ["paper", "official"])
def test_padding_and_order_change_nothing(models, preset):
    student, old, teacher = models
    _, rows = rollout_batch(old, teacher)

    def gradient(order, wide):
        extra = [Sequence((1,) * 9, (2,) * 12, {k: np.zeros(12, np.float32) for k in rows[0].values})] if wide else []
        batch = collate([rows[i] for i in order] + extra, pad=0)
        found = terms(student, teacher, batch.first(len(rows)), preset=preset).total
        return torch.autograd.grad(found, list(student.parameters()))

    base = gradient([0, 1, 2], wide=False)
    for other in (gradient([2, 0, 1], wide=False), gradient([0, 1, 2], wide=True)):
        for a, b in zip(base, other, strict=True):
            torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("whitening", ["tokens", "padded"])
def test_micro_batches_are_whitened_together(models, whitening):
    student, old, teacher = models
    batch, rows = rollout_batch(old, teacher)
    sampler = TeacherMixedSampler(max_new_tokens=LENGTH)
    step = make_step(Method(objective=MiniLLM(pt_weight=0, whitening=whitening), sampler=sampler), student, (teacher,), 31)
    (whole,) = step.prepare([batch], 0, lambda sums: sums)
    parts = step.prepare([collate([r], pad=0) for r in rows], 0, lambda sums: sums)
    found = torch.cat([p.values["advantage"][p.mask_BT] for p in parts])
    torch.testing.assert_close(found, whole.values["advantage"][whole.mask_BT])


@pytest.mark.parametrize(("ratio", "names"), [(0.0, {"corpus"}), (0.5, {"corpus", "corpus_kl"})])
def test_the_corpus_term(models, ratio, names):
    student, old, teacher = models
    _, rows = rollout_batch(old, teacher)
    corpus = collate([Sequence((), (3, 4, 5, 6)), Sequence((), (7, 8, 9, 10))], pad=0)
    batch = collate(rows, pad=0, corpus=corpus)
    assert counts([batch])["corpus"] == 6
    found = terms(student, teacher, batch, pt_weight=2.0, pt_kd_ratio=ratio)
    logits, target = (response_logits(m, corpus, 31) for m in (student, teacher))
    likelihood = cross_entropy(logits, corpus.targets_BT[corpus.mask_BT]).sum()
    assert float(found.parts["corpus"]) == pytest.approx(2 * (1 - ratio) * float(likelihood), rel=1e-4)
    if ratio:
        divergence = kl(*(z.detach().double().log_softmax(-1).numpy() for z in (target, logits))).sum()
        assert float(found.parts["corpus_kl"]) == pytest.approx(2 * ratio * divergence, rel=1e-3)
    assert set(found.parts) == {"policy", "single_step"} | names
    assert float(found.total) == pytest.approx(float(sum(found.parts.values())), rel=1e-5)
