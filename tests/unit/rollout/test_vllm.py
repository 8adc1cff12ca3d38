"""What vLLM is given: a model's weights by their names in a file, in memory that another process maps. tests/e2e/test_vllm.py runs vLLM."""

import gc
import io
import shutil
import socket
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tests.conftest import tiny_model
from tests.families import tiny
from tests.unit.plan.test_plan import plan

from tadistill.config import machine
from tadistill.config.common import Decoding
from tadistill.config.machine import Vllm as Settings
from tadistill.config.machine import vllm_folder
from tadistill.config.model import Lora
from tadistill.errors import ConfigError, ModelError, StageFailed
from tadistill.models.modify import adapt, merged, plain_weights
from tadistill.plan.arms import make_plan
from tadistill.plan.preview import preview
from tadistill.plan.task import layout, make_task, planned_memory, process_bytes
from tadistill.rollout.vllm import Launch, Vllm, _environment, _SharedMemory, _temporary
from tadistill.runner import preflight, schedule
from tadistill.store import Store


def check_study(recipe, *given):
    return preflight.check_study(make_plan(recipe), *given)


def equal(found, expected):
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_weights_have_the_names_of_a_file(kind, tmp_path):
    model = tiny(kind)
    model.save_pretrained(tmp_path)
    equal(plain_weights(model), load_file(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_adapters_are_added_to_the_weights(family, tmp_path):
    student = tiny_model(family)
    tuner = adapt(student, Lora(r=2), seed=1)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1)
    found = plain_weights(student)
    merged(tuner).save_pretrained(tmp_path)
    equal(found, load_file(tmp_path / "model.safetensors"))


def test_another_process_reads_what_was_written_last():
    weights = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([7]), "c": torch.full((5,), 0.5)}
    memory = _SharedMemory(weights, torch.bfloat16)
    memory.write(weights)
    weights["a"] += 1
    memory.write(weights)
    done = subprocess.run(["cat", memory.layout["path"]], capture_output=True, check=True)
    read = torch.frombuffer(bytearray(done.stdout), dtype=torch.uint8)
    found = [read[a:b].view(getattr(torch, dtype)).view(shape).tolist() for _, dtype, shape, a, b in memory.layout["entries"]]
    assert found == [[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], [7], [0.5] * 5]
    assert [entry[1] for entry in memory.layout["entries"]] == ["bfloat16", "int64", "bfloat16"]


def launch(tmp_path, **changed):
    usual = {"settings": Settings(), "device": torch.device("cpu"), "dtype": torch.float32, "longest": 20, "log": tmp_path / "log"}
    return Launch(**(usual | {"changes": True} | changed))


@pytest.fixture
def temporary(monkeypatch):
    """A temporary folder of this test, with a short path."""
    with tempfile.TemporaryDirectory(prefix="test-", dir="/tmp") as folder:
        monkeypatch.setattr("tempfile.tempdir", folder)
        yield Path(folder)


def test_an_ended_engine_leaves_nothing_in_the_temporary_folder(tmp_path, temporary, monkeypatch):
    """vLLM's sockets stayed there, and the file in which its workers meet."""
    program = tmp_path / "bin" / "python"
    program.parent.mkdir()
    program.write_text(
        f"#!{sys.executable}\nimport pathlib, sys, tempfile\npathlib.Path(tempfile.gettempdir(), 'socket').touch()\n"
        'for line in sys.stdin:\n    print(\'{"version": "0"}\', flush=True)\n'
    )
    program.chmod(0o755)
    monkeypatch.setattr("tadistill.rollout.vllm.vllm_folder", lambda: program.parent)
    monkeypatch.setattr(Vllm, "_check", lambda engine: None)
    engine = Vllm(tiny_model("llama"), Decoding(), eos=(1,), vocab=8, launch=launch(tmp_path))
    engine._start()
    assert [path.name for path in temporary.rglob("*") if path.is_file()] == ["socket"]
    engine.close()
    assert not [*temporary.iterdir()]


def test_a_process_that_does_not_start_leaves_nothing_in_the_temporary_folder(tmp_path, temporary, monkeypatch):
    monkeypatch.setattr("tadistill.rollout.vllm.vllm_folder", lambda: tmp_path / "nowhere")
    engine = Vllm(tiny_model("llama"), Decoding(), eos=(1,), vocab=8, launch=launch(tmp_path))
    with pytest.raises(FileNotFoundError):
        engine._start()
    del engine
    gc.collect()
    assert not [*temporary.iterdir()]


@pytest.mark.parametrize(("size", "own"), [(40, True), (58, True), (59, False), (90, False)])
def test_a_socket_has_a_path_that_the_system_accepts(temporary, monkeypatch, size, own):
    """The folder's name took 24 of the 107 bytes, so vLLM could not start in a temporary folder with a path of 50."""
    folder = temporary / ("x" * (size - len(str(temporary)) - 1))
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    made = Path(_temporary())
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(made / str(uuid.uuid4())))
    shutil.rmtree(made)
    assert made.parent == (folder if own else Path("/tmp"))


def test_each_rank_has_a_gpu_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    monkeypatch.setenv("RANK", "2")
    second, settings = torch.device("cuda", 2), Settings(tensor_parallel=4)
    found = _environment(launch(tmp_path, device=second))
    assert (found["CUDA_VISIBLE_DEVICES"], found.get("RANK")) == ("6", None)
    assert _environment(launch(tmp_path, device=torch.device("cuda"), settings=settings))["CUDA_VISIBLE_DEVICES"] == "4,5,6,7"
    with pytest.raises(StageFailed, match="tensor_parallel` is 4, but this stage has 2 GPUs"):
        _environment(launch(tmp_path, device=second, settings=settings))


def test_arguments_of_the_engine_follow_device_and_settings(tmp_path):
    def arguments(**changed):
        return Vllm(tiny_model("llama"), Decoding(), eos=(1,), vocab=31, launch=launch(tmp_path, **changed))._arguments("DIR")

    gpu = {"device": torch.device("cuda"), "dtype": torch.bfloat16, "settings": Settings(memory=0.5, tensor_parallel=2)}
    found = arguments(**gpu)
    assert [found[name] for name in ("dtype", "gpu_memory_utilization", "tensor_parallel_size", "max_model_len")] == [
        "bfloat16",
        0.5,
        2,
        20,
    ]
    assert (found["enforce_eager"], found["enable_sleep_mode"]) == (False, True)
    assert "enable_sleep_mode" not in arguments(**gpu | {"changes": False})
    assert "enable_sleep_mode" not in arguments(**gpu | {"settings": Settings(sleep=False)})
    assert arguments()["enforce_eager"]
    assert not arguments(settings=Settings(eager=False))["enforce_eager"]


def test_the_copys_vocabulary_is_cut(tmp_path):
    student = tiny_model("llama")
    engine = Vllm(student, Decoding(), eos=(1,), vocab=20, launch=launch(tmp_path))
    ends = ("model.embed_tokens.weight", "lm_head.weight")
    assert {name: len(w) for name, w in engine._weights().items() if name in ends} == dict.fromkeys(ends, 20)
    assert engine._describe().vocab_size == 20
    assert student.config.vocab_size > 20


def test_this_process_gives_memory_back_before_vllm_wakes_up(tmp_path, monkeypatch):
    """Without this, the allocator keeps the peak of the last update, and vLLM finds no room."""
    calls = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("emptied"))
    monkeypatch.setattr(Vllm, "_order", lambda self, order: calls.append(order["order"]))
    monkeypatch.setattr(Vllm, "_sample", lambda self, *rest: [])
    engine = Vllm(tiny_model("llama"), Decoding(), eos=(1,), vocab=20, launch=launch(tmp_path, device=torch.device("cuda")))
    engine._process, engine._memory = Mock(), Mock(write=lambda weights: calls.append("written"))
    engine.respond([(1, 2)], np.zeros((1, 4)))
    assert calls == ["written", "emptied", "load", "sleep"]


# --- plans --------------------------------------------------------------------------------------------------------------

ON_POLICY = {"objective": {"type": "reverse_kl"}, "sampler": {"type": "student", "max_new_tokens": 8}, "optim": {"steps": 16, "batch": 16}}


def planned(engine="vllm", **changed):
    sampler = ON_POLICY["sampler"] | ({"engine": engine} if engine else {})
    return plan(method=ON_POLICY | {"sampler": sampler}, **changed)


def keys(found, kind):
    return {stage.key for stage in found.stages.values() if stage.kind == kind}


def test_the_engine_is_a_part_of_keys_and_its_settings_are_not():
    native, vllm = planned(None), planned()
    assert keys(planned("native"), "distill") == keys(native, "distill")
    assert not keys(vllm, "distill") & keys(native, "distill")
    assert keys(planned(runtime={"vllm": {"memory": 0.8, "eager": True}}), "distill") == keys(vllm, "distill")
    tested = planned(None, evaluate={"engine": "vllm"})
    assert keys(tested, "distill") == keys(native, "distill")
    assert not keys(tested, "evaluate") & keys(native, "evaluate")


def test_dev_answers_are_sampled_by_our_own_loop():
    select = {"metric": "rouge_l", "every": 8}
    found = [plan(method=ON_POLICY | {"select": select}, evaluate={"engine": name}) for name in ("native", "vllm")]
    assert keys(found[0], "distill") == keys(found[1], "distill")


def test_without_vllm_one_sentence_before_any_work(monkeypatch, tmp_path):
    monkeypatch.setattr(machine.shutil, "which", lambda *_, **__: None)
    found = planned(evaluate={"engine": "vllm"})
    with pytest.raises(ConfigError, match=r"vLLM is not installed.*pip install vllm.*set TADISTILL_VLLM"):
        check_study(found.recipe)
    monkeypatch.setenv("TADISTILL_VLLM", str(tmp_path))
    with pytest.raises(ConfigError, match=f"vLLM is not installed in {tmp_path} "):
        vllm_folder()


def test_a_named_environment_has_the_program_and_its_python(monkeypatch, tmp_path):
    (tmp_path / "bin").mkdir()
    for name in ("vllm", "python"):
        (tmp_path / "bin" / name).touch(mode=0o755)
    monkeypatch.setenv("TADISTILL_VLLM", str(tmp_path))
    assert vllm_folder() == tmp_path / "bin"
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    monkeypatch.setenv("TADISTILL_VLLM", f"~/{tmp_path.name}")
    assert vllm_folder() == tmp_path / "bin"


@pytest.mark.parametrize(("sleep", "kind"), [(True, "distill"), (False, "distill"), (True, "evaluate")])
def test_the_share_of_vllm_is_a_part_of_what_a_stage_needs(sleep, kind):
    """A sleeping vLLM needs its memory only while it samples. It sleeps only in a training."""
    found, gpu = planned(runtime={"vllm": {"memory": 0.5, "sleep": sleep}}, evaluate={"engine": "vllm"}), 80e9
    stage = next(stage for stage in found.stages.values() if stage.kind == kind)
    memory = planned_memory(found, stage)
    always = memory.weights + memory.moments + memory.frozen
    expected = always + 40e9 if sleep and kind == "distill" else memory.peak(cuda=True) + 40e9
    assert process_bytes(found, stage, cuda=True, of_gpu=gpu) == pytest.approx(expected)
    assert process_bytes(found, stage, cuda=True) == memory.peak(cuda=True)
    native = planned(None)
    stage = next(stage for stage in native.stages.values() if stage.kind == kind)
    assert process_bytes(native, stage, cuda=True, of_gpu=gpu) == process_bytes(native, stage, cuda=True)


@pytest.mark.parametrize("sleep", [True, False])
def test_the_plan_shows_the_share_of_vllm(sleep, tmp_path):
    console = Console(width=250, record=True, file=io.StringIO())
    console.print(preview(planned(runtime={"vllm": {"memory": 0.4, "sleep": sleep}}), Store(tmp_path), 250))
    text = console.export_text()
    lines = [line for line in text.splitlines() if "to run" in line]
    shown = {line for line in lines if " GB + 40%  " in line}
    assert shown == {line for line in lines if "  distill " in line}
    assert "as + 40% of a GPU, or of the machine without a GPU" in text
    assert ("only while it samples" in text) == sleep


def test_the_plan_shows_the_share_of_vllm_where_other_memory_is_unknown(monkeypatch, tmp_path):
    monkeypatch.setattr("tadistill.plan.preview.process_bytes", lambda *_, **__: None)
    console = Console(width=250, record=True, file=io.StringIO())
    console.print(preview(planned(runtime={"vllm": {"memory": 0.4}}), Store(tmp_path), 250))
    lines = [line for line in console.export_text().splitlines() if "to run" in line]
    assert {line for line in lines if "  – + 40%  " in line} == {line for line in lines if "  distill " in line}


def test_a_gpu_without_room_for_the_share_of_vllm_is_refused(monkeypatch):
    found = planned(runtime={"vllm": {"memory": 0.5, "sleep": False}})
    gpu = schedule.Gpu("card", free=int(39e9), memory=int(80e9))
    monkeypatch.setattr(schedule, "inspect_gpus", lambda: [gpu])
    with pytest.raises(ModelError, match=r"need 40\.\d GB of memory of a GPU .* lower runtime\.vllm\.memory, use smaller models"):
        preflight._check_memory(found, 1)


def test_a_stage_asks_for_the_gpus_of_vllm(tmp_path):
    found = planned(runtime={"vllm": {"tensor_parallel": 4}})
    gpus = {stage.kind: make_task(found, stage, Store(tmp_path)).gpus for stage in found.stages.values()}
    assert (gpus["distill"], gpus["evaluate"]) == (4, 1)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"resources": {"distill": {"processes": 2, "parallel": "fsdp"}}}, "engine vllm needs the whole student in each process"),
        ({"resources": {"distill": {"processes": 2}}, "runtime": {"vllm": {"tensor_parallel": 2}}}, "has 2 processes, each with a vLLM"),
    ],
)
def test_resources_that_vllm_cannot_use_are_refused(changed, message, tmp_path):
    found = planned(**changed)
    stage = next(stage for stage in found.stages.values() if stage.kind == "distill")
    with pytest.raises(ConfigError, match=message):
        layout(found.recipe, stage)
