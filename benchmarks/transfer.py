"""The paper's second claim (arXiv 2306.11363, section 4.3): masked pre-training on many images, then a few of another kind.

`python -m benchmarks.transfer cifar10-train.parquet --few flowers=flowers102-96.parquet:300+1000+3000 --few emoji=emoji.parquet:300+1000
--pretrain 10m --budget 2m --seeds 3 --features WEIGHTS --out DIR`. For every seed a network is pre-trained on masked images and one on
whole images, for the same time; then `maskdm compare` fine-tunes both, and one from scratch, for the same time. Runs what is left; prints
the table and writes DIR/transfer.json. Nothing else may run beside it: budgets are times.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

NETWORK = ["--recipe", "transfer-pretrain", "--image-size", "32", "--model.patch", "2", "--width", "128", "--depth", "8", "--heads", "4"]
"""256 tokens, and a network for two cores."""

STAGES = {
    "masked": ["--pretrain.mask", "patch", "--pretrain.mask.ratio", "0.75", "--pretrain.batch", "32"],
    "whole": ["--pretrain.mask", "none", "--pretrain.batch", "16"],
}
"""The batches of the recipes (docs/experiments.md)."""

SAMPLER = ["--sampling.scheduler", "dpm++", "--sampling.steps", "20"]

COLUMNS = ("loss", "distance", "kernel_distance", "precision", "recall", "copies")


def command(*words: str) -> list[str]:
    """A command line of this Python's maskdm."""
    return [sys.executable, "-m", "maskdm", *words]


def pretrained(out: Path, kind: str, seed: str) -> Path:
    """Where a pre-training run is; `seed` may be {seed}."""
    return out / "pretrained" / f"{kind}-{seed}"


def pretrain(given: argparse.Namespace, kind: str, seed: int) -> None:
    """One run, or nothing where it is finished."""
    minutes = ["--pretrain.budget.images", "none", "--pretrain.budget.minutes", str(given.pretrain)]
    rest = ["--pretrain.lr", str(given.lr), "--pretrain.warmup", "50", "--seed", str(seed)]
    path = pretrained(given.out, kind, str(seed))
    subprocess.run(command("train", given.many, *NETWORK, *STAGES[kind], *minutes, *rest, "--out", str(path)), check=True)


def fine_tune(given: argparse.Namespace, name: str, data: str, limit: int) -> dict[str, Any]:
    """The comparison on `limit` images of a set."""
    out = given.out / f"{name}-{limit}"
    arms = [f"scratch=whole/batch=16/lr={given.scratch_lr}"]
    arms += [f"{kind}=whole/batch=16/lr={given.tune_lr}/init={pretrained(given.out, kind, '{seed}')}" for kind in STAGES]
    settings = ["--data.limit", str(limit), "--data.flip", "0.5" if name == "flowers" else "0", *SAMPLER]
    budget = ["--budget", given.budget, "--seeds", str(given.seeds), "--features", given.features, "--num", str(given.num)]
    network = [word if word != "transfer-pretrain" else "transfer" for word in NETWORK]
    subprocess.run(command("compare", data, *network, *settings, *budget, "--arms", ",".join(arms), "--out", str(out)), check=True)
    found: dict[str, Any] = json.loads((out / "compare.json").read_text())
    return found


def cell(figures: dict[str, Any], name: str) -> str:
    """A mean and its interval."""
    low, high = figures[f"{name}_interval"]
    return f"{figures[name]:.3g}" + ("" if low is None else f" ({low:.3g} to {high:.3g})")


def main() -> None:
    """Parse, run what is left, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("many", help="data of the pre-training")
    parser.add_argument("--few", action="append", required=True, help="NAME=DATA:COUNT+COUNT...: images to fine-tune on")
    parser.add_argument("--pretrain", type=float, default=10.0, help="minutes of each pre-training")
    parser.add_argument("--budget", default="2m", help="of each fine-tuning, as `maskdm compare` takes it")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr", type=float, default=1.5e-3, help="learning rate of the pre-training")
    parser.add_argument("--scratch-lr", type=float, default=1.5e-3, help="that of training from scratch")
    parser.add_argument("--tune-lr", type=float, default=5e-4, help="that of fine-tuning")
    parser.add_argument("--features", default="self")
    parser.add_argument("--num", type=int, default=500)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    for seed in range(given.seeds):
        for kind in STAGES:
            pretrain(given, kind, seed)
    results: dict[str, Any] = {}
    for spec in given.few:
        name, _, rest = spec.partition("=")
        data, _, counts = rest.rpartition(":")
        for limit in counts.split("+"):
            results[f"{name}-{limit}"] = fine_tune(given, name, data, int(limit))
    print("| images | start | " + " | ".join(COLUMNS) + " |\n" + "|---" * (2 + len(COLUMNS)) + "|")
    for where, found in results.items():
        for arm, figures in found["arms"].items():
            print(f"| {where} | {arm} | " + " | ".join(cell(figures, name) if name in figures else "-" for name in COLUMNS) + " |")
    options = {key: str(value) for key, value in vars(given).items()}
    kept = ("arms", "verdicts", "features", "environment", "data_hash")
    record = {"options": options, "sets": {name: {key: found[key] for key in kept} for name, found in results.items()}}
    (given.out / "transfer.json").write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
