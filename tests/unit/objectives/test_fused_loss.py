"""The fused head against the plain functions: values and gradients, tied heads, cut vocabularies, mixtures, tiles, precisions."""

import math
from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch
from tests.conftest import naming

from tadistill.errors import ConfigError
from tadistill.objectives import (
    Head,
    Hidden,
    TargetMixture,
    contrastive,
    forward_kl,
    fused_divergence,
    fused_head,
    fused_loss,
    jensen_shannon,
    reverse_kl,
    single_step,
    skew_forward_kl,
    skew_reverse_kl,
    tiles,
    top_k,
)
from tadistill.objectives.fused_loss import fused_terms
from tadistill.objectives.targets import TeacherTerm

from .cases import CASES, Case, name

V, WIDE, H, TOKENS = 13, 17, 6, (3, 4)
MASK = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [0, 1, 1, 0]], dtype=torch.bool)
ALL = pytest.mark.parametrize("case", CASES, ids=name)
MIXTURES = {"one": None, "geometric": TargetMixture("geometric", (1, 2)), "arithmetic": TargetMixture("arithmetic", (1, 2))}


def drawn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def student(tied: bool = False, dtype: torch.dtype = torch.float32, **shape) -> tuple[torch.Tensor, Head, list[torch.Tensor]]:
    """Hidden states with a graph, the head, and the leaves: embedding, mixing matrix, head weight, head bias."""
    embedding = drawn(V, H, seed=1, dtype=dtype).requires_grad_()
    mixing = drawn(H, H, seed=2, dtype=dtype).requires_grad_()
    bias = drawn(V, seed=3, dtype=dtype).requires_grad_()
    weight = embedding if tied else drawn(V, H, seed=4, dtype=dtype).requires_grad_()
    ids = torch.randint(V, TOKENS, generator=torch.Generator().manual_seed(5))
    hidden = torch.tanh(embedding[ids] @ mixing)
    return hidden, Head(weight, bias, **shape), [embedding, mixing, *([] if tied else [weight]), bias]


def teacher(width: int, seed: int = 20, dtype: torch.dtype = torch.float32) -> Hidden:
    return Hidden(drawn(*TOKENS, H + 1, seed=seed, dtype=dtype), Head(drawn(width, H + 1, seed=seed + 1, dtype=dtype) * 0.7))


def fused_case(case: Case, *args, **settings):
    """With the function and its parameters apart, so that its slope is used where there is one."""
    run = case.run
    return (
        fused_divergence(run.func, *args, **settings, **run.keywords)
        if isinstance(run, partial)
        else fused_divergence(run, *args, **settings)
    )


def slopes(total: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    return list(torch.autograd.grad(total, inputs, retain_graph=True))


def close(found, expected, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@ALL
def test_fused_equals_plain(case):
    for tied, width, kind in product([False, True], [V, WIDE], MIXTURES):
        with naming(f"tied={tied}, width={width}, {kind}"):
            check_fused(case, tied, width, kind)


def check_fused(case: Case, tied: bool, width: int, kind: str) -> None:
    hidden, head, leaves = student(tied)
    mixture = MIXTURES[kind]
    targets = [teacher(width), teacher(width, seed=30)][: 2 if mixture else 1]
    vocab = V if width == WIDE else None
    total, values = fused_case(case, hidden, head, targets, mask=MASK, mixture=mixture, vocab=vocab, temperature=1.5)
    logits = [t.head.logits(t.states)[..., :V] for t in targets]
    target = mixture.logits(logits, temperature=1.5) if mixture else logits[0]
    plain = case.run(head.logits(hidden), target, temperature=1.5) * MASK
    close(values, plain.detach())
    close(total.detach(), plain.sum().detach())
    for found, expected in zip(slopes(total, [hidden, *leaves]), slopes(plain.sum(), [hidden, *leaves]), strict=True):
        close(found, expected)
        assert expected.abs().max() > 1e-4 or "t=0)" in case.name  # TAID at t = 0 has no gradient


@pytest.mark.slow
@ALL
def test_tiles_give_the_same_numbers(case, monkeypatch):
    """Tiles of one token, and of three tokens in parts of two."""
    hidden, head, leaves = student(dtype=torch.float64)
    target, results = teacher(V, dtype=torch.float64), []
    weights = torch.linspace(0.1, 2, 12).reshape(TOKENS)  # all different, so that a tile with another's weights shows
    for tile, small in [(tiles.TILE_BYTES, tiles._CACHED), (1, 1), (3 * 2 * V * 8, 2 * V)]:
        monkeypatch.setattr(tiles, "TILE_BYTES", tile)
        monkeypatch.setattr(tiles, "_CACHED", small)
        total, values = fused_case(case, hidden, head, target, mask=weights)
        results.append([total.detach(), values, *slopes(total, leaves)])
    for number, tiled in enumerate(results[1:]):
        for found, expected in zip(tiled, results[0], strict=True):
            with naming("tiles", number):
                close(found, expected, 1e-12)


def test_the_tiles_of_that_test_are_small(monkeypatch):
    seen = []

    def counted(z, target, *, temperature):
        seen.append(len(z))
        return forward_kl(z, target, temperature=temperature)

    hidden, head, _ = student(dtype=torch.float64)
    fused_divergence(counted, hidden, head, teacher(V, dtype=torch.float64))
    monkeypatch.setattr(tiles, "TILE_BYTES", 3 * 2 * V * 8)
    monkeypatch.setattr(tiles, "_CACHED", 2 * V)
    fused_divergence(counted, hidden, head, teacher(V, dtype=torch.float64))
    assert seen == [12, *(2, 1) * 4]


@ALL
def test_all_masked_is_zero_with_a_graph(case: Case):
    hidden, head, leaves = student()
    total, values = fused_case(case, hidden, head, teacher(V), mask=torch.zeros(TOKENS, dtype=torch.bool))
    assert float(total.detach()) == 0
    assert values.shape == TOKENS
    assert values.abs().max() == 0
    assert all(g.abs().max() == 0 for g in slopes(total, leaves))


@pytest.mark.slow
@pytest.mark.parametrize("parameters", [{}, {"scale": 0.6}, {"softcap": 2.0}, {"scale": 1.7, "softcap": 3.0}])
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(parameters, bias):
    hidden, weight, offset = (drawn(*s, seed=k, dtype=torch.float64).requires_grad_() for k, s in enumerate([(*TOKENS, H), (V, H), (V,)]))
    target = teacher(WIDE, dtype=torch.float64)

    def loss(states, matrix, vector):
        head = Head(matrix, vector if bias else None, **parameters)
        return fused_divergence(jensen_shannon, states, head, target, mask=MASK, vocab=V - 2, beta=0.3, temperature=1.3)[0]

    assert torch.autograd.gradcheck(loss, (hidden, weight, offset))
    head = Head(weight, offset if bias else None, **parameters)
    plain = jensen_shannon(head.logits(hidden)[..., : V - 2], target.head.logits(target.states)[..., : V - 2], beta=0.3, temperature=1.3)
    close(loss(hidden, weight, offset).detach(), (plain * MASK).sum().detach(), 1e-12)


def test_a_teacher_with_bias_scale_and_cap():
    hidden, head, leaves = student()
    states, matrix = drawn(*TOKENS, H, seed=40), drawn(V, H, seed=41)
    target = Hidden(states, Head(matrix, drawn(V, seed=42), scale=1.4, softcap=2.5))
    total, values = fused_divergence(reverse_kl, hidden, head, target)
    by_hand = 2.5 * torch.tanh(1.4 * (states @ matrix.T + drawn(V, seed=42)) / 2.5)
    plain = reverse_kl(head.logits(hidden), by_hand)
    close(values, plain.detach())
    for found, expected in zip(slopes(total, leaves), slopes(plain.sum(), leaves), strict=True):
        close(found, expected)


def test_a_divergence_with_its_parameters_bound_is_the_same():
    """`partial` hides the function from the table of slopes, so autograd takes the gradient."""
    hidden, head, leaves = student()
    (one, a), (other, b) = (
        fused_divergence(partial(jensen_shannon, beta=0.3), hidden, head, teacher(V)),
        fused_divergence(jensen_shannon, hidden, head, teacher(V), beta=0.3),
    )
    close(a, b)
    for found, expected in zip(slopes(one, leaves), slopes(other, leaves), strict=True):
        close(found, expected)


def test_parameters_with_a_value_per_token_follow_the_mask_and_the_tiles(monkeypatch):
    monkeypatch.setattr(tiles, "TILE_BYTES", 3 * 2 * V * 8)
    monkeypatch.setattr(tiles, "_CACHED", 2 * V)
    hidden, head, leaves = student()
    target = teacher(V)
    ids = torch.randint(V, TOKENS, generator=torch.Generator().manual_seed(6))
    of_tokens = {"tokens": ids, "log_behaviour": drawn(*TOKENS, seed=7) - 2}
    for objective, parameters in [
        (contrastive, {"from_teacher": MASK.flip(1)}),
        (contrastive, {"from_teacher": MASK[:, :1], "alpha": torch.tensor([[0.1], [0.2], [0.3]])}),  # one value per response
        (contrastive, {"from_teacher": torch.tensor(True)}),
        (single_step, {**of_tokens, "clip": 0.2}),
        (partial(single_step), {**of_tokens, "clip": 0.2}),  # without its slope
    ]:
        total, values = fused_divergence(objective, hidden, head, target, mask=MASK, **parameters)
        plain = objective(head.logits(hidden), target.head.logits(target.states), **parameters) * MASK
        close(values, plain.detach())
        for found, expected in zip(slopes(total, leaves), slopes(plain.sum(), leaves), strict=True):
            close(found, expected)


@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_backward_twice_gives_the_same_gradient(factor):
    hidden, head, leaves = student()
    loss = fused_divergence(forward_kl, hidden, head, teacher(V))[0] * factor
    first, second = ([g.clone() for g in slopes(loss, leaves)] for _ in range(2))
    loss.backward(retain_graph=True)
    loss.backward()
    for a, b, leaf in zip(first, second, leaves, strict=True):
        assert torch.equal(a, b)
        close(leaf.grad, 2 * a)


def test_accumulating_over_calls_adds_up():
    """The stored gradients must not be written over when a second loss adds to the same leaves."""
    hidden, head, leaves = student(tied=True)
    one, two = (fused_divergence(f, hidden, head, teacher(V))[0] for f in (forward_kl, reverse_kl))
    expected = [a + b for a, b in zip(slopes(one, leaves), slopes(two, leaves), strict=True)]
    (one + two).backward()
    for leaf, slope in zip(leaves, expected, strict=True):
        close(leaf.grad, slope)


@pytest.mark.parametrize("kind", ["logits", "wide logits", "hidden", "top-k", "top-k dropped"])
def test_kinds_of_teachers(kind):
    hidden, head, leaves = student()
    full = teacher(WIDE if kind == "wide logits" else V)
    logits = full.head.logits(full.states)
    sparse = top_k(logits, 4, tail="drop" if "dropped" in kind else "lump")
    target = full if kind == "hidden" else sparse if "top-k" in kind else logits
    total, values = fused_divergence(reverse_kl, hidden, head, target, mask=MASK, vocab=V)
    sides = sparse.align(head.logits(hidden)) if "top-k" in kind else (head.logits(hidden), logits[..., :V])
    plain = reverse_kl(*sides) * MASK
    close(values, plain.detach())
    for found, expected in zip(slopes(total, leaves), slopes(plain.sum(), leaves), strict=True):
        close(found, expected)


def test_a_mixture_of_logits_and_hidden_states():
    hidden, head, _ = student()
    a, b = teacher(V), teacher(V, seed=30)
    mixture = TargetMixture("geometric", (1, 2))
    _, expected = fused_divergence(reverse_kl, hidden, head, [a, b], mixture=mixture)
    _, found = fused_divergence(reverse_kl, hidden, head, [a.head.logits(a.states), b], mixture=mixture)
    close(found, expected)


def test_a_dropped_tail_meets_a_temperature_once():
    hidden, head, _ = student()
    full = teacher(V)
    sparse = top_k(full.head.logits(full.states), 4, tail="drop")
    _, values = fused_divergence(forward_kl, hidden, head, sparse, temperature=2.0)
    close(values, forward_kl(*sparse.align(head.logits(hidden), 2.0)).detach())


def test_weights_scale_tokens_and_zero_leaves_out():
    hidden, head, leaves = student()
    weights = torch.tensor([[0.5, 2.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.25, 3.0, 0.0]])
    total, values = fused_divergence(forward_kl, hidden, head, teacher(V), mask=weights)
    plain = forward_kl(head.logits(hidden), teacher(V).head.logits(teacher(V).states))
    close(values, plain.detach() * (weights > 0))  # values are without the weight
    for found, expected in zip(slopes(total, leaves), slopes((plain * weights).sum(), leaves), strict=True):
        close(found, expected)


def test_several_terms_at_once():
    """Two divergences with a weight each per token, over the same tiles."""
    hidden, head, leaves = student()
    flat, target = hidden.flatten(0, 1), teacher(V)
    weights = torch.stack([torch.linspace(0, 1, 12), torch.linspace(2, 1, 12)])

    def terms(z, targets, rows):
        assert len(z) == rows.stop - rows.start
        return torch.stack([forward_kl(z, targets[0]), reverse_kl(z, targets[0])])

    total, values = fused_head(flat, head, terms, weights, teachers=[Hidden(target.states.flatten(0, 1), target.head)])
    pair = head.logits(flat), target.head.logits(target.states).flatten(0, 1)
    plain = torch.stack([forward_kl(*pair), reverse_kl(*pair)])
    close(values, plain.detach())
    for found, expected in zip(slopes(total, leaves), slopes((plain * weights).sum(), leaves), strict=True):
        close(found, expected)


def test_what_is_frozen_gets_no_gradient():
    hidden, head, _ = student()
    target = teacher(V)
    target.states.requires_grad_()
    frozen = Head(head.weight.detach(), head.bias.detach())
    states = hidden.detach().requires_grad_()
    total, _ = fused_divergence(forward_kl, states, frozen, target)
    total.backward()
    expected = slopes(forward_kl(head.logits(states), target.head.logits(target.states)).sum(), [states])[0]
    close(states.grad, expected)
    assert frozen.weight.grad is None
    assert frozen.bias.grad is None
    assert target.states.grad is None
    total, _ = fused_divergence(forward_kl, hidden.detach(), head, target)  # only the head learns
    assert slopes(total, [head.weight])[0].abs().max() > 0
    with torch.no_grad():
        assert not fused_divergence(forward_kl, hidden, frozen, target)[0].requires_grad


@pytest.mark.parametrize("where", ["teacher's logits", "teacher's head", "student's head"])
def test_impossible_tokens(where):
    hidden, head, leaves = student()
    biases = {"teacher's head": drawn(V, seed=51), "student's head": head.bias.detach().clone()}
    logits = drawn(*TOKENS, V, seed=50)
    target = Hidden(teacher(V).states, Head(teacher(V).head.weight, biases["teacher's head"]))
    if where == "teacher's logits":
        logits[..., 3], target = -math.inf, logits
    else:
        biases[where][3] = -math.inf
    head, leaves = Head(head.weight, biases["student's head"].requires_grad_()), leaves[:3]
    for objective in (forward_kl, reverse_kl, jensen_shannon):
        total, values = fused_divergence(objective, hidden, head, target)
        whole = target if isinstance(target, torch.Tensor) else target.head.logits(target.states)
        expected = objective(head.logits(hidden), whole)
        close(values, expected.detach())
        for found, other in zip(slopes(total, leaves), slopes(expected.sum(), leaves), strict=True):
            assert torch.isfinite(found).all()
            scale = other.abs().max()
            close(found / scale, other / scale)


@pytest.mark.parametrize(
    ("ours", "theirs"), [(torch.float32, torch.float64), (torch.float64, torch.float32), (torch.float64, torch.bfloat16)]
)
@pytest.mark.parametrize("objective", [forward_kl, reverse_kl, jensen_shannon, skew_forward_kl, skew_reverse_kl])
def test_teachers_logits_of_another_dtype(objective, ours, theirs):
    """For example recorded logits. All functions with a slope but `forward_kl` ended in an error of torch."""
    hidden, head, leaves = student(dtype=ours)
    logits = drawn(*TOKENS, V, seed=52, dtype=theirs)
    total, values = fused_divergence(objective, hidden, head, logits)
    expected = objective(head.logits(hidden), logits)
    close(values, expected.detach().to(values.dtype))
    for found, other in zip(slopes(total, leaves), slopes(expected.sum(), leaves), strict=True):
        assert found.dtype == ours
        close(found, other)


@pytest.mark.parametrize("shape", [TOKENS, (TOKENS[0], 1), (1, TOKENS[1]), TOKENS[1:]])
def test_values_per_token_broadcast_to_the_tokens(shape):
    """With fewer axes, they were assigned to other tokens if as many tokens counted."""
    hidden, head, leaves = student()
    alpha = drawn(*shape, seed=53).sigmoid()
    of_teacher = drawn(*shape, seed=54) > 0
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 1, 0]], dtype=torch.bool)  # as many tokens as a row has
    total, values = fused_divergence(contrastive, hidden, head, teacher(V), mask=mask, alpha=alpha, from_teacher=of_teacher)
    target = teacher(V).head.logits(teacher(V).states)
    expected = contrastive(head.logits(hidden), target, of_teacher, alpha=alpha) * mask
    close(values, expected.detach())
    for found, other in zip(slopes(total, leaves), slopes(expected.sum(), leaves), strict=True):
        close(found, other)


@pytest.mark.parametrize("objective", [forward_kl, reverse_kl, jensen_shannon])
def test_bfloat16_hidden_states(objective):
    hidden, head, _ = student()
    narrow = hidden.detach().bfloat16().requires_grad_()
    weight = head.weight.detach().bfloat16().requires_grad_()
    total, values = fused_divergence(objective, narrow, Head(weight), teacher(V), mask=MASK)
    assert values.dtype == torch.float32
    wide = [narrow.detach().float().requires_grad_(), weight.detach().float().requires_grad_()]
    plain = objective(wide[0] @ wide[1].T, teacher(V).head.logits(teacher(V).states)) * MASK
    close(values, plain.detach(), 0.03)  # logits of size 4 carry an error of 4 / 256 / 2 in bfloat16
    for found, expected in zip(slopes(total, [narrow, weight]), slopes(plain.sum(), wide), strict=True):
        assert found.dtype == torch.bfloat16
        assert (found.float() - expected).norm() < 0.02 * expected.norm()  # a few times the 1/256 of bfloat16


def test_float16_has_no_gradient():
    """A loss scale comes too late: the gradient is computed in the forward pass."""
    hidden, head, _ = student()
    for cast in ("states", "weight", "autocast"):
        states = hidden.half() if cast == "states" else hidden
        weight = head.weight.detach().half().requires_grad_() if cast == "weight" else head.weight
        with torch.autocast("cpu", torch.float16, enabled=cast == "autocast"):
            with naming(cast), pytest.raises(ConfigError, match=r"no gradient in float16.* use bfloat16"):
                fused_divergence(forward_kl, states, Head(weight), teacher(V))
            with torch.no_grad():
                assert torch.isfinite(fused_divergence(forward_kl, states, Head(weight), teacher(V))[0])
    fused_divergence(forward_kl, hidden, Head(head.weight.detach().half()), teacher(V))[0].backward()  # a frozen head is converted


def test_autocast_takes_the_products_in_bfloat16():
    hidden, head, leaves = student()
    exact, full = fused_divergence(forward_kl, hidden, head, teacher(V))
    with torch.autocast("cpu", torch.bfloat16):
        total, values = fused_divergence(forward_kl, hidden, head, teacher(V))
    assert values.dtype == torch.float32
    assert 1e-5 < (values - full).abs().max() < 0.05  # rounded, and not by much
    for found, expected in zip(slopes(total, leaves), slopes(exact, leaves), strict=True):
        assert found.dtype == torch.float32
        assert (found - expected).norm() < 0.03 * expected.norm()


# --- what only a GPU does -----------------------------------------------------------------------------------------------


@pytest.fixture
def returns_sums(monkeypatch):
    """Products of bfloat16 matrices that return their float32 sums, as on a GPU."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("mm.dtype", lambda a, b, dtype: a.to(dtype) @ b.to(dtype), "CPU")
    library.impl("mm.dtype_out", lambda a, b, dtype, *, out: out.copy_(a.to(dtype) @ b.to(dtype)), "CPU")
    library.impl("addmm.dtype_out", lambda c, a, b, dtype, *, beta=1, alpha=1, out: out.copy_(c + a.to(dtype) @ b.to(dtype)), "CPU")
    monkeypatch.setattr(tiles, "_RETURNS_SUMS", ("cpu",))
    yield
    library._destroy()


def in_bf16() -> tuple[torch.Tensor, list[torch.Tensor]]:
    hidden, head, leaves = student()
    with torch.autocast("cpu", torch.bfloat16):
        total, values = fused_divergence(forward_kl, hidden, head, teacher(V), temperature=0.5)
    return values, slopes(total, leaves)


def test_logits_of_bf16_products_are_float32_sums_on_a_gpu(returns_sums, monkeypatch):
    def rounded(x: torch.Tensor) -> torch.Tensor:
        return x + (x.bfloat16().float() - x).detach()

    hidden, head, leaves = student()
    target = teacher(V)
    log_p = head.logits(rounded(hidden)).detach(), Head(rounded(head.weight), head.bias).logits(rounded(hidden))
    expected = forward_kl(log_p[1], Head(rounded(target.head.weight)).logits(rounded(target.states)), temperature=0.5)
    values, gradients = in_bf16()
    close(values, expected.detach(), 1e-6)
    monkeypatch.setattr(tiles, "_RETURNS_SUMS", ())
    on_cpu, of_cpu = in_bf16()
    assert (on_cpu - expected).abs().max() > 1e-3
    # the slope itself is rounded to bfloat16 before its products, on both
    for found, plain, other in zip(gradients, slopes(expected.sum(), leaves), of_cpu, strict=True):
        assert (found - plain).norm() < 0.01 * plain.norm()
        assert (found - plain).norm() <= (other - plain).norm()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("objective", [reverse_kl, lambda s, t, temperature: forward_kl(s, t), None])
def test_a_gpu_writes_gradients_at_once_in_half_precision(objective, bias, monkeypatch):
    """The bits are those of a gradient in float32 that is rounded afterwards. `None` is a sum of two terms; the lambda has no slope."""
    added, add = [], fused_loss._Gradients.add
    monkeypatch.setattr(
        fused_loss._Gradients, "add", lambda self, rows, slope, *more: added.append(slope.dtype) or add(self, rows, slope, *more)
    )

    def run(devices: set[str]) -> list[torch.Tensor]:
        monkeypatch.setattr(fused_loss, "_QUEUED", devices)
        hidden, head, leaves = student()
        head, leaves = (head, leaves) if bias else (Head(head.weight), leaves[:3])
        with torch.autocast("cpu", torch.bfloat16):
            if objective:
                total, values = fused_divergence(objective, hidden, head, teacher(V), mask=MASK / 7)
            else:
                terms = [TeacherTerm(of.__name__, of) for of in (forward_kl, reverse_kl)]
                flat, target = hidden.flatten(0, -2), teacher(V)
                weights = torch.stack([MASK.flatten() / 7, MASK.flatten() / 3])
                total, values = fused_terms(terms, flat, head, weights, teachers=[replace(target, states=target.states.flatten(0, -2))])
        return [total, values, *slopes(total, leaves)]

    before, after = run(set()), run({"cpu"})
    assert added == [torch.float32, torch.float32 if bias else torch.bfloat16]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_gpu_takes_tiles_as_its_free_memory_allows(monkeypatch):
    free, kept = {"free": 80 * 2**30}, {"reserved": 0, "allocated": 0}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free["free"], 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: kept["reserved"])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: kept["allocated"])
    of = partial(tiles.tile_rows, 16384, (151936, 151936), torch.float32, torch.device("cuda", 0))
    row = 2 * 151936 * 4 * 3  # with the objective's temporary tensors
    rows, small = of()
    assert rows == small
    assert 2**30 < rows * row <= 2**31
    free["free"] = 4 * 2**30
    assert 2**28 < of()[0] * row <= 2**29
    kept |= {"reserved": 6 * 2**30, "allocated": 2 * 2**30}  # what torch keeps for later tensors is free too
    assert 2**29 < of()[0] * row <= 2**30
    free["free"], kept["reserved"] = 0, 2 * 2**30
    assert of()[0] * row <= tiles.TILE_BYTES
