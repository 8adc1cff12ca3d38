"""Samplers: where training sequences come from. Each yields, for an optimizer step, the ready micro-batches of this rank.

A sampler owns the on-policy logic (rounds of rollouts, inner epochs), so that the training loop stays blind to the
algorithm. What a rollout knew (log-probabilities per token) rides in `Batch.values`; the objective decides its use.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from accelerate.utils import gather_object
from transformers import PreTrainedModel

from tadistill import rng
from tadistill.config.method import Optim, PairSampler, TeacherMixedSampler
from tadistill.data.batch import Batch, Sequence, collate
from tadistill.data.templates import Encoded
from tadistill.rollout.generate import sample
from tadistill.rollout.signals import Signals


@dataclass(frozen=True)
class Shard:
    """This process among all: rank of world."""

    rank: int = 0
    world: int = 1


class Sampler(Protocol):
    """What the loop needs of a source of batches."""

    def micro_batches(self, step: int) -> list[Batch]:
        """The micro-batches of update `step` for this rank."""
        ...

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold so that the next step is the same."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        ...


def shuffled(rows: int, batch: int, step: int, address: tuple) -> np.ndarray:
    """The row indices of batch `step` when epochs of shuffled rows follow each other without a gap."""
    order: dict[int, np.ndarray] = {}

    def row(position: int) -> int:
        epoch, place = divmod(position, rows)
        if epoch not in order:
            order[epoch] = rng.generator(*address, epoch).permutation(rows)
        return int(order[epoch][place])

    return np.array([row(p) for p in range(step * batch, (step + 1) * batch)])


def cut(optim: Optim, shard: Shard) -> list[np.ndarray]:
    """The places in an update's batch that each micro-batch of this rank takes."""
    mine = np.arange(optim.batch)[shard.rank :: shard.world]
    size = optim.micro_batch or len(mine)
    return [mine[i : i + size] for i in range(0, len(mine), size)]


class FixedSequences:
    """Fixed sequences (the data set's responses or a teacher's), shuffled anew every epoch, with the teacher's signal if recorded."""

    def __init__(
        self, sequences: Seq[Sequence], optim: Optim, *, pad: int, seed: int, signals: Signals | None = None, shard: Shard = Shard()
    ):
        self.sequences, self.optim, self.pad, self.seed, self.signals, self.shard = sequences, optim, pad, seed, signals, shard

    def micro_batches(self, step: int) -> list[Batch]:
        """Rows step * batch … of the endless shuffled stream."""
        rows = shuffled(len(self.sequences), self.optim.batch, step, (self.seed, "data order"))
        return [self._collate(rows[places].tolist()) for places in cut(self.optim, self.shard)]

    def _collate(self, rows: list[int]) -> Batch:
        signal = self.signals.target(rows) if self.signals else None
        return collate([self.sequences[i] for i in rows], pad=self.pad, signal=signal)

    def state(self) -> dict[str, Any]:
        """Nothing: a batch follows from the step."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""


class TeacherMixedRollouts:
    """MiniLLM's rounds: sample `rollouts` sequences with the current student, then train on them for several epochs.

    `Batch.values` holds the log-probabilities behaviour (of the mixture), student (at rollout time) and teacher, all from
    generation itself.
    """

    def __init__(
        self,
        prompts: Seq[Encoded],
        config: TeacherMixedSampler,
        optim: Optim,
        *,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        eos: int,
        pad: int,
        vocab: int,
        seed: int,
        corpus: Seq[Sequence] = (),
        shard: Shard = Shard(),
    ):
        self.prompts, self.config, self.optim, self.student, self.teacher = prompts, config, optim, student, teacher
        self.eos, self.pad, self.vocab, self.seed, self.corpus, self.shard = eos, pad, vocab, seed, corpus, shard
        self.updates = config.rollouts // optim.batch  # per inner epoch
        self.round = -1
        self.sequences: list[Sequence] = []

    def micro_batches(self, step: int) -> list[Batch]:
        """Roll out at the first step of a round; otherwise the next part of the current one."""
        number, inside = divmod(step, self.updates * self.config.inner_epochs)
        if number != self.round:
            self.round, self.sequences = number, self._roll_out(number)
        epoch, part = divmod(inside, self.updates)
        order = rng.generator(self.seed, "inner epoch", number, epoch).permutation(len(self.sequences))
        rows = order[part * self.optim.batch : (part + 1) * self.optim.batch]
        return [
            collate([self.sequences[i] for i in rows[places]], pad=self.pad, corpus=self._corpus_batch(step, places))
            for places in cut(self.optim, self.shard)
        ]

    def _roll_out(self, number: int) -> list[Sequence]:
        rows = shuffled(len(self.prompts), self.config.rollouts, number, (self.seed, "prompt order"))
        uniforms = rng.uniforms(range(len(rows)), self.config.max_new_tokens, self.seed, "rollout", number)
        # neighbours of like length waste least padding; every rank takes every world-th of them
        order = np.argsort([len(self.prompts[i].prompt) for i in rows], kind="stable")[self.shard.rank :: self.shard.world]
        found = []
        size = self.optim.micro_batch * 4 if self.optim.micro_batch else len(order)
        for start in range(0, len(order), size):
            part = order[start : start + size]
            prompts = [self.prompts[int(rows[i])].prompt for i in part]
            out = sample(
                self.student, prompts, uniforms[part], eos=self.eos, vocab=self.vocab, teacher=self.teacher, alpha=self.config.alpha
            )
            found += [(int(i), Sequence(p, r.tokens, r.values)) for i, p, r in zip(part, prompts, out, strict=True)]
        if self.shard.world > 1:
            found = gather_object(found)
        return [s for _, s in sorted(found, key=lambda item: item[0])]

    def _corpus_batch(self, step: int, places: np.ndarray) -> Batch | None:
        """As many rows of plain text as the micro-batch has sequences."""
        if not self.corpus:
            return None
        rows = shuffled(len(self.corpus), self.optim.batch, step, (self.seed, "corpus order"))
        return collate([self.corpus[i] for i in rows[places]], pad=self.pad)

    def state(self) -> dict[str, Any]:
        """The round and its rollouts, as plain tensors."""
        rollouts = [
            {"prompt": s.prompt, "response": s.response, "values": {k: torch.from_numpy(v) for k, v in s.values.items()}}
            for s in self.sequences
        ]
        return {"round": self.round, "rollouts": rollouts}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue inside the stored round."""
        self.round = state["round"]
        self.sequences = [
            Sequence(tuple(r["prompt"]), tuple(r["response"]), {k: v.numpy() for k, v in r["values"].items()}) for r in state["rollouts"]
        ]


class Pairs:
    """DistiLLM-2's data: for each prompt the teacher's stored response and a fresh one of the student as it is now.

    `Batch.values` holds from_teacher, 1 on the teacher's responses and 0 on the student's. A micro-batch of n prompts has 2n sequences.
    """

    def __init__(
        self,
        responses: Seq[Sequence],
        config: PairSampler,
        optim: Optim,
        *,
        student: PreTrainedModel,
        eos: int,
        pad: int,
        vocab: int,
        seed: int,
        shard: Shard = Shard(),
    ):
        self.responses, self.config, self.optim, self.student = responses, config, optim, student
        self.eos, self.pad, self.vocab, self.seed, self.shard = eos, pad, vocab, seed, shard

    def micro_batches(self, step: int) -> list[Batch]:
        """Sample for this rank's prompts of the update, and pair."""
        rows = shuffled(len(self.responses), self.optim.batch, step, (self.seed, "data order"))
        return [
            self._pair(
                [self.responses[i] for i in rows[places]],
                rng.uniforms(places.tolist(), self.config.max_new_tokens, self.seed, "pair", step),
            )
            for places in cut(self.optim, self.shard)
        ]

    def _pair(self, of_teacher: list[Sequence], uniforms: np.ndarray) -> Batch:
        settings = {"eos": self.eos, "vocab": self.vocab, "temperature": self.config.temperature, "top_p": self.config.top_p}
        sampled = sample(self.student, [s.prompt for s in of_teacher], uniforms, **settings)
        of_student = [Sequence(s.prompt, r.tokens) for s, r in zip(of_teacher, sampled, strict=True)]
        tagged = [_tagged(s, 1.0) for s in of_teacher] + [_tagged(s, 0.0) for s in of_student]
        return collate(tagged, pad=self.pad)

    def state(self) -> dict[str, Any]:
        """Nothing: a batch follows from the step and the student."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""


def _tagged(sequence: Sequence, from_teacher: float) -> Sequence:
    return Sequence(sequence.prompt, sequence.response, {"from_teacher": np.full(len(sequence.response), from_teacher, np.float32)})
