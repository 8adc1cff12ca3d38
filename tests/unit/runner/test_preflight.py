"""Memory before a study: one stage by itself, and the stages that may run at the same time. What the sentence advises helps."""

import pytest

from tadistill.config import validate
from tadistill.errors import ModelError
from tadistill.plan.arms import make_plan
from tadistill.runner import preflight
from tadistill.runner.preflight import check_study


def recipe(jobs: int = 1, precision: str = "fp32"):
    def model(width: int) -> dict:
        config = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 2}
        return {"load": "scratch:llama", "tokenizer": "tinyworld", "config": config | {"num_key_value_heads": 2}}

    return validate({
        "study": "memory",
        "seeds": [1, 2],
        "models": {"l": model(256), "s": model(16)},
        "data": {"train": "tinyworld", "dev": "tinyworld", "test": ["tinyworld"], "template": "plain", "world": {"people": 20}}
        | {"limit": {"train": 64, "dev": 4, "test": 4}},
        "method": {"optim": {"steps": 4, "batch": 8, "precision": precision}, "objective": {"type": "forward_kl"}},
        "arms": {"direct": "l > s"},
        "runtime": {"jobs": jobs},
    })  # fmt: skip


def need(of) -> float:
    """Bytes of the largest stage."""
    plan = make_plan(of)
    return max(preflight._need(plan, stage) for stage in plan.stages.values())


def test_bf16_halves_a_frozen_teacher(monkeypatch):
    full, half = need(recipe()), need(recipe(precision="bf16"))
    assert half < full
    monkeypatch.setattr(preflight, "available_memory", lambda: (full + half) / 2)
    with pytest.raises(ModelError, match=r"need .* GB of memory \(distill l -> s.*optim.precision to bf16"):
        check_study(recipe())
    assert check_study(recipe(precision="bf16")) == 1


def test_stages_at_the_same_time_are_counted_together(monkeypatch):
    monkeypatch.setattr(preflight, "available_memory", lambda: 1.5 * need(recipe()))
    with pytest.raises(
        ModelError, match=r"\(distill l -> s, .*seed 1 .* \+ distill l -> s, .*seed 2 .*\) but .* set runtime.jobs=1 \(now 2\)"
    ):
        check_study(recipe(jobs=2))
    assert check_study(recipe(jobs=1)) == 1


def test_stages_that_wait_for_each_other_are_not():
    plan = make_plan(recipe())
    needs = dict.fromkeys(plan.stages, 1)
    group = preflight._largest_group(plan, needs, 99)
    for key in group:
        assert not set(plan.stages[key].parents.values()) & set(group)
    assert len(group) < len(plan.stages)
