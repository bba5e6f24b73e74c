"""What a run on many GPUs takes, by arithmetic: the tables of docs/scale.md.

`python -m benchmarks.scale [--table NAME]` prints them; every assumption is a constant below, or an option. `--measure` instead times
steps of 1, 2 and 4 gloo processes on this machine (benchmarks/scale_measure.py), with `--delay 1ms --rate 1gbit` between network
namespaces, where root may make them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import cache
from math import log, sqrt

import torch

from maskdm.arithmetic import flops
from maskdm.config import Budget, Config, Data, DiTConfig, Model, NoMask, PatchMask, Stage, UViTConfig
from maskdm.engine.ranks import PULSE, SILENCE
from maskdm.models import build

NETWORKS: dict[str, tuple[Model, int]] = {
    "DiT 192 x 9": (DiTConfig(192, 9, 6), 64),
    "U-ViT S": (UViTConfig(512, 13, 8), 64),
    "U-ViT B": (UViTConfig(768, 12, 12), 256),
    "U-ViT L, wavelets": (UViTConfig(1024, 16, 16, qkv_bias=True, transform="haar"), 256),
    "DiT 1536 x 24": (DiTConfig(1536, 24, 24, patch=8), 256),
}
"""Network and side of its images in pixels."""

WORLDS = (8, 64, 1024)
BESIDE = 8
"""GPUs of a machine."""
LINKS = {"NVLink, 450 GB/s": 450e9, "InfiniBand, 400 Gb/s a GPU": 50e9, "Ethernet, 100 Gb/s a machine": 100e9 / 8 / BESIDE}
"""Bytes per second of a GPU, each way."""
DISKS = {"0.2 GB/s": 0.2e9, "1 GB/s": 1e9, "5 GB/s": 5e9}
HASH = 1.5e9
"""Bytes per second of SHA-256 on one core with the instructions for it."""
HOST = 20e9
"""Bytes per second from a GPU to pinned memory."""
REACHED = 0.4 * 989e12
"""FLOP/s of a GPU: 40 % of an H100's bf16."""
FAILURE = 50_000.0
"""GPU-hours between failures: of the order that Meta reports for 16 384 H100 (arXiv 2407.21783, 419 in 54 days)."""
RESTART = 300.0
"""Seconds from a failure to the next step: noticing it, another machine, the start, loading."""
LOCAL_BATCH = 32
STORE = 50_000.0
"""Requests per second that torch's TCPStore answers: an assumption, of one thread that is asked over a network."""


@cache
def parameters(name: str) -> int:
    """Parameters of a network, counted on torch's meta device."""
    model, side = NETWORKS[name]
    with torch.device("meta"):
        return sum(p.numel() for p in build(model, Data("x", (side, side)), 0).parameters())


def saved_bytes(name: str, averages: int = 2) -> int:
    """Of a checkpoint, fp32: weights, their average, AdamW's two moments, the averages of the snapshots (ema.snapshots; 0 without)."""
    return 4 * parameters(name) * (4 + averages)


def image_flops(name: str, hidden: float) -> float:
    """Arithmetic of a training image."""
    model, side = NETWORKS[name]
    config = Config(Data("x", (side, side)), model, (Stage("s", Budget(steps=1)),))
    return flops(config, PatchMask(hidden) if hidden else NoMask(), 1)


def exchange_seconds(size: float, world: int, rate: float) -> float:
    """Of a ring all-reduce: each sends 2 (W - 1) / W of the gradients."""
    return 2 * (world - 1) / world * size / rate


def best_interval(save: float, between: float) -> float:
    """Seconds between saves at which least is lost (Young 1974, Daly 2006 in the first order)."""
    return sqrt(2 * save * between)


def lost_share(save: float, between: float, interval: float) -> float:
    """Share of the time that saving, repeating and restarting take."""
    return save / interval + interval / (2 * between) + RESTART / between


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def sizes() -> str:
    """What a network's state takes."""
    rows = [
        [name, f"{parameters(name) / 1e6:.0f} M", *(f"{4 * parameters(name) * n / 1e9:.2f}" for n in (1, 1, 1, 2, 2)),
         f"{saved_bytes(name) / 1e9:.2f}", *(f"{(saved_bytes(name) + 4 * parameters(name)) / world / 1e9:.2f}" for world in (1, *WORLDS))]
        for name in NETWORKS
    ]  # fmt: skip
    parts = ["weights", "gradients", "EMA", "AdamW", "snapshot averages", "checkpoint"]
    return table(["network", "parameters", *parts, "on each GPU, DDP", *(f"FSDP2 on {world}" for world in WORLDS)], rows)


def exchange() -> str:
    """Gradients over a link, beside the arithmetic of a step that hides them."""
    rows: list[list[str]] = []
    for name in NETWORKS:
        size = 4 * parameters(name)
        times = [f"{exchange_seconds(size, 1024, rate) * 1e3:.1f}" for rate in LINKS.values()]
        work = [f"{LOCAL_BATCH * image_flops(name, hidden) / REACHED * 1e3:.1f}" for hidden in (0.0, 0.75)]
        rows.append([name, f"{size / 1e9:.2f}", *times, *work])
    head = ["network", "gradients, GB", *(f"{link}: ms" for link in LINKS), f"arithmetic of {LOCAL_BATCH} images, ms", "75 % hidden, ms"]
    return table(head, rows)


def saving() -> str:
    """Seconds of a checkpoint: written by the first process, its SHA-256 read back; or by all, each its share."""
    rows: list[list[str]] = []
    for name in NETWORKS:
        size = saved_bytes(name)
        first = [f"{size / rate + size / HASH:.1f}" for rate in DISKS.values()]
        rows.append([name, f"{size / 1e9:.2f}", *first, *(f"{size / world / HOST * 1e3:.1f}" for world in WORLDS)])
    head = [
        "network",
        "GB",
        *(f"one process at {disk}: s" for disk in DISKS),
        *(f"async on {world}: ms that steps wait" for world in WORLDS),
    ]
    return table(head, rows)


def losing() -> str:
    """The save interval that loses least, and what it loses."""
    rows: list[list[str]] = []
    name = "DiT 1536 x 24"
    for world in WORLDS:
        between = FAILURE / world * 3600
        for kind, save in (("one process, 1 GB/s", saved_bytes(name) / 1e9 + saved_bytes(name) / HASH), ("async", 1.0)):
            interval = best_interval(save, between)
            rows.append(
                [str(world), f"{between / 3600:.0f}", kind, f"{save:.0f}", f"{interval / 60:.0f}",
                 *(f"{lost_share(save, between, each):.2%}" for each in (interval, 3600.0))]
            )  # fmt: skip
    return table(["GPUs", "hours between failures", "saving", "s a save", "best interval, min", "lost then", "lost at 60 min"], rows)


def order() -> str:
    """What the order of the images takes: an order kept in memory, beside positions in shards."""
    rows: list[list[str]] = []
    for images in (10**6, 10**8, 10**9):
        kept = 3 * 8 * images  # rows to train on, and the orders of two epochs where they meet
        shards = -(-images // 10_000)
        rows.append([f"{images:.0e}", f"{kept / 1e9:.2f}", f"{kept * BESIDE / 1e9:.1f}", str(shards), f"{shards * 100 / 1e6:.2f}", "16"])
    names = [
        "images",
        "array of rows: GB a process",
        f"GB a machine of {BESIDE}",
        "shards of 10 000",
        "list of their names, MB",
        "saved, bytes",
    ]
    return table(names, rows)


def pulse() -> str:
    """Requests to the store of the signs of life: each process says one, asks for an end and its neighbour's; the first for all."""
    rows: list[list[str]] = []
    for world in (*WORLDS[:2], 128, 256, WORLDS[2]):
        requests = 4 * (world - 1) + 2 + 2 * world
        took = requests / STORE
        verdict = "yes" if took < PULSE else "slowly" if took + PULSE < SILENCE / 2 else "no"
        rows.append([str(world), f"{requests:,}", f"{requests / PULSE:,.0f}", f"{took:.2f}", verdict])
    return table(["processes", "requests a round", "a second", f"s a round at {STORE:,.0f} a second", f"within {PULSE:.0f} s"], rows)


def waiting() -> str:
    """A step lasts as long as the slowest process: mean + s sqrt(2 ln W) for normal times with deviation s, an upper bound."""
    rows = [[str(world), *(f"{share * sqrt(2 * log(world)):.1%}" for share in (0.01, 0.02, 0.05))] for world in WORLDS]
    return table(["GPUs", *(f"steps that vary by {share} %" for share in (1, 2, 5))], rows)


def costs(price: float, images: float) -> str:
    """GPU-hours of a run, and of an evaluation."""
    rows: list[list[str]] = []
    for name in NETWORKS:
        hours = [images * image_flops(name, hidden) / REACHED / 3600 for hidden in (0.0, 0.75)]
        drawn = 10_000 * 50 * image_flops(name, 0.0) / 3 / REACHED
        days = [f"{hours[0] / world / 24:.2f}" for world in WORLDS]
        rows.append([name, *(f"{each:,.0f}" for each in hours), f"{hours[0] * price:,.0f}", *days, f"{drawn:.0f}", f"{drawn / 64:.1f}"])
    head = ["network", "GPU-hours", "75 % hidden", f"at {price:g} an hour", *(f"days on {world}" for world in WORLDS)]
    return table([*head, "10 000 samples of 50 steps, GPU-s", "on 64, s"], rows)


def main() -> None:
    """Print the tables asked for, or measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", help="one of sizes, exchange, saving, losing, order, pulse, waiting, costs; all if left out")
    parser.add_argument("--price", type=float, default=2.0, help="of a GPU-hour")
    parser.add_argument("--images", type=float, default=1e10, help="training images seen: ten epochs of 1e9")
    parser.add_argument("--measure", action="store_true", help="time steps of several processes here")
    parser.add_argument("--delay", help="with --measure: of every packet between processes, such as 1ms")
    parser.add_argument("--rate", help="with --measure: of every process's link, such as 1gbit")
    options = parser.parse_args()
    if options.measure:
        from benchmarks.scale_measure import measure

        measure(options.delay, options.rate)
        return
    tables: dict[str, Callable[[], str]] = {
        "sizes": sizes,
        "exchange": exchange,
        "saving": saving,
        "losing": losing,
        "order": order,
        "pulse": pulse,
        "waiting": waiting,
        "costs": lambda: costs(options.price, options.images),
    }
    for name in [options.table] if options.table else tables:
        if name not in tables:
            parser.error(f"--table is '{name}'; give one of {', '.join(tables)}")
        print(f"{name}: {(tables[name].__doc__ or 'cost of a run').strip()}\n\n{tables[name]()}\n")


if __name__ == "__main__":
    main()
