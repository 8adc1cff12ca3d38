"""Listing studies and deleting stages that no study needs."""

import json
import os
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tadistill import __version__
from tadistill.cli import app
from tadistill.cluster.list_and_clean import delete, studies, unneeded
from tadistill.errors import StoreError
from tadistill.runner.local import Journal
from tadistill.store import Store

ALL = ["a" * 16, "b" * 16, "c" * 16, "d" * 16]


@pytest.fixture
def store(tmp_path):
    """A store with a chain a <- b of one study, and the stages c and d of none."""
    store = Store(tmp_path / "store")
    for key, parents in zip(ALL, ({}, {"teacher": "a" * 16}, {}, {}), strict=True):
        folder = store.begin(key, {"kind": "sft", "label": f"stage [{key[0]}]", "parents": parents})
        (folder / "weights").write_bytes(b"x" * 1000)
        store.finish(key, {"key": key})
    study = tmp_path / "mine"
    study.mkdir()
    (study / "plan.json").write_text(json.dumps({"created": "2026-01-02T03:04:05+00:00", "stages": [{"key": "b" * 16}]}))
    return store


def tadistill(store, *arguments, **options):
    return CliRunner().invoke(app, [*arguments, "--runs", str(store.root.parent)], **options)


def test_what_no_study_needs(store, tmp_path):
    assert {row.key for row in unneeded(tmp_path, store)} == {"c" * 16, "d" * 16}  # a is a parent of b
    other = tmp_path / "searched"
    other.mkdir()
    (other / "search.json").write_text(json.dumps({"stages": ["c" * 16]}))
    assert [row.key for row in unneeded(tmp_path, store)] == ["d" * 16]
    Journal(other, done=0, total=1, complain=pytest.fail, needs=["d" * 16]).save()
    assert unneeded(tmp_path, store) == []


def test_a_stage_that_runs_is_kept(store, tmp_path):
    told = []
    with store.lock("c" * 16):
        assert [row.key for row in unneeded(tmp_path, store)] == ["d" * 16]
        assert delete(store, ["c" * 16], told.append) == 0
    assert "is not deleted, because a process has begun to work on it" in told[0]
    assert store.finished("c" * 16)


def test_a_store_that_cannot_be_written_is_said_and_not_called_needed(store, tmp_path, monkeypatch):
    for key in "cd":
        store.folder(key * 16).with_suffix(".lock").touch()  # of an earlier run

    def refused(lock, **_):
        if "d" * 16 in str(lock.lock_file):
            raise OSError(30, "Read-only file system")

    monkeypatch.setattr("filelock.FileLock.acquire", refused)
    assert "2 stages (2" in tadistill(store, "clean", "--dry-run").output
    error = str(tadistill(store, "clean", "--yes").exception)
    assert re.fullmatch(rf"cannot delete .*{'d' * 16}: Read-only file system; check permissions. 1\.\d kB were freed", error)
    assert [store.finished(key) for key in ALL] == [True, True, False, True]


def test_a_stage_in_use_is_not_called_needed(store, tmp_path):
    with store.lock("c" * 16), store.lock("d" * 16):
        assert "every stage in the store belongs to a study or is in use" in tadistill(store, "clean").output


def test_clean_asks_and_deletes(store, tmp_path):
    shown = tadistill(store, "clean", "--dry-run").output
    assert "stage [c]" in shown
    assert re.search(r"2 stages \(2\.\d kB\) would be deleted", shown)
    assert "nothing was deleted" in tadistill(store, "clean", input="n\n").output
    assert all(store.finished(key) for key in ALL)
    assert "deleted 2." in tadistill(store, "clean", "--yes").output
    assert [store.finished(key) for key in ALL] == [True, True, False, False]
    assert not store.folder("c" * 16).exists()
    assert "nothing to delete" in tadistill(store, "clean").output


def test_list(store, tmp_path):
    found = tadistill(store, "list").output
    assert "mine" in found
    assert "2026-01-02 03:04" in found
    assert "1/1" in found
    assert "done" in found
    assert re.search(r"no study needs 2 stages \(2\.\d kB\) in the store", found)
    (tmp_path / "mine" / "plan.json").write_text("{")
    assert [row.state for row in studies(tmp_path, store)] == ["plan.json is damaged"]
    assert "there is no study in" in CliRunner().invoke(app, ["list", "--runs", str(tmp_path / "none")]).output


def test_list_breaks_no_name(store, tmp_path):
    name = "a-study-with-a-long-name-" * 3
    (tmp_path / "mine").rename(tmp_path / name)
    (line,) = [line for line in tadistill(store, "list").output.splitlines() if "2026" in line]
    assert line.split() == [name, "2026-01-02", "03:04", "1/1", *line.split()[4:]]


def test_a_damaged_study_deletes_nothing_it_may_need(store, tmp_path, monkeypatch):
    monkeypatch.setattr("pathlib.Path.read_bytes", lambda self: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    with pytest.raises(StoreError, match=r"plan.json \(Input/output error\), so the stages that mine needs are not known"):
        unneeded(tmp_path, store)


def refused(error=13, only="mine"):
    """A replacement of `os.scandir` by one that cannot read folders of one name."""
    real = os.scandir

    def scandir(path="."):
        if Path(path).name == only:
            raise OSError(error, os.strerror(error), str(path))
        return real(path)

    return scandir


@pytest.mark.parametrize("name", ["mine", "local"])
def test_a_folder_that_cannot_be_read_deletes_nothing(store, tmp_path, monkeypatch, name):
    """`clean` offered the stages of the study for deletion, and `list` ended with a traceback."""
    (tmp_path / "mine" / "local").mkdir()
    monkeypatch.setattr("os.scandir", refused(only=name))
    with pytest.raises(StoreError, match=rf"{name} \(Permission denied\), so the stages that mine needs are not known; check its perm"):
        unneeded(tmp_path, store)
    found = tadistill(store, "list").output
    assert ("cannot be read (Permission denied)" in found) == (name == "mine")
    assert "so the stages that mine needs are not known" in " ".join(found.split())


@pytest.mark.parametrize("place", ["gone", "mine/earlier", "mine/old.json"])
def test_a_link_that_leads_nowhere_deletes_nothing(store, tmp_path, place):
    """It may lead to a study on a disk that is not mounted."""
    (tmp_path / place).symlink_to("/not/mounted")
    with pytest.raises(StoreError, match=rf"{place} \(No such file.* needs are not known; mount the disk of /not/mounted, or corr"):
        unneeded(tmp_path, store)
    assert "until then, `tadistill clean` deletes nothing" in " ".join(tadistill(store, "list").output.split())
    if place == "gone":
        assert re.search(r"gone .* cannot be read \(No such file", tadistill(store, "list").output)


def test_linked_folders_are_read(store, tmp_path, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "plan.json").write_text(json.dumps({"stages": [{"key": "c" * 16}]}))
    (elsewhere / "circle").symlink_to(tmp_path / "mine")
    (tmp_path / "mine" / "earlier").symlink_to(elsewhere)
    assert [row.key for row in unneeded(tmp_path, store)] == ["d" * 16]


def test_links_and_files_of_other_programs_keep_no_stages_from_being_deleted(store, tmp_path, tmp_path_factory, monkeypatch):
    """W&B leaves links to logs that it has deleted."""
    data, logs = tmp_path_factory.mktemp("datasets"), tmp_path / "mine" / "wandb" / "run-1" / "logs"
    (data / "rows.json").write_text("c" * 16)
    logs.mkdir(parents=True)
    for link, target in (("debug-core.log", "/gone/core.log"), ("media.json", "/gone/media.json"), ("latest", "/gone/run")):
        (logs / link).symlink_to(target)
    (tmp_path / "mine" / "wandb" / "latest-run").symlink_to("run-0")
    (tmp_path / "mine" / "notes.txt").symlink_to("/gone/notes.txt")
    (tmp_path / "mine" / "data").symlink_to(data)
    (logs.parent / "closed").mkdir()
    monkeypatch.setattr("os.scandir", refused(only="closed"))
    (tmp_path / "wandb").mkdir()  # of a training without tadistill
    (tmp_path / "wandb" / "latest-run").symlink_to("run-0")
    assert [row.key for row in unneeded(tmp_path, store)] == ["c" * 16, "d" * 16]


@pytest.mark.parametrize("target", ["/closed/data", "data"])
def test_a_link_of_a_study_that_cannot_be_followed_keeps_no_stages(store, tmp_path, target):
    (tmp_path / "mine" / "data").symlink_to(target)
    assert [row.key for row in unneeded(tmp_path, store)] == ["c" * 16, "d" * 16]


@pytest.mark.parametrize("link", ["old/qwen2.5-0.5b", "old/notes.txt", "mine/first/second", "archive/second", "group/v", "group/remote/v"])
def test_a_link_that_leads_nowhere_deletes_nothing_also_in_a_folder_of_studies(store, tmp_path, tmp_path_factory, link):
    """A dot in a study's name was taken for the suffix of a file, and a study called `local` made its group a study."""
    archive = tmp_path_factory.mktemp("archive")
    (tmp_path / "archive").symlink_to(archive)
    (tmp_path / "mine" / "my-archive").symlink_to(archive)
    for study in ("group/local", "group/local/study", "wandb", "mine/first/third", "archive/first"):
        (tmp_path / study).mkdir(parents=True, exist_ok=True)
        (tmp_path / study / "plan.json").write_text('{"stages": []}')
    (tmp_path / link).parent.mkdir(exist_ok=True)
    (tmp_path / link).symlink_to("/not/mounted")
    with pytest.raises(StoreError, match=rf"{link} \(No such file.* needs are not known; mount the disk of /not/mounted"):
        unneeded(tmp_path, store)


@pytest.mark.parametrize("link", ["notes/data", "notes/rows.json", "notes/2024/run.log", "my-data/raw"])
def test_a_link_that_leads_nowhere_in_a_users_folder_in_a_study_keeps_no_stages(store, tmp_path, tmp_path_factory, link):
    """It stopped `clean`, although no study stands there."""
    (tmp_path / "mine" / "my-data").symlink_to(tmp_path_factory.mktemp("my-data"))
    (tmp_path / "mine" / link).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "mine" / link).symlink_to("/gone/data")
    assert [row.key for row in unneeded(tmp_path, store)] == ["c" * 16, "d" * 16]


@pytest.mark.parametrize(
    ("link", "other"), [("mine/archive", "2024/two"), ("mine/notes/archive", "2024/two"), ("mine/wandb/archive", "two")]
)
def test_studies_behind_a_link_in_a_study_keep_their_stages(store, tmp_path, tmp_path_factory, link, other):
    """The link was not followed, because it does not lead to a study itself, and `clean` offered the stages of the studies for deletion."""
    archive = tmp_path_factory.mktemp("archive")
    for name, key in (("one", "c"), (other, "d")):
        (archive / name).mkdir(parents=True)
        (archive / name / "plan.json").write_text(json.dumps({"stages": [{"key": key * 16}]}))
    (tmp_path / link).parent.mkdir(exist_ok=True)
    (tmp_path / link).symlink_to(archive)
    (archive / "circle").symlink_to(tmp_path)
    assert unneeded(tmp_path, store) == []
    (archive / "three").symlink_to("/not/mounted")
    with pytest.raises(StoreError, match=r"archive/three \(No such file.*; mount the disk of /not/mounted, or correct or delete the link"):
        unneeded(tmp_path, store)


def test_a_link_to_all_data_of_a_user_is_not_searched_to_its_end(store, tmp_path, tmp_path_factory, monkeypatch):
    """`clean` asked for every file behind the links of each study, and read JSON files there."""
    data, read = tmp_path_factory.mktemp("data"), list[str]()
    (data / "a" / "b" / "c").mkdir(parents=True)
    (data / "a" / "rows.json").write_text("c" * 16)
    (tmp_path / "other").mkdir()
    for study in ("mine", "other"):
        (tmp_path / study / "plan.json").write_text('{"stages": []}')
        (tmp_path / study / "data").symlink_to(data)
    real = os.scandir
    monkeypatch.setattr("os.scandir", lambda path=".": read.append(os.path.realpath(path)) or real(path))
    assert {row.key for row in unneeded(tmp_path, store)} == {*ALL}
    assert [os.path.relpath(path, data) for path in read if path.startswith(str(data))].count(".") == 1
    assert not any(path.endswith("/a/b/c") for path in read)


def test_the_store_of_another_runs_directory_keeps_no_stages(store, tmp_path, tmp_path_factory):
    """Its manifests name their own keys, so `clean` kept every stage that is in both stores."""
    old = tmp_path_factory.mktemp("old")
    Store(old / "store").begin("c" * 16, {})
    Store(old / "store").finish("c" * 16, {"key": "c" * 16})
    (old / "first").mkdir()
    (old / "first" / "plan.json").write_text('{"stages": []}')
    (tmp_path / "old").symlink_to(old)
    (tmp_path / "mine" / "old").symlink_to(old)
    assert {row.key for row in unneeded(tmp_path, store)} == {"c" * 16, "d" * 16}


def test_a_plan_of_another_program_behind_a_link_is_no_study(store, tmp_path, tmp_path_factory):
    """A link beside it that leads nowhere stopped `clean`."""
    projects = tmp_path_factory.mktemp("projects")
    (projects / "terraform").mkdir()
    (projects / "terraform" / "plan.json").write_text("{}")
    (projects / "gone").symlink_to("/gone")
    (tmp_path / "mine" / "projects").symlink_to(projects)
    assert {row.key for row in unneeded(tmp_path, store)} == {"c" * 16, "d" * 16}


def test_a_linked_folder_of_studies_is_followed(store, tmp_path, tmp_path_factory):
    archive = tmp_path_factory.mktemp("archive")
    for name, key in (("one", "c"), ("wandb", "d")):  # a study may have the name of a tracker
        (archive / name).mkdir()
        (archive / name / "plan.json").write_text(json.dumps({"stages": [{"key": key * 16}]}))
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "2024").symlink_to(archive)
    assert unneeded(tmp_path, store) == []


def test_studies_that_were_moved_into_a_folder_keep_their_stages(store, tmp_path, tmp_path_factory, monkeypatch):
    elsewhere, old = tmp_path_factory.mktemp("elsewhere"), tmp_path / "old"
    for folder, key in ((elsewhere, "c"), (old / "first", "d")):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "plan.json").write_text(json.dumps({"stages": [{"key": key * 16}]}))
    (old / "second").symlink_to(elsewhere)
    assert unneeded(tmp_path, store) == []
    (old / "third").symlink_to("/not/mounted")
    with pytest.raises(StoreError, match=r"third \(No such file.*, so the stages that old needs are not known"):
        unneeded(tmp_path, store)
    (old / "third").unlink()
    monkeypatch.setattr("os.scandir", refused(only="first"))
    with pytest.raises(StoreError, match=r"first \(Permission denied\), so the stages that old needs are not known"):
        unneeded(tmp_path, store)


def test_a_runs_directory_that_cannot_be_read_is_no_empty_one(store, tmp_path, monkeypatch):
    monkeypatch.setattr("pathlib.Path.iterdir", lambda _: (_ for _ in ()).throw(OSError(13, "Permission denied")))
    with pytest.raises(StoreError, match=f"cannot read the runs directory {tmp_path}: Permission denied; check its permissions"):
        unneeded(tmp_path, store)


def test_version_help_and_completion():
    run = CliRunner().invoke
    assert run(app, ["--version"]).output == f"tadistill {__version__}\n"
    assert "White-box distillation" in run(app, ["-h"]).output
    assert "RECIPE" in run(app, ["plan", "-h"]).output
    assert "--show-completion" in run(app, ["-h"]).output


def test_a_search_is_shown_from_its_first_stage_on(store, tmp_path, monkeypatch):
    """`list` left it out, and `status` knew nothing of it, because it has no plan.json."""
    monkeypatch.setattr("sys.argv", ["tadistill", "search", "my.yaml"])
    study = tmp_path / "found"
    run = Journal(study, done=1, total=2, complain=pytest.fail, needs=["c" * 16, "e" * 16])
    run.log("start")
    for ended in ("interrupted", "finished"):
        run.run.ended = ended
        run.save()
        said = " ".join(tadistill(store, "status", "found").output.split())
        assert "stage [c]" in said
        assert "a stage that has not started" in said
        assert "`tadistill search my.yaml` continues the search" in said
        assert re.search(rf"found .* 1/2 .* search {'not running' if ended == 'finished' else ended}", tadistill(store, "list").output)
    result = {"stages": ["c" * 16], "metric": "loss", "paths": [{"path": ["l", "s"], "mean": 1.0}], "expected_best_of": {"k": 3}}
    store.finish("e" * 16, {})
    (study / "search.json").write_text(json.dumps(result))
    said = " ".join(tadistill(store, "status", "found").output.split())
    assert "the search chose l > s (dev loss 1), the best of 3 paths this is the direct path, so there is" in said
    assert "`tadistill search my.yaml` shows all paths, and trains nothing" in said
    (study / "confirm.yaml").touch()
    assert "confirm.yaml --runs" in tadistill(store, "status", "found").output
    assert re.search("found .* 2/2 .* search finished", tadistill(store, "list").output)
    assert "found is a search, which has no page" in str(tadistill(store, "watch", "found").exception)
    (study / "search.json").write_text("{")
    assert re.search("found .* search.json is damaged", tadistill(store, "list").output)
