"""Run a plan on this machine: several stages at a time, each in its own processes and on its own GPUs, with a display of their progress.

A small model cannot use many cores, so several stages run at the same time. A crash ends only one stage. If a signal asks to stop, all
running stages save their state and end.

    jobs = check_first(plan, store, console, stages)
    run_stages(plan, store, jobs=jobs, console=console)
    devices = Devices.visible(jobs)
    devices.take(key, 1)                    # ("3",): the value of CUDA_VISIBLE_DEVICES for the stage's processes
    devices.free(key)

The main process never uses CUDA, because a process that uses CUDA occupies a few hundred megabytes of a GPU until it ends.
"""

import contextlib
import signal
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait

from tadistill.errors import WRONG_INPUT, ConfigError, Interrupted, StageFailed
from tadistill.models.flops_and_memory import visible_gpus
from tadistill.plan.arms import Plan
from tadistill.plan.graph import Stage, longest_chains
from tadistill.plan.notes import off_budget, seen_notes
from tadistill.plan.remote import shared_notes
from tadistill.plan.task import make_task
from tadistill.plan.throughput import cores
from tadistill.runner.interruption import ENDING, StopFlag, Stopped
from tadistill.runner.processes import StageProcesses, prepare, prepared
from tadistill.runner.remote import announced
from tadistill.runner.screen import Screen
from tadistill.runner.trackers import Trackers
from tadistill.store import Store
from tadistill.terminal import Terminal
from tadistill.text import counted

_POLL = 0.5
"""Largest number of seconds until a signal is noticed, if no stage sends a message."""
_PATIENCE = 120.0
"""Seconds in which all GPUs must answer. CUDA needs some seconds for each of them."""


def check_first(plan: Plan, store: Store, console: Terminal, stages: Sequence[Stage]) -> int:
    """Check that a plan can run on this machine, and return how many stages may run at the same time. Print what a user must know before:
    cautions about the plan, and the number and the price of requests to APIs.

    Args:
        stages: the stages that will run. Only their servers and APIs are asked. Budgets are mentioned only if they belong to arms, and
            test sets only if they measure arms.

    Raises:
        TadistillError: as `preflight.check_study` and `remote.announced`.
    """
    with prepared(), console.working("checking models and data") as show:
        from tadistill.runner.preflight import check_study  # imports transformers, which a run of finished stages does not need

        jobs = check_study(plan, console, stages, show=show)
        asked = [*announced(plan, store, (s for s in stages if not store.finished(s.key)))]
    of_arms = [stage for stage in stages if stage.arms]
    budgets = off_budget(plan) if of_arms else ()
    seen = seen_notes(plan) if any(stage.spec.measures for stage in of_arms) else ()
    for sentence in (*plan.tokens.cautions(), *shared_notes(plan), *budgets, *seen):
        console.note(sentence, problem=True)
    for sentence in asked:
        console.note(sentence)
    return jobs


def run_stages(plan: Plan, store: Store, *, jobs: int, console: Terminal, needs: Iterable[str] = ()) -> None:
    """Run every stage that is not in the store, `jobs` stages at a time.

    Args:
        needs: keys of stages of earlier plans, which `tadistill clean` must also keep while this plan runs.

    Raises:
        StageFailed: a stage failed. All stages that do not depend on the failed stage have been run.
        Stopped (a KeyboardInterrupt): a signal asked to stop. The running stages have saved their state.
    """
    todo = {k: s for k, s in plan.stages.items() if not store.finished(k)}
    if not todo:
        return
    screen = Screen(plan, store, console, todo=list(todo), jobs=jobs, needs=needs)
    flag = StopFlag(*ENDING, told=screen.remind)
    try:
        with screen, contextlib.closing(Trackers(plan, store, screen.say)) as trackers:
            failed = _Schedule(plan, todo, store, screen, jobs, flag, trackers).run()
    finally:
        flag.restore()
    if failed:
        key, error = next(iter(failed.items()))
        more = f"; {counted(len(failed) - 1, 'more stage')} failed" if len(failed) > 1 else ""
        text = f"{plan.stages[key].label} ({key}): {error}{more}. Finished stages are kept; run the same command again to continue"
        # an input error keeps its type (exit code 2), even if a stage finds it
        raise type(error)(text) if isinstance(error, WRONG_INPUT) else StageFailed(text)


class _Schedule:
    def __init__(self, plan: Plan, todo: dict[str, Stage], store: Store, screen: Screen, jobs: int, flag: StopFlag, trackers: Trackers):
        self.plan, self.store, self.screen, self.jobs, self.flag, self.trackers = plan, store, screen, jobs, flag, trackers
        weights = longest_chains(plan.stages, {key: stage.flops or 0.0 for key, stage in plan.stages.items()})
        self.waiting = dict(sorted(todo.items(), key=lambda item: -weights[item[0]]))
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
            self.running[key] = StageProcesses(task, threads=max(1, cores() // self.jobs), gpus=gpus, share=self.devices.share)

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


# --- GPUs ---------------------------------------------------------------------------------------------------------------


class Devices:
    """The GPUs that the running stages use. A stage gets one GPU for each of its processes, or more for vLLM."""

    def __init__(self, names: Sequence[str], jobs: int):
        """`names` are the GPUs, if there are any. With more `jobs` (stages at the same time) than GPUs, several stages share a GPU."""
        self.names, self.share = names, -(-jobs // max(len(names), 1))
        self._taken: dict[str, tuple[str, ...]] = {}

    @classmethod
    def visible(cls, jobs: int) -> "Devices":
        """Return a `Devices` that shares all GPUs that this process may use among at most `jobs` stages at the same time."""
        count = gpus()
        return cls(visible_gpus(count)[:count], jobs)

    def take(self, key: str, wanted: int) -> tuple[str, ...] | None:
        """Choose the GPUs of a stage: those that the fewest stages use. Return None if the stage must wait, and () on a machine without
        GPUs.

        If a stage wants more GPUs than the machine has, it gets all of them. Its processes then stop with an error message.
        """
        used = {name: sum(name in taken for taken in self._taken.values()) for name in self.names}
        chosen = sorted((name for name in self.names if used[name] < self.share), key=lambda name: used[name])[:wanted]
        if len(chosen) < min(wanted, len(self.names)):
            return None
        self._taken[key] = tuple(chosen)
        return self._taken[key]

    def free(self, key: str) -> None:
        """Give back the GPUs of a stage that has ended."""
        self._taken.pop(key, None)


def gpus() -> int:
    """Return the number of GPUs that this process may use, without using one."""
    import torch  # not at the top: the command line starts without torch

    return torch.cuda.device_count()


@dataclass(frozen=True)
class Gpu:
    """A GPU that this process may use. Sizes are in bytes."""

    name: str
    """Name of its type, such as NVIDIA H200."""
    free: int
    memory: int


def inspect_gpus() -> list[Gpu]:
    """Return the GPUs. Only a new process uses CUDA, not this process.

    Raises:
        ConfigError: a GPU cannot be used now, for instance because it is in exclusive mode and another process uses it.
    """
    if not gpus():
        return []
    context = prepare()
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_tell, args=(theirs,), name="GPUs")
    process.start()
    theirs.close()
    try:
        found = ours.recv() if ours.poll(_PATIENCE) else f"the GPUs did not answer within {_PATIENCE:.0f} seconds"
    except EOFError:
        process.join()
        found = f"the process that looks at the GPUs ended with exit code {process.exitcode}"
    finally:
        process.kill()  # it has answered, or will not answer
        process.join()
    if isinstance(found, str):
        raise ConfigError(f"{found}; look at `nvidia-smi`, and name the GPUs that can be used in the variable CUDA_VISIBLE_DEVICES")
    return found


def _tell(pipe: Connection) -> None:
    import torch

    found: list[Gpu] = []
    for number, name in enumerate(visible_gpus(torch.cuda.device_count())[: torch.cuda.device_count()]):
        try:
            found.append(Gpu(torch.cuda.get_device_name(number), *torch.cuda.mem_get_info(number)))
        except Exception as error:  # torch raises several types, such as AcceleratorError
            pipe.send(f"GPU {name} cannot be used ({str(error).splitlines()[0] if str(error) else type(error).__name__})")
            return
    pipe.send(found)
