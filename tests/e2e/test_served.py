"""Served teachers with real servers of vLLM: numbers equal those of the same model in this process.

`make vllm` installs vLLM, or the variable TADISTILL_VLLM names an environment that has it. Two servers of one small model start once: one
gives hidden states, and one top-k tokens.
"""

import json
import os
import shlex
import signal
import socket
import subprocess
import time
import urllib.request
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.byte_models import SHAPE, byte_model, byte_tokenizer, save
from tests.conftest import tiny_model
from tests.e2e.inprocess import tadistill
from tests.vllm import NEEDED, VLLM

from tadistill.config import objective as config
from tadistill.config import parse
from tadistill.config.method import Method
from tadistill.config.method_parts import Dense, Optim
from tadistill.config.remote import Serve
from tadistill.config.sampling import HiddenSignal, StudentSampler, TopKSignal
from tadistill.data.batch import Sequence, collate
from tadistill.data.encoding import Encoded
from tadistill.models import served_model_requests
from tadistill.models.loading import load_model
from tadistill.models.served_model import served_teacher
from tadistill.models.teachers import teacher_of
from tadistill.objectives import top_k
from tadistill.rollout import recorded_signals
from tadistill.rollout.engine import Native
from tadistill.rollout.rounds import Rollouts
from tadistill.runner.remote import server_command
from tadistill.train.step import counts, make_step

pytestmark = NEEDED
VOCAB, K = 262, 7
ROWS = [Sequence((50, 60), (70, 80, 90, 1)), Sequence((40,), (110, 1)), Sequence((9, 8, 7), (17, 18, 19, 20, 1))]
BATCH = collate(ROWS, pad=0)
EVERY = config.Objective.__args__[0].__args__
OTHERS = (config.Contrastive, config.Custom, config.Gold)  # gold compares models with different tokenizers
DIVERGENCES = [c for c in EVERY if issubclass(c, config.Divergence) and c not in OTHERS]
SPARSE = [c for c in DIVERGENCES if c not in (config.TopKForwardKL, config.TopKReverseKL, config.Taid)]
RECIPE = """
study: served
seeds: [1]
models:
  xl: {load: DIRECTORY, serve: {at: ADDRESS, gives: GIVES, k: 7}}
  s: {load: "scratch:llama", tokenizer: DIRECTORY, config: CONFIG, sft: {optim: {steps: 2, batch: 4}, select: {metric: last}}}
data: {train: rows.jsonl, dev: rows.jsonl, test: [rows.jsonl], template: plain, max_prompt: 32, max_length: 64}
evaluate: {seeds: [1], max_new_tokens: 4, also: {}}
runtime: {checkpoint_seconds: 0.01, jobs: 1}
method:
  objective: {type: reverse_kl}
  sampler: {type: student, max_new_tokens: 8}
  optim: {steps: STEPS, batch: 4, lr: 3.0e-3}
  select: {metric: last}
arms:
  direct: xl > s
  recorded: {path: xl > s, sampler: {type: student, recorded: true, max_new_tokens: 8, signal: {type: hidden}}}
"""


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A small model with sharp predictions and heads of 32 dimensions, which vLLM has kernels for, and some rows of data beside it."""
    folder = tmp_path_factory.mktemp("served")
    model = byte_model(seed=5, hidden_size=64, tie_word_embeddings=True)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    rows = [{"instruction": f"Say {i}", "output": f"{i} it is"} for i in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return save(folder / "model", model, byte_tokenizer())


def written(directory, at, gives, steps=3):
    shape = json.dumps(SHAPE).replace('"', "")
    text = RECIPE.replace("DIRECTORY", directory).replace("ADDRESS", at).replace("GIVES", gives).replace("CONFIG", shape)
    return text.replace("STEPS", str(steps))


class Server:
    """A server as `tadistill serve` starts it."""

    def __init__(self, directory: str, gives: str, log: Path, port: int | None = None):
        self.directory, self.gives, self.log, self.port = directory, gives, log, port or free_port()
        self.at = f"http://127.0.0.1:{self.port}"
        recipe = parse(written(directory, self.at, gives), source="test", folder=Path(directory).parent)
        command = [str(VLLM), *server_command(recipe, "xl", more=["--enforce-eager"])[1:]]
        variables = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | variables
        log.write_text(shlex.join(command) + "\n")
        with log.open("a") as file:
            self.process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)

    def wait(self) -> "Server":
        for _ in range(2400):
            if self.process.poll() is not None:
                raise AssertionError(self.log.read_text()[-3000:])
            try:
                with urllib.request.urlopen(f"{self.at}/v1/models", timeout=5):
                    return self
            except OSError:
                time.sleep(0.25)
        raise AssertionError(f"no server: {self.log.read_text()[-3000:]}")

    def again(self) -> "Server":
        """A new server at the same address."""
        return Server(self.directory, self.gives, self.log.with_suffix(".again.log"), self.port)

    def kill(self) -> None:
        with suppress(ProcessLookupError):  # it is dead
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def teacher(self):
        where = {"load": self.directory, "revision": "main", "dtype": torch.float32, "device": torch.device("cpu")}
        serve = Serve(at=self.at, gives=self.gives, k=K)
        return served_teacher(served_model_requests.Servers(self.directory, serve), byte_tokenizer(), **where)


@pytest.fixture(scope="module")
def servers(directory, tmp_path_factory):
    folder = tmp_path_factory.mktemp("logs")
    started = {gives: Server(directory, gives, folder / f"{gives}.log") for gives in ("hidden", "top_k")}
    try:
        for server in started.values():
            server.wait()
        yield started
    finally:
        for server in started.values():
            server.kill()


@pytest.fixture(scope="module")
def teachers(servers, directory):
    return {"local": teacher_of(load_model(directory).requires_grad_(False)), **{gives: s.teacher() for gives, s in servers.items()}}


def outcome(objective, teacher, batch=BATCH, **method):
    """Loss, and gradient of every weight of the student."""
    student = tiny_model("llama", vocab=VOCAB)
    step = make_step(Method.model_construct(objective=objective, **({"dense": None, "sampler": None} | method)), student, teacher, VOCAB)
    loss = step.loss(student, step.prepare([batch], 0, lambda x: x)[0], counts([batch])).total
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in student.parameters()])


def near(found, expected, tolerance=1e-4):
    for one, other in zip(found, expected, strict=True):
        assert float((one - other).norm()) <= tolerance * max(float(other.norm()), 1e-6)


def test_hidden_states_of_a_real_server_are_those_of_the_model(teachers):
    found, expected = (teachers[name].target(BATCH).states for name in ("hidden", "local"))
    assert float((found - expected).norm() / expected.norm()) < 1e-4
    assert torch.equal(teachers["hidden"].target(BATCH).states, found)  # a server with a prefix cache would leave out the second ones


def test_top_k_of_a_real_server_is_that_of_the_model(teachers):
    found, log_p = teachers["top_k"].scored(BATCH, VOCAB)
    local, expected_log_p = teachers["local"].scored(BATCH, VOCAB)
    expected = top_k(local.head.logits(local.states), K)
    order = found.log_probs.argsort(-1, descending=True)
    assert torch.equal(found.ids.gather(-1, order), expected.ids)
    torch.testing.assert_close(found.log_probs.gather(-1, order), expected.log_probs, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(log_p, expected_log_p, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("objective", DIVERGENCES)
def test_every_divergence_is_exact_with_hidden_states(objective, teachers):
    chosen = objective(**({"k": 5} if "k" in objective.model_fields else {}))
    near(outcome(chosen, (teachers["hidden"],)), outcome(chosen, (teachers["local"],)))


@pytest.mark.parametrize("objective", SPARSE)
def test_a_divergence_from_top_k_is_that_of_the_local_top_k(objective, teachers):
    local = teachers["local"].target(BATCH)
    recorded = replace(BATCH, targets=(top_k(local.head.logits(local.states), K),))
    near(outcome(objective(), (teachers["top_k"],)), outcome(objective(), (), recorded), 1e-3)


def test_several_teachers_at_several_addresses(teachers):
    other = teacher_of(tiny_model("llama", vocab=VOCAB, seed=9).requires_grad_(False))
    dense = Dense(weights=(2.0, 1.0))
    found, expected = (outcome(config.ReverseKL(), (teachers[name], other), dense=dense) for name in ("hidden", "local"))
    near(found, expected)


def test_a_route_with_a_served_teacher(teachers):
    other = teacher_of(tiny_model("llama", vocab=VOCAB, seed=9).requires_grad_(False))
    batch = collate([replace(row, teacher=teacher) for row, teacher in zip(ROWS, (0, 1, 0), strict=True)], pad=0)
    found, expected, mixed_up = (
        outcome(config.ReverseKL(), each, batch)
        for each in ((teachers["hidden"], other), (teachers["local"], other), (other, teachers["local"]))
    )
    near(found, expected)
    assert float(mixed_up[0]) != pytest.approx(float(expected[0]), rel=1e-2)


@pytest.mark.parametrize(
    ("gives", "objective"),
    [("hidden", config.MiniLLM(pt_weight=0)), ("hidden", config.SampledKL()), ("top_k", config.MiniLLM(pt_weight=0, single_step=False)),
     ("top_k", config.SampledKL())],
)  # fmt: skip
def test_a_round_of_rollouts_is_scored_as_by_the_local_teacher(gives, objective, teachers):
    """Rewards, advantages, loss and gradient of MiniLLM, on text that the student sampled."""

    def result(name):
        student = tiny_model("llama", vocab=VOCAB)
        sampler = StudentSampler(rollouts=8, inner_epochs=2, max_new_tokens=6)
        method = Method(objective=objective, sampler=sampler, optim=Optim(steps=9, batch=4))
        prompts = [Encoded(i, (50 + i, 60), (8, 1)) for i in range(8)]
        engine = Native(student, sampler, eos=(1,), vocab=VOCAB)
        source = Rollouts(prompts, method, engine=engine, teachers=(teachers[name],), vocab=VOCAB, pad=0, seed=3)
        (batch,) = source.micro_batches(0)
        return batch.values["teacher"], *outcome(objective, (teachers[name],), batch, sampler=sampler)

    near(result(gives), result("local"), 1e-3)


def test_recordings_of_a_served_teacher_are_those_of_the_model(teachers, tmp_path):
    """Hidden states from a server that gives these, and top-k tokens from one that gives more of them."""
    for gives, how in (("hidden", HiddenSignal()), ("top_k", TopKSignal(k=4, dtype="float32"))):
        for name in (gives, "local"):
            recorded_signals.record(recorded_signals.of_teacher(teachers[name], pad=0), ROWS, how, tmp_path / gives / name, vocab=VOCAB)
        found, expected = (
            recorded_signals.Signals(tmp_path / gives / name, torch.device("cpu")).target([2, 0]) for name in (gives, "local")
        )
        near([getattr(found, part) for part in PARTS[gives]], [getattr(expected, part) for part in PARTS[gives]])
        if gives == "top_k":
            assert torch.equal(found.ids, expected.ids)


PARTS = {"hidden": ("states",), "top_k": ("log_probs", "tail")}


def test_a_study_survives_the_death_of_its_server(directory, servers, tmp_path, monkeypatch):
    """SFT, on-policy distillation, recording, comparison with the teacher, report. The server dies after some updates; a new one takes its
    address. The weights and the rows of the report are those of an undisturbed run with the teacher in this process, to rounding."""
    recipe, server, asked, post = tmp_path / "served.yaml", servers["hidden"], [], served_model_requests.Servers.post
    monkeypatch.setattr(served_model_requests, "PAUSES", (0.0,))
    recipe.write_text(written(directory, server.at, "hidden", steps=6).replace("rows.jsonl", str(Path(directory).parent / "rows.jsonl")))

    def run(name, *changes):
        return tadistill("run", str(recipe), *changes, "--runs", str(tmp_path / name))

    assert run("whole", "models.xl.serve=null").code == 0

    def dying(self, path, bodies, read):
        asked.append(path)
        if len(asked) == 4:
            server.kill()
        return post(self, path, bodies, read)

    monkeypatch.setattr(served_model_requests.Servers, "post", dying)
    broken = run("broken")
    assert broken.code == 1
    said = broken.out + broken.err
    assert f"the server {server.at} of `" in said
    assert "Traceback" not in said
    servers["hidden"] = server.again().wait()
    again = run("broken")
    assert again.code == 0
    assert "will be continued" in again.out + again.err
    for kind in ("sft", "distill"):
        near(*([weights(model) for model in trained(tmp_path / name, kind)] for name in ("broken", "whole")))
    found, expected = (rows(tmp_path / name) for name in ("broken", "whole"))
    assert found.keys() == expected.keys()
    assert {metric for _, metric, _ in found} >= {"forward_kl", "reverse_kl", "loss", "rouge_l"}
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-3)


def trained(runs: Path, kind: str):
    """The models that the study trained, in the order of the stages of its plan."""
    stages = json.loads((runs / "served" / "plan.json").read_text())["stages"]
    return [load_model(runs / "store" / s["key"][:2] / s["key"] / "model") for s in stages if s["kind"] == kind]


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def rows(runs: Path):
    found = json.loads((runs / "served" / "results.json").read_text())["means"]
    return {(row["arm"], row["metric"], row["set"]): row["value"] for row in found}
