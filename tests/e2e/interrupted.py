"""Run stages undisturbed and again with four signals each, and write what `test_interrupted` compares to OUT/found.json.

The test forks one process, which has one thread and runs all stages undisturbed. Each interrupted attempt at a stage is a child of it. The
child sends a real signal to itself at an event: when the stage asks whether to stop (between two steps), or just before a file is synced to
disk, renamed or deleted.
"""

import gc
import json
import os
import random
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from tests.e2e.inprocess import tried_once

from tadistill.config import load
from tadistill.errors import Interrupted
from tadistill.metrics import training_numbers
from tadistill.plan.arms import Plan, make_plan, plan_probes
from tadistill.plan.graph import with_ancestors
from tadistill.plan.task import Task, make_task
from tadistill.rollout import recorded_signals as recorded
from tadistill.runner.interruption import StopFlag
from tadistill.stages import teacher
from tadistill.stages.execute import run_stage
from tadistill.store import ROLLOUTS, Store

RECIPE = Path(__file__).with_name("interrupted.yaml")
SIGNALS = [signal.SIGUSR2, signal.SIGKILL, signal.SIGTERM, signal.SIGKILL]
"""The signals to successive attempts at a stage."""
STOPPED, FAILED = 3, 1


def cases(root: Path) -> tuple[dict[str, Task], dict[str, Task]]:
    """Return the stages to interrupt by name, and all stages that these need by key, parents first."""
    recipe = load(RECIPE)
    plan, probes = make_plan(recipe), plan_probes(recipe, ["xl", "l", "s"], prompts=6, k=4)
    arms = {arm.name: arm for arm in plan.arms}
    chosen = {f"distill {name}": (plan, arm.final[1]) for name, arm in arms.items()}
    chosen |= {"evaluate": (plan, arms["dense"].evaluate[1]), "analyse": (plan, arms["dense"].analyse[1])}
    chosen |= {"probe": (probes.plan, probes.alone["s"]), "pair": (probes.plan, probes.beside["xl", "s"])}
    for key, stage in plan.stages.items():
        if stage.kind in ("signal", "generate", "temper") or stage.label.startswith("sft xl"):
            chosen[f"{stage.kind} {stage.spec.signal.type}" if stage.kind == "signal" else stage.kind] = (plan, key)
    needed: dict[str, Task] = {}

    def task(of: Plan, key: str) -> Task:
        return replace(make_task(of, of.stages[key], Store(root)), checkpoint_seconds=1e-9)

    for of, key in chosen.values():
        assert key is not None
        needed |= {k: task(of, k) for k in of.stages if k in with_ancestors(of.stages, [key])}
    return {name: task(of, key) for name, (of, key) in chosen.items() if key}, needed


def watched(task: Task, log: Path, stop: Callable[[], bool], at: int | None = None, how: signal.Signals = signal.SIGTERM) -> int:
    """Run a stage that signals its own process at event number `at`; return its exit code. `log` gets the events."""
    file, events = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT), 0

    def event() -> None:
        nonlocal events
        events += 1
        if events == at:
            os.kill(os.getpid(), how)

    def asked() -> bool:
        event()
        return stop()

    def before(call: Callable, name: str) -> Callable:
        def instead(*arguments, **options):
            event()
            result = call(*arguments, **options)
            if name == "replace":
                os.write(file, f"file {Path(arguments[1]).relative_to(task.store)} {events}\n".encode())
            return result

        return instead

    def progress(done: int, total: int, text: str) -> None:
        if training_numbers(text):
            os.write(file, f"done {done}\n".encode())

    with mock.patch.multiple(os, **{name: before(getattr(os, name), name) for name in ("replace", "fsync", "unlink")}):
        try:
            run_stage(task, progress=progress, alarm=lambda text: None, stop=asked)
            code = 0
        except Interrupted:
            code = STOPPED
    os.write(file, f"events {events}\n".encode())
    os.close(file)
    return code


def attempt(task: Task, log: Path, at: int | None, how: signal.Signals) -> int:
    """Run a stage in a child that signals itself at event number `at`; return its wait status."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    code = FAILED
    try:
        code = watched(task, log, StopFlag(signal.SIGUSR2, signal.SIGTERM), at, how)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def chain(name: str, task: Task, signals: list[signal.Signals], out: Path, whole: Store, ends: list[int]) -> dict:
    """Interrupt attempts by these signals after the event counts `ends`, let a last one finish, and return what each did."""
    store = Store(out / name.replace(" ", "-"))
    for key in task.spec.parents.values():
        store.folder(key).parent.mkdir(parents=True, exist_ok=True)
        store.folder(key).symlink_to(whole.folder(key))
    attempts = []
    cuts = [after - before for before, after in zip([0, *ends], ends, strict=False)]
    for at, how in (*zip(cuts, signals, strict=True), (None, signal.SIGTERM)):
        log = out / "log"
        log.unlink(missing_ok=True)
        status = attempt(replace(task, store=str(store.root)), log, at, how)
        lines = [line.split(" ", 1) for line in log.read_text().splitlines()] if log.exists() else []
        attempts.append({
            "killed": os.WTERMSIG(status) if os.WIFSIGNALED(status) else None,
            "code": os.WEXITSTATUS(status) if os.WIFEXITED(status) else None,
            "done": [int(value) for what, value in lines if what == "done"],
            "files": [value.split(" ")[0] for what, value in lines if what == "file"],
        })  # fmt: skip
        if attempts[-1]["code"] == 0:
            break
    found = {"attempts": attempts} | outcome(store, task.key)
    shutil.rmtree(store.root)
    return found


def cut_short(name: str, task: Task, out: Path, whole: Store, log: Path) -> dict[str, dict]:
    """Send signals at random events. Also kill just before and after the last rename, which puts the manifest in place."""
    *_, last, total = log.read_text().splitlines()
    found, renamed, events = {}, int(last.split()[-1]), int(total.split()[-1])
    ends = random.Random(name).sample(range(1, max(5, int(0.7 * events))), len(SIGNALS))
    found["cut"] = chain(name, task, SIGNALS, out, whole, sorted(ends))
    if name == "sft":
        found["before the manifest"] = chain(name, task, [signal.SIGKILL], out, whole, [renamed])
        found["after the manifest"] = chain(name, task, [signal.SIGKILL], out, whole, [renamed + 1])
    return found


def outcome(store: Store, key: str) -> dict:
    """Return the digests of a finished stage's files, its log without speeds, and the names of leftover files."""
    if not store.finished(key):
        return {"digests": None}
    folder, digests = store.folder(key), store.manifest(key)["files"]
    rows = []
    if digests.pop("metrics.jsonl", None):
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [{k: v for k, v in row.items() if k != "train/tokens_per_second"} for row in rows]
    expected = {Path(n).name for n in digests} | {"manifest.json", "metrics.jsonl", ROLLOUTS}
    left = sorted({p.name for p in folder.rglob("*") if p.is_file()} - expected)
    return {"digests": digests, "rows": rows, "left": left}


@tried_once()
def main(out: Path, only: list[str]) -> None:
    """Write OUT/found.json. `only` are the names of the stages to interrupt; an empty list means all."""
    torch.set_num_threads(1)
    teacher.GENERATION_BATCH, recorded._PART = 2, 8  # several parts of the little that there is
    whole = Store(out / "whole")
    chosen, needed = cases(whole.root)
    for key, task in needed.items():  # in this process: the children then have what is imported and tried out at first use
        assert watched(task, out / f"log-{key}", stop=lambda: False) == 0, task.label
    gc.collect()
    gc.freeze()  # else each child copies the pages of all objects when it collects garbage
    shards = []
    names = [name for name in chosen if not only or name in only]
    for shard in range(2):
        child = os.fork()
        if not child:
            code = FAILED
            try:
                mine = out / f"shard-{shard}"
                mine.mkdir()
                found = {
                    name: cut_short(name, chosen[name], mine, whole, out / f"log-{chosen[name].key}")
                    | {"whole": outcome(whole, chosen[name].key)}
                    for name in names[shard::2]
                }
                (mine / "found.json").write_text(json.dumps(found))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        shards.append(child)
    statuses = [os.waitpid(child, 0)[1] for child in shards]
    assert statuses == [0, 0]
    found = [json.loads((out / f"shard-{shard}" / "found.json").read_text()) for shard in range(2)]
    (out / "found.json").write_text(json.dumps(found[0] | found[1]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
