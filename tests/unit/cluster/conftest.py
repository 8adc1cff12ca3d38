"""Programs that only pretend."""

import stat

import pytest


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """A PATH of its own; call it with a name and a line of shell to put a program there."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def put(name: str, script: str) -> None:
        path = folder / name
        path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    return put
