"""Files of finished stages: a change is found, the stage is named, and what mends it is said; nothing is hashed without need."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tadistill import store as module
from tadistill.errors import StoreError
from tadistill.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Two finished stages."""
    store = Store(tmp_path / "store", "tadistill run r.yaml seeds=[1]")
    for key in ("aa11", "bb22"):
        folder = store.begin(key, {"label": f"evaluate {key[0]}"})
        (folder / "scores.json").write_text("[1, 2]")
        (folder / "model").mkdir()
        (folder / "model" / "weights").write_bytes(b"0123")
        store.finish(key, {"key": key})
    return store


def test_an_unchanged_file_is_not_hashed(store, monkeypatch):
    monkeypatch.setattr(module, "sha256", lambda path: pytest.fail("hashed"))
    assert store.artifact("aa11", "scores.json").read_text() == "[1, 2]"
    assert store.artifact("aa11", "no such file") == store.folder("aa11") / "no such file"


def test_a_copied_store_is_hashed_and_accepted(store, tmp_path):
    shutil.copytree(store.root, tmp_path / "copy", copy_function=shutil.copyfile)
    copy = Store(tmp_path / "copy")
    for name in ("scores.json", "model/weights"):
        os.utime(copy.folder("aa11") / name, (1, 1))
        assert copy.artifact("aa11", name).is_file()


@pytest.mark.parametrize("content", ["[1, 3]", "{}", ""])
def test_a_changed_file_names_stage_folder_and_command(store, content):
    path = store.folder("aa11") / "scores.json"
    path.write_text(content)
    os.utime(path, (1, 1))
    with pytest.raises(StoreError) as caught:
        store.artifact("aa11", "scores.json")
    assert str(caught.value) == (
        f"{path} has changed since its stage wrote it (stage evaluate a (aa11)): delete {store.folder('aa11')} and run "
        "`tadistill run r.yaml seeds=[1]` again"
    )


def test_all_changed_files_are_named(store):
    for key, name in (("aa11", "scores.json"), ("aa11", "model/weights"), ("bb22", "scores.json")):
        (store.folder(key) / name).write_text("changed here")
    with pytest.raises(StoreError) as caught:
        store.check(["aa11", "bb22", "cc33"], ["scores.json", "model/weights", "other.json"])
    for said in ("evaluate a (aa11)", "evaluate b (bb22)", "weights has changed", f"delete {store.folder('aa11')}, {store.folder('bb22')}"):
        assert said in str(caught.value)


def test_a_file_without_permission_is_not_to_be_deleted(store, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(module, "sha256", refuse)
    os.utime(store.folder("aa11") / "scores.json", (1, 1))
    with pytest.raises(StoreError, match=r"scores\.json cannot be read \(Permission denied\): check its permissions"):
        store.artifact("aa11", "scores.json")


@pytest.mark.parametrize("lost", [("stat",), ("stat", "files")])
def test_manifests_of_earlier_versions_are_read(store, lost):
    """One has digests only; one that has none vouches for nothing, and its files are read."""
    path = store.folder("aa11") / "manifest.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in content.items() if k not in lost}))
    assert store.artifact("aa11", "scores.json").is_file()
    (store.folder("aa11") / "scores.json").write_text("[9, 9]")
    if "files" in lost:
        assert store.artifact("aa11", "scores.json").is_file()
    else:
        with pytest.raises(StoreError, match="has changed"):
            store.artifact("aa11", "scores.json")


KILLED = """
import resource, signal, sys
import numpy
from safetensors.numpy import save_file
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
save_file({"weight": numpy.zeros(1000)}, sys.argv[1])
"""


@pytest.mark.parametrize("attempts", [1, 2])
def test_weights_of_a_killed_process_are_no_part_of_the_finished_stage(tmp_path, attempts):
    """safetensors writes to a temporary file of its own."""
    store = Store(tmp_path / "store")
    folder = store.begin("aa11", {})
    (folder / "model").mkdir()
    ended = subprocess.run([sys.executable, "-c", KILLED, folder / "model" / "model.safetensors"], check=False)
    assert ended.returncode == -signal.SIGXFSZ
    assert len(os.listdir(folder / "model")) == 1
    if attempts == 2:
        store.begin("aa11", {})
        assert not os.listdir(folder / "model")  # its space is free before the second attempt
    (folder / "model" / "model.safetensors").write_bytes(b"0123")
    store.finish("aa11", {})
    assert os.listdir(folder / "model") == ["model.safetensors"]
    assert set(store.manifest("aa11")["files"]) == {"stage.json", "model/model.safetensors"}


def test_a_hidden_folder_in_an_unfinished_stage_ends_nothing(tmp_path):
    store = Store(tmp_path / "store")
    (store.begin("aa11", {}) / ".tmp-of-a-library").mkdir()
    assert (store.begin("aa11", {}) / ".tmp-of-a-library").is_dir()
