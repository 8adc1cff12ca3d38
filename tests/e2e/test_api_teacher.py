"""A student of a teacher behind an API, from the recipe to the report: the API breaks down, and nothing is paid for twice.

A small endpoint of this machine has the faults. `test_real_api.py` runs the same study with a real server of vLLM.
"""

import json
from pathlib import Path

import pytest
from tests.e2e.inprocess import tadistill
from tests.unit.judge.fake import as_json, error, serve

from tadistill.config import load
from tadistill.data.tinyworld import tokenizer
from tadistill.errors import ConfigError
from tadistill.plan.arms import make_plan
from tadistill.plan.remote import check_asked
from tadistill.rollout import api_teacher
from tadistill.runner import remote
from tadistill.stages.execute import run_stage
from tadistill.store import Store

RECIPE = """
study: STUDY
seeds: [1, 2]
models:
  big: {api: {at: "ADDRESS", model: big-1, key: BIG_KEY, price: {input: 1000, output: 2000}, requests: 2}}
  s: {load: "scratch:llama", tokenizer: tinyworld, config: {hidden_size: 16, intermediate_size: 32, num_hidden_layers: LAYERS,
      num_attention_heads: 2, num_key_value_heads: 2}}
data: {train: tinyworld, dev: tinyworld, test: [tinyworld], template: plain, limit: {train: 6, dev: 4, test: 4}}
evaluate: {seeds: [1], max_new_tokens: 4, also: {}}
runtime: {jobs: 1}
method: {name: seqkd, sampler: {max_new_tokens: 16}, optim: {steps: 2, batch: 3}, select: {metric: last}}
arms: {direct: big > s}
"""
KEY = "a-key-that-nobody-may-see"


@pytest.fixture(autouse=True)
def _user(monkeypatch):
    monkeypatch.setattr(api_teacher, "PAUSES", (0.0,))
    monkeypatch.setenv("BIG_KEY", KEY)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def answer(number, text):
    finish = "length" if number == 3 else "stop"
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": f"{text.split()[-2]} and more"}}
    usage = {"prompt_tokens": 7, "completion_tokens": 5}
    return as_json(
        {"id": f"{number}", "object": "chat.completion", "created": 0, "model": "big-1-2025", "choices": [choice], "usage": usage}
    )


def written(folder: Path, url: str, study: str = "one", layers: int = 1) -> Path:
    path = folder / f"{study}.yaml"
    path.write_text(RECIPE.replace("STUDY", study).replace("ADDRESS", url).replace("LAYERS", str(layers)))
    return path


def run(folder: Path, url: str, study: str = "one", layers: int = 1):
    path = written(folder, url, study, layers)
    return tadistill("run", str(path), "--runs", str(folder / "runs"))


def test_a_study_whose_api_breaks_down(tmp_path):
    good = 0

    def quota(number, text):
        nonlocal good
        if number >= 9:
            return error(429, "no money left", retry_after="0")
        good += 1
        return answer(number, text)

    with serve(quota) as fake:
        first = run(tmp_path, fake.url)
    said = " ".join(first.err.split())
    assert (first.code, good) == (1, 9), said
    assert "0 of 12 answers are in the store; 12 requests will be sent to" in first.out
    assert "which cost about" in first.out
    assert "of `big-1` failed: it is at its rate limit or out of quota (429), and it asks for a pause of 0 s; 3 of 6" in said
    assert "3 of 6 answers are saved, 3 are missing; run the same command" in said
    with serve(lambda number, text: answer(number + 9, text)) as fake:
        again = run(tmp_path, fake.url)
        assert again.code == 0, again.err
        assert "3 of 6 answers are in the store; 3 requests will be sent to" in again.out
        other = run(tmp_path, fake.url, "two", layers=2)  # other students, the same answers
        assert other.code == 0, other.err
        assert len(fake.asked) == 3
        assert all(body["max_tokens"] == 16 and body["temperature"] == 1 for body in fake.bodies)
    _check(tmp_path)


def test_a_login_node_asks_so_that_jobs_need_no_network(tmp_path, monkeypatch):
    monkeypatch.setattr(
        remote,
        "run_in_processes",
        lambda task, alarm, **_: run_stage(task, progress=lambda *_: None, alarm=alarm, stop=lambda: False),
    )
    with serve(answer) as fake:
        path = written(tmp_path, fake.url)
        plan, store = make_plan(load(path)), Store(tmp_path / "runs" / "store")
        with pytest.raises(ConfigError, match="run `tadistill fetch RECIPE --answers` on a login node"):
            check_asked(plan, store)
        done = tadistill("fetch", str(path), "--answers", "--runs", str(tmp_path / "runs"))
        assert (done.code, len(fake.asked)) == (0, 12), done.err
        assert "12 requests will be sent" in done.out
    check_asked(plan, store)
    assert [*remote.announced(plan, store, plan.stages.values())] == [
        "big (big-1): 12 of 12 answers are in the store, and no request will be sent"
    ]


def _check(folder: Path) -> None:
    store, plan = Store(folder / "runs" / "store"), json.loads((folder / "runs" / "one" / "plan.json").read_text())
    asked, read = ([s for s in plan["stages"] if s["kind"] == kind] for kind in ("ask", "retokenise"))
    manifest = store.manifest(asked[0]["key"])
    assert (manifest["answers"], manifest["cut"], manifest["models"]) == (6, 1, {"big-1-2025": 6})
    assert (manifest["tokens_in"], manifest["tokens_out"]) == (42, 30)
    texts = [json.loads(line) for line in store.artifact(asked[0]["key"], "texts.jsonl").read_text().splitlines()]
    rows = [json.loads(line) for line in store.artifact(read[0]["key"], "responses.jsonl").read_text().splitlines()]
    eos = tokenizer().eos_token_id
    assert [row["response"][-1] == eos for row in rows] == [text["ended"] for text in texts]
    assert all(tokenizer()(text["text"])["input_ids"][0] in row["response"] for text, row in zip(texts, rows, strict=True))
    report = (folder / "runs" / "one" / "report.md").read_text()
    assert "teacher FLOPs unknown: big is behind an API" in report
    written = [path for path in (folder / "runs").rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    assert written == []
    exported = tadistill("export", "one", "direct", str(folder / "model"), "--runs", str(folder / "runs"))
    assert exported.code == 0, exported.err
    assert "Teacher FLOPs unknown" in (folder / "model" / "README.md").read_text()
