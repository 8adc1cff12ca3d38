"""Rounds of sampling and training: sample many sequences from the current student, train on them, then sample again.

If there is a single teacher, it makes one forward pass over each sequence, at one of three times:

    during sampling         if the teacher takes part in sampling; its hidden states and log-probabilities are then stored
    in the training step    if each sequence is used only once, and the loss needs no log-probabilities from the teacher before this step
    after sampling          in all other cases

Logits are never stored.
"""

from collections.abc import Sequence as Seq
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tadistill import rng
from tadistill.config.method import Method
from tadistill.config.sampling import Rounds, SpeculativeSampler, TeacherMixedSampler
from tadistill.data.batch import Batch, Sequence, by_length, collate, taught
from tadistill.data.encoding import Encoded
from tadistill.data.other_tokenizer import Rereader, at_span_ends
from tadistill.data.training_sets import shuffled
from tadistill.models.teachers import HiddenTeacher, InProcess, Teacher, teacher_of
from tadistill.objectives import Hidden
from tadistill.rollout.draw import Guide, Mixture, Speculation, difference
from tadistill.rollout.engine import Engine
from tadistill.rollout.samplers import Mix, Pairs, Replay, Sampler, length, pack, unpack


class Rollouts(Sampler):
    """The sampler that works in rounds. In a round, it samples `rollouts` sequences, and trains on them for `inner_epochs` epochs.

    `Batch.values` contains log-probabilities of the sampled tokens. `student` is computed by the student at the time of sampling, and
    `behaviour` is that of the distribution from which the tokens were sampled. If the objective needs the teacher's log-probabilities, they
    are in `teacher`. With several teachers, the keys are `teacher 0`, `teacher 1` and so on.

    If the teacher has another tokenizer (`again`), `teacher` has one value per span: the log-probability of the whole span, at the
    student's last token of the span. All other tokens have 0. A span is a piece of text between two token boundaries that both tokenizers
    have.
    """

    def __init__(
        self,
        prompts: Seq[Encoded],
        method: Method,
        *,
        engine: Engine,
        teachers: tuple[PreTrainedModel | Teacher, ...],
        vocab: int,
        corpus: Seq[Sequence] = (),
        **common: Any,
    ):
        """
        Args:
            teachers: the original teacher, and then the assistants that also teach the student. Only the original teacher can help to
                sample.
        """
        super().__init__(prompts, method.optim, **common)
        assert isinstance(method.sampler, Rounds)
        self.prompts, self.config, self.engine, self.vocab, self.corpus = prompts, method.sampler, engine, vocab, corpus
        self.teachers = tuple(map(teacher_of, teachers))
        self.scores = method.objective.needs_scores
        """True if the loss needs the teachers' log-probability of every sampled token before the training step."""
        self.states = method.objective.needs_distribution
        """True if the loss needs the teachers' distribution at every token."""
        self.rollouts, self.round_updates = method.round_rollouts, method.round_updates
        self.updates = self.round_updates // self.config.inner_epochs  # per inner epoch
        self.round = -1
        self.sequences: list[Sequence] = []

    def micro_batches(self, step: int) -> list[Batch]:
        """Return the micro-batches of update `step`. The first update of a round samples the sequences of the round."""
        number, inside = divmod(step, self.round_updates)
        if number != self.round:
            self.sequences = []  # frees the memory before the next round is sampled
            self.round, self.sequences = number, self._roll_out(number)
        epoch, part = divmod(inside, self.updates)
        order = rng.generator(self.seed, "inner epoch", number, epoch).permutation(len(self.sequences))
        rows = order[part * self.optim.batch : (part + 1) * self.optim.batch]
        plain = length(self.corpus[0]) if self.corpus else 0  # all rows of the corpus have the same length
        groups = self.cut(lambda place: max(length(self.sequences[rows[place]]), plain))
        return [self._collate(rows[places].tolist(), self._corpus_batch(step, places)) for places in groups]

    def samples(self, step: int) -> bool:
        return step // self.round_updates != self.round

    @property
    def guides(self) -> tuple[PreTrainedModel, ...]:
        if not self.config.guided:
            return ()
        model = self.teachers[0].model
        assert model is not None, "a teacher on a server cannot help to sample; the check of the recipe should have refused this"
        return (model,)

    @property
    def stored(self) -> bool:
        """True if hidden states are stored with sequences: the loss needs the teachers' distributions, and all teachers return states."""
        return self.states and all(isinstance(teacher, HiddenTeacher) for teacher in self.teachers)

    def _collate(self, rows: list[int], corpus: Batch | None) -> Batch:
        sequences = [self.sequences[i] for i in rows]
        return collate(sequences, pad=self.pad, corpus=corpus, targets=self._targets(sequences))

    def _roll_out(self, number: int) -> list[Sequence]:
        rows = self.sets.rows(self.rollouts, number, (self.seed, "prompt order"))
        # sorted by length, so that all processes get prompts of similar length
        mine = np.argsort([len(self.prompts[i].prompt) for i in rows], kind="stable")[self.shard.rank :: self.shard.world].tolist()
        asked = [self.prompts[int(rows[i])] for i in mine]
        prompts = [row.prompt for row in asked]
        uniforms = rng.uniforms(mine, self.config.max_new_tokens, self.seed, "rollout", number)
        out, teachers = self.engine.respond(prompts, uniforms, self._guide()), [self.sets.teacher(int(rows[i])) for i in mine]
        sampled = [
            Sequence(e.prompt, r.tokens, r.values, () if r.hidden is None else (r.hidden,), e.teacher_prompt, teacher=k)
            for e, r, k in zip(asked, out, teachers, strict=True)
        ]
        found = self._with_teacher([*map(self.again, sampled)] if self.again else sampled)
        if self.scores and (self.optim.precision == "bf16" or self.config.engine == "vllm"):
            found = self._as_trained(found)
        return self.shard.gather(list(zip(mine, found, strict=True)))

    def _guide(self) -> Guide | None:
        match self.config:
            case TeacherMixedSampler(guided=True, alpha=alpha):
                return Mixture(self.guides[0], alpha)
            case SpeculativeSampler(k=k):
                return Speculation(self.guides[0], k)
        return None

    def _with_teacher(self, sequences: list[Sequence]) -> list[Sequence]:
        one, stored = len(self.teachers) == 1, self.stored
        ahead = self.scores or (stored and self.config.inner_epochs > 1)  # needed before the training step, or several times
        if sequences and ahead and not (one and sequences[0].states):
            return self._scored(sequences)
        return sequences if stored and one else [replace(s, states=()) for s in sequences]

    def _scored(self, sequences: list[Sequence]) -> list[Sequence]:
        by_teacher, found = taught(sequences), [replace(s, states=()) for s in sequences]
        for k, teacher in enumerate(self.teachers):
            mine = by_teacher.get(k, []) if by_teacher else range(len(sequences))
            name = "teacher" if by_teacher or len(self.teachers) == 1 else f"teacher {k}"
            passes = self._passes([sequences[i].of_teacher for i in mine], teacher, self.again, states=self.stored, scores=self.scores)
            for i, (states, scores) in zip(mine, passes, strict=True):
                s = found[i]
                if scores is not None:
                    s = replace(s, values=s.values | {name: scores.numpy() if s.second is None else at_span_ends(s, scores.numpy())})
                found[i] = s if states is None else replace(s, states=(*s.states, states))
        return found

    def _as_trained(self, sequences: list[Sequence]) -> list[Sequence]:
        # bf16 and vLLM round differently when they sample, so the ratio of the student to the sampled distribution would not start at 1.
        # These log-probabilities come from a pass that rounds as training does. `behaviour` stays as it was sampled if it is not a function
        # of them: after decoding settings such as a temperature, and in speculative sampling.
        guide, found = self._guide(), []
        with torch.autocast(self.engine.student.device.type, torch.bfloat16, enabled=self.optim.precision == "bf16"):
            passes = self._passes(sequences, self._student, states=False, scores=True)
        for s, (_, scores) in zip(sequences, passes, strict=True):
            assert scores is not None
            log_q = behaviour = scores.numpy()
            if isinstance(guide, Mixture):
                parts = np.array([[1 - guide.alpha], [guide.alpha]], np.float32)
                with np.errstate(divide="ignore"):
                    behaviour = np.logaddexp.reduce(np.log(parts) + np.stack([log_q, s.values["teacher"]]))
            if isinstance(guide, Speculation) or not self.config.plain:
                behaviour = s.values["behaviour"]
            found.append(replace(s, values=s.values | {"student": log_q, "behaviour": behaviour}))
        if all("student" in s.values for s in sequences):
            sampled, trained = (torch.from_numpy(np.concatenate([s.values["student"] for s in of])) for of in (sequences, found))
            self.apart = difference(sampled, trained)
        return found

    @cached_property
    def _student(self) -> InProcess:
        return InProcess(self.engine.student)

    @torch.no_grad()
    def _passes(
        self, sequences: list[Sequence], model: Teacher, again: Rereader | None = None, *, states: bool, scores: bool
    ) -> list[tuple[Tensor | None, Tensor | None]]:
        found: dict[int, tuple[Tensor | None, Tensor | None]] = {}
        pad, vocab = (0, again.sizes[1]) if again else (self.pad, self.vocab)
        for rows in by_length(sequences, self.config.chunk):
            batch = collate([sequences[i] for i in rows], pad=pad).to(model.device)
            target, log_p = model.scored(batch, vocab) if scores else (model.target(batch), None)
            lengths = batch.mask_BT.sum(1).tolist()
            kept: Seq[Tensor | None] = [None] * len(rows)
            if states and isinstance(target, Hidden):
                kept = [part.clone() for part in target.states.cpu().split(lengths)]
            scored = [None] * len(rows) if log_p is None else log_p.cpu().split(lengths)
            found |= dict(zip(rows, zip(kept, scored, strict=True), strict=True))
        return [found[i] for i in range(len(sequences))]

    def _targets(self, sequences: list[Sequence]) -> tuple[Hidden, ...]:
        heads = [teacher.head if isinstance(teacher, HiddenTeacher) else None for teacher in self.teachers]
        if by_teacher := taught(sequences):
            states = [tuple(state for i in mine for state in sequences[i].states) for mine in by_teacher.values()]
            heads = [heads[k] for k in by_teacher]
        else:
            states = [*zip(*(s.states for s in sequences), strict=True)]
        return tuple(Hidden(torch.cat(parts), head) for parts, head in zip(states, heads, strict=False) if parts and head)

    def _corpus_batch(self, step: int, places: np.ndarray) -> Batch | None:
        if not self.corpus:
            return None
        rows = shuffled(len(self.corpus), self.optim.batch, step, (self.seed, "corpus order"))
        return collate([self.corpus[i] for i in rows[places]], pad=self.pad)

    def state(self) -> dict[str, Any]:
        return {"round": self.round, "rollouts": pack(self.sequences)}

    def restore(self, state: dict[str, Any]) -> None:
        self.round, self.sequences = state["round"], unpack(state["rollouts"])


def on_policy(
    method: Method,
    texts: Seq[Sequence],
    prompts: Seq[Encoded],
    *,
    teachers: tuple[PreTrainedModel | Teacher, ...],
    vocab: int,
    corpus: Seq[Sequence] = (),
    **common: Any,
) -> Sampler:
    """Return the sampler of an on-policy method. Such a method trains on text that the student samples.

    Args:
        texts: the responses of the data set. For the sampler `pair`, these are the teacher's responses.
        prompts: the prompts for samplers that work in rounds.
        common: the arguments that every sampler takes: engine, pad, seed, shard, sets and again.
    """
    config = method.sampler
    if isinstance(config, Rounds):
        return Rollouts(prompts, method, teachers=teachers, vocab=vocab, corpus=corpus, **common)
    return {"mix": Mix, "replay": Replay, "pair": Pairs}[config.type](texts, config, method.optim, **common)
