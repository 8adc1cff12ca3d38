"""A teacher behind a real API: vLLM answers chat completions with a small model, and a student with another tokenizer learns the answers.

The study is killed twice in the middle of its requests, once without warning. The server's log says how often it was asked.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest
from tests.byte_models import EOS, IM_END, ROWS, SHAPE, bpe_tokenizer, byte_model, byte_tokenizer, save, teach_chat, write_rows
from tests.e2e.inprocess import tadistill
from tests.e2e.test_served import free_port
from tests.vllm import NEEDED, VLLM

from tadistill.store import Store

pytestmark = NEEDED
LIMIT = 600
RECIPE = """
study: real
seeds: [1, 2, 3]
models:
  big: {api: {at: "ADDRESS", model: tiny, requests: 1, requests_per_minute: 200}}
  s: {load: "scratch:llama", tokenizer: STUDENT, config: CONFIG}
data: {train: rows.jsonl, dev: rows.jsonl, test: [rows.jsonl], template: plain, max_prompt: 32, max_length: 64}
evaluate: {seeds: [1], max_new_tokens: 4, also: {}}
runtime: {jobs: 1}
method: {name: seqkd, sampler: {max_new_tokens: 24, temperature: 0.5, top_p: 0.9}, optim: {steps: 2, batch: 4}, select: {metric: last}}
arms: {direct: big > s}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("api")
    model = byte_model([EOS, IM_END], seed=1, hidden_size=64, tie_word_embeddings=True)  # vLLM has kernels for heads of 32 dimensions
    teach_chat(model)
    save(root / "teacher", model, byte_tokenizer())
    bpe_tokenizer([row["output"] for row in ROWS], 280).save_pretrained(root / "student")
    write_rows(root / "rows.jsonl", ROWS)
    return root


@pytest.fixture(scope="module")
def server(folder):
    """The address of the server, and its log."""
    port, log = free_port(), folder / "server.log"
    command = [str(VLLM), "serve", str(folder / "teacher"), "--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--max-model-len", "128", "--enforce-eager"]
    variables = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | variables
    log.write_text(shlex.join(command) + "\n")
    with log.open("a") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
    try:
        _wait(f"http://127.0.0.1:{port}/v1/models", process, log)
        yield f"http://127.0.0.1:{port}/v1", log
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait(address: str, process: subprocess.Popen, log: Path) -> None:
    for _ in range(4 * LIMIT):
        assert process.poll() is None, log.read_text()[-3000:]
        with suppress(OSError), urllib.request.urlopen(address, timeout=5):
            return
        time.sleep(0.25)
    raise AssertionError(f"no server: {log.read_text()[-3000:]}")


def _answered(log: Path) -> int:
    return len(re.findall(r'"POST /v1/chat/completions HTTP/1\.1" 200', log.read_text()))


def _kept(runs: Path) -> int:
    return sum(file.read_bytes().count(b"\n") for file in runs.glob("store/api/*.jsonl"))


def _ended(recipe: Path, runs: Path, by: signal.Signals, after: int) -> None:
    # run the study in processes of its own until it has `after` answers, and end them by a signal
    command = [sys.executable, "-m", "tadistill", "run", str(recipe), "--runs", str(runs)]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(50 * LIMIT):
        assert process.poll() is None, "the study ended before its signal"
        if _kept(runs) >= after:
            break
        time.sleep(0.02)
    if by is signal.SIGKILL:
        os.killpg(process.pid, by)
    else:
        process.send_signal(by)
    process.wait(timeout=LIMIT)


def test_a_killed_study_pays_for_nothing_twice(folder, server):
    address, log = server
    recipe, runs = folder / "real.yaml", folder / "runs"
    shape = json.dumps(SHAPE).replace('"', "")
    recipe.write_text(RECIPE.replace("ADDRESS", address).replace("STUDENT", str(folder / "student")).replace("CONFIG", shape))
    checked = tadistill("doctor", str(recipe), "--runs", str(runs))
    assert "lists tiny" in " ".join(checked.out.split())

    _ended(recipe, runs, signal.SIGTERM, 3)
    assert _answered(log) == _kept(runs) >= 3  # the answer on its way was awaited
    _ended(recipe, runs, signal.SIGKILL, _kept(runs) + 3)
    lost = _answered(log) - _kept(runs)
    assert lost in (0, 1)  # at most the one request that was on its way
    done = tadistill("run", str(recipe), "--runs", str(runs))
    assert done.code == 0, done.err
    assert _kept(runs) == 24
    assert _answered(log) - 24 in (lost, lost + 1)  # + 1 if that answer came after the kill was counted
    _check(runs)

    again = tadistill("run", str(recipe), "--runs", str(runs), "study=again", "method.optim.steps=3")
    assert again.code == 0, again.err
    assert _kept(runs) == 24
    assert _answered(log) - 24 in (lost, lost + 1)


def _check(runs: Path) -> None:
    store, plan = Store(runs / "store"), json.loads((runs / "real" / "plan.json").read_text())
    said = []
    for stage in plan["stages"]:
        if stage["kind"] == "ask":
            manifest = store.manifest(stage["key"])
            assert (manifest["answers"], manifest["models"]) == (8, {"tiny": 8})
            assert manifest["tokens_in"] > 8 * 20
            assert manifest["tokens_out"] > 8 * 5
            said += [json.loads(line) for line in store.artifact(stage["key"], "texts.jsonl").read_text().splitlines()]
    right = [row["text"].strip() == ROWS[row["row"]]["output"] and row["ended"] for row in said]
    assert sum(right) > 0.8 * len(right)  # the server writes the template, samples, and stops at the end of the turn
    assert len(plan["arms"][0]["evaluate"]) == 3
