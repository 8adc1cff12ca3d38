"""The changes of a method by a model, an arm or a phase, and checks that the resulting settings fit together, with an error message for
every combination that does not work.

If student and teacher have different tokenizers, the loss is computed over spans: the pieces of a text between token boundaries that both
models have (`objectives.spans`). `over_spans` returns the method with the changes that this needs, or refuses it.
"""

from typing import Any

from pydantic import ValidationError

from tadistill.config.common import Decoding, Divergence, Strict, message_of
from tadistill.config.method import PARTS, Method, MethodPatch
from tadistill.config.method_parts import Optim
from tadistill.config.objective import ForwardKL, Gold, MiniLLM, TopKForwardKL, TopKReverseKL
from tadistill.config.sampling import HiddenSignal, OnPolicy, ReplaySampler, Rounds, SampledSignal, TeacherMixedSampler, TopKSignal
from tadistill.errors import ConfigError, about


def merge_methods(base: Any, patch: Strict | float | None, part: str) -> Any:
    """Return a part of a method, such as its objective, with the changes in `patch`.

    Args:
        base: the part without the changes.
        patch: the changes. None changes nothing. A number, or an object of another class (another `type`), replaces `base`.
        part: the key of the part, such as `objective`, for the error message.

    Raises:
        ConfigError: the changed settings do not fit together.
    """
    if patch is None:
        return base
    if type(patch) is not type(base) or not isinstance(patch, Strict):
        return patch
    changed = {name: getattr(patch, name) for name in patch.model_fields_set}
    if isinstance(base, Optim):  # the keys of a pair exclude each other, so setting one clears the other
        for one, other in (("steps", "epochs"), ("epochs", "steps"), ("micro_batch", "tokens"), ("tokens", "micro_batch")):
            if changed.get(one) is not None:
                changed.setdefault(other, None)
    try:
        return type(base).model_validate({**base.model_dump(), **changed})
    except ValidationError as error:
        what = "; ".join(map(message_of, error.errors()))
        raise ConfigError(f"a model, an arm or a phase changes `{part}`, but the changed settings do not fit together: {what}") from error


def apply(method: Method, *patches: MethodPatch) -> Method:
    """Return the method with the changes of all `patches`, applied in order. Raises a ConfigError if the resulting settings do not fit
    together."""
    for patch in patches:
        phases = method.phases if patch.phases is None else patch.phases
        parts = {part: merge_methods(getattr(method, part), getattr(patch, part), part) for part in PARTS}
        method = Method(**parts, phases=phases)
    if method.phases:
        phases_of(method)  # checks the settings of each phase; those of the whole method are not trained with
        return method
    for key in _without_effect(method):
        if all(getattr(patch, key) is None for patch in patches):
            method = method.model_copy(update={key: None})  # the recipe's own setting applies only to arms that have teachers
    check_pairing(method)
    return method


def phases_of(method: Method) -> list[tuple[Method, float]]:
    """Return the method of each phase and its share of the updates. A method without phases is returned as one phase, with the share 1.

    Raises:
        ConfigError: the settings of a phase do not fit together.
    """
    if not method.phases:
        return [(method, 1.0)]
    plain, found = method.model_copy(update={"phases": None}), []
    for number, phase in enumerate(method.phases, 1):
        with about(f"phase {number}"):
            found.append((apply(plain, phase.patch), phase.share or 1 / len(method.phases)))
    return found


# --- checks -----------------------------------------------------------------------------------------------------------------


def check_pairing(method: Method) -> None:
    """Raise a ConfigError if the objective, the sampler, the recorded teacher outputs and the optimizer settings do not fit together."""
    method.sampler.check()
    _check_text(method)
    _check_uses_of_teacher(method)
    _check_signal(method)
    method.select.check()
    _check_engine(method)
    if method.context:
        _check_context(method)
    if method.ema is not None:
        _check_ema(method)
    sampler, batch = method.sampler, method.optim.batch
    if method.round_rollouts % batch:
        raise ConfigError(
            f"sampler.rollouts {method.round_rollouts} is not a multiple of optim.batch {batch}; change one of them, so that a round is a "
            "whole number of updates"
        )
    if sampler.follows_dev and not method.select.chooses:
        raise ConfigError(
            f"sampler `{sampler.type}` needs the loss on the dev set, but select.metric `last` does not measure it; set `select.metric` "
            "to `loss` or `rouge_l`"
        )
    if isinstance(sampler, ReplaySampler) and sampler.capacity < batch:
        raise ConfigError(
            f"sampler.capacity {sampler.capacity} is less than optim.batch {batch}; raise `sampler.capacity` to at least {batch}"
        )


def _check_text(method: Method) -> None:
    objective, sampler = method.objective, method.sampler
    if method.recorded_text and (objective.needs_rounds or objective.needs_own_samples):
        raise ConfigError(
            f"objective `{objective.type}` needs new samples of the current student, but sampler `student` has `recorded: true`, so "
            "its text is sampled once, before training; remove `recorded`, or use a divergence, such as `reverse_kl`"
        )
    if objective.needs_rounds and not sampler.in_rounds:
        raise ConfigError(
            f"objective `{objective.type}` needs a sampler that works in rounds, but sampler `{sampler.type}` does not; use "
            f"`sampler: {{type: teacher_mixed}}`"
        )
    if objective.needs_own_samples and not sampler.student_only:
        raise ConfigError(
            f"objective `{objective.type}` needs samples from the student's own distribution, but sampler `{sampler.type}` does not draw "
            f"them; use `sampler: {{type: student}}` with `temperature` 1, and without `top_k`, `top_p`, `min_p` and `no_repeat_ngram`"
        )
    if objective.needs_rounds and isinstance(sampler, Rounds) and sampler.temperature == 0:
        raise ConfigError(
            f"objective `{objective.type}` needs random samples, but sampler.temperature is 0 (greedy decoding); set "
            "`sampler.temperature` above 0"
        )
    if objective.needs_pairs != sampler.pairs:
        raise ConfigError(
            f"objective `contrastive` and sampler `pair` work only together, but the recipe has objective `{objective.type}` and sampler "
            f"`{sampler.type}`; change one of them"
        )
    if sampler.on_policy and objective.imitates_text:
        fix = (
            f"set `objective.kd_ratio` to 1 (now {objective.kd_ratio:g})"
            if isinstance(objective, Divergence)
            else "use a divergence, such as `reverse_kl`"
        )
        raise ConfigError(f"sampler `{sampler.type}` trains on the student's own text, so the loss must not contain cross-entropy; {fix}")


def _check_uses_of_teacher(method: Method) -> None:
    objective, signal = method.objective, method.signal
    for key in _without_effect(method):
        if getattr(method, key) is not None:
            raise ConfigError(
                f"objective `{objective.type}` uses no teacher, so `{key}` has no effect; use an objective with a teacher, such as "
                f"`reverse_kl`, or remove `{key}`"
            )
    if signal and not objective.needs_teacher:
        raise ConfigError(
            f"objective `{objective.type}` uses no teacher, so sampler.signal `{signal.type}` has no effect; set `signal: null` in this arm"
        )


def _without_effect(method: Method) -> list[str]:
    # the keys of a teacher that have no effect, because the method uses no teacher for them
    asked = method.objective.needs_teacher
    return [key for key, used in (("dense", asked), ("context", method.uses_teacher), ("ema", asked)) if not used]


def _check_signal(method: Method) -> None:
    objective, signal = method.objective, method.signal
    if method.dense and not isinstance(signal, HiddenSignal | None):
        raise ConfigError(
            f"`dense` averages the teachers' whole distributions, but sampler.signal `{signal.type}` does not record them; use "
            "`signal: {type: hidden}`"
        )
    if isinstance(signal, TopKSignal) and isinstance(objective, TopKForwardKL | TopKReverseKL):
        raise ConfigError(
            f"objective `{objective.type}` selects the teacher's top tokens, but sampler.signal `top_k` already records only these; use "
            f"objective `{objective.type.removeprefix('top_k_')}`"
        )
    tempered = isinstance(objective, Divergence) and objective.temperature != 1
    if isinstance(signal, SampledSignal) and (not isinstance(objective, ForwardKL) or tempered):
        raise ConfigError(
            "sampler.signal `sampled` has an unbiased gradient only for objective `forward_kl` at temperature 1, but the objective "
            f"is `{objective.type}`{' at another temperature' if tempered else ''}; use `objective: {{type: forward_kl, temperature: 1}}`, "
            "or `signal: {type: hidden}`"
        )
    if isinstance(signal, TopKSignal) and signal.tail == "lump" and tempered:
        raise ConfigError("sampler.signal `top_k` with `tail: lump` needs objective.temperature 1; set `temperature: 1`, or `tail: drop`")


def _check_context(method: Method) -> None:
    sampler = method.sampler
    if sampler.guided:
        raise ConfigError(
            f"sampler `{sampler.type}` lets student and teacher sample one text together, but with `context` the teacher reads another "
            f"prompt; {_unguided(method)}, or remove `context`"
        )
    if method.select.metric == "reverse_kl":
        raise ConfigError(
            "select.metric `reverse_kl` compares student and teacher on the student's prompts, but with `context` the teacher reads "
            "prompts of its own; set `select.metric` to `loss` or `rouge_l`"
        )


def _unguided(method: Method) -> str:
    # how to mend a recipe in which the teacher must not take part in sampling
    return "set `sampler.alpha: 0`" if isinstance(method.sampler, TeacherMixedSampler) else "use `sampler: {type: student}`"


def _check_ema(method: Method) -> None:
    objective, sampler = method.objective, method.sampler
    if method.signal:
        raise ConfigError(
            f"sampler.signal `{method.signal.type}` records the teacher's outputs before training, but with `ema` the teacher changes "
            "during training; remove one of the two keys"
        )
    if sampler.teacher_text or sampler.guided:
        raise ConfigError(
            f"sampler `{sampler.type}` uses text of the teacher, but with `ema` the teacher changes during training and writes no text; "
            "use `sampler: {type: student}` or `sampler: {type: dataset}`, or remove `ema`"
        )
    if method.dense:
        raise ConfigError("`dense` has several teachers, but `ema` makes the student its only teacher; remove one of the two keys")
    if method.select.metric == "reverse_kl":
        raise ConfigError(
            "select.metric `reverse_kl` compares the student with its teacher, but with `ema` the teacher follows the student; set "
            "`select.metric` to `loss` or `rouge_l`"
        )
    if isinstance(sampler, Rounds) and method.round_updates > 1 and (objective.needs_scores or sampler.inner_epochs > 1):
        raise ConfigError(
            f"with `ema` the teacher changes after every update, but its outputs are kept for a round of {method.round_updates} updates; "
            "set `sampler.inner_epochs` to 1 and `sampler.rollouts` to `optim.batch`, or remove `ema`"
        )


def _check_engine(method: Method) -> None:
    objective, sampler = method.objective, method.sampler
    if isinstance(sampler, Decoding):
        sampler.check_engine()
    if not (isinstance(sampler, OnPolicy) and sampler.engine == "vllm" and method.samples):
        return
    if sampler.guided:
        raise ConfigError(
            f"sampler `{sampler.type}` needs the teacher's distribution at every token, but engine `vllm` cannot give it; use `engine: "
            "native`"
        )
    if objective.needs_rounds and not sampler.plain:
        raise ConfigError(
            f"objective `{objective.type}` with engine `vllm` needs temperature 1 and no `top_k`, `top_p` or `min_p`; "
            "change these settings, or use `engine: native`"
        )


def over_spans(method: Method) -> Method:
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
        raise ConfigError(
            f"sampler `{sampler.label}` needs one tokenizer for both models, which sample one text together, token by token; "
            f"{_unguided(method)}"
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
    if objective.compares_on_corpus:
        raise ConfigError(
            f"objective.pt_kd_ratio {objective.pt_kd_ratio:g} needs one tokenizer for both models, because the forward KL on plain "
            "text compares single tokens; set `objective.pt_kd_ratio: 0`"
        )
    changes = minillm_over_spans(objective.length_normalisation)
    return method.model_copy(update={"objective": objective.model_copy(update=changes)})


def minillm_over_spans(length_normalisation: str) -> dict[str, Any]:
    """Return the settings of MiniLLM that change between two tokenizers. `length_normalisation` is the recipe's."""
    normalised = "remaining" if length_normalisation == "after" else length_normalisation
    return {"single_step": False, "include_current": True, "length_normalisation": normalised}


def check_one_tokenizer(method: Method) -> None:
    """Check that a method is defined for a student and a teacher with one tokenizer. Raises a ConfigError if it is not."""
    if isinstance(method.objective, Gold):
        raise ConfigError(
            "objective `gold` is for models with different tokenizers, but these models share one tokenizer, for which it is the "
            f"Jensen-Shannon divergence; use `objective: {{type: jensen_shannon, beta: {method.objective.beta:g}}}`"
        )
