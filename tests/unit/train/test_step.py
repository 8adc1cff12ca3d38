"""Steps: every objective's loss and gradient against whole logits and autograd; schedules; how an objective is added."""

from typing import Literal

import numpy as np
import pytest
import torch
from tests.conftest import response_logits, tiny_model

from tadistill import objectives
from tadistill.config import objective as config
from tadistill.config.method import Method
from tadistill.config.method_parts import Optim
from tadistill.data.batch import Sequence, collate
from tadistill.models.forward import Reader, pack_rows
from tadistill.objectives import Hidden, cross_entropy, log_probs, top_k
from tadistill.rollout.samplers import FixedSequences
from tadistill.train.step import counts, make_step

ROWS = [Sequence((5, 6), (7, 8, 9, 0)), Sequence((4,), (11, 0)), Sequence((1, 2, 3), (17, 18, 19, 20, 0))]
CLASSES = config.Objective.__args__[0].__args__
OTHERS = {
    config.CrossEntropy,
    config.Taid,
    config.Contrastive,
    config.Custom,
    config.SampledKL,
    config.NoTeacher,
    config.MiniLLM,
    config.Gold,
}
"""Objectives that are no function of two logits with one tokenizer. `Gold` is for two tokenizers."""
DIVERGENCES = [c for c in CLASSES if c not in OTHERS]
VARIANTS = [v for v in DIVERGENCES if v not in (config.TopKForwardKL, config.TopKReverseKL)]


def function_of(objective):
    return getattr(objectives, "sorted_distance" if objective.type == "uld" else objective.type)


def gradients(model):
    found = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    return found


def check(objective, batch, expected, *, kind="llama", vocab=31, teacher=None):
    """The step's loss and gradient equal those of `expected(student's logits, teacher's logits, tokens)` on whole logits."""
    student = tiny_model(kind)
    teacher = teacher or tiny_model("llama", seed=5).requires_grad_(False)
    step = make_step(Method.model_construct(objective=objective), student, (teacher,), vocab)
    found = step.loss(student, batch, counts([batch]))
    found.total.backward()
    ours = gradients(student)
    logits, target = (response_logits(m, batch, vocab) for m in (student, teacher))
    loss = expected(logits, target, batch.targets_BT[batch.mask_BT]).mean()
    loss.backward()
    torch.testing.assert_close(found.total, loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours, gradients(student), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(sum(found.parts.values()), loss.detach(), atol=1e-5, rtol=1e-5)
    return found


@pytest.mark.parametrize("variant", DIVERGENCES)
@pytest.mark.parametrize("ratio", [1.0, 0.3])
def test_every_divergence_is_its_function(variant, ratio, kind):
    objective = variant(kd_ratio=ratio, temperature=1.5, **({"k": 7} if "k" in variant.model_fields else {}))
    arguments = objective.model_dump(exclude={"type", "kd_ratio"})
    function = function_of(objective)

    def expected(logits, target, tokens):
        return ratio * function(logits, target, **arguments) + (1 - ratio) * cross_entropy(logits, tokens)

    found = check(objective, collate(ROWS, pad=0), expected, kind=kind)
    assert set(found.parts) == {objective.type} | ({"cross_entropy"} if ratio < 1 else set())


def test_a_wider_teacher_is_cut_to_the_shared_vocabulary():
    teacher = tiny_model("llama", vocab=40, seed=5).requires_grad_(False)
    check(config.ReverseKL(), collate(ROWS, pad=0), lambda s, t, _: objectives.reverse_kl(s, t), vocab=29, teacher=teacher)


def test_taid_starts_from_its_schedule():
    found = check(config.Taid(start=0.3), collate(ROWS, pad=0), lambda s, t, _: objectives.taid(s, t, t=0.3))
    assert set(found.parts) == {"taid"}


def test_contrastive_reads_whose_text_it_is():
    tagged = [Sequence(s.prompt, s.response, {"from_teacher": np.full(len(s.response), i % 2, np.float32)}) for i, s in enumerate(ROWS)]
    batch = collate(tagged, pad=0)

    def expected(logits, target, _):
        pulled = objectives.skew_forward_kl(logits, target, alpha=0.2)
        pushed = objectives.skew_reverse_kl(logits, target, alpha=0.2, detach_mixture=True)
        return torch.where(batch.values["from_teacher"][batch.mask_BT] > 0, pulled, pushed)

    check(config.Contrastive(alpha=0.2), batch, expected)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_sampled_kl_needs_no_teacher(estimator):
    teacher = tiny_model("llama", seed=5)
    scores = -cross_entropy(response_logits(teacher, plain := collate(ROWS, pad=0), 31), plain.targets_BT[plain.mask_BT])
    parts = scores.detach().split([len(s.response) for s in ROWS])
    batch = collate([Sequence(s.prompt, s.response, {"teacher": p.numpy()}) for s, p in zip(ROWS, parts, strict=True)], pad=0)

    def expected(logits, target, tokens):
        log_q, log_p = (log_probs(z).gather(-1, tokens[:, None])[:, 0] for z in (logits, target))
        return getattr(objectives, estimator)(log_q, log_p)

    check(config.SampledKL(estimator=estimator), batch, expected)


def test_the_control_without_a_teacher_pushes_unlikely_tokens_down():
    def expected(logits, _, tokens):
        log_q = log_probs(logits).gather(-1, tokens[:, None])[:, 0]
        return log_q * (log_q.detach().exp() < 0.03)

    found = check(config.NoTeacher(below=0.03), collate(ROWS, pad=0), expected)
    assert found.total < 0


@pytest.mark.parametrize("tail", ["lump", "drop"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_recorded_signal_takes_the_teachers_place(variant, tail):
    teacher = tiny_model("llama", seed=5).requires_grad_(False)
    batch = collate(ROWS, pad=0)
    kept = top_k(response_logits(teacher, batch, 31), 6, tail=tail)
    objective = variant(kd_ratio=1.0, temperature=1.0 if tail == "lump" else 2.0)
    arguments = objective.model_dump(exclude={"type", "kd_ratio", "temperature"})
    function = function_of(objective)

    def expected(logits, _, __):
        return function(*kept.align(logits, objective.temperature), **arguments)

    check(objective, collate(ROWS, pad=0, targets=(kept,)), expected)


def test_hidden_states_take_the_teachers_place():
    teacher = tiny_model("llama", seed=5).requires_grad_(False)
    reader = Reader(teacher)
    signal = Hidden(reader.hidden(teacher, collate(ROWS, pad=0)), reader.head)
    student = tiny_model("llama")
    losses = []
    for batch, other in ((collate(ROWS, pad=0), (teacher,)), (collate(ROWS, pad=0, targets=(signal,)), ())):
        step = make_step(Method(objective=config.JensenShannon()), student, other, 31)
        losses.append(step.loss(student, batch, counts([batch])).total)
    assert torch.equal(*losses)


def test_an_objective_is_one_function_one_variant_and_one_line(monkeypatch):
    def squared_error(student_logits, teacher_logits, *, scale, temperature=1.0):
        gap = (log_probs(student_logits, temperature).exp() - log_probs(teacher_logits, temperature).exp()).square()
        return scale * gap.sum(-1)

    class SquaredError(config.Divergence):
        type: Literal["squared_error"] = "squared_error"
        scale: float = 3.0

    monkeypatch.setattr(objectives, "squared_error", squared_error, raising=False)
    found = check(
        SquaredError(kd_ratio=0.5), collate(ROWS, pad=0), lambda s, t, y: 0.5 * (squared_error(s, t, scale=3.0) + cross_entropy(s, y))
    )
    assert set(found.parts) == {"squared_error", "cross_entropy"}


def test_every_variant_has_a_function_and_only_its_arguments():
    assert set(CLASSES) == {*DIVERGENCES, *OTHERS}
    for variant in DIVERGENCES:
        defaults = variant()
        function = function_of(defaults)
        for name in set(variant.model_fields) - {"type", "kd_ratio"}:
            assert function.__kwdefaults__[name] == getattr(defaults, name), (variant, name)


@pytest.mark.parametrize("variant", [c for c in CLASSES if c not in (config.MiniLLM, config.Custom)])
def test_every_variant_has_a_step(variant):
    """Its term has its name, beside cross-entropy if it has a share; MiniLLM's step is in test_minillm.py."""
    values = {name: np.zeros(4, np.float32) for name in ("from_teacher", "teacher")}
    batch = collate([Sequence((5, 6), (7, 8, 9, 0), values)], pad=0)
    step = make_step(Method.model_construct(objective=variant()), tiny_model("llama"), (tiny_model("llama", seed=5),), 31)
    own = variant().type
    assert [term.name for term in step.terms(batch)] == [own, *["cross_entropy"] * (getattr(variant(), "kd_ratio", 1) < 1)]


UNEVEN = [Sequence((3 + i, 0, 9), (*range(5, 5 + n), 0)) for i, n in enumerate((1, 2, 4, 18, 3, 2, 3, 5))]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("objective", ["cross_entropy", "reverse_kl"])
def test_token_budgets_give_the_loss_and_gradients_of_fixed_micro_batches(objective, packed):
    method, found = Method.model_validate({"objective": {"type": objective}}), []
    for settings in ({"micro_batch": 2}, {"tokens": 21, "packed": packed}):  # the longest row has 22 tokens, and is alone
        student, teacher = tiny_model("llama"), tiny_model("llama", seed=5).requires_grad_(False)
        if settings.get("packed"):
            pack_rows(student)
        step = make_step(method, student, (teacher,) if objective == "reverse_kl" else (), 31)
        if settings.get("packed"):
            pack_rows(teacher)  # also after it became a teacher
        batches = FixedSequences(UNEVEN, Optim(steps=1, batch=8, **settings), pad=0, seed=1).micro_batches(0)
        total = 0.0
        for batch in batches:
            loss = step.loss(student, batch, counts(batches)).total
            loss.backward()
            total += loss.item()
        found.append((total, gradients(student), [len(batch.ids_BT) for batch in batches]))
    (expected, slope, fixed), (got, ours, budgeted) = found
    assert fixed == [2, 2, 2, 2]
    assert sum(budgeted) == 8
    assert 1 in budgeted
    assert max(budgeted) > 2
    assert got == pytest.approx(expected, abs=1e-5)
    torch.testing.assert_close(ours, slope, atol=1e-5, rtol=1e-5)
