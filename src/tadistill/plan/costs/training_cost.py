"""Predict the cost of one training: FLOPs of each part, padding, and peak memory.

The memory of weights, gradients and AdamW's moments is exact. The memory of activations is an estimate. It assumes fused attention, which
does not store the attention scores.
"""

from dataclasses import asdict

from tadistill.config import Method
from tadistill.config.common import DTYPES
from tadistill.config.method import Optim
from tadistill.models.counting.cost import Cost, CostPart
from tadistill.models.counting.memory import resident_bytes
from tadistill.models.counting.sizes import Adapters, Size, Work, forward_flops, training_flops, with_adapters
from tadistill.plan.costs import passes
from tadistill.plan.costs.passes import Texts
from tadistill.store import key_of
from tadistill.tuning import LOG_POINTS, TILE_BYTES, WATCH_EVERY, WATCHED_ROWS

_KEPT = 4 / 3  # activations per position / (entries of a layer's matrices / hidden): GPT-2 has 16 hidden and 12 hidden^2


class TrainingCost:
    """Adds up the cost of one training. Its methods add parts, such as sampling, and `total` returns their sum."""

    def __init__(self, student: Size, teachers: tuple[Size, ...], optim: Optim, *, drop: float = 0.0, adapters: Adapters | None = None):
        """With several teachers, an update leaves out each one with probability `drop`. If `adapters` are given, only they are trained."""
        assert optim.steps is not None
        self.student, self.adapters = with_adapters(student, adapters), adapters
        self.teachers, self.optim, self.steps = teachers, optim, optim.steps
        self.here = teachers
        """The teachers whose weights are in this process."""
        self.used = (1 - drop) / (1 - drop ** len(teachers)) if len(teachers) > 1 else 1.0
        self.parts: dict[str, CostPart] = {}
        self.padding = 0.0  # padding positions in all updates
        self.batch = 0.0  # bytes of activations and logits of the largest micro-batch
        self.cache = 0.0  # bytes of keys and values during sampling

    def add(self, name: str, work: Work, *, backward: bool = False) -> None:
        """Add forward passes to the part `name`, such as `rollout/student` or `training/teacher`.

        If there are several teachers, only the first runs in the phases `rollout` and `selection`. All of them run in the other phases.

        Args:
            backward: also add the student's backward passes. With gradient checkpointing, they include a second forward pass.
        """
        again = backward and self.optim.gradient_checkpointing
        models = self.teachers if name.endswith("/teacher") else (self.student,)
        for size in models[:1] if name.startswith(("rollout/", "selection/")) else models:
            if backward and self.adapters:
                flops = training_flops(size, self.adapters, work, again=again)
            else:
                flops = forward_flops(size, work * (3 if backward else 1) + (Work(work.positions, work.pairs) if again else Work()))
            self.parts[name] = self.parts.get(name, CostPart()) + CostPart(flops, work.positions, work.heads)

    def train(self, texts: Texts, share: float = 1.0, *, teacher: bool = False, teacher_head: bool = False) -> None:
        """Add the cost of training on `texts`. `share` (0 to 1) is the fraction of updates that use these texts.

        With `teacher`, each teacher runs in the update too. With `teacher_head`, only the teacher's head runs, on stored hidden states.
        """
        micro = passes.rows_in_pass(self.optim, texts)
        batches = share * self.steps * self.optim.batch / micro
        work, padding = passes.training_batch(texts, micro, packed=self.optim.packed)
        self.padding += padding * batches
        self._take(work, teacher or teacher_head)
        self.add("training/student", work * batches, backward=True)
        if teacher or teacher_head:
            self.add("training/teacher", (work if teacher else Work(heads=work.heads)) * (batches * self.used))

    def corpus(self, length: int, *, teacher: bool) -> None:
        """Add the cost of MiniLLM's loss on plain text, which is part of each update. A row of plain text has `length` tokens."""
        work = passes.plain_batch(length, self.optim.batch) * self.steps
        self.add("corpus/student", work, backward=True)
        rows = max(1, self.optim.tokens // length) if self.optim.tokens else self.optim.micro_batch or self.optim.batch
        self._take(passes.plain_batch(length, min(rows, self.optim.batch)), teacher)
        if teacher:
            self.add("corpus/teacher", work * self.used)

    def sample(self, answers: Texts, chunk: int, share: float) -> None:
        """Add the cost of sampling one batch from the student before an update. A fraction `share` (0 to 1) of the updates does this."""
        self.add("rollout/student", passes.sampling(answers, chunk, self.optim.batch) * (self.steps * share))

    def watch(self, answers: Texts, share: float = 1.0, *, teacher: bool = False, teacher_head: bool = False) -> None:
        """Add the cost of metrics of sampled text (`train.watch`). They use the first rows of some updates, at least ten updates apart."""
        micro = passes.rows_in_pass(self.optim, answers)
        times = share * -(-self.steps // max(1, self.steps // LOG_POINTS, WATCH_EVERY))
        work = passes.training_batch(answers, micro, packed=self.optim.packed)[0] * (min(micro, WATCHED_ROWS) / micro * times)
        self.add("watching/student", work)
        if teacher or teacher_head:
            self.add("watching/teacher", (work if teacher else Work(heads=work.heads)) * self.used)

    def caches(self, answers: Texts, chunk: int, most: int, *sizes: Size) -> None:
        """Set the memory of the KV caches of these models. They sample `chunk` answers at a time. An answer has up to `most` tokens."""
        length = max(prompt for prompt, _ in answers.rows) + most
        self.cache = sum(cache_bytes(size, chunk, length) for size in sizes)

    def _take(self, work: Work, teacher: bool) -> None:
        # bytes of a micro-batch: activations, tiles of logits of student and teacher, and the head's gradient
        size = self.student
        layer = 4 * work.positions * _KEPT * (size.matmul - size.head) / size.layers / size.hidden
        kept = layer * size.layers
        if self.optim.gradient_checkpointing:
            kept = layer + 4 * work.positions * size.hidden * size.layers
        logits = 4 * work.heads * size.head / size.hidden
        gradient = 0 if self.adapters else 4 * size.head
        self.batch = max(self.batch, kept + min(logits * (2 if teacher else 1), TILE_BYTES) + gradient)

    def total(self, method: Method | None = None, published: float | None = None) -> Cost:
        """Return the cost of the training. `published` is what MiniLLM's released code needs for the same number of rollouts."""
        trained = self.adapters and self.adapters.trained
        needs = resident_bytes(self.student.total, training=True, adapters=trained) + max(self.batch, self.cache)
        if any(name.endswith("/teacher") and part.positions for name, part in self.parts.items()):
            dtype = DTYPES[self.optim.precision]
            needs += sum(resident_bytes(t.total if t in self.here else t.head, training=False, dtype=dtype) for t in self.teachers)
        return Cost(self.parts, self.padding, published, needs, self._kind(method))

    def _kind(self, method: Method | None) -> str:
        later = {name for name in ("tokens", "packed") if getattr(self.optim, name)}  # earlier plans do not have them
        how = self.optim.model_dump(include={"batch", "micro_batch", "precision", "gradient_checkpointing"} | later)
        what = method.model_dump(include={"objective", "sampler"}) if method else None
        alone = [asdict(self.adapters)] if self.adapters else []
        alone += [["served"]] if self.here != self.teachers else []
        return key_of([asdict(self.student), [asdict(t) for t in self.teachers], how, what, *alone])


def cache_bytes(size: Size, rows: int, length: float) -> float:
    """Return the bytes of a KV cache in float32, for `rows` sequences of `length` positions."""
    return 8 * rows * length * size.keys * size.layers
