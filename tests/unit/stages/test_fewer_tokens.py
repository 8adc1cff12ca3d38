"""A student without some tokens of its teacher: some rows have no answer, and some tokens exist only for the teacher."""

from types import SimpleNamespace

import pytest
import torch
from tests.conftest import response_logits, tiny_model

from tadistill.config.method_parts import Optim, Select
from tadistill.config.objective import CrossEntropy
from tadistill.config.sampling import SampledSignal, TeacherSampler, TopKSignal
from tadistill.data.batch import Sequence, collate, references
from tadistill.data.encoding import Encoded, EvalSet
from tadistill.disk import read_json, write_rows
from tadistill.evaluation.token_scores import Subject
from tadistill.models.teachers import teacher_of
from tadistill.objectives import reverse_kl, top_k
from tadistill.plan.inputs import Output
from tadistill.plan.kinds import DistillSpec, SignalSpec
from tadistill.rollout.recorded_signals import Signals
from tadistill.rollout.samplers import Shard
from tadistill.stages import measuring, teacher, training

ROWS = [Encoded(row, (3, row), (9, 0), teacher_prompt=(4, 4, row)) for row in range(5, 11)]
SPLIT = SimpleNamespace(ref=SimpleNamespace(name="rows"))


def sampler_of(folder, answered: list[int], *, context: bool, alarms: list[str]):
    """The sampler of SeqKD, after a stage `retokenise` has written answers for the rows `answered`."""
    answers = [{"row": row, "prompt": [3, row], "response": [row + 10, 0]} for row in answered]
    write_rows(folder / "responses.jsonl", answers)
    spec = DistillSpec.model_construct(
        objective=CrossEntropy(),
        sampler=TeacherSampler(),
        optim=Optim(batch=2, steps=9),
        select=Select(metric="last"),
        seed=1,
        train=SPLIT,
        data=SimpleNamespace(context=True if context else None),
        responses=Output(stage="answers"),
    )
    stage = SimpleNamespace(
        spec=spec,
        split=lambda split, tokenizer, contexts: EvalSet("rows", (), ROWS),
        store=SimpleNamespace(folder=lambda key: folder),
        alarm=alarms.append,
    )
    object.__setattr__(spec, "data", stage.spec.data)
    method = SimpleNamespace(sampler=spec.sampler, optim=spec.optim, samples=False, uses_teacher=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DistillSpec, "method", method)
        return training._sampler(stage, SimpleNamespace(tokenizer=None, pad=0), training._Teachers(), Shard(), None)  # type: ignore[arg-type]


@pytest.mark.parametrize("answered", [[5, 6, 8, 10], [*range(3, 11)]], ids=["fewer answers than rows", "more answers than rows"])
def test_each_epoch_has_every_answer_once(tmp_path, answered):
    sampler, epoch = sampler_of(tmp_path, answered, context=False, alarms=[]), len(answered) // 2
    for first in range(0, 3 * epoch, epoch):
        ids = torch.cat([batch.ids_BT for step in range(first, first + epoch) for batch in sampler.micro_batches(step)])
        assert sorted(ids[:, 1].tolist()) == answered
        assert (ids[:, 2] == ids[:, 1] + 10).all()


def test_an_answer_has_the_teachers_prompt_of_its_own_row(tmp_path):
    alarms = []
    sampler = sampler_of(tmp_path, [6, 8, 10, 12], context=True, alarms=alarms)
    assert [(s.prompt, s.teacher_prompt) for s in sampler.sequences] == [((3, row), (4, 4, row)) for row in (6, 8, 10)]
    assert alarms == ["data set `rows`: 1 of 4 answers are left out, because the prompt is too long in the teacher's tokens"]


@pytest.mark.parametrize("signal", [TopKSignal(k=5, dtype="float32"), SampledSignal(draws=20)], ids=lambda signal: signal.type)
def test_a_recording_has_only_tokens_of_the_student(tmp_path, signal):
    """The recorded distribution is that of a loss with all logits, which are cut to the common tokens."""
    model, tokenizer = tiny_model("llama"), SimpleNamespace(eos_token_id=0, __len__=lambda: 31)
    spec = SignalSpec.model_construct(train=SPLIT, data=SimpleNamespace(context=None), signal=signal, teacher=None, tokens=12)
    stage = SimpleNamespace(
        spec=spec,
        folder=tmp_path,
        teacher=lambda handle: (teacher_of(model), tokenizer),
        split=lambda split, tokenizer, contexts: EvalSet("rows", (), ROWS),
        progress=lambda *now: None,
        stop=lambda: False,
        task=SimpleNamespace(resources=SimpleNamespace(processes=1)),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher, "shared_vocabulary", lambda tokenizer, widths: min(31, *widths))
        assert teacher.signal(stage) == {"sequences": 6}  # type: ignore[arg-type]
    found = Signals(tmp_path / "signal", torch.device("cpu")).target(range(6))
    logits = response_logits(model, collate([s.of_teacher for s in references(ROWS)], pad=0), 12)
    if isinstance(signal, TopKSignal):
        expected = top_k(logits, 5)
        assert torch.equal(found.ids, expected.ids)
        torch.testing.assert_close(found.log_probs, expected.log_probs, atol=1e-5, rtol=0)
    else:
        assert int(found.ids.max()) < 12
        log_p = logits.log_softmax(-1)
        torch.testing.assert_close(found.entropy, -(log_p.exp() * log_p).sum(-1), atol=1e-5, rtol=0)


def test_the_teachers_answers_are_compared_up_to_a_token_that_the_student_lacks():
    answers = {1: [Sequence((1,), (5, 7, 0)), Sequence((2,), (5, 31, 7, 0))], 2: [Sequence((3,), (40, 6)), Sequence((4,), (30,))]}
    found, note = measuring._known(answers, 31)
    assert {seed: [(s.prompt, s.response) for s in of_seed] for seed, of_seed in found.items()} == {
        1: [((1,), (5, 7, 0)), ((2,), (5,))],
        2: [((4,), (30,))],
    }
    assert (
        note
        == "2 of 4 answers of the teacher contain a token that the student does not have; the exposure bias compares them up to this token"
    )
    assert measuring._known(answers, 41) == (answers, "")
    none, note = measuring._known({1: [Sequence((1,), (31,))]}, 31)
    assert none == {}  # then the exposure bias is not measured
    assert note.startswith("1 of 1 answer of the teacher contains a token")


def test_a_models_own_answers_are_compared_up_to_a_token_that_another_model_lacks(tmp_path):
    """The assistant has 12 tokens, and teacher and student have 31. Logits before the student's own tokens are compared, too."""
    student, big, assistant = (tiny_model("llama", vocab=vocab, seed=seed) for seed, vocab in enumerate((31, 31, 12)))
    rows = [Encoded(row, (3, row), (9, 0)) for row in (5, 6, 7)]
    data, answers = EvalSet("rows", (), rows), [(9, 30, 4, 0), (30,), (9, 0)]
    write_rows(
        tmp_path / "answers.jsonl", [{"set": "rows", "index": 5 + i, "seed": 1, "tokens": tokens} for i, tokens in enumerate(answers)]
    )
    alarms = []
    spec = SimpleNamespace(of_teacher=None, model=student, teacher=big, assistants=[assistant], sets=[data], batch=2, tokens=None,
                           answers=Output(stage="answers"), teacher_answers=None, dev=data, k=3)  # fmt: skip
    stage = SimpleNamespace(
        spec=spec,
        folder=tmp_path,
        dtype=None,
        model=lambda model, dtype: (model, None),
        teacher=lambda model: (teacher_of(model), None),
        subject=lambda model, _, *others: Subject(model, SimpleNamespace(eos_token_id=0), min(31, *(t.width for t in others)), (0,)),
        split=lambda data, _: data,
        dev=lambda dev, _: {"rows": (1.0, dev)},
        store=SimpleNamespace(folder=lambda key: tmp_path),
        alarm=alarms.append,
        progress=lambda *now: None,
        stop=lambda: False,
    )
    (tmp_path / "parts").mkdir()
    note = "2 of 3 answers contain a token that a bigger model does not have; the models are compared up to this token"
    assert measuring.analyse(stage) == {"notes": [f"rows: {note.replace('2 of 3 answers contain', '1 of 3 answers contains')}"]}  # type: ignore[arg-type]
    found = read_json(tmp_path / "scores.json")["rows"]["reverse_kl"]
    for (kl,), row, tokens in zip(found, rows, [(9, 0), (0,), (9, 0)], strict=True):
        batch = collate([Sequence(row.prompt, tokens)], pad=0)
        q, p = (response_logits(model, batch, 12) for model in (student, big))
        assert kl == pytest.approx(reverse_kl(q, p).mean().item(), abs=1e-5)
    write_rows(tmp_path / "answers.jsonl", [{"index": 5 + i, "tokens": tokens} for i, tokens in enumerate(answers)])
    spec.teacher = assistant
    assert measuring.pair(stage) == {"prompts": 3}  # type: ignore[arg-type]
    assert len(alarms) == 2
