"""Two tokenizers in one update: losses, gradients and weights against loops written by hand, for every way to make batches."""

# pyright: reportOptionalMemberAccess=false, reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false

from dataclasses import replace
from functools import cache, partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tests.byte_models import byte_tokenizer
from tests.conftest import tiny_model
from tests.unit.objectives.text_oracle import Side, text_divergence
from tests.unit.train.test_contexts import losses
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tadistill import objectives
from tadistill.config.common import Decoding
from tadistill.config.method import Method
from tadistill.config.method_parts import Optim
from tadistill.config.method_rules import over_spans
from tadistill.data import tinyworld
from tadistill.data.alignment import cells, shared_tokens
from tadistill.data.batch import Sequence, collate
from tadistill.data.encoding import Encoded
from tadistill.data.other_tokenizer import Rereader, at_span_ends, counted_spans
from tadistill.data.token_bytes import TokenBytes, token_bytes
from tadistill.errors import DataError
from tadistill.evaluation.token_scores import Subject
from tadistill.models.forward import pack_rows
from tadistill.models.teachers import Teacher
from tadistill.objectives import SharedVocabulary
from tadistill.rollout.engine import Native
from tadistill.rollout.rounds import on_policy
from tadistill.rollout.samplers import FixedSequences, length, pack, unpack
from tadistill.stages.training import Across
from tadistill.train import spans
from tadistill.train.monitoring import watch
from tadistill.train.step import counts, make_step

TEXTS = ("the theatre", "a then the", "he the a", "there then", "the the", "a theatre he", "then", "the a the a")
MERGES = {"student": ["t h", "th e", "Ġ th", "a t"], "teacher": ["h e", "t he", "Ġ the", "r e", "the n", "Ġ a"]}


@cache
def vocabulary(name: str) -> TokenBytes:
    """A byte-level BPE tokenizer with a few merges; `student` and `teacher` merge other pairs."""
    merges = [tuple(merge.split()) for merge in MERGES[name]]
    tokens = ["<pad>", "<end>" if name == "teacher" else "</s>", *bytes_to_unicode().values(), *map("".join, merges)]
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(dict.fromkeys(tokens))}, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return token_bytes(PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token=tokens[1]))


STUDENT, TEACHER = vocabulary("student"), vocabulary("teacher")
SIZES = len(STUDENT.tokens), len(TEACHER.tokens)
AGAIN = Rereader(STUDENT, TEACHER, SIZES)


def shared() -> SharedVocabulary:
    mine, theirs = shared_tokens(STUDENT, TEACHER)
    return SharedVocabulary(torch.tensor(mine), torch.tensor(theirs), SIZES)


def ids(vocabulary: TokenBytes, text: str) -> tuple[int, ...]:
    return tuple(vocabulary.tokenizer(text)["input_ids"])


def row(i: int, text: str) -> Encoded:
    """The prompts of both models differ in text and in length."""
    prompt, own = ids(STUDENT, f"{i}: "[: 1 + i % 3]), ids(TEACHER, "Q: say it. "[: 3 + 2 * (i % 4)])
    return Encoded(i, prompt, (*ids(STUDENT, text), STUDENT.ends[0]), teacher_prompt=own)


ROWS = [row(i, text) for i, text in enumerate(TEXTS)]
FIXED = [Sequence(r.prompt, r.response, teacher_prompt=r.teacher_prompt) for r in ROWS]


def pair(dtype=torch.float64):
    student, teacher = tiny_model("llama", vocab=SIZES[0] + 3), tiny_model("llama", vocab=SIZES[1] + 5, seed=5)
    return student.to(dtype), teacher.to(dtype).requires_grad_(False)


def log_probs(model, prompt, response, size: int, temperature: float = 1.0) -> torch.Tensor:
    """Return the log-probabilities (tokens, size) at a response of one sequence, read by itself."""
    logits = model(input_ids=torch.tensor([[*prompt, *response]]), use_cache=False).logits
    return (logits[0, len(prompt) - 1 : -1, :size] / temperature).log_softmax(-1)


def pieces(vocabulary: TokenBytes, tokens) -> list[bytes]:
    """What each token stands for, the end of the text as one more byte."""
    return [b"\xff" if t in vocabulary.ends else vocabulary.pieces[t] for t in tokens]  # pyright: ignore[reportReturnType]


def cut(mine: list[bytes], theirs: list[bytes]) -> list[tuple[list[int], list[int]]]:
    """Return the tokens of each span on both sides, from the common places of both lists of pieces."""
    ends = [[len(b"".join(side[: k + 1])) for k in range(len(side))] for side in (mine, theirs)]
    found, last = [], 0
    for end in sorted(set(ends[0]) & set(ends[1])):
        found.append(tuple([k for k, e in enumerate(side) if last < e <= end] for side in ends))
        last = end
    return found


def symbols(vocabulary: TokenBytes, size: int) -> list[tuple[int, ...] | None]:
    """The bytes of each token of a head. 256 is the end of the text, and 257 the padding token."""
    known = [(256,) if i in vocabulary.ends else tuple(p) if isinstance(p, bytes) else (257,) for i, p in enumerate(vocabulary.pieces)]
    return [*known, *[None] * (size - len(known))]


def span_values(divergence, student, teacher, s: Sequence, temperature=1.0, first=0, **settings) -> list[torch.Tensor]:
    """Return the loss of each span of one sequence from the span `first` on, with whole distributions."""
    theirs = (*ids(TEACHER, STUDENT.tokenizer.decode(s.response[:-1])), TEACHER.ends[0])
    q = log_probs(student, s.prompt, s.response, SIZES[0], temperature).exp()
    p = log_probs(teacher, s.teacher_prompt, theirs, SIZES[1], temperature).exp()
    places = cut(pieces(STUDENT, s.response), pieces(TEACHER, theirs))[first:]
    sides = []
    for k, (vocabulary, tokens, probs) in enumerate(((STUDENT, s.response, q), (TEACHER, theirs, p))):
        kept = [(i, span) for span, both in enumerate(places) for i in both[k]]
        rows = [i for i, _ in kept]
        roots = cells(STUDENT, TEACHER, SIZES)[k]
        sides.append(Side(symbols(vocabulary, SIZES[k]), roots, [tokens[i] for i in rows], [span for _, span in kept], probs[rows]))
    every = [True] * len(places)
    return text_divergence(partial(divergence, **settings), sides[0], sides[1], [False, *every[1:]], every)


def by_hand(divergence, student, teacher, sequences, *, kd_ratio=1.0, **settings) -> torch.Tensor:
    """Return the loss of an update: a Python loop over rows and spans."""
    values, likelihood = [], []
    for s in sequences:
        values += span_values(divergence, student, teacher, s, **settings)
        plain = log_probs(student, s.prompt, s.response, SIZES[0])
        likelihood += [-plain[k, token] for k, token in enumerate(s.response)]
    return kd_ratio * torch.stack(values).mean() + (1 - kd_ratio) * torch.stack(likelihood).mean()


def gradient(loss, student):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*student.parameters()], allow_unused=True) if g is not None])


OBJECTIVES = [
    {"type": "forward_kl", "kd_ratio": 0.7},
    {"type": "reverse_kl", "temperature": 1.5},
    {"type": "adaptive_kl", "mu": 0.3},
]
WAYS = {"whole": {}, "micro": {"micro_batch": 3}, "tokens": {"tokens": 60}, "packed": {"tokens": 60, "packed": True}}


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o["type"])
def test_loss_and_gradient_equal_a_loop_by_hand(objective):
    student, teacher = pair()
    settings = {name: value for name, value in objective.items() if name != "type"}
    expected = None
    for way, optim in WAYS.items():
        method = Method.model_validate({"objective": objective, "optim": {"steps": 1, "batch": 6} | optim})
        sampler = FixedSequences(AGAIN.each(FIXED), method.optim, pad=0, seed=1)
        if expected is None:
            rows = [FIXED[i] for i in sampler.rows(0)]
            loss = by_hand(getattr(objectives, objective["type"]), student, teacher, rows, **settings)
            expected = float(loss.detach()), gradient(loss, student)
        batches = sampler.micro_batches(0)
        assert len(batches) > 1 or way == "whole"
        for model in (student, teacher) if way == "packed" else ():
            pack_rows(model)
        found = losses(make_step(method, student, (teacher,), AGAIN), student, batches)
        assert found[0] == pytest.approx(expected[0], abs=1e-6), way
        torch.testing.assert_close(found[1], expected[1], atol=1e-6, rtol=1e-5, msg=way)


@pytest.mark.parametrize("name", ["uld", "gold"])
def test_distances_of_other_methods(name):
    """ULD and GOLD over spans: the loss of the library's function on the same states, with cross-entropy on all tokens."""
    student, teacher = pair()
    method = Method.model_validate({"objective": {"type": name, "kd_ratio": 0.6}, "optim": {"steps": 1, "batch": 6, "micro_batch": 3}})
    sampler = FixedSequences(AGAIN.each(FIXED), method.optim, pad=0, seed=1)
    batches = sampler.micro_batches(0)
    made = make_step(method, student, (teacher,), AGAIN)
    found = losses(made, student, batches)
    rows, values, likelihood = [FIXED[i] for i in sampler.rows(0)], [], []
    for s in rows:
        theirs = AGAIN(s).second.ids.tolist()
        q, p = log_probs(student, s.prompt, s.response, SIZES[0]), log_probs(teacher, s.teacher_prompt, theirs, SIZES[1])
        for own, other in cut(pieces(STUDENT, s.response), pieces(TEACHER, theirs)):
            before = [sum((side[k, t[k]] for k in at[:-1]), torch.zeros(())) for side, t, at in ((q, s.response, own), (p, theirs, other))]
            more = {"shared": shared(), "beta": 0.5} if name == "gold" else {}
            distance = objectives.hybrid_distance if name == "gold" else objectives.sorted_distance
            values.append(distance(q[own[-1]], p[other[-1]], before=before, **more))
        likelihood += [-q[k, token] for k, token in enumerate(s.response)]
    expected = 0.6 * torch.stack(values).mean() + 0.4 * torch.stack(likelihood).mean()
    assert found[0] == pytest.approx(float(expected.detach()), abs=1e-6)
    torch.testing.assert_close(found[1], gradient(expected, student), atol=1e-6, rtol=1e-5)


def test_weights_after_updates_equal_a_loop_by_hand():
    """Three updates with AdamW, in micro-batches."""
    method = Method.model_validate({"objective": {"type": "reverse_kl"}, "optim": {"steps": 3, "batch": 4, "micro_batch": 2}})
    found = []
    for ours in (True, False):
        student, teacher = pair()
        sampler = FixedSequences(AGAIN.each(FIXED), method.optim, pad=0, seed=1)
        made = make_step(method, student, (teacher,), AGAIN)
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
        for step in range(3):
            optimizer.zero_grad()
            if ours:
                losses(made, student, sampler.micro_batches(step))
            else:
                by_hand(objectives.reverse_kl, student, teacher, [FIXED[i] for i in sampler.rows(step)]).backward()
            optimizer.step()
        found.append(torch.cat([p.detach().flatten() for p in student.parameters()]))
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=0)
    assert (found[0] - torch.cat([p.flatten() for p in pair()[0].parameters()])).abs().max() > 1e-3


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o["type"])
def test_one_tokenizer_is_the_plain_loss_bit_for_bit(objective):
    """The teacher reads the student's own tokens behind a prompt of its own: with spans, and without."""
    method = Method.model_validate({"objective": objective, "optim": {"steps": 1, "batch": 6, "micro_batch": 3}})
    plain = Rereader(STUDENT, STUDENT, (SIZES[0], SIZES[0]))
    found = []
    for rereader in (None, plain):
        student, _ = pair(torch.float32)
        teacher = tiny_model("llama", vocab=SIZES[0], seed=5).requires_grad_(False)
        rows = [replace(s, teacher_prompt=ids(STUDENT, "Q: ")) for s in FIXED]
        sampler = FixedSequences(rereader.each(rows) if rereader else rows, method.optim, pad=0, seed=1)
        batches = sampler.micro_batches(0)
        assert all((batch.aligned is not None) == (rereader is not None) for batch in batches)
        found.append(losses(make_step(method, student, (teacher,), rereader or SIZES[0]), student, batches))
    if "kd_ratio" in objective:  # two parts are added in another order
        assert found[0][0] == pytest.approx(found[1][0], abs=1e-6)
        torch.testing.assert_close(found[0][1], found[1][1], atol=1e-6, rtol=1e-5)
    else:
        assert found[0][0] == found[1][0]
        assert torch.equal(found[0][1], found[1][1])


def test_what_does_not_count_is_as_if_it_were_not_there():
    """The first token of `then` does not count. The teacher reads one token there, so all of the word's tokens are in no span."""
    student, teacher = pair()
    s = FIXED[TEXTS.index("then")]
    start = len(s.prompt)
    masked = AGAIN(replace(s, spans=((start + 1, start + len(s.response)),)))
    assert [mine.tolist() for mine in counted_spans(masked)] == [[-1, -1, 0], [-1, 0]]
    batch = collate([masked, AGAIN(FIXED[0])], pad=0)
    assert batch.aligned.found["left_out"] == 1  # of those that count
    method = Method.model_validate({"objective": {"type": "forward_kl"}, "optim": {"steps": 1, "batch": 2}})
    found = losses(make_step(method, student, (teacher,), AGAIN), student, [batch])
    kept = [
        *span_values(objectives.forward_kl, student, teacher, s, first=1),
        *span_values(objectives.forward_kl, student, teacher, FIXED[0]),
    ]
    expected = torch.stack(kept).mean()
    assert found[0] == pytest.approx(float(expected.detach()), abs=1e-6)
    torch.testing.assert_close(found[1], gradient(expected, student), atol=1e-6, rtol=1e-5)


def test_a_micro_batch_without_spans_adds_nothing():
    student, teacher = pair()
    nothing = Sequence(FIXED[0].prompt, (SIZES[0], SIZES[0]), teacher_prompt=FIXED[0].teacher_prompt)  # rows of the head without a token
    batch = collate([AGAIN(nothing)], pad=0)
    assert batch.aligned.count == 0
    assert batch.aligned.found["left_out"] == 2
    method = Method.model_validate({"objective": {"type": "reverse_kl"}, "optim": {"steps": 1, "batch": 1}})
    value, slope = losses(make_step(method, student, (teacher,), AGAIN), student, [batch])
    assert value == 0
    assert slope.abs().max() == 0


NEW = 6
ROUNDS = {"rollouts": 8, "max_new_tokens": NEW}
SAMPLERS = {
    "student": {"objective": {"type": "reverse_kl"}, "sampler": {"type": "student", **ROUNDS}},
    "student, two epochs": {"objective": {"type": "reverse_kl"}, "sampler": {"type": "student", "inner_epochs": 2, **ROUNDS}},
    "mix": {"objective": {"type": "jensen_shannon"}, "sampler": {"type": "mix", "lam": 1.0, "max_new_tokens": NEW}},
    "replay": {"objective": {"type": "skew_forward_kl"}, "sampler": {"type": "replay", "capacity": 8, "max_new_tokens": NEW}},
}
MINILLM = {
    "objective": {"type": "minillm", "pt_weight": 0, "single_step": False, "include_current": True, "length_normalisation": "remaining"},
    "sampler": {"type": "teacher_mixed", "alpha": 0, "inner_epochs": 2, **ROUNDS},
}


def made_of(given: dict, again: Rereader | None = AGAIN, *, step: int = 1):
    """Return the step of a method, its student, its sampler, and the batches of one update."""
    student, teacher = pair(torch.float32)
    method = Method.model_validate({**given, "optim": {"steps": 9, "batch": 4, "micro_batch": 2}})
    engine = Native(student, Decoding(max_new_tokens=NEW), eos=STUDENT.ends, vocab=SIZES[0])
    common = {"engine": engine, "pad": 0, "seed": 3, "again": again}
    sampler = on_policy(method, FIXED, ROWS, teachers=(teacher,), vocab=SIZES[0], **common)
    if hasattr(sampler, "phi"):
        sampler.phi = sampler.mark = 1.0
    made = make_step(method, student, (teacher,), AGAIN)
    for earlier in range(step):
        sampler.micro_batches(earlier)
    return made, student, teacher, sampler, made.prepare(sampler.micro_batches(step), step, lambda values: values)


def sampled(batches) -> list[Sequence]:
    """Return the rows of padded batches as sequences, with the teacher's prompt of the same row."""
    prompts = {r.prompt: r.teacher_prompt for r in ROWS}
    found = []
    for batch in batches:
        for tokens, mask in zip(batch.ids_BT.tolist(), batch.mask_BT.tolist(), strict=True):
            start = mask.index(True) + 1
            prompt = tuple(tokens[:start])
            found.append(Sequence(prompt, tuple(tokens[start : start + sum(mask)]), teacher_prompt=prompts[prompt]))
    return found


@pytest.mark.parametrize("case", SAMPLERS)
def test_sampled_text_is_read_again(case):
    """The loss of an update on sampled text equals that of its rows, read again one by one and trained on as a data set."""
    made, student, teacher, _, batches = made_of(SAMPLERS[case])
    found = losses(made, student, batches)
    rows = [AGAIN(s) for s in sampled(batches)]
    assert found[0] == pytest.approx(losses(made, student, [collate(rows, pad=0)])[0], abs=1e-5)
    student, teacher = pair()
    name = SAMPLERS[case]["objective"]["type"]
    if all(s.response[-1] in STUDENT.ends and b"\xef\xbf\xbd" not in b"".join(pieces(STUDENT, s.response)) for s in rows):
        expected = by_hand(getattr(objectives, name), student, teacher, rows)
        assert found[0] == pytest.approx(float(expected.detach()), abs=1e-4)


def test_the_student_samples_what_it_samples_alone():
    texts = [sampled(made_of(SAMPLERS["student"], again)[4]) for again in (AGAIN, None)]
    assert [s.response for s in texts[0]] == [s.response for s in texts[1]]


def test_rollouts_survive_a_checkpoint():
    _, _, _, sampler, _ = made_of(SAMPLERS["student, two epochs"])
    for before, after in zip(sampler.sequences, unpack(pack(sampler.sequences)), strict=True):
        assert before.second is not None
        assert after.second is not None
        assert np.array_equal(before.second.ids, after.second.ids)
        assert np.array_equal(before.second.student, after.second.student)
        assert np.array_equal(before.second.teacher, after.second.teacher)
        assert (before.second.lone, before.second.changed, before.second.dropped) == (
            after.second.lone,
            after.second.changed,
            after.second.dropped,
        )
        assert length(before) == length(after) >= len(before.prompt) + len(before.response)


def test_minillm_has_the_rewards_of_spans():
    """Rewards and returns of each row against sums over its spans; the policy term's gradient is that of -A log q at ratio 1."""
    made, student, teacher, _, batches = made_of(MINILLM)
    for batch in batches:
        for b, s in enumerate(map(AGAIN, sampled([batch]))):
            theirs = s.second.ids.tolist()
            q, p = log_probs(student, s.prompt, s.response, SIZES[0]), log_probs(teacher, s.teacher_prompt, theirs, SIZES[1])
            rewards = torch.zeros(len(s.response))
            mine, other = counted_spans(s)
            last = np.flatnonzero(mine >= 0)[-1]
            for k in range(mine.max() + 1):
                own, their = np.flatnonzero(mine == k), np.flatnonzero(other == k)
                rewards[min(own[-1] + 1, last)] += sum(p[i, theirs[i]] for i in their) - sum(q[i, s.response[i]] for i in own)
            n = len(s.response)
            expected = torch.stack([rewards[t:].sum() / (n - t) for t in range(n)])
            start = len(s.prompt) - 1
            torch.testing.assert_close(batch.values["advantage"][b, start : start + n], expected.detach(), atol=1e-4, rtol=1e-4)
            assert float(rewards_of([batch])[0][b].sum()) == pytest.approx(float(rewards.sum().detach()), abs=1e-4)
    found = losses(made, student, batches)
    total = sum(len(s.response) for s in sampled(batches))
    surrogate = torch.zeros(())
    for batch in batches:
        for b, s in enumerate(sampled([batch])):
            q = log_probs(student, s.prompt, s.response, SIZES[0])
            start, n = len(s.prompt) - 1, len(s.response)
            chosen = q[torch.arange(n), torch.tensor(s.response)]
            surrogate = surrogate - (batch.values["advantage"][b, start : start + n] * chosen).sum() / total
    torch.testing.assert_close(found[1], gradient(surrogate, student), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("case", ["student", "student, two epochs", "minillm"])
def test_watched_numbers_are_those_of_spans(case):
    made, student, teacher, _, batches = made_of(MINILLM if case == "minillm" else SAMPLERS[case])
    found = watch(made, batches)
    gaps = []
    for batch in batches:
        gaps.append([])
        for s in map(AGAIN, sampled([batch])):
            theirs = s.second.ids.tolist()
            q, p = log_probs(student, s.prompt, s.response, SIZES[0]), log_probs(teacher, s.teacher_prompt, theirs, SIZES[1])
            mine, other = counted_spans(s)
            for k in range(mine.max() + 1):
                of_p, of_q = np.flatnonzero(other == k), np.flatnonzero(mine == k)
                gaps[-1].append(float((sum(p[i, theirs[i]] for i in of_p) - sum(q[i, s.response[i]] for i in of_q)).detach()))
    known = "teacher" in batches[0].values  # else log p needs a forward pass, which only the first rows have
    assert found["rollout/reward"] == pytest.approx(
        np.mean([gap for of_batch in (gaps if known else gaps[:1]) for gap in of_batch]), abs=1e-4
    )
    kl, count = sum(np.expm1(gap) - gap for gap in gaps[0]), len(gaps[0])
    assert found["rollout/reverse_kl"] == pytest.approx(kl / count, rel=1e-3)
    assert "rollout/teacher_top_mass" not in found
    logged = spans.metrics(counts(batches))
    assert logged["spans/spans"] == sum(batch.aligned.count for batch in batches)
    sides = [(batch.aligned.student, batch.counted(batch.targets_BT), batch.aligned.teacher, batch.aligned.tokens) for batch in batches]
    one = sum(
        (own := tokens[mine == k]).numel() == (theirs := other[their == k]).numel() == 1 and AGAIN.shared.get(int(own[0])) == int(theirs[0])
        for mine, tokens, their, other in sides
        for k in range(int(mine.max()) + 1)
    )
    assert logged["spans/single"] == pytest.approx(float(one) / logged["spans/spans"])


def test_scores_stand_at_the_last_token_of_their_span():
    s = AGAIN(FIXED[0])
    theirs = counted_spans(s)[1]
    scores = -np.arange(1.0, len(theirs) + 1)
    found, mine = at_span_ends(s, scores), counted_spans(s)[0]
    for k in range(mine.max() + 1):
        own = np.flatnonzero(mine == k)
        assert found[own[-1]] == scores[theirs == k].sum()
        assert not found[own[:-1]].any()


def test_what_the_teacher_cannot_read_is_in_no_span_and_is_counted():
    s = FIXED[0]
    room = len(s.teacher_prompt) + 2
    short = replace(AGAIN, most=room)(s)
    assert len(short.second.ids) == 2
    batch = collate([short], pad=0)
    assert batch.context.ids_BT.shape[1] == room
    assert batch.aligned.found["left_out"] == int((counted_spans(short)[0] < 0).sum()) > 0
    with pytest.raises(DataError, match="prompt and response together may have only"):
        replace(AGAIN, most=len(s.teacher_prompt))(s)


@pytest.mark.parametrize("takes", [None, 7])
def test_a_training_reads_at_most_what_its_teacher_takes(takes):
    student, teacher = Subject(tiny_model("llama", vocab=SIZES[0]), STUDENT.tokenizer, SIZES[0], STUDENT.ends), Teacher()
    teacher.width, teacher.longest = SIZES[1], takes
    across = Across(SimpleNamespace(), student, teacher, TEACHER.tokenizer, SimpleNamespace(ends=TEACHER.ends))
    assert across.again.most == takes


def test_sequences_are_read_again_once():
    asked = []

    class Counting(list):
        def __getitem__(self, i):
            asked.append(i)
            return super().__getitem__(i)

    found = AGAIN.each(Counting(FIXED))
    first, again = found[3], found[3]
    assert first.second is again.second
    assert len(found) == len(FIXED)
    assert [s.second.ids.tolist() for s in found[:2]] == [AGAIN(s).second.ids.tolist() for s in FIXED[:2]]


def test_the_end_token_and_specials_of_each_model():
    tokenizer = byte_tokenizer()
    other = token_bytes(tokenizer, (4, 1))  # <|im_end|> ends an answer, and <eos> too
    found = Rereader(other, TEACHER, SIZES)(Sequence((10,), (*tokenizer.encode("the a"), 4), teacher_prompt=(5,)))
    assert found.second.ids.tolist() == [*ids(TEACHER, "the a"), TEACHER.ends[0]]
    again = Rereader(other, TEACHER, SIZES)(Sequence((10,), (*tokenizer.encode("the"), 5, *tokenizer.encode("a")), teacher_prompt=(5,)))
    assert counted_spans(again)[0].tolist()[3:] == [-1, -1]  # the teacher has no <|im_start|>, so the rest is in no span


def test_optim_limits_tokens_by_the_longer_reading():
    optim = Optim(steps=1, batch=4, tokens=40)
    sizes = [length(s) for s in AGAIN.each(FIXED)]
    assert max(sizes) <= 40
    for batch in FixedSequences(AGAIN.each(FIXED), optim, pad=0, seed=1).micro_batches(0):
        assert batch.ids_BT.numel() <= 40 or len(batch.ids_BT) == 1
        assert batch.context.ids_BT.numel() <= 40 or len(batch.ids_BT) == 1


def test_rows_without_a_span_have_no_reward_and_no_nan():
    """A response of one byte that is no text: a teacher with tokens of whole words cannot read it."""
    mine, theirs = (token_bytes(tinyworld.tokenizer(name, seed=0, people=20)) for name in ("tinyworld-bpe", "tinyworld"))
    sizes = len(mine.tokens), len(theirs.tokens)
    again, (student, teacher) = Rereader(mine, theirs, sizes), [tiny_model("llama", vocab=size) for size in sizes]
    values = {name: np.full(1, -3.0, np.float32) for name in ("student", "behaviour")}
    row = again(Sequence((5, 6), (200,), values, teacher_prompt=(5, 6)))
    method = over_spans(Method.model_validate({"objective": {"type": "reverse_kl"}, "sampler": {"type": "student"}}))
    found = watch(make_step(method, student, (teacher,), again), [collate([row], pad=0)])
    assert all(map(np.isfinite, found.values())), found
    assert found["rollout/left_out"] == 1
    assert not {"rollout/reward", "rollout/reverse_kl"} & found.keys()


def read_by_words(text: str, *, end: bool = True) -> tuple[Rereader, Sequence]:
    """A teacher of words, which reads other words as its unknown token, and a text in the tokens of a student of parts of words."""
    own, other = (token_bytes(tinyworld.tokenizer(name, people=12)) for name in ("tinyworld-bpe", "tinyworld"))
    again = Rereader(own, other, (len(own.tokens), len(other.tokens)))
    response = (*ids(own, text), *(own.ends if end else ()))
    return again, again(Sequence(ids(own, "the home is "), response, teacher_prompt=ids(other, "the home is ")))


@pytest.mark.parametrize("name", ["uld", "gold"])
def test_a_word_that_the_teacher_cannot_read_has_no_distance(name):
    again, sequence = read_by_words(" the xqzv .")
    batch = collate([sequence], pad=0)
    (span,) = np.flatnonzero(batch.aligned.unknown)
    assert batch.aligned.found["unspelled"] == 1
    assert again.teacher.tokenizer.convert_ids_to_tokens(batch.aligned.tokens.tolist())[span] == "<unk>"
    student, teacher = (tiny_model("llama", vocab=size, seed=k) for k, size in enumerate(again.sizes))
    made = make_step(Method.model_validate({"objective": {"type": name}}), student, (teacher.requires_grad_(False),), again)
    states = made.models.student.hidden(student, batch).detach().requires_grad_()
    sides = spans.Sides(states, made.models.student.head, *made.models.targets(batch), again)
    spans.divergence(sides, batch, made.terms(batch)[0], 1.0).backward()
    has_loss = states.grad.abs().sum(-1) > 0
    assert has_loss.tolist() == (batch.aligned.student != span).tolist()


GAP = {"known": -2.5, "unknown": -9.0}


def scored(text: str, *, end: bool = True) -> Sequence:
    """A text of `read_by_words` with log q = -1 for each token, and log p = -2.5 for each span, or -9 if the teacher cannot read it."""
    _, sequence = read_by_words(text, end=end)
    aligned = collate([sequence], pad=0).aligned
    last = np.flatnonzero(np.diff(aligned.student, append=-1))
    scores = np.zeros(len(aligned.student), np.float32)
    scores[last] = np.where(aligned.unknown[aligned.student[last]], GAP["unknown"], GAP["known"])
    return replace(sequence, values={"student": np.full(len(scores), -1.0, np.float32), "teacher": scores})


def rewards_of(batches: list, total=lambda values: values) -> list[torch.Tensor]:
    return spans.rewards(batches, lambda values: values, total)


def advantages(batches: list, total=lambda values: values, **settings) -> list[torch.Tensor]:
    """The advantages of the tokens of each batch, if the batches are one update."""
    objective = MINILLM["objective"] | settings
    method = Method.model_validate({"objective": objective, "sampler": MINILLM["sampler"]})
    made = make_step(method, tiny_model("llama"), (), 31)
    return [batch.counted(batch.values["advantage"]) for batch in made.prepare(batches, 0, total)]


READABLE, UNKNOWN_ONLY, MIXED, UNKNOWN_THEN_END = " the home .", " xqzv wqx zzz", " the xqzv .", " xqzv"


def test_a_word_that_the_teacher_cannot_read_neither_pays_nor_costs():
    """Its reward is the mean per token of the update's other spans, in every row, and is paid where a span's reward is paid."""
    rows = [scored(READABLE), scored(UNKNOWN_ONLY, end=False), scored(MIXED), scored(UNKNOWN_THEN_END)]
    batches = [collate([row], pad=0) for row in rows]
    assert [batch.aligned.unknown.tolist() for batch in batches] == [[0, 0, 0, 0], [1, 1, 1], [0, 1, 0, 0], [1, 0]]
    known = [~b.aligned.unknown[b.aligned.student] for b in batches]
    mean = sum(float(r["teacher"][k].sum() - r["student"][k].sum()) for r, k in zip([r.values for r in rows], known, strict=True))
    mean /= sum(map(np.sum, known))
    for batch, row, found in zip(batches, rows, rewards_of(batches), strict=True):
        expected, mine = np.zeros(len(row.response)), batch.aligned.student.numpy()
        for k, unknown in enumerate(batch.aligned.unknown):
            own = np.flatnonzero(mine == k)
            reward = mean * len(own) if unknown else GAP["known"] + len(own)
            expected[min(own[-1] + 1, len(mine) - 1)] += reward
        assert batch.counted(found).tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    everywhere = sum(float(found.sum()) for found in rewards_of(batches)) / sum(len(row.response) for row in rows)
    assert everywhere == pytest.approx(mean, rel=1e-5)
    together = rewards_of([collate(rows, pad=0)])[0]
    assert together.sum(1).tolist() == pytest.approx([float(found.sum()) for found in rewards_of(batches)], rel=1e-5)


def test_text_in_no_span_neither_pays_nor_costs():
    """The reward of each of its tokens is the mean per token of the update's other text."""
    readable = scored(READABLE)
    again, _ = read_by_words(READABLE)
    values = {"student": np.full(5, -1.0, np.float32), "teacher": np.zeros(5, np.float32)}
    lone = again(replace(readable, response=(200,) * 5, values=values))  # five bytes, each of which is no text
    batches = [collate([row], pad=0) for row in (readable, lone)]
    assert batches[1].aligned.student.tolist() == [-1] * 5
    read, unread = (batch.counted(found) for batch, found in zip(batches, rewards_of(batches), strict=True))
    assert unread.tolist() == pytest.approx([float(read.mean())] * 5)


@pytest.mark.parametrize("normalised", ["remaining", "discounts", "none"])
def test_words_that_the_teacher_cannot_read_change_no_advantage_of_other_rows(normalised):
    readable, other = (collate([scored(text)], pad=0) for text in (READABLE, UNKNOWN_ONLY))
    alone = advantages([readable], length_normalisation=normalised)[0]
    assert torch.equal(advantages([readable, other], length_normalisation=normalised)[0], alone)


def test_an_update_that_the_teacher_cannot_read_has_no_reward():
    batch = collate([scored(UNKNOWN_ONLY, end=False)], pad=0)
    assert not rewards_of([batch])[0].any()
    for whitening in ("none", "tokens"):
        assert not advantages([batch], whitening=whitening)[0].any()


@pytest.mark.parametrize("settings", [{}, {"reward_scale": 0.5, "reward_clip": 1.0}])
def test_the_mean_reward_is_that_of_all_processes(settings):
    """Also of a process whose rows the teacher can read, and of one whose rows it cannot read at all."""
    batches = [collate([row], pad=0) for row in (scored(READABLE), scored(UNKNOWN_ONLY, end=False))]
    sums: list[torch.Tensor] = []
    for batch in batches:
        advantages([batch], lambda values: sums.append(values) or values, **settings)
    assert len(sums) == 2
    each = [advantages([batch], lambda _: sums[0] + sums[1], **settings)[0] for batch in batches]
    for one, of_both in zip(each, advantages(batches, **settings), strict=True):
        torch.testing.assert_close(one, of_both, rtol=1e-6, atol=0)
    first = [float(of_row[0]) * len(of_row) for of_row in each]  # the sum of the row's rewards
    if settings:  # the mean is that of the scaled and clipped rewards
        assert first == pytest.approx([-1 + 1 - 1, -1 / 6 * len(each[1])])


def test_watching_counts_words_that_the_teacher_cannot_read():
    again, _ = read_by_words(MIXED)
    made = make_step(Method.model_validate({"objective": {"type": "sampled_kl"}}), tiny_model("llama", vocab=again.sizes[0]), (), again)
    row = scored(MIXED)
    row = replace(row, values=row.values | {"behaviour": row.values["student"]})
    batch = collate([row], pad=0)
    found, unknown = watch(made, [batch]), batch.aligned.unknown[batch.aligned.student]
    known = row.values["teacher"][~unknown] + 1
    assert found["rollout/reward"] == pytest.approx(float(known.sum()) / (~batch.aligned.unknown).sum(), rel=1e-5)
    assert found["rollout/left_out"] == pytest.approx(unknown.mean())
    assert spans.metrics(batch.aligned.found)["spans/left_out"] == pytest.approx(unknown.mean())
