"""The stages of a recipe: each method adds one to the graph, unless it is there, and returns its key or the handle of its model.

What trains, generates, records or measures is described here in full: a stage's settings are all that its numbers depend on. Imports no
torch. The arms are put together of these in `tadistill.plan.arms`.
"""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from tadistill.config import Evaluate, Method, Recipe, Sft
from tadistill.config.common import Decoding
from tadistill.config.method import Optim
from tadistill.config.objective import MiniLLM
from tadistill.config.sampling import HiddenSignal, PairSampler, Rounds, TeacherSampler, TopKSignal
from tadistill.data import datasets
from tadistill.errors import ConfigError
from tadistill.models import sources
from tadistill.models.counting import shapes
from tadistill.plan.costs import Cost, Ledger
from tadistill.plan.graph import Graph, Handle


class Stages:
    """The stages of one recipe in one graph."""

    def __init__(self, recipe: Recipe, graph: Graph, ledger: Ledger, of_arm: Callable[[str, int], Handle]):
        """`of_arm`: the model that an arm makes with a seed."""
        self.recipe, self.graph, self.ledger, self.of_arm = recipe, graph, ledger, of_arm
        self.data = {
            "template": recipe.data.template,
            "max_prompt": recipe.data.max_prompt,
            "max_length": recipe.data.max_length,
            "world": recipe.data.world.model_dump(),
        }

    # --- models ---------------------------------------------------------------------------------------------------------

    def seed(self, name: str, seed: int) -> int:
        """The seed that a model is trained with where the study's is `seed`."""
        own = self.recipe.models[name].seed
        return seed if own is None else own

    def trained(self, name: str, seed: int, start: Handle | None = None) -> Handle:
        """The model as the study uses it: after its own fine-tuning, if it has one, from its own weights or from others."""
        model, seed = self.recipe.models[name], self.seed(name, seed)
        handle = start or self._loaded(name, seed)
        return {"stage": self.sft(name, handle, model.sft, seed)} if model.sft else handle

    def _loaded(self, name: str, seed: int) -> Handle:
        """The model before any training."""
        model = self.recipe.models[name]
        if init := model.init:
            parent = self.trained(init.from_, seed)
            if not init.measured:
                return {"prune": init.layers, "of": parent}
            which = [*init.layers] if isinstance(init.layers, tuple) else init.layers_by
            return {"prune": init.sizes, "layers": which, "of": parent, **self._split("train")}
        if point := model.checkpoint:
            return self.trained(point.of, seed) | {"checkpoint": point.step}
        if temper := model.temper:
            parent = self.trained(temper.of, seed)
            return {"temper": temper.tau, "of": parent} if temper.like is None else {"stage": self._temper(name, parent, temper.like, seed)}
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
        return handle | ({"seed": seed} if model.load.startswith("scratch:") else {})

    def cut_to(self, name: str, source: str, handle: Handle) -> Handle:
        """The weights of `source`, pruned to the size of the model `name`.

        Raises:
            ConfigError: the sizes are not known, or the models are of different families.
        """
        wanted, have = self.ledger.config(name), self.ledger.config(source)
        if wanted is None or have is None:
            raise ConfigError(f"{name} starts from {source}, but the size of one is not known; `tadistill run` needs both on this disk")
        if wanted["model_type"] != have["model_type"]:
            kinds = f"{have['model_type']} and {wanted['model_type']}"
            raise ConfigError(f"{name} cannot start from {source}: they are of the types {kinds}; choose models of one family")
        shape = shapes.shape_of(wanted)
        if shape == shapes.shape_of(have):
            return handle
        try:
            shapes.check_shape(have, shape)
        except ConfigError as error:
            raise ConfigError(f"{name} cannot start from {source}: {error}") from error
        sizes = {key: value for key, value in asdict(shape).items() if key != "head_dim" and value is not None}
        return {"prune": sizes, "layers": "influence", "of": handle, **self._split("train")}

    def _temper(self, name: str, parent: Handle, arm: str, seed: int) -> str:
        """A teacher whose mean entropy on dev responses is that of an arm's model."""
        spec = {"teacher": parent, "like": self.of_arm(arm, seed), **self._split("dev"), "batch": self.recipe.evaluate.batch}
        return self.graph.add("temper", spec, f"temper {name} like {arm}, seed {seed}", name, seed, Cost())

    # --- training -------------------------------------------------------------------------------------------------------

    def sft(self, name: str, student: Handle, sft: Sft, seed: int, continues: bool = False) -> str:
        """Supervised fine-tuning; `continues` where it comes after the model's own."""
        if sft.select.metric == "reverse_kl":
            raise ConfigError(f"models.{name}: sft has no teacher, so it cannot select by reverse_kl; use loss, rouge_l or last")
        optim = self.with_steps(sft.optim)
        spec = {"student": student, "optim": optim.model_dump(), "seed": seed, **self._split("train")}
        spec |= self._select(sft.select) | self._lora(name)
        if sft.keep:
            assert optim.steps is not None
            if max(sft.keep) > optim.steps:
                raise ConfigError(f"models.{name}.sft.keep has {max(sft.keep)}, but its training has {optim.steps} updates; lower it")
            spec["keep"] = sorted(set(sft.keep))
        label = f"sft {name}{', continued' if continues else ''}, seed {seed}"
        return self.graph.add("sft", spec, label, name, seed, self.ledger.sft(name, optim, sft.select), optim.steps)

    def distill(self, teachers: list[tuple[str, Handle]], name: str, student: Handle, method: Method, seed: int, turn: int = 0) -> str:
        """Teach a model: `teachers` from big to small, several of them with dense guidance.

        Args:
            turn: how often the arm has taught this model before; later turns go through the prompts in another order.
        """
        # a learner and a teacher that do not vary with the study's seed still make one distillation per seed
        (above, teacher), *others = teachers
        spec = {"student": student, "teacher": teacher, "seed": _seed_of_turn(seed, turn)}
        spec |= self._split("train")
        spec |= {"method": method.model_dump(exclude={"optim", "select", "dense"}), "optim": method.optim.model_dump()}
        spec |= self._select(method.select) | self._lora(name)
        names = [n for n, _ in teachers]
        if others and method.dense:
            weights = method.dense.weights
            if weights and len(weights) != len(teachers):
                raise ConfigError(
                    f"dense.weights has {len(weights)} entries, but {name} has {len(teachers)} teachers ({', '.join(names)}); "
                    "give one each, or leave them out for equal weights"
                )
            spec |= {"dense": method.dense.model_dump(), "assistants": [handle for _, handle in others]}
        if method.signal:
            spec["signal"] = {"stage": self._signal(above, teacher, method.signal, method.optim.precision, seed)}
        if isinstance(method.sampler, TeacherSampler | PairSampler):
            spec["responses"] = {"stage": self._generate(above, teacher, method.sampler, seed)}
        if isinstance(method.objective, MiniLLM) and method.objective.pt_weight and self.recipe.data.corpus:
            corpus = self.recipe.data.corpus
            spec["corpus"] = {"ref": corpus.model_dump(), "fingerprint": datasets.fingerprint(corpus, "train", self.recipe.data)}
        again = f" (turn {turn + 1})" if turn else ""
        label = f"distill {' + '.join(names)} -> {name}{again}, {_describe(method)}, {method.optim.steps} updates, seed {seed}"
        return self.graph.add("distill", spec, label, name, seed, self.ledger.distill(tuple(names), name, method), method.optim.steps)

    def _lora(self, name: str) -> dict[str, Any]:
        """What alone a model trains, where that is not everything."""
        lora = self.recipe.models[name].lora
        return {"lora": lora.model_dump()} if lora else {}

    def _signal(self, name: str, teacher: Handle, signal: HiddenSignal | TopKSignal, precision: str, seed: int) -> str:
        spec = {"teacher": teacher, "signal": signal.model_dump(), "precision": precision, **self._split("train")}
        label = f"{signal.type} signal of {name}, seed {seed}"
        return self.graph.add("signal", spec, label, name, seed, self.ledger.signal(name, signal))

    def _generate(self, name: str, teacher: Handle, sampler: TeacherSampler | PairSampler, seed: int) -> str:
        spec = {"teacher": teacher, "sampler": sampler.model_dump(include=set(Decoding.model_fields)), "seed": seed, **self._split("train")}
        return self.graph.add("generate", spec, f"generate with {name}, seed {seed}", name, seed, self.ledger.generate(name, sampler))

    # --- measuring ------------------------------------------------------------------------------------------------------

    def evaluate(self, name: str, model: Handle, seed: int, decoding: Evaluate, other: str = "") -> str:
        """A model on the test sets, under one decoding."""
        spec = {"model": model, **self._test_sets(), "decoding": decoding.model_dump(exclude={"also"}), "references": not other}
        label = f"evaluate {self._label(name, model)}{f', {other}' if other else ''}"
        return self.graph.add("evaluate", spec, label, name, self.seed(name, seed), None)

    def analyse(self, name: str, models: list[Handle], seed: int, answers: str, original: str) -> str:
        """The last of a path's models beside the original teacher and the models between them."""
        teacher = self.trained(original, seed)
        teacher_answers = self.evaluate(original, teacher, seed, self.recipe.evaluate)
        spec = {"model": models[-1], "teacher": teacher, "assistants": [m for m in models[:-1] if m != teacher], **self._test_sets()}
        spec |= {"answers": {"stage": answers}, "teacher_answers": {"stage": teacher_answers}, "batch": self.recipe.evaluate.batch}
        return self.graph.add("analyse", spec, f"analyse {self._label(name, models[-1])}", name, self.seed(name, seed), None)

    def probe(self, name: str, model: Handle, seed: int, prompts: int) -> str:
        """A model by itself on the first dev prompts, with answers from its own distribution."""
        own, main = Decoding(max_new_tokens=self.recipe.evaluate.max_new_tokens), self.recipe.evaluate
        decoding = own.model_dump() | {"seeds": main.seeds[:1], "batch": main.batch}
        spec = {"model": model, "decoding": decoding, **self._split("dev"), "dev_limit": prompts}
        return self.graph.add("probe", spec, f"probe {name}", name, self.seed(name, seed), None)

    def pair(self, teacher: tuple[str, Handle], learner: tuple[str, Handle], answers: str, seed: int, prompts: int, k: int) -> str:
        """A learner beside a bigger model, on the answers of the learner's probe; the `k` likeliest tokens are compared."""
        (above, handle), (name, model) = teacher, learner
        spec = {"model": model, "teacher": handle, "answers": {"stage": answers}, "k": k, **self._split("dev"), "dev_limit": prompts}
        spec["batch"] = self.recipe.evaluate.batch
        return self.graph.add("pair", spec, f"pair {above} -> {name}", name, self.seed(name, seed), None)

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

    def with_steps(self, optim: Optim) -> Optim:
        """Updates instead of epochs."""
        if optim.steps is None and optim.epochs is None:
            raise ConfigError("an optim has neither `steps` nor `epochs`; give one, for instance optim: {epochs: 3}")
        if optim.steps is not None and optim.epochs is not None:
            raise ConfigError(f"an optim has both steps {optim.steps} and epochs {optim.epochs}; give one of them")
        if optim.epochs is not None:
            steps = max(1, round(optim.epochs * self.ledger.rows / optim.batch))
            return optim.model_copy(update={"steps": steps, "epochs": None})
        return optim


def _describe(method: Method) -> str:
    sampler = method.sampler
    detail = f" ({method.signal.type} signal)" if method.signal else ""
    if isinstance(sampler, Rounds) and sampler.rollouts:
        detail = f" (rounds of {sampler.rollouts}, {method.round_updates} updates each)"
    return f"{method.objective.type} on {sampler.type}{detail}"


def _seed_of_turn(seed: int, turn: int) -> int:
    if turn == 0:
        return seed
    from tadistill import rng  # here: numpy, which few plans need

    return rng.torch_seed(seed, "then", turn)
