"""What distillation keeps: `python -m benchmarks.distillation TEACHER STUDENT [STUDENT ...] [--steps 64,16,8,4,2,1] [--guidance 1,2,4]`.

For every number of sampling steps and every guidance scale, samples of the teacher and of each student (a run of `maskdm distil`) with the
same seeds: Frechet and kernel distance to the training images, the feature network's accuracy on the classes asked for, precision and
recall, each with its interval, and the network evaluations that an image costs; and the ratio of the distance to that of the teacher in
the most steps at the same scale. A student of halving is taken as it was at the end of the stage for that number of steps, and above the
first of them as it was after guidance was distilled. Samples are kept in the cache: the same call, stopped, goes on. Prints a table.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from maskdm.config import Config, Halve, Hardware
from maskdm.data import Dataset
from maskdm.engine import Machine, Ranks, checkpoint, environment, this_machine
from maskdm.evaluation import (
    Estimate,
    Extractor,
    ImageSet,
    Statistics,
    fill,
    frechet_distance,
    frechet_ratio,
    frechet_standard_error,
    kernel_distance,
    manifold,
)
from maskdm.evaluation.evaluate import MOST_MANIFOLD
from maskdm.evaluation.intervals import share
from maskdm.models import build
from maskdm.runs import Display
from maskdm.runs.directory import RunDirectory, write_text
from maskdm.runs.judge import choose_network
from maskdm.runs.sample import draw_images
from maskdm.runs.sets import dataset_of, natural_labels, sets_of
from maskdm.runs.store import cache_directory, class_names, load_pipeline, make_pipeline, state_hash
from maskdm.sampling import MaskDMPipeline, make_scheduler

COLUMNS = ("frechet_distance", "ratio", "kernel_distance", "class_accuracy", "precision", "recall")


@dataclass(frozen=True)
class Measuring:
    """What all rows have in common: the data's sets, the judge, how many samples, from which seed, and the folder that keeps them."""

    extractor: Extractor
    training: ImageSet
    num_classes: int
    labels: list[int] | None
    num: int
    seed: int
    machine: Machine
    drawn: Path


def student_at(config: Config, steps: int) -> str | None:
    """The stage whose end is the student for so many sampling steps; None: the run's own end; "" where there is none."""
    stages = [(stage.name, stage.lesson) for stage in config.stages]
    halved = {lesson.steps: name for name, lesson in stages if isinstance(lesson, Halve)}
    if not halved:
        return None
    if steps in halved:
        return halved[steps]
    before = [name for name, lesson in stages if not isinstance(lesson, Halve)]
    return before[-1] if before and steps > max(halved) else ""


def pipeline_of(path: Path, steps: int) -> MaskDMPipeline | None:
    """The pipeline of a run for so many sampling steps; None where the run has none for them."""
    run = RunDirectory.existing(path)
    config = run.config()
    stage = student_at(config, steps)
    if stage is None:
        return load_pipeline(path)[0]
    ends = [name for name in checkpoint.names(run.checkpoints) if stage and name.endswith(f"-{stage}")]
    if not ends:
        return None
    model = build(config.model, config.data, len(class_names(path)))
    model.load_state_dict(checkpoint.load(run.checkpoints / ends[-1]).tensors["average"])
    pipeline = make_pipeline(model.eval(), config, class_names(path))
    pipeline.to(this_machine(Hardware()).device)
    return pipeline


def judged(about: Measuring, samples: ImageSet) -> dict[str, Estimate]:
    """Frechet distance to the training images, and the share in the class asked for, of a judge that knows the classes."""
    fake, real = about.extractor.features(samples), about.extractor.features(about.training)
    of_fake, of_real = Statistics.of(fake), Statistics.of(real)
    error = frechet_standard_error(fake, real, of_fake, of_real)
    found = {"frechet_distance": Estimate.around(frechet_distance(of_fake, of_real), error)}
    predicted = about.extractor.classes(samples)
    if predicted is not None and samples.labels is not None and about.extractor.network.num_classes == about.num_classes:
        found["class_accuracy"] = share(int((predicted == samples.labels).sum()), len(samples))
    return found


def spread(estimates: dict[str, Estimate]) -> dict[str, Any]:
    """Each value, and its interval beside it, as JSON holds them."""
    return {
        key: value for name, each in estimates.items() for key, value in ((name, each.value), (f"{name}_interval", [each.low, each.high]))
    }


def drawn(pipeline: MaskDMPipeline, config: Config, about: Measuring, steps: int, guidance: float) -> ImageSet:
    """Samples, drawn once and kept in the cache."""
    settings = replace(config.sampling, eta=0.0, steps=steps, guidance=guidance)
    pipeline.scheduler = make_scheduler("ddim", pipeline.config["schedule"], pipeline.config["target"])
    name = f"{state_hash(pipeline.unet.state_dict())} {steps} {guidance} {about.seed} {about.num} {about.machine.precision}"
    key = hashlib.sha256(name.encode()).hexdigest()[:32]

    def make(rows: slice) -> NDArray[np.uint8]:
        labels = None if about.labels is None else about.labels[rows]
        images = draw_images(pipeline, settings, range(rows.start, rows.stop), labels, about.seed, about.machine.precision)
        return np.ascontiguousarray(images.transpose(0, 2, 3, 1))

    pixels = fill(about.drawn / f"{key}.npy", (about.num, *about.training.pixels.shape[1:]), np.uint8, make, Ranks())
    return ImageSet(pixels, np.arange(about.num), key, None if about.labels is None else np.array(about.labels))


def measure(
    pipeline: MaskDMPipeline, samples: ImageSet, reference: ImageSet, about: Measuring, steps: int, guidance: float
) -> dict[str, Any]:
    """One row: samples judged; `reference` are the teacher's in the most steps."""
    fake, real = about.extractor.features(samples), about.extractor.features(about.training)
    some = about.extractor.features(about.training.part(about.training.places(MOST_MANIFOLD)))
    found = judged(about, samples) | {"ratio": frechet_ratio(fake, about.extractor.features(reference), real)}
    found["kernel_distance"] = kernel_distance(fake, real).estimate
    found |= {name: each for name, each in manifold(some, fake)._asdict().items() if name in ("precision", "recall")}
    twice = guidance != 1 and pipeline.unet.num_classes > 0 and pipeline.unet.guidance_dial is None
    return {"steps": steps, "guidance": guidance, "evaluations": steps * (2 if twice else 1)} | spread(found)


def prepared(teacher: Path, given: argparse.Namespace, display: Display) -> tuple[Measuring, Dataset]:
    """The judge and the images, those of the teacher's run."""
    run = RunDirectory.existing(teacher)
    config = run.config()
    dataset = dataset_of(run, config, given.data, display)
    training, heldout = sets_of(config, dataset)
    machine = this_machine(Hardware())
    torch.set_num_threads(given.threads or machine.cores)
    network = choose_network(given.features, training, heldout, 0, machine.device, Ranks(), display)
    extractor = Extractor(network, cache_directory() / "features", Ranks())
    kept = cache_directory() / "drawn"
    kept.mkdir(parents=True, exist_ok=True)
    labels = natural_labels(config, dataset, training.rows, given.num)
    return Measuring(extractor, training, len(dataset.class_names), labels, given.num, given.seed, machine, kept), dataset


def table(rows: list[dict[str, Any]]) -> str:
    """In Markdown."""
    lines = ["| who | steps | guidance | evaluations | " + " | ".join(COLUMNS) + " |", "|---" * (4 + len(COLUMNS)) + "|"]
    for row in sorted(rows, key=lambda row: (row["guidance"], -row["steps"], row["who"] != "teacher", row["who"])):
        cells = [f"{row[name]:.3g} ({row[f'{name}_interval'][0]:.3g} to {row[f'{name}_interval'][1]:.3g})" if name in row else "-"
                 for name in COLUMNS]  # fmt: skip
        lines.append(f"| {row['who']} | {row['steps']} | {row['guidance']:g} | {row['evaluations']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure what is left, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("students", type=Path, nargs="+")
    parser.add_argument("--steps", default="64,16,8,4,2,1")
    parser.add_argument("--guidance", default="1,2,4")
    parser.add_argument("--num", type=int, default=1000, help="samples of each row")
    parser.add_argument("--features", default="self", help="as `maskdm evaluate` takes it")
    parser.add_argument("--data", help="the images, where they have moved")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    given = parser.parse_args()
    display = Display()
    about, dataset = prepared(given.teacher, given, display)
    head = {"teacher": str(given.teacher), "num": given.num, "seed": given.seed, "features": about.extractor.network.provenance()}
    head |= {"data_hash": dataset.content_hash, "environment": environment(about.machine, torch.get_num_threads())}
    rows: list[dict[str, Any]] = []
    numbers = sorted(map(int, given.steps.split(",")), reverse=True)
    references: dict[float, ImageSet] = {}
    for who, path in (("teacher", given.teacher), *((str(path), path) for path in given.students)):
        config = RunDirectory.existing(path).config()
        for steps in numbers:
            pipeline = pipeline_of(path, steps)
            torch.set_num_threads(given.threads or about.machine.cores)
            if pipeline is None:
                continue
            for scale in map(float, given.guidance.split(",")):
                if scale != 1 and not config.data.conditional:
                    continue
                samples = drawn(pipeline, config, about, steps, scale)
                reference = references.setdefault(scale, samples)
                rows.append({"who": who} | measure(pipeline, samples, reference, about, steps, scale))
                display.note(f"{who}: {steps} steps, guidance {scale:g}: distance {rows[-1]['frechet_distance']:.3g}")
                write_text(given.out, json.dumps(head | {"rows": rows}, indent=1))
    print(table(rows))


if __name__ == "__main__":
    main()
