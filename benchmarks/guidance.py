"""What training-free guidance costs and gives: `python -m benchmarks.guidance RUN [--num 256] [--steps 50] [--seeds 3] --out FILE.json`.

For every task and method of `maskdm edit`, held-out images of the run spoilt as the task says (or their classes asked for) and drawn again
without labels: evaluations of the network and passes back through it, seconds, PSNR where the truth is known, accuracy of the judge
(`--features`) on the truth's classes, Frechet distance to the training images. What leads to a class is another network than the judge,
which would find its own adversarial images right. Means over seeds with Student's 95 % interval. Methods take turns, so that a drifting
machine hurts all alike. Prints the table.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.distillation import Measuring, judged, prepared, spread
from maskdm.data import to_model_range, to_uint8
from maskdm.engine import Ranks, autocast, environment
from maskdm.evaluation import ImageSet, SelfNetwork
from maskdm.evaluation.intervals import half_width
from maskdm.runs import Display
from maskdm.runs.directory import RunDirectory, write_text
from maskdm.runs.judge import choose_network
from maskdm.runs.sample import fitting_batch
from maskdm.runs.sets import sets_of
from maskdm.runs.store import load_pipeline
from maskdm.sampling import MaskDMPipeline, make_scheduler, seeded
from maskdm.sampling.guidance import METHODS, Cost, Steered, Steering
from maskdm.sampling.tasks import Colourise, Deblur, Fulfil, Inpaint, Task, Upscale

TRIED = {**METHODS, "x0 alone": Steering(through=False, steps=1, repeats=3, falling=True, window=(0.02, 20.0), reuse=2)}
"""The methods of `maskdm edit`, and the cheap set as arXiv 2312.13253 has it: no pass back, repeats only while the loss falls."""

COLUMNS = ("seconds", "evaluations", "backward", "psnr", "class_accuracy", "frechet_distance")


def task_of(name: str, truth: Tensor, labels: Tensor | None, guide: SelfNetwork) -> Task | None:
    """The task for a batch of images; None where it does not fit them. guide: the network that leads to classes."""
    height, width = truth.shape[-2:]
    match name:
        case "inpaint":
            return Inpaint(truth, torch.arange(width).expand(height, width) < width // 2)
        case "upscale":
            return Upscale(F.avg_pool2d(truth, 2), 2)
        case "deblur":
            task = Deblur(truth, 1.0)
            task.known = task.apply(truth)
            return task
        case "colourise" if truth.shape[1] == 3:
            return Colourise(Colourise(truth[:, :1]).apply(truth))
        case "classify" if labels is not None and guide.num_classes:
            encoder = guide.encoder
            return Fulfil(
                lambda x: F.cross_entropy(encoder.head(encoder(encoder.prepare((x.float() + 1) * 127.5))), labels, reduction="none")
            )
        case _:
            return None


def draw(
    pipeline: MaskDMPipeline, task: Task, steering: Steering, steps: int, numbers: range, seed: int, about: Measuring
) -> tuple[Tensor, Cost]:
    """Images in -1..1, and their cost."""
    guidance = Steered(task, steering, torch.Generator().manual_seed(seed))
    with autocast(about.machine.device, about.machine.precision):
        drawn: Any = pipeline(len(numbers), None, seeded(seed, numbers), steps, output_type="pt", guidance=guidance)
    return drawn.images.float() * 2 - 1, guidance.cost


def measure(
    pipeline: MaskDMPipeline, name: str, truth: ImageSet, steps: int, seed: int, about: Measuring, guide: SelfNetwork
) -> dict[str, dict[str, Any]]:
    """The figures of every method on a task for one seed; nothing where the task does not fit."""
    pixels = to_model_range(truth.take(slice(None)))
    labels = None if truth.labels is None else torch.from_numpy(truth.labels)
    images: dict[str, list[Tensor]] = {method: [] for method in TRIED}
    spent = {method: [0.0, 0, 0] for method in TRIED}
    batch = fitting_batch(pipeline)
    for first in range(0, len(pixels), batch):
        numbers = range(first, min(first + batch, len(pixels)))
        for method, steering in TRIED.items():
            task = task_of(name, pixels[first : first + batch], None if labels is None else labels[first : first + batch], guide)
            if task is None:
                return {}
            started = time.perf_counter()
            drawn, cost = draw(pipeline, task, steering, steps, numbers, seed, about)
            spent[method][0] += time.perf_counter() - started
            spent[method][1:] = [cost.evaluations, cost.backward]
            images[method].append(drawn)
    found: dict[str, dict[str, Any]] = {}
    for method, parts in images.items():
        drawn = torch.cat(parts)
        arrays = np.ascontiguousarray(to_uint8(drawn).numpy().transpose(0, 2, 3, 1))
        samples = ImageSet(arrays, np.arange(len(arrays)), f"{name} {method} {seed} {steps} {truth.key} {time.time_ns()}", truth.labels)
        row = dict(zip(("seconds", "evaluations", "backward"), spent[method], strict=True)) | spread(judged(about, samples))
        if name != "classify":
            row["psnr"] = float((10 * (4 / (drawn - pixels).square().flatten(1).mean(1).clamp(min=1e-10)).log10()).mean())
        found[method] = row
    return found


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds, with intervals, of every task and method."""
    found: list[dict[str, Any]] = []
    for task, method in dict.fromkeys((row["task"], row["method"]) for row in rows):
        here = [row for row in rows if (row["task"], row["method"]) == (task, method)]
        line: dict[str, Any] = {"task": task, "method": method}
        for name in COLUMNS:
            values = np.array([row[name] for row in here if row.get(name) is not None], dtype=np.float64)
            if len(values):
                mean, some = float(values.mean()), len(values) > 1
                half = half_width(float(values.std(ddof=1)) / len(values) ** 0.5, len(values) - 1) if some else 0.0
                line |= {name: mean, f"{name}_interval": [mean - half, mean + half] if some else [None, None]}
        found.append(line)
    return found


def table(lines: list[dict[str, Any]]) -> str:
    """In Markdown."""
    text = ["| task | method | " + " | ".join(COLUMNS) + " |", "|---" * (2 + len(COLUMNS)) + "|"]
    for line in lines:
        cells = ["-" if name not in line else f"{line[name]:.3g}" + _interval(line[f"{name}_interval"]) for name in COLUMNS]
        text.append(f"| {line['task']} | {line['method']} | " + " | ".join(cells) + " |")
    return "\n".join(text)


def _interval(ends: list[float | None]) -> str:
    low, high = ends
    return "" if low is None or high is None or low == high else f" ({low:.3g} to {high:.3g})"


def main() -> None:
    """Measure what is left, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--tasks", default="inpaint,upscale,deblur,colourise,classify")
    parser.add_argument("--num", type=int, default=256, help="held-out images")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--scheduler", default="ddim")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--features", default="self", help="the judge, as `maskdm evaluate` takes it; give one that knows the classes")
    parser.add_argument("--data", help="the images, where they have moved")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="JSON file; one that is there is gone on with")
    given = parser.parse_args()
    given.seed, display = 0, Display()
    about, dataset = prepared(given.run, given, display)
    config = RunDirectory.existing(given.run).config()
    training, heldout = sets_of(config, dataset)
    if heldout is None:
        raise SystemExit("the run has no held-out images")
    guide = choose_network("self", training, heldout, 1, about.machine.device, Ranks(), display)
    assert isinstance(guide, SelfNetwork)
    truth = heldout.part(heldout.places(given.num))
    pipeline, _ = load_pipeline(given.run)
    torch.set_num_threads(given.threads or about.machine.cores)
    pipeline.scheduler = make_scheduler(given.scheduler, pipeline.config["schedule"], pipeline.config["target"])
    head = {"run": str(given.run), "num": len(truth), "steps": given.steps, "scheduler": given.scheduler}
    head |= {"features": about.extractor.network.provenance(), "environment": environment(about.machine, torch.get_num_threads())}
    rows: list[dict[str, Any]] = json.loads(given.out.read_text())["rows"] if given.out.is_file() else []
    done = {(row["task"], row["seed"]) for row in rows}
    for seed in range(given.seeds):
        for name in given.tasks.split(","):
            if (name, seed) in done:
                continue
            for method, row in measure(pipeline, name, truth, given.steps, seed, about, guide).items():
                rows.append({"task": name, "method": method, "seed": seed} | row)
            display.note(f"{name}, seed {seed}")
            write_text(given.out, json.dumps(head | {"rows": rows, "summary": summary(rows)}, indent=1))
    print(table(summary(rows)))


if __name__ == "__main__":
    main()
