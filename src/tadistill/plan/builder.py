"""The stages of a recipe. `StageBuilder` adds them to the graph, and `plan.arms` combines them into arms (paths of models)."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache, cached_property
from typing import Any

from tadistill.config import Evaluate, Method, Recipe, Sft
from tadistill.config.arm import teachers_of
from tadistill.config.method_parts import Optim, Select, TeacherContext
from tadistill.config.method_rules import over_spans
from tadistill.data.tinyworld import TOKENIZERS
from tadistill.errors import ConfigError, NotHere, about
from tadistill.models import shapes, sources
from tadistill.plan import kinds
from tadistill.plan.costs import Ledger
from tadistill.plan.graph import Graph
from tadistill.plan.inputs import (
    BehindApi,
    Encoding,
    FromStage,
    Handle,
    Loaded,
    Output,
    Pruned,
    PrunedDepth,
    Tempered,
    plan_metrics,
    plan_objective,
    plan_tasks,
)
from tadistill.plan.paths import check_like, check_weights, teacher_rules
from tadistill.plan.phases import Turn
from tadistill.plan.remote import from_files
from tadistill.plan.study_tokens import StudyTokens
from tadistill.plan.training_texts import StudySets, on_sets, texts
from tadistill.text import counted


class StageBuilder:
    """Builds a recipe's stages. A method adds a stage unless the graph already has it, and returns the stage's key or the model that the
    stage makes."""

    def __init__(
        self, recipe: Recipe, graph: Graph, ledger: Ledger, of_arm: Callable[[str, int], Handle], tokens: StudyTokens, sets: StudySets
    ):
        """`of_arm` is a function that returns the final model of an arm for a seed."""
        self.recipe, self.graph, self.ledger, self.of_arm, self.tokens, self.sets = recipe, graph, ledger, of_arm, tokens, sets
        self.rows: int | None = None  # the number of training rows; None means all
        self._own: Callable[[str, int], Handle] = cache(lambda name, seed: self._tuned(name, self._untrained(name, seed), seed))

    @cached_property
    def _measured(self) -> dict[str, Any]:
        asked, across = self.recipe.evaluate.bits_per_byte, len(self.tokens.families) > 1
        return {"own": plan_metrics(self.recipe), "tasks": plan_tasks(self.recipe), "per_byte": across if asked is None else asked}

    def add(self, spec: kinds.Spec, label: str, model: str, seed: int, teachers: tuple[str, ...] = ()) -> str:
        """Add a stage and return its key.

        Args:
            model: name of the model that the stage trains, makes or runs.
            seed: the seed that the report shows for the stage.
            teachers: names of the stage's teachers, from big to small.
        """
        assert kinds.KINDS[spec.kind] is type(spec), f"{type(spec).__name__} is not in KINDS of tadistill.plan.kinds"
        readers = self.tokens.readers(model)
        try:
            with about(f"models.{model}" if readers else ""):
                cost = spec.cost(self.ledger.of(readers, *map(self.tokens.readers, teachers[:1])), model, teachers)
        except NotHere:
            cost = None
        return self.graph.add(spec, label, model, seed, cost, teachers)

    def seed(self, name: str, seed: int) -> int:
        """Return the seed with which a model is trained. It is the model's own `seed` in the recipe, or else the study's `seed`."""
        own = self.recipe.models[name].seed
        return seed if own is None else own

    def trained(self, name: str, seed: int, start: Handle | None = None) -> Handle:
        """Return a model as an input of stages. A model with the key `sft` is fine-tuned first. `start` replaces its initial weights."""
        seed = self.seed(name, seed)
        return self._tuned(name, start, seed) if start else self._own(name, seed)

    def _tuned(self, name: str, start: Handle, seed: int) -> Handle:
        return self.sft(name, start, sft, seed) if (sft := self.recipe.models[name].sft) else start

    def _untrained(self, name: str, seed: int) -> Handle:
        model = self.recipe.models[name]
        if init := model.init:
            parent = from_files(self.trained(init.from_, seed))
            if not init.measured:
                assert init.layers is not None
                return PrunedDepth(prune=init.layers, of=parent)
            layers = init.layers if isinstance(init.layers, tuple) else init.layers_by
            return Pruned(prune=init.sizes, layers=layers, of=parent, data=self.encoding(name, samples=False), **self.training())
        if point := model.checkpoint:
            whole = self.trained(point.of, seed)
            assert isinstance(whole, FromStage)  # only fine-tuning stores checkpoints
            return whole.model_copy(update={"checkpoint": point.step})
        if temper := model.temper:
            parent = self.trained(temper.of, seed)
            if temper.like is not None:
                like = self.recipe.arms[temper.like].last[-1], self.of_arm(temper.like, seed)
                return self.tempered(name, parent, like, temper.like, seed)
            assert temper.tau is not None
            return Tempered(temper=temper.tau, of=parent)
        if model.api:
            return BehindApi(asks=model.api.model, api=model.api)
        assert model.load is not None
        tokenizer, revision = self.tokens.tokenizer(name) or (model.tokenizer, model.revision)
        written, own = self.recipe.written, tokenizer is not None and tokenizer not in TOKENIZERS
        return Loaded(
            load=written(model.load) or model.load,
            at=model.load,
            revision=model.revision,
            config=model.config if model.load.startswith("scratch:") else {},
            tokenizer=written(tokenizer),
            tokenizer_at=tokenizer,
            fingerprint=sources.fingerprint(model.load, model.revision, model.config),
            tokenizer_fingerprint=sources.fingerprint(tokenizer, revision, weights=False) if tokenizer and own else None,
            seed=seed if model.load.startswith("scratch:") else None,
            tokenizer_revision=None if revision == model.revision else revision,
            serve=model.serve,
            served_as=self.recipe.served_as(name),
            sends=model.serve and model.serve.signal,
        )

    def cut_to(self, name: str, source: str, handle: Handle) -> Handle:
        """Return the weights `handle` of the model `source`, pruned to the shape of the model `name`.

        Raises:
            NotHere: the size of a model is not known.
            ConfigError: `source` cannot be pruned to this shape.
        """
        wanted, have = self.ledger.config(name), self.ledger.config(source)
        if wanted is None or have is None:
            raise NotHere(
                f"{name} starts from {source}, which needs the sizes of both models, but at least one config.json is not on this disk; run "
                "`tadistill fetch RECIPE`"
            )
        if wanted["model_type"] != have["model_type"]:
            kinds = f"{have['model_type']} and {wanted['model_type']}"
            raise ConfigError(f"{name} cannot start from {source}, because their model types are {kinds}; choose models of one type")
        check_weights(self.tokens, name, source)
        shape = shapes.shape_of(wanted)
        if shape == shapes.shape_of(have):
            return handle
        with about(f"{name} cannot start from {source}"):
            shapes.check_shape(have, shape)
        sizes = {key: value for key, value in asdict(shape).items() if key != "head_dim" and value is not None}
        return Pruned(prune=sizes, layers="influence", of=handle, data=self.encoding(name, samples=False), **self.training())

    def tempered(self, name: str, parent: Handle, like: tuple[str, Handle], arm: str, seed: int) -> FromStage:
        """Add the search for a model's temperature, and return the model with this temperature.

        The temperature divides the logits of `parent`, so that the mean entropy of `parent` equals that of the model `like`. `like` is the
        name and the weights of a model of the arm `arm`. `name` is the name of the model that gets the temperature.
        """
        check_like(self.tokens, name, like[0], arm)
        data, dev = self.encoding(name), self.sets.dev()
        spec = kinds.TemperSpec(data=data, teacher=parent, like=like[1], dev=dev, batch=self.recipe.evaluate.batch)
        return FromStage(stage=self.add(spec, f"temper {name} like {arm}, seed {seed}", name, seed))

    def sft(self, name: str, student: Handle, sft: Sft, seed: int, continues: bool = False) -> FromStage:
        """Add supervised fine-tuning. If `continues` is True, the stage's label says that the model was trained before.

        Raises:
            ConfigError: `select.metric` needs a teacher, or `sft.keep` names an update after the last one.
        """
        if sft.select.metric == "reverse_kl":
            raise ConfigError(f"models.{name}: sft has no teacher, so `select.metric` cannot be reverse_kl; use loss, rouge_l or last")
        with about(f"models.{name}.sft"):
            sft.select.check()
        optim = self.with_steps(sft.optim, sft.sets)
        assert optim.steps is not None
        if max(sft.keep, default=0) > optim.steps:
            raise ConfigError(
                f"models.{name}.sft.keep has {max(sft.keep)}, but the last update is {optim.steps}; write numbers from 1 to {optim.steps}"
            )
        if sft.keep and sft.select.patience:
            raise ConfigError(
                f"models.{name}.sft has both `keep` and `select.patience`, but with `patience`, training may stop before update "
                f"{max(sft.keep)}, which `keep` names; remove one of the two keys"
            )
        spec = kinds.SftSpec(
            student=student,
            optim=optim,
            seed=seed,
            keep=tuple(sorted(set(sft.keep))),
            lora=self.recipe.models[name].lora,
            **self._texts(name, sft.select, sft.sets, responses=True),
        )
        label = f"sft {name}{on_sets(sft.sets)}{', continued' if continues else ''}, seed {seed}"
        return FromStage(stage=self.add(spec, label, name, seed))

    def distill(
        self,
        teachers: list[tuple[str, Handle]],
        name: str,
        student: Handle,
        method: Method,
        seed: int,
        turn: Turn,
        route: str = "",
    ) -> FromStage:
        """Add the distillation of the model `name`. Its initial weights come from `student`.

        Args:
            teachers: names and models, from big to small. There is one teacher, or several if the method has `dense` or the path a route.
            route: the teachers with their training sets, such as `m on maths + xl on chat`. Empty if every teacher teaches on all rows.
            turn: the position of this distillation among the arm's distillations of this model. Each of them has its own order of prompts.

        Raises:
            ConfigError: `dense.weights` does not have one weight per teacher.
        """
        # every seed of the study has its own distillation, even if student and teacher are the same for all seeds
        (_, teacher), *others = teachers if method.ema is None else [(name, student)]  # with `ema`, the student's weights start the average
        names, taught = [n for n, _ in teachers], teachers_of(route)
        dense = method.dense if others else None
        if dense and dense.weights and len(dense.weights) != len(teachers):
            raise ConfigError(
                f"dense.weights has {counted(len(dense.weights), 'entry', 'entries')}, but {name} has {len(teachers)} teachers "
                f"({', '.join(names)}); write one weight for each teacher, or remove `dense.weights` for equal weights"
            )
        of_teacher = teacher_rules(self, names[0], name, method)
        # answers of a teacher with another tokenizer follow the student's own prompts, so this stage needs no `context`
        context = None if of_teacher or not (method.by_token or self.tokens.hands_over_ids(names[0], name)) else method.context
        method = over_spans(method) if of_teacher else method
        spec = kinds.DistillSpec(
            student=student,
            teacher=teacher,
            seed=turn.seed(seed),
            objective=method.objective,
            sampler=method.sampler,
            optim=method.optim,
            dense=dense,
            assistants=tuple(handle for _, handle in others) if dense or route else (),
            route=tuple(names.index(taught[each]) for each in self.recipe.data.sets) if route and others else (),
            lora=self.recipe.models[name].lora,
            own=plan_objective(method.objective, self.recipe.runtime.code),
            ema=method.ema,
            teacher_data=of_teacher,
            **texts(self, teachers if dense or route else teachers[:1], method, seed, (name, student), turn, taught if others else {}),
            **self._texts(name, method.select, context=context, responses=method.sampler.reads_responses),
        )
        label = f"distill {route or ' + '.join(names)} -> {name}{turn.text}, {spec.summary}, seed {seed}"
        return FromStage(stage=self.add(spec, label, name, seed, tuple(names)))

    def evaluate(self, name: str, model: Handle, seed: int, decoding: Evaluate, other: str = "") -> str:
        """Add the evaluation of a model on the test sets. `other` is the decoding's key in `evaluate.also`, empty for the main one."""
        more = {"references": not other, **self._measured, **({"tasks": None, "per_byte": False} if other else {})}
        spec = kinds.EvaluateSpec(**self.only_runs(name), sets=self.sets.test(name), model=model, decoding=decoding, **more)
        return self.add(spec, f"evaluate {self._label(name, model)}{f', {other}' if other else ''}", name, self.seed(name, seed))

    def analyse(self, name: str, models: list[Handle], seed: int, answers: str, original: str) -> str:
        """Add the stage that compares a path's last model with the original teacher and with the assistants in the path."""
        teacher, served = self.trained(original, seed), self.recipe.models[original].serve
        written = None if served else Output(stage=self.evaluate(original, teacher, seed, self.recipe.evaluate))
        spec = kinds.AnalyseSpec(
            **self.only_runs(name, samples=False),
            sets=self.sets.test(),
            teacher=teacher,
            model=models[-1],
            answers=Output(stage=answers),
            teacher_answers=written,
            assistants=tuple(m for m in models[:-1] if m != teacher),
            batch=self.recipe.evaluate.batch,
            of_teacher=None if self.tokens.alike(original, name) else self.asking(original, samples=False),
            tokens=None if served else self.tokens.fewer(name, original),
        )
        return self.add(spec, f"analyse {self._label(name, models[-1])}", name, self.seed(name, seed))

    def probe(self, name: str, model: Handle, seed: int, prompts: int) -> str:
        """Add the stage that measures one model on the first dev prompts. The model samples its own answers."""
        main = self.recipe.evaluate
        own = Evaluate(max_new_tokens=main.max_new_tokens, seeds=main.seeds[:1], batch=main.batch)
        spec = kinds.ProbeSpec(**self.only_runs(name), model=model, decoding=own, dev=self.sets.dev(prompts=prompts, model=name))
        return self.add(spec, f"probe {name}", name, self.seed(name, seed))

    def pair(self, teacher: tuple[str, Handle], learner: tuple[str, Handle], answers: str, seed: int, prompts: int, k: int) -> str:
        """Add the stage that compares a student with a bigger model. It compares their `k` most likely tokens on the student's answers."""
        (above, handle), (name, model) = teacher, learner
        spec = kinds.PairSpec(
            **self.only_runs(name, samples=False),
            teacher=handle,
            model=model,
            answers=Output(stage=answers),
            k=k,
            dev=self.sets.dev(prompts=prompts),
            batch=self.recipe.evaluate.batch,
        )
        return self.add(spec, f"pair {above} -> {name}", name, self.seed(name, seed))

    def _label(self, name: str, model: Handle) -> str:
        return self.graph.stages[model.stage].label if isinstance(model, FromStage) else name

    def only_runs(self, name: str, *, samples: bool = True) -> dict[str, Any]:
        """Return the fields of a stage that only runs a model: the settings of tokenisation, and the precision."""
        return {"data": self.encoding(name, samples=samples), "precision": self.recipe.evaluate.precision}

    def encoding(self, name: str, *, samples: bool = True, responses: bool = False, context: TeacherContext | None = None) -> Encoding:
        """Return the settings with which the rows of data sets become tokens for a model (`StudyTokens.encoding`).

        Args:
            context: the prompt that a teacher reads on the training set. None if the teacher reads the student's prompts.

        Raises:
            ConfigError: `context` is set, but rows can have several answers.
        """
        found = self.tokens.encoding(name, samples=samples, responses=responses)
        if context and found.turns == "all":
            raise ConfigError(
                f"{name} learns with a `context`, which allows only one answer per row, but data.turns is `all`; set "
                "data.turns to last, or remove the `context`"
            )
        return found.model_copy(update={"context": context})

    def asking(self, name: str, *, samples: bool = True, context: TeacherContext | None = None) -> Encoding:
        """Return the settings of `encoding` with all tokens that end an answer of the model."""
        return self.encoding(name, samples=samples, context=context).model_copy(update={"ends": self.tokens.ends(name)})

    def training(self, sets: Sequence[str] = (), *, weights: bool = False) -> dict[str, Any]:
        """Return the fields of a stage that name its training sets (`StudySets.training`)."""
        return self.sets.training(sets, weights=weights, rows=self.rows)

    def _texts(
        self, name: str, select: Select, sets: Sequence[str] = (), context: TeacherContext | None = None, *, responses: bool
    ) -> dict[str, Any]:
        # the dev data and its decoding are read only if a dev metric selects the checkpoint
        found: dict[str, Any] = {"data": self.encoding(name, responses=responses, context=context), "select": select}
        if select.chooses:
            found |= {"dev": self.sets.dev(sets, model=name), "decoding": self.recipe.evaluate.during_training}
        return found | self.training(sets, weights=True)

    def with_steps(self, optim: Optim, sets: Sequence[str] = ()) -> Optim:
        """Return the settings with `epochs` converted to `steps` (updates). An epoch uses each row of the sets once.

        Args:
            sets: names of the training sets. By default, they are all sets of the recipe.

        Raises:
            ConfigError: the settings have neither `steps` nor `epochs`.
        """
        if optim.steps is None and optim.epochs is None:
            raise ConfigError("an `optim` of the recipe has neither `steps` nor `epochs`; write one of them, such as optim: {epochs: 3}")
        if optim.epochs is not None:
            texts = self.ledger.of_texts(tuple(name for name in self.recipe.data.sets if name in sets or not sets))
            steps = max(1, round(optim.epochs * texts.rows / optim.batch))
            return optim.model_copy(update={"steps": steps, "epochs": None})
        return optim
