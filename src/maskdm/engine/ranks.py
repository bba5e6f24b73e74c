"""The processes of a run, started by torchrun, accelerate or srun: who they are, how they wait, and how they learn that one is gone.

One process alone is the first of one. With several a thread in each says every other second that the process lives, and what its main
thread is at, and since when; and reads the same of the others. A process that died, or a run in which nobody has moved for as long as
what they are at may take, ends every other one, by name. So work of unequal length may be waited for, and a dead machine is not.
"""

from __future__ import annotations

import faulthandler
import os
import platform
import re
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from itertools import pairwise
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

PULSE, SILENCE = 2.0, 20.0
"""Seconds between signs of life, and without one after which a process is taken for dead."""

HANGS = "nothing moves any more"

OVER = "over"
"""What a process is at that has done its part."""

STEP, LONG = 45.0, 6 * 3600.0
"""Seconds that a training step may take, and that work may take which is said to be long."""


class Lost(Exception):
    """Another process is gone, and this one cannot go on without it. Exit code 1."""


@dataclass(frozen=True)
class Ranks:
    """This process's number, how many there are, its number on its machine, and what they talk through."""

    rank: int = 0
    world: int = 1
    local: int = 0
    beside: int = 1
    """Processes on this machine."""
    pulse: Pulse | None = None

    @property
    def first(self) -> bool:
        """Whether this is the process that writes what is written once."""
        return self.rank == 0

    def mark(self, what: str, limit: float = STEP) -> None:
        """Say what this process is at from now on, and how many seconds that may take."""
        if self.pulse is not None:
            self.pulse.mark(what, limit)

    @contextmanager
    def at(self, what: str, limit: float = LONG) -> Generator[None]:
        """Be at something that may take long; the others wait."""
        before = ("training", STEP) if self.pulse is None else self.pulse.at
        self.mark(what, limit)
        yield
        self.mark(*before)

    def wait(self, what: str = "the others") -> None:
        """Return when all processes have come here. Nobody is in a collective meanwhile."""
        if self.pulse is not None:
            self.pulse.wait(self.world, what)

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in order, in each of them. They wait for each other first."""
        if self.world == 1:
            return [value]
        self.wait("results")
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value)
        return found

    def from_first(self, value: T) -> T:
        """The first process's value, in each."""
        return self.gather(value)[0]

    def after_first(self, work: Callable[[], T], first: bool | None = None) -> T:
        """Have the first process do something, and then the others, who find it done. `first`: of each machine."""
        begins = self.first if first is None else first
        if begins:
            done = work()
            self.wait()
            return done
        self.wait()
        return work()

    def total(self, values: Tensor) -> Tensor:
        """The sum of all processes' values, in each; they stay on the device."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    @contextmanager
    def together(self) -> Generator[None]:
        """Raise Lost where what is done inside fails because another process is gone."""
        try:
            yield
        except RuntimeError as error:
            if self.world == 1 or not (isinstance(error, dist.DistError) or re.search("gloo|nccl", str(error), re.IGNORECASE)):
                raise
            reason = str(error).splitlines()[0].rpartition("] ")[2]
            raise Lost(f"another process does not answer ({reason}); the same command resumes from the last checkpoint") from error

    def name_the_lost(self) -> None:
        """Wait until it is known which process is gone: that ends this one. Return where none is."""
        if self.pulse is not None:
            time.sleep(SILENCE + 3 * PULSE)

    def part(self, count: int) -> range:
        """This process's share of so many, the shares of all in order."""
        return range(count * self.rank // self.world, count * (self.rank + 1) // self.world)


class Pulse(threading.Thread):
    """Signs of life. `store` is shared by all processes; this thread has a connection of its own."""

    def __init__(self, store: dist.Store, rank: int, world: int) -> None:
        super().__init__(name="maskdm-pulse", daemon=True)
        self._store, self._mine = store, store.clone()  # pyright: ignore - all stores have it
        self.rank, self.world = rank, world
        self._count = self._waits = 0
        self._at: tuple[str, float, float] = ("starting", time.monotonic(), LONG)

    @property
    def at(self) -> tuple[str, float]:
        """What the main thread is at, and how many seconds that may take."""
        return self._at[0], self._at[2]

    def mark(self, what: str, limit: float) -> None:
        """What the main thread is at."""
        self._count += 1
        self._at = (what, time.monotonic(), limit)

    def wait(self, world: int, what: str) -> None:
        """Until all have come here as often as this process."""
        before = self._at
        self._waits += 1
        self.mark(f"waiting for {what}", 0.0)  # the limits of those waited for are what counts
        key = f"wait/{self._waits}"
        if self._store.add(key, 1) == world:
            self._store.set(f"{key}/all", "")
        self._store.wait([f"{key}/all"], timedelta(seconds=LONG))
        self.mark(before[0], before[2])

    def run(self) -> None:
        """Say and look, until the process ends. The first looks after all, each other one after the one before it."""
        watched = list(range(self.world)) if self.rank == 0 else [self.rank - 1]
        seen: dict[int, tuple[str, float]] = {}
        while self._at[0] != OVER:
            try:
                self._say()
                states = self._read(watched)
            except RuntimeError:  # the store went with the process, or the machine, that kept it
                if self._at[0] != OVER:
                    self._end("the process that keeps the others together is gone")
                return
            now = time.monotonic()
            for rank, state in states.items():
                if state != seen.get(rank, ("", 0.0))[0]:
                    seen[rank] = (state, now)
            self._judge(seen, now)
            time.sleep(PULSE)

    def _say(self) -> None:
        what, since, limit = self._at
        age = time.monotonic() - since
        self._mine.set(f"pulse/{self.rank}", f"{time.monotonic()}|{age:.1f}|{limit}|{self._count}|{platform.node()}|{what}")

    def _read(self, ranks: list[int]) -> dict[int, str]:
        if self._mine.check(["end"]):
            self._end(self._mine.get("end").decode())
        there = [rank for rank in ranks if self._mine.check([f"pulse/{rank}"])]
        states = [self._mine.get(f"pulse/{rank}").decode() for rank in there]
        return dict.fromkeys(ranks, "") | dict(zip(there, states, strict=True))

    def _judge(self, seen: dict[int, tuple[str, float]], now: float) -> None:
        """End all processes where one is dead, or where none has moved for as long as it may."""
        parts = {rank: state.split("|", 5) for rank, (state, _) in seen.items() if state}
        for rank, (state, since) in seen.items():
            if now - since > SILENCE and not (state and parts[rank][5] == OVER):
                where = f" on {parts[rank][4]}" if state else ", which never came up,"
                self._end(f"process {rank}{where} has given no sign of life for {now - since:.0f} s: it was killed, or its machine is gone")
        if len(parts) < self.world or any(float(part[1]) <= float(part[2]) for part in parts.values()):
            return
        moving = {rank: part for rank, part in parts.items() if not part[5].startswith("waiting")} or parts
        if all(float(part[1]) > STEP for part in moving.values()):
            named = ", ".join(f"process {rank} on {part[4]} for {float(part[1]):.0f} s ({part[5]})" for rank, part in moving.items())
            self._end(f"{HANGS}: {named}")

    def over(self) -> None:
        """Say that what this process does is done: the others must not take its end for a death."""
        self.mark(OVER, LONG)
        self._say()

    def _end(self, reason: str) -> None:
        """Tell all why, and end."""
        with suppress(RuntimeError):
            self._mine.set("end", reason)
        print(f"maskdm: error: {reason}; the same command resumes from the last checkpoint", file=sys.stderr, flush=True)
        if reason.startswith(HANGS):  # whose stack does not end in a collective is the one the others wait for
            faulthandler.dump_traceback(sys.__stderr__ or sys.stderr)
        if self.rank == 0:  # the store goes with the first: leave the others time to read why
            time.sleep(2 * PULSE)
        os._exit(1)


@contextmanager
def joined() -> Generator[Ranks]:
    """The processes as torchrun, accelerate or srun describe them in the environment, from here to the end, to which all come."""
    ranks = _join()
    yield ranks
    if ranks.pulse is not None:
        ranks.wait("the end of all")
        ranks.pulse.over()


@cache
def _join() -> Ranks:
    _read_slurm()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return Ranks()
    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        torch.cuda.set_device(local % torch.cuda.device_count())
    store, _, _ = next(iter(dist.rendezvous("env://", rank, world, timeout=timedelta(minutes=10))))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    patience = timedelta(seconds=LONG)  # `Pulse` is quicker to see that something is wrong
    dist.init_process_group(backend, store=dist.PrefixStore(f"group/{attempt}", store), rank=rank, world_size=world, timeout=patience)
    pulse = Pulse(dist.PrefixStore(f"maskdm/{attempt}", store), rank, world)
    pulse.start()
    return Ranks(rank, world, local, int(os.environ.get("LOCAL_WORLD_SIZE", "1")), pulse)


def _read_slurm() -> None:
    """Say as torchrun would what srun says in its own words."""
    given = os.environ
    if "WORLD_SIZE" in given or int(given.get("SLURM_STEP_NUM_TASKS", "1")) == 1:
        return
    job = int(given.get("SLURM_JOB_ID", "0"))
    given.setdefault("MASTER_ADDR", first_host(given["SLURM_STEP_NODELIST"]))
    given.setdefault("MASTER_PORT", str(20000 + job % 20000))
    beside = re.match(r"\d+", given.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    given |= {"WORLD_SIZE": given["SLURM_STEP_NUM_TASKS"], "RANK": given["SLURM_PROCID"], "LOCAL_RANK": given["SLURM_LOCALID"]}
    given.setdefault("LOCAL_WORLD_SIZE", beside[0] if beside else "1")


def first_host(nodes: str) -> str:
    """The first of SLURM's list of machines: gpu[03-07,09] -> gpu03."""
    found = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\]([^,]*))?", nodes)
    return "".join(part or "" for part in found.groups()) if found else nodes


def pieces_of(part: range, count: int) -> list[range]:
    """A range cut into `count` consecutive pieces of about the same length; fewer where it is shorter."""
    edges = [part.start + len(part) * i // count for i in range(count + 1)]
    return [range(a, b) for a, b in pairwise(edges) if b > a]
