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
from torch import Tensor

import maskdm
from maskdm.config import Config, Hardware
from maskdm.data import Dataset
from maskdm.engine import Machine, Ranks, autocast, checkpoint, snapshots, this_machine
from maskdm.engine.posthoc import gamma_of
from maskdm.errors import UserError
from maskdm.evaluation import Estimate, Extractor, denoising_loss, kernel_distance
from maskdm.evaluation.intervals import bootstrap_mean
from maskdm.models import Denoiser, build
from maskdm.runs.directory import RunDirectory, write_text
from maskdm.runs.display import Display
from maskdm.runs.judge import choose_network
from maskdm.runs.latents import with_latents
from maskdm.runs.sample import draw_images
from maskdm.runs.sets import CLASSES, dataset_of, images_and_labels, natural_labels, sets_of
from maskdm.runs.store import cache_directory, class_names, latest_checkpoint, make_pipeline, save_pipeline, stage_snapshots, whole_weights

MeasureName = Literal["heldout-loss", "kernel-distance"]

AT_ONCE = 1024
"""Held-out images on the device at a time."""

SAMPLES, REFERENCE = 500, 5000
"""Samples drawn for a kernel distance unless told otherwise, and training images they are compared with, at most."""


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
    """A figure, smaller is better. parts: its terms, of the same images each time, so that two models can be paired; or None."""

    estimate: Estimate
    parts: NDArray[np.float64] | None = None


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
    machine = this_machine(Hardware())
    torch.set_num_threads(machine.cores)
    model = build(config.model, config.data, len(class_names(run.path))).eval()
    model.to(device=machine.device)  # pyright: ignore[reportCallIssue] - diffusers wraps the method
    last = max(stored.values(), key=lambda each: each.step)
    origin, kept_step, ordinary = _ordinary(run, stage, last.step)
    same_step = kept_step == last.step
    config, dataset = with_latents(config, dataset_of(run, config, None, display), machine, Ranks(), display)
    measure, about = _measure(request, config, dataset, machine, display)
    points: list[dict[str, Any]] = []
    with display.counting("measuring averages") as progress:
        model.load_state_dict(ordinary)
        kept = measure(model)
        for number, length in enumerate(request.sigma_rel):
            progress(number + 1, len(request.sigma_rel) + 1)
            weights, fit = snapshots.average(stored, length)
            model.load_state_dict(whole_weights(run, weights))
            points.append({"sigma_rel": length, **_against(measure(model), kept), "misfit": fit.misfit})
    best = min(points, key=lambda each: each["value"])
    result: dict[str, Any] = {
        "created": datetime.now().astimezone().isoformat(timespec="seconds"),
        "points": points,
        "measure": request.measure,
        "best": best["sigma_rel"],
        "ordinary": {"value": kept.estimate.value, "interval": list(kept.estimate[1:]), "step": kept_step, "checkpoint": origin},
        "beats_ordinary": _beats(best) if same_step else None,
        "stage": stage,
        "step": last.step,
        "time": last.time,
        "snapshots": [asdict(each) for each in stored.values()],
        "provenance": {"maskdm": maskdm.__version__, "data": info["data"]["name"], "data_hash": dataset.content_hash, **about},
    }
    write_text(run.sweep_file, json.dumps(result, indent=1))
    lines = [_HEAD, *(_line(f"{each['sigma_rel']:g}", last.step, each) for each in points)]
    lines += [_line("as trained", kept_step, result["ordinary"]), _verdict(best, same_step), f"written to {run.sweep_file}"]
    if request.save:
        model.load_state_dict(whole_weights(run, snapshots.average(stored, best["sigma_rel"])[0]))
        folder = run.path / f"model-ema-{best['sigma_rel']:g}"
        save_pipeline(make_pipeline(model, config, class_names(run.path)), folder)
        lines.append(f"model written to {folder}")
    return "\n".join(lines)


def _ordinary(run: RunDirectory, stage: str, step: int) -> tuple[str, int, dict[str, Tensor]]:
    """The average that training kept, whence and of which step: this one, of the last snapshot; else the stage's end, or the newest."""
    latest = latest_checkpoint(run)
    if latest is None:
        raise UserError(f"{run.path} has no checkpoint yet; train it first")
    parts = [(name, *name.split("-", 2)[1:]) for name in checkpoint.names(run.checkpoints)]
    same = [name for name, number, *_ in parts if number == f"{step:08}"]
    ends = [name for name, _, *end in parts if end == [stage]]
    found = checkpoint.load(run.checkpoints / (same or ends or [latest.name])[-1])
    return str(found.path), found.numbers["progress"]["step"], whole_weights(run, found.tensors["average"])


# --- what is measured ---


def _measure(request: SweepRequest, config: Config, dataset: Dataset, machine: Machine, display: Display) -> tuple[Measure, dict[str, Any]]:
    """The measure asked for, and what its figures rest on. Raises UserError where there are too few images."""
    match request.measure:
        case "heldout-loss":
            _, rows = dataset.split(config.data.heldout, config.seed, config.data.limit)
            if request.num is not None:
                rows = rows[np.unique(np.linspace(0, len(rows) - 1, max(0, min(request.num, len(rows)))).astype(np.int64))]
            if len(rows) < 2:
                raise UserError(f"{len(rows)} held-out images are too few to measure; train with a larger --heldout, or leave --num out")
            return heldout_measure(config, dataset, rows, machine), {"num_images": len(rows), "precision": machine.precision}
        case "kernel-distance":
            return _kernel_measure(SAMPLES if request.num is None else request.num, config, dataset, machine, display)


def heldout_measure(config: Config, dataset: Dataset, rows: NDArray[np.int64], machine: Machine) -> Measure:
    """The noise loss of whole images, at least two."""

    def measure(model: Denoiser) -> Measured:
        errors: list[NDArray[np.float64]] = []
        for start in range(0, len(rows), AT_ONCE):
            images, labels = images_and_labels(config, dataset, rows[start : start + AT_ONCE], machine.device)
            with autocast(machine.device, machine.precision):
                errors.append(denoising_loss(model, config.diffusion, images, labels).errors.mean(dim=1).numpy())
        parts = np.concatenate(errors)
        return Measured(bootstrap_mean(parts), parts)

    return measure


def _kernel_measure(num: int, config: Config, dataset: Dataset, machine: Machine, display: Display) -> tuple[Measure, dict[str, Any]]:
    """The distance of samples to training images, drawn from the same noise each time."""
    if num < 10:
        raise UserError(f"--num is {num}; a kernel distance needs at least 10 samples")
    training, heldout = sets_of(config, dataset)
    network = choose_network(config.evaluation.features, training, heldout, 0, machine.device, Ranks(), display)
    real = Extractor(network, cache_directory() / "features", Ranks()).features(training.part(training.places(REFERENCE)))
    names = list(dataset.class_names) if config.data.conditional else []
    labels = natural_labels(config, dataset, training.rows, num)

    def measure(model: Denoiser) -> Measured:
        pipeline = make_pipeline(model, config, names)
        drawn = draw_images(pipeline, config.sampling, range(num), labels, config.seed, machine.precision)
        return Measured(kernel_distance(network.features(torch.from_numpy(drawn)), real).estimate)

    about = {"num_samples": num, "num_reference": len(real), "features": network.name, "sampling": asdict(config.sampling)}
    return measure, {**about, "seed": config.seed, "classes": None if labels is None else CLASSES}


def _against(found: Measured, kept: Measured) -> dict[str, Any]:
    """The figure, and its difference to the average that training kept, on the same images."""
    plain = {"value": found.estimate.value, "interval": list(found.estimate[1:]), "difference": found.estimate.value - kept.estimate.value}
    if found.parts is None or kept.parts is None:
        return {**plain, "difference_interval": None}
    return {**plain, "difference_interval": list(bootstrap_mean(found.parts - kept.parts)[1:])}


# --- words ---

_HEAD = (
    f"{'sigma_rel':>10}  {'step':>8}  {'value':>9}  {'95 % interval':>17}  "  # of each
    f"{'against training':>16}  {'95 % interval':>19}  {'misfit':>6}"  # of an average made afterwards
)


def _line(name: str, step: int, point: dict[str, Any]) -> str:
    low, high = point["interval"]
    line = f"{name:>10}  {step:>8}  {point['value']:9.5f}  {low:8.5f} {high:8.5f}"
    if "difference" in point:
        span = "{:+9.5f} {:+9.5f}".format(*point["difference_interval"]) if point["difference_interval"] else ""
        line += f"  {point['difference']:+16.5f}  {span:>19}  {point['misfit']:6.1%}"
    return line


def _beats(best: dict[str, Any]) -> bool | None:
    """Whether the best is surely better than the average that training kept; None where no interval says so."""
    return None if best["difference_interval"] is None else best["difference_interval"][1] < 0


def _verdict(best: dict[str, Any], same_step: bool) -> str:
    if not same_step:
        return f"best: sigma_rel {best['sigma_rel']:g}; no checkpoint is of the same step, so whether training kept a better one is open"
    match _beats(best):
        case True:
            how = "better than"
        case False:
            how = "not surely better than"
        case None:
            how = "lower than" if best["difference"] < 0 else "no lower than"
    return f"best: sigma_rel {best['sigma_rel']:g}, {how} the average that training kept"
