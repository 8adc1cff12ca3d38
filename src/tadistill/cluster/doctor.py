"""`tadistill doctor`: is this machine ready for studies and jobs, and what to do where it is not. Imports no torch.

checks = examine(runs=Path("runs"), recipe=None, profile=None)
console.print(table(checks))
"""

import os
import platform
from importlib import metadata
from pathlib import Path

from rich.table import Table

from tadistill.cluster import checks
from tadistill.cluster.checks import Check
from tadistill.cluster.profile import Profile
from tadistill.config import Recipe
from tadistill.disk import cache_root
from tadistill.store import store_of

_STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red"}


def examine(*, runs: Path, recipe: Recipe | None = None, profile: Profile | None = None) -> list[Check]:
    """Look at everything. With a profile a login node of that cluster is expected, with a recipe its models and data are looked for."""
    from huggingface_hub import constants  # here: the rest of the commands need no hub

    site, environment = (profile.name if profile else None), os.environ
    found = [*_package(on_cluster=profile is not None), checks.gpus(), checks.slurm(site)]
    found.append(checks.account(profile.account if profile else None, environment))
    found.append(checks.modules(profile.modules if profile else (), environment))
    places = {"runs": runs} | ({"scratch": Path(environment["SCRATCH"])} if environment.get("SCRATCH") else {})
    hub = Path(constants.HF_HUB_CACHE)
    found += checks.quota(places | {"hub cache": hub})
    found += [checks.space(name, path) for name, path in places.items()]
    found.append(checks.cache("hub cache", "HF_HOME", hub, site, environment))
    found.append(checks.cache("cache", "TADISTILL_CACHE", cache_root(), site, environment))
    found += checks.store(store_of(runs).root)
    found.append(checks.data_root((recipe.data.root if recipe else None) or environment.get("TADISTILL_DATA")))
    if recipe:
        found.append(checks.fetched(recipe, runs, site))
    return found


def _package(*, on_cluster: bool) -> list[Check]:
    """Python, packages, and what the wheelhouse lacks."""
    try:
        wanted, requirements = metadata.metadata("tadistill")["Requires-Python"], metadata.requires("tadistill") or []
    except metadata.PackageNotFoundError:
        return [
            Check(
                "packages",
                "warning",
                "tadistill itself is not installed",
                "pip install -e . (or a wheel of it), so that versions are known",
            )
        ]
    found = [checks.python(platform.python_version(), wanted), checks.packages(requirements)]
    gaps = checks.wheelhouse(requirements) if on_cluster else None
    return [*found, gaps] if gaps else found


def table(found: list[Check]) -> Table:
    """One row a check."""
    shown = Table(box=None)
    for column in ("check", "state", "found", "what to do"):
        shown.add_column(column, no_wrap=column in ("check", "state"), overflow="fold")
    for check in found:
        shown.add_row(check.name, f"[{_STYLES[check.state]}]{check.state}[/]", _literal(check.found), _literal(check.fix))
    return shown


def _literal(text: str) -> str:
    return text.replace("[", "\\[")
