"""White-box distillation objectives as pure functions: logits in, one value per token out, in nats.

from tadistill.objectives import reverse_kl
loss = (reverse_kl(student_logits, teacher_logits) * mask).sum() / mask.sum()
"""

from tadistill.objectives.divergence import forward_kl, log_probs, reverse_kl
from tadistill.objectives.sampled import clipped_ratio, cross_entropy, policy_gradient, returns, token_log_probs

__all__ = [
    "clipped_ratio",
    "cross_entropy",
    "forward_kl",
    "log_probs",
    "policy_gradient",
    "returns",
    "reverse_kl",
    "token_log_probs",
]
