"""Where things are kept: the cache of decoded images, a run's checkpoints, its model folder."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import maskdm
from maskdm.config import Config, Hardware
from maskdm.data import cache_directory as cache_directory
from maskdm.engine import Trainer, adapters, checkpoint, sharding, snapshots, this_machine
from maskdm.errors import UserError, nearest
from maskdm.models import Denoiser, build, open_autoencoder
from maskdm.runs.directory import RunDirectory, Weights
from maskdm.sampling import make_scheduler


def latest_checkpoint(run: RunDirectory) -> Path | None:
    """A run's newest checkpoint."""
    found = checkpoint.names(run.checkpoints)
    return run.checkpoints / found[-1] if found else None


def checkpoint_name(trainer: Trainer, ends: str | None) -> str:
    """Of the trainer's step; `ends`: the stage that it has ended."""
    return f"step-{trainer.progress.step:08}" + (f"-{ends}" if ends else "")


def checkpoint_numbers(trainer: Trainer, meter: Mapping[str, Any]) -> dict[str, Any]:
    """The plain values of a checkpoint."""
    return {**trainer.numbers(), "meter": dict(meter)}


def load_state(trainer: Trainer, run: RunDirectory) -> tuple[checkpoint.Checkpoint | None, list[checkpoint.Damaged]]:
    """The newest whole checkpoint of a run, as `checkpoint.load_latest`; of one that is cut, for a trainer that is, its process's part."""
    saved, wrong = trainer.ranks.after_first(lambda: checkpoint.load_latest(run.checkpoints, parts=trainer.cut))
    if saved is not None and saved.cut and trainer.cut:
        saved = replace(saved, tensors=sharding.read(saved.path, trainer.template()))
    return saved, wrong


def save_checkpoint(run: RunDirectory, trainer: Trainer, meter: Mapping[str, Any], ends: str | None) -> Path:
    """Write the trainer's state; the end of a stage under a name that is not rotated away."""
    path = checkpoint.save(run.checkpoints, checkpoint_name(trainer, ends), trainer.tensors(), checkpoint_numbers(trainer, meter))
    checkpoint.rotate(run.checkpoints, trainer.config.intervals.keep)
    return path


def class_names(path: Path) -> list[str]:
    """Names of the classes that a run's network knows; none where it is unconditional."""
    run = RunDirectory.existing(path)
    try:
        return run.info()["data"]["classes"]
    except (KeyError, TypeError):
        raise UserError(f"{run.run_file} is damaged: it names no classes; restore it or train into a new directory") from None


def load_denoiser(path: Path, weights: Weights) -> tuple[Denoiser, dict[str, Tensor], str]:
    """A run's network, its weights (as trained or averaged) from its latest checkpoint, and where they came from.

    Raises UserError where there is no run, no checkpoint, or a damaged one.
    """
    run = RunDirectory.existing(path)
    config = run.config()
    model = build(config.model, config.data, len(class_names(path)))
    latest = latest_checkpoint(run)
    if latest is None:
        raise UserError(f"{path} has no checkpoint yet; train it first")
    if weights == "best":
        if not run.best.is_dir():
            raise UserError(f"{path} has no best weights: nothing was evaluated while it trained; use its averaged ones")
        best = checkpoint.load(run.best)
        step, measure, value = (best.numbers[key] for key in ("step", "measure", "value"))
        return model, whole_weights(run, best.tensors["average"]), f"{run.best} (averaged, at step {step}, {measure} {value:.5g})"
    saved = checkpoint.load(latest)
    name, words = ("average", "averaged") if weights == "ema" else ("model", "as trained")
    return model, whole_weights(run, saved.tensors[name]), f"{latest} ({words})"


def whole_weights(run: RunDirectory, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a run's plain network, of what is kept of them: of adapters with what they adapt."""
    lora = run.config().lora
    return weights if not lora.rank else adapters.merged(checkpoint.load(run.base).tensors["weights"] | weights, lora)


def save_best(run: RunDirectory, trainer: Trainer, averaged: Mapping[str, Tensor], measure: str, value: float) -> None:
    """Keep the averaged weights as the best so far."""
    numbers = {"step": trainer.progress.step, "measure": measure, "value": value}
    checkpoint.save(run.path, run.best.name, {"average": averaged}, numbers)


def state_hash(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over the names and values of a state."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def stage_snapshots(path: Path, stage: str | None = None) -> tuple[str, dict[Path, snapshots.Snapshot]]:
    """The name and the snapshots of a run's stage, by default the last that has any. Raises UserError where there are none."""
    run = RunDirectory.existing(path)
    names = [each.name for each in run.config().stages]
    if stage is not None and stage not in names:
        raise UserError(f"--stage '{stage}' is no stage of {path}, which has {', '.join(names)}{nearest(stage, names)}")
    for name in [stage] if stage else reversed(names):
        found = snapshots.found(run.snapshots / name)
        if found:
            return name, found
    where = f"stage {stage} of {path}" if stage else f"{path}"
    raise UserError(
        f"{where} has no snapshots of averages; train with --ema.snapshots 8 (a stage) to choose the average's length afterwards"
    )


def reconstruct_ema(path: Path, sigma_rel: float, stage: str | None = None) -> tuple[dict[str, Tensor], str]:
    """The weights of a run averaged over a length of `sigma_rel` at a stage's last snapshot, and where they came from.

    Raises UserError where there is no run or no snapshot, for a damaged one, and for a length that no average has.
    """
    run = RunDirectory.existing(path)
    name, stored = stage_snapshots(path, stage)
    weights, fit = snapshots.average(stored, sigma_rel)
    latest = max(each.step for each in stored.values())
    count = f"{len(stored)} snapshot{'s' if len(stored) > 1 else ''}"
    return (
        whole_weights(run, weights),
        f"{path / 'snapshots' / name} (average of sigma_rel {sigma_rel:g} at step {latest}, from {count}, off by {fit.misfit:.1%})",
    )


def make_pipeline(model: Denoiser, config: Config, class_names: list[str]) -> maskdm.MaskDMPipeline:
    """A pipeline with the run's scheduler around a network."""
    scheduler = make_scheduler(config.sampling.scheduler, config.diffusion.schedule, config.diffusion.target)
    data, diffusion = config.data, config.diffusion
    vae = None if data.autoencoder is None else open_autoencoder(data.autoencoder).to(model.device)
    latents = (vae, list(data.latent_mean), list(data.latent_std))
    pipeline = maskdm.MaskDMPipeline(model, scheduler, diffusion.target, diffusion.schedule, class_names, *latents)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_pipeline(pipeline: maskdm.MaskDMPipeline, folder: Path) -> None:
    """Write the model folder under another name, then put it in place."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipeline.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def load_pipeline(path: Path, weights: Weights = "ema", sigma_rel: float | None = None) -> tuple[maskdm.MaskDMPipeline, str]:
    """The pipeline of a run on this machine's device, and whence its weights.

    They are those of its latest checkpoint or the best ones, or averaged over `sigma_rel` at its last snapshot.
    """
    config = RunDirectory.existing(path).config()
    model, state, origin = load_denoiser(path, weights)
    if sigma_rel is not None and weights != "ema":
        raise UserError(f"--weights {weights} and --ema {sigma_rel:g} both given; name one")
    if sigma_rel is not None:
        state, origin = reconstruct_ema(path, sigma_rel)
    model.load_state_dict(state)
    machine = this_machine(Hardware())
    torch.set_num_threads(machine.cores)
    pipeline = make_pipeline(model.eval(), config, class_names(path))
    pipeline.to(machine.device)
    return pipeline, origin
