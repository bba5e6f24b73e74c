"""Time of a training step, whole and masked, beside the ideal: `python benchmarks/masked_step.py [--out FILE.json]`.

Interleaved repetitions in one process, medians. A step is forward, backward, clipping, AdamW and averaging on synthetic
images; the data is not read. Prints a table, and last one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the command line does

import torch

from maskdm.config import Budget, Config, Data, DiTConfig, Hardware, Mask, Model, NoMask, PatchMask, Stage, UViTConfig
from maskdm.draws import draw_step
from maskdm.engine import Average, autocast, environment, make_optimizer, this_machine
from maskdm.models import build
from maskdm.objective import masked_denoising_loss
from maskdm.runs.plan import ideal_speedup

CASES: tuple[tuple[str, Model, int, int], ...] = (
    ("uvit 192 x 9, 64 tokens", UViTConfig(192, 9, 6, 4), 32, 64),
    ("uvit 192 x 9, 256 tokens", UViTConfig(192, 9, 6, 2), 32, 32),
    ("uvit 384 x 9, 256 tokens", UViTConfig(384, 9, 6, 4), 64, 16),
    ("dit 384 x 9, 256 tokens", DiTConfig(384, 9, 6, 4), 64, 16),
)
MASKS: tuple[Mask, ...] = (NoMask(), PatchMask(0.5), PatchMask(0.75), PatchMask(0.9))


class Arm:
    """One network under one mask: a step function of its own."""

    def __init__(self, model: Model, side: int, batch: int, mask: Mask) -> None:
        self.machine = this_machine(Hardware())
        device = self.machine.device
        data = Data("synthetic", (side, side))
        self.config = Config(data, model, (Stage("s", Budget(steps=1), mask, batch=batch),))
        self.network = build(model, data, 0).to(device)  # type: ignore[arg-type]
        self.optimizer = make_optimizer(self.network, self.config.optimizer, 1e-4)
        self.average = Average(self.network, self.config.ema)
        self.images = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8, device=device)
        self.mask, self.batch, self.seconds = mask, batch, list[float]()

    def step(self, number: int) -> None:
        """One training step, timed."""
        started = time.perf_counter()
        draws = draw_step(self.config, self.mask, 0, number, 0, self.batch, self.batch, self.machine.device)
        with autocast(self.machine.device, self.machine.precision):
            loss = masked_denoising_loss(self.network, self.config.diffusion, self.images, None, draws).total
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.average.update(self.network, number)
        if self.machine.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - started)


def main() -> None:
    """Run all cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    rows: list[dict[str, object]] = []
    machine = this_machine(Hardware())
    torch.set_num_threads(machine.cores)
    print(f"{machine.name}, {machine.cores} cores, {machine.precision}")
    print(f"{'network':26} {'hidden':>7} {'images/s':>9} {'ms/step':>8} {'speed-up':>9} {'ideal':>6} {'share':>6}")
    for name, model, side, batch in CASES:
        arms = [Arm(model, side, batch, mask) for mask in MASKS]
        for number in range(options.repeats + 2):
            for arm in arms:
                arm.step(number)
        medians = [statistics.median(arm.seconds[2:]) for arm in arms]
        for arm, seconds in zip(arms, medians, strict=True):
            hidden = arm.mask.ratio if isinstance(arm.mask, PatchMask) else 0.0
            speedup, ideal = medians[0] / seconds, ideal_speedup(arm.config, arm.mask)
            row = {"model": name, "batch": batch, "hidden": hidden, "images_per_s": batch / seconds, "speedup": speedup, "ideal": ideal}
            rows.append(row | {"measured_over_ideal": speedup / ideal})
            figures = f"{batch / seconds:9.1f} {seconds * 1e3:8.1f} {speedup:9.2f} {ideal:6.2f} {speedup / ideal:6.0%}"
            print(f"{name:26} {hidden:7.0%} {figures}")
    result = {"environment": environment(machine, torch.get_num_threads()), "rows": rows}
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
