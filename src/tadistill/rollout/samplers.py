"""Samplers make the training batches. For each optimizer update, a sampler returns the micro-batches of this process.

If the method trains on the student's own text, the sampler also generates this text. The tokens' log-probabilities during sampling are then
in `Batch.values`, because some objectives need them. Samplers that work in rounds are in `tadistill.rollout.rounds`.
"""

from collections import deque
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import PreTrainedModel

from tadistill import rng
from tadistill.config.method_parts import Optim
from tadistill.config.sampling import MixSampler, OnPolicy, PairSampler, ReplaySampler
from tadistill.data.batch import Batch, Sequence, collate, taught
from tadistill.data.other_tokenizer import Rereader, SecondReading
from tadistill.data.training_sets import TrainingSets
from tadistill.objectives import Hidden, Sampled, TopK
from tadistill.rollout.engine import Engine
from tadistill.rollout.recorded_signals import Signals

T = TypeVar("T")
Config = TypeVar("Config", bound=OnPolicy)


@dataclass(frozen=True)
class Shard:
    """The rank of this process, and the number of processes (`world`). Sequences are divided among the processes."""

    rank: int = 0
    world: int = 1

    def gather(self, found: list[tuple[int, T]]) -> list[T]:
        """Collect (number, value) pairs from all processes. Return all values, sorted by their numbers."""
        every = gather_object(found) if self.world > 1 else found
        return [s for _, s in sorted(every, key=lambda item: item[0])]

    def even(self, groups: list[np.ndarray]) -> list[np.ndarray]:
        """Divide this process's largest groups of sequences until all processes have the same number of groups. Return the groups."""
        most = max(gather_object([len(groups)])) if self.world > 1 else len(groups)
        while len(groups) < most:
            largest = max(range(len(groups)), key=lambda i: len(groups[i]))
            groups[largest : largest + 1] = np.array_split(groups[largest], 2)
        return groups


class Sampler:
    """Base class of the samplers, which make the batches of the training loop."""

    mixes = False
    """True if an update can have text of earlier students."""
    apart: float | None = None
    """The `difference` of new text's log-probabilities between sampling and training. None if the sampler does not compute both."""

    def __init__(
        self,
        rows: Seq[Any],
        optim: Optim,
        *,
        pad: int,
        seed: int,
        shard: Shard = Shard(),
        again: Rereader | None = None,
        sets: TrainingSets | None = None,
    ):
        """
        Args:
            rows: the rows of all training sets, one set after the other.
            again: tokenises the responses for a teacher with another tokenizer.
            sets: the training sets. The default is one set.
        """
        self.optim, self.pad, self.seed, self.shard, self.again = optim, pad, seed, shard, again
        self.sets = sets or TrainingSets((len(rows),))
        self.mine = np.arange(optim.batch)[shard.rank :: shard.world]
        """The positions in an update's batch that this process works on."""

    @property
    def wants_dev(self) -> bool:
        """True if the sampler needs dev metrics before the first update. The training loop then calls `observe` with them."""
        return False

    @property
    def guides(self) -> tuple[PreTrainedModel, ...]:
        """Return the teachers that help to sample."""
        return ()

    def micro_batches(self, step: int) -> list[Batch]:
        """Return this process's micro-batches of update `step`, which is counted from 0."""
        raise NotImplementedError

    def samples(self, step: int) -> bool:
        """Return True if update `step` may need text sampled from the student. All processes return the same value."""
        return False

    def observe(self, dev: Mapping[str, float]) -> None:
        """Adapt the sampler to new dev metrics. The training loop calls this after each dev evaluation."""

    def metrics(self) -> dict[str, float]:
        """Return numbers that the sampler adds to the training log."""
        return {}

    def state(self) -> dict[str, Any]:
        """Return the state to save in a checkpoint. It is empty if the batches depend only on the step and the student."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a saved `state`."""

    def cut(self, tokens: Callable[[int], int]) -> list[np.ndarray]:
        """Divide an update's batch into micro-batches. Return, for each micro-batch of this process, the positions (n,) in the whole batch.

        Args:
            tokens: returns the number of tokens of the sequence at a position. It is called only for positions of this process, and only if
                `optim.tokens` limits the number of tokens of a micro-batch.
        """
        mine, optim = self.mine, self.optim
        if optim.tokens:
            return self.shard.even(_within(optim.tokens, mine, [tokens(int(place)) for place in mine], packed=optim.packed))
        size = optim.micro_batch or len(mine)
        return [mine[i : i + size] for i in range(0, len(mine), size)]


def _within(most: int, mine: np.ndarray, sizes: list[int], *, packed: bool) -> list[np.ndarray]:
    # the order of the rows stays, so that every micro-batch is a random sample of them; a row above `most` is alone
    starts, widest, total = [0], 0, 0
    for i, size in enumerate(sizes):
        widest, total = max(widest, size), total + size
        if i > starts[-1] and (total if packed else widest * (i + 1 - starts[-1])) > most:
            starts.append(i)
            widest = total = size
    return np.split(mine, starts[1:])


def length(sequence: Sequence) -> int:
    """Return the number of tokens of a sequence. If the teacher has another prompt, the longer of the two prompts counts. If the teacher
    has another tokenizer, the longer of the two token sequences counts."""
    if sequence.second is not None:
        return max(len(sequence.prompt) + len(sequence.response), len(sequence.teacher_prompt or ()) + len(sequence.second.ids))
    return max(len(sequence.prompt), len(sequence.teacher_prompt or ())) + len(sequence.response)


def pack(sequences: Seq[Sequence]) -> list[dict[str, Any]]:
    """Convert the sequences to plain dicts of tensors, for a checkpoint."""

    def tensors(values: Mapping[str, Any]) -> dict[str, Any]:
        return {name: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for name, v in values.items()}

    names = ("prompt", "response", "states", "teacher_prompt", "teacher")
    return [
        {name: getattr(s, name) for name in names}
        | {"values": tensors(s.values)}
        | ({"second": tensors(vars(s.second))} if s.second else {})
        for s in sequences
    ]


def unpack(stored: list[dict[str, Any]]) -> list[Sequence]:
    """Convert the result of `pack` back to sequences."""
    found = []
    for s in stored:
        values = {name: tensor.numpy() for name, tensor in s["values"].items()}
        own = None if s.get("teacher_prompt") is None else tuple(s["teacher_prompt"])  # earlier versions do not store it
        kept: dict[str, Any] = {name: v.numpy() if isinstance(v, Tensor) else v for name, v in s.get("second", {}).items()}
        second = SecondReading(**kept) if kept else None
        prompt, response, states = (tuple(s[name]) for name in ("prompt", "response", "states"))
        found.append(Sequence(prompt, response, values, states, own, second=second, teacher=s.get("teacher")))
    return found


class FixedSequences(Sampler):
    """A sampler of fixed responses, in a new order every epoch. `signals` has each teacher's recorded outputs for these responses; it is
    empty if there are none."""

    def __init__(self, sequences: Seq[Sequence], optim: Optim, *, signals: Seq[Signals] = (), **common: Any):
        super().__init__(sequences, optim, **common)
        self.sequences, self.signals = self.again.each(sequences) if self.again else sequences, signals

    def rows(self, step: int) -> list[int]:
        """Return the indices of the sequences that all processes together use in update `step`."""
        return self.sets.rows(self.optim.batch, step, (self.seed, "data order")).tolist()

    def micro_batches(self, step: int) -> list[Batch]:
        rows = self.rows(step)
        groups = self.cut(lambda place: length(self.sequences[rows[place]]))
        return [self._collate([rows[p] for p in places]) for places in groups]

    def _collate(self, rows: list[int]) -> Batch:
        sequences = [self.sequences[i] for i in rows]
        return collate(sequences, pad=self.pad, targets=self._recorded(rows, sequences) if self.signals else ())

    def _recorded(self, rows: list[int], sequences: list[Sequence]) -> tuple[Hidden | TopK | Sampled, ...]:
        by_teacher = taught(sequences)
        if not by_teacher:
            return tuple(signals.target(rows) for signals in self.signals)
        return tuple(self.signals[k].target([self.sets.place(rows[i]) for i in mine]) for k, mine in by_teacher.items())


class _WithStudent(Sampler, Generic[Config]):
    def __init__(self, sequences: Seq[Sequence], config: Config, optim: Optim, *, engine: Engine, **common: Any):
        super().__init__(sequences, optim, **common)
        self.fixed = FixedSequences(sequences, optim, **common)
        self.sequences, self.config, self.engine = sequences, config, engine

    def samples(self, step: int) -> bool:
        return True

    def fresh(self, step: int) -> dict[int, Sequence]:
        """Return the student's answers to this process's prompts of update `step`. The keys are positions in the update's batch."""
        rows, mine = self.fixed.rows(step), self.mine.tolist()
        asked = [self.sequences[rows[place]] for place in mine]
        uniforms = rng.uniforms(mine, self.engine.decoding.max_new_tokens, self.seed, "rollout", step)
        pairs = zip(asked, self.engine.respond([s.prompt for s in asked], uniforms), strict=True)
        found = [Sequence(s.prompt, r.tokens, r.values, teacher_prompt=s.teacher_prompt, teacher=s.teacher) for s, r in pairs]
        return dict(zip(mine, map(self.again, found) if self.again else found, strict=True))

    def collated(self, by_place: Mapping[int, Sequence] | Seq[Sequence]) -> list[Batch]:
        groups = self.cut(lambda place: length(by_place[place]))
        return [collate([by_place[int(p)] for p in places], pad=self.pad) for places in groups]

    def draw(self, step: int) -> float:
        """Return the random number in [0, 1) that selects the source of an update's text. It is the same on all processes."""
        return rng.generator(self.seed, "source", step).random()


class Mix(_WithStudent[MixSampler]):
    """The sampler of GKD. An update trains on new text of the student with probability `lam`, and otherwise on the fixed responses."""

    def micro_batches(self, step: int) -> list[Batch]:
        return self.collated(self.fresh(step)) if self.draw(step) < self.config.lam else self.fixed.micro_batches(step)


class Replay(_WithStudent[ReplaySampler]):
    """The sampler of DistiLLM. The student also trains on its earlier text, which is stored in a buffer.

    Every process stores the whole buffer. `config.sampling.ReplaySampler` explains the settings.
    """

    mixes = True

    def __init__(self, sequences: Seq[Sequence], config: ReplaySampler, optim: Optim, **common: Any):
        super().__init__(sequences, config, optim, **common)
        self.phi = 0.0
        self.mark: float | None = None
        """The earlier dev loss with which a new dev loss is compared. None before the first dev evaluation."""
        self.buffer: deque[Sequence] = deque(maxlen=config.capacity)

    @property
    def wants_dev(self) -> bool:
        """True until `observe` has received the dev loss of the untrained student. Later losses are compared with it."""
        return self.mark is None

    def micro_batches(self, step: int) -> list[Batch]:
        """Return the micro-batches of update `step`. They contain new text of the student, or text from the buffer, or fixed responses."""
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
        """Raise `phi`, the probability of training on the student's text, if the dev loss has grown by at least the tolerance.

        The dev loss is compared with its value at the last raise of `phi`. Before the first raise, it is compared with the first dev loss.
        A dev loss that falls changes nothing, as in DistiLLM's code.
        """
        if self.mark is None:
            self.mark = dev["loss"]
        elif dev["loss"] >= self.mark + self.config.tolerance:
            self.phi, self.mark = min(self.phi + self.config.increment, 1.0), dev["loss"]

    def metrics(self) -> dict[str, float]:
        return {"replay/phi": self.phi, "replay/buffer": len(self.buffer)}

    def state(self) -> dict[str, Any]:
        return {"phi": self.phi, "mark": self.mark, "buffer": pack(self.buffer)}

    def restore(self, state: dict[str, Any]) -> None:
        self.phi, self.mark = state["phi"], state["mark"]
        self.buffer = deque(unpack(state["buffer"]), maxlen=self.config.capacity)


class Pairs(_WithStudent[PairSampler]):
    """The sampler of DistiLLM-2. Each prompt occurs twice: with the teacher's stored response, and with a new response of the student.

    `Batch.values["from_teacher"]` is 1 in responses of the teacher and 0 in responses of the student. A micro-batch of n prompts has 2n
    sequences.
    """

    def micro_batches(self, step: int) -> list[Batch]:
        rows, fresh = self.fixed.rows(step), self.fresh(step)

        def tokens(place: int) -> int:
            both = length(self.sequences[rows[place]]), length(fresh[place])
            return sum(both) if self.optim.packed else 2 * max(both)

        return [
            collate([_tagged(self.sequences[rows[p]], 1.0) for p in places] + [_tagged(fresh[int(p)], 0.0) for p in places], pad=self.pad)
            for places in self.cut(tokens)
        ]


def _tagged(sequence: Sequence, from_teacher: float) -> Sequence:
    return replace(sequence, values={"from_teacher": np.full(len(sequence.response), from_teacher, np.float32)}, states=())
