"""Forms of a teacher other than its logits: hidden states with a head, the top-k tokens, and a mixture of several teachers.

Every divergence takes logits, so each form is converted to logits. `Head.logits` and `TargetMixture.logits` return the teacher's logits.
`TopK.align` returns both models' logits on the top-k tokens. `TeacherTerm` makes this conversion for a loss.

Axes: N tokens, H hidden, V vocabulary, K tokens that are kept.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from tadistill.errors import ConfigError
from tadistill.objectives import checks
from tadistill.objectives.divergence import (
    LOG_ZERO,
    at_least_float32,
    forward_kl,
    forward_kl_with_slope,
    jensen_shannon,
    jensen_shannon_with_slope,
    log_probs,
    reverse_kl,
    reverse_kl_with_slope,
    skew_forward_kl,
    skew_forward_kl_with_slope,
    skew_reverse_kl,
    skew_reverse_kl_with_slope,
)
from tadistill.objectives.minillm import single_step, single_step_with_slope

WITH_SLOPE: dict[Callable[..., Tensor], Callable[..., tuple[Tensor, Tensor]]] = {
    forward_kl: forward_kl_with_slope,
    reverse_kl: reverse_kl_with_slope,
    jensen_shannon: jensen_shannon_with_slope,
    skew_forward_kl: skew_forward_kl_with_slope,
    skew_reverse_kl: skew_reverse_kl_with_slope,
    single_step: single_step_with_slope,
}
"""The functions that return a divergence with its slope. Autograd finds the slope of every other divergence."""


@dataclass(frozen=True)
class Head:
    """Last layer of a language model: softcap(scale * (hidden @ weight.T + bias)), where softcap(z) = cap tanh(z / cap)."""

    weight: Tensor
    """Weight (V, H). With tied embeddings it is the weight of the embedding."""
    bias: Tensor | None = None
    """Bias (V,), if the head has one."""
    scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.weight, Tensor):
            raise ConfigError(
                f"`Head` takes the weight of the last layer, but it was given a {type(self.weight).__name__}; write `Head(layer.weight)`"
            )

    @property
    def plain(self) -> bool:
        """True if the logits are only the matrix product plus the bias, without scale or softcap."""
        return self.scale == 1.0 and self.softcap is None

    def shape(self, logits: Tensor) -> Tensor:
        """Apply the head's scale and softcap to logits."""
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits (..., V) for hidden states (..., H)."""
        return self.shape(torch.nn.functional.linear(hidden, self.weight, self.bias))


@dataclass(frozen=True)
class Hidden:
    """A teacher's last hidden states (..., H) and its head."""

    states: Tensor
    head: Head

    def to(self, device: torch.device) -> "Hidden":
        """Return a copy whose states are on another device. The head stays on its device."""
        return Hidden(self.states.to(device), self.head)


@dataclass(frozen=True)
class TargetMixture:
    """Several teachers as one target distribution (dense guidance).

    A mean of reverse KLs to the teachers equals the reverse KL to their geometric mixture, plus a constant. A mean of forward KLs equals
    the forward KL to their arithmetic mixture, plus a constant. docs/reference/objectives.md has the proofs.

    Source: Son et al. 2021 (DGKD). It proposes dense guidance, and also leaves out teachers at random (`drop`).
    """

    kind: Literal["geometric", "arithmetic"]
    weights: tuple[float, ...]
    """One weight per teacher, at least 0. The weights are normalised so that their sum is 1."""
    drop: float = 0.0
    """Probability that a teacher is left out of a batch (see `drawn`). At least one teacher stays."""

    def __post_init__(self):
        if self.kind not in ("geometric", "arithmetic"):
            raise ConfigError(f"`kind` is {self.kind!r}; it must be `geometric` or `arithmetic`")
        if not self.weights or min(self.weights) < 0 or not 0 < sum(self.weights) < float("inf"):
            raise ConfigError(f"`weights` is {self.weights}; give one number >= 0 per teacher, and at least one number above 0")
        if not 0 <= self.drop < 1:
            raise ConfigError(f"`drop` is {self.drop}; it must be in [0, 1)")

    def drawn(self, generator: np.random.Generator) -> "TargetMixture":
        """Return the mixture for one batch. Each teacher is left out with probability `drop`, but at least one teacher stays.

        A teacher that is left out has weight 0 and needs no forward pass. Every rank must draw from the same generator.
        """
        while True:
            kept = tuple(w if u >= self.drop else 0.0 for w, u in zip(self.weights, generator.random(len(self.weights)), strict=True))
            if sum(kept) > 0:
                return TargetMixture(self.kind, kept)

    def check(self, name: str, count: int) -> None:
        """Raise a ConfigError unless the argument `name` has one entry per weight. It has `count` entries."""
        if count != len(self.weights):
            raise ConfigError(f"the mixture has {len(self.weights)} weights, but `{name}` has {count} entries; give one entry per weight")

    def kept(self) -> tuple[list[int], "TargetMixture | None"]:
        """Return two things: the indices of the teachers with a weight above 0; and their mixture, or None if there is only one teacher."""
        which = [k for k, w in enumerate(self.weights) if w > 0]
        return which, TargetMixture(self.kind, tuple(self.weights[k] for k in which)) if len(which) > 1 else None

    def token_scores(self, log_p: Sequence[Tensor]) -> Tensor:
        """Return the mixture's log-probability of each sampled token. Rewards are computed from it.

        The result and each tensor of `log_p` (one per teacher) have the same shape (...). For the geometric mixture, the result is the
        weighted mean of `log_p`, without normalisation over the vocabulary.
        """
        self.check("log_p", len(log_p))
        total = sum(self.weights)
        parts = [(w / total, p) for w, p in zip(self.weights, log_p, strict=True) if w > 0]
        if self.kind == "geometric":  # over text of the student, the -log Z of the mixture depends on the student: it stays in the reward
            return torch.stack([w * p for w, p in parts]).sum(0)
        return torch.stack([p + float(np.log(w)) for w, p in parts]).logsumexp(0)

    def logits(self, teacher_logits: Sequence[Tensor], *, temperature: float = 1.0) -> Tensor:
        """Return the logits (..., V) of the mixture. Each distribution is the softmax of its logits at `temperature`.

        Args:
            teacher_logits: the logits (..., V) of each teacher, in the order of `weights`.
        """
        self.check("teacher_logits", len(teacher_logits))
        checks.positive("temperature", temperature)
        total = sum(self.weights)
        parts = [(w / total, log_probs(z, temperature)) for w, z in zip(self.weights, teacher_logits, strict=True) if w > 0]
        mixed, log_p = parts[0]
        if self.kind == "geometric":
            out = mixed * log_p
            for weight, log_p in parts[1:]:
                out = out + weight * log_p
            return torch.log_softmax(out, dim=-1) * temperature
        out = log_p + float(np.log(mixed))
        for weight, log_p in parts[1:]:
            out = torch.logaddexp(out, log_p + float(np.log(weight)))
        return out * temperature


@dataclass(frozen=True)
class TopK:
    """A teacher's k most probable tokens. Recorded teacher outputs contain them instead of all V logits."""

    ids: Tensor
    """Token ids (..., K)."""
    log_probs: Tensor
    """Log-probabilities (..., K) of these tokens under the teacher's whole softmax."""
    tail: Tensor | None
    """Log-probability (...) of all other tokens together. They count as one additional token. If `tail` is None, the other tokens are
    dropped, and teacher and student are renormalised over the k tokens."""

    def to(self, device: torch.device) -> "TopK":
        """Return a copy on another device."""
        return TopK(self.ids.to(device), self.log_probs.to(device), None if self.tail is None else self.tail.to(device))

    def check(self, width: int) -> None:
        """Raise a ConfigError unless all ids are in a vocabulary of `width` tokens."""
        if self.ids.numel() and not checks.is_deferred() and not 0 <= int(self.ids.min()) <= int(self.ids.max()) < width:
            raise ConfigError(
                f"the token ids of a top-k target are from {int(self.ids.min())} to {int(self.ids.max())}; they must be in [0, {width - 1}]"
            )

    def align(self, student_logits: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Return the logits of student and teacher on the k tokens, each of shape (..., K). A tail adds one entry, unless K = V.

        Use them in a divergence at temperature 1.

        Raises:
            ConfigError: an id is outside the student's vocabulary, or there is a tail and `temperature` is not 1. The tail is the
                probability of all other tokens, and it is known at temperature 1 only.
        """
        checks.positive("temperature", temperature)
        width = student_logits.shape[-1]
        if self.ids.shape[:-1] != student_logits.shape[:-1] or self.ids.shape != self.log_probs.shape:
            raise ConfigError(
                f"the shapes of `student_logits` {tuple(student_logits.shape)}, `ids` {tuple(self.ids.shape)} and `log_probs` "
                f"{tuple(self.log_probs.shape)} do not fit; `ids` and `log_probs` need the same shape, and `student_logits` may differ "
                "only in the last axis"
            )
        self.check(width)
        if self.tail is None:
            return at_least_float32(student_logits).gather(-1, self.ids) / temperature, self.log_probs / temperature
        if temperature != 1.0:
            raise ConfigError(
                f"`temperature` is {temperature}, but the tail (the probability of all tokens outside the top k) is known at temperature 1 "
                "only; use 1, or leave out the tail with tail='drop'"
            )
        log_q = log_probs(student_logits)
        if self.ids.shape[-1] == width:
            return log_q.gather(-1, self.ids), self.log_probs
        rest = _rest(log_q, self.ids)
        return torch.cat([log_q.gather(-1, self.ids), rest], -1), torch.cat([self.log_probs, self.tail.unsqueeze(-1)], -1)


Target = Tensor | Hidden | TopK
"""A teacher in one of three forms: logits (..., V), hidden states with their head, or top-k tokens."""


def per_token(target: Target) -> Tensor:
    """Return the target's logits, hidden states or log-probabilities. This tensor has one row per token."""
    return target.states if isinstance(target, Hidden) else target.log_probs if isinstance(target, TopK) else target


def select(target: Target, rows: slice | Tensor, width: int | None = None) -> Target:
    """Return the target at the positions `rows`. Logits are also cut to the first `width` entries of the vocabulary."""
    if isinstance(target, Hidden):
        return Hidden(target.states[rows], target.head)
    if isinstance(target, TopK):
        return TopK(target.ids[rows], target.log_probs[rows], None if target.tail is None else target.tail[rows])
    return target[rows] if width is None else target[rows][..., :width]


@dataclass(frozen=True)
class TeacherTerm:
    """One term of a batch's loss, for `fused_terms`. It is a divergence to one teacher or to a mixture of teachers."""

    name: str
    divergence: Callable[..., Tensor]
    """Function that takes student logits, teacher logits, temperature, `per_token` and `settings`, and returns values (n,)."""
    per_token: Mapping[str, Tensor] = field(default_factory=dict)
    """Arguments with one value per token, (N,)."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    mixture: TargetMixture | None = None
    temperature: float = 1.0
    weight: float = 1.0

    def values(self, logits: Tensor, teachers: Sequence[Tensor | TopK], rows: slice) -> Tensor:
        """Return one value per token in `rows`, of shape (n,). `logits` are the student's at these tokens, of shape (n, V)."""
        student, teacher, temperature = self._sides(logits, teachers)
        return self.divergence(student, teacher, temperature=temperature, **self._arguments(rows))

    def has_slope(self, teachers: Sequence[Target]) -> bool:
        """Return True if `with_slope` works. It needs a divergence in `WITH_SLOPE`, and teachers without top-k tokens."""
        return self.divergence in WITH_SLOPE and not any(isinstance(t, TopK) for t in teachers)

    def with_slope(self, logits: Tensor, teachers: Sequence[Tensor | TopK], rows: slice) -> tuple[Tensor, Tensor]:
        """Return the values (n,) and their gradients with respect to the student's logits (n, V)."""
        student, teacher, temperature = self._sides(logits, teachers)
        return WITH_SLOPE[self.divergence](student, teacher, temperature=temperature, **self._arguments(rows))

    def _arguments(self, rows: slice) -> dict[str, Any]:
        return {name: values[rows] for name, values in self.per_token.items()} | dict(self.settings)

    def _sides(self, student: Tensor, teachers: Sequence[Tensor | TopK]) -> tuple[Tensor, Tensor, float]:
        # the temperature of a top-k target is 1 in the divergence, because `align` applies it
        if isinstance(teachers[0], TopK):
            if len(teachers) > 1:
                raise ConfigError(
                    "a mixture of teachers contains a top-k target, but the top-k tokens differ between teachers; use hidden states or "
                    "logits"
                )
            return *teachers[0].align(student, self.temperature), 1.0
        dense = [t for t in teachers if isinstance(t, Tensor)]
        mixed = dense[0] if self.mixture is None else self.mixture.logits(dense, temperature=self.temperature)
        return student, mixed, self.temperature


def top_k(teacher_logits: Tensor, k: int, *, tail: Literal["lump", "drop"] = "lump", temperature: float = 1.0) -> TopK:
    """Return the k most probable tokens of softmax(teacher_logits / temperature). tail="lump" adds the probability of all other tokens."""
    width = teacher_logits.shape[-1]
    if not 1 <= k <= width:
        raise ConfigError(f"`k` is {k}; it must be in [1, {width}], because the vocabulary has {width} tokens")
    if tail not in ("lump", "drop"):
        raise ConfigError(f"`tail` is {tail!r}; it must be `lump` or `drop`")
    log_p = log_probs(teacher_logits, temperature)
    found, ids = log_p.topk(k)
    if tail == "drop":
        return TopK(ids, found, None)
    rest = _rest(log_p, ids).squeeze(-1) if k < width else torch.full_like(found[..., 0], LOG_ZERO)
    return TopK(ids, found, rest)


def _rest(log_all: Tensor, ids: Tensor) -> Tensor:
    # log of the mass outside `ids`, (..., 1); 1 - (mass inside) would round to 0 if the model is confident
    return log_all.scatter(-1, ids, LOG_ZERO).logsumexp(-1, keepdim=True)


def top_k_forward_kl(
    student_logits: Tensor, teacher_logits: Tensor, *, k: int = 64, tail: Literal["lump", "drop"] = "lump", temperature: float = 1.0
) -> Tensor:
    """Return the forward KL on the teacher's k most probable tokens. k = V gives `forward_kl`.

    Args:
        k: number of tokens that are kept, in [1, V].
        tail: `lump` treats all other tokens as one token, which gives a lower bound of the whole KL. `drop` leaves the other tokens out,
            and renormalises both models over the k tokens.

    Other args, returns and errors are as in `forward_kl`. Source: Anshumann et al. 2025 (sparse logits); TRL server distillation (lump).
    """
    return forward_kl(*_on_top_k(student_logits, teacher_logits, k, tail, temperature))


def top_k_reverse_kl(
    student_logits: Tensor, teacher_logits: Tensor, *, k: int = 64, tail: Literal["lump", "drop"] = "lump", temperature: float = 1.0
) -> Tensor:
    """Return the reverse KL on the teacher's k most probable tokens. k = V gives `reverse_kl`. Args are as in `top_k_forward_kl`."""
    return reverse_kl(*_on_top_k(student_logits, teacher_logits, k, tail, temperature))


def _on_top_k(student: Tensor, teacher: Tensor, k: int, tail: Literal["lump", "drop"], temperature: float) -> tuple[Tensor, Tensor]:
    checks.check_pair(student, teacher)
    checks.positive("temperature", temperature)
    # the temperature is applied to both sides before the tokens are selected, so the tail is exact at any temperature
    return top_k(teacher, k, tail=tail, temperature=temperature).align(at_least_float32(student) / temperature)


def check_head(head: Any, name: str) -> None:
    """Raise a ConfigError if `head` is not a `Head`, for example if it is a weight or a layer."""
    if not isinstance(head, Head):
        write = "Head(lm_head.weight, lm_head.bias)" if isinstance(head, torch.nn.Module) else "Head(weight) with the weight (V, H)"
        raise ConfigError(f"{name} is a {type(head).__name__}, but it must be a Head; write {write}")


def check_target(target: Any) -> None:
    """Raise a ConfigError if `target` is not one of the forms of a teacher (`Target`)."""
    if isinstance(target, Hidden):
        check_head(target.head, "the head of `Hidden`")
    elif not isinstance(target, Tensor | TopK):
        raise ConfigError(f"`teacher` is a {type(target).__name__}; it must be logits (..., V), Hidden(states, Head(weight)) or TopK")
