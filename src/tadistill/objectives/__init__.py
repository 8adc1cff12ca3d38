"""White-box distillation objectives as pure functions. Most of them take logits and return one value per token, in nats.

    from tadistill.objectives import reverse_kl
    loss = (reverse_kl(student_logits, teacher_logits) * mask).sum() / mask.sum()

`fused_divergence` computes the same values from hidden states and output heads. It never builds a tensor of shape [tokens, vocabulary].
"""

from tadistill.objectives.adaptive import TaidSchedule, adaptive_kl, contrastive, contrastive_alpha, taid, taid_target
from tadistill.objectives.alpha_divergences import alpha_beta, alpha_mixture
from tadistill.objectives.divergence import (
    forward_kl,
    jeffreys,
    jensen_shannon,
    log_probs,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    total_variation,
)
from tadistill.objectives.fused_loss import fused_divergence, fused_head
from tadistill.objectives.minillm import clipped_ratio, moments, policy_gradient, returns, single_step, whiten
from tadistill.objectives.sampled import cross_entropy, k1, k2, k3, no_teacher, token_log_probs
from tadistill.objectives.spans import SpanTokens, fused_span_distance, fused_span_divergence, span_log_probs, span_rewards
from tadistill.objectives.sparse import Sampled, TopK, sampled_target, top_k, top_k_forward_kl, top_k_reverse_kl
from tadistill.objectives.targets import Head, Hidden, TargetMixture
from tadistill.objectives.uld_and_gold import SharedVocabulary, hybrid_distance, sorted_distance

__all__ = [
    "Head",
    "Hidden",
    "Sampled",
    "SharedVocabulary",
    "SpanTokens",
    "TaidSchedule",
    "TargetMixture",
    "TopK",
    "adaptive_kl",
    "alpha_beta",
    "alpha_mixture",
    "clipped_ratio",
    "contrastive",
    "contrastive_alpha",
    "cross_entropy",
    "forward_kl",
    "fused_divergence",
    "fused_head",
    "fused_span_distance",
    "fused_span_divergence",
    "hybrid_distance",
    "jeffreys",
    "jensen_shannon",
    "k1",
    "k2",
    "k3",
    "log_probs",
    "moments",
    "no_teacher",
    "policy_gradient",
    "returns",
    "reverse_kl",
    "sampled_target",
    "single_step",
    "skew_forward_kl",
    "skew_reverse_kl",
    "sorted_distance",
    "span_log_probs",
    "span_rewards",
    "taid",
    "taid_target",
    "token_log_probs",
    "top_k",
    "top_k_forward_kl",
    "top_k_reverse_kl",
    "total_variation",
    "whiten",
]
