"""`maskdm evaluate`: samples of a run against real images, with what every figure rests on."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

import maskdm
from maskdm.config import Config
from maskdm.data import Dataset, open_source, prepare
from maskdm.errors import UserError
from maskdm.evaluation import FeatureNetwork, cached_self, evaluate_samples
from maskdm.pictures import grid
from maskdm.report import write_report
from maskdm.runs.directory import RunDirectory, write_text
from maskdm.runs.display import Display
from maskdm.runs.sample import SampleRequest, choose_labels, draw_images, sampling_settings
from maskdm.runs.store import cache_directory, load_pipeline
from maskdm.sampling import make_scheduler

NEIGHBOURS = 16


def evaluate_run(request: SampleRequest, data: str | None, display: Display) -> str:
    """Draw samples, measure them, write metrics.json, neighbours.png and the report; returns a summary. Raises UserError."""
    run = RunDirectory.existing(request.run)
    config, info = run.config(), run.info()
    if request.num < 2:
        raise UserError(f"--num is {request.num}; a distance needs at least 2 samples")
    pipeline, origin = load_pipeline(request.run)
    dataset = _dataset(run, config, data, display)
    training, heldout = dataset.split(config.data.heldout, config.seed)
    if len(heldout) < 2:
        raise UserError(
            f"{request.run} holds out {len(heldout)} images; train with a larger --heldout to evaluate against images never seen"
        )
    settings = sampling_settings(config, request)
    pipeline.scheduler = make_scheduler(settings.scheduler, config.diffusion.schedule, config.diffusion.target)
    labels = choose_labels(pipeline.config["class_names"], (), request.num)
    with display.counting(f"drawing {request.num} samples") as progress:
        samples = draw_images(pipeline, settings, range(request.num), labels, request.seed, progress=progress)
    display.note("training a feature network on the real images (kept for the next time)")
    network = _network(config, dataset, training, heldout, request.seed)
    provenance = {
        "maskdm": maskdm.__version__,
        "checkpoint": origin,
        "scheduler": settings.scheduler,
        "steps": settings.steps,
        "eta": settings.eta,
        "guidance": settings.guidance,
        "seed": request.seed,
        "data": info["data"]["name"],
        "data_hash": dataset.content_hash,
    }
    found = evaluate_samples(
        network,
        samples,
        None if labels is None else np.array(labels),
        _images(dataset, training),
        _labels(dataset, training),
        _images(dataset, heldout),
        _labels(dataset, heldout),
        provenance,
    )
    metrics: dict[str, Any] = {
        **found.measures,
        "train_seconds": sum(stage["seconds"] for stage in info["stages"]),
        "stages": info["stages"],
    }
    write_text(run.metrics_file, json.dumps(metrics, indent=1))
    pairs = np.concatenate([samples[:NEIGHBOURS], _images(dataset, training[found.nearest_indices[:NEIGHBOURS].numpy()])])
    grid(pairs, columns=min(NEIGHBOURS, len(samples))).save(run.path / "neighbours.png")
    write_report(run.path)
    return _summary(metrics, run)


def _dataset(run: RunDirectory, config: Config, data: str | None, display: Display) -> Dataset:
    source = open_source(data or config.data.source)
    with display.counting("decoding images") as progress:
        dataset = prepare(source, config.data, cache_directory(), progress)
    known = run.info()["data"]
    same_classes = not known["classes"] or list(dataset.class_names) == known["classes"]
    if dataset.content_hash != known["content_hash"] or not same_classes:
        raise UserError(
            f"{source.name} is not the data that {run.path} was trained on, or has changed since; its held-out images are unknown"
        )
    return dataset


def _network(config: Config, dataset: Dataset, training: NDArray[np.int64], heldout: NDArray[np.int64], seed: int) -> FeatureNetwork:
    classes = hashlib.sha256(json.dumps([dataset.class_names, None if dataset.labels is None else dataset.labels.tolist()]).encode())
    key = f"{dataset.content_hash}-{classes.hexdigest()[:16]}-{config.data.heldout}-{config.seed}-{seed}"
    return cached_self(
        cache_directory() / "features",
        key,
        _images(dataset, training),
        _labels(dataset, training),
        _images(dataset, heldout),
        _labels(dataset, heldout),
        seed,
    )


def _images(dataset: Dataset, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(dataset.images[rows].transpose(0, 3, 1, 2))


def _labels(dataset: Dataset, rows: NDArray[np.int64]) -> NDArray[np.int64] | None:
    known = dataset.labels is not None and (dataset.labels >= 0).all()  # a judge cannot learn from images without a class
    return dataset.labels[rows] if dataset.labels is not None and known else None


def _summary(metrics: dict[str, Any], run: RunDirectory) -> str:
    lines = [
        f"{metrics['num_samples']} samples, features: {metrics['features']['name']}",
        f"Frechet distance to {metrics['num_reference']} training images: {metrics['frechet_distance']:.3f}"
        f" (held-out real images: {metrics['frechet_distance_heldout']:.3f})",
    ]
    if metrics.get("class_accuracy") is not None:
        lines.append(f"class accuracy: {metrics['class_accuracy']:.1%} (held-out real images: {metrics['class_accuracy_heldout']:.1%})")
    return "\n".join([*lines, f"metrics: {run.metrics_file}", f"report:  {run.path / 'report.html'}"])
