"""Dense guidance: the mixture's identities in loss and gradient, teachers that are left out, and rewards of rollouts."""

import numpy as np
import pytest
import torch
from tests.conftest import response_logits, tiny_model

from tadistill import objectives, rng
from tadistill.config import objective as config
from tadistill.config.method import Method
from tadistill.config.method_parts import Dense, Optim
from tadistill.config.sampling import StudentSampler, TeacherMixedSampler
from tadistill.data.batch import Sequence, collate
from tadistill.models.teachers import teacher_of
from tadistill.objectives import TargetMixture
from tadistill.train.monitoring import watch
from tadistill.train.step import counts, make_step

ROWS = [Sequence((5, 6), (7, 8, 9, 0)), Sequence((4,), (11, 0)), Sequence((1, 2, 3), (17, 18, 19, 20, 0))]


def teachers():
    return tuple(tiny_model(kind, seed=seed).requires_grad_(False) for kind, seed in (("llama", 5), ("gpt2", 6), ("llama", 7)))


def gradient(model):
    found = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    return found


def ready(step, batch, done=0):
    (found,) = step.prepare([batch], done, lambda sums: sums)
    return found


@pytest.mark.parametrize(
    ("objective", "kind"), [(config.ReverseKL(), "geometric"), (config.ForwardKL(), "arithmetic"), (config.ReverseKL(), "arithmetic")]
)
@pytest.mark.parametrize("weights", [(), (1.0, 2.0, 3.0)])
def test_a_step_towards_a_mixture_is_one_towards_its_softmax(objective, kind, weights):
    student, batch, several = tiny_model("llama"), collate(ROWS, pad=0), teachers()
    step = make_step(Method(objective=objective, dense=Dense(kind=kind, weights=weights)), student, several, 31)
    found = step.loss(student, ready(step, batch), counts([batch])).total
    found.backward()
    ours = gradient(student)
    shares = torch.tensor(weights or (1.0, 1.0, 1.0), dtype=torch.float64)
    shares = (shares / shares.sum())[:, None, None]
    log_p = torch.stack([response_logits(t, batch, 31).double().log_softmax(-1) for t in several])
    mixed = (shares * log_p).sum(0).log_softmax(-1) if kind == "geometric" else (shares * log_p.exp()).sum(0).log()
    loss = getattr(objectives, objective.type)(response_logits(student, batch, 31), mixed.float()).mean()
    loss.backward()
    torch.testing.assert_close(found, loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours, gradient(student), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("drop", [0.0, 0.6])
def test_recorded_hidden_states_mix_as_the_live_teachers_do(drop):
    student, several = tiny_model("llama"), teachers()
    recorded = tuple(teacher_of(model).target(collate(ROWS, pad=0)) for model in several)
    method = Method(objective=config.ReverseKL(), dense=Dense(weights=(1.0, 2.0, 3.0), drop=drop))
    for done in range(4):
        losses = []
        for batch, live in ((collate(ROWS, pad=0), several), (collate(ROWS, pad=0, targets=recorded), ())):
            step = make_step(method, student, live, 31, recorded=len(batch.targets))
            losses.append(step.loss(student, ready(step, batch, done), counts([batch])).total)
        assert torch.equal(*losses)


@pytest.mark.parametrize(("name", "kind"), [("reverse_kl", "geometric"), ("forward_kl", "arithmetic")])
def test_the_mean_of_divergences_has_the_gradient_of_the_mixture(name, kind):
    """sum_k w_k KL to each teacher, one after the other, is the divergence to the mixture up to a constant."""
    student, batch, several = tiny_model("llama"), collate(ROWS, pad=0), teachers()
    objective = {"reverse_kl": config.ReverseKL, "forward_kl": config.ForwardKL}[name]()
    for one in several:
        step = make_step(Method(objective=objective), student, (one,), 31)
        (step.loss(student, batch, counts([batch])).total / len(several)).backward()
    separately = gradient(student)
    step = make_step(Method(objective=objective, dense=Dense(kind=kind)), student, several, 31)
    step.loss(student, ready(step, batch), counts([batch])).total.backward()
    torch.testing.assert_close(gradient(student), separately, atol=1e-5, rtol=1e-4)


def test_a_teacher_that_is_left_out_is_not_run():
    student, batch, several = tiny_model("llama"), collate(ROWS, pad=0), teachers()
    step = make_step(Method(objective=config.ReverseKL(), dense=Dense(drop=0.6)), student, several, 31, seed=3)
    runs = [0, 0, 0]
    for k, teacher in enumerate(several):
        teacher.register_forward_hook(lambda *_, k=k: runs.__setitem__(k, runs[k] + 1))
    expected = [0, 0, 0]
    for done in range(12):
        weights = TargetMixture("geometric", (1, 1, 1), 0.6).drawn(rng.generator(3, "teachers left out", done)).weights
        expected = [n + (w > 0) for n, w in zip(expected, weights, strict=True)]
        prepared = ready(step, batch, done)
        assert prepared.mixture.weights == weights
        step.loss(student, prepared, counts([batch]))
    assert runs == expected
    assert 0 < min(expected) < 12


@pytest.mark.parametrize("sampler", [StudentSampler, TeacherMixedSampler])
@pytest.mark.parametrize("inner_epochs", [1, 2])
def test_rollouts_keep_every_teacher(sampler, inner_epochs):
    """States and scores of a round are those of forward passes; the reward is the weighted sum of log-probabilities, not normalised."""
    from tests.unit.rollout.test_samplers import rollouts

    several = teachers()[:2]
    source = rollouts(sampler=sampler(rollouts=8, inner_epochs=inner_epochs, max_new_tokens=6))
    source.teachers = tuple(map(teacher_of, several))
    method = Method(
        objective=config.MiniLLM(pt_weight=0), sampler=source.config, optim=Optim(steps=9, batch=4), dense=Dense(weights=(3.0, 1.0))
    )
    step = make_step(method, source.engine.student, several, 31)
    (batch,) = source.micro_batches(0)
    prepared, mask = ready(step, batch), batch.mask_BT
    log_p = [response_logits(t, batch, 31).log_softmax(-1) for t in several]
    tokens = batch.targets_BT[mask].unsqueeze(1)
    reward = sum(w * p.gather(1, tokens).squeeze(1) for w, p in zip((0.75, 0.25), log_p, strict=True))
    torch.testing.assert_close(prepared.values["teacher"][mask], reward, atol=1e-4, rtol=1e-4)
    assert watch(step, [prepared])["rollout/reward"] == pytest.approx(float((reward - batch.values["student"][mask]).mean()), abs=1e-4)
    for kept, expected in zip(prepared.targets, log_p, strict=True):
        torch.testing.assert_close(kept.head.logits(kept.states).log_softmax(-1), expected, atol=1e-4, rtol=1e-4)
    found = step.loss(source.engine.student, prepared, {"response": float(mask.sum())})
    log_q = response_logits(source.engine.student, batch, 31).log_softmax(-1)
    mixed = (0.75 * log_p[0] + 0.25 * log_p[1]).log_softmax(-1)
    ratio = (log_q.gather(1, tokens).squeeze(1) - batch.values["behaviour"][mask]).exp()
    single = (torch.minimum(ratio, ratio.clamp(0.8, 1.2)) * (log_q.exp() * (log_q - mixed)).sum(-1)).mean()
    torch.testing.assert_close(found.parts["single_step"], single.detach(), atol=1e-4, rtol=1e-4)


def test_one_teacher_that_is_left_is_that_teacher():
    student, batch, several = tiny_model("llama"), collate(ROWS, pad=0), teachers()
    alone = make_step(Method(objective=config.ReverseKL()), student, (several[1],), 31)
    step = make_step(Method(objective=config.ReverseKL(), dense=Dense(weights=(0.0, 1.0, 0.0))), student, several, 31)
    found = step.loss(student, ready(step, batch), counts([batch])).total
    assert float(found) == float(alone.loss(student, batch, counts([batch])).total)


def test_token_scores_of_an_arithmetic_mixture():
    log_p = [torch.tensor(np.log([0.5, 0.1])), torch.tensor(np.log([0.1, 0.3]))]
    found = TargetMixture("arithmetic", (1.0, 3.0)).token_scores(log_p).exp()
    torch.testing.assert_close(found, torch.tensor([0.2, 0.25], dtype=torch.float64))
