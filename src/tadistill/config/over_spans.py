"""Methods for a student and a teacher with different tokenizers: the changes that a method needs, and the methods that are refused.

The loss is computed over spans: the pieces of a text between token boundaries that both models have (`objectives.spans`).
"""

from typing import TYPE_CHECKING

from tadistill.config.objective import Gold, MiniLLM
from tadistill.config.sampling import TeacherMixedSampler
from tadistill.errors import ConfigError

if TYPE_CHECKING:
    from tadistill.config.method import Method


def over_spans(method: "Method") -> "Method":
    """Return the method with the changes that it needs if teacher and student have different tokenizers.

    Only `minillm` changes. Its exact single-step term needs the teacher's probability of every token of the student's vocabulary. The
    teacher has another vocabulary, so this term is left out. Instead, the return of each token also contains the reward of the sampled span
    that the token belongs to.

    Raises:
        ConfigError: the method is not defined for two tokenizers. The message says why, and what to use.
    """
    objective, sampler = method.objective, method.sampler
    if objective.only_by_token:
        raise ConfigError(f"objective `{objective.label}` {objective.only_by_token}")
    if sampler.guided:
        fix = "set `sampler.alpha: 0`" if isinstance(sampler, TeacherMixedSampler) else "use `sampler: {type: student}`"
        raise ConfigError(
            f"sampler `{sampler.label}` needs one tokenizer for both models, which sample one text together, token by token; {fix}"
        )
    if method.signal:
        key = "recorded" if method.recorded_text else "signal"
        raise ConfigError(
            f"sampler.signal `{method.signal.type}` needs one tokenizer for both models, because it records the teacher's "
            f"outputs at the student's tokens; remove `{key}`"
        )
    if method.dense:
        raise ConfigError("`dense` needs one tokenizer for all models, because it averages their distributions over tokens; remove `dense`")
    if method.select.metric == "reverse_kl":
        raise ConfigError(
            "select.metric `reverse_kl` needs one tokenizer for both models, because it compares them token by token; set "
            "`select.metric` to `loss` or `rouge_l`"
        )
    if not isinstance(objective, MiniLLM):
        return method
    if objective.needs_corpus and objective.pt_kd_ratio > 0:
        raise ConfigError(
            f"objective.pt_kd_ratio {objective.pt_kd_ratio:g} needs one tokenizer for both models, because the forward KL on plain "
            "text compares single tokens; set `objective.pt_kd_ratio: 0`"
        )
    normalised = "remaining" if objective.length_normalisation == "after" else objective.length_normalisation
    changes = {"single_step": False, "include_current": True, "length_normalisation": normalised}
    return method.model_copy(update={"objective": objective.model_copy(update=changes)})


def check_one_tokenizer(method: "Method") -> None:
    """Check that a method is defined for a student and a teacher with one tokenizer. Raises a ConfigError if it is not."""
    if isinstance(method.objective, Gold):
        raise ConfigError(
            "objective `gold` is for models with different tokenizers, but these models share one tokenizer, for which it is the "
            f"Jensen-Shannon divergence; use `objective: {{type: jensen_shannon, beta: {method.objective.beta:g}}}`"
        )
