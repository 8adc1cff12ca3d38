"""A training stage's parts, as they add up. Imports no torch."""

from dataclasses import asdict

from tadistill.config import Method
from tadistill.config.method import Optim
from tadistill.models.counting.adapters import Adapters, training_flops, with_adapters
from tadistill.models.counting.cost import Cost, Part
from tadistill.models.counting.memory import resident_bytes
from tadistill.models.counting.sizes import Size, Work, forward_flops
from tadistill.plan.costs import memory, passes
from tadistill.plan.costs.lengths import Texts
from tadistill.store import key_of

_TEACHER = {"fp32": "float32", "bf16": "bfloat16"}
_LOG_POINTS, _WATCH_EVERY, _WATCHED_ROWS = 100, 10, 8  # `train.loop` and `train.watch`


class Sheet:
    """The parts of one training stage, as they add up."""

    def __init__(self, student: Size, teachers: tuple[Size, ...], optim: Optim, *, drop: float = 0.0, adapters: Adapters | None = None):
        """
        Args:
            drop: the probability that each of several teachers is left out of an update; drawn again where none stays.
            adapters: what alone the student trains.
        """
        assert optim.steps is not None
        self.student, self.adapters = with_adapters(student, adapters), adapters
        self.teachers, self.optim, self.steps = teachers, optim, optim.steps
        self.used = (1 - drop) / (1 - drop ** len(teachers)) if len(teachers) > 1 else 1.0
        self.parts: dict[str, Part] = {}
        self.padding = self.batch = self.cache = 0.0
        """Positions that are padding in all; bytes that the largest micro-batch takes, and sampling."""

    def add(self, name: str, work: Work, *, backward: bool = False) -> None:
        """Forward passes of the student or of all teachers, and, for the student, backward ones; the body forward again with gradient
        checkpointing. Only the first teacher takes part in rollouts and selection."""
        again = backward and self.optim.gradient_checkpointing
        models = self.teachers if name.endswith("/teacher") else (self.student,)
        for size in models[:1] if name.startswith(("rollout/", "selection/")) else models:
            if backward and self.adapters:
                flops = training_flops(size, self.adapters, work, again=again)
            else:
                flops = forward_flops(size, work * (3 if backward else 1) + (Work(work.positions, work.pairs) if again else Work()))
            self.parts[name] = self.parts.get(name, Part()) + Part(flops, work.positions, work.heads)

    def train(self, texts: Texts, share: float = 1.0, *, teacher: bool = False, teacher_head: bool = False) -> None:
        """A share of the updates on such texts; the teacher runs beside, or its head alone on states that are kept."""
        micro = self.optim.micro_batch or self.optim.batch
        batches = share * self.steps * self.optim.batch / micro
        work, padding = passes.training_batch(texts, micro)
        self.padding += padding * batches
        self._took(work, teacher or teacher_head)
        self.add("training/student", work * batches, backward=True)
        if teacher or teacher_head:
            self.add("training/teacher", (work if teacher else Work(heads=work.heads)) * (batches * self.used))

    def _took(self, work: Work, teacher: bool) -> None:
        bodies = memory.activations(self.student, work.positions, checkpointing=self.optim.gradient_checkpointing)
        self.batch = max(self.batch, bodies + memory.head(self.student, work.heads, teacher=teacher, frozen=self.adapters is not None))

    def caches(self, answers: Texts, chunk: int, most: int, *sizes: Size) -> None:
        """Keys and values of each of the models that sample `chunk` sequences."""
        length = max(prompt for prompt, _ in answers.rows) + most
        self.cache = sum(memory.cache(size, chunk, length) for size in sizes)

    def corpus(self, length: int, *, teacher: bool) -> None:
        """MiniLLM's plain text in every update."""
        work = passes.plain_batch(length, self.optim.batch) * self.steps
        self.add("corpus/student", work, backward=True)
        self._took(passes.plain_batch(length, self.optim.micro_batch or self.optim.batch), teacher)
        if teacher:
            self.add("corpus/teacher", work * self.used)

    def sample(self, answers: Texts, chunk: int, share: float) -> None:
        """A batch sampled by the student alone in a share of the updates."""
        self.add("rollout/student", passes.sampling(answers, chunk, self.optim.batch) * (self.steps * share))

    def watch(self, answers: Texts, share: float = 1.0, *, teacher: bool = False, teacher_head: bool = False) -> None:
        """`train.watch` on the first rows of every tenth update, at most a hundred times."""
        micro = self.optim.micro_batch or self.optim.batch
        times = share * -(-self.steps // max(1, self.steps // _LOG_POINTS, _WATCH_EVERY))
        work = passes.training_batch(answers, micro)[0] * (min(micro, _WATCHED_ROWS) / micro * times)
        self.add("watching/student", work)
        if teacher or teacher_head:
            self.add("watching/teacher", (work if teacher else Work(heads=work.heads)) * self.used)

    def cost(self, method: Method | None = None, published: float | None = None) -> Cost:
        """All of it."""
        trained = self.adapters and self.adapters.trained
        needs = resident_bytes(self.student.total, training=True, adapters=trained) + max(self.batch, self.cache)
        if any(name.endswith("/teacher") and part.positions for name, part in self.parts.items()):
            needs += sum(resident_bytes(t.total, training=False, dtype=_TEACHER[self.optim.precision]) for t in self.teachers)
        return Cost(self.parts, self.padding, published, needs, self._kind(method))

    def _kind(self, method: Method | None) -> str:
        how = self.optim.model_dump(include={"batch", "micro_batch", "precision", "gradient_checkpointing"})
        what = method.model_dump(include={"objective", "sampler"}) if method else None
        alone = [asdict(self.adapters)] if self.adapters else []
        return key_of([asdict(self.student), [asdict(t) for t in self.teachers], how, what, *alone])


def part_of(size: Size, work: Work) -> Part:
    """Forward passes of a model."""
    return Part(forward_flops(size, work), work.positions, work.heads)
