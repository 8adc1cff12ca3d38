"""Sampling: greedy equals transformers' own, rows are independent of the batch, mixtures draw from the mixture."""

import numpy as np
import pytest
import torch
from tests.conftest import tiny_model

from tadistill import rng
from tadistill.rollout.generate import sample

PROMPTS = [(5, 6, 7), (9,), (3, 4, 5, 6, 7, 8, 9), (11, 12), (20, 21, 22, 23), (1, 2), (30, 29, 28), (17,)]
VOCAB, EOS = 31, 0


def uniforms(rows: int, count: int, seed: int = 1) -> np.ndarray:
    return rng.uniforms(range(rows), count, seed, "test")


def test_greedy_equals_transformers_generate(kind):
    model = tiny_model(kind)
    ours = sample(model, PROMPTS, uniforms(8, 20), eos=EOS, vocab=VOCAB, temperature=0)
    for prompt, rollout in zip(PROMPTS, ours, strict=True):
        out = model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, pad_token_id=EOS, eos_token_id=EOS)
        assert rollout.tokens == tuple(out[0, len(prompt) :].tolist())


def test_a_row_does_not_depend_on_its_batch(kind):
    model = tiny_model(kind)
    numbers = uniforms(8, 24)
    together = sample(model, PROMPTS, numbers, eos=EOS, vocab=VOCAB)
    alone = [sample(model, [p], numbers[b : b + 1], eos=EOS, vocab=VOCAB)[0] for b, p in enumerate(PROMPTS)]
    assert len({len(r.tokens) for r in together}) > 1  # some end early, so compaction happened
    for a, b in zip(together, alone, strict=True):
        assert a.tokens == b.tokens
        np.testing.assert_allclose(a.values["student"], b.values["student"], atol=1e-5)


def test_log_probs_are_those_of_a_full_forward_pass(kind):
    student, teacher = tiny_model(kind), tiny_model(kind, seed=3)
    for rollout, prompt in zip(
        sample(student, PROMPTS, uniforms(8, 12), eos=EOS, vocab=VOCAB, teacher=teacher, alpha=0.3), PROMPTS, strict=True
    ):
        ids = torch.tensor([prompt + rollout.tokens])
        rows, tokens = slice(len(prompt) - 1, ids.shape[1] - 1), torch.tensor(rollout.tokens).unsqueeze(1)
        log_q = student(ids).logits[0, rows].log_softmax(-1).gather(1, tokens).squeeze(1)
        log_p = teacher(ids).logits[0, rows].log_softmax(-1).gather(1, tokens).squeeze(1)
        mixed = (0.7 * log_q.exp() + 0.3 * log_p.exp()).log()
        for name, expected in {"student": log_q, "teacher": log_p, "behaviour": mixed}.items():
            np.testing.assert_allclose(rollout.values[name], expected.detach().numpy(), atol=1e-4)
        weight = np.exp(rollout.values["student"] - rollout.values["behaviour"])
        assert weight.max() <= 1 / 0.7 + 1e-5


def test_mixture_frequencies_match_the_mixture():
    student, teacher = tiny_model("llama", vocab=6), tiny_model("llama", vocab=6, seed=5)
    draws = 4000
    rollouts = sample(student, [(1, 2)] * draws, uniforms(draws, 1), eos=0, vocab=6, teacher=teacher, alpha=0.4)
    counts = np.bincount([r.tokens[0] for r in rollouts], minlength=6)
    ids = torch.tensor([[1, 2]])
    with torch.no_grad():
        q, p = (m(ids).logits[0, -1].softmax(-1).numpy() for m in (student, teacher))
    expected = draws * (0.6 * q + 0.4 * p)
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 20.5  # the 0.999 quantile with 5 degrees of freedom


@pytest.mark.parametrize("top_p", [0.3, 0.7])
def test_nucleus_keeps_the_smallest_sufficient_set(top_p):
    model = tiny_model("llama", vocab=12)
    with torch.no_grad():
        probs = model(torch.tensor([[4, 5]])).logits[0, -1].softmax(-1)
    ordered, order = probs.sort(descending=True)
    allowed = set(order[: int((ordered.cumsum(0) < top_p).sum()) + 1].tolist())
    rollouts = sample(model, [(4, 5)] * 500, uniforms(500, 1), eos=0, vocab=12, top_p=top_p)
    assert {r.tokens[0] for r in rollouts} <= allowed


def test_eos_ends_a_response_and_is_counted_once():
    model = tiny_model("llama", vocab=5)
    rollouts = sample(model, [(1,)] * 64, uniforms(64, 16), eos=0, vocab=5)
    for rollout in rollouts:
        assert rollout.tokens.count(0) <= 1
        assert 0 not in rollout.tokens[:-1]
        assert len(rollout.tokens) == len(rollout.values["student"])
