"""Watching: metrics against direct computation, and alarms that come once."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tests.conftest import response_logits, tiny_model

from tadistill.config.method import Method
from tadistill.config.objective import MiniLLM, ReverseKL
from tadistill.config.sampling import TeacherMixedSampler
from tadistill.data.batch import Batch, Sequence, collate
from tadistill.train.loop import _Run
from tadistill.train.monitoring import Alarms, watch
from tadistill.train.step import make_step

ROWS = [((5, 6), (7, 8, 9, 0)), ((4,), (11, 0)), ((1,), (2, 3, 4, 5, 2, 3, 4, 5, 2))]


def sampled(values):
    return collate([Sequence(p, r, {k: np.full(len(r), v, np.float32) for k, v in values.items()}) for p, r in ROWS], pad=0)


def test_metrics_are_what_they_say():
    student, teacher = tiny_model("llama"), tiny_model("llama", seed=5)
    batch = sampled({"student": -2.0, "behaviour": -1.9})
    step = make_step(Method(objective=MiniLLM(pt_weight=0, clip=0.3), sampler=TeacherMixedSampler()), student, (teacher,), 31)
    found = watch(step, [batch])
    with torch.no_grad():
        log_q, log_p = (response_logits(m, batch, 31).double().log_softmax(-1) for m in (student, teacher))
    tokens = batch.targets_BT[batch.mask_BT].unsqueeze(1)
    q, p = log_q.gather(1, tokens)[:, 0], log_p.gather(1, tokens)[:, 0]
    ratio = (q + 1.9).exp()
    expected = {
        "length": 15 / 3,
        "repetition": 2 / 7,  # the grams 2345 and 3452 come again, out of 1 + 6
        "entropy": -(log_q.exp() * log_q).sum(-1).mean(),
        "teacher_entropy": -(log_p.exp() * log_p).sum(-1).mean(),
        "teacher_top_mass": log_q.exp().gather(1, log_p.topk(10).indices).sum(1).mean(),
        "reward": (p + 2.0).mean(),
        "reverse_kl": (ratio * ((p - q).exp() - 1 - (p - q))).sum() / ratio.sum(),
        "clip_fraction": ((ratio - 1).abs() > 0.3).double().mean(),
        "weight_min": np.exp(-0.1),
        "weight_max": np.exp(-0.1),
    }
    assert set(found) == {f"rollout/{name}" for name in expected}
    for name, value in expected.items():
        assert found[f"rollout/{name}"] == pytest.approx(float(value), rel=1e-4), name


def test_sums_over_an_update_are_those_of_all_micro_batches_and_processes():
    """They need no forward pass, so a process that makes none has them too."""
    student, teacher = tiny_model("llama"), tiny_model("llama", seed=5)
    step = make_step(Method(objective=MiniLLM(pt_weight=0), sampler=TeacherMixedSampler()), student, (teacher,), 31)
    batches, other = (
        [sampled({"student": -2.0, "behaviour": -b, "teacher": -b}) for b in (1.5, 2.5)],
        sampled({"student": -3.0, "behaviour": -1.0, "teacher": -4.0}),
    )
    sums = []
    watch(step, [other.first(1)], scores=False, gather=lambda own: sums.append(own) or own)
    found = watch(step, batches, gather=lambda own: torch.cat([own, *sums]))
    expected = {"length": (15 + 15 + 4) / 7, "repetition": 4 / (7 + 7 + 1), "reward": (0.5 * 15 - 0.5 * 15 - 1.0 * 4) / 34}
    for name, value in (expected | {"weight_min": np.exp(-2.0), "weight_max": np.exp(0.5)}).items():
        assert found[f"rollout/{name}"] == pytest.approx(value, rel=1e-5), name
    assert found["rollout/entropy"] == watch(step, batches[:1])["rollout/entropy"]
    assert "rollout/entropy" not in watch(step, batches, scores=False)


def test_the_clipped_ratio_is_that_of_the_objective():
    """With `clip_weight: false`, q / q_old is clipped, which is 1 before the first update, and not q / behaviour."""
    student = tiny_model("llama")
    batch = sampled({"student": -2.0, "behaviour": -9.0})
    with torch.no_grad():
        log_q = response_logits(student, batch, 31).log_softmax(-1).gather(1, batch.targets_BT[batch.mask_BT].unsqueeze(1))[:, 0]
    values = torch.zeros_like(batch.values["student"])
    values[batch.mask_BT] = log_q
    batch.values["student"] = values
    for clip_weight, expected in ((True, 1.0), (False, 0.0)):
        objective = MiniLLM(pt_weight=0, clip_weight=clip_weight)
        step = make_step(Method(objective=objective, sampler=TeacherMixedSampler()), student, (tiny_model("llama", seed=5),), 31)
        assert watch(step, [batch])["rollout/clip_fraction"] == expected


def test_text_that_is_not_the_students_is_not_watched_and_stays_where_it_is(monkeypatch):
    step = make_step(Method(objective=ReverseKL()), tiny_model("llama"), (tiny_model("llama", seed=5),), 31)
    batch, moved = collate([Sequence(p, r) for p, r in ROWS], pad=0), []
    monkeypatch.setattr(Batch, "to", lambda self, device: moved.append(device) or self)
    run = SimpleNamespace(
        accelerator=SimpleNamespace(is_main_process=True, autocast=nullcontext, device=torch.device("cpu")),
        sampler=SimpleNamespace(samples=lambda done: False),
        step=step,
    )
    assert watch(step, [batch]) == _Run.watch(run, [batch], 0) == {}
    assert not moved
    watch(step, [sampled({"student": -2.0, "behaviour": -2.0})])
    assert moved == [torch.device("cpu")]


def test_only_the_teachers_scores_are_enough_for_the_reverse_kl():
    student = tiny_model("llama")
    step = make_step(Method(objective=ReverseKL()), student, (), 31)
    found = watch(step, [sampled({"student": -2.0, "behaviour": -2.0, "teacher": -1.0})])
    assert found["rollout/reward"] == pytest.approx(1.0)
    assert "rollout/teacher_top_mass" not in found
    assert "rollout/clip_fraction" not in found


def metrics(length=20.0, repetition=0.05, entropy=2.0, **more):
    named = {"length": length, "repetition": repetition, "entropy": entropy} | more
    return {f"rollout/{name}": value for name, value in named.items()}


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (metrics(repetition=0.6), "collapse: 60% of 4-grams repeat within a response (at first 5%); raise sampler.alpha"),
        (metrics(length=5), "length drift: responses have 5 tokens (at first 20); raise sampler.alpha, keep objective.length"),
        (metrics(length=60), "length drift: responses have 60 tokens"),
        (
            metrics(entropy=0.2, teacher_entropy=0.9),
            "entropy drop: the entropy is 0.20 nats per token (at first 2.00, the teacher's is 0.90); raise sampler.alpha",
        ),
    ],
)
def test_an_alarm_comes_once_in_a_training(bad, words):
    alarms = Alarms(minillm=True)
    assert alarms.check(3, metrics()) == []
    (line,) = alarms.check(3, bad)
    assert line.startswith(f"update 3: {words}")
    assert alarms.given == [line]
    assert "alpha" not in Alarms(minillm=False).advice
    assert "\n" not in line
    assert alarms.check(3, bad) == []
    resumed = Alarms(minillm=True)
    resumed.restore(alarms.state())
    assert resumed.check(3, bad) == []
    assert resumed.check(3, metrics()) == []
    assert resumed.check(3, bad) == []
    assert resumed.given == [line]


def test_an_untrained_student_may_lose_entropy_until_it_has_that_of_the_teacher():
    alarms = Alarms(minillm=False)
    for step, (entropy, of_teacher) in enumerate(((3.2, 1.4), (0.82, 0.93), (1.1, 0.9), (0.5, 0.93))):
        assert alarms.check(step, metrics(entropy=entropy, teacher_entropy=of_teacher)) == []
    assert len(alarms.check(9, metrics(entropy=0.4, teacher_entropy=0.93))) == 1


def test_if_the_entropy_of_the_teacher_is_unknown_the_distance_to_it_decides():
    """A student that was trained from random weights loses entropy and comes closer to its teacher."""
    alarms = Alarms(minillm=False)
    for step, (entropy, reverse_kl) in enumerate(((9.0, 6.0), (3.0, 2.0), (0.8, 0.9))):
        assert alarms.check(step, metrics(entropy=entropy, reverse_kl=reverse_kl)) == []
    (line,) = alarms.check(9, metrics(entropy=0.8, reverse_kl=7.0))
    assert "the entropy is 0.80 nats per token (at first 9.00, and the reverse KL has risen)" in line
    alarms = Alarms(minillm=False)
    assert alarms.check(0, metrics()) + alarms.check(9, metrics(entropy=0.1)) == []  # nothing is known of the teacher


def test_small_changes_and_unwatched_updates_raise_none():
    alarms = Alarms(minillm=True)
    for length, repetition, entropy in ((20, 0.05, 2.0), (25, 0.1, 1.5), (14, 0.2, 2.6)):
        assert alarms.check(3, metrics(length, repetition, entropy)) == []
    assert alarms.check(3, {}) == []


def test_new_text_shows_whether_sampling_and_training_agree():
    student = tiny_model("llama")
    step, batch = make_step(Method(objective=ReverseKL()), student, (), 31), sampled({"student": -2.0, "behaviour": -2.0})
    with torch.no_grad():
        log_q = response_logits(student, batch, 31).log_softmax(-1).gather(1, batch.targets_BT[batch.mask_BT].unsqueeze(1))[:, 0]
    assert "apart" not in watch(step, [batch])
    apart = watch(step, [batch], fresh=True)["apart"]
    assert apart == pytest.approx(float((log_q + 2).abs().mean() / log_q.abs().mean()), rel=1e-4)
    batch.values["student"][batch.mask_BT] = log_q
    assert watch(step, [batch], fresh=True)["apart"] < 1e-6


def test_a_disagreement_beyond_rounding_is_told_once():
    for precise, small in ((True, 0.002), (False, 0.05)):
        alarms = Alarms(minillm=True, precise=precise)
        assert alarms.check(0, metrics(), small) == []
        (line,) = alarms.check(10, metrics(), 0.3)
        assert line.startswith("update 10: sampling and training disagree: log-probabilities of new tokens differ by 30% on average")
        assert alarms.check(20, metrics(), None) == []  # no new text
        assert alarms.check(30, metrics(), 0.3) == []
        assert alarms.check(40, metrics(), small) + alarms.check(50, metrics(), 0.3) == []


def test_a_disagreement_is_not_told_again_after_an_interruption_within_a_round():
    before, resumed = Alarms(minillm=True), Alarms(minillm=True)
    assert len(before.check(10, metrics(), 0.3)) == 1
    resumed.restore(before.state())
    assert resumed.check(20, metrics(), None) == []  # no new text
    assert resumed.check(30, metrics(), 0.3) == []


def test_a_state_without_alarms_starts_anew():
    alarms = Alarms(minillm=True)
    alarms.restore({})
    assert alarms.state() == Alarms(minillm=True).state()


def test_text_without_a_loss_gives_an_alarm():
    alarms, usual = Alarms(minillm=False), {"rollout/length": 5.0, "rollout/repetition": 0.0, "rollout/entropy": 1.0}
    assert alarms.check(0, usual | {"rollout/left_out": 0.04}) == []
    assert alarms.check(1, usual | {"rollout/left_out": 0.09}) == []  # doubled, but small
    (line,) = alarms.check(2, usual | {"rollout/left_out": 0.97})
    assert "the teacher cannot read 97% of the sampled tokens (at first 4%), so no loss compares them with the teacher" in line
    assert alarms.check(3, usual | {"rollout/left_out": 0.98}) == []  # once
