"""Measures how long one refresh of `tadistill watch` takes for a study of 200 stages.

    python benchmarks/watch.py [--stages 200] [--rows 20000] [--folder DIR]

Half of the stages train. Four of them run and get 50 new lines each before every refresh; the others are finished. A refresh is one request
of the page over HTTP. The first one comes right after the start of the server, when no log has been read.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from dataclasses import asdict
from pathlib import Path

from tadistill.disk import write_json
from tadistill.runner.local import LocalRun, StageProgress, _born
from tadistill.store import Store
from tadistill.watch import state
from tadistill.watch.server import make_server

RUNNING, NEW = 4, 50
NAMES = ("train/loss", "train/policy", "train/single_step", "train/grad_norm", "dev/loss", "dev/rouge_l", "rollout/length",
         "rollout/repetition", "rollout/entropy", "rollout/reverse_kl", "rollout/reward", "train/lr")  # fmt: skip
"""The entries of a line, as an on-policy stage writes them."""


def lines(first: int, count: int) -> str:
    rows = []
    for step in range(first, first + count):
        values = {name: round(1 + i + (step * 7919 % 1000) / 1000, 5) for i, name in enumerate(NAMES)}
        rows.append(json.dumps({"step": step + 1, **values}) + "\n")
    return "".join(rows)


def make_study(runs: Path, stages: int, rows: int) -> list[Path]:
    """Write a study and return the logs of its running stages."""
    training = stages // 2
    each, store, planned = rows // training, Store(runs / "store"), []
    text = lines(0, each)
    for number in range(stages):
        trains, of = number < training, number % training
        key = f"{number:016x}"
        label = f"distill xl -> s{of // 5}, seed {of % 5}" if trains else f"evaluate distill xl -> s{of // 5}, seed {of % 5}"
        parents = {} if trains else {"model": f"{of:016x}"}
        planned.append({"key": key, "kind": "distill" if trains else "evaluate", "label": label, "model": "s", "parents": parents,
                        "seed": of % 5, "arms": ["a"], "steps": 2 * each if trains else None, "flops": None, "checkpoints": 0})  # fmt: skip
        folder = store.folder(key)
        folder.mkdir(parents=True)
        if trains:
            (folder / "metrics.jsonl").write_text(text)
        if of >= RUNNING:
            write_json(folder / "manifest.json", {"seconds": 60.0, "files": {"metrics.jsonl": ""} if trains else {}})
    running = {f"{number:016x}": StageProgress(planned[number]["label"], each, 2 * each) for number in range(RUNNING)}
    run = LocalRun(os.getpid(), platform.node(), _born(os.getpid()) or 0.0, "tadistill run", "now", seen=time.time(), stages=running)
    write_json(runs / "large" / "local" / "run.json", asdict(run))
    write_json(runs / "large" / "plan.json", {"stages": planned})
    return [store.folder(key) / "metrics.jsonl" for key in running]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=200)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--folder", type=Path, help="where the study is written (default: a temporary folder)")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        logs = make_study(Path(folder), asked.stages, asked.rows)
        bytes_ = sum(path.stat().st_size for path in Path(folder).rglob("metrics.jsonl"))
        print(f"{asked.stages} stages, {asked.rows:,} lines, {bytes_ / 2**20:,.0f} MiB of logs", flush=True)
        measure(Path(folder), logs, 2 * asked.rows // asked.stages)


def measure(runs: Path, logs: list[Path], step: int) -> None:
    state._PAUSE = 0.0  # every request looks at the files; otherwise a state is kept for a second
    start = time.perf_counter()
    server = make_server(runs / "large", Store(runs / "store"), port=0)
    print(f"start of the server     {time.perf_counter() - start:6.2f} s", flush=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    took: dict[str, list[tuple[float, float]]] = {"first": [], "afterwards": []}
    for _ in range(21):
        for log in logs:
            with log.open("a") as file:
                file.write(lines(step, NEW))
        step += NEW
        start, cpu = time.perf_counter(), time.process_time()
        with urllib.request.urlopen(f"{server.url}state") as reply:
            size = len(reply.read())
        took["afterwards" if took["first"] else "first"].append((time.perf_counter() - start, time.process_time() - cpu))
    for name, values in took.items():
        if values:
            wall, cpu = zip(*values, strict=True)
            times = f"median {statistics.median(wall):5.2f} s, longest {max(wall):5.2f} s"
            print(f"{name:26} {len(values):3d} refreshes, {times}, CPU time at most {max(cpu):5.2f} s")
    print(f"a reply has {size / 1024:,.0f} KiB; {sum(log.rows for log in server.watched.look().logs.values()):,} lines were read")
    server.shutdown()


if __name__ == "__main__":
    sys.exit(main())
