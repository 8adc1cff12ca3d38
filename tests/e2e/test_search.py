"""A search for a path through the command line: what is trained, what is written, and that it is done once."""

import json
from collections import Counter
from pathlib import Path

from tests.e2e.inprocess import tadistill

from tadistill.config import load

RECIPE = Path(__file__).with_name("recipe.yaml")
LATTICE = ["seeds=[1]", "models.l.config.n_embd=28", "search.teacher=xl", "search.assistants=[l]", "search.student=s"]


def search(runs: Path, *overrides: str, code: int = 0) -> str:
    done = tadistill("search", str(RECIPE), *LATTICE, *overrides, "--runs", str(runs))
    assert done.code == code, done.out + done.err
    return done.out + done.err


def kinds(runs: Path) -> Counter:
    return Counter(json.loads(path.read_text())["kind"] for path in runs.glob("store/*/*/manifest.json"))


def test_a_search_trains_each_prefix_once_and_writes_its_choice(tmp_path):
    text = search(tmp_path)
    assert kinds(tmp_path) == {"sft": 3, "distill": 3}  # xl > s, xl > l, l > s
    for part in ("xl > l > s", "xl > s", "dev rouge_l", "chosen", "(C_search)", "pays for 3 distillations", "by 0.56 standard errors"):
        assert part in text
    study = tmp_path / "tiny"
    record = json.loads((study / "search.json").read_text())
    assert {tuple(p["path"]) for p in record["paths"]} == {("xl", "s"), ("xl", "l", "s")}
    assert max(record["paths"], key=lambda p: p["mean"])["path"] == record["chosen"]
    assert (study / "confirm.yaml").is_file() == (len(record["chosen"]) == 3)
    if len(record["chosen"]) == 3:
        assert list(load(study / "confirm.yaml").arms) == ["direct", "chain", "twin"]
    assert not (study / "plan.json").exists()  # that belongs to `tadistill run`
    before = (study / "search.json").read_bytes()
    assert "0 to run" in search(tmp_path)
    assert kinds(tmp_path) == {"sft": 3, "distill": 3}
    assert (study / "search.json").read_bytes() == before
    text = search(tmp_path, "search.budget=0.1", code=2)
    assert "the cheapest allowed path, xl > s, costs 1.00 ×" in " ".join(text.split())
