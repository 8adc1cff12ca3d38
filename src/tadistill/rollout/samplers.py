"""Samplers: where training sequences come from. Each returns, for an optimizer step, the micro-batches of this process.

A sampler has the on-policy logic, so the training loop is independent of the algorithm. Numbers from sampling (log-probabilities per token)
are in `Batch.values`, and the objective decides what to do with them. Rounds of rollouts are in `tadistill.rollout.rounds`.
"""

from collections import deque
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object

from tadistill import rng
from tadistill.config.method import Optim
from tadistill.config.sampling import MixSampler, PairSampler, ReplaySampler
from tadistill.data.batch import Batch, Sequence, collate
from tadistill.rollout.engine import Engine
from tadistill.rollout.signals import Signals


@dataclass(frozen=True)
class Shard:
    """The rank of this process among `world` processes."""

    rank: int = 0
    world: int = 1

    def gather(self, found: list[tuple[int, Sequence]]) -> list[Sequence]:
        """Return the sequences of all processes, in the order of their numbers."""
        every = gather_object(found) if self.world > 1 else found
        return [s for _, s in sorted(every, key=lambda item: item[0])]


class Sampler:
    """A source of batches, as the training loop uses it."""

    @property
    def wants_dev(self) -> bool:
        """True if `observe` needs the dev metrics of the untrained student."""
        return False

    def micro_batches(self, step: int) -> list[Batch]:
        """Return the micro-batches of update `step` for this process."""
        raise NotImplementedError

    def samples(self, step: int) -> bool:
        """Return True if the micro-batches of update `step` may need forward passes of the student; equal on all processes."""
        return False

    def observe(self, dev: Mapping[str, float]) -> None:
        """Take in dev metrics; called after each evaluation."""

    def metrics(self) -> dict[str, float]:
        """Return the sampler's own numbers for the log."""
        return {}

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold; nothing if a batch depends on the step and the student only."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a `state`."""


def shuffled(rows: int, batch: int, step: int, address: tuple) -> np.ndarray:
    """Return the row indices of batch `step` when epochs of shuffled rows follow each other without a gap."""
    order: dict[int, np.ndarray] = {}

    def row(position: int) -> int:
        epoch, place = divmod(position, rows)
        if epoch not in order:
            order[epoch] = rng.generator(*address, epoch).permutation(rows)
        return int(order[epoch][place])

    return np.array([row(p) for p in range(step * batch, (step + 1) * batch)])


def cut(optim: Optim, shard: Shard) -> list[np.ndarray]:
    """Return the places in an update's batch that each micro-batch of this process takes."""
    mine = np.arange(optim.batch)[shard.rank :: shard.world]
    size = optim.micro_batch or len(mine)
    return [mine[i : i + size] for i in range(0, len(mine), size)]


def respond(engine: Engine, prompts: Seq[tuple[int, ...]], places: Seq[int], *address: int | str) -> list[Sequence]:
    """Return the current student's answers; a place in the update and the address give the random numbers, on any process."""
    uniforms = rng.uniforms([int(p) for p in places], engine.decoding.max_new_tokens, *address)
    return [Sequence(p, r.tokens, r.values) for p, r in zip(prompts, engine.respond(prompts, uniforms), strict=True)]


def pack(sequences: Seq[Sequence]) -> list[dict[str, Any]]:
    """Return the sequences as plain tensors, for a checkpoint."""
    return [
        {"prompt": s.prompt, "response": s.response, "states": s.states, "values": {k: torch.from_numpy(v) for k, v in s.values.items()}}
        for s in sequences
    ]


def unpack(stored: list[dict[str, Any]]) -> list[Sequence]:
    """Return the sequences of `pack`."""

    def values(s: dict[str, Any]) -> dict[str, np.ndarray]:
        return {name: tensor.numpy() for name, tensor in s["values"].items()}

    return [Sequence(tuple(s["prompt"]), tuple(s["response"]), values(s), tuple(s["states"])) for s in stored]


class FixedSequences(Sampler):
    """Fixed sequences (responses of the data set or of a teacher), shuffled anew every epoch, with the teacher's signal if recorded."""

    def __init__(
        self, sequences: Seq[Sequence], optim: Optim, *, pad: int, seed: int, signals: Signals | None = None, shard: Shard = Shard()
    ):
        self.sequences, self.optim, self.pad, self.seed, self.signals, self.shard = sequences, optim, pad, seed, signals, shard

    def rows(self, step: int) -> list[int]:
        """Return the rows of update `step`, from place step * batch of the endless shuffled stream."""
        return shuffled(len(self.sequences), self.optim.batch, step, (self.seed, "data order")).tolist()

    def micro_batches(self, step: int) -> list[Batch]:
        """Return the update's rows in micro-batches."""
        rows = self.rows(step)
        return [self._collate([rows[p] for p in places]) for places in cut(self.optim, self.shard)]

    def _collate(self, rows: list[int]) -> Batch:
        targets = (self.signals.target(rows),) if self.signals else ()
        return collate([self.sequences[i] for i in rows], pad=self.pad, targets=targets)


class _WithStudent(Sampler):
    """Base of samplers in which the student answers the prompts of the update's rows; `fixed` has the rows' own responses."""

    def __init__(self, sequences: Seq[Sequence], optim: Optim, *, engine: Engine, pad: int, seed: int, shard: Shard = Shard()):
        self.fixed = FixedSequences(sequences, optim, pad=pad, seed=seed, shard=shard)
        self.sequences, self.optim, self.engine, self.pad, self.seed, self.shard = sequences, optim, engine, pad, seed, shard

    def samples(self, step: int) -> bool:
        """Return True, although some updates may need none."""
        return True

    def fresh(self, step: int) -> dict[int, Sequence]:
        """Return the student's answers to this process's share of the prompts, by place in the update."""
        rows, mine = self.fixed.rows(step), np.concatenate(cut(self.optim, self.shard)).tolist()
        prompts = [self.sequences[rows[place]].prompt for place in mine]
        return dict(zip(mine, respond(self.engine, prompts, mine, self.seed, "rollout", step), strict=True))

    def collated(self, by_place: Mapping[int, Sequence] | Seq[Sequence]) -> list[Batch]:
        """Return micro-batches of the sequences, which are given for every place of this process."""
        return [collate([by_place[int(p)] for p in places], pad=self.pad) for places in cut(self.optim, self.shard)]

    def draw(self, step: int) -> float:
        """Return the update's uniform, which is equal on all processes."""
        return rng.generator(self.seed, "source", step).random()


class Mix(_WithStudent):
    """GKD's lambda: with this probability the whole update is text of the student, else the rows' own responses."""

    def __init__(self, sequences: Seq[Sequence], config: MixSampler, optim: Optim, **common: Any):
        super().__init__(sequences, optim, **common)
        self.config = config

    def micro_batches(self, step: int) -> list[Batch]:
        """Return the update's batches; one draw decides for all of them."""
        return self.collated(self.fresh(step)) if self.draw(step) < self.config.lam else self.fixed.micro_batches(step)


class Replay(_WithStudent):
    """DistiLLM's adaptive off-policy buffer, described in `ReplaySampler`. All processes hold the whole buffer."""

    def __init__(self, sequences: Seq[Sequence], config: ReplaySampler, optim: Optim, **common: Any):
        super().__init__(sequences, optim, **common)
        self.config = config
        self.phi = 0.0
        self.mark: float | None = None
        """The dev loss that the next ones are compared with."""
        self.buffer: deque[Sequence] = deque(maxlen=config.capacity)

    @property
    def wants_dev(self) -> bool:
        """True until the first mark is set, which is the loss before training."""
        return self.mark is None

    def micro_batches(self, step: int) -> list[Batch]:
        """Return fresh text, text from the buffer, or the rows' own responses."""
        u = self.draw(step)
        if u < self._share_of_fresh(step) or (u < self.phi and len(self.buffer) < self.config.capacity):
            found = self.shard.gather(list(self.fresh(step).items()))
            self.buffer.extend(found)
            return self.collated(found)
        if u < self.phi:
            picked = rng.generator(self.seed, "replay", step).choice(len(self.buffer), self.optim.batch, replace=False)
            return self.collated([self.buffer[i] for i in picked.tolist()])
        return self.fixed.micro_batches(step)

    def _share_of_fresh(self, step: int) -> float:
        assert self.optim.steps is not None
        done = step / self.optim.steps
        return self.phi * {"decreasing": 1 - done, "constant": 0.5, "increasing": done}[self.config.schedule]

    def observe(self, dev: Mapping[str, float]) -> None:
        """Raise phi and the mark if the loss is above the mark; a lower loss changes nothing (as in the authors' code)."""
        if self.mark is None:
            self.mark = dev["loss"]
        elif dev["loss"] >= self.mark + self.config.tolerance:
            self.phi, self.mark = min(self.phi + self.config.increment, 1.0), dev["loss"]

    def metrics(self) -> dict[str, float]:
        """Return phi, and the number of sequences in the buffer."""
        return {"replay/phi": self.phi, "replay/buffer": len(self.buffer)}

    def state(self) -> dict[str, Any]:
        """Return phi, the mark and the buffer."""
        return {"phi": self.phi, "mark": self.mark, "buffer": pack(self.buffer)}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a `state`."""
        self.phi, self.mark = state["phi"], state["mark"]
        self.buffer = deque(unpack(state["buffer"]), maxlen=self.config.capacity)


class Pairs(_WithStudent):
    """DistiLLM-2's data: for each prompt the teacher's stored response and a fresh response of the current student.

    `Batch.values["from_teacher"]` is 1 on the teacher's responses and 0 on the student's. A micro-batch of n prompts has 2n sequences.
    """

    def __init__(self, responses: Seq[Sequence], config: PairSampler, optim: Optim, **common: Any):
        super().__init__(responses, optim, **common)
        self.config = config

    def micro_batches(self, step: int) -> list[Batch]:
        """Sample answers to this process's prompts of the update, and return the pairs."""
        rows, fresh = self.fixed.rows(step), self.fresh(step)
        return [
            collate([_tagged(self.sequences[rows[p]], 1.0) for p in places] + [_tagged(fresh[int(p)], 0.0) for p in places], pad=self.pad)
            for places in cut(self.optim, self.shard)
        ]


def _tagged(sequence: Sequence, from_teacher: float) -> Sequence:
    return Sequence(sequence.prompt, sequence.response, {"from_teacher": np.full(len(sequence.response), from_teacher, np.float32)})
