"""Predict the cost of one training: FLOPs of each part, padding, and the peak memory.

The memory follows from the sizes of the models and the largest batch. Weights, gradients and AdamW's moments are exact. Activations are
those that autograd stores (`models.flops_and_memory`), for the longest texts. benchmarks/memory.py compares predictions and measurements.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, replace

from tadistill.config import Method
from tadistill.config.common import DTYPES
from tadistill.config.method_parts import Optim
from tadistill.constants import LOG_POINTS, TILE_ROWS, WATCH_EVERY, WATCHED_ROWS
from tadistill.models.flops_and_memory import Cost, CostPart, Memory, kept_by_layer, weight_bytes
from tadistill.models.parameter_counts import Adapters, Described, Work, forward_flops, training_flops, with_adapters
from tadistill.plan.costs import passes
from tadistill.plan.costs.passes import Texts
from tadistill.store import key_of

_DRAWN = 12
"""Bytes per logit while a token is sampled: the logits, their softmax and a temporary tensor."""
_PRODUCT = 6
"""Bytes per entry of a matrix product with the head (output layer) in bfloat16 on a CPU: the result, and oneDNN's sum in float32."""


class TrainingMemory:
    """Adds up the memory of one training. Its methods add parts, and `total` returns the sum."""

    def __init__(self, student: Described, teachers: tuple[Described, ...], optim: Optim, adapters: Adapters | None, processes: int):
        """`student.size` includes the adapters. The memory is that of one of `processes` processes, which share each batch."""
        self.student, self.teachers, self.adapters, self.processes = student, teachers, adapters, processes
        batch = self.own(optim.batch)
        self.optim = optim.model_copy(update={"batch": batch, "micro_batch": min(optim.micro_batch or batch, batch)})
        """The settings of the training, with the rows of one process."""
        self.bf16 = optim.precision == "bf16"
        self.texts, self.plain = Memory(), Memory()
        self.drawn, self.stored = 0.0, 0.0
        self.across = False
        """True if the teacher has another tokenizer."""
        self.average = False
        """True if the teacher is a moving average of the student: a float32 copy of the trained weights. All other weights are shared."""

    def own(self, rows: int) -> int:
        """Return how many of `rows` sequences one process has."""
        return -(-rows // self.processes)

    def batch(self, work: Work, *, heads: int, dropout: bool, corpus: bool = False) -> None:
        """Add the memory of the forward and backward pass of one micro-batch. If batches are added several times, only the largest counts.

        A micro-batch of the plain-text corpus (`corpus`) is in memory together with one of training text, so both count.

        Args:
            work: the work of the largest micro-batch.
            heads: number of teachers whose logits are computed too.
        """
        size = self.student.size
        kept = kept_by_layer(self.student.config, bf16=self.bf16, dropout=dropout)
        layer = kept.position * work.positions + kept.pair * work.pairs
        scores = max(kept.scores - kept.pair, 0) * work.pairs + kept.on_cpu * work.positions
        if self.optim.gradient_checkpointing:
            layers = layer + 4 * size.hidden * work.positions * size.layers
        else:
            layers, scores = layer * size.layers, scores * size.layers
        gradient = 0 if self.adapters else 4 * size.head
        # a teacher with another tokenizer has another number of logits
        row = (
            4 * (self.student.vocab + sum(t.vocab for t in self.teachers[:heads])) if self.across else 4 * self.student.vocab * (1 + heads)
        )
        found = Memory(
            layers=layers + 12 * size.hidden * work.positions + 4 * size.hidden * work.heads,
            cpu=scores + (_PRODUCT * (gradient / 4 + self.student.vocab * min(work.heads, TILE_ROWS)) if self.bf16 else 0),
            running=kept.running * work.positions,
            head=gradient + 4 * size.hidden * work.heads,
            logits=row * work.heads,
            logit_row=row,
        )
        name = "plain" if corpus else "texts"
        setattr(self, name, max(getattr(self, name), found, key=lambda memory: memory.layers))

    def sampling(self, *needs: float) -> None:
        """Add the memory of one sampling or evaluation. `needs` has the bytes of each model. All models need them at the same time.

        If this method is called several times, only the largest sum counts.
        """
        self.drawn = max(self.drawn, sum(needs))

    def rollouts(self, tokens: float) -> None:
        """Add the memory of the teachers' last hidden states at the `tokens` sampled tokens of a round."""
        self.stored = (2 if self.bf16 else 4) * tokens * sum(teacher.size.hidden for teacher in self.teachers)

    def total(self, *, runs_teachers: bool) -> Memory:
        """Return the memory of the training. With `runs_teachers`, it includes the teachers' weights.

        Without `runs_teachers`, it includes only the teachers' heads (output layers), and these only if the student trains on recorded
        hidden states.
        """
        size, dtype = self.student.size, DTYPES[self.optim.precision]
        trained = self.adapters.trained if self.adapters else size.total
        if runs_teachers and self.average:
            frozen = 4 * trained
        elif runs_teachers:
            frozen = sum(weight_bytes(t.present, dtype) for t in self.teachers)
        else:
            read = self.texts.logit_row > 4 * self.student.vocab  # recorded hidden states come with the teacher's head
            frozen = sum((6 if self.bf16 else 4) * t.size.head for t in self.teachers) if read else 0
        copies = 2 * size.matmul if self.bf16 else 0  # autocast keeps them for the whole update
        largest = max(self.texts, self.plain, key=lambda memory: memory.logits)
        return replace(
            largest,
            weights=4 * size.total,
            gradients=4 * trained,
            moments=8 * trained,
            frozen=frozen,
            layers=copies + self.texts.layers + self.plain.layers,
            cpu=max(self.texts.cpu, self.plain.cpu),
            head=self.texts.head + self.plain.head,
            returned=0 if self.adapters else (8 if self.student.tied else 4) * size.head,
            several=self.optim.tokens is not None or (self.optim.micro_batch or 0) < self.optim.batch,
            sampling=self.drawn,
            rollouts=self.stored,
        )


def sampling_bytes(model: Described, rows: int, prompt: float, answer: float) -> float:
    """Return the bytes of caches and temporary tensors while a model answers `rows` prompts. The caches are in float32."""
    size = model.size
    caches = 8 * rows * (prompt + answer) * size.keys * size.layers
    return caches + _DRAWN * rows * model.vocab + _running(model) * rows * prompt


def reading_bytes(model: Described, rows: int, length: float) -> float:
    """Return the bytes of temporary tensors in a forward pass on `rows` texts of `length` tokens, without gradients."""
    return _running(model) * rows * length + min(rows * length, TILE_ROWS) * 4 * model.vocab


def _running(model: Described) -> float:
    return kept_by_layer(model.config, bf16=False, dropout=False).running


_INSIDE = 0.75
"""Estimated share of response tokens at which a loss over spans of text compares the next bytes of the two models. At each of these
tokens, the loss needs logits, as at the starts of spans. Measured shares are 0.81 for GPT-2 and SmolLM2, and 0.67 for the two tokenizers
of tinyworld."""


class TrainingCost:
    """Adds up the cost of one training. Its methods add parts, such as sampling, and `total` returns their sum."""

    def __init__(
        self,
        student: Described,
        teachers: tuple[Described, ...],
        optim: Optim,
        *,
        adapters: Adapters | None,
        processes: int,
        drop: float = 0.0,
    ):
        """With several teachers, an update leaves out each one with probability `drop`. If `adapters` are given, only they are trained.

        The FLOPs are those of all `processes` together. The memory is that of one process.
        """
        assert optim.steps is not None
        trained = replace(student, size=with_adapters(student.size, adapters))
        self.student, self.adapters = trained.size, adapters
        self.teachers, self.optim, self.steps = tuple(t.size for t in teachers), optim, optim.steps
        self.used = (1 - drop) / (1 - drop ** len(teachers)) if len(teachers) > 1 else 1.0
        self.parts: dict[str, CostPart] = {}
        self.padding = 0.0  # padding positions in all updates
        self.asked = 0.0
        """Number of answer tokens that the first teacher writes or scores (`Cost.asked`)."""
        self.memory = TrainingMemory(trained, teachers, optim, adapters, processes)
        self.drawn = float(optim.batch)
        """Number of training sequences that are drawn together. With several training sets, each set has its share in these sequences."""
        self.dropout = True
        """False if the student samples its own text, because it then trains without dropout."""
        self.distance, self.two_losses = False, False
        """Used only for a teacher with another tokenizer. `distance`: the loss is `uld` or `gold`. `two_losses`: the loss mixes a
        divergence with cross-entropy."""

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
            self._count(name, work, flops)

    def teach(self, phase: str, texts: Texts, work: Callable[[Texts, float, bool], Work]) -> Work:
        """Add the forward passes of all teachers on `texts`. Return the work of the first teacher.

        If each teacher has its own training sets (a route), it reads only their rows.

        Args:
            work: a function of the texts that a teacher reads, of their share (0 to 1) in all rows, and of a bool, which is True if they
                are sent to a server, without padding. It returns the work.
        """
        sent = [teacher.serve is not None for teacher in self.memory.teachers]
        each = [work(*texts.taught_by(number), sent[number]) for number in range(len(self.teachers))]
        for size, own in zip(self.teachers, each, strict=True):
            self._count(f"{phase}/teacher", own, forward_flops(size, own))
        return each[0] if each else Work()

    def _count(self, name: str, work: Work, flops: float) -> None:
        self.parts[name] = self.parts.get(name, CostPart()) + CostPart(flops, work.positions, work.heads)

    def train(self, texts: Texts, share: float = 1.0, *, teacher: bool = False, teacher_head: bool = False) -> None:
        """Add the cost of training on `texts`. `share` (0 to 1) is the fraction of updates that use these texts.

        With `teacher`, each teacher runs in the update too. With `teacher_head`, only the teacher's head runs, on stored hidden states.
        """
        micro = passes.rows_in_pass(self.optim, texts)
        batches = share * self.steps * self.optim.batch / micro
        work, padding = passes.training_batch(texts, micro, packed=self.optim.packed, drawn=self.drawn)
        self.padding += padding * batches
        self.memory.across = bool(texts.seconds)
        largest = passes.largest_batch(self.memory.optim, texts, max(share, 1))  # each prompt of DistiLLM-2 occurs twice
        self.memory.batch(largest, heads=self._heads(teacher or teacher_head), dropout=self.dropout)
        self.add("training/student", work * batches, backward=True)
        if texts.seconds and (teacher or teacher_head):
            self._spans(texts, micro * batches)
            if self.two_losses:
                self.add("training/student", Work(heads=work.heads * batches), backward=True)
        if teacher or teacher_head:

            def read(texts: Texts, rows: float, packed: bool) -> Work:
                found = self._batch(texts, micro, rows, packed=packed)
                return (found if teacher else Work(heads=found.heads)) * (batches * self.used)

            first = self.teach("training", texts, read)
            self.asked += first.heads if teacher else 0.0
        if teacher and (texts.contexts or texts.seconds):
            for each in (t for t in self.memory.teachers if t.serve is None):  # they run one after another, before the student
                rows = passes.rows_in_pass(self.memory.optim, texts)
                self.memory.sampling(reading_bytes(each, rows, max(texts.of_teacher.totals)))

    def _spans(self, texts: Texts, rows: float) -> None:
        """Correct the number of logits for a loss over spans of text. `train` counts logits once at every response token of each model.

        For `uld` and `gold`, the student computes logits a second time, at each of its tokens that does not end a span.

        Any other loss needs the logits at the start of each span, and at a share `_INSIDE` of the tokens. In addition, the student
        computes logits at this share of its tokens before the loss.
        """

        seconds = texts.seconds

        def heads(values: Iterable[float]) -> Work:
            return Work(heads=sum(values) / len(seconds) * rows)

        if self.distance:  # the probability of a span's earlier tokens
            self.add("training/student", heads(s.before for s in seconds))
            return
        tokens = [response for _, response in texts.rows]
        self.add("training/student", heads(_INSIDE * own for own in tokens))  # before the loss
        more = heads(s.spans - (1 - _INSIDE) * own for s, own in zip(seconds, tokens, strict=True))
        self.add("training/student", more, backward=True)
        self.add("training/teacher", heads(s.spans - (1 - _INSIDE) * s.response for s in seconds) * self.used)

    def reading(self, texts: Texts, batch: int, count: float, *, packed: bool = False) -> Work:
        """Return the work (token positions and pairs) of one forward pass over `count` sequences, in batches of similar length."""
        return passes.pass_by_length(texts, batch, count, packed=packed or self.optim.packed)

    def corpus(self, length: int, *, teacher: bool) -> None:
        """Add the cost of MiniLLM's loss on plain text, which is part of each update. A row of plain text has `length` tokens."""
        work = passes.plain_batch(length, self.optim.batch) * self.steps
        self.add("corpus/student", work, backward=True)
        own = self.memory.optim
        rows = max(1, own.tokens // length) if own.tokens else own.micro_batch or own.batch
        micro = passes.plain_batch(length, min(rows, own.batch))
        self.memory.batch(micro, heads=self._heads(teacher), dropout=self.dropout, corpus=True)
        if teacher:
            self.add("corpus/teacher", work * self.used)
            self.asked += work.heads * self.used

    def sample(self, answers: Texts, chunk: int, share: float) -> None:
        """Add the cost of sampling one batch from the student before an update. A fraction `share` (0 to 1) of the updates does this."""
        self.add("rollout/student", passes.sampling(answers, chunk, self.optim.batch) * (self.steps * share))

    def watch(self, answers: Texts, share: float = 1.0, *, teacher: bool = False, teacher_head: bool = False) -> None:
        """Add the cost of the metrics of sampled text (`train.monitoring`). They are computed on the first rows of an update, once in ten
        or more updates. `share` (0 to 1) is the fraction of updates that train on sampled text."""
        micro = passes.rows_in_pass(self.optim, answers)
        times = share * -(-self.steps // max(1, self.steps // LOG_POINTS, WATCH_EVERY))
        watched = min(micro, WATCHED_ROWS) / micro * times
        self.add("watching/student", self._batch(answers, micro) * watched)
        if not (teacher or teacher_head):
            return

        def read(texts: Texts, rows: float, packed: bool) -> Work:
            found = self._batch(texts, micro, rows, packed=packed) * watched
            return (found if teacher else Work(heads=found.heads)) * self.used

        self.teach("watching", answers, read)

    def _batch(self, texts: Texts, micro: int, share: float = 1.0, *, packed: bool = False) -> Work:
        # the work of a forward pass on a share of `micro` rows. Their mean number need not be whole.
        rows, drawn = micro * share, self.drawn * share
        whole = max(1, round(rows))
        return passes.training_batch(texts, whole, packed=packed or self.optim.packed, drawn=drawn)[0] * (rows / whole)

    def _heads(self, teacher: bool) -> int:
        with_head = sum(each.head for each in self.memory.teachers) if self.teachers else 1
        return with_head if teacher else 0

    def total(self, method: Method | None = None, published: float | None = None) -> Cost:
        """Return the cost of the training. `published` is the FLOPs of MiniLLM's released code for the same number of rollouts."""
        runs = any(name.endswith("/teacher") and part.positions for name, part in self.parts.items())
        return Cost(self.parts, self.padding, published, self.memory.total(runs_teachers=runs), self._kind(method), asked=self.asked)

    def _kind(self, method: Method | None) -> str:
        later = {name for name in ("tokens", "packed") if getattr(self.optim, name)}  # earlier plans do not have them
        how = self.optim.model_dump(include={"batch", "micro_batch", "precision", "gradient_checkpointing"} | later)
        what = method.model_dump(include={"objective", "sampler"}) if method else None
        alone = [asdict(self.adapters)] if self.adapters else []
        served = [teacher.serve for teacher in self.memory.teachers if teacher.serve]
        alone += [["served"]] if served else []
        alone += [["top_k", each.k] for each in served if each.gives == "top_k"]
        return key_of([asdict(self.student), [asdict(t) for t in self.teachers], how, what, *alone])
