"""Two states and their best weights: which are kept, which are used after a loss, and what saving may cost."""

import os

import pytest
import torch
from tests.unit.train.test_loop import train

from tadistill.config.method_parts import Select
from tadistill.disk import replacing
from tadistill.errors import Interrupted, StoreError
from tadistill.store import Store
from tadistill.train import checkpoint
from tadistill.train.checkpoint import Checkpoints, TrainState


def state(step: int, best_step: int = 0) -> TrainState:
    return TrainState(step=step, best_value=0.5 if best_step else None, best_step=best_step, model={"w": torch.full((4,), float(step))})


def names(directory) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


def test_the_two_newest_states_are_kept_with_their_best_weights(tmp_path):
    files = Checkpoints(tmp_path)
    assert files.load(print) is None
    for step, best in ((1, 1), (2, 1), (3, 3), (4, 4)):
        if best == step:
            files.keep_best(best, {"w": torch.zeros(1)})
        files.save(state(step, best))
    assert names(tmp_path) == ["best-3.pt", "best-4.pt", "state-before.pt", "state.pt"]
    assert [checkpoint.load(tmp_path / name)["step"] for name in ("state.pt", "state-before.pt")] == [4, 3]
    files.keep_best(5, {"w": torch.zeros(1)})
    assert names(tmp_path)[:3] == ["best-3.pt", "best-4.pt", "best-5.pt"]


def test_the_store_reads_the_update_of_the_newest_state(tmp_path):
    store, files = Store(tmp_path), Checkpoints(Store(tmp_path).folder("ab12"))
    assert store.saved_update("ab12") is None
    files.directory.mkdir(parents=True)
    for step in (200, 70_000):  # the pickle has another code for large numbers
        files.save(state(step))
        assert store.saved_update("ab12") == step
        assert store.continues("ab12", 100_000) == f"at update {step} of 100000"
    files.newest.write_bytes(b"PK damaged")
    assert store.saved_update("ab12") == 200
    files.before.unlink()
    assert (store.saved_update("ab12"), store.continues("ab12", 100)) == (None, "")


def test_a_damaged_state_does_not_take_the_place_of_the_one_before(tmp_path):
    first = Checkpoints(tmp_path)
    first.save(state(1))
    first.save(state(2))
    os.truncate(tmp_path / "state.pt", 100)
    heard = []
    files = Checkpoints(tmp_path)
    found = files.load(heard.append)
    assert found is not None
    assert (found.step, len(heard)) == (1, 1)
    files.save(state(2))
    assert [checkpoint.load(tmp_path / name)["step"] for name in ("state.pt", "state-before.pt")] == [2, 1]
    files.save(state(3))
    assert [checkpoint.load(tmp_path / name)["step"] for name in ("state.pt", "state-before.pt")] == [3, 2]


@pytest.mark.parametrize(("change", "reason"), [({"speed": 1}, "unexpected keyword argument"), ({"model": None}, "it has no model")])
def test_a_state_with_other_entries_is_not_read(tmp_path, change, reason):
    files, heard = Checkpoints(tmp_path), []
    files.save(state(1))
    entries = vars(state(2)) | change
    os.replace(files.newest, files.before)
    checkpoint.save(files.newest, {name: value for name, value in entries.items() if value is not None or name == "best_value"})
    found = files.load(heard.append)
    assert found is not None
    assert found.step == 1
    assert reason in heard[0]
    assert "the previous state, of update 1, is used instead" in heard[0]


def test_what_a_saved_state_held_is_freed():
    """Rollouts carry the teachers' hidden states; without this, those of two rounds are in memory."""
    kept = TrainState(step=3, model={"w": 1}, optimizer={"w": 1}, average={"w": 1}, sampler={"rollouts": [1]})
    kept.release()
    assert kept == TrainState(step=3)


def test_a_changed_bit_in_a_weight_is_found(tmp_path):
    files, weight = Checkpoints(tmp_path), torch.full((64,), 1.25)
    files.save(state(1))
    files.save(TrainState(step=2, model={"w": weight}))
    path = tmp_path / "state.pt"
    content, pattern = path.read_bytes(), weight.numpy().tobytes()
    assert content.count(pattern) == 1
    path.write_bytes(content.replace(pattern, pattern[:-1] + b"\x40"))
    heard = []
    found = Checkpoints(tmp_path).load(heard.append)
    assert found is not None
    assert found.step == 1
    assert "checksum" in heard[0]


def test_best_weights_of_a_lost_update_are_not_kept_as_if_they_were_earned(tmp_path):
    """On a GPU the updates after a resume may turn out a little different, and the lost best one not come again."""
    dev_at = {2: 0.5, 4: 0.1}
    seen = []

    def go_on(until: int, error: type[BaseException] | None = None):
        """Train to an update, to stop there or to die."""
        files, calls = tmp_path / "run", iter(range(100))
        start = checkpoint.load(files / "state.pt")["step"] if (files / "state.pt").exists() else 0

        def stop() -> bool:
            at = start + next(calls)
            if at == until and error:
                raise error
            return at == until

        def dev() -> dict[str, float]:
            seen.append(None)
            return {"loss": dev_at.get(2 * len(seen), 0.9)}

        return train(files, select=Select(metric="loss", every=2), dev=dev, stop=stop)

    with pytest.raises(Interrupted):
        go_on(3)
    at_two = checkpoint.load(tmp_path / "run" / "best-2.pt")
    with pytest.raises(KeyboardInterrupt):
        go_on(5, KeyboardInterrupt)  # update 4 was the best so far, and no state knows
    assert (tmp_path / "run" / "best-4.pt").exists()
    dev_at.clear()
    student, state = go_on(100)
    assert (state.best_step, state.best_value) == (2, 0.5)
    assert all(torch.equal(value, at_two[name]) for name, value in student.state_dict().items())


def test_a_save_takes_at_most_a_twentieth_of_the_time(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])

    def slow(content, path, real=torch.save):
        real(content, path)
        now[0] += 60.0

    files, exact = Checkpoints(tmp_path), Checkpoints(tmp_path, 5.0)
    now[0] = 29.0
    assert (files.due(), exact.due()) == (False, True)
    now[0] = 31.0
    assert files.due()
    monkeypatch.setattr(checkpoint.torch, "save", slow)
    files.save(state(1))
    saved = now[0]
    now[0] = saved + 1199.0
    assert not files.due()
    now[0] = saved + 1201.0
    assert files.due()


def test_a_file_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    calls = []

    def noted(name, real):
        monkeypatch.setattr(os, name, lambda *arguments: (calls.append(name), real(*arguments))[1])

    noted("fsync", os.fsync)
    noted("replace", os.replace)
    checkpoint.save(tmp_path / "a.pt", {"x": 1})
    assert calls == ["fsync", "replace"]


def test_what_is_cut_short_while_written_leaves_the_old_file(tmp_path):
    checkpoint.save(tmp_path / "a.pt", {"x": 1})
    for error, seen in ((KeyboardInterrupt, KeyboardInterrupt), (OSError(28, "No space left on device"), StoreError)):
        with pytest.raises(seen), replacing(tmp_path / "a.pt") as temporary:  # noqa: PT012 (a context manager is what is tested)
            temporary.write_bytes(b"half")
            raise error
    assert names(tmp_path) == ["a.pt"]
    assert checkpoint.load(tmp_path / "a.pt") == {"x": 1}


def test_the_state_before_keeps_its_best_weights_after_a_damaged_one(tmp_path):
    files = Checkpoints(tmp_path)
    for step in (1, 2):
        files.keep_best(step, {"w": torch.tensor(step)})
        files.save(TrainState(step=step, best_step=step))
    (tmp_path / "state.pt").write_bytes(b"torn")
    again = Checkpoints(tmp_path)
    assert again.load(lambda text: None).step == 1
    again.keep_best(3, {"w": torch.tensor(3)})
    again.save(TrainState(step=3, best_step=3))
    (tmp_path / "state.pt").write_bytes(b"torn")
    assert Checkpoints(tmp_path).load(lambda text: None).step == 1
