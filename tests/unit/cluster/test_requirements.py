"""requirements-alliance.txt names what the package needs, no more and no less, and never another version."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[3]


def floors(lines: list[str]) -> dict[str, str]:
    found = (re.match(r"([A-Za-z0-9_.-]+)(?:>=([\d.]+))?", line) for line in lines)
    return {m[1].replace("_", "-").lower(): m[2] or "0" for m in found if m}


def test_the_wheelhouse_file_follows_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = floors([*project["dependencies"], *project["optional-dependencies"]["lora"]])
    listed = floors([line for line in (ROOT / "requirements-alliance.txt").read_text().splitlines() if not line.startswith("#")])
    assert set(listed) == set(needed)
    assert {name: floor for name, floor in listed.items() if floor != "0"} == {name: needed[name] for name in listed if listed[name] != "0"}
