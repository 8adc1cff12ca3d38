"""Evaluation of a model by itself: batch size changes nothing, every number is what a direct computation gives."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState
from tests.conftest import tiny_model
from tests.e2e.inprocess import ranks

from tadistill.config import Evaluate
from tadistill.data import datasets, tinyworld
from tadistill.data.batch import references
from tadistill.data.encoding import EvalSet, encode
from tadistill.data.encoding_rules import Rules
from tadistill.evaluation import run
from tadistill.evaluation.run import dev_metrics, evaluate, generate_answers, native, score
from tadistill.evaluation.token_scores import Subject, divergences, entropy, likelihood
from tadistill.metrics import BUILT_IN, RECORD, metric_of
from tadistill.objectives import forward_kl, reverse_kl
from tadistill.rollout.samplers import Shard


@pytest.fixture(scope="module")
def tokenizer():
    return tinyworld.tokenizer(people=20)


@pytest.fixture(scope="module")
def data(tokenizer):
    rows = tinyworld.world_rows("tinyworld", "test", people=20)[:10]
    examples = [datasets.Example(r["instruction"], r["input"], tuple(r["outputs"]), facts=tuple(map(tuple, r["facts"]))) for r in rows]
    return EvalSet("tinyworld", examples, encode(examples, tokenizer, Rules(32, 64, template="plain"))[0])


def subject(tokenizer, seed=0):
    return Subject(tiny_model("llama", vocab=len(tokenizer), seed=seed), tokenizer, len(tokenizer), (tokenizer.eos_token_id,))


def settings(**more) -> Evaluate:
    return Evaluate.model_validate({"seeds": [1, 2], "max_new_tokens": 8} | more)


@pytest.mark.slow
def test_scores_do_not_depend_on_the_batch(tokenizer, data):
    one = evaluate(subject(tokenizer), data, settings(batch=1))
    many = evaluate(subject(tokenizer), data, settings(batch=16))
    assert [r["prediction"] for r in one.records] == [r["prediction"] for r in many.records]
    for metric, values in one.scores.items():
        np.testing.assert_allclose(values, many.scores[metric], atol=1e-4)
    assert {metric: np.shape(values) for metric, values in many.scores.items()} == {
        **dict.fromkeys(("rouge_l", "fact_accuracy", "exact_match", "length", "repetition", "entropy"), (10, 2)),
        "loss": (10, 1),
        "self_bleu": (10, 1),
    }
    assert len(many.records) == 20
    assert {r["seed"] for r in many.records} == {1, 2}
    assert [(r["instruction"], r["input"]) for r in many.records[:10]] == [(e.instruction, e.input) for e in data.rows]


def test_greedy_text_does_not_depend_on_the_batch(tokenizer, data):
    found = [evaluate(subject(tokenizer), data, settings(batch=batch, temperature=0, seeds=[1])) for batch in (1, 16)]
    assert [r["prediction"] for r in found[0].records] == [r["prediction"] for r in found[1].records]
    assert found[0].scores["entropy"] == [[0.0]] * 10


def row_logits(model, sequence):
    ids, at = torch.tensor([sequence.prompt + sequence.response]), slice(len(sequence.prompt) - 1, -1)
    with torch.no_grad():
        return model(ids).logits[0, at].double()


def test_numbers_of_tokens_equal_a_direct_computation(tokenizer, data):
    student, teacher = subject(tokenizer), tiny_model("llama", vocab=len(tokenizer), seed=4)
    texts = references(data.encoded)
    q, p = row_logits(student.model, texts[3]), row_logits(teacher, texts[3])
    log_q, tokens = q.log_softmax(-1), torch.tensor(texts[3].response)
    (beside,) = divergences(student, texts, [teacher], batch=4)
    likely = likelihood(student, texts, batch=4)
    sharp = (q / 0.5).log_softmax(-1)
    for found, expected in [
        (beside["forward_kl"], forward_kl(q, p)),
        (beside["reverse_kl"], reverse_kl(q, p)),
        (likely["loss"], -log_q[range(len(tokens)), tokens]),
        (likely["confidence"], log_q.max(-1).values.exp()),
        (likely["correct"], (log_q.argmax(-1) == tokens).double()),
        (entropy(student, texts, batch=4, temperature=0.5), -(sharp.exp() * sharp).sum(-1)),
    ]:
        np.testing.assert_allclose(found[3], expected.numpy(), atol=1e-4)


def test_numbers_of_the_whole_set(tokenizer, data):
    student = subject(tokenizer)
    found = evaluate(student, data, settings())
    losses = np.concatenate(likelihood(student, references(data.encoded), batch=4)["loss"])
    assert found.corpus["numbers"]["perplexity"] == pytest.approx(np.exp(losses.mean()), rel=1e-5)
    assert sum(found.corpus["calibration"]["tokens"]["count"]) == len(losses)
    assert found.corpus["reference_length"] == [len(e.response) - 1 for e in data.encoded]  # without EOS


def test_another_decoding_reads_no_references(tokenizer, data):
    student, other = subject(tokenizer), settings(temperature=0.5, seeds=[1])
    found = score(student, data, other, {1: generate_answers(native(student, other), data, 1)}, read_references=False)
    assert {"loss", "self_bleu"}.isdisjoint(found.scores)
    assert set(found.corpus) == {"numbers"}
    assert set(found.corpus["numbers"]) == {"distinct_1", "distinct_2", "distinct_4"}


def test_every_metric_is_in_the_table(tokenizer, data):
    found = evaluate(subject(tokenizer), data, settings())
    for name in (*found.scores, *found.corpus["numbers"]):
        assert metric_of(name).stage == "evaluate"
        assert metric_of(name).whole_set == (name in found.corpus["numbers"])


def test_records_hold_the_question_without_its_template(tokenizer):
    """A decoded chat prompt reads "user\\n…\\nassistant" and cannot be taken apart again."""
    examples = [
        datasets.Example("Name a colour.", "", ("red",)),
        datasets.Example("Translate.", "rouge", ("red",)),
        datasets.Example("", "", ("red",), messages=({"role": "user", "content": "Name a colour."},)),
        datasets.Example("", "", ("red",), messages=({"role": "system", "content": "Be brief."}, {"role": "user", "content": "A colour?"})),
    ]
    encoded = encode(examples[:2], tokenizer, Rules(512, 600, template="alpaca"))[0]
    encoded += [replace(e, row=e.row + 2) for e in encoded]
    found = evaluate(subject(tokenizer), EvalSet("set", examples, encoded), settings(seeds=[1]))
    assert [(r["instruction"], r["input"]) for r in found.records] == [
        ("Name a colour.", ""),
        ("Translate.", "rouge"),
        ("user: Name a colour.", ""),
        ("system: Be brief.\n\nuser: A colour?", ""),
    ]
    turns = [[{"role": m["role"], "text": m["content"]} for m in example.messages] for example in examples]
    assert [r.get("turns", []) for r in found.records] == turns
    assert set().union(*found.records) - RECORD <= BUILT_IN
    assert set().union(*found.records) >= RECORD
    assert found.records[0]["prompt"] == tokenizer.decode(list(encoded[0].prompt), skip_special_tokens=True)  # what the model read


def test_dev_metrics_compute_what_is_asked(tokenizer, data):
    student = subject(tokenizer)
    assert set(dev_metrics(student, data, settings(), "loss")) == {"loss"}
    assert {"loss", "rouge_l", "fact_accuracy"} <= set(dev_metrics(student, data, settings(), "rouge_l"))
    teacher = tiny_model("llama", vocab=len(tokenizer), seed=4)
    assert dev_metrics(student, data, settings(), "reverse_kl", teacher=teacher)["reverse_kl"] > 0


METRICS = ("loss", "rouge_l", "reverse_kl")


def shared(student: Subject, data: EvalSet, teacher, folder: Path) -> None:
    torch.set_num_threads(1)
    state, read = PartialState(cpu=True), []
    handle = student.model.register_forward_pre_hook(lambda *_: read.append(1))
    share = Shard(state.process_index, state.num_processes)
    found = {metric: dev_metrics(student, data, settings(batch=1), metric, teacher=teacher, shard=share) for metric in METRICS}
    handle.remove()
    (folder / f"{share.rank}.json").write_text(json.dumps({"found": found, "read": len(read)}))
    dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_that_divide_the_dev_prompts_have_the_metrics_of_one(tokenizer, data, tmp_path):
    """Nine prompts for two processes, which run the model on their own prompts only."""
    part, teacher = replace(data, encoded=data.encoded[:9]), tiny_model("llama", vocab=len(tokenizer), seed=4)
    ranks(2, shared, subject(tokenizer), part, teacher, tmp_path)
    alone = {metric: dev_metrics(subject(tokenizer), part, settings(batch=1), metric, teacher=teacher) for metric in METRICS}
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for each in found:
        assert set(each["found"]) == set(METRICS)
        for metric in METRICS:
            assert each["found"][metric] == pytest.approx(alone[metric], rel=1e-6)
    calls = sum(each["read"] for each in found)
    assert max(each["read"] for each in found) < 0.7 * calls


def test_an_evaluation_of_a_loaded_model_does_not_use_cudnns_attention(tokenizer, data, monkeypatch):
    """cuDNN would build a plan for every new shape. A stage switches its attention off; `tadistill.evaluate` is no stage."""
    seen = []
    for name in ("generate_answers", "score"):
        monkeypatch.setattr(run, name, lambda *_, **__: seen.append(torch.backends.cuda.cudnn_sdp_enabled()))
    before = torch.backends.cuda.cudnn_sdp_enabled()
    evaluate(subject(tokenizer), data, settings(seeds=[1]))
    assert (seen, torch.backends.cuda.cudnn_sdp_enabled()) == ([False, False], before)
