"""Choose the GPUs of each running stage, and measure the free memory of each GPU.

    devices = Devices.visible(jobs)
    devices.take(key, 1)                    # ("3",): the value of CUDA_VISIBLE_DEVICES for the stage's processes
    devices.free(key)

The main process never uses CUDA, because a process that uses CUDA occupies a few hundred megabytes of a GPU until it ends.
"""

from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

from tadistill.models.counting.memory import visible_gpus


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


def free_memory(context: Any) -> list[int]:
    """Return the free bytes of each GPU. Only a new process of the multiprocessing `context` uses CUDA, not this process."""
    if not gpus():
        return []
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_tell, args=(theirs,), name="free GPU memory")
    process.start()
    theirs.close()
    try:
        return ours.recv()
    finally:
        process.join()


def _tell(pipe: Connection) -> None:
    import torch

    pipe.send([torch.cuda.mem_get_info(number)[0] for number in range(torch.cuda.device_count())])
