"""`maskdm ema-sweep`: averages of the weights of several lengths, made from a run's snapshots, and which of them is best."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

import maskdm
from maskdm.config import Config, Hardware
from maskdm.data import Dataset, open_source, prepare
from maskdm.engine import Ranks, autocast, checkpoint, snapshots, this_machine
from maskdm.engine.posthoc import gamma_of
from maskdm.errors import UserError
from maskdm.evaluation import Extractor, denoising_loss, kernel_distance
from maskdm.models import Denoiser, build
from maskdm.runs.directory import RunDirectory, write_text
from maskdm.runs.display import Display
from maskdm.runs.judge import choose_network
from maskdm.runs.sample import draw_images
from maskdm.runs.sets import sets_of
from maskdm.runs.store import cache_directory, class_names, latest_checkpoint, make_pipeline, save_pipeline, stage_snapshots

MeasureName = Literal["heldout-loss", "kernel-distance"]


@dataclass(frozen=True)
class SweepRequest:
    """What `maskdm ema-sweep` was asked for."""

    run: Path
    sigma_rel: tuple[float, ...]
    stage: str | None = None
    measure: MeasureName = "heldout-loss"
    num: int | None = None
    save: bool = False


@dataclass(frozen=True)
class Measured:
    """A figure, smaller is better. parts: it for the same disjoint parts of the data each time, so that two can be paired."""

    value: float
    interval: tuple[float, float] | None = None
    parts: tuple[float, ...] = ()


Measure = Callable[[Denoiser], Measured]


def parse_lengths(text: str) -> tuple[float, ...]:
    """Lengths from "0.02,0.05". Raises UserError."""
    try:
        found = tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        found = ()
    if not found:
        raise UserError(f"--sigma-rel is '{text}'; give lengths with commas between, such as 0.02,0.05,0.1")
    return found


def ema_sweep(request: SweepRequest, display: Display) -> str:
    """Measure an average of each length asked for and the one that training kept; write ema_sweep.json.

    Returns a table. Raises UserError: no run, no snapshots, no held-out images, or other data.
    """
    run = RunDirectory.existing(request.run)
    config, info = run.config(), run.info()
    stage, stored = stage_snapshots(request.run, request.stage)
    for length in request.sigma_rel:  # refuses one that cannot be before anything is measured
        gamma_of(length)
    model, ordinary, origin = _ordinary(run, config, stage)
    measure, about = _measure(request, config, info, display)
    lines, points = [_HEAD], list[dict[str, Any]]()
    best_weights: dict[str, torch.Tensor] = {}
    with display.counting("measuring averages") as progress:
        model.load_state_dict(ordinary)
        kept = measure(model)
        progress(1, len(request.sigma_rel) + 1)
        for number, length in enumerate(request.sigma_rel):
            weights, fit = snapshots.average(stored, length)
            model.load_state_dict(weights)
            found = measure(model)
            point = {"sigma_rel": length, "value": found.value, "interval": found.interval, "misfit": fit.misfit}
            points.append(point | _against(found, kept))
            lines.append(_line(f"{length:g}", points[-1]))
            if found.value <= min(each["value"] for each in points):
                best_weights = weights
            progress(number + 2, len(request.sigma_rel) + 1)
    best = min(points, key=lambda each: each["value"])
    last = max(stored.values(), key=lambda each: each.step)
    result: dict[str, Any] = {
        "created": datetime.now().astimezone().isoformat(timespec="seconds"),
        "points": points,
        "measure": request.measure,
        "best": best["sigma_rel"],
        "ordinary": {"value": kept.value, "interval": kept.interval, "checkpoint": origin},
        "beats_ordinary": _beats(best),
        "stage": stage,
        "step": last.step,
        "time": last.time,
        "snapshots": [asdict(each) for each in stored.values()],
        "provenance": {"maskdm": maskdm.__version__, "data": info["data"]["name"], "data_hash": info["data"]["content_hash"], **about},
    }
    write_text(run.sweep_file, json.dumps(result, indent=1))
    lines += [_line("as trained", {"value": kept.value, "interval": kept.interval}), _verdict(best), f"written to {run.sweep_file}"]
    if request.save:
        model.load_state_dict(best_weights)
        folder = run.path / f"model-ema-{best['sigma_rel']:g}"
        save_pipeline(make_pipeline(model, config, class_names(run.path)), folder)
        lines.append(f"model written to {folder}")
    return "\n".join(lines)


def _ordinary(run: RunDirectory, config: Config, stage: str) -> tuple[Denoiser, dict[str, torch.Tensor], str]:
    """The network on this machine, and the average that training kept: at the end of the stage, or the newest there is."""
    names = checkpoint.names(run.checkpoints)
    latest = latest_checkpoint(run)
    if latest is None:
        raise UserError(f"{run.path} has no checkpoint yet; train it first")
    path = next((run.checkpoints / name for name in names if name.endswith(f"-{stage}")), latest)
    machine = this_machine(Hardware())
    torch.set_num_threads(machine.cores)
    model = build(config.model, config.data, len(class_names(run.path)))
    model.to(device=machine.device)  # pyright: ignore[reportCallIssue] - diffusers wraps the method
    return model.eval(), checkpoint.load(path).tensors["average"], str(path)


# --- what is measured ---


def _measure(request: SweepRequest, config: Config, info: dict[str, Any], display: Display) -> tuple[Measure, dict[str, Any]]:
    """The measure asked for, and what its figures rest on."""
    dataset = _dataset(request.run, config, info, display)
    match request.measure:
        case "heldout-loss":
            _, rows = dataset.split(config.data.heldout, config.seed)
            rows = (
                rows
                if request.num is None
                else rows[np.unique(np.linspace(0, len(rows) - 1, min(request.num, len(rows))).astype(np.int64))]
            )
            if len(rows) < 2:
                raise UserError(f"{len(rows)} held-out images are too few to measure; train with a larger --heldout, or leave --num out")
            return heldout_measure(config, dataset, rows), {"num_images": len(rows), "precision": this_machine(Hardware()).precision}
        case "kernel-distance":
            num = 500 if request.num is None else request.num
            if num < 10:
                raise UserError(f"--num is {num}; a kernel distance needs at least 10 samples")
            measure, name = kernel_measure(config, dataset, num, display)
            return measure, {"num_samples": num, "features": name, "sampler": config.sampling.scheduler, "steps": config.sampling.steps}


def _dataset(path: Path, config: Config, info: dict[str, Any], display: Display) -> Dataset:
    source = open_source(config.data.source)
    with display.counting("decoding images") as progress:
        dataset = prepare(source, config.data, cache_directory(), progress)
    if dataset.content_hash != info["data"]["content_hash"]:
        raise UserError(f"{source.name} is not the data that {path} was trained on, or has changed since; its held-out images are unknown")
    return dataset


def heldout_measure(config: Config, dataset: Dataset, rows: NDArray[np.int64]) -> Measure:
    """The noise loss of whole images, with an interval from its scatter over them. Needs two images."""
    machine = this_machine(Hardware())
    images = torch.from_numpy(np.ascontiguousarray(dataset.images[rows].transpose(0, 3, 1, 2))).to(machine.device)

    def measure(model: Denoiser) -> Measured:
        labels = None
        if config.data.conditional and dataset.labels is not None:
            labels = torch.from_numpy(dataset.labels[rows])
            labels = torch.where(labels < 0, model.num_classes, labels).to(machine.device)
        with autocast(machine.device, machine.precision):
            parts = denoising_loss(model, config.diffusion, images, labels).errors.mean(dim=1).tolist()
        value = float(np.mean(parts))
        return Measured(value, _interval(value, parts), tuple(parts))

    return measure


def kernel_measure(config: Config, dataset: Dataset, num: int, display: Display) -> tuple[Measure, str]:
    """The kernel distance of `num` samples, of the same noise each time, to the training images; and the network's name."""
    machine = this_machine(Hardware())
    training, heldout = sets_of(config, dataset)
    network = choose_network(config.evaluation.features, training, heldout, 0, machine.device, Ranks(), display)
    real = Extractor(network, cache_directory() / "features", Ranks()).features(training)
    classes = list(dataset.class_names) if config.data.conditional else []

    def measure(model: Denoiser) -> Measured:
        labels = [i % len(classes) for i in range(num)] if classes else None
        drawn = draw_images(make_pipeline(model, config, classes), config.sampling, range(num), labels, config.seed)
        found = kernel_distance(network.features(drawn), real).estimate
        return Measured(found.value, (found.low, found.high))

    return measure, network.name


def _interval(value: float, parts: list[float]) -> tuple[float, float]:
    """The 95 % interval of a mean over parts (Student's t)."""
    from scipy.stats import t

    half = float(t.ppf(0.975, len(parts) - 1)) * float(np.std(parts, ddof=1)) / len(parts) ** 0.5
    return value - half, value + half


# --- words ---

_HEAD = f"{'sigma_rel':>10}  {'value':>9}  {'95 % interval':>19}  {'against training':>16}  {'95 % interval':>19}  {'misfit':>6}"


def _against(found: Measured, kept: Measured) -> dict[str, Any]:
    """The difference to the average that training kept, on the same parts."""
    difference = found.value - kept.value
    pairs = [a - b for a, b in zip(found.parts, kept.parts, strict=True)]
    return {"difference": difference, "difference_interval": _interval(difference, pairs) if len(pairs) > 1 else None}


def _line(name: str, point: dict[str, Any]) -> str:
    def span(interval: tuple[float, float] | None, sign: str) -> str:
        return f"{interval[0]:{sign}.5f} {interval[1]:{sign}.5f}" if interval else ""

    line = f"{name:>10}  {point['value']:9.5f}  {span(point['interval'], ''):>19}"
    if "difference" in point:
        line += f"  {point['difference']:+16.5f}  {span(point['difference_interval'], '+'):>19}  {point['misfit']:6.1%}"
    return line


def _beats(best: dict[str, Any]) -> bool | None:
    """Whether the best is surely better than the average that training kept; None where there is no interval to tell by."""
    return None if best["difference_interval"] is None else best["difference_interval"][1] < 0


def _verdict(best: dict[str, Any]) -> str:
    beats = _beats(best)
    how = "better than" if beats or (beats is None and best["difference"] < 0) else "not surely better than"
    return f"best: sigma_rel {best['sigma_rel']:g}, {how} the average that training kept"
