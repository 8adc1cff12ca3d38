"""vLLM as the engine that samples, with a real vLLM: the distribution of its tokens, hand-overs of weights, and stages of a study.

`make vllm` installs vLLM, or the variable TADISTILL_VLLM names an environment that has it. The process of one engine starts once for all
tests of the first part. The study starts one for each of its stages that sample.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.byte_models import SHAPE, byte_model, byte_tokenizer, save
from tests.e2e.inprocess import tadistill
from tests.unit.rollout.test_generate import assert_frequencies
from tests.vllm import NEEDED, VLLM

from tadistill import rng
from tadistill.config.common import Decoding
from tadistill.config.machine import Vllm as Settings
from tadistill.config.model import Lora
from tadistill.errors import StageFailed
from tadistill.models.loading import load_model
from tadistill.models.modify import adapt
from tadistill.rollout.draw import processors
from tadistill.rollout.engine import Native
from tadistill.rollout.vllm import Launch, Vllm

pytestmark = NEEDED
VOCAB, EOS = 200, (1, 90)
PROMPTS = [(50, 60, 70), (40,), (9, 8, 7, 6), (199, 11)]
DRAWS = 3000


def sharp_model(seed=5):
    """A small model with sharp predictions and heads of 32 dimensions, which vLLM has kernels for."""
    model = byte_model(seed=seed, hidden_size=64, tie_word_embeddings=True)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model


@pytest.fixture(autouse=True, scope="module")
def place():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TADISTILL_VLLM", str(Path(VLLM).parents[1]))
        yield


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """An engine whose student has adapters, and 262 tokens of which 200 may be sampled."""
    student = sharp_model()
    adapt(student, Lora(r=2, targets=("q_proj", "up_proj")), seed=1)
    move(student)
    launch = Launch(
        settings=Settings(memory=0.05),
        device=torch.device("cpu"),
        dtype=torch.float32,
        longest=24,
        log=tmp_path_factory.mktemp("engine") / "vllm.log",
        changes=True,
    )
    found = Vllm(student, Decoding(), eos=EOS, vocab=VOCAB, launch=launch)
    yield found
    found.close()


@pytest.fixture
def decoding(engine):
    """Set the engine's decoding for one test."""
    yield lambda **settings: setattr(engine, "decoding", Decoding(**settings))
    engine.decoding = Decoding()


@torch.no_grad()
def move(student, by=0.3):
    """Change the adapters, as an update of training would."""
    for name, parameter in student.named_parameters():
        if "lora_" in name:
            parameter.add_(by)


def uniforms(rows, steps, seed=1):
    return rng.uniforms(range(rows), steps, seed, "test")


@torch.no_grad()
def log_probs(student, prompt, tokens):
    """Log-probabilities (T, 200) of the next token after the prompt and after each of the tokens but the last."""
    ids = torch.tensor([prompt + tokens])
    return student(ids).logits[0, len(prompt) - 1 : -1, :VOCAB].log_softmax(-1)


def furthest(student, rollouts):
    """Largest difference between the log-probabilities that came with the rollouts and those of the student."""
    found = []
    for prompt, rollout in zip(PROMPTS, rollouts, strict=True):
        expected = log_probs(student, prompt, rollout.tokens).gather(1, torch.tensor(rollout.tokens)[:, None]).squeeze(1).numpy()
        found.append(np.abs(rollout.values["student"] - expected).max())
    return max(found)


def test_responses_are_those_of_the_student_with_its_adapters(engine):
    answered = []
    found = engine.respond(PROMPTS, uniforms(len(PROMPTS), 20), None, answered.append)
    assert furthest(engine.student, found) < 1e-4
    assert sum(answered) == len(PROMPTS)
    for rollout in found:
        assert not set(rollout.tokens[:-1]) & set(EOS)
        assert len(rollout.tokens) == 20 or rollout.tokens[-1] in EOS
        assert rollout.values["behaviour"] is rollout.values["student"]
    assert [r.tokens for r in engine.respond(PROMPTS[::-1], uniforms(len(PROMPTS), 20)[::-1])] == [r.tokens for r in found[::-1]]
    assert engine.respond([], uniforms(0, 20)) == []


def test_greedy_responses_are_those_of_our_own_loop(engine, decoding):
    decoding(temperature=0)
    native = Native(engine.student, engine.decoding, eos=EOS, vocab=VOCAB)
    found, expected = (which.respond(PROMPTS, uniforms(len(PROMPTS), 20)) for which in (engine, native))
    assert [rollout.tokens for rollout in found] == [rollout.tokens for rollout in expected]
    assert len({token for rollout in found for token in rollout.tokens}) > 8


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7, "top_p": 0.8}, {"temperature": 1.5, "top_k": 9, "min_p": 0.05}])
def test_tokens_have_the_students_distribution(settings, engine, decoding):
    decoding(**settings)
    found = engine.respond([PROMPTS[0]] * DRAWS, uniforms(DRAWS, 1, seed=7))
    logits = log_probs(engine.student, PROMPTS[0], (0,))
    expected = processors(engine.decoding)(torch.tensor([PROMPTS[0]]), logits).softmax(-1)[0].numpy()
    assert_frequencies(np.array([token for rollout in found for token in rollout.tokens]), expected)
    assert all(bool(rollout.values) == (not settings) for rollout in found)  # other distributions have other log-probabilities


def test_after_an_update_the_next_round_has_the_new_weights(engine, monkeypatch):
    move(engine.student)
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_hand_over", lambda: None)
        assert furthest(engine.student, engine.respond(PROMPTS, uniforms(len(PROMPTS), 20))) > 0.05  # what a skipped hand-over gives
    assert furthest(engine.student, engine.respond(PROMPTS, uniforms(len(PROMPTS), 20))) < 1e-4


def test_a_model_that_vllm_computes_otherwise_is_refused(engine, monkeypatch):
    """The check compares with the student; here the student has changed since the hand-over."""
    with torch.no_grad():
        norm = engine.student.model.norm.weight
        norm.mul_(3)
        with pytest.raises(StageFailed, match="other probabilities than transformers"):
            engine._check()
        norm.div_(3)
    engine._check()


def test_a_killed_process_ends_in_one_sentence(engine):
    engine._process.kill()
    with pytest.raises(StageFailed, match=r"the process of vLLM has ended .* run the same command again"):
        engine.respond(PROMPTS, uniforms(len(PROMPTS), 20))


# --- a study ------------------------------------------------------------------------------------------------------------

RECIPE = """
study: sampled
seeds: [1]
analyse: false
models:
  xl: {load: DIRECTORY}
  s: {load: "scratch:llama", tokenizer: DIRECTORY, config: CONFIG, lora: {r: 2}}
data: {train: rows.jsonl, dev: rows.jsonl, test: [rows.jsonl], template: plain, max_prompt: 32, max_length: 64}
evaluate: {seeds: [1], max_new_tokens: 8, temperature: 0, also: {}, engine: vllm}
runtime: {jobs: 1, vllm: {memory: 0.05}}
method:
  objective: {type: sampled_kl}
  sampler: {type: student, engine: vllm, max_new_tokens: 8}
  optim: {steps: 3, batch: 4, lr: 1.0e-2}
  select: {metric: last}
arms:
  on-policy: xl > s
  seqkd: {path: xl > s, objective: {type: cross_entropy}, sampler: {type: teacher, engine: vllm, temperature: 0, max_new_tokens: 8}}
"""


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A study in which vLLM samples rollouts of a student with adapters, the teacher's text and the answers to the test set. Its answers
    are then sampled again by our own loop."""
    folder = tmp_path_factory.mktemp("study")
    directory = save(folder / "model", sharp_model(), byte_tokenizer())
    rows = [{"instruction": f"Say {i}", "output": f"{i} it is"} for i in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = RECIPE.replace("DIRECTORY", directory).replace(
        "CONFIG", json.dumps(SHAPE | {"hidden_size": 64, "intermediate_size": 32, "tie_word_embeddings": True}).replace('"', "")
    )
    recipe, said = folder / "sampled.yaml", []
    for engine in ("vllm", "native"):
        recipe.write_text(text.replace("also: {}, engine: vllm", f"also: {{}}, engine: {engine}"))
        said.append(tadistill("run", str(recipe), "--runs", str(folder / "runs")))
        assert said[-1].code == 0, said[-1].out + said[-1].err
    return folder, directory


def stages(folder, kind):
    found = [(json.loads((path.parent / "stage.json").read_text()), path.parent) for path in folder.glob("runs/store/*/*/manifest.json")]
    return [(stage, path) for stage, path in found if stage["kind"] == kind]


def test_the_teachers_text_is_the_teachers(study):
    folder, directory = study
    ((_, path),) = stages(folder, "generate")
    teacher = load_model(directory)
    rows = [json.loads(line) for line in (path / "responses.jsonl").read_text().splitlines()]
    greedy = Native(teacher, Decoding(temperature=0), eos=(1,), vocab=262)
    expected = greedy.respond([tuple(row["prompt"]) for row in rows], uniforms(8, 8))
    assert [tuple(row["response"]) for row in rows] == [rollout.tokens for rollout in expected]


def test_greedy_answers_of_an_evaluation_are_those_of_our_own_loop(study):
    found = stages(study[0], "evaluate")
    by_model: dict[str, dict[str, str]] = {}
    for stage, path in found:
        engine = stage["spec"]["decoding"].get("engine", "native")
        by_model.setdefault(json.dumps(stage["spec"]["model"]), {})[engine] = (path / "answers.jsonl").read_text()
    assert len(by_model) == 2
    for answers in by_model.values():
        assert answers["vllm"] == answers["native"]
    assert by_model.popitem() != by_model.popitem()


def test_rollouts_come_from_vllm_and_training_learns_from_them(study):
    found = {path: stage for stage, path in stages(study[0], "distill")}
    logs = [path for path in found if (path / "vllm.log").is_file()]
    assert [found[path]["spec"]["method"]["sampler"]["engine"] for path in logs] == ["vllm"]
    assert "Reloading" in (logs[0] / "vllm.log").read_text()
    assert json.loads((logs[0] / "manifest.json").read_text())["versions"]["vllm"].startswith("0.")
    weights = {path: load_model(str(path / "model")).state_dict() for path in found}
    (one, other) = weights.values()
    assert any(not torch.equal(one[name], other[name]) for name in one)
