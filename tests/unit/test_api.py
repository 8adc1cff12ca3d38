"""The Python API records the call that made its numbers."""

import pytest

from tadistill import api
from tadistill.config import parse
from tadistill.errors import ConfigError

RECIPE = """
study: calls
seeds: [1]
models: {a: {load: scratch:gpt2, tokenizer: tinyworld, config: {n_embd: 16, n_layer: 1, n_head: 2, n_positions: 64}}}
data: {train: tinyworld, dev: tinyworld, test: [tinyworld]}
arms: {a: a}
"""


@pytest.fixture
def commands(monkeypatch, tmp_path):
    """The commands that were recorded; nothing is run."""
    found = []

    def run_study(recipe, *, runs, recipe_text, command):
        found.append(command)
        return tmp_path

    monkeypatch.setattr(api, "run_study", run_study)
    monkeypatch.setattr(api, "read_results", lambda study, store: study)
    monkeypatch.setattr(api, "write_report", lambda results: results / "report.html")
    return found


def test_the_recorded_command_is_the_call(commands, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(RECIPE, encoding="utf-8")
    api.run(recipe)
    api.run(recipe, ["seeds=[2]", "evaluate.temperature=0"], runs=tmp_path)
    api.run(parse(RECIPE, [], source="r.yaml"))
    path = repr(str(recipe))
    assert commands == [
        f"tadistill.run({path})",
        f"tadistill.run({path}, ['seeds=[2]', 'evaluate.temperature=0'], runs={str(tmp_path)!r})",
        "tadistill.run(recipe)",
    ]


def test_overrides_need_a_file(commands):
    with pytest.raises(ConfigError, match=r"overrides \['seeds=\[2\]'\] apply to a recipe's file"):
        api.run(parse(RECIPE, [], source="r.yaml"), ["seeds=[2]"])
    assert commands == []
