"""A full disk, damaged and deleted files, a store that cannot be read or written: one sentence, and no finished work is lost."""

import json
import os
import re
import resource
import subprocess
import tempfile
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from tests.unit.runner.small import small

from tadistill.config import parse
from tadistill.errors import Interrupted, StageFailed, StoreError
from tadistill.metrics import training_numbers
from tadistill.plan.arms import make_plan
from tadistill.plan.task import Task, make_task
from tadistill.runner import processes
from tadistill.stages.execute import _choose_allocator, run_stage
from tadistill.store import Store

RECIPE = small("xl")
UPDATES = 8


def tasks(root: Path) -> tuple[Task, Task]:
    """A fine-tuning that saves before each update, and an evaluation that stands on it."""
    plan = make_plan(parse(RECIPE, [], source="small.yaml"))
    made = [replace(make_task(plan, stage, Store(root)), checkpoint_seconds=1e-9) for stage in plan.stages.values()]
    sft, evaluate = (next(task for task in made if task.spec.kind == kind) for kind in ("sft", "evaluate"))
    return sft, evaluate


@dataclass
class Heard:
    """What a stage reported."""

    done: list[int]
    alarms: list[str]


def run(task: Task, *, stop_at: int | None = None, then: Callable[[int], None] = lambda done: None) -> Heard:
    heard = Heard([], [])

    def progress(done: int, total: int, text: str) -> None:
        if training_numbers(text):
            heard.done.append(done)
            then(done)

    run_stage(task, progress=progress, alarm=heard.alarms.append, stop=lambda: heard.done[-1:] == [stop_at])
    return heard


def digests(task: Task) -> dict[str, str]:
    """Of the files of a finished stage, but for the log, which holds speeds."""
    files = Store(Path(task.store)).manifest(task.key)["files"]
    return {name: value for name, value in files.items() if name != "metrics.jsonl"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, str]:
    """Of an undisturbed run."""
    task, _ = tasks(tmp_path_factory.mktemp("whole"))
    run(task)
    return digests(task)


# --- a full disk --------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["tmpfs", "file size limit"])
def disk(request, tmp_path):
    """A folder, and calls that fill its disk and free it again."""
    root = tmp_path / "disk"
    root.mkdir()
    ballast = root / "ballast"
    if request.param == "tmpfs":
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(root)], capture_output=True, text=True, check=False)
        if mounted.returncode:
            pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")

        def fill() -> None:
            with pytest.raises(OSError, match="No space left"):
                ballast.write_bytes(bytes(4 << 20))

        yield root, fill, lambda: ballast.unlink(missing_ok=True)
        subprocess.run(["umount", str(root)], check=True)
    else:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        yield (
            root,
            lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1])),
            lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before),
        )
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.slow
@pytest.mark.parametrize("at", [3, UPDATES])  # while a state is saved, and while the model is
def test_a_full_disk_is_named_and_the_stage_goes_on_when_there_is_room(disk, at, whole):
    root, fill, free = disk
    task, _ = tasks(root)
    try:
        with pytest.raises(StoreError, match=r"cannot write .*free some space or check permissions, then run the same command again"):
            run(task, then=lambda done: fill() if done == at else None)
    finally:
        free()
    store = Store(root)
    assert not store.finished(task.key)
    state = torch.load(store.folder(task.key) / "state.pt", weights_only=True)
    assert state["step"] == at - 1
    assert run(task).done == list(range(at, UPDATES + 1))
    assert digests(task) == whole


# --- damaged and deleted files ------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    """Leave half of a file."""
    os.truncate(path, path.stat().st_size // 2)


def test_the_time_of_a_stage_includes_earlier_attempts_whose_work_it_continues(tmp_path):
    task, _ = tasks(tmp_path)
    store = Store(tmp_path)
    with pytest.raises(Interrupted):
        run(task, stop_at=3)
    assert 0 < store.seconds(task.key, UPDATES) < 100
    store.save_seconds(task.key, 1000.0)
    run(task)
    assert 1000 < store.manifest(task.key)["seconds"] < 1100
    assert not (store.folder(task.key) / "seconds.json").exists()
    store.save_seconds(task.key, 1000.0)
    assert store.seconds(task.key, UPDATES) == 0  # no saved state: the next attempt would begin again


def test_the_time_of_a_recording_includes_earlier_attempts(tmp_path):
    """Its finished parts are not in the folder of the other stages' parts."""
    store = Store(tmp_path)
    folder = store.folder("abcd") / "signal"
    folder.mkdir(parents=True)
    (folder / "head.safetensors").touch()
    store.save_seconds("abcd", 100.0)
    assert (store.continues("abcd", None), store.seconds("abcd", None)) == ("", 0)
    (folder / "00000000.safetensors").touch()
    assert (store.continues("abcd", None), store.seconds("abcd", None)) == ("after 1 finished part", 100)


@pytest.mark.parametrize("damaged", ["state.pt", "best-4.pt"])
def test_a_damaged_newest_state_is_named_and_the_one_before_used(damaged, tmp_path, whole):
    task, _ = tasks(tmp_path)
    with pytest.raises(Interrupted):
        run(task, stop_at=4)  # the best update known to the newest state is 4, to the one before 2
    folder = Store(tmp_path).folder(task.key)
    cut(folder / damaged)
    heard = run(task)
    (line,) = heard.alarms
    assert f"{damaged} is damaged" in line
    assert line.endswith("the previous state, of update 3, is used instead")
    assert heard.done == [4, 5, 6, 7, 8]
    assert digests(task) == whole


def test_two_damaged_states_are_an_error_that_says_what_to_do(tmp_path, whole):
    task, _ = tasks(tmp_path)
    with pytest.raises(Interrupted):
        run(task, stop_at=4)
    states = sorted(Store(tmp_path).folder(task.key).glob("state*.pt"))
    assert len(states) == 2
    for path in states:
        cut(path)
    with pytest.raises(
        StoreError, match=r"state.pt is damaged .* delete .*/state\*\.pt and run the same command again to repeat the training"
    ):
        run(task)
    for path in states:  # as it says
        path.unlink()
    assert run(task).done == list(range(1, UPDATES + 1))
    assert digests(task) == whole


def test_a_kill_between_two_renames_leaves_the_state_before(tmp_path, whole):
    task, _ = tasks(tmp_path)
    with pytest.raises(Interrupted):
        run(task, stop_at=4)
    (Store(tmp_path).folder(task.key) / "state.pt").unlink()
    heard = run(task)
    assert (heard.done[0], heard.alarms) == (4, [])
    assert digests(task) == whole


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["cut manifest", "other JSON", "deleted file"])
def test_a_stage_that_is_not_whole_is_redone_and_nothing_else(fault, tmp_path, whole):
    sft, evaluate = tasks(tmp_path)
    run(sft)
    run(evaluate)
    store = Store(tmp_path)
    before = (store.folder(evaluate.key) / "manifest.json").stat().st_mtime_ns
    if fault == "cut manifest":
        cut(store.folder(sft.key) / "manifest.json")
    elif fault == "other JSON":
        (store.folder(sft.key) / "manifest.json").write_text("[1]")
    else:
        (store.folder(sft.key) / "model" / "model.safetensors").unlink()
    assert [store.finished(task.key) for task in (sft, evaluate)] == [False, True]
    run(sft)
    assert digests(sft) == whole
    run(evaluate)
    assert (store.folder(evaluate.key) / "manifest.json").stat().st_mtime_ns == before


def test_a_damaged_manifest_does_not_vouch_for_what_is_written_next(tmp_path):
    task, _ = tasks(tmp_path)
    run(task)
    store = Store(tmp_path)
    (store.folder(task.key) / "model" / "config.json").unlink()
    (store.folder(task.key) / "model" / "model.safetensors").write_bytes(b"")
    with pytest.raises(Interrupted):
        run(task, stop_at=2)
    (store.folder(task.key) / "model" / "config.json").write_text("{}")  # as a kill in the middle of writing might leave it
    assert not store.finished(task.key)


def test_a_missing_parent_is_named_before_anything_is_written(tmp_path):
    sft, evaluate = tasks(tmp_path)
    with pytest.raises(StageFailed, match=rf"evaluate sft xl.*{evaluate.key}.* needs {sft.key} as its model, which is not finished"):
        run(evaluate)
    assert list(tmp_path.iterdir()) == []
    run(sft)
    store = Store(tmp_path)
    (store.folder(sft.key) / "model" / "model.safetensors").unlink()
    with pytest.raises(StageFailed, match=rf"needs sft xl.*{sft.key}.*run the recipe again to redo what is missing"):
        run(evaluate)
    assert not store.folder(evaluate.key).exists()


# --- a store that cannot be read or written -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ask", "mode", "words"),
    [
        (lambda store: store.acquire("ab", lambda: None), 0o755, r"cannot write to the store at .*; set --runs DIR to a writable folder"),
        (lambda store: store.finished("ab"), 0o700, r"cannot read the store at .*; check its permissions, or set --runs DIR"),
    ],
    ids=["not writable", "not readable"],
)
def test_a_store_without_permission_is_named(ask, mode, words):
    if os.getuid() != 0:
        pytest.skip("needs root, to become a user without permissions")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(mode)
        os.seteuid(65534)
        try:
            with pytest.raises(StoreError, match=words):
                ask(Store(Path(folder)))
        finally:
            os.seteuid(0)


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path):
    (tmp_path / "runs").write_text("")
    task, _ = tasks(tmp_path / "runs" / "store")
    assert not Store(Path(task.store)).finished(task.key)
    with pytest.raises(StoreError, match=r"cannot write to the store at .*; set --runs DIR to a writable folder"):
        run(task)


def test_what_finished_costs(tmp_path):
    """It is asked for hundreds of stages on a login node: it reads one small file and asks whether others exist."""
    task, _ = tasks(tmp_path)
    run(task)
    folder = Store(tmp_path).folder(task.key)
    named = json.loads((folder / "manifest.json").read_text())["files"]
    assert {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} == {*named, "manifest.json"}
    for path in folder.rglob("*.safetensors"):
        path.write_bytes(b"")  # not read
    assert Store(tmp_path).finished(task.key)


# --- a full GPU ---------------------------------------------------------------------------------------------------------

FULL = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.15 GiB is free. Process 7 has …"


FULL_TOO = [
    "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call",  # no room for a context
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "NCCL Error 1: unhandled cuda error (run with NCCL_DEBUG=INFO for details) Cuda failure 2 'out of memory'",
]


@pytest.mark.parametrize(
    ("error", "words"),
    [(torch.OutOfMemoryError(FULL), r"Tried to allocate 2.00 GiB"), *((RuntimeError(text), text.splitlines()[0]) for text in FULL_TOO)],
)
def test_a_full_gpu_is_one_sentence_with_the_keys_to_change(error, words, tmp_path, monkeypatch):
    freed = []

    def full(context) -> dict:
        model = Mock()
        freed.append(weakref.ref(model))
        raise error

    monkeypatch.setattr("tadistill.stages.execute.work_of", lambda spec: full)
    monkeypatch.setattr("tadistill.stages.execute.Context.close", lambda _: freed.append(freed[0]() is None))
    sft, evaluate = tasks(tmp_path)
    with pytest.raises(
        StageFailed, match=rf"{re.escape(words)}\).*`optim.micro_batch: \d+`, or `optim.grad.*but those with a setting that you"
    ):
        run(sft)
    assert freed[1]  # before the unused memory of the GPU is given back
    assert evaluate.spec.saves_memory(1) == [f"evaluate.batch: {evaluate.spec.decoding.batch // 2}"]


def test_an_error_of_tadistill_that_quotes_full_memory_keeps_its_advice(tmp_path, monkeypatch):
    """The process of vLLM has its own memory; the keys of the training do not help it."""
    sentence = f"the process of vLLM has ended ({FULL}); mend the cause, or set `engine: native`"
    monkeypatch.setattr("tadistill.stages.execute.work_of", lambda spec: Mock(side_effect=StageFailed(sentence)))
    with pytest.raises(StageFailed, match=rf"^{re.escape(sentence)}$"):
        run(tasks(tmp_path)[0])


def test_a_gpus_allocator_has_segments_that_grow_unless_the_user_chose_another(monkeypatch):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    _choose_allocator()
    assert "PYTORCH_ALLOC_CONF" not in os.environ  # no GPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    _choose_allocator()
    assert "PYTORCH_ALLOC_CONF" not in os.environ
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    with monkeypatch.context() as inner:
        inner.setenv("PYTORCH_ALLOC_CONF", "")  # so that the variable is removed at the end
        del os.environ["PYTORCH_ALLOC_CONF"]
        _choose_allocator()
        assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"


@pytest.mark.parametrize(("kind", "kept"), [("sft", [1]), ("evaluate", [])])
def test_only_processes_that_train_keep_freed_memory(monkeypatch, kind, kept):
    """A recording with 152,064 tokens grew to 8 GB: its small results lay between its freed logits."""
    plan, found = make_plan(parse(RECIPE, [], source="small.yaml")), []
    task = make_task(plan, next(stage for stage in plan.stages.values() if stage.kind == kind), Store(Path("runs/store")))
    monkeypatch.setattr(processes, "keep_freed_memory", lambda: found.append(1))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    processes._prepare_torch(task, torch.get_num_threads())
    assert found == kept
