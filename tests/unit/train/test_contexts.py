"""Teachers with a prompt of their own: losses and gradients against both sequences built by hand, for every sampler."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from tests.conftest import tiny_model

from tadistill import objectives
from tadistill.config.common import Decoding
from tadistill.config.method import Method
from tadistill.config.method_parts import Optim
from tadistill.config.method_rules import check_pairing
from tadistill.config.sampling import HiddenSignal
from tadistill.data.batch import Sequence, collate, references
from tadistill.data.encoding import Encoded
from tadistill.models.forward import pack_rows
from tadistill.models.teachers import InProcess, sequences
from tadistill.objectives import Hidden
from tadistill.rollout.engine import Native
from tadistill.rollout.recorded_signals import Signals, of_teacher, record
from tadistill.rollout.rounds import on_policy
from tadistill.rollout.samplers import FixedSequences, pack, unpack
from tadistill.train.monitoring import watch
from tadistill.train.step import counts, make_step

VOCAB, NEW = 31, 5
PROMPTS = [((5 + i, 6, 7)[: 1 + i % 3], (*(8 + i, 9)[: 1 + i % 2], 0)) for i in range(8)]
SAME = [Encoded(i, prompt, answer, teacher_prompt=prompt) for i, (prompt, answer) in enumerate(PROMPTS)]
NONE = [replace(row, teacher_prompt=None) for row in SAME]
OTHER = [replace(row, teacher_prompt=(*row.response[:-1], *(11, 12, 13)[: row.row % 4], *row.prompt)) for row in SAME]
ROUNDS = {"rollouts": 8, "max_new_tokens": NEW}
CASES = {
    "dataset": {"objective": {"type": "forward_kl", "kd_ratio": 0.7}},
    "teacher": {"objective": {"type": "jensen_shannon"}},
    "student": {"objective": {"type": "reverse_kl"}},
    "student, two epochs": {"objective": {"type": "reverse_kl"}, "sampler": {"inner_epochs": 2}},
    "student, sampled": {"objective": {"type": "sampled_kl"}},
    "teacher_mixed": {"objective": {"type": "minillm", "pt_weight": 0}, "sampler": {"alpha": 0, "inner_epochs": 2}},
    "mix": {"objective": {"type": "skew_reverse_kl"}, "sampler": {"lam": 0.5}},
    "replay": {"objective": {"type": "skew_forward_kl"}, "sampler": {"capacity": 8}},
    "pair": {"objective": {"type": "contrastive"}},
}


def method_of(case: str, **optim) -> Method:
    kind, given = case.partition(",")[0], CASES[case]
    sampler = {"type": kind} | given.get("sampler", {})
    sampler |= {"dataset": {}, "student": ROUNDS, "teacher_mixed": ROUNDS}.get(kind, {"max_new_tokens": NEW})
    found = Method.model_validate({**given, "sampler": sampler, "optim": {"steps": 9, "batch": 4} | optim, "context": "{prompt}"})
    check_pairing(found)
    return found


def update(case: str, rows: list[Encoded], step: int = 1, *, packed: bool = False):
    """Return the step of a method, its models, and the batches of one update, sampled with these rows."""
    student, teacher = tiny_model("llama"), tiny_model("llama", seed=5).requires_grad_(False)
    for model in (student, teacher) if packed else ():
        pack_rows(model)
    made, batches = sampled(method_of(case), student, (teacher,), references(rows), rows, step)
    return made, student, teacher, batches


def sampled(method: Method, student, teachers, texts: list[Sequence], rows: list[Encoded], step: int, **sets):
    """Return the step of a method, and the batches of one update. A sampler with a buffer has filled it in earlier updates."""
    common = {"pad": 0, "seed": 3} | sets
    if method.sampler.on_policy:
        engine = Native(student, Decoding(max_new_tokens=NEW), eos=(0,), vocab=VOCAB)
        sampler = on_policy(method, texts, rows, teachers=teachers, vocab=VOCAB, engine=engine, **common)
    else:
        sampler = FixedSequences(texts, method.optim, **common)
    if hasattr(sampler, "phi"):
        sampler.phi = sampler.mark = 1.0
    made = make_step(method, student, teachers, VOCAB)
    for earlier in range(step):
        sampler.micro_batches(earlier)
    return made, made.prepare(sampler.micro_batches(step), step, lambda values: values)


def losses(made, student, batches) -> tuple[float, torch.Tensor]:
    """Return the loss of an update and its gradient."""
    student.zero_grad()
    per = {name: float(max(n, 1)) for name, n in counts(batches).items()}
    total = 0.0
    for batch in batches:
        loss = made.loss(student, batch, per)
        loss.total.backward()
        total += float(loss.total.detach())
    return total, torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])


@cache
def without_context(case: str, packed: bool = False) -> tuple[float, torch.Tensor]:
    """Return the loss of an update and its gradient, if the teacher has no prompt of its own."""
    made, student, _, batches = update(case, NONE, packed=packed)
    return losses(made, student, batches)


@pytest.mark.parametrize("case", CASES)
def test_a_context_equal_to_the_prompt_changes_no_bit(case):
    made, student, _, batches = update(case, SAME)
    same, none = losses(made, student, batches), without_context(case)
    assert same[0] == none[0]
    assert torch.equal(same[1], none[1])


def alone(model, prompt: tuple[int, ...], response: tuple[int, ...], *, hidden: bool = False) -> torch.Tensor:
    """Return a model's logits, or its last hidden states, at the response of one sequence, read by itself."""
    ids = torch.tensor([[*prompt, *response]])
    reader = model.model if hidden else model
    out = reader(input_ids=ids, use_cache=False)
    values = out.last_hidden_state if hidden else out.logits
    return values[0, len(prompt) - 1 : -1]


def rows_of(batch) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return the prompt and the response of each row of a padded batch."""
    found = []
    for ids, mask in zip(batch.ids_BT.tolist(), batch.mask_BT.tolist(), strict=True):
        start = mask.index(True) + 1
        found.append((tuple(ids[:start]), tuple(ids[start : start + sum(mask)])))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_another_context_equals_sequences_built_by_hand(case, packed):
    """The teacher of the oracle reads each row by itself: its own prompt, and then the response that the student's row has."""
    made, student, _, batches = update(case, OTHER, packed=packed)
    ours = losses(made, student, batches)
    contexts, byhand = {row.prompt: row.teacher_prompt for row in OTHER}, []
    for batch in batches:
        read = [(contexts[prompt], response) for prompt, response in rows_of(batch)]
        plain = tiny_model("llama", seed=5).requires_grad_(False)
        states = torch.cat([alone(plain, *row, hidden=True) for row in read])
        values = dict(batch.values)
        if "teacher" in values:
            log_p = [objectives.token_log_probs(alone(plain, *row), torch.tensor(row[1])) for row in read]
            expected = torch.zeros_like(values["teacher"])
            expected[batch.mask_BT] = torch.cat(log_p)
            torch.testing.assert_close(values["teacher"], expected, atol=1e-5, rtol=1e-5)
            values["teacher"] = expected
        byhand.append(replace(batch, context=None, targets=(Hidden(states, InProcess(plain).head),), values=values))
    theirs = losses(made, student, byhand)
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5, abs=1e-6)
    torch.testing.assert_close(ours[1], theirs[1], atol=1e-5, rtol=1e-4)
    assert without_context(case, packed)[0] != pytest.approx(ours[0], rel=1e-4)  # the context matters


def check_reverse_kl(made, student, batches, teacher_of) -> None:
    """Independent of the step: KL(student || teacher) of every row alone, from softmax to gradient.

    `teacher_of` takes the student's prompt, and returns the teacher and the prompt that it reads.
    """
    ours = losses(made, student, batches)
    student.zero_grad()
    terms = []
    for prompt, response in (row for batch in batches for row in rows_of(batch)):
        teacher, own = teacher_of(prompt)
        q, p = (alone(m, start, response).log_softmax(-1) for m, start in ((student, prompt), (teacher, own)))
        terms.append((q.exp() * (q - p)).sum(-1))
    loss = torch.cat(terms).mean()
    loss.backward()
    assert ours[0] == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(ours[1], torch.cat([p.grad.flatten() for p in student.parameters()]), atol=1e-6, rtol=1e-4)


def test_a_divergence_equals_whole_logits():
    """The teacher reads behind its own prompt, and the student behind the student's."""
    made, student, teacher, batches = update("student", OTHER)
    contexts = {row.prompt: row.teacher_prompt for row in OTHER}
    check_reverse_kl(made, student, batches, lambda prompt: (teacher, contexts[prompt]))


def test_recorded_outputs_are_those_behind_the_context(tmp_path):
    teacher = tiny_model("llama", seed=5).requires_grad_(False)
    rows = references(OTHER)
    record(of_teacher(InProcess(teacher), 0), rows, HiddenSignal(), tmp_path, vocab=VOCAB)
    target = Signals(tmp_path, torch.device("cpu")).target([3, 0, 6])
    expected = torch.cat([alone(teacher, OTHER[i].teacher_prompt, OTHER[i].response, hidden=True) for i in (3, 0, 6)])
    torch.testing.assert_close(target.states, expected, atol=1e-5, rtol=1e-4)


class Listening(InProcess):
    """A teacher that notes what it is asked, as a client of a server does."""

    def hidden(self, batch):
        self.asked = sequences(batch, ahead=0).tokens
        return super().hidden(batch)


def test_a_server_gets_the_longer_texts():
    made, student, _, batches = update("student", OTHER)
    teacher = made.models.teachers[0]
    teacher.__class__ = Listening
    losses(made, student, batches)
    contexts = {row.prompt: row.teacher_prompt for row in OTHER}
    assert teacher.asked == [[*contexts[prompt], *response[:-1]] for prompt, response in rows_of(batches[0])]


def test_a_part_of_a_batch_and_a_restored_sequence_keep_the_context():
    sequences = [Sequence(r.prompt, r.response, {"x": np.ones(len(r.response), np.float32)}, (), r.teacher_prompt) for r in OTHER]
    whole = collate(sequences, pad=0)
    first, moved = whole.first(3), whole.to(torch.device("meta"))
    assert first.of_teacher.ids_BT.tolist() == whole.of_teacher.ids_BT[:3].tolist()
    assert int(first.mask_BT.sum()) == int(first.of_teacher.mask_BT.sum())
    assert moved.of_teacher.ids_BT.device.type == "meta"
    assert [s.teacher_prompt for s in unpack(pack(sequences))] == [s.teacher_prompt for s in sequences]
    assert unpack([{k: v for k, v in s.items() if k != "teacher_prompt"} for s in pack(sequences)])[0].teacher_prompt is None


def test_a_token_limit_counts_the_longer_prompt():
    rows = references([replace(row, teacher_prompt=(1,) * 40) for row in SAME])
    batches = FixedSequences(rows, Optim(steps=1, batch=8, tokens=100), pad=0, seed=3).micro_batches(0)
    assert [len(b.ids_BT) for b in batches] == [2, 2, 2, 2]
    assert all(b.of_teacher.ids_BT.numel() <= 100 for b in batches)


def test_metrics_of_rollouts_read_the_context():
    made, _, teacher, batches = update("student", OTHER)
    contexts = {row.prompt: row.teacher_prompt for row in OTHER}
    (batch,) = batches
    log_p = torch.cat([objectives.token_log_probs(alone(teacher, contexts[p], r), torch.tensor(r)) for p, r in rows_of(batch)])
    expected = (log_p - batch.values["student"][batch.mask_BT]).mean()
    assert watch(made, batches)["rollout/reward"] == pytest.approx(float(expected), abs=1e-4)
