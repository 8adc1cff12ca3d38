"""Find a study on this disk, read its plan, and find the models that it trained. A stage is one step of a study, such as a training."""

import math
import shlex
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tadistill.config.arm import Control, Published, flat, marked, members, path_text, read_control, routed
from tadistill.config.data import drawn_text, training_refs, training_shares
from tadistill.config.evaluate import declare_own_metrics
from tadistill.config.load import study_in
from tadistill.config.recipe_files import located
from tadistill.disk import from_home, read_json
from tadistill.errors import ConfigError, StoreError, did_you_mean
from tadistill.runner.local import is_search, not_planned
from tadistill.store import Store, command_for, named_runs, plan_again, runs_directory, with_store


@dataclass(frozen=True)
class StageRecord:
    """One stage of the plan. `arms` names the arms that use its result."""

    key: str
    kind: str
    label: str
    model: str
    seed: int
    arms: tuple[str, ...]
    parents: tuple[str, ...]
    """The keys of the stages whose results this stage uses."""
    like: str | None
    """The key of the stage that made the model whose entropy is wanted, if this stage searches for a temperature. With the temperature that
    is found, a teacher has the same mean entropy as this model. The FLOPs of the stage `like` do not count for the arms of the search.

    None for all other stages, and if no stage made the model whose entropy is wanted.
    """
    checkpoints: int
    """Number of checkpoints among which the best on dev was chosen. It is 0 if the stage chose none."""
    flops: float | None
    """Training FLOPs. None if the plan could not compute them."""


@dataclass(frozen=True)
class PhaseRecord:
    """One phase of an arm's last distillation. `settings` is a text with the settings that differ between phases of the same objective and
    sampler.
    """

    objective: str
    sampler: str
    settings: str
    share: float
    """Share of the updates, as written in the recipe."""
    updates: int


@dataclass(frozen=True)
class ArmRecord:
    """One arm (a named path of models) of the plan.

    `evaluate`, `analyse` and `final` map each training seed to the key of a stage: the evaluation, the analysis, and the training of the
    final model. `final` has None for a model that is not trained. `also` maps each additional decoding to its evaluations.
    """

    name: str
    path: tuple[str, ...]
    """The last path of the arm, which ends with the arm's model."""
    path_text: str
    """The whole path in the notation of a recipe: ``xl > l > s``."""
    models: tuple[str, ...]
    """All models that the arm uses: in its path, in earlier paths (`then`), and to initialise other models."""
    method: str
    model: str
    compute: str | None
    flops: float | None
    evaluate: Mapping[int, str]
    analyse: Mapping[int, str]
    also: Mapping[str, Mapping[int, str]]
    final: Mapping[int, str | None]
    published: Published | None
    inexact: tuple[str, ...] = ()
    """Sentences, without a full stop: which losses of the arm are only approximate, and for which teachers the FLOPs are not known."""
    phases: tuple[PhaseRecord, ...] = ()
    """The phases of the last distillation, one after the other. Empty if no model teaches the arm's model."""
    across: tuple[tuple[str, str], ...] = ()
    """The steps of the path, as pairs (teacher, student), whose two models have different tokenizers."""
    teacher_budget: str | None = None
    """The recipe's rule for the number of teacher tokens, such as ``as direct``. See `teacher_tokens`."""
    teacher_tokens: float | None = None
    """Number of answer tokens that the original teacher writes or scores for the arm, for one seed. None if it is not known."""
    of_budget: float | None = None
    """The arm's FLOPs divided by those that `compute` sets, without the original teacher's own training. None if it is not known."""

    @property
    def shown_path(self) -> str:
        """The whole path for readers. ``~>`` marks a step between two tokenizers, such as ``xl ~> l > s``."""
        return marked(self.path_text, self.across)

    def measured_by(self, seed: int) -> tuple[str, ...]:
        """Return the keys of all stages that measure the arm's model, for one training seed."""
        analyse = (self.analyse[seed],) if seed in self.analyse else ()
        return (self.evaluate[seed], *analyse, *(keys[seed] for keys in self.also.values()))

    def first_seed(self, finished: Container[int]) -> int:
        """Return the first finished training seed, in the order of the recipe. If none is finished, return the first seed."""
        seeds = list(self.final)
        return next((seed for seed in seeds if seed in finished), seeds[0])

    @property
    def is_trained(self) -> bool:
        """True if the study trained the arm's model. Otherwise the arm only uses a finished model."""
        return any(key is not None for key in self.final.values())

    @property
    def is_taught(self) -> bool:
        """True if a model teaches the arm's model. A model may teach itself."""
        return len(self.path) > 1

    @property
    def is_phased(self) -> bool:
        """True if the last distillation has several phases, each with its own method."""
        return len(self.phases) > 1

    @property
    def control(self) -> Control | None:
        """If the arm is a control of another arm: the kind of control, and the name of the other arm. Else None."""
        if self.path_text == path_text(self.path):  # names of models may contain commas
            return None
        marks = [mark.removeprefix("control ") for mark in self.path_text.split(", ")[1:] if mark.startswith("control ")]
        return read_control(marks[0]) if marks else None

    @property
    def is_chain(self) -> bool:
        """True if at least one teacher assistant is between the teacher and the student."""
        return len(set(self.path)) > 2

    @property
    def is_plain(self) -> bool:
        """True if the arm is one simple path: each model teaches the next one, and no model is used in any other way."""
        text = path_text(self.path)
        dense = f"{text}, dense" if len(self.path) == 2 else text  # one teacher: nothing to mix
        return self.path_text in (text, dense) and not self.is_routed

    @property
    def is_routed(self) -> bool:
        """True if the arm's last path begins with several teachers, each for some of the training sets."""
        return routed((self.path,))

    @property
    def assistants(self) -> tuple[str, ...]:
        """All models of the arm except its student and the first teachers of its last path."""
        return tuple(model for model in self.models if model not in (*members(self.path[0]), self.model))

    @property
    def has_assistant(self) -> bool:
        """True if the arm uses at least three models, because it has a teacher assistant or several first teachers."""
        return len(self.models) > 2


@dataclass(frozen=True)
class StudyPlan:
    """The content of ``plan.json``. It is written when a study starts."""

    study: str
    created: str
    command: str
    recipe_text: str
    recipe: Mapping[str, Any]
    """The recipe with all defaults, as plain data."""
    teacher: str | None
    margin: float
    """The largest difference in the primary metric, in points, that counts as no difference."""
    decodings: Mapping[str, Mapping[str, Any]]
    """Maps the name of each additional decoding to the settings that it changes."""
    parameters: Mapping[str, int]
    """The number of parameters of each model. It is 0 for a model behind an API, whose size is not known."""
    bases: Mapping[str, str]
    """Maps each LoRA adapter among the models to its base model (a Hub id or a directory)."""
    stages: tuple[StageRecord, ...]
    arms: tuple[ArmRecord, ...]
    tokenizers: tuple[tuple[str, ...], ...] = ()
    """Groups of models that share a tokenizer. Empty in a plan of an earlier version, in which all models share one."""
    seen: tuple[str, ...] = ()  # sentences without a full stop: which test sets have prompts of the training sets

    def from_big(self, models: Iterable[str]) -> list[str]:
        """Return the models from big to small. A model whose size is not known comes first."""
        return sorted(models, key=lambda model: -(self.parameters[model] or math.inf))

    @property
    def drawn(self) -> str:
        """A sentence that gives the share of each training set in the training rows. It is empty if there is one set."""
        data = self.recipe["data"]
        shares = training_shares(data)
        return drawn_text(shares, dev="load" not in data["dev"]) if shares else ""

    @property
    def train_source(self) -> str:
        """The sources of the training rows, joined by ``+``."""
        return " + ".join(ref["load"] for ref in training_refs(self.recipe["data"]))

    @cached_property
    def _by_key(self) -> Mapping[str, StageRecord]:
        return {stage.key: stage for stage in self.stages}

    def ancestors(self, key: str | None, *, paid: bool = False) -> list[StageRecord]:
        """Return a stage and all stages whose results it uses. The list is empty if `key` is None (a model that is not trained).

        With `paid`, only stages whose FLOPs count for an arm are returned. `StageRecord.like` explains which do not count.
        """
        stages, found = self._by_key, dict[str, StageRecord]()
        todo = [key] if key is not None else []
        while todo:
            at = todo.pop()
            if at in stages and at not in found:
                found[at] = stages[at]
                todo += [parent for parent in stages[at].parents if not paid or parent != stages[at].like]
        return list(found.values())


def load_plan(study_dir: Path) -> StudyPlan:
    """Read ``plan.json``. Raises StoreError if the file is missing or damaged."""
    path = study_dir / "plan.json"
    if not path.is_file():
        raise StoreError(f"{path} does not exist, so there is no study to report; start a study with `tadistill run RECIPE`")
    content = read_json(path, fix=plan_again(study_dir))
    try:
        plan = StudyPlan(
            study=content["study"],
            created=content["created"],
            command=content["command"],
            recipe_text=content["recipe_text"],
            recipe=content["recipe"],
            teacher=content["teacher"] or content["recipe"].get("teacher"),  # without `analyse`, the plan compares with none
            margin=float(content["recipe"]["margin"]),
            decodings=content["recipe"]["evaluate"]["also"],
            parameters={name: int(model["parameters"]) for name, model in content["models"].items()},
            bases={name: str(model["base"]) for name, model in content["models"].items() if model.get("base")},
            stages=tuple(_stage(entry) for entry in content["stages"]),
            arms=tuple(_arm(entry) for entry in content["arms"]),
            tokenizers=tuple(map(tuple, content.get("tokenizers", ()))),
            seen=tuple(content.get("seen", ())),
        )
        declare_own_metrics(plan.recipe)
        for name in {name for arm in plan.arms for name in (*flat(arm.path), arm.model)}:
            plan.parameters[name]  # an arm with an undeclared model also means a damaged plan
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(f"{path} is damaged ({type(error).__name__}: {error}); {plan_again(study_dir)}") from error
    return plan


def _stage(entry: Mapping[str, Any]) -> StageRecord:
    key, kind, label, model = (entry[name] for name in ("key", "kind", "label", "model"))
    parents, arms = tuple(entry["parents"].values()), tuple(entry["arms"])
    like, checkpoints = entry["parents"].get("like"), int(entry["checkpoints"])
    return StageRecord(key, kind, label, model, int(entry["seed"]), arms, parents, like, checkpoints, entry["flops"])


def _arm(entry: Mapping[str, Any]) -> ArmRecord:
    published = entry["published"]
    return ArmRecord(
        name=entry["name"],
        path=tuple(entry["path"]),
        models=tuple(entry.get("models", entry["path"])),
        path_text=entry.get("text") or path_text(entry["path"]),  # a plan of an earlier version has only `path`
        method=entry["method"] if any(entry["final"].values()) else "not trained",
        model=entry["model"],
        compute=entry["compute"],
        flops=entry["flops"],
        evaluate=_by_seed(entry["evaluate"]),
        analyse=_by_seed(entry["analyse"]),
        also={name: _by_seed(keys) for name, keys in entry["also"].items()},
        published=Published(source=published["source"], rouge_l=published["rouge_l"]) if published else None,
        final={int(seed): key for seed, key in entry["final"].items()},
        inexact=tuple(entry.get("inexact", ())),
        phases=tuple(PhaseRecord(**phase) for phase in entry.get("phases", ())),  # a plan of an earlier version has none
        across=tuple((above, below) for above, below in entry.get("across", ())),
        teacher_budget=entry.get("teacher_budget"),
        teacher_tokens=entry.get("teacher_tokens"),
        of_budget=entry.get("of_budget"),
    )


def _by_seed(keys: Mapping[str, str]) -> dict[int, str]:
    return {int(seed): key for seed, key in keys.items()}


def find_study(study: str, runs: str | Path | None, *, searches: bool = False) -> tuple[Path, Store]:
    """Return a study's directory and its store. `study` is its name, its directory, or its recipe (a file, or a name of the package).
    Raises ConfigError if there is no such study, or only a search without `searches`, and NotPlanned if a process is just planning it."""
    root, given = runs_directory(runs), from_home(study, "the study")
    recipe, name = study_in(located(given)), study_in(given) or str(given)
    here, there = [Path(name)], [root / name, root / (recipe or name)]
    bare = recipe is not None or Path(study).name == study  # not a path, such as ./s, which comes before the variable TADISTILL_RUNS
    folders = [*there, *here] if runs or (named_runs(runs) and bare) else [*here, *there]
    early = not_planned(*folders)  # asked first, because the plan may be written in between
    if found := next((folder for folder in folders if (folder / "plan.json").is_file()), None):
        return with_store(found, runs)
    if early:
        raise early
    if found := next(filter(is_search, folders), None):
        folder, store = with_store(found, runs)
        if searches:
            return folder, store
        shown = command_for("status", folder, store=store)
        raise ConfigError(f"{folder.name} is a search, which has no page and no report; `{shown}` shows it")
    if study.endswith((".yaml", ".yml")) and recipe is None:
        raise ConfigError(f"{study} is not a recipe that can be read; give the name of a study, or the recipe that it was run from")
    start = f"start one with `tadistill run {shlex.quote(study) if recipe else 'RECIPE'}`"
    raise ConfigError(f"there is no study `{name}` in {root.absolute()}; {start if recipe else did_you_mean(name, studies(root), start)}")


def studies(root: Path) -> list[str]:
    """Return the names of all studies in a runs directory."""
    return sorted(path.parent.name for path in root.glob("*/plan.json"))


def trained_model(plan: StudyPlan, store: Store, name: str, seed: int | None) -> tuple[Path, int]:
    """Return the directory of an arm's trained model and its training seed. The files of the model are checked.

    Args:
        seed: a training seed. None selects the recipe's first finished seed.

    Raises:
        ConfigError: the arm or the seed does not exist, or the arm trains no model.
        StoreError: the training is not finished, or a file has changed.
    """
    arm = next((arm for arm in plan.arms if arm.name == name), None)
    if arm is None:
        own = f"; to export model {name} itself, add the arm `{name}: {name}` to the recipe" if name in plan.parameters else ""
        raise ConfigError(f"study {plan.study} has no arm `{name}`; its arms are {', '.join(arm.name for arm in plan.arms)}{own}")
    if seed is None:
        finished = {s for s, key in arm.final.items() if key is not None and store.finished(key)}
        seed = arm.first_seed(finished)
    if seed not in arm.final:
        raise ConfigError(f"arm {name} has no seed {seed}; its seeds are {', '.join(map(str, sorted(arm.final)))}")
    key = arm.final[seed]
    if key is None:
        why = f"arm {name} only uses model {arm.model} and does not train it, so there is nothing to export"
        raise ConfigError(f"{why}; choose an arm that trains a model")
    if not store.finished(key):
        raise StoreError(f"arm {name} with seed {seed} is not trained yet (stage {key}): run `{plan.command}` to finish it")
    store.check([key], [name for name in store.manifest(key).get("files", ()) if name.startswith("model/")])
    folder = store.folder(key) / "model"
    if not folder.is_dir():  # the manifest of a stage may not name the files of the model
        raise StoreError(f"{folder} does not exist; delete {folder.parent} and run `{plan.command}` again")
    return folder, seed
