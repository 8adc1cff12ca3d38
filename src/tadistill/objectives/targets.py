"""Forms of a teacher's output other than logits: hidden states with a head, and a mixture of several teachers' outputs.

Two more forms, which contain only a few tokens per position, are in `tadistill.objectives.sparse`.

Every divergence takes logits, so each form is converted to logits. `Head.logits` and `TargetMixture.logits` return the teacher's logits.
`TopK.align` returns both models' logits on the top-k tokens. `TeacherTerm` does this conversion for a loss. Only `Sampled` is not
converted: it has its own forward KL.

Axes: N tokens of a batch, n tokens of a tile, H hidden size, V vocabulary size.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from tadistill.errors import ConfigError
from tadistill.objectives import checks
from tadistill.objectives.divergence import (
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
from tadistill.objectives.sparse import Sampled, TopK

WITH_SLOPE: dict[Callable[..., Tensor], Callable[..., tuple[Tensor, Tensor]]] = {
    forward_kl: forward_kl_with_slope,
    reverse_kl: reverse_kl_with_slope,
    jensen_shannon: jensen_shannon_with_slope,
    skew_forward_kl: skew_forward_kl_with_slope,
    skew_reverse_kl: skew_reverse_kl_with_slope,
    single_step: single_step_with_slope,
}
"""The functions that return a divergence with its slope (gradient in the student's logits). Autograd computes all other slopes."""


@dataclass(frozen=True)
class Head:
    """Last layer of a language model: softcap(scale * (hidden @ weight.T + bias)), where softcap(z) = cap tanh(z / cap)."""

    weight: Tensor
    """Weight (V, H), with finite values. With tied embeddings it is the weight of the embedding."""
    bias: Tensor | None = None
    """Bias (V,), if the head has one. Its values may be -inf."""
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
    """The last hidden states (..., H) of a model, usually a teacher, and its output head."""

    states: Tensor
    head: Head
    vocab: int | None = None
    """Size of the teacher's vocabulary, if the student has another tokenizer. None means that both have the same vocabulary."""

    def to(self, device: torch.device) -> "Hidden":
        """Return a copy whose states are on another device. The head stays on its device."""
        return Hidden(self.states.to(device, non_blocking=True), self.head, self.vocab)


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
        checks.choice("kind", self.kind, ("geometric", "arithmetic"))
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
        """Raise a ConfigError unless `count`, the number of entries of the argument `name`, is the number of weights."""
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
        parts = self._weighted("log_p", log_p)
        if self.kind == "geometric":  # log Z depends on the tokens so far, which the student chose, so it is no constant of the reward
            return torch.stack([w * p for w, p in parts]).sum(0)
        return torch.stack([p + float(np.log(w)) for w, p in parts]).logsumexp(0)

    def logits(self, teacher_logits: Sequence[Tensor], *, temperature: float = 1.0) -> Tensor:
        """Return the logits (..., V) of the mixture. Each distribution is the softmax of its logits at `temperature`.

        Args:
            teacher_logits: the logits (..., V) of each teacher, in the order of `weights`.
        """
        weighted = self._weighted("teacher_logits", teacher_logits)
        checks.positive("temperature", temperature)
        parts = [(w, log_probs(z, temperature)) for w, z in weighted]
        if self.kind == "geometric":
            return torch.log_softmax(reduce(torch.add, (w * log_p for w, log_p in parts)), dim=-1) * temperature
        return reduce(torch.logaddexp, (log_p + float(np.log(w)) for w, log_p in parts)) * temperature

    def _weighted(self, name: str, given: Sequence[Tensor]) -> list[tuple[float, Tensor]]:
        # the entries of the argument `name` that have a weight above 0, each with its normalised weight
        self.check(name, len(given))
        total = sum(self.weights)
        return [(w / total, value) for w, value in zip(self.weights, given, strict=True) if w > 0]


Target = Tensor | Hidden | TopK | Sampled
"""A teacher's output in one of four forms: logits (..., V), hidden states with their head, top-k tokens, or drawn tokens."""


def per_token(target: Target) -> Tensor:
    """Return the tensor of a target that has one row per token: its logits, hidden states, log-probabilities or shares."""
    match target:
        case Hidden():
            return target.states
        case TopK():
            return target.log_probs
        case Sampled():
            return target.shares
    return target


def select(target: Target, rows: slice | Tensor, width: int | None = None) -> Target:
    """Return the target at the positions `rows`. Of logits, only those of the first `width` vocabulary entries are returned."""
    if isinstance(target, Tensor):
        return target[rows] if width is None else target[rows][..., :width]
    return replace(target, **{name: value[rows] for name, value in vars(target).items() if isinstance(value, Tensor)})


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

    @classmethod
    def at(
        cls,
        counted: Tensor,
        divergence: Callable[..., Tensor],
        parameters: Mapping[str, Any],
        mixture: TargetMixture | None,
        temperature: float,
    ) -> "TeacherTerm":
        """Return the term at the N tokens where the mask `counted` (...) is True. Tensors in `parameters` have values of tokens, and are
        cut, too. Only a tensor with one number and fewer axes is a setting.

        Raises:
            ConfigError: a tensor does not broadcast to the tokens.
        """
        axes = counted.shape

        def of_tokens(value: Any) -> bool:
            if not isinstance(value, Tensor) or not checks.broadcasts(value.shape, axes):
                return False
            return value.numel() > 1 or value.shape == axes or value.ndim == len(axes) > 1

        per_token = {name: value.expand(axes)[counted] for name, value in parameters.items() if of_tokens(value)}
        settings = {name: value for name, value in parameters.items() if name not in per_token}
        for name, value in settings.items():
            if isinstance(value, Tensor) and value.numel() != 1:
                raise ConfigError(
                    f"`{name}` has shape {tuple(value.shape)}, but the tokens have shape {tuple(axes)}; give one value per token, or, if "
                    f"it has no values of tokens, a divergence that contains it: `functools.partial(divergence, {name}=...)`"
                )
        return cls("", divergence, per_token, settings, mixture, temperature)

    def values(self, logits: Tensor, teachers: Sequence[Tensor | TopK | Sampled], rows: slice) -> Tensor:
        """Return one value per token in `rows`, of shape (n,). `logits` are the student's at these tokens, of shape (n, V)."""
        if isinstance(teachers[0], Sampled):
            return self._of_sampled(teachers[0], len(teachers)).forward_kl(logits, self.temperature)
        student, teacher, temperature = self._sides(logits, teachers)
        return self.divergence(student, teacher, temperature=temperature, **self._arguments(rows))

    def has_slope(self, teachers: Sequence[Target]) -> bool:
        """Return True if `with_slope` works. It needs a divergence in `WITH_SLOPE`, and teachers whose whole distribution is known."""
        return self.divergence in WITH_SLOPE and not any(isinstance(t, TopK | Sampled) for t in teachers)

    def with_slope(self, logits: Tensor, teachers: Sequence[Tensor | TopK | Sampled], rows: slice) -> tuple[Tensor, Tensor]:
        """Return the values (n,) and their gradients with respect to the student's logits (n, V)."""
        student, teacher, temperature = self._sides(logits, teachers)
        return WITH_SLOPE[self.divergence](student, teacher, temperature=temperature, **self._arguments(rows))

    def _arguments(self, rows: slice) -> dict[str, Any]:
        return {name: values[rows] for name, values in self.per_token.items()} | dict(self.settings)

    def _of_sampled(self, teacher: Sampled, count: int) -> Sampled:
        if self.divergence is not forward_kl or count > 1:
            what = "a mixture of teachers" if count > 1 else getattr(self.divergence, "__name__", "this divergence")
            raise ConfigError(
                f"drawn tokens (`Sampled`) can be used only for `forward_kl` with one teacher, not for {what}; use hidden states or logits"
            )
        return teacher

    def _sides(self, student: Tensor, teachers: Sequence[Tensor | TopK | Sampled]) -> tuple[Tensor, Tensor, float]:
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


def check_numbers(found: Tensor, hidden: Tensor, head: Head, teachers: Sequence[Target], vocab: int | None) -> None:
    """Raise a ConfigError if the values `found` contain NaN. It says why: what is not finite in the student or in a teacher, among the
    first `vocab` tokens."""
    checks.states("student_hidden", hidden)
    _check_finite(head, "`student_head`", vocab)
    for target in teachers:
        if isinstance(target, Hidden):
            checks.states("teacher", target.states)
            _check_finite(target.head, "the teacher's head", target.vocab or vocab)
    used = [per_token(select(target, slice(None), vocab)).flatten() for target in teachers]
    checks.result(found, student_hidden=hidden, teacher=torch.cat(used))


def _check_finite(head: Head, name: str, vocab: int | None) -> None:
    wrong = ~head.weight[:vocab].isfinite().all(dim=1)
    if head.bias is not None:
        wrong |= head.bias[:vocab].isnan() | head.bias[:vocab].isposinf()
    if rows := wrong.nonzero().flatten().tolist():
        more = f" (and {len(rows) - 1} more)" if len(rows) > 1 else ""
        raise ConfigError(
            f"row {rows[0]}{more} of {name} contains NaN or infinity, but weights must be finite; to exclude a token, set its bias to -inf"
        )


def check_head(head: Any, name: str) -> None:
    """Raise a ConfigError if `head` is not a `Head`, for example if it is a weight or a layer."""
    if not isinstance(head, Head):
        write = "Head(lm_head.weight, lm_head.bias)" if isinstance(head, torch.nn.Module) else "Head(weight) with the weight (V, H)"
        raise ConfigError(f"{name} is a {type(head).__name__}, but it must be a Head; write {write}")


def check_target(target: Any) -> None:
    """Raise a ConfigError if `target` is not one of the forms of a teacher (`Target`)."""
    if isinstance(target, Hidden):
        check_head(target.head, "the head of `Hidden`")
    elif not isinstance(target, Tensor | TopK | Sampled):
        raise ConfigError(
            f"`teacher` is a {type(target).__name__}; it must be logits (..., V), Hidden(states, Head(weight)), TopK or Sampled"
        )


def check_same_tokens(hidden: Tensor, teachers: Sequence[Target]) -> None:
    """Raise a ConfigError unless the student's hidden states (..., H) and all teachers have the same tokens."""
    for target in teachers:
        found, expected = tuple(per_token(target).shape[:-1]), tuple(hidden.shape[:-1])
        if found != expected:
            raise ConfigError(f"`teacher` has tokens of shape {found}, but `student_hidden` has {expected}; give both for the same tokens")


def width_of(head: Head, teachers: Sequence[Target], vocab: int | None) -> int:
    """Return how many of the student's logits a loss uses: `vocab`, or the size of the heads if `vocab` is None. The heads of teachers with
    a vocabulary of their own may have any size.

    Raises:
        ConfigError: the heads have different sizes and `vocab` is None, or `vocab` is larger than a head.
    """
    widths = [head.weight.shape[0]]
    whole = [t for t in teachers if not (isinstance(t, TopK | Sampled) or (isinstance(t, Hidden) and t.vocab))]
    widths += [t.head.weight.shape[0] if isinstance(t, Hidden) else t.shape[-1] for t in whole]
    if vocab is None and len(set(widths)) > 1:
        raise ConfigError(
            f"student and teacher have {widths} logits; set `vocab` to the size of their shared vocabulary, which is at most {min(widths)}"
        )
    if vocab is not None and not 1 <= vocab <= min(widths):
        raise ConfigError(f"`vocab` is {vocab}; it must be from 1 to {min(widths)}, because the smallest head has {min(widths)} logits")
    return vocab or widths[0]
