"""A teacher's recorded signal: equal to the live teacher, resumable, and damaged files say so."""

import pytest
import torch
from tests.conftest import response_logits, tiny_model

from tadistill.config.method import HiddenSignal, Optim, TopKSignal
from tadistill.data.batch import Sequence, collate
from tadistill.errors import StoreError
from tadistill.objectives import top_k
from tadistill.rollout import signals
from tadistill.rollout.samplers import FixedSequences
from tadistill.rollout.signals import Signals, record

ROWS = [Sequence((3 + i % 4, 9), (*tuple(range(5, 7 + i % 5)), 0)) for i in range(11)]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(signals, "_PART", 4)
    monkeypatch.setattr(signals, "RECORDING_BATCH", 3)
    monkeypatch.setattr(signals, "_ROWS", 5)


@pytest.mark.parametrize("wanted", [[0], [10, 3, 3, 7]])
def test_hidden_states_and_head_give_the_live_logits(tmp_path, kind, wanted):
    teacher = tiny_model(kind)
    record(teacher, ROWS, HiddenSignal(), tmp_path, vocab=29, pad=0)
    found = Signals(tmp_path, CPU).target(wanted)
    live = response_logits(teacher, collate([ROWS[i] for i in wanted], pad=0), 29)
    torch.testing.assert_close(found.head.logits(found.states), live, atol=1e-5, rtol=0)


@pytest.mark.parametrize("tail", ["lump", "drop"])
def test_top_k_is_that_of_the_live_logits(tmp_path, tail):
    teacher = tiny_model("llama")
    record(teacher, ROWS, TopKSignal(k=5, tail=tail), tmp_path, vocab=31, pad=0)
    found = Signals(tmp_path, CPU).target([2, 9])
    live = top_k(response_logits(teacher, collate([ROWS[2], ROWS[9]], pad=0), 31), 5, tail=tail)
    assert torch.equal(found.ids, live.ids)
    torch.testing.assert_close(found.log_probs, live.log_probs, atol=1e-5, rtol=0)
    assert (found.tail is None) == (tail == "drop")
    if live.tail is not None:
        torch.testing.assert_close(found.tail, live.tail, atol=1e-5, rtol=0)


def test_half_precision_halves_the_files(tmp_path):
    teacher = tiny_model("llama")
    sizes = {}
    for dtype in ("float32", "bfloat16"):
        record(teacher, ROWS, HiddenSignal(dtype=dtype), tmp_path / dtype, vocab=31, pad=0)
        tensors = signals.load_file(tmp_path / dtype / "00000000.safetensors")
        sizes[dtype] = tensors["hidden"].numel() * tensors["hidden"].element_size()
    assert sizes["float32"] == 2 * sizes["bfloat16"]
    assert Signals(tmp_path / "bfloat16", CPU).target([1]).states.dtype == torch.float32


def test_a_killed_recording_goes_on(tmp_path):
    teacher = tiny_model("llama")

    def stop(done):
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record(teacher, ROWS, TopKSignal(k=3), tmp_path / "parts", vocab=31, pad=0, tick=stop)
    first = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "parts").iterdir()}
    assert len(first) == 2
    record(teacher, ROWS, TopKSignal(k=3), tmp_path / "parts", vocab=31, pad=0)
    record(teacher, ROWS, TopKSignal(k=3), tmp_path / "whole", vocab=31, pad=0)
    assert all((tmp_path / "parts" / name).stat().st_mtime_ns == at for name, at in first.items())
    a, b = (Signals(tmp_path / d, CPU).target(range(len(ROWS))) for d in ("parts", "whole"))
    assert torch.equal(a.ids, b.ids)
    assert torch.equal(a.log_probs, b.log_probs)


def test_the_sampler_hands_out_the_signal_of_its_rows(tmp_path):
    teacher = tiny_model("llama")
    record(teacher, ROWS, HiddenSignal(), tmp_path, vocab=31, pad=0)
    optim = Optim(steps=3, batch=6, micro_batch=2)
    sampler = FixedSequences(ROWS, optim, pad=0, seed=1, signals=Signals(tmp_path, CPU))
    for step in range(3):
        for batch in sampler.micro_batches(step):
            live = response_logits(teacher, batch, 31)
            torch.testing.assert_close(batch.targets[0].head.logits(batch.targets[0].states), live, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["00000004", "head"])
@pytest.mark.parametrize("content", [b"junk", None])
def test_a_damaged_or_missing_part_is_named(tmp_path, name, content):
    record(tiny_model("llama"), ROWS, HiddenSignal(), tmp_path, vocab=31, pad=0)
    if content:
        (tmp_path / f"{name}.safetensors").write_bytes(content)
    else:
        (tmp_path / "00000000.safetensors").unlink()
    with pytest.raises(StoreError, match=r"recorded outputs of the teacher .* damaged .* delete this folder"):
        Signals(tmp_path, CPU)
