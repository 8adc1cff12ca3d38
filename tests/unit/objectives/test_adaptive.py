"""Adaptive KL, TAID and its schedule, DistiLLM-2's pair and its skew: golden values, the common checks, numbers by hand."""

import math

import pytest
import torch

from tadistill.objectives import (
    TaidSchedule,
    adaptive_kl,
    contrastive,
    contrastive_alpha,
    forward_kl,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    taid,
    taid_target,
)

from . import reference
from .cases import draw, name, of, pass_checks
from .test_divergence import STUDENT, TEACHER

ALL = pytest.mark.parametrize("case", of("adaptive"), ids=name)


@ALL
def test_common(case):
    pass_checks(case)


# --- adaptive KL --------------------------------------------------------------------------------------------------------


def test_adaptive_kl_golden():
    found = adaptive_kl(STUDENT, TEACHER)
    assert abs(float(found) - 0.459385) < 1e-7
    assert abs(float(found) - (0.4900468 * 0.46476023 + (1 - 0.4900468) * 0.45421961)) < 1e-7


def test_adaptive_kl_golden_where_the_published_variants_differ():
    p, q = (torch.tensor(x, dtype=torch.float64).log() for x in ([0.35, 0.3, 0.2, 0.1, 0.05], [0.1, 0.5, 0.1, 0.2, 0.1]))
    forward, reverse, paper, code = 0.31987671, 0.26876595, 0.30162287, 0.28701979
    assert abs(float(forward_kl(q, p)) - forward) < 1e-7
    assert abs(float(reverse_kl(q, p)) - reverse) < 1e-7
    assert abs(0.64285714 * forward + (1 - 0.64285714) * reverse - paper) < 1e-7
    for order in ([0, 1, 2, 3, 4], [3, 0, 4, 2, 1]):  # the head is found whatever the order of the vocabulary
        assert abs(float(adaptive_kl(q[order], p[order])) - paper) < 1e-7
    assert abs(float(adaptive_kl(q, p)) - code) > 0.01


def test_adaptive_kl_limits():
    student, teacher = draw(6, 9)
    assert torch.equal(adaptive_kl(student, teacher, mu=0), reverse_kl(student, teacher))
    assert torch.equal(adaptive_kl(student, teacher, mu=1), forward_kl(student, teacher))
    assert adaptive_kl(student, student).abs().max() == 0
    (slope,) = torch.autograd.grad(adaptive_kl(student.requires_grad_(), student.detach()).sum(), student)
    assert slope.abs().max() < 1e-15


@pytest.mark.parametrize("mu", [0.05, 0.5, 0.95])
def test_a_long_head_is_found_whole(mu):
    """A flat teacher over many tokens: the head is longer than the first guess of its length."""
    student, teacher = draw(2, 3000)
    teacher = teacher / 20
    found = adaptive_kl(student, teacher, mu=mu)
    for b in range(2):
        expected = reference.adaptive_kl(reference.softmax(teacher[b].numpy()), reference.softmax(student[b].numpy()), mu=mu)
        assert abs(float(found[b]) - expected) < 1e-10


# --- TAID ---------------------------------------------------------------------------------------------------------------


def test_taid_golden():
    assert abs(float(forward_kl(STUDENT, taid_target(STUDENT, TEACHER, t=0.4))) - 0.07338882) < 1e-7
    assert abs(float(taid(STUDENT, TEACHER, t=0.4)) - 1.2252338) < 1e-7


def test_taid_limits():
    student, teacher = draw(6, 9)
    q, p = student.softmax(-1), teacher.softmax(-1)
    torch.testing.assert_close(taid(student, teacher, t=0), -(q * q.log()).sum(-1), atol=1e-12, rtol=0)  # its own entropy
    torch.testing.assert_close(taid(student, teacher, t=1), forward_kl(student, teacher) - (p * p.log()).sum(-1), atol=1e-12, rtol=0)
    assert torch.equal(taid_target(student, teacher, t=0), student)
    assert torch.equal(taid_target(student, teacher, t=1), teacher)
    (slope,) = torch.autograd.grad(taid(student.requires_grad_(), teacher, t=0).sum(), student)
    assert slope.abs().max() < 1e-15  # it is its own target


def test_taid_has_the_gradient_of_the_kl_to_its_target():
    student, teacher = draw(6, 9)
    student.requires_grad_()
    target = taid_target(student, teacher, t=0.3)
    assert not target.requires_grad
    slopes = [torch.autograd.grad(v.sum(), student)[0] for v in (taid(student, teacher, t=0.3), forward_kl(student, target))]
    torch.testing.assert_close(*slopes, atol=1e-12, rtol=0)


@pytest.mark.parametrize("t", [0, 0.4, 1])
def test_taid_target_of_impossible_tokens(t):
    student, teacher = torch.tensor([0.0, -math.inf, 1.0]), torch.tensor([0.5, 1.0, -math.inf])
    probs = taid_target(student, teacher, t=t).softmax(-1)
    assert torch.isfinite(probs).all()
    assert [bool(x == 0) for x in probs] == [False, t < 1, t > 0]


def test_taid_schedule_by_hand():
    """start 0.4, end 1, rate 0.5, decay 0.5; ten steps, so the line is 0.4 + 0.06 step."""
    schedule = TaidSchedule(start=0.4, end=1.0, rate=0.5, decay=0.5)
    schedule.update(2.0, 1, 10)
    assert (schedule.t, schedule.momentum) == (0.4, 0.0)  # the first loss is only stored
    # delta = 1/2, m = 0.25, sigmoid = 0.5621765, t = 0.4 + 0.5 * 0.5621765 * 0.6; the line is at 0.52
    schedule.update(1.0, 2, 10)
    assert schedule.momentum == pytest.approx(0.25, abs=1e-12)
    assert schedule.t == pytest.approx(0.56865295, abs=1e-7)
    # delta = -2, m = -0.875, sigmoid = 0.2942150, t = 0.56865295 + 0.5 * 0.2942150 * 0.43134705; the line is at 0.58
    schedule.update(3.0, 3, 10)
    assert schedule.momentum == pytest.approx(-0.875, abs=1e-12)
    assert schedule.t == pytest.approx(0.63210738, abs=1e-7)
    # delta = 0, m = -0.4375; the line is at 0.4 + 0.6 * 0.9 = 0.94, above 0.63 + 0.5 * 0.39 * 0.37
    schedule.update(3.0, 9, 10)
    assert schedule.momentum == pytest.approx(-0.4375, abs=1e-12)
    assert schedule.t == pytest.approx(0.94, abs=1e-12)


@pytest.mark.parametrize("rate", [0.0, 5e-4, 5.0])
def test_taid_schedule_stays_between_its_line_and_its_end(rate):
    generator = torch.Generator().manual_seed(0)
    schedule = TaidSchedule(start=0.2, end=0.9, rate=rate)
    schedule.update(3.0, 0, 50)
    seen = [schedule.t]
    for step in range(1, 51):
        schedule.update(float(torch.rand((), generator=generator)) * 3, step, 50)
        line = 0.2 + 0.7 * step / 50
        assert line - 1e-12 <= schedule.t <= 0.9
        assert schedule.t >= seen[-1]
        assert rate > 0 or schedule.t == pytest.approx(line, abs=1e-12)
        seen.append(schedule.t)
    assert seen[-1] == pytest.approx(0.9, abs=1e-12)
    assert rate < 1 or seen[10] > 0.2 + 0.7 * 10 / 50 + 0.1  # a large rate does run ahead of the line


def test_taid_schedule_rises_faster_while_the_loss_falls():
    falling, rising = TaidSchedule(rate=0.01, decay=0.5), TaidSchedule(rate=0.01, decay=0.5)
    for step in range(20):
        falling.update(2.0**-step, step, 10**6)
        rising.update(1.2**step, step, 10**6)
    assert falling.t > rising.t + 1e-3


def test_taid_schedule_restored_continues_exactly():
    losses = [2.0, 1.5, 1.7, 1.2, 0.9, 1.0, 0.4]
    whole, first, second = (TaidSchedule(rate=0.2) for _ in range(3))
    for step, loss in enumerate(losses, 1):
        whole.update(loss, step, 100)
        if step <= 3:
            first.update(loss, step, 100)
    second.restore(first.state())
    for step, loss in enumerate(losses[3:], 4):
        second.update(loss, step, 100)
    assert second.state() == whole.state()
    assert set(whole.state()) == {"t", "momentum", "previous"}
    assert whole.t > 0.45


# --- DistiLLM-2 ---------------------------------------------------------------------------------------------------------


def test_contrastive_picks_a_side_for_every_row():
    student, teacher = draw(3, 4, 9)
    side = torch.tensor([[True], [False], [True]])
    found = contrastive(student, teacher, side, alpha=0.2)
    pulled = skew_forward_kl(student, teacher, alpha=0.2)
    pushed = skew_reverse_kl(student, teacher, alpha=0.2, detach_mixture=True)
    torch.testing.assert_close(found, torch.where(side, pulled, pushed), atol=1e-12, rtol=0)
    assert (pulled - pushed).abs().min() > 1e-6


def test_contrastive_takes_a_skew_per_sequence():
    student, teacher = draw(3, 4, 9)
    side = torch.tensor([[True], [False], [False]])
    found = contrastive(student, teacher, side, alpha=torch.tensor([[0.3], [0.05], [0.0]], dtype=torch.float64))
    torch.testing.assert_close(found[0], skew_forward_kl(student[0], teacher[0], alpha=0.3), atol=1e-12, rtol=0)
    torch.testing.assert_close(found[1], skew_reverse_kl(student[1], teacher[1], alpha=0.05), atol=1e-12, rtol=0)
    torch.testing.assert_close(found[2], reverse_kl(student[2], teacher[2]), atol=1e-12, rtol=0)


@pytest.mark.parametrize("side", [True, False])
def test_contrastive_limits(side):
    student, teacher = draw(5, 9)
    plain = (forward_kl if side else reverse_kl)(student, teacher)
    torch.testing.assert_close(contrastive(student, teacher, torch.tensor(side), alpha=0), plain, atol=1e-12, rtol=0)
    assert contrastive(student, teacher, torch.tensor(side), alpha=1).abs().max() == 0


def test_contrastive_alpha_by_hand():
    gap = torch.tensor([0.5, 0.48, 0.45, 2.0, -0.1], dtype=torch.float64)
    # 1 - 0.9 * 0.5 / (gap + 1e-5) = 0.100018 (cut to 0.1), 0.0625195, 0.0000222 (raised to 0.01), 0.775 (cut), above 1 (cut)
    expected = torch.tensor([0.1, 0.0625195, 0.01, 0.1, 0.1], dtype=torch.float64)
    torch.testing.assert_close(contrastive_alpha(gap, 0.5), expected, atol=1e-7, rtol=0)
    # base 0.5: 1 - 0.5 * 0.3 / 0.20001 = 0.2500375
    assert float(contrastive_alpha(torch.tensor([0.2], dtype=torch.float64), torch.tensor(0.3), base=0.5)) == pytest.approx(
        0.2500375, abs=1e-7
    )
