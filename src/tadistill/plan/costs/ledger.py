"""Predictions of the cost of a recipe's stages. Every forward and backward pass of a stage is counted.

`plan.costs.passes` gives the lengths of texts and the work of a pass, and `models.parameter_counts.forward_flops` turns work into FLOPs.
A sampled answer is assumed to be as long as the reference answer. If the model that samples has random weights, its answers are assumed
to have `max_new_tokens` tokens, because such a model never ends an answer.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import cached_property

from tadistill.config import Method
from tadistill.config import sampling as samplers
from tadistill.config.common import DTYPES, Decoding, Divergence
from tadistill.config.machine import processes_of
from tadistill.config.method_parts import Optim, Select
from tadistill.config.objective import Gold, MiniLLM, Uld
from tadistill.constants import GENERATION_BATCH, RECORDING_BATCH
from tadistill.models.flops_and_memory import Cost, CostPart, Disk, Memory, weight_bytes
from tadistill.models.parameter_counts import Described, Size, Work, forward_flops, with_adapters
from tadistill.plan.costs import passes
from tadistill.plan.costs.passes import Texts
from tadistill.plan.costs.sizes_and_lengths import SizesAndLengths
from tadistill.plan.costs.training import TrainingCost, reading_bytes, sampling_bytes
from tadistill.store import key_of


class Ledger(SizesAndLengths):
    """Predicts the costs of one recipe's stages."""

    @cached_property
    def _distilled(self) -> dict[tuple, Cost | None]:  # all seeds have the same cost
        return {}

    def sft(self, name: str, optim: Optim, select: Select) -> Cost | None:
        """Predict the cost of fine-tuning. The student runs forward and backward on each batch."""
        student = self.described(name)
        if student is None:
            return None
        cost = TrainingCost(student, (), optim, adapters=self.adapters(name), processes=processes_of(self.recipe.resources, "sft", name))
        cost.train(self.fixed)
        self._selection(cost, select)
        return cost.total()

    def generate(self, name: str, decoding: Decoding, *, limit: int | None = None, as_teacher: bool = False) -> Cost | None:
        """Predict the cost of a `generate` stage, in which a model answers the training prompts.

        Args:
            limit: number of rows, if not all of them are used.
            as_teacher: the model answers the teacher's own prompts (`context`), not the student's.
        """
        model = self.described(name)
        if model is None:
            return None
        answers = self._answers(name, decoding)
        answers = answers.of_teacher if as_teacher else answers
        count = self.train.count * self._share(limit)
        work = passes.sampling(answers, _padded(decoding, GENERATION_BATCH), round(count))
        memory = self._frozen(model, sampling_bytes(model, GENERATION_BATCH, max(p for p, _ in answers.rows), decoding.max_new_tokens))
        later = {"engine"} if decoding.engine == "native" else set()  # earlier versions had no such field
        kind = key_of(["generate", asdict(model.size), decoding.model_dump(include=set(Decoding.model_fields), exclude=later)])
        return Cost({"rollout/teacher": _part(model.size, work)}, memory=memory, kind=kind, asked=answers.mean_response * count)

    def ask(self, decoding: Decoding, *, limit: int | None = None) -> Cost:
        """Predict how many answer tokens a model behind an API writes, in tokens of the students. `limit` is as in `generate`."""
        return Cost(elsewhere=True, asked=self.train.answered(decoding.max_new_tokens).mean_response * self.rows * self._share(limit))

    def _share(self, limit: int | None) -> float:
        return 1.0 if limit is None else min(1.0, limit / self.rows)

    def signal(
        self, name: str, signal: samplers.Signal, text_of: tuple[str, int] | None = None, *, limit: int | None = None
    ) -> Cost | None:
        """Predict the cost of a `signal` stage, which records a teacher's outputs on a text.

        Args:
            text_of: the model that wrote the text, and the largest number of tokens of an answer. None for the training set's responses.
            limit: number of rows, if not all of them are used.
        """
        from tadistill.rollout import recorded_format

        model = self.described(name)
        if model is None:
            return None
        texts = (self._text_of(*text_of) if text_of else self.fixed).of_teacher
        count = texts.count * self._share(limit)
        work = passes.pass_by_length(texts, RECORDING_BATCH, count)
        if isinstance(signal, samplers.HiddenSignal):
            work = Work(work.positions, work.pairs)
        memory = self._frozen(model, reading_bytes(model, RECORDING_BATCH, max(texts.totals)))
        each = recorded_format.token_bytes(signal, model.size.hidden, model.size.head // model.size.hidden)
        asked = texts.mean_response * count
        disk = Disk(each, each * asked, exact=not isinstance(signal, samplers.SampledSignal))
        kind = key_of(["signal", asdict(model.size), signal.model_dump()])
        return Cost({"recording/teacher": _part(model.size, work)}, memory=memory, kind=kind, disk=disk, asked=asked)

    def measuring(self, name: str) -> float | None:
        """Predict the bytes that a stage needs, besides the weights, to sample and score a model's answers. None if the model's size is not
        known."""
        model, settings = self.described(name), self.recipe.evaluate
        return None if model is None else sampling_bytes(model, settings.batch, self.recipe.data.max_prompt, settings.max_new_tokens)

    def _frozen(self, model: Described, sampling: float) -> Memory:
        dtype = DTYPES[self.recipe.evaluate.precision]
        return Memory(frozen=weight_bytes(model.present, dtype), sampling=sampling)

    def _text_of(self, name: str, most: int) -> Texts:
        return self.train.answered(most, endless=self.untrained(name))

    def distill(self, teachers: tuple[str, ...], name: str, method: Method, text_of: tuple[str, int] | None = None) -> Cost | None:
        """Predict the cost of a distillation. With several teachers, the first one is the original teacher. `text_of` is as in `signal`."""
        key = teachers, name, method.model_dump_json(), text_of
        if key not in self._distilled:
            self._distilled[key] = self._distill(teachers, name, method, text_of)
        return self._distilled[key]

    def _distill(self, teachers: tuple[str, ...], name: str, method: Method, text_of: tuple[str, int] | None) -> Cost | None:
        running = [model for model in teachers if not self.recipe.models[model].api]  # an API gives only text, before the distillation
        student, above = self.described(name), tuple(found for model in running if (found := self.described(model)))
        if student is None or len(above) < len(running) or method.optim.steps is None:
            return None
        drop, adapters = method.dense.drop if method.dense else 0.0, self.adapters(name)
        if method.ema is not None:
            above = (replace(student, size=with_adapters(student.size, adapters)),)
        processes = processes_of(self.recipe.resources, "distill", name)
        cost = TrainingCost(student, above, method.optim, drop=drop, adapters=adapters, processes=processes)
        cost.memory.average = method.ema is not None
        sampler, objective = method.sampler, method.objective
        cost.dropout = not sampler.on_policy
        cost.distance, cost.two_losses = isinstance(objective, Uld | Gold), isinstance(objective, Divergence) and 0 < objective.kd_ratio < 1
        if text_of:
            self._recorded(cost, method, self._text_of(*text_of))
        else:
            _SAMPLERS[type(sampler)](self, cost, method, teachers[0], name)
        if method.samples and isinstance(sampler, samplers.OnPolicy) and sampler.engine == "native":
            drawing = (student, above[0]) if sampler.guided else (student,)
            rows, longest = min(sampler.chunk, cost.memory.own(method.round_rollouts)), max(prompt for prompt, _ in self.train.rows)
            cost.memory.sampling(*(sampling_bytes(model, rows, longest, sampler.max_new_tokens) for model in drawing))
        self._selection(cost, method.select, extra=sampler.follows_dev)
        return cost.total(method, self._published(cost, objective, sampler, name) if isinstance(objective, MiniLLM) else None)

    def _answers(self, name: str, decoding: Decoding) -> Texts:
        return self._text_of(name, decoding.max_new_tokens)

    def _fixed(self, cost: TrainingCost, method: Method, teacher: str, name: str) -> None:
        # rollout.samplers.FixedSequences
        sampler = method.sampler
        self._recorded(cost, method, self._answers(teacher, sampler) if isinstance(sampler, samplers.TeacherSampler) else self.fixed)

    def _recorded(self, cost: TrainingCost, method: Method, texts: Texts) -> None:
        cost.train(texts, teacher=method.trains_with_teacher, teacher_head=isinstance(method.signal, samplers.HiddenSignal))

    def _mix(self, cost: TrainingCost, method: Method, teacher: str, name: str) -> None:
        # rollout.samplers.Mix
        sampler = method.sampler
        assert isinstance(sampler, samplers.MixSampler)
        answers = self._answers(name, sampler)
        cost.train(answers, sampler.lam, teacher=True)
        cost.train(self.fixed, 1 - sampler.lam, teacher=True)
        cost.sample(answers, _padded(sampler, sampler.chunk), sampler.lam)
        cost.watch(answers, sampler.lam, teacher=True)

    def _replay(self, cost: TrainingCost, method: Method, teacher: str, name: str) -> None:
        # rollout.samplers.Replay. phi depends on the run; this assumes phi = 1 from the start, so it is an upper limit
        sampler = method.sampler
        assert isinstance(sampler, samplers.ReplaySampler)
        answers = self._answers(name, sampler)
        cost.train(answers, teacher=True)
        cost.sample(answers, _padded(sampler, sampler.chunk), min(1.0, 0.5 + sampler.capacity / (method.optim.batch * cost.steps)))
        cost.watch(answers, teacher=True)

    def _pair(self, cost: TrainingCost, method: Method, teacher: str, name: str) -> None:
        # rollout.samplers.Pairs, which has no rollout metrics
        sampler = method.sampler
        assert isinstance(sampler, samplers.PairSampler)
        answers, of_teacher = self._answers(name, sampler), self._answers(teacher, sampler)
        twice = Texts(
            (*of_teacher.rows, *answers.rows),
            self.train.count,
            (*of_teacher.contexts, *answers.contexts),
            teachers=(*of_teacher.teachers, *answers.teachers),
            sets=(*of_teacher.sets, *answers.sets),
        )
        cost.train(twice, 2.0, teacher=True)
        cost.sample(answers, _padded(sampler, sampler.chunk), 1.0)

    def _rounds(self, cost: TrainingCost, method: Method, teacher: str, name: str) -> None:
        # rollout.rounds: sampling, a teacher's pass unless it took part in sampling, then epochs of training on its stored states
        sampler, objective = method.sampler, method.objective
        assert isinstance(sampler, samplers.Rounds)
        answers, rollouts = self._answers(name, sampler), method.round_rollouts
        rounds, cost.drawn = -(-cost.steps // method.round_updates), float(rollouts)
        scores, distribution = objective.needs_scores, objective.needs_distribution
        mixture = isinstance(sampler, samplers.TeacherMixedSampler) and sampler.guided
        lazy = mixture and sampler.plain and self._packs(teacher) and self._packs(name)
        sampling = passes.lazy_sampling if lazy else passes.sampling
        sampled = sampling(answers, _padded(sampler, sampler.chunk), rollouts) * rounds
        cost.add("rollout/student", sampled)
        if sampler.guided:
            cost.add("rollout/teacher", sampled)
            cost.asked += rollouts * rounds * answers.mean_response
        known = sampler.guided and len(cost.teachers) == 1  # several teachers score in separate passes
        kept = objective.needs_teacher and (known or scores or sampler.inner_epochs > 1)
        stored = kept and distribution  # the teacher's hidden states, of which only the head runs later
        if kept and not known:

            def read(texts: Texts, share: float, packed: bool) -> Work:
                work = cost.reading(texts, sampler.chunk, rollouts * share, packed=packed) * rounds
                return work if scores else Work(work.positions, work.pairs)

            cost.teach("scoring", answers, read)
            cost.asked += rollouts * rounds * answers.of_teacher.mean_response
        if scores and (method.optim.precision == "bf16" or sampler.engine == "vllm"):
            cost.add("scoring/student", cost.reading(answers, sampler.chunk, rollouts) * rounds)
        cost.train(answers, teacher=distribution and not kept, teacher_head=stored)
        if stored:
            cost.memory.rollouts(rollouts * answers.mean_response)
        # if the teacher's states were not stored, the metrics of rollouts run the teacher again
        again = method.runs_teacher and not stored and not (answers.seconds and scores)
        cost.watch(answers, teacher=again, teacher_head=stored)
        if objective.needs_corpus and self.recipe.data.corpus:
            cost.corpus(self.corpus_length, teacher=objective.compares_on_corpus)

    def _selection(self, cost: TrainingCost, select: Select, *, extra: bool = False) -> None:
        # evaluation.run.dev_metrics: always the loss; answers and KLs if the metric needs them
        if not select.chooses:
            return
        looks, settings = select.evaluations(cost.steps) + extra, self.recipe.evaluate
        for dev in self.dev:
            cost.add("selection/student", cost.reading(dev, settings.batch, dev.count) * looks)
            student = cost.memory.student
            cost.memory.sampling(reading_bytes(student, settings.batch, max(dev.totals)))
            if select.metric == "loss":
                continue
            cost.memory.sampling(sampling_bytes(student, settings.batch, max(p for p, _ in dev.rows), settings.max_new_tokens))
            answers = dev.answered(settings.max_new_tokens)
            cost.add("selection/student", passes.sampling(answers, settings.batch, round(dev.count)) * looks)
            if select.metric == "reverse_kl":
                beside = cost.reading(answers, settings.batch, dev.count) * looks
                cost.add("selection/student", beside)
                cost.add("selection/teacher", beside)

    def _published(self, cost: TrainingCost, objective: MiniLLM, sampler: samplers.SamplerBase, name: str) -> float:
        # MiniLLM's released code computes the logits of all positions
        assert isinstance(sampler, samplers.Rounds)
        answers = self._answers(name, sampler)
        length = answers.mean_prompt + answers.mean_response
        corpus = self.corpus_length if objective.needs_corpus and self.recipe.data.corpus else 0
        student, teacher = (forward_flops(size, Work(length, length**2, length)) / length for size in (cost.student, cost.teachers[0]))
        each = minillm_flops(student, teacher, length=length, corpus=corpus, epochs=sampler.inner_epochs)
        return each * cost.steps * cost.optim.batch / sampler.inner_epochs


_SAMPLERS: Mapping[type[samplers.SamplerBase], Callable[[Ledger, TrainingCost, Method, str, str], None]] = {
    samplers.DatasetSampler: Ledger._fixed,
    samplers.TeacherSampler: Ledger._fixed,
    samplers.StudentSampler: Ledger._rounds,
    samplers.TeacherMixedSampler: Ledger._rounds,
    samplers.SpeculativeSampler: Ledger._rounds,
    samplers.MixSampler: Ledger._mix,
    samplers.ReplaySampler: Ledger._replay,
    samplers.PairSampler: Ledger._pair,
}
"""Maps each kind of sampler to the function that adds the cost of training, sampling and teacher passes."""


def _part(size: Size, work: Work) -> CostPart:
    return CostPart(forward_flops(size, work), work.positions, work.heads)


def _padded(decoding: Decoding, chunk: int) -> int:
    return 1 if decoding.engine == "vllm" else chunk  # rows padded to one width; vLLM pads none


def minillm_flops(student: float, teacher: float, *, length: float, corpus: float, epochs: int) -> float:
    """Return the FLOPs of MiniLLM's released code for one rollout, as counted in microsoft/LMOps/minillm.

    For each rollout, the code runs the student forward five times and the teacher four times. In each inner epoch, the student runs forward
    and backward, and the teacher runs forward, both on the rollout and on plain text.

    Args:
        student, teacher: forward FLOPs per token, including the head (about 2 x parameters).
        length: number of tokens of a rollout, including its prompt.
        corpus: number of tokens in a row of plain text; 0 if there is no corpus.
        epochs: PPO epochs on each rollout.
    """
    # call graph in sampler.py and trainer.py: both models sample; the teacher computes rewards and the student log-probabilities;
    # for logging, the student generates a second answer and both models run over it; both run over the rollout once more
    trained = epochs * (length + corpus)
    return student * (5 * length + 3 * trained) + teacher * (4 * length + trained)
