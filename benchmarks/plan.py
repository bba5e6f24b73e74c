"""Whether `maskdm plan` is right: it plans, then `maskdm train` trains, and speed and memory are compared.

`python -m benchmarks.plan --data ../shared/data/cifar10-train.parquet [--steps 60] [--out FILE.json]`

Three configurations, new processes, stages cut to --steps steps. Real figures are those of the run's log: steps by seconds of training,
the highest peak of memory of the stage's lines.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import results_directory, write_rows
from maskdm.config import Hardware
from maskdm.engine import environment, this_machine

CONFIGURATIONS: dict[str, list[str]] = {
    "cifar10 recipe": [],
    "uvit 192 x 9, 256 patches, 75 % hidden": ["--model", "uvit", "--model.width", "192", "--depth", "9", "--heads", "6", "--patch", "2",
                                           "--pretrain.mask.ratio", "0.75", "--pretrain.batch", "128", "--finetune.batch", "32"],
    "dit 384 x 6, 90 % hidden": ["--model.width", "384", "--depth", "6", "--heads", "6", "--pretrain.mask.ratio", "0.9",
                              "--pretrain.batch", "320", "--finetune.batch", "32"],
}  # fmt: skip


def steps_only(steps: int) -> list[str]:
    """Budgets in steps, and nothing between them but the log."""
    budgets = [
        part
        for stage in ("pretrain", "finetune")
        for part in (f"--{stage}.budget.minutes", "none", f"--{stage}.budget.images", "none", f"--{stage}.budget.steps", str(steps))
    ]
    return [
        *budgets,
        "--intervals.log",
        "5",
        "--intervals.sample",
        "0",
        "--intervals.evaluate",
        "0",
        "--sampling.num",
        "4",
        "--sampling.steps",
        "5",
    ]


def main() -> None:
    """Plan, train, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    machine = this_machine(Hardware())
    rows: list[dict[str, Any]] = []
    print(f"{'configuration':40} {'stage':9} {'steps/s planned':>15} {'real':>7} {'off':>6}   {'GiB planned':>11} {'real':>6} {'off':>6}")
    for name, changes in CONFIGURATIONS.items():
        with tempfile.TemporaryDirectory() as temporary:
            plan, run = Path(temporary) / "plan.json", Path(temporary) / "run"
            settings = [options.data, "--recipe", "cifar10", *changes, *steps_only(options.steps)]
            maskdm = [sys.executable, "-m", "maskdm"]
            subprocess.run([*maskdm, "plan", *settings, "--out", str(plan)], check=True, capture_output=True)
            subprocess.run([*maskdm, "train", *settings, "--out", str(run)], check=True, capture_output=True)
            log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            info = json.loads((run / "run.json").read_text())
            for planned, done in zip(json.loads(plan.read_text())["stages"], info["stages"], strict=True):
                lines = [line for line in log if line["event"] == "train" and line["stage"] == planned["name"]]
                real, memory = done["steps"] / done["seconds"], max(line["memory"] for line in lines[1:])
                row = {
                    "configuration": name,
                    "stage": planned["name"],
                    "steps_per_s": 1 / planned["step_seconds"],
                    "steps_per_s_real": real,
                }
                row |= {"memory": planned["memory"], "memory_real": memory}
                rows.append(row)
                off, over = row["steps_per_s"] / real - 1, planned["memory"] / memory - 1
                print(
                    f"{name:40} {planned['name']:9} {row['steps_per_s']:15.3f} {real:7.3f} {off:+6.1%}   "
                    f"{planned['memory'] / 2**30:11.2f} {memory / 2**30:6.2f} {over:+6.1%}",
                    flush=True,
                )
    head = {"environment": environment(machine, torch.get_num_threads())}
    write_rows(options.out or results_directory(machine.device) / "plan.json", head, rows)
    print(json.dumps(head | {"rows": rows}))


if __name__ == "__main__":
    main()
