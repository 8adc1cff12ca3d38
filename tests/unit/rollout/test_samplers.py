"""Samplers: rows once an epoch, rounds and inner epochs, GKD's lambda, DistiLLM's buffer, resume inside a round, shards that add up."""

import functools
import itertools
import operator

import numpy as np
import pytest
import torch
from tests.conftest import tiny_model

from tadistill import rng
from tadistill.config.common import Decoding
from tadistill.config.method import Method
from tadistill.config.method_parts import Optim
from tadistill.config.sampling import MixSampler, PairSampler, ReplaySampler, SpeculativeSampler, StudentSampler, TeacherMixedSampler
from tadistill.data.batch import Sequence
from tadistill.data.encoding import Encoded
from tadistill.data.training_sets import shuffled
from tadistill.models.forward import Reader
from tadistill.models.teachers import teacher_of
from tadistill.objectives import Hidden
from tadistill.rollout import samplers
from tadistill.rollout.engine import Native
from tadistill.rollout.rounds import Rollouts
from tadistill.rollout.samplers import FixedSequences, Mix, Pairs, Replay, Shard

ROWS = [Sequence((1, 2), (3 + i, 0)) for i in range(10)]


def test_epochs_follow_each_other_and_hold_every_row_once():
    stream = np.concatenate([shuffled(10, 4, step, (7,)) for step in range(5)])
    assert sorted(stream[:10]) == sorted(stream[10:]) == list(range(10))
    assert list(stream[:10]) != list(stream[10:])


def test_an_epochs_order_is_drawn_once(monkeypatch):
    drawn, real = [], rng.generator
    monkeypatch.setattr(rng, "generator", lambda *address: (drawn.append(address), real(*address))[1])
    rows = [shuffled(11, 4, step, ("once",)).tolist() for step in range(6)]
    assert drawn == [("once", 0), ("once", 1), ("once", 2)]
    assert rows[0] == real("once", 0).permutation(11)[:4].tolist()
    assert rows[3] == real("once", 1).permutation(11)[1:5].tolist()


def test_micro_batches_cut_the_same_rows():
    def tokens(micro):
        sampler = FixedSequences(ROWS, Optim(steps=1, batch=8, micro_batch=micro), pad=0, seed=1)
        return [b.targets_BT[b.mask_BT].tolist() for b in sampler.micro_batches(3)]

    assert functools.reduce(operator.iadd, tokens(2), []) == tokens(None)[0]
    assert len(tokens(2)) == 4


LENGTHS = (2, 9, 3, 3, 12, 1, 1, 6)
UNEVEN = [Sequence((1,) * n, (2, 0)) for n in LENGTHS]  # 2 more tokens each


def sizes(sequences, **settings):
    """Per micro-batch of the first update, the tokens of its rows, on one process or several."""
    world = settings.pop("world", 1)
    shards = [Shard(rank, world) for rank in range(world)]
    optim = Optim(steps=1, batch=len(sequences), **settings)
    found = [FixedSequences(sequences, optim, pad=0, seed=1, shard=shard).micro_batches(0) for shard in shards]
    return [[batch.attention_BT.sum(1).tolist() for batch in batches] for batches in found]


def test_a_micro_batch_has_at_most_so_many_tokens():
    (padded,), (packed,), (whole,) = (sizes(UNEVEN, **limit) for limit in ({"tokens": 17}, {"tokens": 17, "packed": True}, {}))
    for groups in (padded, packed):
        assert functools.reduce(operator.iadd, groups, []) == whole[0]  # all rows, in the same order
    assert all(max(g) * len(g) <= 17 for g in padded)
    assert all(sum(g) <= 17 for g in packed)
    assert len(packed) < len(padded) < len(UNEVEN)
    # no micro-batch has room for the first row of the next one
    assert all(sum(g) + after[0] > 17 for g, after in itertools.pairwise(packed))
    assert all(max(*g, after[0]) * (len(g) + 1) > 17 for g, after in itertools.pairwise(padded))
    assert [14] in sizes(UNEVEN, tokens=12)[0]  # above the limit: alone


def test_processes_have_equal_numbers_of_micro_batches(monkeypatch):
    counts = []

    def gathered(found):
        counts.append(found[0])
        return [found[0], 4]  # another process has 4 micro-batches

    monkeypatch.setattr(samplers, "gather_object", gathered)
    first, second = sizes(UNEVEN, tokens=10**6, world=2)
    assert counts == [1, 1]
    assert len(first) == len(second) == 4
    assert sorted(functools.reduce(operator.iadd, first + second, [])) == sorted(n + 2 for n in LENGTHS)


def test_shards_partition_the_batch():
    def rows(shard):
        batches = FixedSequences(ROWS, Optim(steps=1, batch=8), pad=0, seed=1, shard=shard).micro_batches(0)
        return [row.tolist() for b in batches for row in b.ids_BT]

    parts = rows(Shard(0, 2)) + rows(Shard(1, 2))
    assert sorted(parts) == sorted(rows(Shard()))


def native(student, length):
    return Native(student, Decoding(max_new_tokens=length), eos=(0,), vocab=31)


def rollouts(student=None, sampler=None, *, scores=True, states=True, shard=Shard()) -> Rollouts:
    student = student or tiny_model("llama")
    prompts = [Encoded(i, (5 + i, 6, 7)[: 1 + i % 3], (8, 0)) for i in range(12)]
    sampler = sampler or TeacherMixedSampler(rollouts=8, inner_epochs=2, max_new_tokens=6)
    method, teachers = Method(sampler=sampler, optim=Optim(steps=99, batch=4)), (tiny_model("llama", seed=2).requires_grad_(False),)
    found = Rollouts(prompts, method, engine=native(student, 6), teachers=teachers, vocab=31, pad=0, seed=3, shard=shard)
    found.scores, found.states = scores, states
    return found


def test_rows_of_the_corpus_count_in_a_round():
    sampler = rollouts()
    sampler.corpus, sampler.optim = [Sequence((), tuple(range(1, 21)))] * 3, Optim(steps=99, batch=4, tokens=40)
    assert [(len(b.ids_BT), b.corpus.ids_BT.shape) for b in sampler.micro_batches(0)] == [(2, (2, 20)), (2, (2, 20))]


def test_a_round_is_trained_on_for_its_inner_epochs():
    sampler = rollouts()
    seen = []
    for step in range(4):  # 8 / 4 updates x 2 epochs
        (batch,) = sampler.micro_batches(step)
        assert sampler.round == 0
        seen += [tuple(row[m].tolist()) for row, m in zip(batch.targets_BT, batch.mask_BT, strict=True)]
    expected = sorted(s.response for s in sampler.sequences)
    assert sorted(seen[:8]) == sorted(seen[8:]) == expected
    sampler.micro_batches(4)
    assert sampler.round == 1


def test_rollouts_use_the_student_of_their_round_and_resume_inside_it():
    student = tiny_model("llama")
    sampler = rollouts(student)
    sampler.micro_batches(0)
    state = sampler.state()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.3)  # as if trained: a fresh rollout would differ
    other = rollouts(student)
    other.restore(state)
    for step in (1, 2, 3):
        (a,), (b,) = sampler.micro_batches(step), other.micro_batches(step)
        assert torch.equal(a.ids_BT, b.ids_BT)
        assert all(torch.equal(a.values[k], b.values[k]) for k in a.values)


def test_corpus_rows_ride_along():
    sampler = rollouts()
    sampler.corpus = [Sequence((), (1, 2, 3, 4)), Sequence((), (5, 6, 7, 8))]
    (batch,) = sampler.micro_batches(0)
    assert batch.corpus is not None
    assert batch.corpus.ids_BT.shape == (4, 4)
    assert int(batch.corpus.mask_BT.sum()) == 4 * 3


SAMPLERS = {
    "teacher_mixed": TeacherMixedSampler(rollouts=8, inner_epochs=2, max_new_tokens=6),
    "speculative": SpeculativeSampler(rollouts=8, inner_epochs=2, max_new_tokens=6, k=3),
    "student": StudentSampler(rollouts=8, inner_epochs=2, max_new_tokens=6),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_rounds_teacher_states_and_scores_are_those_of_a_forward_pass(name):
    """Kept from sampling where the teacher took part in it, from one pass elsewhere; the same for every update on them."""
    sampler = rollouts(sampler=SAMPLERS[name])
    for step in range(4):
        (batch,) = sampler.micro_batches(step)
        assert isinstance(batch.targets[0], Hidden)
        live = teacher_of(sampler.teachers[0].model).target(batch)
        torch.testing.assert_close(batch.targets[0].states, live.states, atol=1e-5, rtol=1e-4)
        tokens = batch.targets_BT[batch.mask_BT].unsqueeze(1)
        log_p = live.head.logits(live.states).log_softmax(-1).gather(1, tokens).squeeze(1)
        torch.testing.assert_close(batch.values["teacher"][batch.mask_BT], log_p.detach(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["teacher_mixed", "student"])
def test_in_half_precision_the_policy_is_the_one_that_training_sees(name):
    """Before the first update q is q_old to the bit, though sampling rounds otherwise than a forward pass under autocast."""
    sampler = rollouts(sampler=SAMPLERS[name])
    sampler.optim = sampler.optim.model_copy(update={"precision": "bf16"})
    (batch,) = sampler.micro_batches(0)
    assert 0 < sampler.apart < 0.05
    student, mask = sampler.engine.student, batch.mask_BT
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        hidden, head = Reader(student).hidden(student, batch), Reader(student).head
        log_q = torch.nn.functional.linear(hidden, head.weight).float().log_softmax(-1)
    log_q = log_q.gather(1, batch.targets_BT[mask].unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(batch.values["student"][mask], log_q, atol=2e-2, rtol=0)  # batches of another shape round otherwise
    log_p = batch.values["teacher"][mask]
    mixed = (
        (0.8 * batch.values["student"][mask].exp() + 0.2 * log_p.exp()).log() if name == "teacher_mixed" else batch.values["student"][mask]
    )
    torch.testing.assert_close(batch.values["behaviour"][mask], mixed, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["teacher_mixed", "student"])
def test_in_half_precision_behaviour_keeps_the_decoding_settings(name):
    """At a temperature, the distribution that was sampled is not the student's own; a pass like that of training does not change it."""
    found = {}
    for precision in ("fp32", "bf16"):
        sampler = rollouts(sampler=SAMPLERS[name].model_copy(update={"temperature": 0.5}))
        sampler.engine.decoding = sampler.config
        sampler.optim = sampler.optim.model_copy(update={"precision": precision})
        (batch,) = sampler.micro_batches(0)
        found[precision] = batch.values["behaviour"][batch.mask_BT]
        assert (found[precision] - batch.values["student"][batch.mask_BT]).abs().max() > 0.1
    torch.testing.assert_close(found["bf16"], found["fp32"], atol=0.05, rtol=0)


def test_the_teacher_runs_once_over_a_round(monkeypatch):
    sampler, calls = rollouts(sampler=SAMPLERS["student"]), []
    (teacher,) = sampler.teachers
    hidden = teacher.hidden
    monkeypatch.setattr(teacher, "hidden", lambda *a: calls.append(None) or hidden(*a))
    for step in range(4):
        sampler.micro_batches(step)
    assert len(calls) == 1
    once = rollouts(sampler=StudentSampler(max_new_tokens=6), scores=False)  # each rollout is used once: the step's business
    assert once.micro_batches(0)[0].targets == ()


def test_a_round_is_the_same_on_any_number_of_ranks(monkeypatch):
    """Rank 0 and rank 1 sample half each; together they are the round of a single process."""
    whole = rollouts()
    whole.micro_batches(0)
    halves = []
    for rank in (0, 1):
        monkeypatch.setattr(samplers, "gather_object", lambda found: halves.append(found) or found)
        rollouts(shard=Shard(rank, 2))._roll_out(0)
    joined = Shard().gather(halves[0] + halves[1])
    assert [s.response for s in joined] == [s.response for s in whole.sequences]


def mixed(config, student=None, **changes):
    student = student or tiny_model("llama")
    kind = Mix if isinstance(config, MixSampler) else Replay
    return kind(ROWS, config, Optim(steps=40, batch=4), engine=native(student, 5), pad=0, seed=1, **changes)


def is_student_text(batches):
    return "student" in batches[0].values


def test_lambda_is_one_draw_for_the_whole_batch_and_all_ranks():
    student, steps = tiny_model("llama"), range(200)

    def fresh(lam: float, **changes):
        return mixed(MixSampler(lam=lam), student, **changes)

    ranks = [[is_student_text(fresh(0.3, shard=Shard(r, 2)).micro_batches(s)) for s in range(12)] for r in (0, 1)]
    assert ranks[0] == ranks[1]
    draws = [fresh(0.3).draw(s) < 0.3 for s in steps]
    assert 40 <= sum(draws) <= 80  # 60 expected, standard deviation 6.5
    assert not any(is_student_text(fresh(0.0).micro_batches(s)) for s in range(5))
    assert all(is_student_text(fresh(1.0).micro_batches(s)) for s in range(5))


def test_mixed_batches_answer_the_prompts_they_replace():
    student, gold = (mixed(MixSampler(lam=lam)).micro_batches(2)[0] for lam in (1.0, 0.0))
    assert torch.equal(student.ids_BT[:, :2], gold.ids_BT[:, :2])


def test_phi_rises_with_the_dev_loss_and_never_falls():
    sampler = mixed(ReplaySampler(tolerance=0.1, increment=0.25))
    seen = []
    for loss in (2.0, 1.5, 2.05, 2.11, 2.15, 2.22, 9.0, 20.0, 40.0):
        sampler.observe({"loss": loss})
        seen.append((sampler.phi, sampler.mark))
    # the mark is the first loss and then each one that raised phi; a lower loss moves nothing
    marks = [2.0, 2.0, 2.0, 2.11, 2.11, 2.22, 9.0, 20.0, 40.0]
    assert seen == list(zip([0, 0, 0, 0.25, 0.25, 0.5, 0.75, 1, 1], marks, strict=True))


def test_replay_without_phi_is_the_data_set():
    assert not any(is_student_text(mixed(ReplaySampler()).micro_batches(s)) for s in range(8))


@pytest.mark.parametrize(("schedule", "share"), [("decreasing", 0.75), ("constant", 0.5), ("increasing", 0.25)])
def test_a_full_buffer_is_drawn_from(schedule, share):
    """A quarter of the way, phi = 1: this share of updates samples anew, the others repeat stored text."""
    sampler = mixed(ReplaySampler(capacity=8, schedule=schedule))
    sampler.phi = 1.0
    assert sampler._share_of_fresh(10) == share
    for step in range(2):  # fills whatever the draw is
        assert is_student_text(sampler.micro_batches(step))
    assert len(sampler.buffer) == 8
    stored = {s.response for s in sampler.buffer}
    sampler.config = sampler.config.model_copy(update={"schedule": "increasing"})  # at step 0 nothing is sampled anew
    (batch,) = sampler.micro_batches(0)
    responses = [tuple(row[m].tolist()) for row, m in zip(batch.targets_BT, batch.mask_BT, strict=True)]
    assert set(responses) <= stored
    assert len(sampler.buffer) == 8


def test_replay_resumes_with_its_buffer():
    sampler = mixed(ReplaySampler(capacity=12))
    sampler.observe({"loss": 1.0})
    sampler.phi = 1.0
    for step in range(3):
        sampler.micro_batches(step)
    other = mixed(ReplaySampler(capacity=12), student=tiny_model("llama", seed=9))
    other.restore(sampler.state())
    assert (other.phi, other.mark) == (1.0, 1.0)
    assert [s.response for s in other.buffer] == [s.response for s in sampler.buffer]


def pairs(student, *, micro=None, tokens=None, shard=Shard()):
    optim = Optim(steps=4, batch=4, micro_batch=micro, tokens=tokens)
    return Pairs(ROWS, PairSampler(max_new_tokens=5), optim, engine=native(student, 5), pad=0, seed=1, shard=shard)


def test_both_responses_of_a_pair_count():
    batches = pairs(tiny_model("llama"), tokens=28).micro_batches(0)  # a response of the student has at most 7 tokens with its prompt
    assert [len(batch.ids_BT) for batch in batches] == [4, 4]
    assert all(batch.ids_BT.numel() <= 28 for batch in batches)
    assert len(pairs(tiny_model("llama"), tokens=1).micro_batches(0)) == 4


def test_pairs_hold_a_teachers_and_a_fresh_response_to_each_prompt():
    student = tiny_model("llama")
    (batch,) = pairs(student).micro_batches(2)
    source = [set(v[m].tolist()) for v, m in zip(batch.values["from_teacher"], batch.mask_BT, strict=True)]
    assert source == [{1.0}] * 4 + [{0.0}] * 4
    assert torch.equal(batch.ids_BT[:4, :2], batch.ids_BT[4:, :2])
    stored = {s.response for s in ROWS}
    assert all(tuple(row[m].tolist()) in stored for row, m in zip(batch.targets_BT[:4], batch.mask_BT[:4], strict=True))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(-1)
    (after,) = pairs(student).micro_batches(2)
    assert torch.equal(after.ids_BT[:4, :4], batch.ids_BT[:4, :4])
    assert not torch.equal(after.ids_BT[4:], batch.ids_BT[4:])


def test_pairs_do_not_depend_on_micro_batches_or_shards():
    def responses(batches):
        return sorted(tuple(row[m].tolist()) for b in batches for row, m in zip(b.targets_BT, b.mask_BT, strict=True))

    student = tiny_model("llama")
    whole = responses(pairs(student).micro_batches(1))
    assert responses(pairs(student, micro=1).micro_batches(1)) == whole
    assert responses(pairs(student, shard=Shard(0, 2)).micro_batches(1) + pairs(student, shard=Shard(1, 2)).micro_batches(1)) == whole
