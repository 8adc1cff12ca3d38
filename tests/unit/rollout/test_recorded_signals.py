"""A teacher's recorded signal: equal to the live teacher, resumable, and damaged files say so."""

import json
import os
import stat
import tempfile
from pathlib import Path

import pytest
import torch
from tests.conftest import response_logits, tiny_model

from tadistill.config.method_parts import Optim
from tadistill.config.sampling import HiddenSignal, SampledSignal, TopKSignal
from tadistill.data.batch import Sequence, collate
from tadistill.errors import ConfigError, StoreError
from tadistill.models.teachers import teacher_of
from tadistill.objectives import top_k
from tadistill.rollout import recorded_signals
from tadistill.rollout.recorded_signals import Signals, of_teacher
from tadistill.rollout.samplers import FixedSequences

ROWS = [Sequence((3 + i % 4, 9), (*tuple(range(5, 7 + i % 5)), 0)) for i in range(11)]
ROWS[3] = Sequence((3, 9, 5, 6, 0, 4), (7, 8, 0), spans=((2, 5), (6, 9)))  # two turns
CPU = torch.device("cpu")
KINDS = [HiddenSignal(), TopKSignal(k=5), TopKSignal(k=5, dtype="float32"), SampledSignal(draws=7)]


def record(teacher, rows, config, folder, **more) -> None:
    recorded_signals.record(of_teacher(teacher_of(teacher), pad=0), rows, config, folder, **more)


def tensors(target) -> list[torch.Tensor]:
    return [value for value in vars(target).values() if isinstance(value, torch.Tensor)]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(recorded_signals, "_PART", 4)
    monkeypatch.setattr(recorded_signals, "RECORDING_BATCH", 3)
    monkeypatch.setattr(recorded_signals, "_ROWS", 5)


@pytest.mark.parametrize("wanted", [[0], [10, 3, 3, 7]])
def test_hidden_states_and_head_give_the_live_logits(tmp_path, kind, wanted):
    teacher = tiny_model(kind)
    record(teacher, ROWS, HiddenSignal(), tmp_path, vocab=29)
    found = Signals(tmp_path, CPU).target(wanted)
    live = response_logits(teacher, collate([ROWS[i] for i in wanted], pad=0), 29)
    torch.testing.assert_close(found.head.logits(found.states), live, atol=1e-5, rtol=0)


@pytest.mark.parametrize("tail", ["lump", "drop"])
def test_top_k_is_that_of_the_live_logits(tmp_path, tail):
    teacher = tiny_model("llama")
    record(teacher, ROWS, TopKSignal(k=5, tail=tail, dtype="float32"), tmp_path, vocab=31)
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
        record(teacher, ROWS, HiddenSignal(dtype=dtype), tmp_path / dtype, vocab=31)
        hidden = recorded_signals.load_file(tmp_path / dtype / "00000000.safetensors")["hidden"]
        sizes[dtype] = hidden.numel() * hidden.element_size()
    assert sizes["float32"] == 2 * sizes["bfloat16"]
    assert Signals(tmp_path / "bfloat16", CPU).target([1]).states.dtype == torch.float32


def test_packed_top_k_is_near_that_of_the_live_logits(tmp_path):
    teacher = tiny_model("llama")
    record(teacher, ROWS, TopKSignal(k=5), tmp_path, vocab=31)
    found = Signals(tmp_path, CPU).target([2, 9])
    live = top_k(response_logits(teacher, collate([ROWS[2], ROWS[9]], pad=0), 31), 5)
    assert torch.equal(found.ids.sort(-1).values, live.ids.sort(-1).values)
    torch.testing.assert_close(found.log_probs.sort(-1, descending=True).values, live.log_probs, atol=0.01, rtol=0)
    torch.testing.assert_close(found.tail, live.tail, atol=0.01, rtol=0)


def test_drawn_tokens_depend_on_the_seed_and_not_on_the_batch(tmp_path, monkeypatch):
    teacher = tiny_model("llama")
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        monkeypatch.setattr(recorded_signals, "RECORDING_BATCH", {"a": 3, "b": 1, "c": 3}[name])
        record(teacher, ROWS, SampledSignal(draws=7, seed=seed), tmp_path / name, vocab=31)
    a, b, c = (Signals(tmp_path / name, CPU).target(range(len(ROWS))) for name in "abc")
    assert torch.equal(a.ids, b.ids)
    assert torch.equal(a.shares, b.shares)
    assert a.ids.shape != c.ids.shape or not torch.equal(a.ids, c.ids)
    torch.testing.assert_close(a.shares.sum(-1), torch.ones(len(a.shares)))
    log_p = response_logits(teacher, collate(ROWS, pad=0), 31).log_softmax(-1)
    torch.testing.assert_close(a.entropy, -(log_p.exp() * log_p).sum(-1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("config", KINDS, ids=lambda c: f"{c.type} {getattr(c, 'dtype', '')}")
def test_a_killed_recording_goes_on(tmp_path, config):
    teacher = tiny_model("llama")

    def stop(done):
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record(teacher, ROWS, config, tmp_path / "parts", vocab=31, tick=stop)
    first = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "parts").iterdir()}
    assert len(first) == 2 + (config.type == "hidden")
    record(teacher, ROWS, config, tmp_path / "parts", vocab=31)
    record(teacher, ROWS, config, tmp_path / "whole", vocab=31)
    assert all((tmp_path / "parts" / name).stat().st_mtime_ns == at for name, at in first.items())
    a, b = (Signals(tmp_path / d, CPU).target(range(len(ROWS))) for d in ("parts", "whole"))
    assert all(map(torch.equal, tensors(a), tensors(b)))


def test_several_processes_write_the_files_of_one(tmp_path):
    teacher = tiny_model("llama")
    record(teacher, ROWS, HiddenSignal(), tmp_path / "one", vocab=31)
    for rank in (1, 0):
        record(teacher, ROWS, HiddenSignal(), tmp_path / "two", vocab=31, share=(rank, 2))
        assert len([*(tmp_path / "two").glob("0*")]) == {1: 1, 0: 3}[rank]
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two


def test_a_teacher_may_give_its_top_k_tokens_only(tmp_path):
    """A served teacher gives the tokens and log-probabilities themselves; the recording is that of the local teacher."""
    teacher, config = tiny_model("llama"), TopKSignal(k=5)
    local = of_teacher(teacher_of(teacher), pad=0)

    def outputs(sequences):
        hidden = local(sequences)
        return top_k(hidden.head.logits(hidden.states)[:, :31], 9)

    record(teacher, ROWS, config, tmp_path / "local", vocab=31)
    recorded_signals.record(outputs, ROWS, config, tmp_path / "served", vocab=31)
    a, b = (Signals(tmp_path / name, CPU).target(range(len(ROWS))) for name in ("local", "served"))
    assert torch.equal(a.ids, b.ids)
    torch.testing.assert_close(a.log_probs, b.log_probs, atol=1e-3, rtol=0)  # a step of the tail's code
    torch.testing.assert_close(a.tail, b.tail, atol=2e-3, rtol=0)
    with pytest.raises(ConfigError, match=r"gives its 9 most probable tokens, but `signal\.k` is 10; set `signal\.k` to 9 or less"):
        recorded_signals.record(outputs, ROWS, TopKSignal(k=10), tmp_path / "more", vocab=31)


@pytest.mark.parametrize("config", KINDS, ids=lambda c: f"{c.type} {getattr(c, 'dtype', '')}")
@pytest.mark.parametrize("place", ["data", "index"])
def test_one_wrong_byte_is_found_by_its_checksum(tmp_path, config, place):
    record(tiny_model("llama"), ROWS, config, tmp_path, vocab=31)
    path = tmp_path / "00000004.safetensors"
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    fields = {name: field for name, field in json.loads(data[8:start]).items() if name != "__metadata__"}
    at = next(f for name, f in sorted(fields.items()) if (name in ("lengths", "checks")) == (place == "index"))["data_offsets"]
    data[start + at[0]] ^= 1
    path.write_bytes(data)
    wrong = "the index of 00000004.safetensors" if place == "index" else "sequence 0 of 00000004.safetensors"
    with pytest.raises(StoreError, match=f"{wrong} does not fit its checksum.; delete this folder and run the same command again"):
        Signals(tmp_path, CPU).target([4])


def test_hidden_states_of_earlier_versions_are_read(tmp_path):
    """Their files have no checksums."""
    record(tiny_model("llama"), ROWS, HiddenSignal(), tmp_path, vocab=31)
    new = Signals(tmp_path, CPU).target([1, 9])
    for path in tmp_path.glob("0*"):
        kept = {name: t for name, t in recorded_signals.load_file(path).items() if name != "checks"}
        recorded_signals.save_file(kept, path, {"settings": "null"})
    assert torch.equal(Signals(tmp_path, CPU).target([1, 9]).states, new.states)


def test_the_sampler_hands_out_the_signal_of_its_rows(tmp_path):
    teacher = tiny_model("llama")
    record(teacher, ROWS, HiddenSignal(), tmp_path, vocab=31)
    optim = Optim(steps=3, batch=6, micro_batch=2)
    sampler = FixedSequences(ROWS, optim, pad=0, seed=1, signals=(Signals(tmp_path, CPU),))
    for step in range(3):
        for batch in sampler.micro_batches(step):
            live = response_logits(teacher, batch, 31)
            torch.testing.assert_close(batch.targets[0].head.logits(batch.targets[0].states), live, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["00000000", "00000004", "00000008", "head"])
@pytest.mark.parametrize("content", [b"junk", None])
def test_a_damaged_or_missing_file_is_named(tmp_path, name, content):
    record(tiny_model("llama"), ROWS, HiddenSignal(), tmp_path, vocab=31)
    path = tmp_path / f"{name}.safetensors"
    path.write_bytes(content) if content else path.unlink()
    with pytest.raises(StoreError, match=r"recorded outputs of the teacher .* damaged .* delete this folder"):
        Signals(tmp_path, CPU).target(range(len(ROWS)))


def test_the_files_have_the_permissions_of_new_files(tmp_path):
    mask = os.umask(0o027)
    try:
        record(tiny_model("llama"), ROWS, HiddenSignal(), tmp_path, vocab=31)
    finally:
        os.umask(mask)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o640}


@pytest.mark.parametrize("name", ["", "00000004.safetensors", "head.safetensors"])
def test_without_permission_a_recording_is_not_called_damaged(name):
    if os.getuid() != 0:
        pytest.skip("needs root, to become a user without permissions")
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "signal"
        record(tiny_model("llama"), ROWS, HiddenSignal(), folder, vocab=31)
        Path(root).chmod(0o755)
        (folder / name).chmod(0o600)
        os.seteuid(65534)
        try:
            with pytest.raises(StoreError, match=rf"{folder / name} cannot be read \(Permission denied\): check its permissions"):
                Signals(folder, CPU)
        finally:
            os.seteuid(0)
