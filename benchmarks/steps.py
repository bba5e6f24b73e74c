"""Time of a training step, whole and masked, beside the ideal and the machine's ceiling.

`python -m benchmarks.steps [--full] [--phases] [--out FILE.json]`

A step is the trainer's own: reading a batch, draws, forward, backward, clipping, AdamW, averaging (the average and the two of
snapshots); synthetic images in memory. Each network is timed in fp32 and bf16, interleaved, medians; a row shows its faster one.
The batch grows as patches are hidden, so that a step keeps about as many visible patches. `ideal` is (1/r)(6d + N)/(6d + rN)
images per second of the fastest whole step; `ceiling` is the FLOP/s of square matrix products in the same precision. With --phases
the parts of a step, from torch's profiler. Prints a table, and last one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import resource
from pathlib import Path
from typing import Any

import torch

from benchmarks.ours import OurStep
from benchmarks.timing import Arm, interleave, results_directory, write_rows
from maskdm.arithmetic import ideal_speedup
from maskdm.config import DiTConfig, Hardware, Mask, Model, NoMask, PatchMask, UViTConfig
from maskdm.engine import Precision, environment, matrix_ceiling, this_machine

DTYPES: tuple[Precision, ...] = ("fp32", "bf16")
HIDDEN = (0.0, 0.5, 0.75, 0.9)
SHORT = [("uvit", 384, 9, 64, 4, 16), ("dit", 384, 9, 64, 4, 16), ("dit", 192, 9, 32, 4, 64), ("uvit", 384, 5, 128, 4, 4)]
"""Network, width, depth, side and patch in pixels, images in a batch of whole ones."""
FULL = [
    (kind, width, 9, side, 4, max(1, 4096 // (side // 4) ** 2))
    for kind in ("uvit", "dit")
    for width in (192, 384, 768)
    for side in (32, 64, 128, 256)
]
PHASES = ("data", "draws", "forward", "backward", "optimizer", "average")


def network(kind: str, width: int, depth: int, patch: int) -> Model:
    """The configuration of a case, with heads of 64 channels (32 below width 256)."""
    heads = width // (64 if width >= 256 else 32)
    return UViTConfig(width, depth, heads, patch) if kind == "uvit" else DiTConfig(width, depth, heads, patch)


def phases(step: OurStep, device: torch.device, repeats: int) -> dict[str, float]:
    """Milliseconds of each part of a step, and the rest between them."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities) as profiler:
        for number in range(repeats):
            step(number)
    spans = {event.key: event for event in profiler.key_averages()}
    found: dict[str, float] = {}
    for phase in PHASES:
        event = spans.get(f"maskdm: {phase}")
        total = 0.0 if event is None else event.device_time_total if device.type == "cuda" else event.cpu_time_total
        found[phase] = total / repeats / 1e3
    return found


def main() -> None:
    """Run all cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="widths 192 to 768, 64 to 4 096 tokens")
    parser.add_argument("--phases", action="store_true", help="the parts of a step too")
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    machine = this_machine(Hardware())
    torch.set_num_threads(machine.cores)
    device = machine.device
    ceilings = {name: matrix_ceiling(device, name) for name in DTYPES}
    print(
        f"{machine.name}, {machine.cores} cores; matrix products: " + ", ".join(f"{n} {c / 1e12:.2f} TFLOP/s" for n, c in ceilings.items())
    )
    names = ("tokens", "hidden", "batch", "dtype", "images/s", "ms/step", "tokens/s", "ceiling", "speed-up", "ideal", "share")
    print("network".ljust(22), *(f"{name:>{n}}" for name, n in zip(names, (6, 6, 5, 5, 9, 8, 9, 8, 8, 6, 6), strict=True)))
    rows: list[dict[str, Any]] = []
    for kind, width, depth, side, patch, batch in FULL if options.full else SHORT:
        model, tokens = network(kind, width, depth, patch), (side // patch) ** 2
        arms: dict[tuple[float, Precision], Arm] = {}
        for hidden in HIDDEN:
            mask: Mask = PatchMask(hidden) if hidden else NoMask()
            for precision in DTYPES:
                step = OurStep(model, side, max(1, round(batch / (1 - hidden))), mask, precision, device, options.compile)
                arms[hidden, precision] = Arm(f"{hidden} {precision}", step)
        # what is far slower is measured less often: two rounds of all, the rest of the faster precision alone
        interleave(list(arms.values()), device, 2, warm=1)
        fastest = {hidden: max((arms[hidden, p] for p in DTYPES), key=lambda arm: arm.images_per_second) for hidden in HIDDEN}
        interleave(list(fastest.values()), device, options.repeats, warm=0)
        whole = fastest[0.0].images_per_second
        for hidden, arm in fastest.items():
            precision: Precision = "fp32" if arm is arms[hidden, "fp32"] else "bf16"
            step = arm.step
            assert isinstance(step, OurStep)
            ideal = ideal_speedup(step.config, step.config.stages[0].mask)
            row = {
                "model": kind,
                "width": width,
                "depth": depth,
                "tokens": tokens,
                "keep": step.keep,
                "batch": step.images,
                "dtype": precision,
                "images_per_s": arm.images_per_second,
                "images_per_s_other": {p: arms[hidden, p].images_per_second for p in DTYPES},
                "step_ms": arm.median * 1e3,
                "tokens_per_s": arm.images_per_second * tokens * step.keep,
                "flops_per_image": step.flops / step.images,
                "share_of_ceiling": step.flops / arm.median / ceilings[precision],
                "speedup": arm.images_per_second / whole,
                "measured_over_ideal": arm.images_per_second / whole / ideal,
            }
            if options.phases:
                row["phases_ms"] = phases(step, device, 3)
            rows.append(row)
            print(
                f"{kind} {width} x {depth}".ljust(22),
                f"{tokens:6} {hidden:6.0%} {step.images:5} {precision:>5} {arm.images_per_second:9.1f} {row['step_ms']:8.1f}",
                f"{row['tokens_per_s']:9.0f} {row['share_of_ceiling']:8.0%} {row['speedup']:8.2f} {ideal:6.2f}",
                f"{row['measured_over_ideal']:6.0%}",
                flush=True,
            )
            if options.phases:
                print("    " + ", ".join(f"{name} {value:.1f}" for name, value in row["phases_ms"].items()) + " ms")
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    head = {
        "environment": environment(machine, torch.get_num_threads()),
        "ceilings": ceilings,
        "compile": options.compile,
        "peak_memory": peak,
    }
    write_rows(options.out or results_directory(device) / ("steps_full.json" if options.full else "steps.json"), head, rows)
    print(json.dumps(head | {"rows": rows}))


if __name__ == "__main__":
    main()
