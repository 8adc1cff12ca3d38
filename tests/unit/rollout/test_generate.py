"""Sampling: greedy equals transformers' own, rows are independent of the batch, draws follow the distribution that is reported."""

import numpy as np
import pytest
import torch
from tests.conftest import shared_model, tiny_model
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import DynamicSlidingWindowLayer

from tadistill import rng
from tadistill.config.common import Decoding
from tadistill.rollout.decoder import InPlaceLayer, in_place_cache
from tadistill.rollout.draw import Mixture, Record, Speculation, draw, next_tokens, processors
from tadistill.rollout.engine import sample

PROMPTS = [(5, 6, 7), (9,), (3, 4, 5, 6, 7, 8, 9), (11, 12), (20, 21, 22, 23), (1, 2), (30, 29, 28), (17,)]
VOCAB, EOS = 31, (0,)
GREEDY = Decoding(temperature=0)
FAMILIES = ["gpt2", "llama", "opt", "qwen2", "mistral"]


def uniforms(rows: int, count: int, seed: int = 1) -> np.ndarray:
    return rng.uniforms(range(rows), count, seed, "test")


def many(rows: int) -> np.ndarray:
    """One number for each of thousands of rows, from one generator: it takes less time than a generator for each row."""
    return np.random.default_rng(1).random((rows, 1))


def generated(model, prompt: tuple[int, ...], count: int, **settings) -> tuple[int, ...]:
    """The greedy answer of transformers to one prompt, without padding."""
    settings = {"eos_token_id": list(EOS), **settings}
    out = model.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False, pad_token_id=0, **settings)
    return tuple(out[0, len(prompt) :].tolist())


@torch.no_grad()
def full_forward(model, prompt: tuple[int, ...], tokens: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and what the head is given, at the positions that predict the tokens."""
    seen = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    ids = torch.tensor([prompt + tokens])
    logits = model(ids).logits
    handle.remove()
    at = slice(len(prompt) - 1, ids.shape[1] - 1)
    return logits[0, at, :VOCAB], seen[0][0, at]


def log_probs(logits: torch.Tensor, tokens: tuple[int, ...]) -> np.ndarray:
    return logits.log_softmax(-1).gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1).numpy()


def assert_equal(found, expected) -> None:
    """Assert that two ways of sampling gave the same responses."""
    for a, b in zip(found, expected, strict=True):
        assert a.tokens == b.tokens
        assert set(a.values) == set(b.values)
        for name in a.values:
            assert a.values[name].dtype == np.float32
            np.testing.assert_allclose(a.values[name], b.values[name], atol=1e-4)
        if b.hidden is None:
            assert a.hidden is None
        else:
            torch.testing.assert_close(a.hidden, b.hidden, atol=1e-3, rtol=1e-3)


def assert_frequencies(tokens: np.ndarray, expected: np.ndarray) -> None:
    """Chi-square of the counts; cells expected less than five times are taken together."""
    expected = expected * len(tokens)
    counts = np.bincount(tokens, minlength=len(expected))
    assert not counts[expected == 0].any()
    rare = expected < 5
    counts, expected = (np.append(a[~rare], a[rare].sum()) for a in (counts, expected))
    kept = expected > 0
    chi_square = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    freedom = kept.sum() - 1
    assert chi_square < freedom + 3.3 * np.sqrt(2 * freedom) + 4  # above the 0.999 quantile


# --- equal to transformers ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_transformers_generate(family):
    model = shared_model(family)
    for prompt, rollout in zip(PROMPTS, sample(model, PROMPTS, uniforms(8, 12), eos=EOS, vocab=VOCAB, decoding=GREEDY), strict=True):
        assert rollout.tokens == generated(model, prompt, 12)
        assert not rollout.values["behaviour"].any()
        np.testing.assert_allclose(
            rollout.values["student"], log_probs(full_forward(model, prompt, rollout.tokens)[0], rollout.tokens), atol=1e-4
        )


def test_greedy_without_repeated_n_grams_equals_transformers_generate(kind):
    model = shared_model(kind)
    decoding = Decoding(temperature=0, no_repeat_ngram=2)
    plain = sample(model, PROMPTS, uniforms(8, 12), eos=(), vocab=VOCAB, decoding=GREEDY)
    ours = sample(model, PROMPTS, uniforms(8, 12), eos=(), vocab=VOCAB, decoding=decoding)
    assert [r.tokens for r in ours] != [r.tokens for r in plain]
    for prompt, rollout in zip(PROMPTS, ours, strict=True):
        assert rollout.tokens == generated(model, prompt, 12, no_repeat_ngram_size=2, eos_token_id=None)


def test_sliding_windows_equal_transformers_generate():
    """A window narrower than the text keeps transformers' own cache layer; a wide one is no window."""
    narrow = shared_model("mistral", sliding_window=6)
    for prompt, rollout in zip(PROMPTS, sample(narrow, PROMPTS, uniforms(8, 12), eos=(), vocab=VOCAB, decoding=GREEDY), strict=True):
        assert rollout.tokens == generated(narrow, prompt, 12, eos_token_id=None)
    assert {type(layer) for layer in in_place_cache(narrow.config, 20).layers} == {DynamicSlidingWindowLayer}
    assert {type(layer) for layer in in_place_cache(narrow.config, 6).layers} == {InPlaceLayer}


OPTIONS = {
    "top_k": ({"top_k": 3}, TopKLogitsWarper(3)),
    "top_p": ({"top_p": 0.7}, TopPLogitsWarper(0.7)),
    "min_p": ({"min_p": 0.2}, MinPLogitsWarper(0.2)),
    "temperature": ({"temperature": 2.0}, TemperatureLogitsWarper(2.0)),
    "no_repeat_ngram": ({"no_repeat_ngram": 1}, NoRepeatNGramLogitsProcessor(1)),
}
ALL_OPTIONS = {name: value for settings, _ in OPTIONS.values() for name, value in settings.items()}
IN_ORDER = [OPTIONS[name][1] for name in ("no_repeat_ngram", "temperature", "top_k", "top_p", "min_p")]


@pytest.mark.parametrize(
    ("settings", "warpers"), [*((s, [w]) for s, w in OPTIONS.values()), (ALL_OPTIONS, IN_ORDER)], ids=[*OPTIONS, "all"]
)
def test_options_are_those_of_transformers(settings, warpers):
    """The tokens of 2,000 draws, and their probabilities, are those that its processors leave."""
    model, prompt = shared_model("llama", vocab=12), (4, 5, 4)
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[:, -1]
    expected = LogitsProcessorList(warpers)(torch.tensor([prompt]), logits).softmax(-1)[0].numpy()
    assert expected.max() < 1
    decoding = Decoding(**settings)
    # the shorter prompt makes padding, which must not count as a repeated token
    rollouts = sample(model, [prompt] * 2000 + [(1,)], many(2001), eos=(), vocab=12, decoding=decoding)[:2000]
    tokens = np.array([r.tokens[0] for r in rollouts])
    assert_frequencies(tokens, expected)
    np.testing.assert_allclose([r.values["behaviour"][0] for r in rollouts], np.log(expected[tokens]), atol=1e-4)
    raw = logits.log_softmax(-1)[0].numpy()
    np.testing.assert_allclose([r.values["student"][0] for r in rollouts], raw[tokens], atol=1e-4)


def test_padding_is_part_of_no_n_gram():
    """With n = 1 nothing may occur twice; the id used for padding has not occurred yet."""
    model = shared_model("llama", vocab=12)
    decoding = Decoding(temperature=0, no_repeat_ngram=1)
    alone = sample(model, [(1,)], uniforms(1, 11), eos=(), vocab=12, decoding=decoding)[0]
    padded = sample(model, [(1,), (2, 3, 4)], uniforms(2, 11), eos=(), vocab=12, decoding=decoding)[0]
    assert padded.tokens == alone.tokens
    assert 0 in alone.tokens


# --- values -------------------------------------------------------------------------------------------------------------


def speculated(q: torch.Tensor, p: torch.Tensor, k: int, teacher: torch.Tensor | None = None) -> torch.Tensor:
    """The law of SKD, case by case: the student's token if the teacher ranks it among k, else one of the teacher's.

    `teacher` has the teacher's logits before decoding settings, by which it ranks; without settings, its probabilities rank alike."""
    rank = (p if teacher is None else teacher).argsort(-1, descending=True).argsort(-1)
    return torch.where(rank < k, q, 0) + q.masked_fill(rank < k, 0).sum(-1, keepdim=True) * p


GUIDES = {
    "mixture": (lambda teacher: Mixture(teacher, 0.3), lambda q, p, _: 0.7 * q + 0.3 * p),
    "speculation": (lambda teacher: Speculation(teacher, 3), lambda q, p, teacher: speculated(q, p, 3, teacher)),
}


@pytest.mark.parametrize("guide", GUIDES)
@pytest.mark.parametrize("warped", [False, True])
def test_values_and_hidden_states_are_those_of_a_full_forward_pass(kind, guide, warped):
    student, teacher = shared_model(kind), shared_model(kind, seed=3)
    make, law = GUIDES[guide]
    decoding = Decoding(temperature=1.5, top_p=0.95) if warped else Decoding()
    warpers = LogitsProcessorList([TemperatureLogitsWarper(1.5), TopPLogitsWarper(0.95)] if warped else [])
    rollouts = sample(student, PROMPTS, uniforms(8, 12), eos=EOS, vocab=VOCAB, decoding=decoding, guide=make(teacher))
    for rollout, prompt in zip(rollouts, PROMPTS, strict=True):
        (of_student, _), (of_teacher, hidden) = (full_forward(m, prompt, rollout.tokens) for m in (student, teacher))
        q, p = (warpers(torch.zeros(len(z), 1).long(), z).softmax(-1) for z in (of_student, of_teacher))
        expected = {
            "student": log_probs(of_student, rollout.tokens),
            "teacher": log_probs(of_teacher, rollout.tokens),
            "behaviour": log_probs(law(q, p, of_teacher).log(), rollout.tokens),
        }
        assert set(rollout.values) == set(expected)
        for name, values in expected.items():
            assert rollout.values[name].dtype == np.float32
            np.testing.assert_allclose(rollout.values[name], values, atol=2e-4)
        assert rollout.hidden is not None
        torch.testing.assert_close(rollout.hidden, hidden, atol=1e-4, rtol=1e-4)


def test_weights_of_a_mixture_are_bounded(kind):
    rollouts = sample(shared_model(kind), PROMPTS, uniforms(8, 24), eos=EOS, vocab=VOCAB, guide=Mixture(shared_model(kind, seed=3), 0.2))
    weights = np.concatenate([np.exp(r.values["student"] - r.values["behaviour"]) for r in rollouts])
    assert weights.max() <= 1 / 0.8 + 1e-5


def test_a_token_that_underflows_keeps_a_finite_log_probability():
    student, teacher = tiny_model("llama"), shared_model("llama", seed=3)
    with torch.no_grad():
        student.lm_head.weight.mul_(200)
    rollouts = sample(student, PROMPTS, uniforms(8, 12), eos=EOS, vocab=VOCAB, guide=Mixture(teacher, 1.0))
    lowest = min(r.values["student"].min() for r in rollouts)
    assert -np.inf < lowest < -104  # exp would be 0 in float32


def test_hidden_states_can_be_part_of_a_loss():
    model = tiny_model("llama")
    hidden = sample(model, [(1, 2)], uniforms(1, 3), eos=(), vocab=VOCAB, guide=Mixture(model, 0.5))[0].hidden
    assert hidden is not None
    model.lm_head(hidden).sum().backward()
    assert model.lm_head.weight.grad.abs().sum() > 0


# --- draws --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "law"),
    [
        (lambda teacher: Mixture(teacher, 0.2), lambda q, p: 0.8 * q + 0.2 * p),
        (lambda teacher: Speculation(teacher, 2), lambda q, p: speculated(q, p, 2)),
    ],
    ids=["mixture", "speculation"],
)
def test_frequencies_follow_the_guided_distribution(make, law):
    student, teacher = shared_model("llama", vocab=6), shared_model("llama", vocab=6, seed=5)
    draws = 20_000
    rollouts = sample(student, [(1, 2)] * draws, many(draws), eos=(), vocab=6, guide=make(teacher))
    with torch.no_grad():
        q, p = (m(torch.tensor([[1, 2]])).logits[0, -1].softmax(-1) for m in (student, teacher))
    assert_frequencies(np.array([r.tokens[0] for r in rollouts]), law(q, p).numpy())


@pytest.mark.parametrize("settings", [{"top_k": 2}, {"top_p": 0.3}, {"min_p": 0.5}, {"temperature": 0.01}], ids=str)
def test_a_teacher_accepts_its_most_probable_tokens_under_all_decoding_settings(settings):
    """After these settings, the teacher has fewer than k tokens of probability above 0; those of probability 0 are not accepted for it."""
    torch.manual_seed(0)
    logits = {"student": 3 * torch.randn(6, 40), "teacher": 3 * torch.randn(6, 40)}
    warpers = processors(Decoding(**settings))
    scores = {name: warpers(torch.zeros(6, 1).long(), z) for name, z in logits.items()}
    q, p = (scores[name].softmax(-1) for name in ("student", "teacher"))
    teacher = logits["teacher"]
    assert ((p > 0).sum(-1) < 25).all()
    b = Speculation(None, 25).probabilities(q, p, teacher)
    torch.testing.assert_close(b, speculated(q, p, 25, teacher))
    assert (b[teacher < teacher.topk(25).values[:, -1:]] <= p[teacher < teacher.topk(25).values[:, -1:]]).all()
    _, values = next_tokens(logits, scores, torch.rand(6, dtype=torch.float64), Speculation(None, 25), greedy=False)
    assert values["behaviour"].isfinite().all()


@pytest.mark.parametrize("vocab", [1000, 1024, 37])
def test_draws_in_two_levels_follow_the_weights(vocab):
    """Also where the vocabulary ends inside a block or before the first is full."""
    torch.manual_seed(0)
    weights = (torch.randn(vocab) * 2).softmax(0)
    weights[::7] = 0
    draws = 20_000
    tokens = draw(weights.expand(draws, -1), torch.from_numpy(many(draws)[:, 0]))
    assert_frequencies(tokens.numpy(), (weights / weights.sum()).numpy())


def test_a_draw_is_the_inverse_cdf_and_never_a_token_of_weight_zero():
    weights = torch.zeros(130)
    weights[[3, 64, 100]] = torch.tensor([0.25, 0.5, 0.25])
    points = torch.tensor([0, 0.249, 0.25, 0.5, 0.749, 0.75, 1 - 2**-53], dtype=torch.float64)
    assert draw(weights.expand(7, -1), points).tolist() == [3, 3, 64, 64, 64, 100, 100]


def test_alpha_zero_is_the_student_and_alpha_one_the_teacher(kind):
    student, teacher = shared_model(kind), shared_model(kind, seed=3)
    numbers = uniforms(8, 12)

    def tokens(model, guide=None):
        return [r.tokens for r in sample(model, PROMPTS, numbers, eos=EOS, vocab=VOCAB, guide=guide)]

    assert tokens(student, Mixture(teacher, 0.0)) == tokens(student)
    assert tokens(student, Mixture(teacher, 1.0)) == tokens(teacher) != tokens(student)
    assert tokens(student, Speculation(teacher, VOCAB)) == tokens(student)


def test_greedy_with_a_guide_is_the_mode_of_the_mixture():
    student, teacher = shared_model("llama"), shared_model("llama", seed=3)
    rollouts = sample(student, PROMPTS, uniforms(8, 6), eos=EOS, vocab=VOCAB, decoding=GREEDY, guide=Mixture(teacher, 0.6))
    for prompt, rollout in zip(PROMPTS, rollouts, strict=True):
        q, p = (full_forward(m, prompt, rollout.tokens)[0].softmax(-1) for m in (student, teacher))
        assert rollout.tokens == tuple((0.4 * q + 0.6 * p).argmax(-1).tolist())
        assert not rollout.values["behaviour"].any()


def test_greedy_speculation_keeps_the_students_token_if_the_teacher_accepts_it():
    student, teacher = shared_model("llama"), shared_model("llama", seed=3)
    kept = 0
    for k in (1, 12, VOCAB):
        for prompt, rollout in zip(
            PROMPTS,
            sample(student, PROMPTS, uniforms(8, 6), eos=EOS, vocab=VOCAB, decoding=GREEDY, guide=Speculation(teacher, k)),
            strict=True,
        ):
            of_student, of_teacher = (full_forward(m, prompt, rollout.tokens)[0] for m in (student, teacher))
            for token, q, p in zip(rollout.tokens, of_student, of_teacher, strict=True):
                proposed = int(q.argmax())
                accepted = int((p > p[proposed]).sum()) < k
                assert token == (proposed if accepted else int(p.argmax()))
                kept += accepted and k == 12
    assert 0 < kept < 8 * 6


# --- rows ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_does_not_depend_on_its_batch(family):
    model, guide = shared_model(family), Mixture(shared_model(family, seed=3), 0.3)
    numbers = uniforms(8, 16)
    together = sample(model, PROMPTS, numbers, eos=EOS, vocab=VOCAB, guide=guide)
    backwards = sample(model, PROMPTS[::-1], numbers[::-1].copy(), eos=EOS, vocab=VOCAB, guide=guide)[::-1]
    alone = [sample(model, [p], numbers[b : b + 1], eos=EOS, vocab=VOCAB, guide=guide)[0] for b, p in enumerate(PROMPTS)]
    assert len({len(r.tokens) for r in together}) > 2  # some end early, so compaction happened
    for other in (backwards, alone):
        for a, b in zip(together, other, strict=True):
            assert a.tokens == b.tokens
            for name in a.values:
                np.testing.assert_allclose(a.values[name], b.values[name], atol=1e-4)
            torch.testing.assert_close(a.hidden, b.hidden, atol=1e-4, rtol=1e-4)


def test_every_eos_ends_a_response_and_is_counted_once():
    model = shared_model("llama", vocab=5)
    rollouts = sample(model, [(1,)] * 64, uniforms(64, 16), eos=(0, 3), vocab=5)
    assert {r.tokens[-1] for r in rollouts} >= {0, 3}
    for rollout in rollouts:
        assert not {0, 3} & set(rollout.tokens[:-1])
        assert len(rollout.tokens) == len(rollout.values["student"]) == len(rollout.values["behaviour"])
        assert len(rollout.tokens) == 16 or rollout.tokens[-1] in (0, 3)


def test_the_student_gets_its_mode_back():
    model = tiny_model("gpt2")
    for training in (True, False):
        model.train(training)
        sample(model, [(1,)], uniforms(1, 2), eos=EOS, vocab=VOCAB)
        assert model.training is training


def test_a_bfloat16_model_works_and_a_wider_vocabulary_is_cut():
    student, teacher = tiny_model("llama").bfloat16(), tiny_model("llama", vocab=40, seed=3).bfloat16()
    for rollout in sample(student, PROMPTS, uniforms(8, 8), eos=(), vocab=VOCAB, guide=Mixture(teacher, 0.5)):
        assert max(rollout.tokens) < VOCAB
        assert rollout.hidden is not None
        assert rollout.hidden.dtype == torch.bfloat16
        assert rollout.hidden.shape == (8, 16)
        assert all(v.dtype == np.float32 and np.isfinite(v).all() for v in rollout.values.values())


def test_a_finished_row_that_is_still_in_the_batch_stays_finished():
    record = Record(3, 4, eos=(0,), models=["student"])
    for t in range(3):
        record.say(np.arange(3), t, np.array([0, 5, 6]))
        assert record.lengths.tolist() == [1, 4, 4]
    record.say(np.arange(3), 3, np.array([0, 0, 6]))
    assert [r.tokens for r in record.rollouts()] == [(0,), (5, 5, 5, 0), (6, 6, 6, 6)]
