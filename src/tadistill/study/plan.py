"""A recipe's arms x seeds as a graph of stages, addressed by content. Imports no torch.

Stages hand over artifacts on disk only. A stage's key is a hash of everything its numbers depend on: its settings, its
data's fingerprint, and its parents' keys. Arms that begin alike therefore share their stages.
"""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from tadistill.config import Arm, Method, Recipe, Sft
from tadistill.config.decoding import Decoding
from tadistill.config.method import Optim, apply
from tadistill.config.objective import CrossEntropy, MiniLLM
from tadistill.config.sampling import DatasetSampler, HiddenSignal, PairSampler, Rounds, TeacherSampler, TopKSignal
from tadistill.data import datasets
from tadistill.errors import ConfigError
from tadistill.models import sources
from tadistill.study import costs
from tadistill.study.store import key_of

STAGE_VERSION = {"sft": 3, "generate": 2, "signal": 1, "distill": 3, "evaluate": 3}
"""Raised by hand when a stage of that kind gives other numbers for the same settings."""

Handle = dict[str, Any]
"""Where weights come from: {"stage": key} or {"load": …} (with its fingerprint), {"prune": layers, "of": handle}."""


@dataclass
class Stage:
    """One unit of work with an artifact."""

    kind: str
    key: str
    spec: dict[str, Any]
    parents: dict[str, str]
    """Role -> key of a stage that must be finished first."""
    label: str
    model: str
    seed: int
    flops: float | None
    steps: int | None = None
    arms: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class PlannedArm:
    """One arm, expanded: per seed the stage that makes its model (None: loaded as it is) and the one that evaluates it."""

    name: str
    arm: Arm
    method: Method
    final: dict[int, str | None]
    evaluate: dict[int, str]
    flops: float | None
    """Training FLOPs behind the final model, all stages counted once, for one seed."""


@dataclass
class Plan:
    """The whole study."""

    recipe: Recipe
    teacher: str
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
        self.stages: dict[str, Stage] = {}
        self.ledger = costs.Ledger(recipe)
        self.teacher = _original_teacher(recipe)
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
        return Plan(self.recipe, self.teacher, self.stages, [done[name] for name in self.recipe.arms])

    # --- arms -----------------------------------------------------------------------------------------------------------

    def _arm(self, name: str, arm: Arm, done: dict[str, PlannedArm]) -> PlannedArm:
        target = done[arm.compute[3:]].flops if arm.compute else None
        scale = self._scale(name, arm, target) if arm.compute else 1.0
        made = {seed: self._final(name, arm, seed, scale) for seed in self.recipe.seeds}
        evaluate = {seed: self._evaluate(arm.path[-1], handle, seed) for seed, (handle, _) in made.items()}
        for last in evaluate.values():
            for key in self._ancestors(last):
                self.stages[key].arms.add(name)
        final = {seed: handle.get("stage") for seed, (handle, _) in made.items()}
        first = self.recipe.seeds[0]
        return PlannedArm(name, arm, made[first][1], final, evaluate, self._flops(final[first]))

    def _final(self, name: str, arm: Arm, seed: int, scale: float) -> tuple[Handle, Method]:
        """The handle of the arm's last model, and the method of its last stage."""
        method = self.recipe.method
        if len(arm.path) == 1:
            handle = self._trained(arm.path[0], seed)
            self._check_single(name, arm)
            if arm.objective is None:
                return handle, method
            method = self._method(name, arm, arm.path[0], scale)
            more = Sft(optim=method.optim, select=method.select)
            return {"stage": self._sft(arm.path[0], handle, more, self._seed(arm.path[0], seed), continues=True)}, method
        teacher = self._trained(arm.path[0], seed)
        for above, model in pairwise(arm.path):
            method = self._method(name, arm, model, scale)
            teacher = {"stage": self._distill(above, model, teacher, method, seed)}
        return teacher, method

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
        handle, _ = trial._final(name, arm, self.recipe.seeds[0], 1.0)
        total, last = trial._flops(handle["stage"]), trial.stages[handle["stage"]].flops
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
        return self._add("sft", spec, label, name, seed, self.ledger.sft(name, optim), optim.steps)

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
        return self._add("distill", spec, label, name, seed, self.ledger.distill(above, name, method), method.optim.steps)

    def _signal(self, name: str, teacher: Handle, signal: HiddenSignal | TopKSignal, precision: str, seed: int) -> str:
        spec = {"teacher": teacher, "signal": signal.model_dump(), "precision": precision, **self._split("train")}
        return self._add("signal", spec, f"{signal.type} signal of {name}, seed {seed}", name, seed, self.ledger.generate(name))

    def _generate(self, name: str, teacher: Handle, sampler: TeacherSampler | PairSampler, seed: int) -> str:
        spec = {"teacher": teacher, "sampler": sampler.model_dump(include=set(Decoding.model_fields)), "seed": seed, **self._split("train")}
        return self._add("generate", spec, f"generate with {name}, seed {seed}", name, seed, self.ledger.generate(name))

    def _evaluate(self, name: str, model: Handle, seed: int) -> str:
        reference = self._trained(self.teacher, seed)
        refs = self.recipe.data.test
        sets = [{"ref": r.model_dump(), "fingerprint": datasets.fingerprint(r, "test", self.recipe.data)} for r in refs]
        spec = {"model": model, "teacher": reference, "sets": sets, "limit": self.recipe.data.limit.test, "data": self.data}
        spec |= {"decoding": self.recipe.evaluate.model_dump()}
        of = self.stages[model["stage"]].label if "stage" in model else name
        return self._add("evaluate", spec, f"evaluate {of}", name, self._seed(name, seed), None)

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
            spec["decoding"] = self.recipe.evaluate.model_dump() | {"seeds": self.recipe.evaluate.seeds[:1]}
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

    def _add(self, kind: str, spec: dict, label: str, model: str, seed: int, flops: float | None, steps: int | None = None) -> str:
        key = key_of({"kind": kind, "version": STAGE_VERSION[kind], **spec})
        if key not in self.stages:
            parents = {role: k for role in ("student", "teacher", "model", "responses", "signal") for k in _stage_keys(spec.get(role))}
            self.stages[key] = Stage(kind, key, spec, parents, label, model, seed, flops, steps)
        return key

    # --- costs ----------------------------------------------------------------------------------------------------------

    def _ancestors(self, key: str) -> set[str]:
        found, todo = set(), [key]
        while todo:
            at = todo.pop()
            if at not in found:
                found.add(at)
                todo += self.stages[at].parents.values()
        return found

    def _flops(self, key: str | None) -> float | None:
        """Training FLOPs of a stage and everything it builds on, each stage once."""
        if key is None:
            return 0.0
        parts = [self.stages[k].flops for k in self._ancestors(key)]
        return None if any(p is None for p in parts) else float(sum(p for p in parts if p is not None))


def _original_teacher(recipe: Recipe) -> str:
    """The one model that every KL is measured to: `teacher`, or the only head of a path that nothing teaches."""
    if recipe.teacher:
        return recipe.teacher
    taught = {model for arm in recipe.arms.values() for model in arm.path[1:]}
    heads = list(dict.fromkeys(arm.path[0] for arm in recipe.arms.values() if len(arm.path) > 1 and arm.path[0] not in taught))
    if len(heads) > 1:
        raise ConfigError(f"the paths start from {', '.join(heads)}; set `teacher:` to the one that KLs are measured to")
    return heads[0] if heads else next(iter(recipe.arms.values())).path[0]


def _stage_keys(handle: Handle | None) -> list[str]:
    """The stages a handle stands on (at most one)."""
    if handle is None:
        return []
    return [handle["stage"]] if "stage" in handle else _stage_keys(handle.get("of"))


def _describe(method: Method) -> str:
    sampler = method.sampler
    detail = f" ({method.signal.type} signal)" if method.signal else ""
    if isinstance(sampler, Rounds) and sampler.rollouts:
        detail = f" (rounds of {sampler.rollouts}, {method.round_updates} updates each)"
    return f"{method.objective.type} on {sampler.type}{detail}"
