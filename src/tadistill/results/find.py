"""Find studies, their arms and their trained models on this disk."""

import difflib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from tadistill.config.load import study_in
from tadistill.config.recipe_files import located
from tadistill.errors import ConfigError, StoreError
from tadistill.store import Store

if TYPE_CHECKING:
    from tadistill.results.study import StudyPlan


def find_study(study: str, root: Path) -> Path:
    """Return a study's directory. `study` is its name, its directory, or its recipe (a file, or the name of a recipe of the package).

    Raises:
        ConfigError: there is no such study.
    """
    recipe = study_in(located(study))
    name = study_in(Path(study)) or study
    for directory in (Path(name), root / name, root / (recipe or name)):
        if (directory / "plan.json").is_file():
            return directory
    if study.endswith((".yaml", ".yml")) and recipe is None:
        raise ConfigError(f"{study} is not a recipe that can be read; give the name of a study, or the recipe that it was run from")
    close = difflib.get_close_matches(name, studies(root), n=1)
    hint = f"did you mean `{close[0]}`?" if close and not recipe else f"start one with `tadistill run {study if recipe else 'RECIPE'}`"
    raise ConfigError(f"there is no study `{name}` in {root}; {hint}")


def studies(root: Path) -> list[str]:
    """Return the names of all studies in a runs directory."""
    return sorted(path.parent.name for path in root.glob("*/plan.json"))


def arms(study_dir: Path) -> list[str]:
    """Return the names of a study's arms (paths of models). The result is empty if the plan cannot be read."""
    try:
        return [arm["name"] for arm in json.loads((study_dir / "plan.json").read_text(encoding="utf-8"))["arms"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def trained_model(plan: "StudyPlan", store: Store, name: str, seed: int | None) -> tuple[Path, int]:
    """Return the directory of an arm's trained model and its training seed. The files of the model are checked.

    Args:
        seed: a training seed. None selects the recipe's first finished seed.

    Raises:
        ConfigError: the arm or the seed does not exist, or the arm trains no model.
        StoreError: the training is not finished, or a file has changed.
    """
    arm = next((arm for arm in plan.arms if arm.name == name), None)
    if arm is None:
        raise ConfigError(f"study {plan.study} has no arm `{name}`; its arms are {', '.join(arm.name for arm in plan.arms)}")
    if seed is None:
        finished = {s for s, key in arm.final.items() if key is not None and store.finished(key)}
        seed = arm.first_seed(finished)
    if seed not in arm.final:
        raise ConfigError(f"arm {name} has no seed {seed}; its seeds are {', '.join(map(str, sorted(arm.final)))}")
    key = arm.final[seed]
    if key is None:
        raise ConfigError(
            f"arm {name} only uses model {arm.model} and does not train it, so there is nothing to export; "
            "choose an arm that trains a model"
        )
    folder = store.folder(key) / "model"
    if not store.finished(key):
        raise StoreError(f"arm {name} with seed {seed} is not trained yet (stage {key}): run `{plan.command}` to finish it")
    store.check([key], [name for name in store.manifest(key).get("files", ()) if name.startswith("model/")])
    if not folder.is_dir():
        raise StoreError(f"{folder} does not exist; delete {folder.parent} and run `{plan.command}` again")
    return folder, seed
