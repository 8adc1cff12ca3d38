"""Routes: each row meets the teacher of its set, for every sampler. The oracle finds the teacher by the first token of the prompt."""

from dataclasses import replace

import pytest
import torch
from tests.conftest import tiny_model
from tests.unit.train.test_contexts import NEW, VOCAB, alone, check_reverse_kl, losses, rows_of, sampled

from tadistill.config.method import Method
from tadistill.config.sampling import HiddenSignal
from tadistill.data.batch import Sequence, references
from tadistill.data.encoding import Encoded
from tadistill.data.training_sets import TrainingSets
from tadistill.models.forward import pack_rows
from tadistill.rollout.recorded_signals import Signals, of_teacher, record
from tadistill.rollout.samplers import FixedSequences, pack, unpack
from tadistill.train.monitoring import watch
from tadistill.train.step import make_step

SIZES = (6, 4, 5)
SETS = TrainingSets(SIZES, (0.4, 0.25, 0.35), (1, 0, 1))
PROMPTS = [(5 + number, 9 + i, *(12,) * (i % 3)) for number, size in enumerate(SIZES) for i in range(size)]
ROWS = [Encoded(i, prompt, (14 + i % 5, *(20,) * (i % 4), 0)) for i, prompt in enumerate(PROMPTS)]
ROUNDS = {"rollouts": 16, "max_new_tokens": NEW}
CASES = {
    "dataset": {"objective": {"type": "forward_kl", "kd_ratio": 0.7}},
    "teacher": {"objective": {"type": "jensen_shannon"}},
    "student": {"objective": {"type": "reverse_kl"}},
    "student, two epochs": {"objective": {"type": "reverse_kl"}, "sampler": {"inner_epochs": 2}},
    "student, sampled": {"objective": {"type": "sampled_kl"}},
    "student, minillm": {"objective": {"type": "minillm", "pt_weight": 0}},
    "mix": {"objective": {"type": "skew_reverse_kl"}, "sampler": {"lam": 0.5}},
    "replay": {"objective": {"type": "skew_forward_kl"}, "sampler": {"capacity": 16}},
    "pair": {"objective": {"type": "contrastive"}},
}


def method_of(case: str) -> Method:
    kind, given = case.partition(",")[0], CASES[case]
    sampler = {"type": kind} | given.get("sampler", {})
    sampler |= {"dataset": {}, "student": ROUNDS}.get(kind, {"max_new_tokens": NEW})
    return Method.model_validate({**given, "sampler": sampler, "optim": {"steps": 9, "batch": 8, "micro_batch": 4}})


def models(*, packed: bool = False):
    """Return the student and two teachers of different sizes."""
    found = tiny_model("llama"), tiny_model("llama", seed=5), tiny_model("llama", seed=6, hidden_size=24, num_attention_heads=3)
    for model in found if packed else ():
        pack_rows(model)
    return found[0], tuple(teacher.requires_grad_(False) for teacher in found[1:])


def texts() -> list[Sequence]:
    return [replace(row, teacher=SETS.teacher(i)) for i, row in enumerate(references(ROWS))]


def update(case: str, *, packed: bool = False, step: int = 1):
    """Return the step of a method, its models, and the batches of one update."""
    student, teachers = models(packed=packed)
    made, batches = sampled(method_of(case), student, teachers, texts(), ROWS, step, sets=SETS)
    return made, student, teachers, batches


def number_of(prompt: tuple[int, ...]) -> int:
    return {5: 1, 6: 0, 7: 1}[prompt[0]]


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_each_row_meets_the_teacher_of_its_set(case, packed):
    """In the oracle, the rows of one teacher are a batch without a route, and a step knows only this teacher."""
    made, student, teachers, batches = update(case, packed=packed)
    ours = losses(made, student, batches)
    assert any(len({number_of(prompt) for prompt, _ in rows_of(batch)}) == 2 for batch in batches)
    alone_with = [make_step(method_of(case), student, (teacher,), VOCAB) for teacher in teachers]
    per = {"response": float(sum(int(batch.mask_BT.sum()) for batch in batches)), "corpus": 1.0}
    student.zero_grad()
    total = 0.0
    for batch in batches:
        numbers = [number_of(prompt) for prompt, _ in rows_of(batch)]
        for k, step in enumerate(alone_with):
            rows = [i for i, number in enumerate(numbers) if number == k]
            if not rows:
                continue
            values = {name: value[rows] for name, value in batch.values.items()}
            own = replace(
                batch,
                ids_BT=batch.ids_BT[rows],
                attention_BT=batch.attention_BT[rows],
                mask_BT=batch.mask_BT[rows],
                values=values,
                targets=(),
                route=(),
            )
            if "teacher" in values:
                states = own.values["teacher"].clone()
                states[own.mask_BT] = teacher_scores(teachers[k], own)
                torch.testing.assert_close(own.values["teacher"], states, atol=1e-5, rtol=1e-5)
            loss = step.loss(student, own, per)
            loss.total.backward()
            total += float(loss.total.detach())
    gradient = torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])
    assert ours[0] == pytest.approx(total, rel=1e-5, abs=1e-6)
    torch.testing.assert_close(ours[1], gradient, atol=1e-5, rtol=1e-4)


def teacher_scores(teacher, batch) -> torch.Tensor:
    return torch.cat(
        [alone(teacher, *row).log_softmax(-1).gather(-1, torch.tensor(row[1]).unsqueeze(-1)).squeeze(-1) for row in rows_of(batch)]
    )


def test_a_divergence_equals_whole_logits():
    """Every row is read by the student, and by the teacher of its prompt."""
    made, student, teachers, batches = update("student")
    check_reverse_kl(made, student, batches, lambda prompt: (teachers[number_of(prompt)], prompt))


def test_recorded_outputs_are_those_of_the_rows_own_teacher(tmp_path):
    """Each teacher has recorded only its own rows, one set after the other."""
    student, teachers = models()
    for k, teacher in enumerate(teachers):
        mine = [row for row in texts() if row.teacher == k]
        record(of_teacher(made_teacher(teacher), 0), mine, HiddenSignal(type="hidden", dtype="float32"), tmp_path / str(k), vocab=VOCAB)
    signals = [Signals(tmp_path / str(k), torch.device("cpu")) for k in range(2)]
    method, common = method_of("dataset"), {"pad": 0, "seed": 3, "sets": SETS}
    read, live = (FixedSequences(texts(), method.optim, signals=given, **common) for given in (signals, ()))
    recorded, asked = make_step(method, student, (), VOCAB, recorded=2), make_step(method, student, teachers, VOCAB)
    ours, theirs = losses(recorded, student, read.micro_batches(2)), losses(asked, student, live.micro_batches(2))
    assert ours[0] == pytest.approx(theirs[0], rel=1e-6)
    torch.testing.assert_close(ours[1], theirs[1], atol=1e-6, rtol=1e-5)


def made_teacher(model):
    from tadistill.models.teachers import teacher_of

    return teacher_of(model)


@pytest.mark.parametrize("case", ["student", "student, two epochs", "student, sampled"])
def test_rollout_metrics_use_the_rows_own_teacher(case):
    made, student, teachers, batches = update(case, step=0)
    passes = []
    student.register_forward_pre_hook(lambda *_: passes.append(1))
    found = watch(made, batches)
    assert len(passes) == 1  # equally many in all processes, as a sharded student needs, however many teachers the rows have
    log_p, log_q = [], []
    known = "teacher" in batches[0].values  # else log p needs a forward pass, which only the first rows have
    for prompt, response in (row for batch in (batches if known else batches[:1]) for row in rows_of(batch)):
        tokens = torch.tensor(response).unsqueeze(-1)
        p, q = (alone(m, prompt, response).log_softmax(-1).gather(-1, tokens).squeeze(-1) for m in (teachers[number_of(prompt)], student))
        log_p.append(p)
        log_q.append(q.detach())
    expected = torch.cat(log_p) - torch.cat(log_q)
    assert found["rollout/reward"] == pytest.approx(float(expected.mean()), abs=1e-5)


def test_a_saved_row_keeps_its_teacher():
    rows = texts()
    assert [row.teacher for row in unpack(pack(rows))] == [row.teacher for row in rows]
    old = [{name: value for name, value in row.items() if name != "teacher"} for row in pack(rows)]
    assert [row.teacher for row in unpack(old)] == [None] * len(rows)
