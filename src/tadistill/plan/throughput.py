"""The speed of this machine for each kind of stage, and the predicted time of stages and plans.

Speeds are FLOP/s, by kind of stage and by span. A span is a timed part of the training loop: sampling, training, watching (metrics of
sampled text) or selection (dev evaluations). `tadistill plan --measure` writes speeds to RUNS/store/throughput.json. Without them, the
speeds of the plan's own stages that finished on this machine are used.
"""

import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tadistill.disk import write_json
from tadistill.models.flops_and_memory import Cost, phase, spans
from tadistill.plan.graph import Stage, longest_chains
from tadistill.store import Store

_FILE = "throughput.json"
Speeds = dict[str, dict[str, float]]
"""FLOP/s by kind of stage and span."""


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpus(driver: Path = Path("/proc/driver/nvidia/gpus")) -> int:
    """Return the number of NVIDIA GPUs that this process may use, without torch. It is for predictions only."""
    count, listed = len([*driver.iterdir()]) if driver.is_dir() else 0, os.environ.get("CUDA_VISIBLE_DEVICES")
    return count if listed is None else min(count, len([name for name in listed.split(",") if name.strip()]))


def machine(threads: int, accelerator: str | None = None) -> str:
    """Return this machine's name in throughput.json: the accelerator, or the processor and the number of threads."""
    return accelerator or f"{_processor()}, {threads} threads"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor() or "CPU")


def measured_throughput(ledger: Mapping[str, Any]) -> dict[str, float]:
    """Return the FLOP/s of each span of a training. `ledger` has the FLOPs and the seconds that the training recorded.

    Spans without FLOPs or seconds are left out.
    """
    flops: dict[str, float] = {}
    for name, part in ledger["parts"].items():
        flops[phase(name)] = flops.get(phase(name), 0.0) + part["flops"]
    seconds = ledger["seconds"]
    return {span: value / seconds[span] for span, value in spans(flops).items() if value > 0 and seconds.get(span)}


def save_throughput(store: Store, where: str, speeds: Speeds) -> None:
    """Add the speeds of the machine `where` to the store's throughput.json."""
    known = _read(store)
    write_json(store.root / _FILE, known | {where: known.get(where, {}) | speeds})


def load_throughput(store: Store, stages: Mapping[str, Stage], threads: int, accelerator: str | None = None) -> Speeds:
    """Return the speeds of this machine. Speeds from `plan --measure` are preferred to those of finished stages among `stages`."""
    here, found = machine(threads, accelerator), {}
    for stage in stages.values():
        if stage.cost and store.finished(stage.key):
            manifest = store.manifest(stage.key)
            if manifest.get("machine") == here:
                found[stage.cost.kind] = measured_throughput(manifest["ledger"])
    return found | _read(store).get(here, {})


def _read(store: Store) -> dict[str, Speeds]:
    path = store.root / _FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def seconds(cost: Cost | None, speeds: Speeds) -> float | None:
    """Predict the seconds of a stage. Return None if the speed is unknown for a part with more than 1 % of the FLOPs.

    Few updates are watched, and only if they train on sampled text. So a measurement may have watched none. Watching is then assumed to
    be as fast as training, because both read whole texts.
    """
    if cost is None or cost.kind not in speeds:
        return None
    known, total = speeds[cost.kind], 0.0
    if "training" in known:
        known = {"watching": known["training"]} | known
    for span, flops in spans(cost.phases()).items():
        if span in known:
            total += flops / known[span]
        elif flops > 0.01 * cost.total:
            return None
    return total


def wall_clock(stages: Mapping[str, Stage], takes: Mapping[str, float], jobs: int) -> float:
    """Predict the seconds until all stages have finished. `jobs` stages run at a time, and a stage starts after its parents.

    The stage with the longest chain of later stages starts first, as in `runner.schedule`. `takes` maps the keys of stages to seconds. A
    stage that is not in `takes` needs no time.
    """
    chains = longest_chains(stages, takes)
    ends: dict[str, float] = {}
    free = [0.0] * jobs
    waiting = dict(stages)
    while waiting:
        able = {k: list(s.parents.values()) for k, s in waiting.items() if all(p in ends for p in s.parents.values())}
        ready = {k: max((ends[p] for p in parents), default=0.0) for k, parents in able.items()}
        worker = min(range(jobs), key=free.__getitem__)
        now = max(free[worker], min(ready.values()))
        key = max((k for k, at in ready.items() if at <= now), key=chains.__getitem__)
        length = takes.get(key, 0.0)
        ends[key] = (now if length else ready[key]) + length
        if length:
            free[worker] = ends[key]
        del waiting[key]
    return max(ends.values(), default=0.0)


def spoken(seconds: float | None) -> str:
    """Return a duration in words, such as `40 s`, `12 min` or `3.5 h`. Return `?` if it is not known."""
    if seconds is None:
        return "?"
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
