"""Two processes give the loss curve of one in every layout of student and teacher; a checkpoint fits any number of processes."""

import pytest
import torch
from tests.conftest import tiny_model
from tests.e2e.inprocess import ranks
from tests.e2e.layouts import CASES, HALF, RESUMED, Case, interrupted, train, train_all
from transformers import AutoModelForCausalLM

from tadistill.errors import ModelError
from tadistill.models.sharding import offload, shard


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Results of one process, trained on first use."""
    found = {}

    def get(case: Case):
        if case.alone not in found:
            found[case.alone] = train(tmp_path_factory.mktemp("alone"), case.alone)
        return found[case.alone]

    return get


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder of two processes: all cases, a stage that one process has begun, and one that the two left unfinished."""
    folder = tmp_path_factory.mktemp("two")
    interrupted(folder / "one-then-two", RESUMED.alone)
    ranks(2, train_all, folder)
    return folder


@pytest.fixture(scope="module")
def two(folder):
    return torch.load(folder / "found.pt", weights_only=True)


def _close(found: list[float], expected: list[float]) -> None:
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_two_processes_have_the_loss_curve_of_one(case, alone, two, folder):
    found, expected = two[case.name], alone(case)
    assert len(expected.losses) == 8
    assert expected.losses[-1] != expected.losses[0]
    _close(found["losses"], expected.losses)
    _close(found["dev"], expected.dev)
    assert found["heads"] == expected.heads > 0
    model = AutoModelForCausalLM.from_pretrained(folder / case.name / "model")
    for name, value in model.state_dict().items():  # Adam makes up to lr of a gradient near 0
        torch.testing.assert_close(value, expected.weights[name], rtol=0, atol=1e-4)


def test_fsdp_in_bf16_samples_and_trains_as_ddp_does(two):
    ddp, fsdp = (torch.tensor(two[case.name]["losses"]) for case in HALF)
    torch.testing.assert_close(fsdp[0], ddp[0], rtol=1e-6, atol=0)  # the same text was sampled
    torch.testing.assert_close(fsdp, ddp, rtol=1e-3, atol=0)
    ddp, fsdp = (torch.tensor(two[case.name]["dev"]) for case in HALF)
    torch.testing.assert_close(fsdp, ddp, rtol=1e-3, atol=0)


def test_a_model_without_a_list_of_layers_is_refused():
    """Its training would not change a weight: no layer would start the sums of gradients over the processes."""
    model = tiny_model("llama")
    model.model.layers = torch.nn.Sequential(*model.model.layers)
    with pytest.raises(ModelError, match="models of type llama have no list of layers"):
        offload(model, torch.device("cpu"))


def test_layers_that_share_weights_are_refused():
    model = tiny_model("llama")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    with pytest.raises(ModelError, match="a llama model has layers that share weights, so it cannot be sharded"):
        shard(model, torch.device("cpu"))


def test_one_process_goes_on_from_the_state_of_two(alone, two, folder):
    found = train(folder / "two-then-one", RESUMED.alone)
    _close(found.losses, alone(RESUMED).losses[5:])
    assert found.heads == alone(RESUMED).heads


def test_two_processes_go_on_from_the_state_of_one(alone, two):
    _close(two["one-then-two"]["losses"], alone(RESUMED).losses[5:])
    assert two["one-then-two"]["heads"] == alone(RESUMED).heads
