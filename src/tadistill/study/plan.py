"""A recipe's arms x seeds as a graph of stages, addressed by content. Imports no torch.

Stages hand over artifacts on disk only (`study.graph` has their keys). Arms that begin alike share their stages.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from tadistill.config import Arm, Evaluate, Method, Recipe, Sft
from tadistill.config.decoding import Decoding
from tadistill.config.method import Optim, apply
from tadistill.config.objective import CrossEntropy, MiniLLM
from tadistill.config.sampling import DatasetSampler, HiddenSignal, PairSampler, Rounds, TeacherSampler, TopKSignal
from tadistill.data import datasets
from tadistill.errors import ConfigError
from tadistill.models import sources
from tadistill.study import costs
from tadistill.study.graph import Graph, Handle, Stage


@dataclass(frozen=True)
class PlannedArm:
    """One arm, expanded: per seed the stage that makes its model (None: loaded as it is) and those that measure it."""

    name: str
    arm: Arm
    method: Method
    final: dict[int, str | None]
    evaluate: dict[int, str]
    analyse: dict[int, str]
    """Beside the original teacher; empty where there is none."""
    also: dict[str, dict[int, str]]
    """Other decodings, by name."""
    flops: float | None
    """Training FLOPs behind the final model, all stages counted once, for one seed."""


@dataclass
class Plan:
    """The whole study."""

    recipe: Recipe
    teacher: str | None
    stages: dict[str, Stage]
    """By key, parents before children."""
    arms: list[PlannedArm]


def make_plan(recipe: Recipe) -> Plan:
    """Expand a recipe.

    Raises:
        ConfigError, DataError, ModelError: something that can be known without loading a model is wrong.
    """
    return _Planner(recipe).plan()


class _Planner:
    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.graph = Graph()
        self.ledger = costs.Ledger(recipe)
        self.teacher = original_teacher(recipe)
        self.data = {
            "template": recipe.data.template,
            "max_prompt": recipe.data.max_prompt,
            "max_length": recipe.data.max_length,
            "world": recipe.data.world.model_dump(),
        }

    def plan(self) -> Plan:
        """Arms in the recipe's order, but an arm that matches another's compute after that one."""
        done: dict[str, PlannedArm] = {}
        waiting = dict(self.recipe.arms)
        while waiting:
            for name, arm in list(waiting.items()):
                if arm.compute is None or arm.compute[3:] in done:
                    done[name] = self._arm(name, arm, done)
                    del waiting[name]
        return Plan(self.recipe, self.teacher, self.graph.stages, [done[name] for name in self.recipe.arms])

    # --- arms -----------------------------------------------------------------------------------------------------------

    def _arm(self, name: str, arm: Arm, done: dict[str, PlannedArm]) -> PlannedArm:
        target = done[arm.compute[3:]].flops if arm.compute else None
        scale = self._scale(name, arm, target) if arm.compute else 1.0
        made = {seed: self._models(name, arm, seed, scale) for seed in self.recipe.seeds}
        models = {seed: of_path for seed, (of_path, _) in made.items()}
        last, main = arm.path[-1], self.recipe.evaluate
        evaluate = {seed: self._evaluate(last, of_path[-1], seed, main) for seed, of_path in models.items()}
        also = {
            other: {seed: self._evaluate(last, of_path[-1], seed, main.other(other), other) for seed, of_path in models.items()}
            for other in main.also
        }
        analyse = {seed: self._analyse(last, of_path, seed, evaluate[seed]) for seed, of_path in models.items()} if self.teacher else {}
        for measured in (evaluate, analyse, *also.values()):
            for key in measured.values():
                self.graph.mark(key, name)
        final = {seed: of_path[-1].get("stage") for seed, of_path in models.items()}
        first = self.recipe.seeds[0]
        return PlannedArm(name, arm, made[first][1], final, evaluate, analyse, also, self.graph.flops(final[first]))

    def _models(self, name: str, arm: Arm, seed: int, scale: float) -> tuple[list[Handle], Method]:
        """The handle of every model of the arm's path, and the method of its last stage."""
        method = self.recipe.method
        models = [self._trained(arm.path[0], seed)]
        if len(arm.path) == 1:
            self._check_single(name, arm)
            if arm.objective is None:
                return models, method
            method = self._method(name, arm, arm.path[0], scale)
            more = Sft(optim=method.optim, select=method.select)
            return [{"stage": self._sft(arm.path[0], models[0], more, self._seed(arm.path[0], seed), continues=True)}], method
        for above, model in pairwise(arm.path):
            method = self._method(name, arm, model, scale)
            models.append({"stage": self._distill(above, model, models[-1], method, seed)})
        return models, method

    @staticmethod
    def _check_single(name: str, arm: Arm) -> None:
        """An arm without a teacher can only train on with cross-entropy on the data set."""
        if arm.objective is None and (arm.optim or arm.select or arm.sampler):
            raise ConfigError(f"arms.{name} trains nothing, so its settings would do nothing; add objective: {{type: cross_entropy}}")
        if arm.objective is not None and not isinstance(arm.objective, CrossEntropy):
            raise ConfigError(f"arms.{name} has no teacher in its path for objective {arm.objective.type}; use cross_entropy")
        if arm.sampler is not None and not isinstance(arm.sampler, DatasetSampler):
            raise ConfigError(f"arms.{name} has no teacher in its path for sampler {arm.sampler.type}; use sampler: {{type: dataset}}")

    def _method(self, name: str, arm: Arm, model: str, scale: float) -> Method:
        try:
            method = apply(self.recipe.method, self.recipe.models[model].distill, arm.patch)
            self._check_method(method)
            optim = self._with_steps(method.optim)
        except ValueError as error:
            raise ConfigError(f"arms.{name}: {error}") from error
        assert optim.steps is not None
        steps, every = optim.steps, method.select.every
        if scale != 1.0:
            unit = method.round_updates
            steps = max(unit, round(optim.steps * scale / unit) * unit)
            every = max(1, round(every * steps / optim.steps))  # a longer run must not get more checkpoints to choose from
        return method.model_copy(
            update={
                "optim": optim.model_copy(update={"steps": steps}),
                "select": method.select.model_copy(update={"every": every}),
            }
        )

    def _check_method(self, method: Method) -> None:
        objective = method.objective
        if isinstance(objective, MiniLLM) and objective.pt_weight and self.recipe.data.corpus is None:
            raise ValueError("objective minillm has pt_weight > 0 but there is no data.corpus; give a corpus, or set pt_weight: 0")

    def _scale(self, name: str, arm: Arm, target: float | None) -> float:
        """How many times more steps make this direct arm as dear as the arm it is compared with."""
        if len(arm.path) != 2:
            raise ConfigError(f"arms.{name} has `compute`, which works for a direct path (A > B); its path is {' > '.join(arm.path)}")
        trial = _Planner(self.recipe)
        trial.ledger = self.ledger  # what it has read serves both
        final = trial._models(name, arm, self.recipe.seeds[0], 1.0)[0][-1]["stage"]
        total, last = trial.graph.flops(final), trial.graph.stages[final].flops
        if target is None or total is None or last is None:
            raise ConfigError(
                f"arms.{name} has `compute: {arm.compute}`, but the size of a model is not known: it is not on this disk yet "
                "(`tadistill run` downloads it), or its family is not counted (only gpt2, opt, llama, mistral, qwen2, qwen3)"
            )
        if target <= total - last:
            raise ConfigError(f"arms.{name}: `{arm.compute}` costs less than what this arm needs before its last stage; drop `compute`")
        return (target - (total - last)) / last

    # --- models ---------------------------------------------------------------------------------------------------------

    def _seed(self, name: str, seed: int) -> int:
        own = self.recipe.models[name].seed
        return seed if own is None else own

    def _loaded(self, name: str, seed: int) -> Handle:
        """The model before any training."""
        model = self.recipe.models[name]
        if model.init:
            return {"prune": model.init.layers, "of": self._trained(model.init.from_, seed)}
        assert model.load is not None
        handle = {
            "load": model.load,
            "revision": model.revision,
            "config": model.config,
            "tokenizer": model.tokenizer,
            "fingerprint": sources.fingerprint(model.load, model.revision, model.config),
        }
        if model.tokenizer and model.tokenizer != "tinyworld":
            handle["tokenizer_fingerprint"] = sources.fingerprint(model.tokenizer, model.revision, weights=False)
        return handle | ({"seed": self._seed(name, seed)} if model.load.startswith("scratch:") else {})

    def _trained(self, name: str, seed: int) -> Handle:
        """The model as the study uses it: after its own fine-tuning, if it has one."""
        model, seed = self.recipe.models[name], self._seed(name, seed)
        handle = self._loaded(name, seed)
        return {"stage": self._sft(name, handle, model.sft, seed)} if model.sft else handle

    # --- stages ---------------------------------------------------------------------------------------------------------

    def _sft(self, name: str, student: Handle, sft: Sft, seed: int, continues: bool = False) -> str:
        if sft.select.metric == "reverse_kl":
            raise ConfigError(f"models.{name}: sft has no teacher, so it cannot select by reverse_kl; use loss, rouge_l or last")
        optim = self._with_steps(sft.optim)
        spec = {"student": student, "optim": optim.model_dump(), "seed": seed, **self._split("train")}
        spec |= self._select(sft.select)
        label = f"sft {name}{', continued' if continues else ''}, seed {seed}"
        return self.graph.add("sft", spec, label, name, seed, self.ledger.sft(name, optim, sft.select), optim.steps)

    def _distill(self, above: str, name: str, teacher: Handle, method: Method, seed: int) -> str:
        # a learner and a teacher that do not vary with the study's seed still make one distillation per seed
        student = self._trained(name, seed)
        spec = {"student": student, "teacher": teacher, "seed": seed, **self._split("train")}
        spec |= {"method": method.model_dump(exclude={"optim", "select"}), "optim": method.optim.model_dump()}
        spec |= self._select(method.select)
        if method.signal:
            spec["signal"] = {"stage": self._signal(above, teacher, method.signal, method.optim.precision, seed)}
        if isinstance(method.sampler, TeacherSampler | PairSampler):
            spec["responses"] = {"stage": self._generate(above, teacher, method.sampler, seed)}
        if isinstance(method.objective, MiniLLM) and method.objective.pt_weight and self.recipe.data.corpus:
            corpus = self.recipe.data.corpus
            spec["corpus"] = {"ref": corpus.model_dump(), "fingerprint": datasets.fingerprint(corpus, "train", self.recipe.data)}
        label = f"distill {above} -> {name}, {_describe(method)}, {method.optim.steps} updates, seed {seed}"
        return self.graph.add("distill", spec, label, name, seed, self.ledger.distill(above, name, method), method.optim.steps)

    def _signal(self, name: str, teacher: Handle, signal: HiddenSignal | TopKSignal, precision: str, seed: int) -> str:
        spec = {"teacher": teacher, "signal": signal.model_dump(), "precision": precision, **self._split("train")}
        label = f"{signal.type} signal of {name}, seed {seed}"
        return self.graph.add("signal", spec, label, name, seed, self.ledger.signal(name, signal))

    def _generate(self, name: str, teacher: Handle, sampler: TeacherSampler | PairSampler, seed: int) -> str:
        spec = {"teacher": teacher, "sampler": sampler.model_dump(include=set(Decoding.model_fields)), "seed": seed, **self._split("train")}
        return self.graph.add("generate", spec, f"generate with {name}, seed {seed}", name, seed, self.ledger.generate(name, sampler))

    def _evaluate(self, name: str, model: Handle, seed: int, decoding: Evaluate, other: str = "") -> str:
        spec = {"model": model, **self._test_sets(), "decoding": decoding.model_dump(exclude={"also"}), "references": not other}
        label = f"evaluate {self._label(name, model)}{f', {other}' if other else ''}"
        return self.graph.add("evaluate", spec, label, name, self._seed(name, seed), None)

    def _analyse(self, name: str, models: list[Handle], seed: int, answers: str) -> str:
        """The last of a path's models beside the original teacher and the models between them."""
        assert self.teacher is not None
        teacher = self._trained(self.teacher, seed)
        teacher_answers = self._evaluate(self.teacher, teacher, seed, self.recipe.evaluate)
        spec = {"model": models[-1], "teacher": teacher, "assistants": [m for m in models[:-1] if m != teacher], **self._test_sets()}
        spec |= {"answers": {"stage": answers}, "teacher_answers": {"stage": teacher_answers}, "batch": self.recipe.evaluate.batch}
        return self.graph.add("analyse", spec, f"analyse {self._label(name, models[-1])}", name, self._seed(name, seed), None)

    def _test_sets(self) -> dict[str, Any]:
        refs = self.recipe.data.test
        sets = [{"ref": r.model_dump(), "fingerprint": datasets.fingerprint(r, "test", self.recipe.data)} for r in refs]
        return {"sets": sets, "limit": self.recipe.data.limit.test, "data": self.data}

    def _label(self, name: str, model: Handle) -> str:
        return self.graph.stages[model["stage"]].label if "stage" in model else name

    def _split(self, role: str) -> dict[str, Any]:
        ref = getattr(self.recipe.data, role)
        return {
            "data": self.data,
            role: {"ref": ref.model_dump(), "fingerprint": datasets.fingerprint(ref, role, self.recipe.data)},
            f"{role}_limit": getattr(self.recipe.data.limit, role),
        }

    def _select(self, select: Any) -> dict[str, Any]:
        """Selection settings, with dev data and decoding only where the metric reads them."""
        spec: dict[str, Any] = {"select": select.model_dump()}
        if select.metric != "last":
            spec |= self._split("dev")
        if select.metric == "loss":
            spec["decoding"] = {"batch": self.recipe.evaluate.batch}
        elif select.metric != "last":
            spec["decoding"] = self.recipe.evaluate.model_dump(exclude={"also"}) | {"seeds": self.recipe.evaluate.seeds[:1]}
        return spec

    def _with_steps(self, optim: Optim) -> Optim:
        """Updates instead of epochs."""
        if optim.steps is None and optim.epochs is None:
            raise ConfigError("an optim has neither `steps` nor `epochs`; give one, for instance optim: {epochs: 3}")
        if optim.steps is not None and optim.epochs is not None:
            raise ConfigError(f"an optim has both steps {optim.steps} and epochs {optim.epochs}; give one of them")
        if optim.epochs is not None:
            steps = max(1, round(optim.epochs * self.ledger.rows / optim.batch))
            return optim.model_copy(update={"steps": steps, "epochs": None})
        return optim


def original_teacher(recipe: Recipe) -> str | None:
    """The one model that every KL is measured to: `teacher`, or the only head of a path that nothing teaches; None without paths."""
    if recipe.teacher:
        return recipe.teacher
    taught = {model for arm in recipe.arms.values() for model in arm.path[1:]}
    heads = list(dict.fromkeys(arm.path[0] for arm in recipe.arms.values() if len(arm.path) > 1 and arm.path[0] not in taught))
    if len(heads) > 1:
        raise ConfigError(f"the paths start from {', '.join(heads)}; set `teacher:` to the one that KLs are measured to")
    return heads[0] if heads else None


def _describe(method: Method) -> str:
    sampler = method.sampler
    detail = f" ({method.signal.type} signal)" if method.signal else ""
    if isinstance(sampler, Rounds) and sampler.rollouts:
        detail = f" (rounds of {sampler.rollouts}, {method.round_updates} updates each)"
    return f"{method.objective.type} on {sampler.type}{detail}"
