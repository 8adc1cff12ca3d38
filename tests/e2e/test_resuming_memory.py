"""What two ranks need in host memory to continue from a saved state, beside the weights and moments of the training itself."""

import json
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState
from tests.e2e.inprocess import ranks
from transformers import LlamaConfig, LlamaForCausalLM

from tadistill.config import Optim
from tadistill.models.sharding import load_optimizer, load_weights, shard
from tadistill.train.checkpoint import Checkpoints, TrainState
from tadistill.train.loop import make_optimizer

OPTIM = Optim(steps=1, batch=1, lr=1e-3)


def model() -> LlamaForCausalLM:
    """Return a model in which one tensor is a small part, as in large models. Tensors are loaded one by one."""
    sizes = {"intermediate_size": 512, "num_hidden_layers": 16, "num_attention_heads": 4, "num_key_value_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=1000, hidden_size=256, tie_word_embeddings=True, **sizes))


def proportional() -> dict[str, int]:
    """Bytes of this process by kind. A page that n processes share counts as 1 / n of a page."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
    found = {line.split(":")[0]: 1024 * int(line.split()[1]) for line in lines if line.startswith("Pss_")}
    return {"own": found["Pss_Anon"], "mapped": found["Pss_File"] + found["Pss_Shmem"]}  # the second in /dev/shm


def resume(folder: Path) -> None:
    torch.set_num_threads(1)
    rank = PartialState(cpu=True).process_index
    student = shard(model(), torch.device("cpu"))  # type: ignore[arg-type]
    optimizer = make_optimizer(student, OPTIM)
    dist.barrier()
    before, own, ended = proportional(), [0], threading.Event()

    def sample() -> None:
        while not ended.wait(0.002):
            own.append(proportional()["own"])

    thread = threading.Thread(target=sample)
    thread.start()
    state = Checkpoints(folder).load(pytest.fail)
    assert state is not None
    load_weights(student, state.model)
    load_optimizer(optimizer, state.optimizer)
    ended.set()
    thread.join()
    dist.barrier()  # each rank has now read all pages of the state, and they are shared
    mapped = proportional()["mapped"] - before["mapped"]
    dist.barrier()
    state.release()
    kept = proportional()["own"]  # weights and moments, which a GPU has in its own memory
    used = {"own": max(max(own) - kept, 0), "mapped": max(mapped, 0)}
    (folder / f"{rank}.json").write_text(json.dumps(used))
    dist.destroy_process_group()


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_two_ranks_that_resume_need_little_more_than_one_state(tmp_path):
    student = model()
    optimizer = make_optimizer(student, OPTIM)  # type: ignore[arg-type]
    for parameter in student.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    Checkpoints(tmp_path).save(TrainState(step=1, model=student.state_dict(), optimizer=optimizer.state_dict()))
    size = (tmp_path / "state.pt").stat().st_size
    ranks(2, resume, tmp_path)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    share = sum(sum(each.values()) for each in found) / size
    assert 0.3 < share < 1.3  # the state itself is mapped, and counts here
