"""All figures of a GPU in one call of under ten minutes, its table last: `python -m benchmarks.gpu [--out FOLDER]`.

Whole steps and steps at 75 and 90 % masking of U-ViT and DiT, width 768 with 256 and 1 024 tokens, in bf16, compiled and eager; the
ceiling is measured by matrix products. Then data and start-up are as on any machine (benchmarks.data, benchmarks.startup).
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.ours import OurStep
from benchmarks.steps import network
from benchmarks.timing import Arm, interleave, results_directory, write_rows
from maskdm.arithmetic import ideal_speedup
from maskdm.config import Hardware, Mask, NoMask, PatchMask
from maskdm.engine import environment, matrix_ceiling, this_machine

CASES = (("uvit", 768, 12, 64, 256), ("dit", 768, 12, 64, 256), ("dit", 768, 12, 128, 64), ("dit", 384, 12, 64, 512))
"""Network, width, depth, side in pixels, images in a batch of whole ones; patches of 4 pixels."""
HIDDEN = (0.0, 0.75, 0.9)
LIMIT = 300.0
"""Seconds after which no further case is begun: compiling three networks, forward and backward, takes minutes."""


def measure(case: tuple[str, int, int, int, int], compiled: bool, device: torch.device, top: float, repeats: int) -> list[dict[str, Any]]:
    """The rows of one case, whole and masked, interleaved. Memory is that of a step of each alone, weights of the others beside it."""
    kind, width, depth, side, batch = case
    model, arms = network(kind, width, depth, 4), dict[float, Arm]()
    for hidden in HIDDEN:
        mask: Mask = PatchMask(hidden) if hidden else NoMask()
        arms[hidden] = Arm(str(hidden), OurStep(model, side, max(1, round(batch / (1 - hidden))), mask, "bf16", device, compiled))
    interleave(list(arms.values()), device, repeats, warm=3, least=0.3)
    whole, rows = arms[0.0].images_per_second, list[dict[str, Any]]()
    for arm in arms.values():
        step = arm.step
        assert isinstance(step, OurStep)
        torch.cuda.reset_peak_memory_stats()
        step(0)
        ideal = ideal_speedup(step.config, step.config.stages[0].mask)
        row = {"model": kind, "width": width, "depth": depth, "tokens": (side // 4) ** 2, "keep": step.keep, "batch": step.images}
        row |= {"dtype": "bf16", "compiled": compiled, "images_per_s": arm.images_per_second, "step_ms": arm.median * 1e3}
        row |= {"share_of_ceiling": step.flops / arm.median / top, "measured_over_ideal": arm.images_per_second / whole / ideal}
        rows.append(row | {"peak_memory": torch.cuda.max_memory_allocated(device)})
    return rows


def main() -> None:
    """Time the cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    machine = this_machine(Hardware())
    device, started = machine.device, time.perf_counter()
    if device.type != "cuda":
        raise SystemExit("benchmarks.gpu needs a GPU; on a CPU run python -m benchmarks.steps")
    torch.set_float32_matmul_precision("high")
    top = matrix_ceiling(device, "bf16")
    head = {"environment": environment(machine, torch.get_num_threads()), "ceiling_bf16": top}
    file = (options.out or results_directory(device)) / "gpu.json"
    rows: list[dict[str, Any]] = []
    for case in CASES:
        for compiled in (False, True):
            if time.perf_counter() - started > LIMIT:
                print(f"out of time before {case}, compiled {compiled}")
                continue
            torch._dynamo.reset()  # pyright: ignore[reportPrivateUsage] - what was compiled for the case before takes memory
            gc.collect()
            torch.cuda.empty_cache()
            try:
                rows += measure(case, compiled, device, top, options.repeats)
            except SystemExit as error:  # a smaller GPU has the figures of the other cases all the same
                print(f"{case}, compiled {compiled}: {error}")
            write_rows(file, head, rows)
    print(json.dumps(head | {"rows": rows}))
    print(f"\n{machine.name}: matrix products {top / 1e12:.0f} TFLOP/s in bf16")
    head_line = ("tokens", "hidden", "compiled", "batch", "images/s", "ms", "ceiling", "of ideal", "GiB")
    print("network".ljust(16), *(f"{word:>{n}}" for word, n in zip(head_line, (6, 6, 8, 6, 9, 7, 8, 8, 6), strict=True)))
    for row in rows:
        print(
            f"{row['model']} {row['width']} x {row['depth']}".ljust(16),
            f"{row['tokens']:6} {1 - row['keep']:6.0%} {row['compiled']!s:>8} {row['batch']:6} {row['images_per_s']:9.0f}",
            f"{row['step_ms']:7.1f} {row['share_of_ceiling']:8.0%} {row['measured_over_ideal']:8.0%} {row['peak_memory'] / 2**30:6.1f}",
        )


if __name__ == "__main__":
    main()
