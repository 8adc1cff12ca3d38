"""A stage run by several processes: when one is killed the others end, and the same call resumes to the same result."""

import multiprocessing
import os
import signal
from dataclasses import replace
from multiprocessing import util
from multiprocessing.connection import wait
from unittest import mock

import pytest
import torch
from tests.e2e import forked
from transformers import AutoModelForCausalLM

from tadistill.config import validate
from tadistill.errors import ConfigError, Interrupted, StageFailed, StoreError
from tadistill.metrics import training_numbers
from tadistill.plan.arms import make_plan
from tadistill.plan.task import make_task
from tadistill.runner import preflight
from tadistill.runner.processes import StageProcesses, _judged, run_in_processes
from tadistill.stages.execute import run_stage
from tadistill.store import Store

STEPS = 20
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}


def check_study(recipe, *given):
    return preflight.check_study(make_plan(recipe), *given)


def recipe(resources: dict, **method) -> dict:
    def model(width: int) -> dict:
        config = SIZES | {"hidden_size": width, "intermediate_size": 2 * width}
        return {"load": "scratch:llama", "tokenizer": "tinyworld", "config": config}

    method = {"sampler": {"type": "student", "rollouts": 16, "max_new_tokens": 8}, "objective": {"type": "reverse_kl"}} | method
    optim = {"steps": STEPS, "batch": 8, "lr": 1e-3, "eps": 1e-4}
    return {
        "study": "ranks",
        "seeds": [1],
        "models": {"l": model(24), "s": model(16)},
        "data": {"train": "tinyworld", "dev": "tinyworld", "test": ["tinyworld"], "template": "plain", "world": {"people": 20}}
        | {"limit": {"train": 64, "dev": 4, "test": 4}},
        "method": method | {"optim": optim, "select": {"metric": "loss", "every": 10}},
        "arms": {"direct": "l > s"},
        "runtime": {"checkpoint_seconds": 1e-3},
        "resources": resources,
    }


@pytest.fixture(scope="module", autouse=True)
def _forked_server():
    """Fork the server of the ranks from this process. `test_study` has one that starts as a user's does, and imports for seconds."""
    from tadistill.runner import preload  # noqa: F401

    with mock.patch.object(util, "spawnv_passfds", forked.spawn):
        yield


def task(root, resources: dict, **method):
    plan = make_plan(validate(recipe(resources, **method)))
    stage = next(s for s in plan.stages.values() if s.kind == "distill")
    return make_task(plan, stage, Store(root))


def weights(root, key: str) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(Store(root).folder(key) / "model")
    return torch.cat([value.flatten() for value in model.state_dict().values()])


def quiet(done: int, total: int, text: str) -> None:
    pass


def launched(root, told, **resources):
    """Run the stage by two processes and return its key. `told` is called with the progress."""
    made = task(root, {"distill": {"processes": 2} | resources})
    watched(made, told)
    return made.key


def watched(made, told, stop=lambda: False) -> None:
    """Run a stage as `run_in_processes` does, and call `told` with its progress. It is asked to stop once `stop` returns True."""
    stage, asked = StageProcesses(made, threads=2), False
    try:
        while not stage.ended:
            if not asked and stop():
                asked = True
                stage.stop()
            wait(stage.sources, timeout=0.5)
            for message in stage.attend():
                print(message) if isinstance(message, str) else told(*message)
    finally:
        stage.end()
    if stage.error:
        raise stage.error


def test_two_processes_record_the_files_of_one(tmp_path):
    """400 sequences are two files, one for each process."""
    files = []
    for processes in (1, 2):
        settings = recipe({"signal": {"processes": processes}}, sampler={"type": "dataset", "signal": {"type": "hidden"}})
        settings["data"]["limit"]["train"] = 400
        plan, store = make_plan(validate(settings)), Store(tmp_path / str(processes))
        stage = next(s for s in plan.stages.values() if s.kind == "signal")
        run_in_processes(make_task(plan, stage, store), threads=processes)
        files.append(store.manifest(stage.key)["files"])
    assert len(files[0]) == 4  # with the teacher's head, and stage.json
    assert files[0] == files[1]


def test_a_killed_rank_ends_the_stage_and_the_same_call_goes_on(tmp_path):
    killed, seen, laid_out = [], [], {"parallel": "fsdp", "teacher": "sharded"}

    def kill(done: int, total: int, text: str) -> None:
        if done >= 8 and not killed:
            killed.append(multiprocessing.active_children()[1].pid)
            os.kill(killed[0], signal.SIGKILL)

    with pytest.raises(StageFailed, match=r"rank [01] of 2 was killed by SIGKILL .*Run the same command again to continue") as failure:
        launched(tmp_path / "a", kill, **laid_out)
    assert "\n" not in str(failure.value)
    assert not multiprocessing.active_children()
    key = launched(tmp_path / "a", lambda done, total, text: seen.append(done), **laid_out)
    assert next(filter(None, seen)) > 5  # before the first update it says 0: it loads the models
    assert seen[-1] == STEPS
    seen.clear()
    launched(tmp_path / "a", lambda done, total, text: seen.append(done), **laid_out)
    assert seen == []  # finished
    alone = task(tmp_path / "b", {})
    assert alone.key == key  # what a stage runs on is no part of it
    run_stage(alone, progress=quiet, alarm=print, stop=lambda: False)
    torch.testing.assert_close(weights(tmp_path / "a", key), weights(tmp_path / "b", key), rtol=0, atol=1e-3)
    facts = [Store(tmp_path / name).manifest(key)["ledger"]["parts"] for name in "ab"]
    assert facts[0].keys() == facts[1].keys()


def test_all_ranks_stop_when_asked(tmp_path):
    made, heard = task(tmp_path, {"distill": {"processes": 2, "teacher": "offloaded"}}), []

    def told(done: int, total: int, text: str) -> None:
        heard.extend([done] * bool(training_numbers(text)))

    with pytest.raises(Interrupted, match="stopped at update"):
        watched(made, told, stop=lambda: len(heard) > 3)
    folder = Store(tmp_path).folder(made.key)
    assert (folder / "state.pt").is_file()
    assert not Store(tmp_path).finished(made.key)


def test_an_error_is_the_one_that_a_rank_raised(tmp_path):
    made = task(tmp_path, {"distill": {"processes": 2}})
    optim = made.spec.optim.model_copy(update={"batch": 7})
    made = replace(made, spec=made.spec.model_copy(update={"optim": optim}))
    with pytest.raises(ConfigError, match=r"optim.batch is 7, but it must be a multiple of the 2 processes"):
        run_in_processes(made, threads=2)


def test_fewer_ranks_than_the_stage_asks_for_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"resources.processes` is 2 .* WORLD_SIZE is 1"):
        run_stage(task(tmp_path, {"distill": {"processes": 2}}), progress=quiet, alarm=print, stop=lambda: False)


def test_what_cannot_be_laid_out_is_refused_before_anything_runs():
    with pytest.raises(ConfigError, match=r"distill .*: `optim.batch` is 8, but it must be a multiple of the 3 processes"):
        check_study(validate(recipe({"distill": {"processes": 3}})))
    sharded = {"distill": {"processes": 2, "teacher": "sharded"}}
    check_study(validate(recipe(sharded)))
    check_study(validate(recipe(sharded, sampler={"type": "teacher_mixed", "rollouts": 16, "max_new_tokens": 8})))


def test_a_rank_that_loses_its_connection_hides_no_error_of_another(capsys):
    lost, full = RuntimeError("RuntimeError: Connection closed by peer"), StoreError("cannot write state.pt")
    lost.add_note("Traceback of the lost connection")
    assert _judged([1, 1], {0: lost, 1: full}) is full
    assert str(_judged([1, -signal.SIGKILL], {0: lost})).startswith("rank 1 of 2 was killed by SIGKILL")
    assert capsys.readouterr().err == ""
    assert str(_judged([1, None], {0: lost})).startswith("rank 0 of 2 failed: RuntimeError: Connection closed")
    assert "Traceback" in capsys.readouterr().err
