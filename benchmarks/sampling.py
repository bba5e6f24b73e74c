"""Time of sampling beside that of the bare network: `python -m benchmarks.sampling [--out FILE.json]`.

Arms, interleaved, same network, batch and steps: the network alone, called as often on the same input; our pipeline with DDIM, in fp32
and bf16; with classifier-free guidance (one call of twice the batch); diffusers' own DDIMPipeline around the same network.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMPipeline

from benchmarks.timing import Arm, cast, interleave, results_directory, write_rows
from maskdm.config import Data, DiTConfig, Hardware
from maskdm.engine import environment, this_machine
from maskdm.models import build
from maskdm.sampling import MaskDMPipeline, make_scheduler, seeded


class Draw:
    """One call that draws a batch."""

    def __init__(self, images: int, run: Callable[[], Any], dtype: torch.dtype, device: torch.device) -> None:
        self.images, self.run, self.dtype, self.device = images, run, dtype, device

    def __call__(self, number: int) -> None:
        """Draw."""
        with torch.no_grad(), cast(self.device, self.dtype):
            self.run()


def main() -> None:
    """Time the arms."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    machine = this_machine(Hardware())
    device, batch, steps = machine.device, options.batch, options.steps
    torch.set_num_threads(machine.cores)

    def network(classes: int) -> Any:
        return build(DiTConfig(384, 9, 6, 4), Data("x", (64, 64), conditional=classes > 0), classes).to(device).eval()  # type: ignore[arg-type]

    plain, conditional = network(0), network(10)
    ours = {model: MaskDMPipeline(model, make_scheduler("ddim", "cosine", "v"), "v", "cosine") for model in (plain, conditional)}
    theirs = DDIMPipeline(plain, make_scheduler("ddim", "cosine", "v"))
    for pipeline in (*ours.values(), theirs):
        pipeline.set_progress_bar_config(disable=True)
    x, t = torch.randn(batch, 3, 64, 64, device=device), torch.tensor(500, device=device)
    labels = torch.arange(batch, device=device) % 10
    both, twice = torch.cat([x, x]), torch.cat([labels, torch.full_like(labels, 10)])
    arms: list[Arm] = []
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        runs: dict[str, Callable[[], Any]] = {
            "network alone": lambda: [plain(x, t) for _ in range(steps)],
            "maskdm": lambda: ours[plain](batch, generator=seeded(0, range(batch)), num_inference_steps=steps, output_type="pt"),
            "diffusers DDIMPipeline": lambda: theirs(batch, generator=seeded(0, range(batch)), num_inference_steps=steps, output_type="np"),
            "network alone, guided": lambda: [conditional(both, t, twice) for _ in range(steps)],
            "maskdm, guided": lambda: ours[conditional](
                batch, labels, seeded(0, range(batch)), num_inference_steps=steps, guidance_scale=2.0, output_type="pt"
            ),
        }
        arms += [Arm(f"{what} {name}", Draw(batch, run, dtype, device)) for what, run in runs.items()]
    interleave(arms, device, options.repeats, warm=1)
    rows: list[dict[str, Any]] = []
    by_name = {arm.name: arm for arm in arms}
    for arm in arms:
        what, _, name = arm.name.rpartition(" ")
        bare = by_name[f"network alone{', guided' if 'guided' in what else ''} {name}"]
        over = arm.median / bare.median - 1
        rows.append({"arm": what, "dtype": name, "batch": batch, "steps": steps, "images_per_s": arm.images_per_second, "overhead": over})
        print(f"{arm.name:32} {arm.images_per_second:8.2f} images/s  {over:+6.1%} over the network alone")
    head = {"environment": environment(machine, torch.get_num_threads())}
    write_rows(options.out or results_directory(device) / "sampling.json", head, rows)
    print(json.dumps(head | {"rows": rows}))


if __name__ == "__main__":
    main()
