"""What distillation keeps: `python -m benchmarks.distillation TEACHER STUDENT [STUDENT ...] [--steps 64,16,8,4,2,1] [--guidance 1,2,4]`.

For every number of sampling steps and every guidance scale, samples of the teacher and of each student (a run of `maskdm distil`) with the
same seeds: Frechet and kernel distance to the training images, the feature network's accuracy on the classes asked for, precision and
recall, each with its interval, and the network evaluations that an image costs. A student of halving is taken as it was at the end of the
stage for that number of steps, and above the first of them as it was after guidance was distilled. Rows that are there already, in the
JSON file, are not measured again. Prints a table, and how the figures stand to the goals: distance over that of the teacher at the first
number of steps and the same scale.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from maskdm.config import Config, Halve, Hardware
from maskdm.data import Dataset
from maskdm.engine import Machine, Ranks, checkpoint, environment, this_machine
from maskdm.evaluation import (
    Estimate,
    Extractor,
    ImageSet,
    Statistics,
    frechet_distance,
    frechet_standard_error,
    kernel_distance,
    manifold,
)
from maskdm.evaluation.intervals import share
from maskdm.models import build
from maskdm.runs import Display
from maskdm.runs.directory import RunDirectory, write_text
from maskdm.runs.judge import choose_network
from maskdm.runs.sample import draw_images
from maskdm.runs.sets import dataset_of, natural_labels, sets_of
from maskdm.runs.store import cache_directory, class_names, load_pipeline, make_pipeline, state_hash
from maskdm.sampling import MaskDMPipeline

COLUMNS = ("frechet_distance", "ratio", "kernel_distance", "class_accuracy", "precision", "recall")


@dataclass(frozen=True)
class Measuring:
    """What all rows have in common: the data's sets, the judge, how many samples, from which seed."""

    extractor: Extractor
    training: ImageSet
    num_classes: int
    labels: list[int] | None
    num: int
    seed: int
    machine: Machine


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


def judged(about: Measuring, samples: ImageSet) -> dict[str, Any]:
    """What is kept of the measures of `maskdm evaluate`, without its search for copies."""
    fake, real = about.extractor.features(samples), about.extractor.features(about.training)
    of_fake, of_real = Statistics.of(fake), Statistics.of(real)
    error = frechet_standard_error(fake, real, of_fake, of_real)
    estimates = {"frechet_distance": Estimate.around(frechet_distance(of_fake, of_real), error)}
    estimates["kernel_distance"] = kernel_distance(fake, real).estimate
    estimates |= {name: each for name, each in manifold(real, fake)._asdict().items() if name in ("precision", "recall")}
    predicted = about.extractor.classes(samples)
    if predicted is not None and samples.labels is not None and about.extractor.network.num_classes == about.num_classes:
        estimates["class_accuracy"] = share(int((predicted == samples.labels).sum()), len(samples))
    return {
        key: value for name, each in estimates.items() for key, value in ((name, each.value), (f"{name}_interval", [each.low, each.high]))
    }


def measure(pipeline: MaskDMPipeline, config: Config, about: Measuring, steps: int, guidance: float) -> dict[str, Any]:
    """One row: samples drawn and judged."""
    settings = replace(config.sampling, scheduler="ddim", eta=0.0, steps=steps, guidance=guidance)
    drawn = draw_images(pipeline, settings, range(about.num), about.labels, about.seed, about.machine.precision)
    name = f"{state_hash(pipeline.unet.state_dict())} {steps} {guidance} {about.seed} {about.num} {about.machine.precision}"
    labels = None if about.labels is None else np.array(about.labels)
    samples = ImageSet(np.ascontiguousarray(drawn.transpose(0, 2, 3, 1)), np.arange(about.num), name, labels)
    found = judged(about, samples)
    twice = guidance != 1 and pipeline.unet.num_classes > 0 and pipeline.unet.guidance_dial is None
    row: dict[str, Any] = {"steps": steps, "guidance": guidance, "evaluations": steps * (2 if twice else 1)}
    return row | found


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
    labels = natural_labels(config, dataset, training.rows, given.num)
    return Measuring(extractor, training, len(dataset.class_names), labels, given.num, given.seed, machine), dataset


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each with its distance over the teacher's at the most steps and the same scale, and at the same steps."""
    teachers = {(row["steps"], row["guidance"]): row["frechet_distance"] for row in rows if row["who"] == "teacher"}
    most = max(row["steps"] for row in rows)
    for row in rows:
        for key, steps in (("ratio", most), ("ratio_same_steps", row["steps"])):
            against = teachers.get((steps, row["guidance"]))
            row[key] = row["frechet_distance"] / against if against else None
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """In Markdown."""
    lines = ["| who | steps | guidance | evaluations | " + " | ".join(COLUMNS) + " |", "|---" * (4 + len(COLUMNS)) + "|"]
    for row in sorted(rows, key=lambda row: (row["guidance"], -row["steps"], row["who"] != "teacher", row["who"])):
        cells = [f"{row[name]:.3g}" if row.get(name) is not None else "-" for name in COLUMNS]
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
    parser.add_argument("--out", type=Path, required=True, help="JSON file; one that is there is gone on with")
    given = parser.parse_args()
    display = Display()
    about, dataset = prepared(given.teacher, given, display)
    head = {"teacher": str(given.teacher), "num": given.num, "seed": given.seed, "features": about.extractor.network.provenance()}
    head |= {"data_hash": dataset.content_hash, "environment": environment(about.machine, torch.get_num_threads())}
    rows: list[dict[str, Any]] = json.loads(given.out.read_text())["rows"] if given.out.is_file() else []
    done = {(row["who"], row["steps"], row["guidance"]) for row in rows}
    scales = [float(text) for text in given.guidance.split(",")]
    for who, path in (("teacher", given.teacher), *((str(path), path) for path in given.students)):
        config = RunDirectory.existing(path).config()
        for steps in map(int, given.steps.split(",")):
            left = [scale for scale in scales if (who, steps, scale) not in done and (scale == 1 or config.data.conditional)]
            pipeline = pipeline_of(path, steps) if left else None
            for scale in left if pipeline is not None else []:
                assert pipeline is not None
                rows.append({"who": who} | measure(pipeline, config, about, steps, scale))
                display.note(f"{who}: {steps} steps, guidance {scale:g}: distance {rows[-1]['frechet_distance']:.3g}")
                write_text(given.out, json.dumps(head | {"rows": with_ratios(rows)}, indent=1))
    print(table(with_ratios(rows)))


if __name__ == "__main__":
    main()
