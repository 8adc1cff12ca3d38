"""One process fills a folder that is new or empty: wholly, or not at all."""

import os
import signal
import tempfile
import threading
from pathlib import Path

import pytest

from tadistill.errors import ConfigError, StoreError
from tadistill.report.export import filling


def test_a_folder_that_another_process_has_filled_is_said(tmp_path):
    """The second of two exports into one new folder said that it has written it."""
    target, said = tmp_path / "new", "new is filled by another process, so nothing is written there; give the name"

    def fill(text: str) -> None:
        with filling(target) as folder:
            if text == "second":
                fill("first")
            folder.mkdir(exist_ok=True)
            (folder / "file").write_text(text)

    with pytest.raises(StoreError, match=said):
        fill("second")
    with pytest.raises(ConfigError, match=r"new is not an empty directory \(it has file\)"):
        fill("third")
    assert (target / "file").read_text() == "first"
    assert os.listdir(tmp_path) == ["new"]


def test_only_one_process_fills_an_empty_folder(tmp_path):
    """The files of two exports into one empty folder were mixed, and if one of them failed, those of both were deleted."""
    with filling(tmp_path) as folder:
        with pytest.raises(StoreError, match=r"is filled by another process, .* has left \.\.tadistill\.new\.\S+ in it"), filling(tmp_path):
            pass
        folder.mkdir()
        (folder / "file").touch()
    assert os.listdir(tmp_path) == ["file"]
    with pytest.raises(ConfigError, match=r"is not an empty directory \(it has file\)"), filling(tmp_path):
        pass
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("killed", ["while it writes", "while it moves the files"])
def test_a_killed_process_leaves_an_empty_folder_as_it_was(tmp_path, monkeypatch, killed):
    """It left its files there, and the next export into this folder refused them."""
    if not (process := os.fork()):
        try:
            with filling(tmp_path) as folder:
                for name in ("a", "b"):
                    folder.mkdir(exist_ok=True)
                    (folder / name).write_text(name)
                    if killed == "while it writes":
                        os.kill(os.getpid(), signal.SIGKILL)
                monkeypatch.setattr("pathlib.Path.rmdir", lambda path: os.kill(os.getpid(), signal.SIGKILL))
        finally:
            os._exit(1)  # else this process would go on with the tests
    os.waitpid(process, 0)
    if killed == "while it writes":
        assert [path for path in tmp_path.iterdir() if not path.name.startswith(".")] == []
        with filling(tmp_path) as folder:
            folder.mkdir()
            (folder / "c").touch()
        assert os.listdir(tmp_path) == ["c"]
        return
    (tmp_path / "b").rename(tmp_path / ".tadistill.new" / "b")  # as if it was killed between two files
    with (
        pytest.raises(ConfigError, match=r"is complete: an earlier process had written all its files.*; for another export, give"),
        filling(tmp_path),
    ):
        pass
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_one_of_two_processes_that_begin_at_the_same_moment_fills_an_empty_folder(tmp_path, monkeypatch):
    """Each saw the other's temporary folder, and both gave up."""
    made, both, said = tempfile.mkdtemp, threading.Barrier(2), []

    def make(**settings) -> str:
        both.wait(10)
        found = made(**settings)
        both.wait(10)
        return found

    def fill(name: str) -> None:
        try:
            with filling(tmp_path) as folder:
                folder.mkdir()
                (folder / name).touch()
        except StoreError as error:
            said.append((name, str(error)))

    monkeypatch.setattr("tempfile.mkdtemp", make)
    processes = [threading.Thread(target=fill, args=(name,)) for name in "ab"]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    ((second, message),) = said
    assert f"{tmp_path.name} is filled by another process, so nothing is written there" in message
    assert os.listdir(tmp_path) == [{"a": "b", "b": "a"}[second]]


def test_the_files_of_a_process_that_ends_a_moment_earlier_are_kept_alone(tmp_path, monkeypatch):
    def replaced(source: Path, target: Path) -> None:
        (tmp_path / "other").touch()
        os.rename(source, target)

    def fill() -> None:
        with filling(tmp_path) as folder:
            folder.mkdir()
            (folder / "mine").touch()

    monkeypatch.setattr("os.replace", replaced)
    with pytest.raises(StoreError, match="is filled by another process, so nothing"):
        fill()
    assert os.listdir(tmp_path) == ["other"]
