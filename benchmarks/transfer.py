"""The paper's second claim (arXiv 2306.11363, section 4.3): masked pre-training on many images, then a few of another kind.

`python -m benchmarks.transfer cifar10-train.parquet --few flowers=flowers102-96.parquet:300+1000+3000/flip --few
emoji=noto-emoji-128.parquet:300+1000 --drop '1f3f[b-f]' --pretrain 8 --budget 4m --seeds 3 --features onnx:WEIGHTS --out DIR`

For every seed a network is pre-trained on masked images and one on whole images, for the same time; then `maskdm compare` fine-tunes
both, and trains one from scratch, for the same time and at a rate that falls to nothing. The few images are the same for all seeds, so that
intervals are of the training, not of the choice of images. Samples are compared with images of the set that none was trained on.
Runs what is left; prints two tables, the figures and the ratios of the distances, seed by seed, and writes DIR/transfer.json. Nothing else
may run on its cores: budgets are times.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from maskdm.evaluation.speedups import over_seeds

NETWORK = ["--image-size", "32", "--model.patch", "4", "--width", "128", "--depth", "8", "--heads", "4"]
"""64 tokens: with 256, minutes from scratch on a core leave noise, against which nothing can be told (docs/experiments.md)."""

STAGES = {
    "masked": ["--pretrain.mask", "patch", "--pretrain.mask.ratio", "0.5", "--pretrain.batch", "32"],
    "whole": ["--pretrain.mask", "none", "--pretrain.batch", "16"],
}
"""Batches of the recipes; at 64 tokens half hidden serves better than three quarters (docs/experiments.md)."""

SAMPLER = ["--sampling.scheduler", "dpm++", "--sampling.steps", "20"]

COLUMNS = ("loss", "distance", "kernel_distance", "precision", "recall", "copies")

DISTANCES = {"Frechet distance": "frechet_distance", "kernel distance": "kernel_distance"}


@dataclass(frozen=True)
class Few:
    """A set of which few are trained on: its name, where it is, how many, and whether its images may be mirrored."""

    name: str
    data: str
    counts: tuple[int, ...]
    flip: bool

    @staticmethod
    def parse(text: str) -> Few:
        """From NAME=DATA:COUNT+COUNT[/flip]."""
        found = re.fullmatch(r"([\w-]+)=(.+):(\d+(?:\+\d+)*)(/flip)?", text)
        if found is None:
            raise argparse.ArgumentTypeError(f"'{text}' is not NAME=DATA:COUNT+COUNT, with /flip where images may be mirrored")
        return Few(found[1], found[2], tuple(map(int, found[3].split("+"))), found[4] is not None)


def command(*words: str) -> list[str]:
    """A command line of this Python's maskdm."""
    return [sys.executable, "-m", "maskdm", *words]


def pretrained(out: Path, kind: str, seed: str) -> Path:
    """Where a pre-training run is; `seed` may be {seed}."""
    return out / "pretrained" / f"{kind}-{seed}"


def pretrain(given: argparse.Namespace, kind: str, seed: int) -> None:
    """One run, or nothing where it is finished."""
    minutes = ["--pretrain.budget.images", "none", "--pretrain.budget.minutes", str(given.pretrain)]
    rest = ["--pretrain.lr", str(given.lr), "--pretrain.warmup", "50", "--seed", str(seed), "--hardware.threads", str(given.threads)]
    path = pretrained(given.out, kind, str(seed))
    recipe = ["--recipe", "transfer-pretrain", *NETWORK, *STAGES[kind], *minutes, *rest]
    subprocess.run(command("train", given.many, *recipe, "--out", str(path)), check=True)


def chosen(given: argparse.Namespace, few: Few) -> str:
    """The set, without the images whose names match `--drop`, as a file of its own beside the results."""
    if given.drop is None or not few.data.endswith(".parquet"):
        return few.data
    file = given.out / "sets" / f"{few.name}.parquet"
    table = pq.read_table(few.data)
    names = [image["path"] or "" for image in table["image"].to_pylist()]
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    pq.write_table(table.filter([re.search(given.drop, name) is None for name in names]), partial)
    partial.replace(file)
    return str(file)


def fine_tune(given: argparse.Namespace, few: Few, limit: int) -> dict[str, Any]:
    """The comparison on `limit` images of a set."""
    out = given.out / f"{few.name}-{limit}"
    arms = [f"scratch=whole/batch=16/lr={given.scratch_lr}/decay=cosine"]
    arms += [f"{kind}=whole/batch=16/lr={given.tune_lr}/decay=cosine/init={pretrained(given.out, kind, '{seed}')}" for kind in STAGES]
    settings = ["--data.limit", str(limit), "--data.flip", "0.5" if few.flip else "0", *SAMPLER, "--hardware.threads", str(given.threads)]
    budget = ["--budget", given.budget, "--seeds", str(given.seeds), "--features", given.features, "--num", str(given.num)]
    words = ["--recipe", "transfer", *NETWORK, *settings, *budget, "--arms", ",".join(arms), "--out", str(out)]
    subprocess.run(command("compare", chosen(given, few), *words), check=True)
    found: dict[str, Any] = json.loads((out / "compare.json").read_text())
    if found["training_images"] != limit:
        raise SystemExit(f"error: {few.name} has only {found['training_images']} images to train on, not {limit}; ask for fewer")
    return found


def ratios(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of each distance of masked pre-training over that of the others: of the same seed, the geometric mean, and its interval.

    None where a kernel distance, which has no bias, is not above 0, and where a seed diverged.
    """
    rows: list[dict[str, Any]] = []
    for against in ("scratch", "whole"):
        for words, key in DISTANCES.items():
            pairs = [(a.get(key), b.get(key)) for a, b in zip(found["finals"]["masked"], found["finals"][against], strict=True)]
            row: dict[str, Any] = {"against": against, "distance": words, "seeds": len(pairs), "ratio": None, "low": None, "high": None}
            if all((a or 0) > 0 and (b or 0) > 0 for a, b in pairs):
                estimate = over_seeds([math.log(a / b) for a, b in pairs])
                ends = (None if math.isnan(end) else math.exp(end) for end in (estimate.low, estimate.high))
                row |= dict(zip(("ratio", "low", "high"), (math.exp(estimate.value), *ends), strict=True))
            rows.append(row)
    return rows


def cell(value: float | None, low: float | None, high: float | None) -> str:
    """A figure and its interval."""
    return "-" if value is None else f"{value:.3g}" + ("" if low is None else f" ({low:.3g} to {high:.3g})")


def main() -> None:
    """Parse, run what is left, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("many", help="data of the pre-training")
    parser.add_argument("--few", type=Few.parse, action="append", required=True, help="NAME=DATA:COUNT+COUNT[/flip]: what to fine-tune on")
    parser.add_argument("--drop", help="images of parquet files to fine-tune on whose names this matches are left out")
    parser.add_argument("--pretrain", type=float, default=8.0, help="minutes of each pre-training")
    parser.add_argument("--budget", default="4m", help="of each fine-tuning, as `maskdm compare` takes it")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr", type=float, default=1.5e-3, help="learning rate of the pre-training")
    parser.add_argument("--scratch-lr", type=float, default=1.5e-3, help="that of training from scratch, at its beginning")
    parser.add_argument("--tune-lr", type=float, default=5e-4, help="that of fine-tuning")
    parser.add_argument("--features", required=True, help="network of the distances, as `maskdm evaluate` takes it: not `self`")
    parser.add_argument("--num", type=int, default=500, help="samples of each")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    if given.features == "self":
        parser.error("--features self would be another network for each set: give onnx:FILE")
    for seed in range(given.seeds):
        for kind in STAGES:
            pretrain(given, kind, seed)
    results = {f"{few.name}-{limit}": fine_tune(given, few, limit) for few in given.few for limit in few.counts}
    print("| images | start | " + " | ".join(COLUMNS) + " |\n" + "|---" * (2 + len(COLUMNS)) + "|")
    for where, found in results.items():
        for arm, figures in found["arms"].items():
            cells = (cell(figures[name], *figures[f"{name}_interval"]) if name in figures else "-" for name in COLUMNS)
            print(f"| {where} | {arm} | " + " | ".join(cells) + " |")
    print("\nmasked pre-training's distance over the other's\n")
    print("| images | against | Frechet distance | kernel distance |\n|---|---|---|---|")
    for where, found in results.items():
        rows = ratios(found)
        for against in ("scratch", "whole"):
            cells = (cell(row["ratio"], row["low"], row["high"]) for row in rows if row["against"] == against)
            print(f"| {where} | {against} | " + " | ".join(cells) + " |")
    options = {key: str(value) for key, value in vars(given).items()}
    kept = ("arms", "verdicts", "finals", "features", "environment", "data_hash", "specs", "training_images")
    sets = {name: {key: found[key] for key in kept} | {"ratios": ratios(found)} for name, found in results.items()}
    (given.out / "transfer.json").write_text(json.dumps({"options": options, "sets": sets}, indent=1))


if __name__ == "__main__":
    main()
