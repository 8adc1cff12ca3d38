"""Find studies on this disk, and read their names and the names of their arms."""

import difflib
import json
from pathlib import Path

from tadistill.config.load import study_in
from tadistill.config.shipped import located
from tadistill.errors import ConfigError


def find_study(study: str, root: Path) -> Path:
    """Return a study's directory from its name, its path, or its recipe (a path, or the name of a shipped recipe).

    Raises:
        ConfigError: there is no such study.
    """
    recipe = study_in(located(study))
    name = study_in(Path(study)) or study
    for directory in (Path(name), root / name, root / (recipe or name)):
        if (directory / "plan.json").is_file():
            return directory
    close = difflib.get_close_matches(name, studies(root), n=1)
    hint = f"did you mean `{close[0]}`?" if close and not recipe else f"start one with `tadistill run {study if recipe else 'RECIPE'}`"
    raise ConfigError(f"there is no study `{name}` in {root}; {hint}")


def studies(root: Path) -> list[str]:
    """Return the names of all studies in a directory of runs."""
    return sorted(path.parent.name for path in root.glob("*/plan.json"))


def arms(study_dir: Path) -> list[str]:
    """Return the names of a study's arms; none if its plan cannot be read."""
    try:
        return [arm["name"] for arm in json.loads((study_dir / "plan.json").read_text(encoding="utf-8"))["arms"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []
