"""The loss of each method. It is a sum of terms, which `objectives.fused_loss` computes without storing all logits.

`make_step` turns the configuration of a method into a `Step`, which the training loop calls. The objective becomes a function that returns
the terms of a batch. A `TeacherTerm` is a divergence from the teacher. A `TokenTerm` is a function of the tokens' log-probabilities.
`tadistill.objectives` has the formulas.

Axes: B sequences, T positions, N tokens of the loss, H hidden.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tadistill import objectives, rng
from tadistill.config import objective as config
from tadistill.config.method import Method
from tadistill.config.sampling import Rounds
from tadistill.data.batch import Batch
from tadistill.data.other_tokenizer import Rereader
from tadistill.models.forward import Reader
from tadistill.models.teachers import MovingAverage, Teacher, teacher_of
from tadistill.objectives import TaidSchedule, TargetMixture
from tadistill.objectives.fused_loss import Term, fused_parts, part_of
from tadistill.objectives.sampled import TokenTerm
from tadistill.objectives.targets import Target, TeacherTerm
from tadistill.train import spans


@dataclass(frozen=True)
class Loss:
    """The loss of a micro-batch. `total` is the sum of its terms, for the backward pass. `parts` has each term's value by name."""

    total: Tensor
    parts: dict[str, Tensor]


class Models:
    """A student and its teachers. `loss` runs them on a batch and returns its loss."""

    def __init__(self, student: PreTrainedModel, teachers: tuple[PreTrainedModel | Teacher, ...], vocab: int | Rereader):
        """`vocab` is as in `make_step`."""
        self.student_model, self.teachers, self.student = student, tuple(map(teacher_of, teachers)), Reader(student)
        self.again = None if isinstance(vocab, int) else vocab
        self.vocab = vocab if isinstance(vocab, int) else vocab.sizes[0]

    @property
    def here(self) -> tuple[PreTrainedModel, ...]:
        """The student, and the teachers whose weights are in this process."""
        return (self.student_model, *(teacher.model for teacher in self.teachers if teacher.model is not None))

    def targets(self, batch: Batch) -> tuple[Target, ...]:
        """Return the teachers' outputs for the batch's response tokens. Teachers that the batch leaves out (`Batch.mixture`) are skipped.

        If the batch contains outputs, for example recorded ones, they are returned. If not, the teachers compute them.
        """
        kept = batch.mixture.kept()[0] if batch.mixture else [0]
        if batch.route:  # all rows of such a batch have the same teacher (`Batch.of_share`)
            return batch.targets or (self.teachers[batch.route[0]].target(batch.of_teacher),)
        if batch.targets:
            return tuple(batch.targets[k] for k in kept)
        return tuple(self.teachers[k].target(batch.of_teacher) for k in kept)

    def loss(self, model: nn.Module, batch: Batch, terms: Callable[[Batch], Sequence[Term]], per: float, per_span: float = 1.0) -> Loss:
        """Return the loss of a batch: the sum of each term over the response tokens, divided by the number `per`.

        If the teacher has another tokenizer, terms with the teacher are summed over spans (texts between common token boundaries) and
        divided by `per_span`. If each training set has its own teacher, each teacher processes only the rows of its sets.

        Args:
            model: the student or a wrapper around it. It makes one forward pass over the batch.
            terms: a function that returns the terms of a batch.
        """
        read = [batch.of_share(i) for i in range(len(batch.shares))] or [batch]
        each = list[tuple[Sequence[Term], tuple[Target, ...]]]()
        for part in read:
            own = terms(part)
            needs_teacher = any(isinstance(term, TeacherTerm) for term in own)
            each.append((own, self.targets(part) if needs_teacher else ()))
        hidden = self.student.hidden(model, batch)
        if batch.aligned is None:
            return self._over_tokens(hidden, batch, each, per)
        assert self.again is not None, "the batch has spans, so `vocab` of `make_step` must be a `Rereader`"
        ((own, teachers),) = each
        of_tokens = [term for term in own if not isinstance(term, TeacherTerm)]
        found = self._over_tokens(hidden, batch, [(of_tokens, ())], per) if of_tokens else Loss(hidden.new_zeros(()), {})
        for term in own:
            if isinstance(term, TeacherTerm):
                more = spans.divergence(spans.Sides(hidden, self.student.head, teachers[0], self.again), batch, term, per_span)
                found = Loss(found.total + more, {term.name: more.detach(), **found.parts})
        return found

    def _over_tokens(self, hidden: Tensor, batch: Batch, each: Sequence[tuple[Sequence[Term], Sequence[Target]]], per: float) -> Loss:
        # the sum of the terms over the tokens of the loss; `each` has the terms and the teachers' outputs of each share of the batch
        rows = [torch.tensor([[t.weight / per] for t in own], dtype=torch.float32) for own, _ in each]
        weights = [row.to(hidden.device, non_blocking=True) for row in rows]
        states = [hidden.index_select(0, share.loss) for share in batch.shares] or [hidden]
        parts = [part_of(own, z, w, teachers=teachers) for (own, teachers), z, w in zip(each, states, weights, strict=True)]
        total, found = fused_parts(parts, self.student.head, vocab=self.vocab)
        sums = dict[str, Tensor]()
        for (own, _), values, w in zip(each, found, weights, strict=True):
            for term, value in zip(own, (values * w.to(values.dtype)).sum(1), strict=True):
                sums[term.name] = sums[term.name] + value if term.name in sums else value
        return Loss(total, sums)


Sum = Callable[[Tensor], Tensor]
"""A function that adds up a tensor over all processes."""
Phase = Callable[[str], AbstractContextManager]
"""A function that returns a context manager, inside which forward passes count for the given phase (`train.monitoring.Meter.phase`)."""


@dataclass(frozen=True)
class Step:
    """The loss of one method, in the form that the training loop needs."""

    models: Models
    terms: Callable[[Batch], Sequence[Term]]
    """Returns the loss terms of a batch's response tokens."""
    corpus_terms: Callable[[Batch], Sequence[Term]] = lambda corpus: ()
    """Returns the loss terms of the pre-training text in a batch (`Batch.corpus`)."""
    advantages: Callable[[list[Batch], Sum], list[Batch]] = lambda batches, total: batches
    """Adds MiniLLM's advantages to the batches of an update. The advantages depend on all batches together."""
    mixture: TargetMixture | None = None
    """The mixture that combines several teachers into one target; None for a single teacher."""
    seed: int = 0
    """The random seed that decides which teachers an update leaves out."""
    schedule: TaidSchedule | None = None
    """TAID's state, which changes once per update and is saved with the training state."""
    average: MovingAverage | None = None
    """The teacher that is a moving average of the student. It changes after every update."""
    phase: Phase = nullcontext
    clip: float | None = None
    """Half the width of the interval [1 - clip, 1 + clip] to which the objective clips a probability ratio. None if it does not clip."""
    clipped_over: str = "behaviour"
    """The denominator of this ratio: the name of its log-probabilities in `Batch.values`. The numerator is the student's probability."""

    def prepare(self, batches: list[Batch], done: int, total: Sum) -> list[Batch]:
        """Return the update's micro-batches of this process, with all values that the loss needs.

        `done` is the number of earlier updates. `total` is a function that sums a tensor over all processes.
        """
        if self.mixture is not None:
            drop = self.mixture.drop > 0
            mixture = self.mixture.drawn(rng.generator(self.seed, "teachers left out", done)) if drop else self.mixture
            batches = [_mixed(batch, mixture) for batch in batches]
        return self.advantages(batches, total)

    def loss(self, student: nn.Module, batch: Batch, per: Mapping[str, float]) -> Loss:
        """Return the micro-batch's loss.

        Args:
            student: the student or a wrapper around it.
            per: the divisors of sums: `response` for response tokens, `corpus` for tokens of pre-training text, and `spans` for spans.
        """
        found = self.models.loss(student, batch, self.terms, per["response"], per.get("spans", 1.0))
        if batch.corpus is None:
            return found
        # The pre-training text has its own forward pass. In one pass with the rollouts, the shorter text would be padded, and both graphs
        # would be in memory at once.
        with self.phase("corpus"):
            plain = self.models.loss(student, batch.corpus, self.corpus_terms, per["corpus"])
        return Loss(found.total + plain.total, found.parts | plain.parts)


def mixture_of(batch: Batch) -> TargetMixture | None:
    """Return the mixture of the teachers that a batch uses. Return None if the batch has a single teacher."""
    return batch.mixture.kept()[1] if batch.mixture else None


def counts(batches: list[Batch]) -> dict[str, int]:
    """Count this process's loss tokens. The key `response` counts response tokens, and `corpus` counts tokens of pre-training text.

    If the teacher has another tokenizer, the result also has the counts of `Aligned.found`, such as `spans`.
    """
    corpora = [b.corpus for b in batches if b.corpus]
    found = {"response": sum(len(b.places.loss) for b in batches), "corpus": sum(len(c.places.loss) for c in corpora)}
    return found | spans.counts([b.aligned for b in batches if b.aligned])


def _mixed(batch: Batch, mixture: TargetMixture) -> Batch:
    scores = [batch.values[name] for k in range(len(mixture.weights)) if (name := f"teacher {k}") in batch.values]
    values = batch.values | ({"teacher": mixture.token_scores(scores)} if scores else {})
    return replace(batch, values=values, mixture=mixture, corpus=_mixed(batch.corpus, mixture) if batch.corpus else None)


# --- from an objective's configuration to its terms ---------------------------------------------------------------------


def make_step(
    method: Method,
    student: PreTrainedModel,
    teachers: tuple[PreTrainedModel | Teacher, ...],
    vocab: int | Rereader,
    *,
    seed: int = 0,
    own: Callable[..., Tensor] | None = None,
    recorded: int = 0,
) -> Step:
    """Return the `Step` of a method, which computes the loss of a batch for the training loop.

    Args:
        teachers: the teachers that run in training, the original one first. Empty if the objective uses no teacher, or if the batches
            already contain the teacher's outputs.
        vocab: the number of tokens of the vocabulary. If student and teacher have different tokenizers, the `Rereader` with their
            vocabularies.
        seed: the random seed that decides which teachers an update leaves out.
        own: the user's function, for the objective `custom`.
        recorded: the number of teachers whose recorded outputs the batches contain.
    """
    models, count = Models(student, teachers, vocab), recorded or len(teachers)
    step = _step(method, models, own)
    if method.dense is None or count < 2:
        return step
    mixture = TargetMixture(method.dense.kind, method.dense.weights or (1.0,) * count, method.dense.drop)
    return replace(step, mixture=mixture, seed=seed)


def _step(method: Method, models: Models, own: Callable[..., Tensor] | None) -> Step:
    match objective := method.objective:
        case config.CrossEntropy():
            return Step(models, lambda batch: [_likelihood(batch)])
        case config.SampledKL():
            return Step(models, partial(_sampled_kl, objective))
        case config.NoTeacher():
            settings = {"below": objective.below}
            return Step(
                models,
                lambda batch: [TokenTerm(objective.type, objectives.no_teacher, batch.counted(batch.targets_BT), settings=settings)],
            )
        case config.MiniLLM():
            assert isinstance(method.sampler, Rounds)
            advantages = partial(_advantages, objective, method.sampler.max_new_tokens)
            over = "behaviour" if objective.clip_weight else "student"
            terms = partial(_minillm, objective), partial(_corpus, objective)
            return Step(models, *terms, advantages, clip=objective.clip, clipped_over=over)
        case config.Taid():
            schedule = TaidSchedule(start=objective.start, end=objective.end, rate=objective.rate, decay=objective.decay)
            return Step(models, lambda batch: _towards_teacher(objective, batch, objectives.taid, {"t": schedule.t}), schedule=schedule)
        case config.Contrastive():
            return Step(models, partial(_contrastive, objective))
        case config.Custom():
            assert own is not None
            function = own_divergence(own)
            return Step(models, lambda batch: _towards_teacher(objective, batch, function, objective.settings))
        case _:
            function = getattr(objectives, _FUNCTIONS.get(objective.type, objective.type))
            settings = objective.model_dump(exclude={"type", "kd_ratio", "temperature"})
            return Step(models, lambda batch: _towards_teacher(objective, batch, function, settings))


_FUNCTIONS: dict[str, str] = {"uld": "sorted_distance", "gold": "hybrid_distance"}
"""The functions of `tadistill.objectives` whose names differ from the names of their objectives in recipes."""


def own_divergence(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wrap a user's own objective so that it also takes the argument `temperature`, like all functions of `tadistill.objectives`."""

    def divergence(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0, **settings: Any) -> Tensor:
        if temperature != 1.0:
            student_logits, teacher_logits = student_logits / temperature, teacher_logits / temperature
        return function(student_logits, teacher_logits, **settings)

    return divergence


def _contrastive(objective: config.Contrastive, batch: Batch) -> list[Term]:
    from_teacher = batch.counted(batch.values["from_teacher"]) > 0
    return _towards_teacher(objective, batch, objectives.contrastive, {"alpha": objective.alpha}, from_teacher=from_teacher)


def _towards_teacher(
    objective: config.Divergence, batch: Batch, divergence: Callable[..., Tensor], settings: Mapping[str, Any], **per_token: Tensor
) -> list[Term]:
    share = objective.kd_ratio
    term = TeacherTerm(objective.type, divergence, per_token, settings, mixture_of(batch), objective.temperature, share)  # type: ignore[attr-defined]
    return [term, _likelihood(batch, 1 - share)] if share < 1 else [term]


def _sampled_kl(objective: config.SampledKL, batch: Batch) -> list[Term]:
    estimate = {"k2": objectives.k2, "k3": objectives.k3}[objective.estimator]
    scores = {"teacher_log_probs": batch.counted(batch.values["teacher"])}
    return [TokenTerm(objective.type, estimate, batch.counted(batch.targets_BT), scores)]


def _likelihood(batch: Batch, weight: float = 1.0, name: str = "cross_entropy") -> Term:
    return TokenTerm(name, torch.neg, batch.counted(batch.targets_BT), weight=weight)


# --- MiniLLM: the formulas are in tadistill.objectives.minillm ----------------------------------------------------------


def _advantages(objective: config.MiniLLM, max_new_tokens: int, batches: list[Batch], total: Sum) -> list[Batch]:
    # the advantage of a token is the return of the scaled rewards; `whitening` normalises it over the whole update
    scaled = partial(_scaled, objective)
    if batches[0].aligned is None:
        rewards = [scaled(batch.values["teacher"] - batch.values["student"]) for batch in batches]
    else:
        rewards = spans.rewards(batches, scaled, total)
    settings = objective.model_dump(include={"discount", "include_current", "length_normalisation"})
    found = [objectives.returns(r, b.mask_BT, **settings) for r, b in zip(rewards, batches, strict=True)]
    if objective.whitening != "none":
        rows, tokens = sum(len(b.ids_BT) for b in batches), sum(int(b.mask_BT.sum()) for b in batches)
        here = sum(objectives.moments(a, b.mask_BT) for a, b in zip(found, batches, strict=True))
        places = rows * max_new_tokens if objective.whitening == "padded" else tokens
        *sums, count = total(torch.cat([torch.as_tensor(here), torch.tensor([float(places)]).double()])).unbind()
        found = [objectives.whiten(a, torch.stack(sums), float(count)) for a in found]
    return [replace(b, values=b.values | {"advantage": a}) for a, b in zip(found, batches, strict=True)]


def _scaled(objective: config.MiniLLM, rewards: Tensor) -> Tensor:
    rewards = rewards / objective.reward_scale
    return rewards if objective.reward_clip is None else rewards.clamp(-objective.reward_clip, objective.reward_clip)


def _minillm(objective: config.MiniLLM, batch: Batch) -> list[Term]:
    clip, tokens = {"clip": objective.clip}, batch.counted(batch.targets_BT)
    behaviour, advantage = batch.counted(batch.values["behaviour"]), batch.counted(batch.values["advantage"])
    if objective.clip_weight:
        ratio = {"log_behaviour": behaviour}
    else:  # only q / q_old is clipped; the factor q_old / p~ is a weight of the same terms
        old = batch.counted(batch.values["student"])
        ratio = {"log_behaviour": old, "weight": (old - behaviour).exp()}
    policy = TokenTerm(
        "policy", objectives.policy_gradient, tokens, {"advantage": advantage, **ratio}, {"clipping": objective.clipping, **clip}
    )
    if not objective.single_step:
        return [policy]
    if objective.single_step_weight:
        single = TeacherTerm("single_step", objectives.single_step, {"tokens": tokens, **ratio}, clip, mixture_of(batch))
    else:
        single = TeacherTerm("single_step", objectives.reverse_kl, mixture=mixture_of(batch))
    return [policy, single]


def _corpus(objective: config.MiniLLM, corpus: Batch) -> list[Term]:
    share, weight = objective.pt_kd_ratio, objective.pt_weight
    language = [_likelihood(corpus, weight * (1 - share), "corpus")] if share < 1 else []
    towards = [TeacherTerm("corpus_kl", objectives.forward_kl, mixture=mixture_of(corpus), weight=weight * share)] if share > 0 else []
    return [*language, *towards]
