"""Test sets that stand between commas on the command line."""

import pytest

from tadistill.cli.running import _sets


@pytest.mark.parametrize(
    ("text", "sets"),
    [
        ("dolly, self_inst", ["dolly", "self_inst"]),
        ("a,b.jsonl", ["a,b.jsonl"]),
        ("dolly,a,b.jsonl,c.jsonl", ["dolly", "a,b.jsonl", "c.jsonl"]),
        ("a,x.jsonl", ["a", "x.jsonl"]),
        ("", []),
    ],
)
def test_a_comma_in_a_path_does_not_split_it(tmp_path, monkeypatch, text, sets):
    monkeypatch.chdir(tmp_path)
    for name in ("a,b.jsonl", "c.jsonl"):
        (tmp_path / name).touch()
    assert _sets(text) == sets
