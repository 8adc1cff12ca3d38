"""What the package, its recipes and its pages say about other files: every file that they name exists."""

import re
import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]
NAMED = re.compile(r"(?<![\w/])((?:docs|recipes|examples|benchmarks)/[\w./-]*\w\.\w+)")
GENERATED = {"code.md", "commands.md", "glossary.md", "keys.md"}
"""Pages that docs/hooks.py writes."""


def texts() -> list[Path]:
    """Return the files that users read: messages and comments of the package, recipes, pages."""
    folders = [ROOT / name for name in ("src", "recipes", "examples", "benchmarks", "docs")]
    files = [path for folder in folders for path in folder.rglob("*") if path.suffix in (".py", ".yaml", ".md", ".j2")]
    return sorted([*files, *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "pyproject.toml", "Makefile"))])


def test_files_that_a_text_names_exist():
    missing = {}
    for path in texts():
        named = set(NAMED.findall(re.sub(r"\]\([^)]*\)", "", path.read_text(encoding="utf-8"))))  # links are relative to the page
        if wrong := sorted(name for name in named if not (ROOT / name).exists() and Path(name).name not in GENERATED):
            missing[str(path.relative_to(ROOT))] = wrong
    assert not missing


def test_links_of_a_page_lead_to_files():
    """`make docs` also checks anchors and generated pages, but only where mkdocs is installed."""
    missing = {}
    for path in (ROOT / "docs").rglob("*.md"):
        targets = re.findall(r"\]\(([^)\s#]+)", re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL))
        local = {target for target in targets if "://" not in target and Path(target).name not in GENERATED}
        if wrong := sorted(target for target in local if not (path.parent / target).exists()):
            missing[str(path.relative_to(ROOT))] = wrong
    assert not missing


def test_the_index_of_results_has_the_pages_answers():
    script = runpy.run_path(str(ROOT / "docs/index_results.py"))
    advice = "run `python docs/index_results.py`"
    assert (ROOT / "docs/results/index.md").read_text(encoding="utf-8") == script["index"](), advice
    assert (ROOT / "README.md").read_text(encoding="utf-8") == script["readme"](), advice
