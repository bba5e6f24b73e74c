"""`maskdm evaluate`: samples of a run, or a folder of images, against real images, with what every figure rests on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import maskdm
from maskdm.config import Config, Data, Hardware, Sampling
from maskdm.data import Dataset, inspect, open_source, prepare
from maskdm.engine import Machine, Ranks, autocast, joined, this_machine
from maskdm.errors import UserError
from maskdm.evaluation import (
    Evaluation,
    Extractor,
    FeatureNetwork,
    ImageSet,
    Subject,
    denoising_loss,
    evaluate_samples,
    fill,
    overfitting,
)
from maskdm.pictures import grid
from maskdm.report import write_report
from maskdm.runs.directory import RunDirectory, write_text
from maskdm.runs.display import Display
from maskdm.runs.judge import choose_network
from maskdm.runs.latents import with_latents
from maskdm.runs.sample import SampleRequest, draw_images, sampler, sampling_settings
from maskdm.runs.sets import CLASSES, LEAST_HELDOUT, dataset_of, image_set, images_and_labels, left_out, natural_labels, sets_of
from maskdm.runs.sizes import parse_size
from maskdm.runs.store import cache_directory, load_pipeline, state_hash
from maskdm.sampling import make_scheduler

MOST_DENOISED = 1000
"""Training and held-out images whose denoising loss is measured."""

LARGEST = 1024


@dataclass(frozen=True)
class EvaluateRequest:
    """What `maskdm evaluate` was asked for: a run and how to sample it, or two collections of images; None: as the run has it."""

    run: SampleRequest | None
    images: str | None = None
    data: str | None = None
    features: str = "self"
    num_reference: int | None = None
    image_size: str | None = None
    out: Path | None = None


@dataclass(frozen=True)
class Evaluated:
    """The figures, as metrics.json has them, and a summary in words; both empty in processes other than the first."""

    measures: dict[str, Any]
    summary: str


def evaluate(request: EvaluateRequest, display: Display) -> Evaluated:
    """Measure, and write what was found. Raises UserError."""
    if (request.run is None) == (request.images is None):
        raise UserError("give either the directory of a run, or --images A --data B: two collections of images")
    if request.run is not None and request.image_size is not None:
        raise UserError("--image-size goes with --images; a run's samples have the run's size")
    if request.num_reference is not None and request.num_reference < LEAST_HELDOUT:
        raise UserError(f"--num-reference is {request.num_reference}; give at least {LEAST_HELDOUT}, or leave it out for all")
    if request.out is not None and not request.out.absolute().parent.is_dir():
        raise UserError(f"--out {request.out}: there is no folder {request.out.absolute().parent}; make it first")
    with joined() as ranks:
        quiet = display if ranks.first else Display(quiet=True)
        return _evaluate_run(request, request.run, ranks, quiet) if request.run else _evaluate_images(request, ranks, quiet)


# --- a run ----------------------------------------------------------------------------------------------------------


def _evaluate_run(request: EvaluateRequest, sampled: SampleRequest, ranks: Ranks, display: Display) -> Evaluated:
    run = RunDirectory.existing(sampled.run)
    config, info = run.config(), run.info()
    if sampled.num < 10:
        raise UserError(f"--num is {sampled.num}; an evaluation needs at least 10 samples")
    pipeline, origin = load_pipeline(sampled.run, sampled.weights, sampled.ema)
    machine = this_machine(Hardware(precision=sampled.precision))
    config, dataset = with_latents(config, dataset_of(run, config, request.data, display), machine, ranks, display)
    training, heldout = sets_of(config, dataset)
    if heldout is None:
        display.note(f"fewer than {LEAST_HELDOUT} held-out images: no figure of new real images to compare with; see --heldout of train")
    settings = sampling_settings(config, sampled)
    labels = natural_labels(config, dataset, training.rows, sampled.num)
    size = (*config.data.image_size, config.data.channels)
    samples = _draw(pipeline, settings, sampled, labels, size, machine, ranks, display)
    network = choose_network(request.features, training, heldout, 0, machine.device, ranks, display)
    provenance = {
        "maskdm": maskdm.__version__,
        "checkpoint": origin,
        "weights": sampled.weights if sampled.ema is None else f"power-function average, sigma_rel {sampled.ema:g}",
        "weights_hash": state_hash(pipeline.unet.state_dict()),
        "scheduler": settings.scheduler,
        "steps": settings.steps,
        "eta": settings.eta,
        "guidance": settings.guidance,
        "guide": settings.guide,
        "guidance_window": settings.guidance_window,
        "guidance_rescale": settings.guidance_rescale,
        "threshold": settings.threshold,
        "seed": sampled.seed,
        "classes": None if labels is None else CLASSES,
        "data": info["data"]["name"],
        "data_hash": dataset.content_hash,
        "device": str(machine.device),
        "precision": machine.precision,
    }
    denoising = None
    if heldout is not None and ranks.first:
        display.note("measuring the denoising loss on training and held-out images")
        denoising = _overfitting(pipeline, config, machine, dataset, training, heldout)
    subject = Subject(samples, training, heldout, tuple(pipeline.config["class_names"]), reference=left_out(config, dataset))
    found = _measure(request, network, subject, provenance, denoising, ranks, display)
    if not ranks.first:
        return Evaluated({}, "")
    stages: list[dict[str, Any]] = info["stages"]
    metrics = {**found.measures, "train_seconds": sum(stage["seconds"] for stage in stages), "stages": stages}
    write_text(run.metrics_file, json.dumps(metrics, indent=1))
    with run.evaluations_log.open("a", encoding="utf-8") as file:
        file.write(json.dumps(metrics) + "\n")
    _picture(found, subject, "neighbours").save(run.path / "neighbours.png")
    _picture(found, subject, "worst").save(run.path / "copies.png")
    if request.out is not None:
        write_text(request.out, json.dumps(metrics, indent=1))
    write_report(run.path)
    lines = [*summary(metrics), f"metrics: {run.metrics_file}", f"report:  {run.path / 'report.html'}"]
    return Evaluated(metrics, "\n".join(lines))


def _draw(
    pipeline: maskdm.MaskDMPipeline,
    settings: Sampling,
    request: SampleRequest,
    labels: list[int] | None,
    size: tuple[int, int, int],
    machine: Machine,
    ranks: Ranks,
    display: Display,
) -> ImageSet:
    """Samples, kept in the cache: a killed evaluation goes on, and another network measures the same ones."""
    pipeline.scheduler = make_scheduler(settings.scheduler, pipeline.config["schedule"], pipeline.config["target"])
    how = [
        maskdm.__version__,
        settings.scheduler,
        sampler(settings),
        request.seed,
        request.num,
        machine.device.type,
        machine.precision,
        CLASSES,
    ]
    key = hashlib.sha256(json.dumps([state_hash(pipeline.unet.state_dict()), *how, labels]).encode()).hexdigest()[:32]
    folder = cache_directory() / "samples"
    folder.mkdir(parents=True, exist_ok=True)

    def make(rows: slice) -> NDArray[np.uint8]:
        wanted = None if labels is None else labels[rows]
        return draw_images(pipeline, settings, range(rows.start, rows.stop), wanted, request.seed, machine.precision).transpose(0, 2, 3, 1)

    shape = (request.num, *size)
    with display.counting(f"drawing {request.num} samples") as progress:
        pixels = fill(folder / f"{key}.npy", shape, np.uint8, make, ranks, progress)
    return ImageSet(pixels, np.arange(request.num), key, None if labels is None else np.array(labels))


def _overfitting(
    pipeline: maskdm.MaskDMPipeline, config: Config, machine: Machine, dataset: Dataset, training: ImageSet, heldout: ImageSet
) -> dict[str, object]:
    losses = []
    for images in (training, heldout):
        shown, labels = images_and_labels(config, dataset, images.rows[images.places(MOST_DENOISED)], machine.device)
        with autocast(machine.device, machine.precision):
            losses.append(denoising_loss(pipeline.unet, config.diffusion, shown, labels))
    return overfitting(*losses)


# --- two collections of images ------------------------------------------------------------------------------------


def _evaluate_images(request: EvaluateRequest, ranks: Ranks, display: Display) -> Evaluated:
    if request.images is None or request.data is None:
        raise UserError("--images is given without --data; name the real images that they are measured against")
    sources = [open_source(request.images), open_source(request.data)]
    summaries = [inspect(source) for source in sources]
    for source, found in zip(sources, summaries, strict=True):
        if found.readable == 0:
            raise UserError(f"no image of {source.name} can be read; `maskdm data {source.name}` lists what is wrong with each")
    first = summaries[0]
    shrink = min(1.0, LARGEST / max(first.median_height, first.median_width))
    size = (max(4, round(first.median_height * shrink)), max(4, round(first.median_width * shrink)))
    size = parse_size(request.image_size) if request.image_size else size
    sets: list[ImageSet] = []
    datasets: list[Dataset] = []
    for source in sources:
        settings = Data(source.name, size, channels=1 if all(each.gray for each in summaries) else 3)
        with display.counting(f"decoding images of {source.name}") as progress:
            datasets.append(prepare(source, settings, cache_directory(), progress))
        if datasets[-1].broken:
            display.note(f"{len(datasets[-1].broken)} broken files of {source.name} skipped; `maskdm data {source.name}` lists them")
    same_classes = datasets[0].class_names == datasets[1].class_names
    sets = [image_set(dataset, np.arange(len(dataset)), same_classes) for dataset in datasets]
    machine = this_machine(Hardware())
    network = choose_network(request.features, sets[1], None, 0, machine.device, ranks, display)
    provenance = {
        "maskdm": maskdm.__version__,
        "images": request.images,
        "images_hash": datasets[0].content_hash,
        "data": request.data,
        "data_hash": datasets[1].content_hash,
        "image_size": list(size),
        "fit": "crop",
        "device": str(machine.device),
    }
    subject = Subject(sets[0], sets[1], None, datasets[0].class_names if same_classes else (), "real images")
    found = _measure(request, network, subject, provenance, None, ranks, display)
    if not ranks.first:
        return Evaluated({}, "")
    lines = summary(found.measures)
    if request.out is not None:
        write_text(request.out, json.dumps(found.measures, indent=1))
        pairs = request.out.with_suffix(".copies.png")
        _picture(found, subject, "worst").save(pairs)
        lines += [f"metrics: {request.out}", f"pairs most alike: {pairs}"]
    return Evaluated(found.measures, "\n".join(lines))


# --- both -----------------------------------------------------------------------------------------------------------


def _measure(
    request: EvaluateRequest,
    network: FeatureNetwork,
    subject: Subject,
    provenance: Mapping[str, object],
    denoising: Mapping[str, object] | None,
    ranks: Ranks,
    display: Display,
) -> Evaluation:
    provenance = {"created": datetime.now().astimezone().isoformat(timespec="seconds"), **provenance}
    with display.counting("features") as progress:
        extractor = Extractor(network, cache_directory() / "features", ranks, progress)
        return evaluate_samples(extractor, subject, provenance, request.num_reference, denoising)


def _picture(found: Evaluation, subject: Subject, which: str) -> Any:
    """Samples in one row, their training images below."""
    pairs = found.neighbours if which == "neighbours" else found.worst
    above = subject.samples.take(np.array([pair.sample for pair in pairs])).numpy()
    below = subject.training.take(np.array([pair.training for pair in pairs])).numpy()
    return grid(np.concatenate([above, below]), columns=len(pairs))


def summary(measures: dict[str, Any]) -> list[str]:
    """The figures that matter most, a line each, then what they say."""

    def between(key: str) -> str:
        low, high = measures[f"{key}_interval"]
        return f"{measures[key]:.4g} ({low:.4g} to {high:.4g})"

    def beside(key: str) -> str:
        return f"; new real images {measures[f'{key}_heldout']:.4g}" if f"{key}_heldout" in measures else ""

    lines = [f"{measures['num_samples']} images against {measures['reference']}; features: {measures['features']['name']}; 95 % intervals"]
    lines.append(f"  kernel distance   {between('kernel_distance')}{beside('kernel_distance')}")
    name = "FID              " if "fid" in measures else "Frechet distance "
    count = measures.get("frechet_distance_halves_count")
    halves = f"; two disjoint parts of the real images, {count} each: {measures['frechet_distance_halves']:.4g}" if count else ""
    lines.append(f"  {name} {between('frechet_distance')}{beside('frechet_distance')}{halves}")
    if "frechet_distance_infinity" in measures:
        lines.append(f"  ... of endless images {between('frechet_distance_infinity')}")
    for key in ("precision", "recall", "density", "coverage"):
        lines.append(f"  {key:<17} {between(key)}{beside(key)}")
    if "class_accuracy" in measures:
        lines.append(f"  class accuracy    {between('class_accuracy')}{beside('class_accuracy')}")
    return [*lines, *(f"* {sentence}" for sentence in measures["verdicts"])]
