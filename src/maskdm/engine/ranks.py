"""The processes that `torchrun` started, sharing work that splits into pieces; one process alone is the first of one."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

PATIENCE = timedelta(hours=6)
"""How long a process waits for the others: drawing tens of thousands of samples takes its time."""


@dataclass(frozen=True)
class Ranks:
    """This process's number and how many there are."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes what is written once."""
        return self.rank == 0

    def wait(self) -> None:
        """Return when all processes have come here."""
        if self.world > 1:
            dist.barrier()


def join_ranks() -> Ranks:
    """The processes as torchrun, accelerate and SLURM's torchrun wrappers describe them in the environment."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return Ranks()
    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=PATIENCE)  # only to wait for each other: pieces pass through files
    return Ranks(dist.get_rank(), world)
