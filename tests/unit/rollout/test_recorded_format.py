"""Packed top-k tokens and drawn tokens: the ids come back exactly, the log-probabilities within half a step, in the promised bytes."""

import numpy as np
import pytest
import torch

from tadistill.config.sampling import HiddenSignal, SampledSignal, TopKSignal
from tadistill.objectives import forward_kl, jensen_shannon, reverse_kl, top_k
from tadistill.objectives.sparse import TopK
from tadistill.rollout.recorded_format import entry_bytes, pack_entries, pack_top_k, token_bytes, top_k_bytes, unpack_entries, unpack_top_k

FIRST = 10  # tokens with codes of 7 bits


def drawn(rows: int, vocab: int, k: int, scale: float = 3.0) -> tuple[torch.Tensor, TopK]:
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(vocab + k)) * scale
    return logits, top_k(logits, k)


def packed(kept: TopK, vocab: int) -> TopK:
    rows = pack_top_k(kept.ids.numpy(), kept.log_probs.numpy(), kept.tail.numpy(), vocab)
    assert rows.shape == (len(kept.ids), top_k_bytes(kept.ids.shape[1], vocab))
    ids, log_p, tail = unpack_top_k(rows, kept.ids.shape[1], vocab)
    return TopK(torch.from_numpy(ids), torch.from_numpy(log_p), torch.from_numpy(tail))


def by_id(kept: TopK) -> tuple[torch.Tensor, torch.Tensor]:
    order = kept.ids.argsort(-1)
    return kept.ids.gather(-1, order), kept.log_probs.gather(-1, order)


def errors_and_bounds(kept: TopK, found: TopK) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the errors of the log-probabilities, relative to the most probable token, in the order of `kept`, and the two bounds."""
    k = kept.ids.shape[1]
    log_p = by_id(found)[1].gather(-1, kept.ids.argsort(-1).argsort(-1))
    first = kept.log_probs[:, 0] - kept.log_probs[:, min(k, FIRST) - 1]
    rest = kept.log_probs[:, min(k, FIRST) - 1] - kept.log_probs[:, -1]
    exact = kept.log_probs - kept.log_probs[:, :1]
    return (log_p - log_p.max(-1, keepdim=True).values - exact).abs(), (first + 1 / 8) / 254, (rest + 0.3) / 30


@pytest.mark.parametrize(("vocab", "k"), [(1, 1), (2, 1), (5, 3), (31, 31), (11, 11), (1000, 12), (151_936, 64)])
def test_ids_are_exact_and_log_probabilities_within_half_a_step(vocab, k):
    _, kept = drawn(7, vocab, k)
    found = packed(kept, vocab)
    assert torch.equal(by_id(found)[0], by_id(kept)[0])
    error, first, rest = errors_and_bounds(kept, found)
    assert (error[:, :FIRST] <= first[:, None] + 1e-5).all()
    assert (error <= torch.maximum(first, rest)[:, None] + 1e-5).all()
    total = found.log_probs.double().exp().sum(-1) + found.tail.double().exp()
    torch.testing.assert_close(total, torch.ones_like(total), atol=1e-6, rtol=0)


def test_other_tokens_just_below_the_first_share_their_error():
    """They cannot be stored above the rounded log-probability of the last of the first tokens."""
    below = torch.arange(8, 31.5, 0.037)[:, None]
    log_p = torch.cat([torch.zeros_like(below), (-below).expand(-1, FIRST - 1), -below - 0.001, -below - 0.011], 1).log_softmax(-1)
    kept = TopK(torch.arange(12).expand(len(log_p), -1), log_p, torch.full((len(log_p),), -60.0))
    error, first, rest = errors_and_bounds(kept, packed(kept, 50))
    assert (error[:, :FIRST] <= first[:, None] + 1e-5).all()
    assert (error <= torch.maximum(first, rest)[:, None] + 1e-5).all()
    assert (error[:, FIRST:] > 2 * rest[:, None]).any()  # so their own range alone is no bound


def test_the_promised_bytes():
    assert top_k_bytes(64, 151_936) == 150  # Qwen's vocabulary
    assert top_k_bytes(64, 2**17) == 148
    assert token_bytes(TopKSignal(), 64, 50_257) == top_k_bytes(64, 50_257) < 150
    assert token_bytes(TopKSignal(dtype="float32"), 64, 50_257) == 516
    assert (token_bytes(HiddenSignal(), 64, 50_257), token_bytes(HiddenSignal(dtype="bfloat16"), 64, 50_257)) == (256, 128)
    assert token_bytes(SampledSignal(draws=50), 64, 151_936) == 50 * 3 + 6


@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl, jensen_shannon])
def test_losses_and_gradients_of_packed_tokens_are_near(divergence):
    """The bound that the docs state for k = 64: 0.02 nats for a loss, and 0.05 for the sum of a gradient's absolute values."""
    vocab = 2000
    _, kept = drawn(200, vocab, 64, scale=2.5)
    student = (torch.randn(200, vocab, generator=torch.Generator().manual_seed(1)) * 2.5).requires_grad_()
    found = []
    for target in (kept, packed(kept, vocab)):
        loss = divergence(*target.align(student))
        found.append((loss.detach(), torch.autograd.grad(loss.sum(), student)[0]))
    (exact, slope), (near, near_slope) = found
    assert (near - exact).abs().mean() < 0.02
    assert (near_slope - slope).abs().sum(-1).mean() < 0.05


def test_impossible_tokens_and_an_empty_tail_stay_impossible():
    logits = torch.tensor([[2.0, 1.0, -torch.inf, -torch.inf, 0.0]])
    found = packed(top_k(logits, 4), 5)
    assert sorted(found.ids[0].tolist())[:2] == [0, 1]
    assert found.log_probs.exp().min() < 1e-13
    assert torch.isfinite(found.log_probs).all()
    assert found.tail.exp().item() == 0


@pytest.mark.parametrize(("draws", "vocab"), [(1, 1), (1, 300), (50, 151_936), (4096, 2**20)])
def test_entries_come_back(draws, vocab):
    generator = np.random.default_rng(0)
    ids, counts = generator.integers(vocab, size=40), generator.integers(1, draws + 1, size=40)
    ids[0], counts[0] = vocab - 1, draws
    entries = pack_entries(ids, counts, draws, vocab)
    assert entries.shape == (40, entry_bytes(draws, vocab))
    found = unpack_entries(entries, vocab)
    assert np.array_equal(found[0], ids)
    assert np.array_equal(found[1], counts)
