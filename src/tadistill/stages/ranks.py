"""The processes (ranks) of one stage find each other through RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT in the environment.

`launch` sets these for the processes that it starts on this machine; a cluster job sets them itself.
"""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from tadistill.errors import ConfigError

_PATIENCE = timedelta(hours=1)  # a process waits as long for another one, which may be writing a large model


def own_device() -> torch.device:
    """Return this process's GPU, or the CPU if there is none."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")


@dataclass(frozen=True)
class Ranks:
    """The rank of this process, and the number of processes of the stage."""

    rank: int
    world: int

    @classmethod
    def join(cls, processes: int) -> "Ranks":
        """Join the other processes, if the environment names any.

        Raises:
            ConfigError: their number is not what the stage asks for.
        """
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if world != processes:
            raise ConfigError(f"resources say processes {processes} for this stage, but WORLD_SIZE is {world}; make them equal")
        if world > 1 and not dist.is_initialized():
            device = own_device()
            if device.type == "cuda":
                torch.cuda.set_device(device)
            dist.init_process_group("gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl", timeout=_PATIENCE)
        return cls(rank, world)

    def agree(self, word: str = "") -> str:
        """Return the word of rank 0 on all ranks."""
        words = [word]
        if self.world > 1:
            dist.broadcast_object_list(words, device=torch.device("cpu"))
        return words[0]
