"""`python -m benchmarks.scale --measure`: where the time of a step goes with 1, 2 and 4 gloo processes on this machine.

Each process has 8 images and one thread, so that the work of each stays the same. Medians, taken in turns, of steps that exchange
gradients; of steps that do not, less the telling: the computing; their difference: the exchange, as far as the backward pass does not hide
it; of the telling alone (loss, clock, who was asked to stop); and of a sum over the processes of as many numbers as the gradients have,
alone. More processes than cores wait for a core: that is said. On a machine that others use small differences mean nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext

import numpy as np
import torch

WORLDS, LOCAL, STEPS = (1, 2, 4), 8, 20
NAME = "mdmscale"
"""Of the bridge; namespaces and links begin with it."""


def worker() -> None:
    """One process: time the three, and print them as JSON in the first."""
    from benchmarks.ours import synthetic
    from maskdm.config import Budget, Config, Data, DiTConfig, Hardware, Stage
    from maskdm.data import Loader
    from maskdm.engine import Trainer, joined
    from maskdm.models import build

    torch.set_num_threads(1)
    torch.manual_seed(0)
    with joined() as ranks:
        data = Data("synthetic", (32, 32))
        stage = Stage("s", Budget(steps=10**9), batch=LOCAL * ranks.world, lr=1e-4)
        config = Config(data, DiTConfig(192, 9, 6), (stage,), hardware=Hardware(device="cpu"))
        loader = Loader(synthetic(256, 32), np.arange(256), 0)
        trainer = Trainer(config, loader, build(config.model, data, 0), torch.device("cpu"), "fp32", ranks)
        steps = trainer.run()

        def seconds_of(work: Callable[[], object], apart: bool = False) -> float:
            with trainer.network.no_sync() if apart and ranks.world > 1 else nullcontext():
                started = time.perf_counter()
                work()
                return time.perf_counter() - started

        for _ in range(3):
            next(steps)
        parameters = sum(p.numel() for p in trainer.model.parameters())
        gradients = torch.zeros(parameters)
        kinds = {
            "step": lambda: seconds_of(lambda: next(steps)),
            "apart": lambda: seconds_of(lambda: next(steps), apart=True),
            "telling": lambda: seconds_of(lambda: ranks.total(torch.zeros(3))),
            "sum": lambda: seconds_of(lambda: ranks.total(gradients)),
        }
        found: dict[str, list[float]] = {name: [] for name in kinds}
        for _ in range(STEPS):  # in turns, as the machine drifts
            for name, work in kinds.items():
                found[name].append(work())
        if ranks.first:
            print(json.dumps({name: statistics.median(values) for name, values in found.items()} | {"bytes": 4 * parameters}))


def measure(delay: str | None, rate: str | None) -> None:
    """Run the worlds, and print a table."""
    cores = len(os.sched_getaffinity(0))
    limited = delay is not None or rate is not None
    if limited and (os.geteuid() != 0 or not (shutil.which("ip") and shutil.which("tc"))):
        raise SystemExit("--delay and --rate need root, and the commands ip and tc (iproute2); without them it can be run as it is")
    print(f"{cores} cores; {LOCAL} images a process, one thread each; delay {delay or 'none'}, rate {rate or 'none'}")
    print("processes  ms/step  compute exchange  telling  sum alone")
    for world in WORLDS:
        with namespaces(world, delay, rate) if limited and world > 1 else nullcontext([[]] * world) as prefixes:
            row = _run(world, prefixes, "10.77.0.1" if limited and world > 1 else "127.0.0.1")
        crowded = "  (more processes than cores: compute includes waiting for one)" if world > cores else ""
        parts = (row["step"], row["apart"] - row["telling"], row["step"] - row["apart"], row["telling"], row["sum"])
        print(f"{world:9} " + " ".join(f"{each * 1e3:8.1f}" for each in parts) + crowded, flush=True)


def _run(world: int, prefixes: list[list[str]], address: str) -> dict[str, float]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = os.environ | {"MASTER_ADDR": address, "MASTER_PORT": port, "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
    shared |= {"GLOO_SOCKET_IFNAME": "eth0"} if prefixes[0] else {}
    children = [
        subprocess.Popen(
            [*prefix, sys.executable, "-W", "ignore", "-m", "benchmarks.scale_measure"],
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank, prefix in enumerate(prefixes)
    ]
    try:
        said = [child.communicate(timeout=300)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    if any(child.returncode for child in children):
        raise SystemExit("a process failed; what it said is above")
    return json.loads(said[0].splitlines()[-1])


@contextmanager
def namespaces(world: int, delay: str | None, rate: str | None) -> Generator[list[list[str]]]:
    """A network namespace a process, joined by a bridge, each link slowed both ways; yields what to put before each command."""

    def call(words: str, check: bool = True) -> None:
        code = subprocess.run(words.split(), stderr=None if check else subprocess.DEVNULL).returncode
        if check and code:
            raise SystemExit(f"this machine refuses `{words}`; without --delay and --rate it can be measured as it is")

    names = [f"{NAME}{rank}" for rank in range(world)]
    slow = (f" delay {delay}" if delay else "") + (f" rate {rate}" if rate else "")
    try:
        call(f"ip link add {NAME} type bridge")
        call(f"ip link set {NAME} up")
        for rank, name in enumerate(names):
            inside = f"ip netns exec {name} "
            call(f"ip netns add {name}")
            call(f"ip link add {name}v type veth peer name eth0 netns {name}")
            call(f"ip link set {name}v master {NAME} up")
            call(inside + f"ip addr add 10.77.0.{rank + 1}/24 dev eth0")
            call(inside + "ip link set eth0 up")
            call(inside + "ip link set lo up")
            call(inside + f"tc qdisc add dev eth0 root netem{slow}")
        yield [["ip", "netns", "exec", name] for name in names]
    finally:
        for name in names:
            call(f"ip netns del {name}", check=False)
        call(f"ip link del {NAME}", check=False)


if __name__ == "__main__":
    worker()
