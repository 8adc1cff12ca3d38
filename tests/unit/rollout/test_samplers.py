"""Samplers: every row once an epoch, rounds and inner epochs, resume inside a round, shards that add up."""

import functools
import operator

import numpy as np
import torch
from tests.conftest import tiny_model

from tadistill.config.method import Optim, PairSampler
from tadistill.config.method import TeacherMixedSampler as Config
from tadistill.data.batch import Sequence
from tadistill.data.templates import Encoded
from tadistill.rollout.samplers import FixedSequences, Pairs, Shard, TeacherMixedRollouts, shuffled

ROWS = [Sequence((1, 2), (3 + i, 0)) for i in range(10)]


def test_epochs_follow_each_other_and_hold_every_row_once():
    stream = np.concatenate([shuffled(10, 4, step, (7,)) for step in range(5)])
    assert sorted(stream[:10]) == sorted(stream[10:]) == list(range(10))
    assert list(stream[:10]) != list(stream[10:])


def test_micro_batches_cut_the_same_rows():
    def tokens(micro):
        sampler = FixedSequences(ROWS, Optim(steps=1, batch=8, micro_batch=micro), pad=0, seed=1)
        return [b.targets_BT[b.mask_BT].tolist() for b in sampler.micro_batches(3)]

    assert functools.reduce(operator.iadd, tokens(2), []) == tokens(None)[0]
    assert len(tokens(2)) == 4


def test_shards_partition_the_batch():
    def rows(shard):
        batches = FixedSequences(ROWS, Optim(steps=1, batch=8), pad=0, seed=1, shard=shard).micro_batches(0)
        return [row.tolist() for b in batches for row in b.ids_BT]

    parts = rows(Shard(0, 2)) + rows(Shard(1, 2))
    assert sorted(parts) == sorted(rows(Shard()))


def rollouts(student=None) -> TeacherMixedRollouts:
    prompts = [Encoded(i, (5 + i, 6, 7)[: 1 + i % 3], (8, 0)) for i in range(12)]
    return TeacherMixedRollouts(
        prompts,
        Config(rollouts=8, inner_epochs=2, max_new_tokens=6),
        Optim(steps=99, batch=4),
        student=student or tiny_model("llama"),
        teacher=tiny_model("llama", seed=2),
        eos=0,
        pad=0,
        vocab=31,
        seed=3,
    )


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


def pairs(student, *, micro=None, shard=Shard()):
    optim = Optim(steps=4, batch=4, micro_batch=micro)
    return Pairs(ROWS, PairSampler(max_new_tokens=5), optim, student=student, eos=0, pad=0, vocab=31, seed=1, shard=shard)


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
