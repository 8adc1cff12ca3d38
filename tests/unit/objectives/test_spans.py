"""Losses over spans: brute-force sums, the fused head against whole logits, one tokenizer, TRL's numbers, and memory."""

import math

import pytest
import torch
from tests.unit.objectives.largest import Largest

from tadistill.errors import ConfigError
from tadistill.objectives import (
    Head,
    Hidden,
    SharedVocabulary,
    SpanTokens,
    fused_span_distance,
    hybrid_distance,
    sorted_distance,
    span_log_probs,
    tiles,
)

V, W, H = 7, 9, 5
# spans: 0 is a pair of shared tokens; 1 has two tokens and one; 2 one and three; 3 is a pair of tokens that are not shared; 4 is a pair
MINE = torch.tensor([0, 1, 1, 2, 3, 4]), torch.tensor([2, 5, 0, 4, 1, 6])
THEIRS = torch.tensor([0, 1, 2, 2, 2, 3, 4]), torch.tensor([1, 3, 0, 5, 5, 2, 8])
WEIGHTS = torch.tensor([0.5, 1.0, 2.0, 0.3, 0.7]).double()


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def models(dtype: torch.dtype = torch.float64) -> tuple[SpanTokens, SpanTokens, list[torch.Tensor]]:
    """Student and teacher, and the student's leaves: states, weight, bias. Both heads have two rows of padding."""
    leaves = [x.to(dtype).requires_grad_() for x in (drawn(6, H, seed=1), drawn(V + 2, H, seed=2), drawn(V + 2, seed=3))]
    student = SpanTokens(Hidden(leaves[0], Head(leaves[1], leaves[2])), MINE[1], MINE[0])
    head = Head(drawn(W + 2, H + 1, seed=5).to(dtype), None, scale=1.2)
    return student, SpanTokens(Hidden(drawn(7, H + 1, seed=4).to(dtype), head), THEIRS[1], THEIRS[0]), leaves


def logits(side: SpanTokens, size: int) -> torch.Tensor:
    return side.hidden.head.logits(side.hidden.states)[:, :size]


def summed(side: SpanTokens, size: int, temperature: float) -> torch.Tensor:
    """The log-probability of each span, token by token."""
    log_probs = (logits(side, size) / temperature).log_softmax(-1)
    rows = [[k for k, span in enumerate(side.spans.tolist()) if span == s] for s in range(5)]
    return torch.stack([sum(log_probs[k, side.tokens[k]] for k in own) for own in rows])  # pyright: ignore[reportArgumentType,reportCallIssue]


def test_log_probabilities_of_spans_are_sums():
    student, teacher, _ = models()
    torch.testing.assert_close(span_log_probs(student, V), summed(student, V, 1.0), atol=1e-12, rtol=0)
    torch.testing.assert_close(span_log_probs(teacher, W), summed(teacher, W, 1.0), atol=1e-12, rtol=0)


def test_no_spans_give_zero_with_a_graph():
    student, teacher, leaves = models()
    nothing = torch.zeros(0, dtype=torch.long)
    sides = [SpanTokens(Hidden(s.hidden.states[:0], s.hidden.head), nothing, nothing) for s in (student, teacher)]
    total, values = fused_span_distance(sorted_distance, sides[0], sides[1], (V, W))
    assert float(total.detach()) == 0
    assert values.shape == (0,)
    assert all(g.abs().max() == 0 for g in torch.autograd.grad(total, leaves))


# --- ULD and GOLD -------------------------------------------------------------------------------------------------------

GOLD = SharedVocabulary(torch.tensor([0, 1, 2, 4]), torch.tensor([2, 7, 0, 3]), (V, W))
RUNS = [
    ("uld", None, 1.0, 0.8869784361, 0.0200299928, 0.0029001074),
    ("uld", None, 1.5, 0.8867031144, 0.0220447234, 0.0034732229),
    (0.5, None, 1.0, 0.3558871917, 0.0397228285, 0.0013000096),
    (0.5, None, 1.5, 0.3363354480, 0.0242666917, 0.0014137560),
    (0.0, None, 1.0, 0.5225404227, 0.0870888022, 0.0212455946),
    (1.0, (2.0, 0.5), 1.0, 1.0548715713, 0.5104159204, 0.0063815627),
    (1.0, (2.0, 0.5), 1.5, 0.9810222136, 0.3024964956, 0.0056324194),
    (0.25, (1.0, 1.0), 1.0, 0.6412579844, 0.0752946226, 0.0029717366),
]
"""beta, weights, temperature; then the loss, the norm of its gradient in the student's logits, and the gradient at place (1, 2), by the
ULDLoss of TRL 1.16.0 (`uld_token_merge_strategy="bayesian"`, all end tokens kept) on `waves` of 6 and 5 places."""
OBSERVED = [
    ("uld", None, 1.0, 0.8392599512),
    (0.5, None, 1.0, 0.3148208388),
    (1.0, (2.0, 0.5), 1.0, 4.9757209830),
    (0.25, (1.0, 1.0), 1.5, 0.5355448278),
]
"""The same with TRL's default, `uld_token_merge_strategy="observed"`."""


def waves(places: int, size: int, shift: float) -> torch.Tensor:
    rows, columns = torch.arange(1, places + 1).double().unsqueeze(1), torch.arange(1, size + 1).double()
    return 2 * torch.sin(1.3 * rows * columns + shift)


def gold_sides(student: torch.Tensor, teacher: torch.Tensor) -> list[SpanTokens]:
    """The text of `RUNS` after one prompt token: three spans, of 1, 2 and 2 tokens of the student, and 2, 1 and 1 of the teacher."""
    eyes = [Head(torch.eye(size).double()) for size in (V, W)]
    mine = SpanTokens(Hidden(student, eyes[0]), torch.tensor([3, 1, 4, 2, 6]), torch.tensor([0, 1, 1, 2, 2]))
    return [mine, SpanTokens(Hidden(teacher, eyes[1]), torch.tensor([0, 8, 5, 2]), torch.tensor([0, 0, 1, 2]))]


def gold(beta, weights):
    """The distance and its settings."""
    return (sorted_distance, {}) if beta == "uld" else (hybrid_distance, {"shared": GOLD, "beta": beta, "term_weights": weights})


@pytest.mark.parametrize(("beta", "own", "temperature", "loss", "norm", "slope"), RUNS)
def test_equals_trl(beta, own, temperature, loss, norm, slope):
    student = waves(6, V, 0.3).requires_grad_()
    distance, settings = gold(beta, own)
    sides = gold_sides(student[:-1], waves(5, W, 0.9)[:-1])  # the state before a token predicts it
    weights = torch.full((3,), 1 / 3, dtype=torch.float64)
    total, values = fused_span_distance(distance, sides[0], sides[1], (V, W), weights=weights, temperature=temperature, **settings)
    (gradient,) = torch.autograd.grad(total, student)
    assert float(total.detach()) == pytest.approx(loss, abs=1e-9)
    assert float(values.mean()) == pytest.approx(loss, abs=1e-9)
    assert float(gradient.norm()) == pytest.approx(norm, abs=1e-9)
    assert float(gradient[1, 2]) == pytest.approx(slope, abs=1e-9)


@pytest.mark.parametrize(("beta", "weights", "temperature", "loss"), OBSERVED)
def test_trls_default_reads_each_token_one_place_too_late(beta, weights, temperature, loss):
    """TRL's default takes the logits at a token as those that predict this token. They predict the next one.

    Its span has the distribution of the first token, times the probabilities of the later tokens. Both are read one place too late: the
    state before the first token has no gradient, and the state behind the last token, which predicts nothing of the text, has one.
    """
    distance, settings = gold(beta, weights)
    late = gold_sides(waves(6, V, 0.3)[1:], waves(5, W, 0.9)[1:])  # one place later
    first, before = [], []
    for side, size in zip(late, (V, W), strict=True):
        scores = (logits(side, size) / temperature).log_softmax(-1)
        own = scores.gather(1, side.tokens.unsqueeze(1)).squeeze(1)
        starts = [side.spans.tolist().index(span) for span in range(3)]
        before.append(torch.stack([own[(side.spans == s) & (torch.arange(len(own)) != k)].sum() for s, k in enumerate(starts)]))
        first.append(logits(side, size)[starts])
    found = distance(*first, before=before, temperature=temperature, **settings).mean()
    assert float(found) == pytest.approx(loss, abs=1e-9)


@pytest.mark.parametrize("beta", ["uld", 0.5])
def test_fused_distance_equals_plain(beta, monkeypatch):
    monkeypatch.setattr(tiles, "TILE_BYTES", 2 * (V + W) * 8)
    monkeypatch.setattr(tiles, "_CACHED", W)
    student, teacher, leaves = models()
    distance, settings = gold(beta, None)
    total, values = fused_span_distance(distance, student, teacher, (V, W), weights=WEIGHTS, temperature=1.3, **settings)
    ends = [[0, 2, 3, 4, 5], [0, 1, 4, 5, 6]]
    sums, last = [], []
    for side, size, rows in zip((student, teacher), (V, W), ends, strict=True):
        own = (logits(side, size) / 1.3).log_softmax(-1).gather(1, side.tokens.unsqueeze(1)).squeeze(1)
        sums.append(summed(side, size, 1.3) - own[rows])
        last.append(logits(side, size)[rows])
    expected = distance(*last, before=sums, temperature=1.3, **settings)
    torch.testing.assert_close(values, expected.detach(), atol=1e-11, rtol=0)
    for found, exact in zip(torch.autograd.grad(total, leaves), torch.autograd.grad((WEIGHTS * expected).sum(), leaves), strict=True):
        torch.testing.assert_close(found, exact, atol=1e-11, rtol=0)


# --- memory and bad input -----------------------------------------------------------------------------------------------


def test_no_tensor_has_a_row_of_logits_for_each_token(monkeypatch):
    tokens, size, wide = 60, 400, 900
    monkeypatch.setattr(tiles, "TILE_BYTES", 4 * (size + wide) * 4)
    monkeypatch.setattr(tiles, "_CACHED", wide)
    sides = [
        SpanTokens(Hidden(drawn(count, 2, seed=1), Head(drawn(v, 2, seed=2))), torch.arange(count), torch.arange(count) // (count // 30))
        for count, v in ((tokens, size), (tokens // 2, wide))
    ]
    sides[0].hidden.head.weight.requires_grad_()
    with Largest() as largest:
        total, _ = fused_span_distance(sorted_distance, sides[0], sides[1], (size, wide))
        total.backward()
    assert largest.size <= 5 * wide  # of four tokens, and not of 30 or 60


def spans_of(student=MINE, teacher=THEIRS, sizes=(V, W)):
    mine, theirs, _ = models()
    sides = SpanTokens(mine.hidden, student[1], student[0]), SpanTokens(theirs.hidden, teacher[1], teacher[0])
    return sorted_distance, *sides, sizes


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (lambda: spans_of(student=(MINE[0][:5], MINE[1])), ("`student`", "shapes")),
        (lambda: spans_of(student=(MINE[0] + 1, MINE[1])), ("`student`", "count up from 0")),
        (lambda: spans_of(student=(MINE[0] * 2, MINE[1])), ("`student`", "without gaps")),
        (lambda: spans_of(teacher=(THEIRS[0].clamp(max=3), THEIRS[1])), ("5 spans", "has 4")),
        (lambda: spans_of(student=(MINE[0], MINE[1] + 1)), ("`student`", "0 to 6")),
        (lambda: spans_of(sizes=(V, 40)), ("teacher", "40 tokens", "11 logits")),
    ],
)
def test_bad_input(arguments, words):
    with pytest.raises(ConfigError) as error:
        fused_span_distance(*arguments())
    assert all(word in str(error.value) for word in words), error.value


def test_a_model_that_has_diverged_is_named():
    student, teacher, _ = models()
    broken = SpanTokens(Hidden(student.hidden.states.detach() * math.nan, student.hidden.head), student.tokens, student.spans)
    with pytest.raises(ConfigError, match="student_hidden"):
        fused_span_distance(sorted_distance, broken, teacher, (V, W))
