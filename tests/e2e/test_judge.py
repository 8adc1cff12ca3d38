"""A real OpenAI-compatible server (`transformers serve`) and a tiny random model as the judge.

The model can only babble, so every reply must come out as unparsed, and nothing may be guessed.
"""

import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from tests.conftest import tiny_model
from tests.unit.report.builder import ArmSpec, StudySpec, build_study

from tadistill.config.evaluate import Judge
from tadistill.data import tinyworld
from tadistill.errors import JudgeFailed
from tadistill.judge.commands import judge
from tadistill.terminal import Terminal

SECONDS_TO_START = 90
CHAT = "{% for message in messages %}{{ message['content'] }} \n {% endfor %}"


@pytest.fixture
def served(tmp_path, monkeypatch):
    """The address of the server, and the model's name there."""
    pytest.importorskip("fastapi", reason="transformers[serving] is not installed")
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    tokenizer = tinyworld.tokenizer()
    tokenizer.chat_template = CHAT
    model = tiny_model("llama", vocab=len(tokenizer))
    model.config.max_position_embeddings = 1024
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = Path(sys.executable).with_name("transformers")
    command = [program, "serve", tmp_path / "model", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with (tmp_path / "serve.log").open("w") as log:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "hub")}
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            _wait(port, server, tmp_path / "serve.log")
            yield f"http://127.0.0.1:{port}/v1", str(tmp_path / "model"), server
        finally:
            server.terminate()
            server.wait(timeout=20)


def _wait(port: int, server: subprocess.Popen, log: Path) -> None:
    for _ in range(SECONDS_TO_START * 2):
        assert server.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise AssertionError(f"the server did not start in {SECONDS_TO_START} s: {log.read_text()}")


def test_real_server(served, tmp_path):
    url, model, server = served
    arms = [ArmSpec("direct", ("xl", "s")), ArmSpec("chain", ("xl", "l", "s"))]
    study = build_study(tmp_path / "runs", StudySpec(arms, seeds=(10,), sets={"dolly": 3}, fact_sets=(), decoding_seeds=1))
    said = io.StringIO()

    def run(limit: int) -> None:
        settings = Judge(model=model, base_url=url, limit=limit, max_tokens=8, jobs=2, timeout=60, name="real")
        console = Terminal(file=said, width=200)
        judge("demo", settings, runs=tmp_path / "runs", console=console, confirm=lambda _: True, command="test")

    no_scores = "no arm has a prompt with scores in both orders and for every training seed, so there is no summary"
    with pytest.raises(JudgeFailed, match=no_scores):
        run(2)
    assert not list((study.study_dir / "judge").glob("judge-*.json"))
    assert "no scores can be read from the replies to 8 of 8 questions" in said.getvalue()
    replies = [json.loads(line) for line in (study.study_dir / "judge" / "replies.jsonl").read_text().splitlines()]
    assert len({reply["key"] for reply in replies}) == len(replies) == 8 * 3
    assert any(reply["text"].strip() for reply in replies)
    assert all(reply["in"] > 10 for reply in replies)

    server.terminate()
    server.wait(timeout=20)
    with pytest.raises(JudgeFailed, match=no_scores):  # all from the cache: the server is not needed
        run(2)
    with pytest.raises(JudgeFailed, match="cannot be reached"):
        run(3)
