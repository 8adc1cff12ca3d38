"""Run a plan on this machine: several stages at a time, each in its own processes, with a display of their progress.

A small model cannot use many cores, so several stages run at the same time. A crash ends only one stage. If a signal asks to stop, all
running stages save their state and end.
"""

import contextlib
import signal
from multiprocessing.connection import wait

from tadistill.errors import ConfigError, DataError, Interrupted, ModelError, StageFailed
from tadistill.plan.arms import Plan, Stage
from tadistill.plan.task import make_task
from tadistill.plan.throughput import cores
from tadistill.runner.devices import Devices
from tadistill.runner.interruption import ENDING, StopFlag, Stopped
from tadistill.runner.processes import StageProcesses
from tadistill.runner.screen import Screen
from tadistill.runner.trackers import Trackers
from tadistill.store import Store
from tadistill.terminal import Terminal

_POLL = 0.5
"""Largest number of seconds until a signal is noticed, if no stage sends a message."""


def run_stages(plan: Plan, store: Store, *, jobs: int, console: Terminal) -> None:
    """Run every stage that is not in the store, `jobs` stages at a time.

    Raises:
        StageFailed: a stage failed. All stages that do not depend on the failed stage have been run.
        Stopped (a KeyboardInterrupt): a signal asked to stop. The running stages have saved their state.
    """
    todo = {k: s for k, s in plan.stages.items() if not store.finished(k)}
    if not todo:
        return
    screen = Screen(plan, store, console, todo=list(todo), jobs=jobs)
    flag = StopFlag(*ENDING, told=screen.remind)
    try:
        with screen, contextlib.closing(Trackers(plan, store, screen.say)) as trackers:
            failed = _Schedule(plan, todo, store, screen, jobs, flag, trackers).run()
    finally:
        flag.restore()
    if failed:
        key, error = next(iter(failed.items()))
        more = f"; {len(failed) - 1} more stages failed" if len(failed) > 1 else ""
        text = f"{plan.stages[key].label} ({key}): {error}{more}. Finished stages are kept; run the same command again to continue"
        # an input error keeps its type (exit code 2), even if a stage finds it
        raise type(error)(text) if isinstance(error, (ConfigError, DataError, ModelError)) else StageFailed(text)


class _Schedule:
    def __init__(self, plan: Plan, todo: dict[str, Stage], store: Store, screen: Screen, jobs: int, flag: StopFlag, trackers: Trackers):
        self.plan, self.store, self.screen, self.jobs, self.flag, self.trackers = plan, store, screen, jobs, flag, trackers
        weight = _weights(plan)
        self.waiting = dict(sorted(todo.items(), key=lambda item: -weight[item[0]]))
        self.done = set(plan.stages) - set(todo)
        self.running: dict[str, StageProcesses] = {}
        self.devices = Devices.visible(jobs)
        self.failed: dict[str, Exception] = {}

    def run(self) -> dict[str, Exception]:
        try:
            self._start()
            while self.running:
                self._attend()
                if self.flag.received:
                    raise Stopped(self.flag.received)
                self._start()
        except Stopped as asked:
            self._save(asked)
            raise
        finally:
            for stage in self.running.values():
                stage.end()
        return self.failed

    def _start(self) -> None:
        ready = [key for key, stage in self.waiting.items() if set(stage.parents.values()) <= self.done]
        for key in ready[: self.jobs - len(self.running)]:
            task = make_task(self.plan, self.waiting[key], self.store)
            gpus = self.devices.take(key, task.gpus)
            if gpus is None:
                break  # a later stage that needs fewer GPUs would let this one wait longer
            del self.waiting[key]
            self.screen.start(key)
            self.running[key] = StageProcesses(task, threads=max(1, cores() // self.jobs), gpus=gpus)

    def _attend(self) -> None:
        wait([source for stage in self.running.values() for source in stage.sources], timeout=_POLL)
        self.screen.tick()
        self.trackers.tick()
        stopped = False
        for key, stage in [*self.running.items()]:
            for message in stage.attend():
                self.screen.show(key, message)
            if not stage.ended:
                continue
            del self.running[key]
            self.devices.free(key)
            if isinstance(stage.error, Interrupted):
                stopped = True
            elif stage.error is None:
                self.done.add(key)
                self.screen.end(key)
            else:
                self.failed[key] = stage.error
                self.screen.end(key, str(stage.error))
        if stopped:
            raise Stopped(self.flag.received or signal.SIGTERM)  # the signal may have reached only a process of the stage

    def _save(self, asked: Stopped) -> None:
        self.screen.say(f"received {asked.received.name}; the running stages save their state …")
        for stage in self.running.values():
            stage.stop()
        while self.running:
            with contextlib.suppress(Stopped):
                self._attend()


def _weights(plan: Plan) -> dict[str, float]:
    weight: dict[str, float] = {k: s.flops or 0.0 for k, s in plan.stages.items()}
    for key in reversed(plan.stages):
        for parent in set(plan.stages[key].parents.values()):
            weight[parent] = max(weight[parent], (plan.stages[parent].flops or 0.0) + weight[key])
    return weight
