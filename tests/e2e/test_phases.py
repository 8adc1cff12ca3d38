"""Phases, trained: they equal stages written by hand to the bit, and the ledger and the equal-compute baseline count all of them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.e2e.inprocess import run_here
from tests.unit.plan.test_plan import model

from tadistill import rng
from tadistill.config import validate
from tadistill.plan.arms import Plan, make_plan
from tadistill.plan.graph import with_ancestors
from tadistill.store import Store
from tadistill.terminal import Terminal

SEEDS = [1, 2, 3]
MODELS = {"xl": model(32, seed=1, sft=None), "l": model(16, sft=None), "s": model(8, sft=None)}
TEXT = {"max_new_tokens": 6}
COLD = {"objective": {"type": "cross_entropy"}, "sampler": {"type": "teacher"} | TEXT, "optim": {"lr": 3e-3}}
OPD = {"objective": {"type": "reverse_kl"}, "sampler": {"type": "student"} | TEXT}
PHASES = [{"method": "cold", "share": 0.25}, {"method": "opd", "share": 0.75}]
METHOD = {"optim": {"steps": 16, "batch": 8, "lr": 1e-3, "warmup": 1}, "select": {"metric": "last"}}


def recipe(**changes) -> dict:
    data = {
        "train": "tinyworld",
        "dev": "tinyworld",
        "test": ["tinyworld"],
        "template": "plain",
        "limit": {"train": 32, "dev": 4, "test": 2},
    }
    return {
        "study": "phases",
        "seeds": SEEDS,
        "models": MODELS,
        "data": data,
        "method": METHOD,
        "methods": {"cold": COLD, "opd": OPD},
        "analyse": False,
        "arms": {"phased": {"path": "xl > s", "phases": PHASES}},
    } | changes


def trained(runs: Path, **changes) -> tuple[Plan, Store]:
    """Run the trainings of a recipe, without its evaluations."""
    plan, store = make_plan(validate(recipe(**changes))), Store(runs / "store")
    finals = [key for arm in plan.arms for key in arm.final.values() if key]
    needed = with_ancestors(plan.stages, finals)
    plan.stages = {key: stage for key, stage in plan.stages.items() if key in needed}
    run_here(plan, store, jobs=1, console=Terminal())
    return plan, store


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def folder(plan: Plan, store: Store, arm: str, seed: int) -> Path:
    (key,) = [a.final[seed] for a in plan.arms if a.name == arm]
    assert key is not None
    return store.folder(key) / "model"


@pytest.fixture(scope="module")
def phased(tmp_path_factory) -> tuple[Plan, Store]:
    return trained(tmp_path_factory.mktemp("phased"))


def test_two_phases_equal_two_studies_written_by_hand(phased, tmp_path):
    """The second study begins from the files of the first, and knows nothing of phases."""
    plan, store = phased
    first, of_first = trained(tmp_path, methods={}, arms={"cold": {"path": "xl > s", **COLD, "optim": COLD["optim"] | {"steps": 4}}})
    for seed in SEEDS:
        begin, later = folder(first, of_first, "cold", seed), rng.torch_seed(seed, "then", 1)
        second, of_second = trained(
            tmp_path,
            seeds=[later],
            models={"xl": MODELS["xl"], "s": {"load": str(begin)}},
            methods={},
            arms={"opd": {"path": "xl > s", **OPD, "optim": {"steps": 12}}},
        )
        by_hand, ours, start = (
            weights(folder(second, of_second, "opd", later)),
            weights(folder(plan, store, "phased", seed)),
            weights(begin),
        )
        assert by_hand.keys() == ours.keys() == start.keys()
        assert all(torch.equal(by_hand[name], ours[name]) for name in ours)
        assert not any(torch.equal(start[name], ours[name]) for name in ours if "layernorm" not in name)


def test_the_ledger_and_the_baseline_count_every_phase(tmp_path):
    """The lengths of all texts are known in advance, because models as fresh as these hardly ever end an answer."""
    arms = {"chain": {"path": "xl > l > s", "phases": PHASES}, "twin": {"path": "xl > s", "phases": PHASES, "compute": "as chain"}}
    plan, store = trained(tmp_path, seeds=[1], arms=arms)
    metered, planned = {}, {}
    for arm in plan.arms:
        stages = with_ancestors(plan.stages, [key for key in arm.final.values() if key])
        made = {key: store.manifest(key)["ledger"] for key in stages if plan.stages[key].spec.trains}
        assert len(made) == 2 * len(arm.arm.learners)
        metered[arm.name] = sum(
            part["flops"] for ledger in made.values() for name, part in ledger["parts"].items() if "watching" not in name
        )
        planned[arm.name] = sum(plan.stages[key].flops or 0 for key in made)
        texts = sum(plan.stages[key].flops or 0 for key in stages.difference(made))
        assert arm.flops == pytest.approx(planned[arm.name] + texts)
    assert metered == pytest.approx(planned, rel=0.01)
    chain, twin = plan.arms
    last = plan.stages[twin.final[1]]
    assert abs(twin.flops - chain.flops) <= 0.51 * last.flops / last.steps  # no number of whole updates is nearer
