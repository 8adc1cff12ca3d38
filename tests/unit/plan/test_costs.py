"""Predicted and metered FLOPs beside those that torch counts, and the published call graph."""

import runpy
from itertools import pairwise
from pathlib import Path
from typing import get_args

import pytest
import tokenizers
import tokenizers.models
import torch
from tests.conftest import tiny_model
from tests.unit.plan.fakes import spec
from torch.utils.flop_counter import FlopCounterMode

from tadistill.config import Method, Optim, validate
from tadistill.config.objective import Contrastive, ForwardKL
from tadistill.config.sampling import Sampler, StudentSampler, TeacherMixedSampler, TeacherSampler
from tadistill.data import tinyworld
from tadistill.models import sources
from tadistill.models.flops_and_memory import Cost, CostPart
from tadistill.plan import throughput
from tadistill.plan.arms import make_plan
from tadistill.plan.costs import Ledger, minillm_flops, passes
from tadistill.plan.costs.passes import Texts, largest
from tadistill.plan.graph import Stage

COUNTED = runpy.run_path(str(Path(__file__).parents[3] / "benchmarks" / "ledger_counted.py"))
ON_POLICY = {"max_new_tokens": 8, "chunk": 8}
ROUNDS = {"max_new_tokens": 8, "rollouts": 16, "inner_epochs": 2}
WHOLE = {"optim": {"steps": 4}}  # every training row once: which rows are drawn has no say
ARMS = {
    "kd": {"objective": {"type": "forward_kl"}, "sampler": {"type": "dataset"}} | WHOLE,
    "recorded": {"objective": {"type": "forward_kl"}, "sampler": {"type": "dataset", "signal": {"type": "hidden"}}} | WHOLE,
    "recorded text": {"objective": {"type": "reverse_kl"}, "sampler": {"type": "student", "recorded": True, "max_new_tokens": 8}} | WHOLE,
    "packed": {"objective": {"type": "reverse_kl"}, "optim": {"steps": 4, "packed": True, "tokens": 256}},
    "on-policy": {"objective": {"type": "reverse_kl"}, "sampler": {"type": "student"} | ON_POLICY},
    "minillm": {
        "objective": {"type": "minillm", "pt_kd_ratio": 0.5},
        "sampler": {"type": "teacher_mixed"} | ROUNDS,
        "optim": {"micro_batch": 8},
    },
    "minillm alone": {
        "objective": {"type": "minillm", "pt_weight": 0},
        "sampler": {"type": "student"} | ROUNDS | {"rollouts": 32},
        "optim": {"steps": 4},
        "select": {"metric": "reverse_kl"},
    },
    "dense": {
        "path": "t > a > s",
        "objective": {"type": "minillm", "pt_kd_ratio": 0.5},
        "sampler": {"type": "teacher_mixed"} | ROUNDS,
        "dense": {},
    },
    "speculative": {"objective": {"type": "reverse_kl"}, "sampler": {"type": "speculative"} | ON_POLICY},
    "pair": {"objective": {"type": "contrastive"}, "sampler": {"type": "pair"} | ON_POLICY},
}


def recipe(family: str) -> dict:
    """Random weights, so that hardly a sampled answer ends before `max_new_tokens`: lengths are known, and all else is tested."""
    shaped = COUNTED["shaped"]
    sft = {"sft": {"optim": {"batch": 16} | WHOLE["optim"], "select": {"metric": "loss"}}}
    return {
        "study": "t",
        "seeds": [1],
        "models": {"t": shaped(family, 48, 2) | sft, "a": shaped(family, 40, 2), "s": shaped(family, 32, 1)},
        "data": {"train": "tinyworld", "dev": "tinyworld", "test": ["tinyworld"], "corpus": "tinyworld", "template": "plain"}
        | {"max_length": 48, "limit": {"train": 64, "dev": 16}, "world": {"people": 20}},
        "method": {"optim": {"steps": 2, "batch": 16}, "select": {"metric": "loss"}},
        "evaluate": {"also": {}, "max_new_tokens": 8},
        "arms": {name: {"path": "t > s"} | arm for name, arm in ARMS.items()},
    }


@pytest.mark.parametrize("inference", [False, True])
def test_the_counter_counts_as_torchs_own_does(inference):
    model, ids = tiny_model("llama"), torch.arange(12).view(2, 6)
    with FlopCounterMode(display=False, custom_mapping=COUNTED["_ADDED"]) as whole, COUNTED["Counter"]() as counter:
        if inference:  # where torch does not divide operations into their parts
            with torch.inference_mode():
                model(ids)
        else:
            model(ids, labels=ids).loss.backward()
    assert counter.flops == whole.get_total_flops() > 0


@pytest.mark.slow
@pytest.mark.parametrize("family", COUNTED["FAMILIES"])
def test_meter_and_prediction_agree_with_torch(family, tmp_path):
    settings, found = recipe(family), {}
    if family == "gpt2":  # its layers have formulas of their own; which passes a method needs does not depend on the family
        settings["arms"] = {name: settings["arms"][name] for name in ("kd", "packed", "minillm", "speculative")}
    for stage, flops, manifest in COUNTED["counted"](make_plan(validate(settings)), tmp_path):
        parts = manifest["ledger"]["parts"]
        assert sum(part["flops"] for part in parts.values()) == pytest.approx(flops, rel=0.02), stage.label
        assert stage.cost.total == pytest.approx(flops, rel=0.15), stage.label
        assert set(stage.cost.parts) == set(parts), stage.label
        found[stage.label] = stage.cost.total / flops
    assert len(found) == len(settings["arms"]) + (1 if family == "gpt2" else 2)  # the teacher's SFT, and t > a of the arm `dense`


@pytest.mark.slow
@pytest.mark.parametrize("family", COUNTED["FAMILIES"])
@pytest.mark.parametrize("part", [(), ("c_fc", "down_proj")])
def test_adapters_and_layers_that_run_again_agree_with_torch(family, part, tmp_path):
    """Frozen weights need no gradient, and nothing before the first adapter takes part in a backward pass."""
    settings = recipe(family)
    lora = {"r": 4, "targets": [name for name in part if (name == "c_fc") == (family == "gpt2")]}
    settings["models"] = {name: settings["models"][name] | {"lora": lora} for name in "ts"}
    settings["arms"] = {name: settings["arms"][name] for name in ("kd", "minillm")}
    if not part:  # elsewhere the end of a layer, which nothing needs, is counted though torch leaves it out
        settings["arms"]["minillm"]["optim"] = {"micro_batch": 8, "gradient_checkpointing": True}
    plan = make_plan(validate(settings))
    for stage, flops, manifest in COUNTED["counted"](plan, tmp_path):
        parts = manifest["ledger"]["parts"]
        assert sum(found["flops"] for found in parts.values()) == pytest.approx(flops, rel=0.02), stage.label
        assert stage.cost.total == pytest.approx(flops, rel=0.15), stage.label
        assert set(stage.cost.parts) == set(parts), stage.label
    whole = make_plan(validate(settings | {"models": {name: m | {"lora": None} for name, m in settings["models"].items()}}))
    for tuned, full in zip(plan.stages.values(), whole.stages.values(), strict=True):
        if tuned.steps:
            assert tuned.cost.parts["training/student"].flops < 0.9 * full.cost.parts["training/student"].flops
            assert tuned.cost.memory.peak(cuda=True) < full.cost.memory.peak(cuda=True)
            assert tuned.cost.kind != full.cost.kind


def test_published_call_graph_of_the_gpt2_ladder():
    """XL > M > S costs 1.67 of XL > S per rollout, XL > L > S 2.47, XL > L > M > S 3.14 (256 tokens, 512 of plain text, 4 epochs)."""
    forward = {name: 2 * millions * 1e6 for name, millions in {"S": 124.4, "M": 354.8, "L": 774.0, "XL": 1557.6}.items()}

    def path(*names: str) -> float:
        return sum(minillm_flops(forward[s], forward[t], length=256, corpus=512, epochs=4) for t, s in pairwise(names))

    direct = path("XL", "S")
    assert direct == pytest.approx(1.54e13, rel=0.01)
    ratios = [path(*names) / direct for names in (("XL", "M", "S"), ("XL", "L", "S"), ("XL", "L", "M", "S"))]
    assert ratios == pytest.approx([1.67, 2.47, 3.14], abs=0.005)


def test_the_expected_largest_of_a_batch():
    assert largest([1, 2, 3], 2) == pytest.approx((2 + 3 + 3) / 3)
    assert largest([1, 2, 3], 2, power=2) == pytest.approx((4 + 9 + 9) / 3)
    assert largest([5, 1], 9) == 5


def test_a_limit_of_tokens_sets_the_rows_of_a_pass():
    texts = Texts(((3, 1), (5, 4)), 2)  # 4 and 9 tokens: a batch of several rows has one of 9
    rows = {n: passes.rows_in_pass(Optim(batch=8, tokens=n), texts) for n in (1, 17, 18, 27, 10**6)}
    assert rows == {1: 1, 17: 1, 18: 2, 27: 3, 10**6: 8}
    assert [passes.rows_in_pass(Optim(batch=8, tokens=n, packed=True), texts) for n in (1, 13, 26)] == [1, 2, 4]
    assert passes.rows_in_pass(Optim(batch=8, micro_batch=2), texts) == 2
    packed, padding = passes.training_batch(texts, 2, packed=True)
    assert (packed.positions, packed.pairs, packed.heads, padding) == (3 + 8, 9 + 64, 1 + 4, 0)


def test_fewer_tokens_and_no_padding_need_less_memory():
    def cost(**optim):
        settings = recipe("gpt2") | {"arms": {"kd": {"path": "t > s", "optim": {"steps": 4, "batch": 64} | optim}}}
        plan = make_plan(validate(settings))
        return next(stage.cost for stage in plan.stages.values() if stage.kind == "distill")

    whole, tokens, packed = cost(), cost(tokens=256), cost(packed=True)
    assert tokens.memory.peak(cuda=True) < whole.memory.peak(cuda=True)
    assert packed.memory.peak(cuda=True) < whole.memory.peak(cuda=True)
    assert packed.padding == 0 < tokens.padding < whole.padding
    assert len({whole.kind, tokens.kind, packed.kind}) == 3


def test_sampling_pads_prompts_and_drops_ended_rows_in_groups():
    """Two prompts of 3 and 5; answers of 1 and 4 tokens: a pass over 2 x 5, then the longer row alone for 3 tokens."""
    work = passes.sampling(Texts(((3, 1), (5, 4)), 2), chunk=2, count=2)
    assert (work.positions, work.heads) == (2 * 5 + 3, 2 + 3)
    assert work.pairs == 2 * 25 + 6 + 7 + 8
    lazy = passes.lazy_sampling(Texts(((3, 1), (5, 4)), 2), chunk=2, count=2)
    assert (lazy.positions, lazy.heads) == (3 + 5 + 3, 5)


@pytest.mark.parametrize("sampler", get_args(get_args(Sampler)[0]))
def test_every_sampler_has_a_cost(sampler):
    objective = Contrastive() if sampler.pairs else ForwardKL()
    method = Method(objective=objective, sampler=sampler(), optim=Optim(steps=16, batch=16))
    cost = Ledger(validate(recipe("llama"))).distill(("t",), "s", method)
    assert cost.parts["training/student"].flops > 0
    assert cost.parts["training/teacher"].flops > 0
    assert ("rollout/student" in cost.parts) == sampler.on_policy
    assert ("rollout/teacher" in cost.parts) == sampler().guided


def test_a_mixture_without_the_teacher_costs_what_the_student_alone_does():
    ledger, optim = Ledger(validate(recipe("llama"))), Optim(steps=4, batch=64, micro_batch=1)  # so that caches take most memory
    rounds = {"rollouts": 64, "inner_epochs": 1}
    alone = ledger.distill(("t",), "s", Method(sampler=StudentSampler(**rounds), optim=optim))
    mixed = ledger.distill(("t",), "s", Method(sampler=TeacherMixedSampler(alpha=0, **rounds), optim=optim))
    assert (mixed.parts, mixed.memory) == (alone.parts, alone.memory)


def test_stored_answers_of_an_untrained_teacher_are_as_long_as_they_may_be():
    """Random weights end no answer, in the stage that generates them as in the one that trains on them."""
    method = Method(sampler=TeacherSampler(max_new_tokens=40), optim=Optim(steps=4, batch=16))
    ledger = Ledger(validate(recipe("llama")))
    trained, untrained = (ledger.distill((name,), "s", method) for name in "ta")
    assert untrained.parts["training/student"].heads == 4 * 16 * 40
    assert trained.parts["training/student"].heads < 4 * 16 * 40


def test_a_pinned_tokenizer_is_read_at_the_models_revision(tmp_path, monkeypatch):
    """Its vocabulary is part of a scratch model's size, without which no FLOPs are known."""
    tinyworld.tokenizer(people=20).backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    monkeypatch.setattr(sources, "locate", lambda load, revision="main", **_: tmp_path if (load, revision) == ("a/words", "v2") else None)
    settings = recipe("llama")
    settings["models"] = {name: model | {"tokenizer": "a/words", "revision": "v2"} for name, model in settings["models"].items()}
    settings["arms"] = {"kd": settings["arms"]["kd"], "longer": {"path": "t > s", "compute": "as kd"}}
    assert all(arm.flops for arm in make_plan(validate(settings)).arms)


def test_a_unigram_tokenizer_gives_the_size_of_a_scratch_model(tmp_path):
    """Its file lists pairs of a token and a score, not a mapping from tokens to ids."""
    pieces = [("<unk>", 0.0), ("a", -1.0), ("b", -1.5), ("ab", -2.0)]
    tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=0)).save(str(tmp_path / "tokenizer.json"))
    settings = recipe("llama")
    settings["models"]["s"] |= {"tokenizer": str(tmp_path)}
    assert Ledger(validate(settings)).config("s")["vocab_size"] == len(pieces)


def test_watching_is_as_fast_as_training_if_no_update_was_watched():
    parts = {"training/student": CostPart(300.0), "rollout/student": CostPart(80.0), "watching/student": CostPart(20.0)}
    cost = Cost(parts, kind="gkd")
    assert throughput.seconds(cost, {"gkd": {"training": 10.0, "sampling": 2.0}}) == 30 + 40 + 2
    assert throughput.seconds(cost, {"gkd": {"training": 10.0, "sampling": 2.0, "watching": 4.0}}) == 30 + 40 + 5
    assert throughput.seconds(cost, {"gkd": {"training": 10.0}}) is None


def test_wall_clock_fills_all_workers():
    """A chain of 3 and 2 seconds beside one of 4: 5 s on two workers, 9 s on one."""
    stages = {name: Stage(spec(**parents), name, name, "m", 1, None) for name, parents in (("a", {}), ("b", {"student": "a"}), ("c", {}))}
    takes = {"a": 3.0, "b": 2.0, "c": 4.0}
    assert throughput.wall_clock(stages, takes, 2) == 5
    assert throughput.wall_clock(stages, takes, 1) == 9


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "?"), (0.4, "0 s"), (89, "89 s"), (90, "2 min"), (5399, "90 min"), (5400, "1.5 h"), (1e6, "277.8 h")]
)
def test_durations_in_words(seconds, text):
    assert throughput.spoken(seconds) == text
