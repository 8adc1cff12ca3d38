"""The objectives from their definitions, in probability space and float64, for one token: p the teacher, q the student, (V,).

Nothing of tadistill is used here. Sums go through `math.fsum`; 0 log 0 is 0.
"""

import math

import numpy as np
from numpy.typing import NDArray

Probs = NDArray[np.float64]


def softmax(z, temperature: float = 1.0) -> Probs:
    weights = np.exp((np.asarray(z, dtype=np.float64) - np.max(z)) / temperature)
    return weights / math.fsum(weights)


def kl(a: Probs, b: Probs) -> float:
    return math.fsum(x * math.log(x / y) for x, y in zip(a, b, strict=True) if x > 0)


def forward_kl(p: Probs, q: Probs) -> float:
    return kl(p, q)


def reverse_kl(p: Probs, q: Probs) -> float:
    return kl(q, p)


def jeffreys(p: Probs, q: Probs) -> float:
    return kl(p, q) + kl(q, p)


def jensen_shannon(p: Probs, q: Probs, *, beta: float) -> float:
    if beta in (0, 1):
        return kl(p, q) if beta == 0 else kl(q, p)
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def skew_forward_kl(p: Probs, q: Probs, *, alpha: float) -> float:
    return kl(p, alpha * p + (1 - alpha) * q)


def skew_reverse_kl(p: Probs, q: Probs, *, alpha: float) -> float:
    return kl(q, (1 - alpha) * p + alpha * q)


def total_variation(p: Probs, q: Probs) -> float:
    return math.fsum(abs(x - y) for x, y in zip(p, q, strict=True)) / 2


def head_weight(p: Probs, q: Probs, mu: float) -> float:
    """The share of sum |p - q| on the smallest set of the teacher's top tokens whose mass reaches mu."""
    mass, inside = 0.0, []
    for v in sorted(range(len(p)), key=lambda v: -p[v]):
        if mass >= mu:
            break
        inside.append(v)
        mass += p[v]
    return math.fsum(abs(p[v] - q[v]) for v in inside) / math.fsum(abs(p - q))


def adaptive_kl(p: Probs, q: Probs, *, mu: float) -> float:
    w = head_weight(p, q, mu)
    return w * kl(p, q) + (1 - w) * kl(q, p)


def alpha_beta(p: Probs, q: Probs, *, alpha: float, beta: float) -> float:
    a, b, s = alpha, beta, alpha + beta
    if a == 0 and b == 0:
        terms = (np.log(p) - np.log(q)) ** 2 / 2
    elif a == 0:
        terms = (q**b * np.log(q**b / p**b) - q**b + p**b) / b**2
    elif b == 0:
        terms = (p**a * np.log(p**a / q**a) - p**a + q**a) / a**2
    elif s == 0:
        terms = (np.log(q**a / p**a) + p**a / q**a - 1) / a**2
    else:
        terms = -(p**a * q**b - a / s * p**s - b / s * q**s) / (a * b)
    return math.fsum(terms)


def assistant(p: Probs, q: Probs, *, alpha: float, lam: float) -> Probs:
    c = (1 - alpha) / 2
    r = p**lam * q ** (1 - lam) if c == 0 else (lam * p**c + (1 - lam) * q**c) ** (1 / c)
    return r / math.fsum(r)


def alpha_mixture(p: Probs, q: Probs, *, alpha: float, lam: float, pair: str = "pr", ab_parameters: tuple[float, float] = (1, 0)) -> float:
    sides = {"p": p, "q": q, "r": assistant(p, q, alpha=alpha, lam=lam)}
    first, second = sides[pair[0]], sides[pair[1]]
    return kl(first, second) if ab_parameters == (1, 0) else alpha_beta(first, second, alpha=ab_parameters[0], beta=ab_parameters[1])


def taid_target(p: Probs, q: Probs, *, t: float) -> Probs:
    """Interpolated logits are a geometric mixture."""
    mixed = p**t * q ** (1 - t)
    return mixed / math.fsum(mixed)


def taid(p: Probs, q: Probs, *, t: float) -> float:
    return -math.fsum(taid_target(p, q, t=t) * np.log(q))


def top_k(p: Probs, q: Probs, *, k: int, tail: str) -> tuple[Probs, Probs]:
    """Both sides on the teacher's k most probable tokens, with the rest as one outcome or renormalised."""
    ids = sorted(range(len(p)), key=lambda v: -p[v])[:k]
    rest = [v for v in range(len(p)) if v not in ids]
    if tail == "drop" or not rest:
        return p[ids] / math.fsum(p[ids]), q[ids] / math.fsum(q[ids])
    return np.append(p[ids], math.fsum(p[rest])), np.append(q[ids], math.fsum(q[rest]))


def top_k_forward_kl(p: Probs, q: Probs, *, k: int, tail: str) -> float:
    return kl(*top_k(p, q, k=k, tail=tail))


def top_k_reverse_kl(p: Probs, q: Probs, *, k: int, tail: str) -> float:
    a, b = top_k(p, q, k=k, tail=tail)
    return kl(b, a)


def shared_ids(width: int) -> tuple[list[int], list[int]]:
    """Pairs of shared tokens for two vocabularies of `width` tokens, in different orders. Each has at least one token of its own."""
    many = width // 2 + 1
    return list(range(many)), [width - 1 - v for v in range(many)]


def sorted_distance(p: Probs, q: Probs) -> float:
    return math.fsum(abs(x - y) for x, y in zip(sorted(p), sorted(q), strict=True))


def hybrid_distance(p: Probs, q: Probs, *, beta: float) -> float:
    of_student, of_teacher = shared_ids(len(p))
    share = len(of_student) / len(p)
    x, y = p[of_teacher], q[of_student]
    both = kl(x, y) if beta == 0 else kl(y, x) if beta == 1 else beta * kl(x, beta * x + (1 - beta) * y)
    both += (1 - beta) * kl(y, beta * x + (1 - beta) * y) if 0 < beta < 1 else 0
    return share * both + (1 - share) * sorted_distance(np.delete(p, of_teacher), np.delete(q, of_student))


def cross_entropy_of_top(p: Probs, q: Probs) -> float:
    """-log q of the teacher's most probable token."""
    return -math.log(q[int(np.argmax(p))])
