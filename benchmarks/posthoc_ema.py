"""What post-hoc averages of the weights cost and how near they come, on the digits recipe's network (needs no network access).

`python benchmarks/posthoc_ema.py cost`: ms per training step with and without the two tracked averages, interleaved.
`python benchmarks/posthoc_ema.py accuracy --steps 400`: averages of eight lengths tracked directly through a stage, against those made
from 4, 8, 16 and 32 snapshots in fp32, fp16 and bf16: distance over that between the two stored ones, and held-out loss.
Prints a table, and last one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the command line does

import torch
from torch import Tensor

from maskdm.config import Budget, Config, Ema, Hardware, NoMask
from maskdm.data import Dataset, Loader, open_source, prepare
from maskdm.engine import PowerAverages, Trainer, autocast, environment, this_machine
from maskdm.engine.posthoc import Profile, fit, gamma_of, reconstruct
from maskdm.evaluation import denoising_loss
from maskdm.models import build
from maskdm.recipes import recipe

LENGTHS = (0.03, 0.05, 0.075, 0.1, 0.125, 0.15, 0.2, 0.25)
STORED = (0.05, 0.1)
MOST = 32


def make_trainer(config: Config, dataset: Dataset) -> Trainer:
    """A trainer of the digits recipe on this machine."""
    torch.manual_seed(0)
    machine = this_machine(Hardware())
    training, _ = dataset.split(config.data.heldout, config.seed, config.data.limit)
    return Trainer(config, Loader(dataset, training, 0), build(config.model, config.data, 10), machine.device, machine.precision)


def cost(config: Config, dataset: Dataset, repeats: int) -> list[dict[str, Any]]:
    """Median ms of a step, masked and whole, with and without: two trainers, a step of each in turn."""
    rows: list[dict[str, Any]] = []
    for stage in config.stages:
        endless = replace(config, stages=(replace(stage, budget=Budget(steps=10**9)),))
        arms = [make_trainer(replace(endless, ema=replace(config.ema, snapshots=n)), dataset) for n in (0, 8)]
        runs, times = [arm.run() for arm in arms], ([], [])
        updates: list[float] = []
        for number in range(repeats):
            for arm in (0, 1) if number % 2 else (1, 0):
                started = time.perf_counter()
                next(runs[arm])
                times[arm].append(time.perf_counter() - started)
            started = time.perf_counter()
            arms[1].powers.update(arms[1].model)
            updates.append(time.perf_counter() - started)
        without, with_ = (statistics.median(each[5:]) * 1e3 for each in times)
        paired = statistics.median(b - a for a, b in zip(times[0][5:], times[1][5:], strict=True)) * 1e3
        alone = statistics.median(updates) * 1e3
        row = {"stage": stage.name, "without": without, "with": with_, "difference": paired, "update": alone, "share": alone / without}
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
        rows.append(row)
    return rows


def snapshot(powers: PowerAverages) -> list[dict[str, Tensor]]:
    """The averages as they are, a dictionary each."""
    values = powers.tensors()
    return [{n.partition("/")[2]: v.clone() for n, v in values.items() if n.startswith(f"{w}/")} for w in powers.sigma_rel]


def flat(state: dict[str, Tensor]) -> Tensor:
    """All weights in one vector, in the order of their names."""
    return torch.cat([state[name].flatten().double() for name in sorted(state)])


def accuracy(config: Config, dataset: Dataset, steps: int, decay: Literal["constant", "cosine"]) -> list[dict[str, Any]]:
    """Distances and losses of reconstructed averages at the end of one stage of whole images."""
    stage = replace(config.stages[1], mask=NoMask(), budget=Budget(steps=steps), batch=64, decay=decay)
    config = replace(config, stages=(stage,), ema=Ema(config.ema.decay, snapshots=MOST, sigma_rel=STORED))
    trainer = make_trainer(config, dataset)
    direct = PowerAverages(trainer.model, LENGTHS)
    stored: list[tuple[Profile, dict[str, Tensor]]] = []
    for step in trainer.run():
        direct.update(trainer.model)
        if int(step.share * MOST + 1e-9) * len(STORED) > len(stored):
            stored += [
                (Profile(trainer.powers.time, gamma_of(w)), s)
                for w, s in zip(trainer.powers.sigma_rel, snapshot(trainer.powers), strict=True)
            ]
    weights = flat({n: p.detach() for n, p in trainer.model.named_parameters()})
    _, heldout = dataset.split(config.data.heldout, config.seed, config.data.limit)
    heldout = heldout[:128]
    images = torch.from_numpy(dataset.images[heldout].transpose(0, 3, 1, 2).copy())
    assert dataset.labels is not None
    labels = torch.from_numpy(dataset.labels[heldout])

    def loss(state: dict[str, Tensor]) -> float:
        model = build(config.model, config.data, 10).eval()
        model.load_state_dict(state)
        with autocast(trainer.device, trainer.precision):
            return denoising_loss(model, config.diffusion, images, labels).loss

    trained, averaged = loss(dict(trainer.model.state_dict())), loss(dict(trainer.average.model.state_dict()))
    print(f"held-out loss: weights as trained {trained:.5f}, EMA {averaged:.5f}")
    rows: list[dict[str, Any]] = []
    truths = snapshot(direct)
    scale = float((flat(truths[LENGTHS.index(STORED[0])]) - flat(truths[LENGTHS.index(STORED[1])])).norm())
    print(f"distance of the averages of {STORED}: {scale / float(weights.norm()):.3g} of the weights' norm", flush=True)
    for length, truth in zip(LENGTHS, truths, strict=True):
        exact, true_loss = flat(truth), loss(truth)
        for count in (4, 8, 16, 32):
            every = MOST // count
            chosen = [s for i, s in enumerate(stored) if (i // 2 + 1) % every == 0]
            found = fit([p for p, _ in chosen], Profile(steps, gamma_of(length)))
            row: dict[str, Any] = {"sigma_rel": length, "snapshots": count, "misfit": found.misfit, "loss_direct": true_loss}
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                rounded = [{n: v.to(dtype) for n, v in s.items()} for _, s in chosen]
                made = reconstruct(rounded, found.coefficients)
                name = str(dtype).removeprefix("torch.")
                row[f"{name}"] = float((flat(made) - exact).norm()) / scale
                row[f"{name}_of_norm"] = float((flat(made) - exact).norm() / exact.norm())
                if dtype == torch.float16:
                    row[f"{name}_loss"] = loss(made) - true_loss
            print({k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items()}, flush=True)
            rows.append(row)
    return rows


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("cost", "accuracy"))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--decay", choices=("constant", "cosine"), default="constant")
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    machine = this_machine(Hardware())
    torch.set_num_threads(given.threads or machine.cores)
    config = recipe("digits", "digits")
    cache = Path(os.environ.get("MASKDM_CACHE", "/tmp/maskdm-benchmark-cache"))
    dataset = prepare(open_source("digits"), config.data, cache, None)
    rows = cost(config, dataset, given.repeats) if given.what == "cost" else accuracy(config, dataset, given.steps, given.decay)
    result = {"benchmark": f"posthoc_ema {given.what}", "environment": environment(machine, torch.get_num_threads()), "rows": rows}
    line = json.dumps(result)
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
