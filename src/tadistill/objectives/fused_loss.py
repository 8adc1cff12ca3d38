"""Compute a loss and its gradients from hidden states, without a tensor of shape [tokens, vocabulary], for any objective.

    mean, values = fused_divergence(jensen_shannon, hidden, Head(w), Hidden(teacher_hidden, Head(v)), mask=weights, beta=0.1)
    mean.backward()  # `weights` is the mask divided by its sum; dividing the result later would copy the head's gradient

The tokens are processed in tiles (groups of tokens), whose sizes are in `objectives.tiles`. The forward pass also computes the gradients.
Autograd or a faster NAME_with_slope function gives the gradient with respect to the logits, which replaces the logits in memory. Matrix
products then give the gradients with respect to the hidden states and the head. The backward pass only returns these gradients.

Axes: N tokens, n tokens of a small tile, H hidden size, V vocabulary size, K terms of a loss.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tadistill.errors import ConfigError
from tadistill.objectives import checks
from tadistill.objectives.divergence import wide
from tadistill.objectives.sampled import TokenTerm
from tadistill.objectives.sparse import Sampled, TopK
from tadistill.objectives.targets import (
    Head,
    Hidden,
    Target,
    TargetMixture,
    TeacherTerm,
    check_head,
    check_numbers,
    check_same_tokens,
    check_target,
    select,
    width_of,
)
from tadistill.objectives.tiles import add_product, product, project, tile_rows

_QUEUED = {"cuda"}  # on these devices a comparison waits for all queued work, which takes longer than a multiplication by 1

Values = Callable[[Tensor, tuple[Any, ...], slice], Tensor]
"""A function that returns the values (K, n) of K terms at n tokens. It has three arguments: the student's logits (n, V); a tuple with one
entry per teacher, which is logits (n, V), `TopK` or `Sampled`; and the slice that selects the n tokens from all N tokens."""
Slopes = Callable[[Tensor, tuple[Any, ...], slice, Tensor], tuple[Tensor, Tensor]]
"""A function with the arguments of `Values` and weights (K, n). It returns the K terms and the gradient (n, V) of their weighted sum."""
Term = TokenTerm | TeacherTerm


def fused_divergence(
    divergence: Callable[..., Tensor],
    student_hidden: Tensor,
    student_head: Head,
    teacher: Target | Sequence[Target],
    *,
    mask: Tensor | None = None,
    mixture: TargetMixture | None = None,
    vocab: int | None = None,
    temperature: float = 1.0,
    **parameters: Any,
) -> tuple[Tensor, Tensor]:
    """Return the sum of `divergence(student_logits, teacher_logits, temperature=..., **parameters)` over tokens.

    Args:
        divergence: any function of `tadistill.objectives` that takes the logits of two models, or one of your own whose value at a token
            depends only on this token's logits: it is called with some of the tokens at a time.
        student_hidden: (..., H) last hidden states, with an autograd graph.
        teacher: the teacher's output (`Target`), or a list of several teachers' outputs with a `mixture`. No gradient flows to them.
        mask: (...) bool, True for a token that is included (all tokens by default), or one weight per token.
        vocab: use only the first `vocab` tokens of both heads (or of the teacher's logits), and normalise the probabilities over them.
        parameters: further arguments of `divergence`. A tensor, such as `from_teacher`, has values of tokens, and broadcasts to (...). A
            tensor with one number and fewer axes is a setting. A setting with several numbers belongs to the function:
            `functools.partial(divergence, name=tensor)`.

    Returns:
        Two tensors. The first is the weighted sum, a scalar with gradients to the hidden states and to the head's weight and bias. The
        second has one value per token, of shape (...), without a graph. It is zero where the mask is zero: nothing is computed there.

    Raises:
        ConfigError: shapes do not fit, a parameter is out of range, a result is NaN, or the gradient is computed in float16.
    """
    checks.tensor("student_hidden", student_hidden)
    check_head(student_head, "`student_head`")
    weights = torch.ones(student_hidden.shape[:-1], device=student_hidden.device) if mask is None else mask
    checks.weights("mask", weights, student_hidden)
    own = divergence.keywords if isinstance(divergence, partial) else {}
    checks.no_gradient(**{**own, **parameters, "mask": mask, "temperature": temperature})
    counted = weights != 0
    targets, mixture = _targets(student_hidden, teacher, mixture)
    term = TeacherTerm.at(counted, divergence, parameters, mixture, temperature)
    hidden, teachers = student_hidden[counted], [select(t, counted) for t in targets]
    total, found = fused_terms([term], hidden, student_head, weights[counted].unsqueeze(0), teachers=teachers, vocab=vocab)
    if bool(found.isnan().any()):
        check_numbers(found, hidden, student_head, teachers, vocab)
    return total, torch.zeros(counted.shape, dtype=found.dtype, device=found.device).masked_scatter(counted, found[0])


def fused_terms(
    terms: Sequence[Term], hidden: Tensor, head: Head, weights: Tensor, *, teachers: Sequence[Target] = (), vocab: int | None = None
) -> tuple[Tensor, Tensor]:
    """Compute K loss terms at the same N tokens. Return their weighted sum with a graph, and their values (K, N) without one."""
    total, found = fused_parts([part_of(terms, hidden, weights, teachers=teachers)], head, vocab=vocab)
    return total, found[0]


@torch.no_grad()
def fused_log_probs(hidden: Tensor, head: Head, tokens: Tensor, *, vocab: int | None, temperature: float = 1.0) -> Tensor:
    """Return the log-probability (N,) of one token at each of N positions, without a graph."""
    term = TokenTerm("", torch.positive, tokens, temperature=temperature)
    return fused_terms([term], hidden, head, torch.zeros(1, 1, device=hidden.device), vocab=vocab)[1][0]


def part_of(
    terms: Sequence[Term], hidden: Tensor, weights: "Tensor | Callable[[Tensor], Tensor]", *, teachers: Sequence[Target] = ()
) -> "Part":
    """Combine several loss terms at the same tokens into a part of a loss, for `fused_parts`."""

    def values(logits: Tensor, targets: tuple[Any, ...], rows: slice) -> Tensor:
        return torch.stack([term.values(logits, targets, rows) for term in terms])

    def slopes(logits: Tensor, targets: tuple[Any, ...], rows: slice, weights: Tensor) -> tuple[Tensor, Tensor]:
        found, slope = [], None
        for term, weight in zip(terms, weights.unsqueeze(-1), strict=True):
            value, own = term.with_slope(logits, targets, rows)
            found.append(value)
            slope = own if alone else own.mul_(weight) if slope is None else slope.addcmul_(own, weight)
        assert slope is not None
        return torch.stack(found), slope

    alone, all_have = len(terms) == 1, all(term.has_slope(teachers) for term in terms)
    return Part(hidden, values, weights, slopes if all_have else None, teachers, weighted=not alone)


def _targets(
    hidden: Tensor, teacher: Target | Sequence[Target], mixture: TargetMixture | None
) -> tuple[list[Target], TargetMixture | None]:
    targets: list[Target] = [*teacher] if isinstance(teacher, Sequence) else [teacher]
    for target in targets:
        check_target(target)
    check_same_tokens(hidden, targets)
    if not targets:
        raise ConfigError("`teacher` is an empty list; give at least one target")
    if mixture is None:
        if len(targets) > 1:
            raise ConfigError(f"`teacher` is a list of {len(targets)} targets; also give `mixture=TargetMixture(kind, weights)`")
        return targets, None
    mixture.check("teacher", len(targets))
    kept, left = mixture.kept()
    return [targets[k] for k in kept], left


def fused_head(
    hidden: Tensor,
    head: Head,
    values: Values,
    weights: Tensor,
    *,
    teachers: Sequence[Target] = (),
    vocab: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the weighted sum of K loss terms at N tokens. The sum and its gradient are computed tile by tile.

    Args:
        hidden: (N, H).
        values: a function that computes the K terms of a few tokens.
        weights: (K, N) or (K, 1). Include the factor 1 / count in the weights: then the backward pass need not scale the gradient.
        teachers: the teachers' outputs at the same N tokens.
        vocab: as in `fused_divergence`.

    Returns:
        The scalar sum, with an autograd graph; and the values (K, N), without a graph. A NaN is returned and raises no error.
    """
    total, found = fused_parts([Part(hidden, values, weights, teachers=teachers)], head, vocab=vocab)
    return total, found[0]


@dataclass(frozen=True)
class Part:
    """Loss terms at some tokens, for `fused_parts`. `hidden`, `values`, `weights` and `teachers` are arguments of `fused_head`."""

    hidden: Tensor
    values: Values
    weights: Tensor | Callable[[Tensor], Tensor]
    """Weights, or a function that computes them from the values of the previous part."""
    slopes: Slopes | None = None
    """A function that computes the terms and their gradient. It is used instead of `values` and autograd, if a gradient is needed and the
    head has no scale or softcap."""
    teachers: Sequence[Target] = ()
    counts: bool = True
    """False if the part adds only its gradient to the sum, and not its value."""
    weighted: bool = True
    """False if `slopes` returns the gradient of the only term without its weight. It is then multiplied while the gradient is written."""


def fused_parts(parts: Sequence[Part], head: Head, *, vocab: int | None) -> tuple[Tensor, list[Tensor]]:
    """Compute parts of a loss that use the same student's head. Return the weighted sum with a graph, and the values of each part."""
    watcher = _watcher.get() or (lambda head, tokens, width, grad: None)
    kind = head.weight.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    plans = []
    for part in parts:
        width = width_of(head, part.teachers, vocab)
        check_same_tokens(part.hidden, part.teachers)
        watcher(head, len(part.hidden), width, torch.is_grad_enabled())
        for target in part.teachers:
            if isinstance(target, TopK | Sampled):
                target.check(width)
            elif isinstance(target, Hidden):
                watcher(target.head, len(part.hidden), target.vocab or width, False)
        plans.append(_Plan(head, part, width, autocast, torch.is_grad_enabled()))
    hidden = parts[0].hidden if len(parts) == 1 else torch.cat([part.hidden for part in parts])
    total, *found = _FusedHead.apply(hidden, head.weight, head.bias, plans)  # type: ignore[misc]
    return total, found


# A context variable for the FLOP meter, and not an argument, because sampling, metrics and evaluation would all have to pass it on.
_watcher: ContextVar[Callable[[Head, int, int, bool], None] | None] = ContextVar("the watcher of all heads", default=None)


def heads_watched(watcher: Callable[[Head, int, int, bool], None]) -> AbstractContextManager[None]:
    """Inside the `with` block, each use of a head calls `watcher(head, tokens, vocab, grad)`.

    `tokens` is the number of tokens, and `vocab` the number of vocabulary entries. `grad` is True if gradients are enabled.
    """
    return checks.held(_watcher, watcher)


# --- the autograd function ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    head: Head
    part: Part
    width: int
    autocast: torch.dtype | None  # dtype of matrix products, if the caller has autocast on
    grad: bool  # True if the caller has gradients on; inside an autograd function they are always off

    def operand(self, states: Tensor, head: Head, width: int) -> Tensor:
        dtype = self.autocast if self.autocast and states.dtype != torch.float64 else states.dtype
        return head.weight.detach()[:width].to(dtype)


class _FusedHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, plans: list[_Plan]) -> tuple[Tensor, ...]:
        needs = [plans[0].grad and need for need in ctx.needs_input_grad]
        totals, found, first = [], [], 0
        with torch.autocast(hidden.device.type, enabled=False):
            grads = _Gradients(hidden, weight if needs[1] else None, bias if bias is not None and needs[2] else None, needs[0])
            if grads.wanted:
                checks.not_float16({hidden.dtype, *(plan.autocast for plan in plans), *([weight.dtype] if any(needs[1:]) else [])})
            for plan in plans:
                count = len(plan.part.hidden)
                weights = plan.part.weights if isinstance(plan.part.weights, Tensor) else plan.part.weights(found[-1])
                weights = weights.expand(-1, count)
                found.append(_run(plan, weights, hidden.detach()[first : first + count], grads, first))
                totals += [(weights.to(found[-1].dtype) * found[-1]).sum()] if plan.part.counts else []
                first += count
        ctx.save_for_backward(*grads.result(hidden.dtype, weight.dtype))
        ctx.mark_non_differentiable(*found)
        return (sum(totals[1:], start=totals[0] if totals else found[0].new_zeros(())), *found)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad = grad_outputs[0]
        if grad.device.type in _QUEUED:  # in place: a second backward pass through the same graph is refused by torch
            return (*(g if g is None else g.mul_(grad.to(g.dtype)) for g in ctx.saved_tensors), None)
        whole = bool(grad == 1)
        return (*(g if g is None or whole else g * grad.to(g.dtype) for g in ctx.saved_tensors), None)


class _Gradients:
    def __init__(self, hidden: Tensor, weight: Tensor | None, bias: Tensor | None, of_hidden: bool):
        dtype = wide(hidden.dtype)
        self.hidden = torch.zeros_like(hidden, dtype=dtype) if of_hidden else None
        self.weight = torch.zeros_like(weight, dtype=dtype) if weight is not None else None
        self.bias = torch.zeros_like(bias, dtype=dtype) if bias is not None else None
        self.wanted = of_hidden or weight is not None or bias is not None

    def add(self, rows: slice, slope: Tensor, hidden: Tensor, operand: Tensor) -> None:
        width = slope.shape[1]
        narrow = slope.to(operand.dtype)
        if self.hidden is not None:
            self.hidden[rows] = product(narrow, operand, self.hidden.dtype)
        if self.weight is not None:
            add_product(self.weight[:width], narrow.t(), hidden)
        if self.bias is not None:
            self.bias[:width] += slope.sum(0)

    def result(self, of_hidden: torch.dtype, of_weight: torch.dtype) -> tuple[Tensor | None, ...]:
        wanted = ((self.hidden, of_hidden), (self.weight, of_weight), (self.bias, of_weight))
        return tuple(None if g is None else g.to(dtype) for g, dtype in wanted)


def _run(plan: _Plan, weights: Tensor, hidden: Tensor, grads: _Gradients, first: int) -> Tensor:
    count, width, dtype = len(hidden), plan.width, wide(hidden.dtype)
    dense = [t for t in plan.part.teachers if isinstance(t, Hidden)]
    widths = [width, *(t.vocab or width for t in dense)]
    rows, small = tile_rows(count, widths, dtype, hidden.device)
    buffers = [torch.empty(rows, width, dtype=dtype, device=hidden.device) for width in widths]
    operand = plan.operand(hidden, plan.head, width)
    operands = [plan.operand(t.states, t.head, width) for t, width in zip(dense, widths[1:], strict=True)]
    # One tensor for all values: small tensors between large freed ones would make the C allocator request new memory again and again.
    weights, values = weights.to(dtype), torch.zeros(weights.shape[0], count, dtype=dtype, device=hidden.device)
    # A GPU writes the gradient at once in the dtype of the products, over the logits. The gradient of a bias needs all its bits.
    narrow = hidden.device.type in _QUEUED and small >= rows and operand.dtype.itemsize < dtype.itemsize and grads.bias is None
    for start in range(0, count, rows):
        tile = slice(start, min(start + rows, count))
        here = hidden[tile].to(operand.dtype)
        student = project(here, operand, plan.head.bias, buffers[0])
        projected = iter(
            project(t.states[tile].to(w.dtype), w, t.head.bias, out) for t, w, out in zip(dense, operands, buffers[1:], strict=True)
        )
        out = student.view(-1).view(operand.dtype)[: student.numel()].view(student.shape) if narrow else student
        teachers = [next(projected) if isinstance(t, Hidden) else select(t, tile, width) for t in plan.part.teachers]
        for at in range(0, len(here), small):
            inside = slice(at, min(at + small, len(here)))
            place, here_teachers = slice(start + inside.start, start + inside.stop), [select(t, inside) for t in teachers]
            values[:, place] = _small(plan, weights[:, place], student[inside], here_teachers, place, out[inside], grads.wanted)
        if grads.wanted:
            grads.add(slice(first + tile.start, first + tile.stop), out, here, operand)
    return values


def _small(plan: _Plan, weights: Tensor, logits: Tensor, teachers: list[Any], rows: slice, out: Tensor, wanted: bool) -> Tensor:
    part, paired = plan.part, zip(plan.part.teachers, teachers, strict=True)
    targets = tuple(t.head.shape(own) if isinstance(t, Hidden) else own for t, own in paired)
    if wanted and part.slopes is not None and plan.head.plain:
        whole = all(isinstance(t, Hidden) and t.head.bias is None for t in part.teachers)  # no product of a head is -inf, but a bias may be
        with checks.deferred(), checks.finite_logits(whole and plan.head.bias is None):
            values, slope = part.slopes(logits, targets, rows, weights)
        if part.weighted:
            out.copy_(slope)
        else:
            torch.mul(slope, weights[0].unsqueeze(-1), out=out)
        return values
    leaf = logits.detach().requires_grad_(wanted)
    with torch.set_grad_enabled(wanted), checks.deferred():
        values = part.values(plan.head.shape(leaf), targets, rows)
    if wanted and not values.requires_grad:  # the divergence does not depend on the student, as with a skew of 1
        out.zero_()
    elif wanted:
        (slope,) = torch.autograd.grad(values, leaf, weights)
        out.copy_(slope)
    return values.detach()
