"""Every sampler with three objectives: a kill inside a rollout or an epoch changes nothing, and two processes give the same weights."""

import itertools
from pathlib import Path

import pytest
import torch
from tests.e2e.inprocess import ranks
from tests.e2e.on_policy import CASES, SPANS, train, train_all

from tadistill.errors import Interrupted

IDS = [f"{name}-{number}" for name, number in CASES]
SAMPLING = [case for case in CASES if case[0].removesuffix(SPANS) not in ("dataset", "teacher")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Weights after an undisturbed run of a case, trained on first use."""
    found: dict[tuple[str, int], torch.Tensor] = {}

    def get(case: tuple[str, int]) -> torch.Tensor:
        if case not in found:
            found[case] = train(tmp_path_factory.mktemp("whole"), case)
        return found[case]

    return get


def saved(folder: Path) -> int:
    """Return the number of updates in the newest saved state. A training goes on from there."""
    state = folder / "state.pt"
    return torch.load(state, weights_only=True)["step"] if state.exists() else 0


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_a_kill_inside_a_rollout_and_a_stop_inside_an_epoch_change_nothing(tmp_path, case, whole):
    assert torch.isfinite(whole(case)).all()
    if case in SAMPLING:
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, case, interrupt=1)
    calls = itertools.count(saved(tmp_path))
    with pytest.raises(Interrupted):
        train(tmp_path, case, stop=lambda: next(calls) == 6)  # the second round's second epoch
    assert saved(tmp_path) == 6
    assert torch.equal(train(tmp_path, case), whole(case))


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """Weights of every case after training in two gloo processes."""
    directory = tmp_path_factory.mktemp("gloo")
    ranks(2, train_all, directory)
    return torch.load(directory / "weights.pt", weights_only=True)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_two_processes_give_the_numbers_of_one(case, whole, two_processes):
    found, expected = two_processes[f"{case[0]}-{case[1]}"], whole(case)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)  # sums in another order; an update moves a weight by up to 2e-3
