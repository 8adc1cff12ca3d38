"""One writer for all files, digests, and JSON that may be damaged."""

import os
import platform
import signal

import pytest

from tadistill.disk import (
    cache_root,
    digest,
    from_home,
    publishing,
    read_json,
    read_jsonl,
    sha256,
    stream_jsonl,
    write_json,
    write_rows,
    write_text,
    writing,
)
from tadistill.errors import ConfigError, StageFailed, StoreError, no_file
from tadistill.store import runs_directory


def test_a_written_file_is_whole_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "new" / "a.json"
    write_json(path, {"é": [1, 2.5]})
    assert read_json(path) == {"é": [1, 2.5]}
    write_rows(path.with_name("rows.jsonl"), [{"a": "x\u2028y"}, {"a": 2}])
    assert read_jsonl(path.with_name("rows.jsonl")) == [{"a": "x\u2028y"}, {"a": 2}]
    assert sorted(os.listdir(path.parent)) == ["a.json", "rows.jsonl"]
    places = [place for place, _ in stream_jsonl(path.with_name("rows.jsonl"))]
    assert next(stream_jsonl(path.with_name("rows.jsonl"), start=places[1])) == (places[1], {"a": 2})


def test_rows_are_written_as_they_come_and_a_failure_leaves_the_old_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_rows(path, [{"a": 1}])

    def rows():
        yield {"a": 2}
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        write_rows(path, rows())
    assert read_jsonl(path) == [{"a": 1}]
    assert os.listdir(tmp_path) == ["rows.jsonl"]


def test_content_is_on_the_disk_before_the_name(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *arguments, name=name, real=real: (calls.append(name), real(*arguments))[1])
    write_text(tmp_path / "a", "x")
    assert calls == ["fsync", "replace"]


def test_what_cannot_be_written_is_one_sentence_and_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match=r"cannot write .*a\.txt: No space left on device; free some space or check permissions, then"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize(
    ("content", "words"), [("{", r"Expecting property name"), (None, "No such file"), ("\xff", "codec can't decode|Expecting value")]
)
def test_a_damaged_file_is_named_with_what_to_do(tmp_path, content, words):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content.encode("latin-1"))
    with pytest.raises(StoreError, match=rf"a\.json cannot be read \(.*({words}).*\): delete it and fetch again"):
        read_json(path, fix="delete it and fetch again")


@pytest.mark.parametrize("read", [read_json, read_jsonl])
def test_without_permission_a_file_is_not_to_be_deleted(tmp_path, monkeypatch, read):
    def refuse(path, *arguments, **options):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.open", refuse)
    with pytest.raises(StoreError, match=r"a\.json cannot be read \(Permission denied\): check its permissions: its owner lets"):
        read(tmp_path / "a.json", fix="delete it")


@pytest.mark.parametrize("line", ["[1]", "{"])
def test_a_damaged_line_is_named(tmp_path, line):
    (tmp_path / "a.jsonl").write_text(f'{{"a": 1}}\n\n{line}\n')
    with pytest.raises(StoreError, match=r"a\.jsonl cannot be read \(line 3"):
        read_jsonl(tmp_path / "a.jsonl")


def test_a_digest_is_of_what_is_there_now(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"1")
    assert sha256(path) == digest(path) == "6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b"
    path.write_bytes(b"22")
    assert sha256(path) == digest(path) != "6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b"


def test_a_file_in_the_place_of_a_folder_is_said(tmp_path):
    (tmp_path / "runs").write_text("")
    for write in (write_text, write_rows):
        with pytest.raises(StoreError, match=r"cannot write .*: .*; one of the folders in this path is a file; choose another folder"):
            write(tmp_path / "runs" / "study" / "a", "x")


def test_a_cache_that_cannot_be_written_is_named_with_its_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("TADISTILL_CACHE", "/dev/null/x")
    words = r"cannot write /dev/null/x/gguf/a: Not a directory; .* \(the variable TADISTILL_CACHE sets the folder of the cache\)"
    with pytest.raises(StoreError, match=words), publishing(cache_root() / "gguf" / "a"):
        pass
    with pytest.raises(StoreError, match=r"cannot write .*/b: No space left on device; free some space"), publishing(tmp_path / "b"):
        raise OSError(28, "No space left on device")
    with pytest.raises(StoreError, match=r"cannot write .*/b: Permission denied"), publishing(tmp_path / "b") as temporary:
        raise OSError(13, "Permission denied", str(temporary / "config.json"))
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(13, "Permission denied", "/data/model.gguf"),
        OSError(5, "Input/output error"),
        RuntimeError("a shape is wrong"),
        StageFailed("rows.jsonl has changed"),
    ],
    ids=repr,
)
def test_an_error_of_the_source_is_not_one_of_writing_its_copy(tmp_path, error):
    with pytest.raises(type(error)) as found, publishing(tmp_path / "b"):
        raise error
    assert found.value is error
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("error", [StageFailed("rows.jsonl has changed"), StoreError("cannot write /a: no space")], ids=repr)
def test_an_error_that_says_what_is_wrong_keeps_its_words(tmp_path, error):
    with pytest.raises(type(error)) as found, writing(tmp_path):
        raise error
    assert found.value is error


def test_an_unknown_home_folder_does_not_hide_an_error_of_writing(tmp_path, monkeypatch):
    monkeypatch.setenv("TADISTILL_CACHE", "~nobody-here/x")
    with pytest.raises(StoreError, match=r"cannot write .*: No space left on device; free some space"), writing(tmp_path):
        raise OSError(28, "No space left on device")


def test_what_a_killed_process_has_left_is_deleted_by_the_next(tmp_path):
    target, process = tmp_path / "a[1]", os.fork()
    if not process:
        try:
            with publishing(target) as folder:
                folder.mkdir()
                (folder / "half").touch()
                os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)  # else this process would go on with the tests
    os.waitpid(process, 0)
    (left,) = tmp_path.iterdir()
    host = platform.node()
    for folder in (
        f".a[1].{host}.mymodels",
        f".a[1].{host}.old_ones/a[1]",
        f".a1.{host}.abcdefgh",
        ".a[1].abcdefgh",
    ):  # nobody knows whose they are
        (tmp_path / folder).mkdir(parents=True)
    others = {*tmp_path.iterdir()} - {left}
    with publishing(target) as first, publishing(target) as second:
        assert first.parent.is_dir()  # it is being written
        second.mkdir()
        first.mkdir()
    assert {*tmp_path.iterdir()} == {*others, target}


def test_what_a_process_on_another_machine_writes_is_not_deleted(tmp_path, monkeypatch):
    """On disks such as Lustre with `localflock`, the lock of a process counts only on its own machine."""
    with publishing(tmp_path / "a") as first:
        first.mkdir()
        (first.parent / ".tadistill.lock").unlink()
        (first.parent / ".tadistill.lock").touch()  # as seen from there: nobody has it
        with monkeypatch.context() as there:
            there.setattr("platform.node", lambda: "elsewhere")
            with publishing(tmp_path / "a") as second:
                second.mkdir()
        assert first.is_dir()
        with publishing(tmp_path / "a") as second:
            second.mkdir()
        assert not first.is_dir()
        first.mkdir(parents=True)


def test_a_lock_that_cannot_be_released_hides_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("filelock.FileLock.release", lambda *_, **__: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    with publishing(tmp_path / "a") as folder:
        folder.mkdir()
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("error", [OSError(37, "No locks available"), NotImplementedError()])
def test_a_disk_without_locks_can_be_written(tmp_path, monkeypatch, error):
    monkeypatch.setattr("filelock.FileLock.acquire", lambda *_, **__: (_ for _ in ()).throw(error))
    with publishing(tmp_path / "a") as folder:
        folder.mkdir()
    assert os.listdir(tmp_path) == ["a"]


def test_a_missing_file_is_not_suggested_by_its_own_name(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.symlink_to("gone.jsonl")
    assert no_file(path, [tmp_path], (".jsonl",)) == f"{path} is a link to gone.jsonl, which does not exist; correct the link"
    path.unlink()
    path.mkdir()
    (tmp_path / "row.jsonl").write_text("")
    assert no_file(path, [tmp_path], (".jsonl",)).endswith("did you mean `row.jsonl`?")


def test_the_home_folder_in_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert from_home("~/x", "--runs") == runs_directory("~/x") == tmp_path / "x"
    for name, read in (("TADISTILL_RUNS", runs_directory), ("TADISTILL_CACHE", cache_root)):
        monkeypatch.setenv(name, "~/x")
        assert read() == tmp_path / "x"
        monkeypatch.setenv(name, "~nobody-here/x")
        with pytest.raises(
            ConfigError, match=f"^{name} is `~nobody-here/x`, but there is no home folder of this user; write the whole path$"
        ):
            read()
    with pytest.raises(ConfigError, match=r"^the runs directory is `~nobody-here/x`"):
        runs_directory("~nobody-here/x")
