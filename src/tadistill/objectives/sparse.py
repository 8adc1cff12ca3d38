"""A teacher's distribution as a few tokens per position: the k most probable ones (`TopK`), or randomly drawn ones (`Sampled`).

Recorded teacher outputs contain these forms instead of all V logits. A divergence on the top k tokens is biased: it ignores the other
tokens, or counts them as one token. The forward KL on drawn tokens is unbiased: its mean over all draws is the exact forward KL, and the
mean of its gradient is the exact gradient.

Axes: N tokens, V vocabulary, K tokens that are kept, U different tokens among the drawn ones.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tadistill.constants import LOG_ZERO
from tadistill.errors import ConfigError
from tadistill.objectives import checks
from tadistill.objectives.divergence import at_least_float32, forward_kl, log_probs, reverse_kl


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

    def first(self, k: int) -> "TopK":
        """Return the first k tokens (..., k), in the order of `ids`. The other kept tokens join the tail."""
        log_p = self.log_probs.float()
        tail = remaining(log_p) if self.tail is None else self.tail.float()
        return TopK(self.ids[..., :k], log_p[..., :k], torch.cat([log_p[..., k:], tail.unsqueeze(-1)], -1).logsumexp(-1))

    def check(self, width: int) -> None:
        """Raise a ConfigError unless all ids are in a vocabulary of `width` tokens."""
        check_ids(self.ids, width, "a top-k target")

    def align(self, student_logits: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Return the logits of student and teacher for the k tokens, each of shape (..., k). If there is a tail and k < V, one more entry
        for the tail is at the end.

        `temperature` is already applied, so compute divergences of these logits at temperature 1.

        Raises:
            ConfigError: an id is outside the student's vocabulary; or there is a tail (the probability of all other tokens), and
                `temperature` is not 1. The tail is known at temperature 1 only.
        """
        checks.tensor("student_logits", student_logits)
        checks.positive("temperature", temperature)
        width = student_logits.shape[-1]
        _check_shapes(student_logits, self.ids, self.log_probs, "log_probs")
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


@dataclass(frozen=True)
class Sampled:
    """Tokens drawn at random from a teacher's distribution p, as an estimate of p. Only the forward KL can be computed from them.

    A token that was drawn c times in n draws gets the share c / n. The mean of a share over all possible draws is p. The forward KL is
    sum_v p (log p - log q), where q is the student. Its part with q is linear in p, so the estimate and its gradient are unbiased.

    Source: Anshumann et al. 2025, arXiv 2503.16870 (Random Sampling KD, with the teacher's own distribution as the proposal).
    """

    ids: Tensor
    """Different token ids (..., U). A row with fewer than U tokens is filled up with the id 0."""
    shares: Tensor
    """Share (..., U) of the draws that gave this token. It is 0 where the row is filled up, and the sum of a row is 1."""
    entropy: Tensor
    """Entropy (...) of the teacher's whole distribution, in nats."""

    def to(self, device: torch.device) -> "Sampled":
        """Return a copy on another device."""
        return Sampled(self.ids.to(device), self.shares.to(device), self.entropy.to(device))

    def check(self, width: int) -> None:
        """Raise a ConfigError unless all ids are in a vocabulary of `width` tokens."""
        check_ids(self.ids, width, "a sampled target")

    def forward_kl(self, student_logits: Tensor, temperature: float = 1.0) -> Tensor:
        """Return an unbiased estimate (...) of the forward KL, in nats. The gradient in the logits (..., V) is q - shares.

        A single estimate can be below 0.

        Raises:
            ConfigError: `temperature` is not 1, because the tokens were drawn at temperature 1; or the shapes do not fit.
        """
        if temperature != 1.0:
            raise ConfigError(f"`temperature` is {temperature}, but the tokens of a sampled target were drawn at temperature 1; use 1")
        _check_shapes(student_logits, self.ids, self.shares, "shares")
        self.check(student_logits.shape[-1])
        log_q = log_probs(student_logits)
        found = -(self.shares.to(log_q.dtype) * log_q.gather(-1, self.ids)).sum(-1) - self.entropy.to(log_q.dtype)
        return checks.result(found, student_logits=student_logits)


def sampled_target(teacher_logits: Tensor, uniforms: Tensor) -> Sampled:
    """Draw n tokens from each row of softmax(teacher_logits), independently and with replacement.

    Args:
        teacher_logits: (N, V).
        uniforms: (N, n) float64 random numbers in [0, 1), one for each draw.
    """
    log_p = log_probs(teacher_logits)
    sums = log_p.double().exp().cumsum_(-1)
    total = sums[:, -1:]
    points = torch.minimum(uniforms.to(sums.device) * total, total.nextafter(torch.zeros_like(total)))
    drawn = torch.searchsorted(sums, points, right=True).sort(-1).values
    # equal neighbours are one token; the column of a token is its rank among the row's different tokens
    new = torch.ones_like(drawn, dtype=torch.bool)
    new[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    place = new.long().cumsum(-1) - 1
    width = int(place[:, -1].max()) + 1 if len(place) else 0
    ids = torch.zeros(len(drawn), width, dtype=torch.long, device=drawn.device).scatter_(1, place, drawn)
    counts = torch.zeros(len(drawn), width, device=drawn.device).scatter_add_(1, place, torch.ones_like(place, dtype=torch.float32))
    return Sampled(ids, counts / drawn.shape[1], -(log_p.exp() * log_p).sum(-1))


def _check_shapes(student_logits: Tensor, ids: Tensor, values: Tensor, name: str) -> None:
    if ids.shape[:-1] != student_logits.shape[:-1] or ids.shape != values.shape:
        raise ConfigError(
            f"the shapes of `student_logits` {tuple(student_logits.shape)}, `ids` {tuple(ids.shape)} and `{name}` {tuple(values.shape)} do "
            f"not fit; `ids` and `{name}` need the same shape, and `student_logits` may differ only in the last axis"
        )


def check_ids(ids: Tensor, width: int, what: str) -> None:
    """Raise a ConfigError unless all `ids` are in a vocabulary of `width` tokens. `what` names the target in the message."""
    if ids.numel() and not checks.is_deferred() and not 0 <= int(ids.min()) <= int(ids.max()) < width:
        raise ConfigError(f"the token ids of {what} are from {int(ids.min())} to {int(ids.max())}; they must be in [0, {width - 1}]")


def top_k(teacher_logits: Tensor, k: int, *, tail: Literal["lump", "drop"] = "lump", temperature: float = 1.0) -> TopK:
    """Return the k most probable tokens of softmax(teacher_logits / temperature). tail="lump" adds the probability of all other tokens."""
    checks.tensor("teacher_logits", teacher_logits)
    checks.number("k", k)
    width = teacher_logits.shape[-1]
    if not 1 <= k <= width:
        raise ConfigError(f"`k` is {k}; it must be in [1, {width}], because the vocabulary has {width} tokens")
    checks.choice("tail", tail, ("lump", "drop"))
    log_p = log_probs(teacher_logits, temperature)
    found, ids = log_p.topk(k)
    if tail == "drop":
        return TopK(ids, found, None)
    rest = _rest(log_p, ids).squeeze(-1) if k < width else torch.full_like(found[..., 0], LOG_ZERO)
    return TopK(ids, found, rest)


def remaining(log_probs: Tensor) -> Tensor:
    """Return the log of the total probability of the tokens outside a set, one value per position: shape (...).

    `log_probs`, of shape (..., K), are the log-probabilities of the K tokens in the set.

    The probability is at least the machine epsilon of float32. Smaller values cannot be told from rounding errors.
    """
    inside = log_probs.double().exp().sum(-1)
    return (1 - inside).clamp(min=torch.finfo(torch.float32).eps).log().float()


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
