"""Every objective with some parameters and its reference, and the checks that all of them must pass.

`test_<module>.py` runs `pass_checks` over its own cases and adds what is special; `test_fused.py` runs over all of them.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from tests.conftest import naming
from torch import Tensor

from tadistill import objectives as ours

from . import reference


class Case(NamedTuple):
    name: str
    module: str
    run: Callable[..., Tensor]
    """(student, teacher, temperature=…) to one value per token."""
    reference: Callable[..., float]
    """(p, q) of one token."""
    held: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    """(q, q held constant, p), all (n, V), to (n,): the objective in probability space where a part is detached."""
    least: int = 1
    """Smallest vocabulary."""
    negative: bool = False
    """Undefined where a probability is 0."""


def case(module: str, function: str, *, least: int = 1, held=None, fixed: dict[str, Any] | None = None, **parameters: Any) -> Case:
    """`fixed` are arguments that the reference has not."""
    shown = ",".join(f"{k}={v}" for k, v in (parameters | (fixed or {})).items())
    run = partial(getattr(ours, function), **parameters, **(fixed or {}))
    negative = min(parameters.get("alpha", 0), parameters.get("beta", 0)) < 0 and function == "alpha_beta"
    return Case(f"{function}({shown})", module, run, partial(getattr(reference, function), **parameters), held, least, negative)


def cross_entropy_of_top(student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Cross-entropy as a function of two logits: the token is the teacher's most probable one."""
    return ours.cross_entropy(student / temperature, teacher.argmax(-1))


def _shared(width: int) -> ours.SharedVocabulary:
    student, teacher = reference.shared_ids(width)
    return ours.SharedVocabulary(torch.tensor(student), torch.tensor(teacher), (width, width))


def hybrid_distance(student: Tensor, teacher: Tensor, *, beta: float, temperature: float = 1.0) -> Tensor:
    """GOLD's loss between vocabularies with some tokens in common."""
    return ours.hybrid_distance(student, teacher, shared=_shared(student.shape[-1]), beta=beta, temperature=temperature)


def _held_kl(a: Tensor, b: Tensor) -> Tensor:
    return (a * (a / b).log()).sum(-1)


def _held_adaptive(mu: float):
    def value(q: Tensor, still: Tensor, p: Tensor) -> Tensor:
        w = torch.tensor([reference.head_weight(a.numpy(), b.numpy(), mu) for a, b in zip(p, still, strict=True)], dtype=p.dtype)
        return w * _held_kl(p, q) + (1 - w) * _held_kl(q, p)

    return value


def _held_taid(t: float):
    def value(q: Tensor, still: Tensor, p: Tensor) -> Tensor:
        target = p**t * still ** (1 - t)
        return -(target / target.sum(-1, keepdim=True) * q.log()).sum(-1)

    return value


def _held_skew(alpha: float):
    return lambda q, still, p: _held_kl(q, alpha * still + (1 - alpha) * p)


def _contrastive(from_teacher: bool, alpha: float) -> Case:
    run = partial(ours.contrastive, from_teacher=torch.tensor(from_teacher), alpha=alpha)
    side = "skew_forward_kl" if from_teacher else "skew_reverse_kl"
    held = None if from_teacher else _held_skew(alpha)
    return Case(f"contrastive({side},{alpha})", "adaptive", run, partial(getattr(reference, side), alpha=alpha), held)


CASES = [
    *(case("divergence", name) for name in ("forward_kl", "reverse_kl", "jeffreys", "total_variation")),
    *(case("divergence", "jensen_shannon", beta=beta) for beta in (0, 0.1, 0.5, 0.9, 1)),
    *(case("divergence", "skew_forward_kl", alpha=alpha) for alpha in (0, 0.1, 0.5)),
    *(case("divergence", "skew_reverse_kl", alpha=alpha) for alpha in (0, 0.1, 0.5)),
    *(case("divergence", "skew_reverse_kl", alpha=a, fixed={"detach_mixture": True}, held=_held_skew(a)) for a in (0.1, 0.6)),
    *(
        case("families", "alpha_beta", alpha=a, beta=b)
        for a, b in [(0.2, 0.7), (0.5, 0.5), (1, 1), (1, 0), (0, 1), (0, 0), (0, 0.6), (0.6, 0), (0.5, -0.5), (1.4, -0.3), (-0.3, 0.8)]
    ),
    *(case("families", "alpha_mixture", alpha=-5, lam=0.5, pair=pair) for pair in ("pr", "rp", "qr", "rq")),
    *(case("families", "alpha_mixture", alpha=-5, lam=0.3, pair=p, ab_parameters=(0.2, 0.7)) for p in ("pr", "rp", "qr", "rq")),
    *(case("families", "alpha_mixture", alpha=alpha, lam=0.3, pair="pr") for alpha in (-1, 0, 1, 3)),
    *(case("families", "alpha_mixture", alpha=alpha, lam=0.7, pair="rq") for alpha in (-1, 0, 1, 3)),
    *(case("adaptive", "adaptive_kl", mu=mu, held=_held_adaptive(mu)) for mu in (0.2, 0.5, 0.9)),
    *(case("adaptive", "taid", t=t, held=_held_taid(t)) for t in (0, 0.4, 1)),
    *(_contrastive(side, alpha) for side in (True, False) for alpha in (0.1, 0.4)),
    *(
        case("targets", f"top_k_{side}_kl", least=3, k=3, tail=tail)
        for side in ("forward", "reverse")
        for tail in ("lump", "drop")
    ),
    case("vocabularies", "sorted_distance"),
    *(
        Case(f"hybrid({b})", "vocabularies", partial(hybrid_distance, beta=b), partial(reference.hybrid_distance, beta=b), least=3)
        for b in (0, 0.3, 1)
    ),
    Case("cross_entropy", "sampled", cross_entropy_of_top, reference.cross_entropy_of_top),
]  # fmt: skip


def of(module: str) -> list[Any]:
    """Parameters for pytest: the module's cases."""
    return [c for c in CASES if c.module == module]


def name(value: Any) -> str | None:
    return value.name if isinstance(value, Case) else getattr(value, "__name__", None)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Random logits of student and teacher."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = 2 * torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return student.to(dtype), teacher.to(dtype)


def extreme(seed: int, width: int = 40) -> tuple[Tensor, Tensor]:
    """float32 rows with -inf at different places of both sides, and numbers up to +-1e4."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(2, 6, width, generator=generator)
    places = torch.rand(2, 6, width, generator=generator)
    logits = torch.where(places < 0.05, 1e4, torch.where(places < 0.1, -1e4, torch.where(places < 0.3, -math.inf, logits)))
    logits[..., 0] = torch.where(logits[..., 0].isinf(), 0.0, logits[..., 0])  # no row without a possible token
    return logits[0], logits[1]


# --- the checks ---------------------------------------------------------------------------------------------------------


def equals_reference(c: Case) -> None:
    student, teacher = draw(2, 3, 11)
    for temperature in (1.0, 1.7):
        values = c.run(student, teacher, temperature=temperature)
        assert values.shape == (2, 3)
        assert values.dtype == torch.float64
        for b in range(2):
            for t in range(3):
                p, q = (reference.softmax(z[b, t].numpy(), temperature) for z in (teacher, student))
                assert abs(float(values[b, t]) - c.reference(p, q)) < 1e-10


def gradient_is_right(c: Case) -> None:
    """Against finite differences; with a detached part, of the same value in probability space where that part is a constant."""
    student, teacher = draw(3, 6, seed=1)
    p = teacher.softmax(-1)
    assert (student.softmax(-1) - p).abs().min() > 1e-4  # total variation has a kink where p = q
    student.requires_grad_()
    if c.held is None:
        assert torch.autograd.gradcheck(lambda z: c.run(z, teacher, temperature=1.7), student)
        return
    still = student.detach().softmax(-1)
    expected = c.held(student.softmax(-1), still, p)
    found = c.run(student, teacher)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    slopes = [torch.autograd.grad((v * weights).sum(), student)[0] for v in (found, expected)]
    torch.testing.assert_close(*slopes, atol=1e-12, rtol=0)
    assert torch.autograd.gradcheck(lambda z: c.held(z.softmax(-1), still, p), student)


def masked_equals_deleted(c: Case) -> None:
    student, teacher = draw(3, 4, 9, seed=2)
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0]], dtype=torch.bool)
    whole, kept = student.clone().requires_grad_(), student[mask].requires_grad_()
    masked, deleted = (c.run(whole, teacher) * mask).sum(), c.run(kept, teacher[mask]).sum()
    torch.testing.assert_close(masked, deleted, atol=1e-12, rtol=0)
    (slope,) = torch.autograd.grad(masked, whole)
    torch.testing.assert_close(slope[mask], torch.autograd.grad(deleted, kept)[0], atol=1e-12, rtol=0)
    assert slope[~mask].abs().max() == 0


def all_masked_is_zero_with_a_graph(c: Case) -> None:
    student, teacher = draw(2, 3, 9)
    student.requires_grad_()
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    for loss in ((c.run(student, teacher) * nothing).sum(), c.run(student[nothing], teacher[nothing]).sum()):
        assert float(loss.detach()) == 0
        (slope,) = torch.autograd.grad(loss, student)
        assert slope.abs().max() == 0


def extreme_logits_stay_finite(c: Case) -> None:
    if c.negative:
        return  # undefined there, and refused: test_bad_input.py
    for seed in range(5):
        student, teacher = extreme(seed)
        student.requires_grad_()
        values = c.run(student, teacher)
        assert values.dtype == torch.float32
        assert torch.isfinite(values).all()
        (slope,) = torch.autograd.grad(values.sum(), student)
        assert torch.isfinite(slope).all()


def one_token_vocabulary_is_zero(c: Case) -> None:
    if c.least > 1:
        return
    student = torch.tensor([[3.0], [-1e4]], requires_grad=True)
    values = c.run(student, torch.tensor([[0.0], [2.0]]))
    assert values.abs().max() < 1e-6  # log(alpha + (1 - alpha)) is rounded, and the alpha-beta family divides by alpha beta
    (slope,) = torch.autograd.grad(values.sum(), student)
    assert slope.abs().max() == 0


def half_precision_is_computed_in_float32(c: Case) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        student, teacher = draw(4, 50, dtype=dtype)
        student.requires_grad_()
        values = c.run(student, teacher)
        assert values.dtype == torch.float32
        torch.testing.assert_close(values, c.run(student.float(), teacher.float()), atol=1e-6, rtol=1e-6)
        (slope,) = torch.autograd.grad(values.sum(), student)
        assert slope.dtype == dtype
        assert torch.isfinite(slope).all()


def temperature_divides_both_logits(c: Case) -> None:
    student, teacher = draw(5, 9)
    torch.testing.assert_close(c.run(student, teacher, temperature=2.0), c.run(student / 2, teacher / 2), atol=1e-12, rtol=0)


def one_graph_is_compiled(c: Case) -> None:
    function = c.name.partition("(")[0]
    if c.name != max((other.name for other in CASES if other.name.startswith(f"{function}(")), key=len, default=c.name):
        return  # one setting of each function, the one with the longest name: numbers such as 0 and 1 are special cases
    if function == "hybrid":
        return  # torch cannot compile the cached properties of `SharedVocabulary` before they have their value
    student, teacher = draw(3, 9)
    torch._dynamo.reset()
    compiled = torch.compile(c.run, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(student, teacher), c.run(student, teacher))


def zero_at_equality(c: Case) -> None:
    """Not in CHECKS: a cross-entropy is not zero there."""
    same, _ = draw(100, 9)
    assert c.run(same, same).abs().max() < 1e-12


def positive_elsewhere(c: Case) -> None:
    """Not in CHECKS: of divergences over the whole vocabulary only."""
    same, other = draw(100, 9)
    assert c.run(same, other).min() > 1e-4


CHECKS = [
    equals_reference,
    gradient_is_right,
    masked_equals_deleted,
    all_masked_is_zero_with_a_graph,
    extreme_logits_stay_finite,
    one_token_vocabulary_is_zero,
    half_precision_is_computed_in_float32,
    temperature_divides_both_logits,
    one_graph_is_compiled,
]


def pass_checks(c: Case, *more: Callable[[Case], None]) -> None:
    """Run all of `CHECKS`, and `more`, on a case."""
    for check in (*CHECKS, *more):
        with naming(check.__name__):
            check(c)
