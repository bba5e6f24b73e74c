"""`maskdm plan`: what a run will take, from its arithmetic and a few measured steps of each stage, before it is begun."""

from __future__ import annotations

import gc
import json
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from maskdm.arithmetic import ideal_speedup, stage_flops
from maskdm.config import Budget, Config, Ema, NoMask, Stage
from maskdm.data import Dataset, make_loader
from maskdm.engine import (
    Machine,
    Ranks,
    Trainer,
    adapters,
    available_memory,
    give_back_freed_memory,
    matrix_ceiling,
    more_pieces,
    peak_memory,
    reset_peak_memory,
)
from maskdm.errors import UserError
from maskdm.evaluation.denoising import LEVELS
from maskdm.masking import num_kept
from maskdm.models import build
from maskdm.runs.display import Display
from maskdm.runs.latents import with_latents
from maskdm.runs.observe import GRID_COLUMNS, GRID_ROWS, STRIP_ROWS
from maskdm.runs.plan import describe_mask, plan_lines
from maskdm.runs.resolve import Resolved, TrainRequest, resolve
from maskdm.runs.train import prepare_data, set_up_torch
from maskdm.runs.watch import MEASURED

SECONDS, STEPS = 8.0, 12
"""A stage is measured for as many steps, or as long, whichever ends first; three steps at least."""
WARM = 2
ROOM = 0.85
"""Share of the memory there is that a step may take: a CPU's process is killed, not told, when there is none left."""
FEW_TOKENS, SOME_TOKENS, MANY_TOKENS = 64, 256, 1024
FEW_IMAGES = 300
LEAST_SPEEDUP = 1.2


@dataclass(frozen=True)
class StageForecast:
    """What a stage will take. Memory in bytes, at the peak of a step; speed-ups against whole images, in images per second."""

    name: str
    mask: str
    batch: int
    pieces: int
    kept: int
    steps: int
    images: int
    step_seconds: float
    seconds: float
    memory: int
    images_per_second: float
    share_of_ceiling: float
    speedup: float | None
    ideal_speedup: float | None


@dataclass(frozen=True)
class Forecast:
    """What a run will take. `seconds` is training alone, `other_seconds` about what evaluations, samples and saving add."""

    parameters: int
    flops: float
    tokens: int
    images: int
    stages: tuple[StageForecast, ...]
    seconds: float
    other_seconds: float
    memory: int
    memory_available: int
    disk: int
    cost: float | None
    advice: tuple[str, ...]


def plan(request: TrainRequest, price_per_hour: float | None, out: Path | None, display: Display) -> str:
    """Resolve a request as `train` does, measure, and say what the run will take. Raises UserError."""
    if price_per_hour is not None and price_per_hour < 0:
        raise UserError(f"--price-per-hour is {price_per_hour}; give 0 or more")
    if out is not None and out.is_dir():
        raise UserError(f"--out {out} is a directory; name a JSON file for the figures")
    resolved = resolve(request)
    display.heading(f"plan for {request.data}")
    for line in (*resolved.reasons, *plan_lines(resolved.config, resolved.machine)):
        display.note(f"  {line}")
    set_up_torch(resolved.config, resolved)
    config, dataset = with_latents(resolved.config, prepare_data(resolved, display), resolved.machine, Ranks(), display)
    found = forecast(replace(resolved, config=config), dataset, price_per_hour, display)
    if out is not None:
        write(found, out)
    return describe(found)


def forecast(resolved: Resolved, dataset: Dataset, price_per_hour: float | None, display: Display) -> Forecast:
    """Measure a few steps of each stage, and of whole images where no stage has them. Raises UserError where nothing fits."""
    config, machine = resolved.config, resolved.machine
    free = available_memory(machine.device)
    measured = [_measure(config, stage, dataset, machine, display) for stage in config.stages]
    whole = next((m for m, stage in zip(measured, config.stages, strict=True) if isinstance(stage.mask, NoMask)), None)
    if whole is None:
        masked = config.stages[0]
        batch = max(1, round(masked.batch / ideal_speedup(config, masked.mask)))
        probe = replace(masked, name="whole-images", mask=NoMask(), batch=batch, accumulate=1)
        whole = _measure(config, probe, dataset, machine, display)
    ceiling = matrix_ceiling(machine.device, machine.precision)
    stages = tuple(_stage(config, stage, found, whole, ceiling) for stage, found in zip(config.stages, measured, strict=True))
    seconds = sum(stage.seconds for stage in stages)
    other = _other_seconds(config, dataset, stages, whole)
    classes = len(dataset.class_names) if config.data.conditional else 0
    parameters = _parameters(config, classes)
    return Forecast(
        parameters=parameters,
        flops=sum(stage_flops(config, stage, found.images) for stage, found in zip(config.stages, stages, strict=True)),
        tokens=config.tokens,
        images=len(dataset),
        stages=stages,
        seconds=seconds,
        other_seconds=other,
        memory=max(stage.memory for stage in stages),
        memory_available=free,
        disk=_disk(config, parameters) + dataset.images.nbytes,
        cost=None if price_per_hour is None else (seconds + other) / 3600 * price_per_hour,
        advice=advise(config, len(dataset), stages),
    )


@dataclass(frozen=True)
class _Measured:
    step_seconds: float
    memory: int
    pieces: int
    batch: int

    @property
    def images_per_second(self) -> float:
        return self.batch / self.step_seconds


def _measure(config: Config, stage: Stage, dataset: Dataset, machine: Machine, display: Display) -> _Measured:
    """Steps of one stage as `train` would do them. On a CPU small pieces come first, to see whether the whole batch fits."""
    display.note(f"  measuring {stage.name}: {describe_mask(stage.mask)}, batch {stage.batch}")
    pieces = stage.accumulate
    if machine.device.type == "cpu":
        pieces = _pieces_that_fit(config, stage, dataset, machine)
    trainer = _trainer(config, replace(stage, accumulate=pieces), dataset, machine)
    steps = trainer.run()
    for _ in range(WARM):
        next(steps)
    reset_peak_memory(machine.device)
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 3 or (len(times) < STEPS and time.perf_counter() - began < SECONDS):
        started = time.perf_counter()
        float(next(steps).loss)  # a GPU's work is done when its result is here
        times.append(time.perf_counter() - started)
    memory, pieces = peak_memory(machine.device), trainer.progress.stages[0].pieces
    if machine.device.type == "cpu":  # training comes to map all of the images' file, of which these steps have seen little
        memory += max(0, dataset.images.nbytes - trainer.progress.images * dataset.images[:1].nbytes)
    del trainer, steps
    _forget(machine)
    return _Measured(statistics.median(times), memory, pieces, stage.batch)


def _pieces_that_fit(config: Config, stage: Stage, dataset: Dataset, machine: Machine) -> int:
    """Pieces to compute a batch in so that it fits, by a line through the peaks of two small batches."""
    small = max(1, stage.batch // 16)
    sizes = (small, min(stage.batch, 4 * small))
    if sizes[0] == sizes[1]:
        return stage.accumulate
    peaks: list[int] = []
    for size in sizes:
        trainer = _trainer(config, replace(stage, batch=size, accumulate=1), dataset, machine)
        reset_peak_memory(machine.device)
        next(trainer.run())
        peaks.append(peak_memory(machine.device))
        del trainer
        _forget(machine)
    per_image = max(0.0, (peaks[1] - peaks[0]) / (sizes[1] - sizes[0]))
    room, pieces = ROOM * available_memory(machine.device), stage.accumulate
    while peaks[0] + per_image * (stage.batch // pieces - sizes[0]) > room:
        if pieces >= stage.batch:
            need, have = (peaks[0] - per_image * (sizes[0] - 1)) / 2**30, room / 2**30
            raise UserError(
                f"stage {stage.name}: even one image at a time takes {need:.1f} GiB, and {have:.1f} are free; use a smaller --model.width"
            )
        pieces = more_pieces(stage.batch, pieces)
    return pieces


def _trainer(config: Config, stage: Stage, dataset: Dataset, machine: Machine) -> Trainer:
    alone = replace(config, stages=(replace(stage, budget=Budget(steps=10**9)),), init=None)
    model = build(config.model, config.data, len(dataset.class_names) if config.data.conditional else 0)
    if config.lora.rank:
        adapters.adapt(model, config.lora, ())
    rows, _ = dataset.split(config.data.heldout, config.seed, config.data.limit)
    return Trainer(alone, make_loader(dataset, rows, config.seed), model, machine.device, machine.precision)


def _forget(machine: Machine) -> None:
    gc.collect()
    give_back_freed_memory()
    if machine.device.type == "cuda":
        torch.cuda.empty_cache()


def _stage(config: Config, stage: Stage, found: _Measured, whole: _Measured, ceiling: float) -> StageForecast:
    budget, per_step = stage.budget, found.step_seconds
    limits = [
        None if budget.steps is None else budget.steps,
        None if budget.images is None else -(-budget.images // stage.batch),
        None if budget.minutes is None else -int(-budget.minutes * 60 // per_step),
    ]
    steps = max(1, min(limit for limit in limits if limit is not None))
    masked = not isinstance(stage.mask, NoMask)
    rate = found.images_per_second
    return StageForecast(
        name=stage.name,
        mask=describe_mask(stage.mask),
        batch=stage.batch,
        pieces=found.pieces,
        kept=num_kept(stage.mask, config.grid),
        steps=steps,
        images=steps * stage.batch,
        step_seconds=per_step,
        seconds=steps * per_step,
        memory=found.memory,
        images_per_second=rate,
        share_of_ceiling=rate * stage_flops(config, stage, 1) / ceiling,
        speedup=rate / whole.images_per_second if masked else None,
        ideal_speedup=ideal_speedup(config, stage.mask) if masked else None,
    )


def _parameters(config: Config, classes: int) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in build(config.model, config.data, classes).parameters())


def _other_seconds(config: Config, dataset: Dataset, stages: tuple[StageForecast, ...], whole: _Measured) -> float:
    """Evaluations of held-out and training images, and samples; a forward pass is a third of a step."""
    forward = 1 / whole.images_per_second / 3
    _, heldout = dataset.split(config.data.heldout, config.seed, config.data.limit)
    guided = 1.0 if config.sampling.guidance == 1 else 2.0
    if guided > 1 and config.sampling.guide == "path":
        guided = 1 + 2 * config.model.fuse / config.blocks
    evaluation = 2 * min(MEASURED, len(heldout)) * LEVELS * forward
    per_sample = config.sampling.steps * guided * forward
    evaluation += config.evaluation.samples * per_sample
    total = sum(stage.steps for stage in stages)
    every = config.intervals
    evaluations = (total // every.evaluate if every.evaluate else 0) + len(stages)
    grids = (total // every.sample if every.sample else 0) + len(stages)
    last = GRID_ROWS * GRID_COLUMNS + STRIP_ROWS
    return evaluations * evaluation + (grids * config.sampling.num + last) * per_sample


def _disk(config: Config, parameters: int) -> int:
    """Checkpoints (weights, average, two moments, the averages of snapshots), snapshots in half precision, the model."""
    ema: Ema = config.ema
    tensors = 4 + (len(ema.sigma_rel) if ema.snapshots else 0)
    checkpoints = (config.intervals.keep + len(config.stages)) * tensors * 4 * parameters
    return checkpoints + len(config.stages) * ema.snapshots * len(ema.sigma_rel) * 2 * parameters + 2 * 4 * parameters


def advise(config: Config, images: int, stages: tuple[StageForecast, ...]) -> tuple[str, ...]:
    """What to do, and why: rules from docs/experiments.md and docs/performance.md, with this run's figures."""
    tokens, lines = config.tokens, list[str]()
    masked = [stage for stage in stages if stage.speedup is not None]
    if not masked:
        if tokens >= SOME_TOKENS and images >= FEW_IMAGES:
            lines.append(
                f"masking could pay here: {tokens} tokens; begin with a stage of patch masking at {_ratio(tokens):.0%}, as the recipes do"
            )
        return (*lines, *_pieces_advice(stages))
    reasons: list[str] = []
    if tokens < FEW_TOKENS:
        reasons.append(f"an image has only {tokens} tokens, below {FEW_TOKENS} whole images have learnt as fast at equal time")
    if images < FEW_IMAGES:
        reasons.append(f"{images} images are few: a model learns them by heart before its steps get scarce")
    slow = min(stage.speedup or 0.0 for stage in masked)
    if slow < LEAST_SPEEDUP:
        reasons.append(f"a masked step here is only {slow:.2f}x faster")
    if reasons:
        finer = " or a smaller --patch (more patches)" if tokens < FEW_TOKENS and config.model.patch > 1 else ""
        flags = " ".join(f"--stages.{stage.name}.mask none" for stage in masked)
        lines.append(f"masking will not pay here: {'; '.join(reasons)}. Train on whole images alone ({flags}){finer}")
    for stage in masked:
        share = (stage.speedup or 0.0) / (stage.ideal_speedup or 1.0)
        if not reasons and share < 0.9:
            lines.append(
                f"stage {stage.name} reaches {share:.0%} of its ideal speed-up: {stage.batch} images of {stage.kept} patches do not fill "
                f"the machine; try --stages.{stage.name}.batch {_round_up(round(stage.batch / max(share, 0.25)))}"
            )
    if not reasons:
        ratio = _ratio(tokens)
        lines.append(
            f"recommended: patch masking at {ratio:.0%} for about half of the time, then whole images: {tokens} tokens"
            + (", where the paper finds its gain" if tokens >= MANY_TOKENS else "; more hidden has cost more than it saved below 1 024")
        )
    return (*lines, *_pieces_advice(stages))


def _pieces_advice(stages: tuple[StageForecast, ...]) -> tuple[str, ...]:
    return tuple(
        f"stage {stage.name} does not fit at once: {stage.pieces} pieces of {stage.batch // stage.pieces} images "
        f"(--stages.{stage.name}.accumulate {stage.pieces})"
        for stage in stages
        if stage.pieces > 1
    )


def _ratio(tokens: int) -> float:
    return 0.75 if tokens >= MANY_TOKENS else 0.5


def _round_up(batch: int) -> int:
    return -(-batch // 8) * 8


def describe(found: Forecast) -> str:
    """The forecast in lines."""
    lines = [
        f"parameters {found.parameters / 1e6:.1f} M, {found.images} images of {found.tokens} tokens, {found.flops:.2e} FLOP of training"
    ]
    for stage in found.stages:
        pieces = f" in {stage.pieces} pieces" if stage.pieces > 1 else ""
        speed = ""
        if stage.speedup is not None and stage.ideal_speedup is not None:
            share = stage.speedup / stage.ideal_speedup
            speed = f", {stage.speedup:.2f}x the images of whole ones ({share:.0%} of the ideal {stage.ideal_speedup:.2f}x)"
        lines.append(
            f"stage {stage.name}: mask {stage.mask}, batch {stage.batch}{pieces}: {1 / stage.step_seconds:.3g} steps/s, "
            f"{stage.images_per_second:.0f} images/s, {stage.share_of_ceiling:.0%} of the machine's ceiling{speed}"
        )
        lines.append(f"    {stage.steps} steps, {stage.images} images: {_duration(stage.seconds)}; memory {stage.memory / 2**30:.2f} GiB")
    cost = "" if found.cost is None else f"; cost {found.cost:.2f}"
    lines.append(f"in all {_duration(found.seconds)} of training, about {_duration(found.other_seconds)} of evaluations and samples{cost}")
    lines.append(
        f"memory {found.memory / 2**30:.2f} GiB of {found.memory_available / 2**30:.1f} GiB available; disk {found.disk / 2**30:.2f} GiB"
    )
    return "\n".join([*lines, *found.advice])


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def write(found: Forecast, path: Path) -> None:
    """The forecast as JSON."""
    record: dict[str, Any] = asdict(found)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
