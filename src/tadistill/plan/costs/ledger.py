"""What a recipe's stages cost: how often each model runs on which text, as the code that runs them does it.

Lengths come from the data (`plan.costs.lengths`), the work of a pass from `plan.costs.passes`, FLOPs from
`models.counting.sizes.forward_flops`.
A sampled answer is taken to be as long as the prompt's reference, and as `max_new_tokens` where the student has random weights, which end
no answer.
"""

from dataclasses import asdict
from functools import cached_property

from tadistill.config import Method, Recipe
from tadistill.config.method import Optim, Select
from tadistill.config.objective import CrossEntropy, MiniLLM, SampledKL
from tadistill.config.sampling import (
    Decoding,
    HiddenSignal,
    MixSampler,
    OnPolicy,
    PairSampler,
    ReplaySampler,
    Rounds,
    SpeculativeSampler,
    TeacherMixedSampler,
    TeacherSampler,
    TopKSignal,
)
from tadistill.data import datasets
from tadistill.errors import ConfigError
from tadistill.models.counting import shapes, sizes
from tadistill.models.counting.adapters import Adapters, adapters_of
from tadistill.models.counting.cost import Cost
from tadistill.models.counting.memory import resident_bytes
from tadistill.models.counting.sizes import Size, Work, forward_flops
from tadistill.plan.costs import lengths, memory, passes
from tadistill.plan.costs.lengths import Texts
from tadistill.plan.costs.published import minillm_flops
from tadistill.plan.costs.sheet import Sheet, part_of
from tadistill.store import key_of

_ANSWERS = 64  # prompts that a teacher answers at a time (`stages.execute`)
_RECORDED = 16  # sequences that a signal is recorded of at a time (`rollout.signals`)


class Ledger:
    """Predictions for one recipe."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self._distilled: dict[tuple[tuple[str, ...], str, str], Cost | None] = {}  # seeds share their cost

    # --- text -----------------------------------------------------------------------------------------------------------

    @cached_property
    def _train(self) -> list[datasets.Example]:
        return datasets.load(self.recipe.data.train, "train", self.recipe.data)

    @property
    def rows(self) -> int:
        """Training rows, before the length filter."""
        return len(self._train)

    @cached_property
    def train(self) -> Texts:
        """Lengths of the training set."""
        return lengths.read(self.recipe, self.recipe.data.train, "train", self._train)

    @cached_property
    def dev(self) -> Texts:
        """Lengths of the dev set."""
        data = self.recipe.data
        return lengths.read(self.recipe, data.dev, "dev", datasets.load(data.dev, "dev", data))

    @cached_property
    def corpus_length(self) -> int:
        """Tokens of one row of the corpus."""
        return lengths.chunk(self.recipe)

    # --- models ---------------------------------------------------------------------------------------------------------

    def size(self, name: str) -> Size | None:
        """The size of a model, or None while its configuration is not on this disk."""
        config = self.config(name)
        return None if config is None else sizes.size_of(config)

    def config(self, name: str) -> dict | None:
        """A model's configuration as a dict, or None while it is not on this disk."""
        model = self.recipe.models[name]
        if model.parent:
            parent = self.config(model.parent)
            if parent is None or model.init is None:
                return parent
            if not model.init.measured:
                return sizes.with_layers(parent, model.init.sizes["layers"])
            shape = shapes.resized(shapes.shape_of(parent), **model.init.sizes)
            try:
                shapes.check_shape(parent, shape)
            except ConfigError as error:
                raise ConfigError(f"models.{name}.init: {error}") from error
            return shapes.with_shape(parent, shape)
        assert model.load is not None
        vocab = lengths.vocabulary(model.tokenizer, self.recipe) if model.tokenizer else None
        return sizes.read_config(model.load, model.revision, model.config, vocab)

    def adapters(self, name: str) -> Adapters | None:
        """What alone a model trains where it has `lora`; None while its size is not known.

        Raises:
            ConfigError: `lora.targets` names no layer of it.
        """
        lora, config = self.recipe.models[name].lora, self.config(name)
        if lora is None or config is None:
            return None
        try:
            return adapters_of(config, lora.r, lora.targets)
        except ConfigError as error:
            raise ConfigError(f"models.{name}.lora.targets: {error}") from error

    def _packs(self, name: str) -> bool:
        return (self.config(name) or {}).get("model_type") in passes.PACKED_FAMILIES

    def untrained(self, name: str) -> bool:
        """Whether a model starts from random weights and has no fine-tuning, so that it does not know how to end an answer."""
        model = self.recipe.models[name]
        if model.sft:
            return False
        return self.untrained(model.parent) if model.parent else str(model.load).startswith("scratch:")

    # --- stages ---------------------------------------------------------------------------------------------------------

    def sft(self, name: str, optim: Optim, select: Select) -> Cost | None:
        """Student forward and backward on every batch."""
        size = self.size(name)
        if size is None:
            return None
        sheet = Sheet(size, (), optim, adapters=self.adapters(name))
        sheet.train(self.train)
        self._selection(sheet, select)
        return sheet.cost()

    def generate(self, name: str, decoding: Decoding) -> Cost | None:
        """A teacher's answer to every training prompt."""
        size = self.size(name)
        if size is None:
            return None
        texts = self.train.answered(decoding.max_new_tokens, endless=self.untrained(name))
        work = passes.sampling(texts, _ANSWERS, round(self.train.count))
        needs = resident_bytes(size.total, training=False) + memory.cache(size, _ANSWERS, texts.mean_prompt + decoding.max_new_tokens)
        kind = key_of(["generate", asdict(size), decoding.model_dump(include=set(Decoding.model_fields))])
        return Cost({"rollout/teacher": part_of(size, work)}, memory=needs, kind=kind)

    def signal(self, name: str, signal: HiddenSignal | TopKSignal) -> Cost | None:
        """One pass of a teacher over the training set; logits are made for a top-k signal alone."""
        size = self.size(name)
        if size is None:
            return None
        work = passes.by_length(self.train, _RECORDED, self.train.count)
        if isinstance(signal, HiddenSignal):
            work = Work(work.positions, work.pairs)
        kind, needs = key_of(["signal", asdict(size), signal.model_dump()]), resident_bytes(size.total, training=False)
        return Cost({"recording/teacher": part_of(size, work)}, memory=needs, kind=kind)

    def distill(self, above: tuple[str, ...], name: str, method: Method) -> Cost | None:
        """A distillation, as `stages.training` puts it together; several teachers, the original one first, with dense guidance."""
        key = above, name, method.model_dump_json()
        if key not in self._distilled:
            self._distilled[key] = self._distill(above, name, method)
        return self._distilled[key]

    def _distill(self, above: tuple[str, ...], name: str, method: Method) -> Cost | None:
        student, teachers = self.size(name), tuple(size for model in above if (size := self.size(model)))
        if student is None or len(teachers) < len(above) or method.optim.steps is None:
            return None
        drop = method.dense.drop if method.dense else 0.0
        sheet = Sheet(student, teachers, method.optim, drop=drop, adapters=self.adapters(name))
        sampler, objective = method.sampler, method.objective
        on_policy = isinstance(sampler, OnPolicy)
        most = sampler.max_new_tokens if isinstance(sampler, Decoding) else 0
        answers = self.train.answered(most, endless=self.untrained(name)) if on_policy else self.train
        if isinstance(sampler, Rounds):
            self._round(sheet, sampler, method, answers, above[0], name)
        elif isinstance(sampler, MixSampler):
            sheet.train(answers, sampler.lam, teacher=True)
            sheet.train(self.train, 1 - sampler.lam, teacher=True)
            sheet.sample(answers, sampler.chunk, sampler.lam)
            sheet.watch(answers, sampler.lam, teacher=True)
        elif isinstance(sampler, ReplaySampler):
            sheet.train(answers, teacher=True)  # phi depends on the run: counted as if it were 1 from the start
            fresh = min(1.0, 0.5 + sampler.capacity / (method.optim.batch * sheet.steps))
            sheet.sample(answers, sampler.chunk, fresh)
            sheet.watch(answers, teacher=True)
        elif isinstance(sampler, PairSampler):  # nothing watches it
            of_teacher = self.train.answered(most, endless=self.untrained(above[0]))
            both = Texts((*of_teacher.rows, *answers.rows), self.train.count)
            sheet.train(both, 2.0, teacher=True)
            sheet.sample(answers, sampler.chunk, 1.0)
        else:
            texts = self.train.answered(most) if isinstance(sampler, TeacherSampler) else self.train
            live = not isinstance(objective, CrossEntropy) and method.signal is None
            sheet.train(texts, teacher=live, teacher_head=isinstance(method.signal, HiddenSignal))
        if isinstance(sampler, OnPolicy):
            guided = isinstance(sampler, TeacherMixedSampler | SpeculativeSampler)
            sheet.caches(answers, min(sampler.chunk, method.round_rollouts), most, student, *(teachers[:1] if guided else ()))
        self._selection(sheet, method.select, extra=isinstance(sampler, ReplaySampler))
        return sheet.cost(method, self._published(sheet, method, answers) if isinstance(objective, MiniLLM) else None)

    def _round(self, sheet: "Sheet", sampler: Rounds, method: Method, answers: Texts, above: str, name: str) -> None:
        """`rollout.rounds`: sampling, the teacher's pass where sampling had none, then epochs in which its states are kept."""
        objective, rounds = method.objective, -(-sheet.steps // method.round_updates)
        rollouts = method.round_rollouts
        scores = isinstance(objective, MiniLLM | SampledKL)
        states = objective.single_step if isinstance(objective, MiniLLM) else not scores
        mixture = isinstance(sampler, TeacherMixedSampler) and sampler.alpha > 0
        guided = mixture or isinstance(sampler, SpeculativeSampler)
        lazy = mixture and sampler.plain and self._packs(above) and self._packs(name)
        if sampler.engine == "native" or guided:
            sampled = (passes.lazy_sampling if lazy else passes.sampling)(answers, sampler.chunk, rollouts) * rounds
        else:  # vLLM pads nothing
            each = Work(answers.mean_prompt + answers.mean_response - 1, 0.0, answers.mean_response)
            sampled = each * (rollouts * rounds)
        sheet.add("rollout/student", sampled)
        if guided:
            sheet.add("rollout/teacher", sampled)
        scored = passes.by_length(answers, sampler.chunk, rollouts) * rounds
        alone = len(sheet.teachers) == 1  # with several, what sampling knew of one is made again with the others'
        kept = (guided and alone) or scores or sampler.inner_epochs > 1
        if kept and not (guided and alone):
            sheet.add("scoring/teacher", scored if scores else Work(scored.positions, scored.pairs))
        if scores and (method.optim.precision == "bf16" or sampler.engine == "vllm"):
            sheet.add("scoring/student", scored)
        sheet.train(answers, teacher=states and not kept, teacher_head=states and kept)
        # `target` is live beside rollouts whose states were not kept
        sheet.watch(answers, teacher=not (states and kept), teacher_head=states and kept)
        if isinstance(objective, MiniLLM) and objective.pt_weight and self.recipe.data.corpus:
            sheet.corpus(self.corpus_length, teacher=objective.pt_kd_ratio > 0)

    def _selection(self, sheet: "Sheet", select: Select, *, extra: bool = False) -> None:
        """`evaluation.run.dev_metrics`: the loss always, answers and KLs where the metric is made of them."""
        if select.metric == "last":
            return
        looks, settings = -(-sheet.steps // select.every) + extra, self.recipe.evaluate
        sheet.add("selection/student", passes.by_length(self.dev, settings.batch, self.dev.count) * looks)
        if select.metric == "loss":
            return
        answers = self.dev.answered(settings.max_new_tokens)
        sheet.add("selection/student", passes.sampling(answers, settings.batch, round(self.dev.count)) * looks)
        if select.metric == "reverse_kl":
            beside = passes.by_length(answers, settings.batch, self.dev.count) * looks
            sheet.add("selection/student", beside)
            sheet.add("selection/teacher", beside)

    def _published(self, sheet: "Sheet", method: Method, answers: Texts) -> float:
        """The released code on as many rollouts, all logits made."""
        objective, sampler = method.objective, method.sampler
        assert isinstance(objective, MiniLLM)
        assert isinstance(sampler, Rounds)
        length = answers.mean_prompt + answers.mean_response
        corpus = self.corpus_length if objective.pt_weight and self.recipe.data.corpus else 0
        student, teacher = (forward_flops(size, Work(length, length**2, length)) / length for size in (sheet.student, sheet.teachers[0]))
        each = minillm_flops(student, teacher, length=length, corpus=corpus, epochs=sampler.inner_epochs)
        return each * sheet.steps * method.optim.batch / sampler.inner_epochs
