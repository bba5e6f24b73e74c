"""Where things are kept: the cache of decoded images, a run's checkpoints, its model folder."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from maskdm.config import Config, Hardware
from maskdm.engine import Trainer, checkpoint, this_machine
from maskdm.errors import UserError
from maskdm.models import Denoiser, build
from maskdm.runs.directory import RunDirectory, Weights
from maskdm.sampling import MaskDMPipeline, make_scheduler


def cache_directory() -> Path:
    """Where decoded images and feature networks are kept: $MASKDM_CACHE, or maskdm in the user's cache directory."""
    given = os.environ.get("MASKDM_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "maskdm"


def latest_checkpoint(run: RunDirectory) -> Path | None:
    """A run's newest checkpoint."""
    found = checkpoint.names(run.checkpoints)
    return run.checkpoints / found[-1] if found else None


def save_checkpoint(run: RunDirectory, trainer: Trainer, meter: Mapping[str, float], ends: str | None) -> Path:
    """Write the trainer's state; the end of a stage under a name that is not rotated away."""
    name = f"step-{trainer.progress.step:08}" + (f"-{ends}" if ends else "")
    path = checkpoint.save(run.checkpoints, name, trainer.tensors(), {**trainer.numbers(), "meter": dict(meter)})
    checkpoint.rotate(run.checkpoints, trainer.config.intervals.keep)
    return path


def class_names(path: Path) -> list[str]:
    """Names of the classes that a run's network knows; none where it is unconditional."""
    return RunDirectory.existing(path).info()["data"]["classes"]


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
        return model, best.tensors["average"], f"{run.best} (averaged, at step {step}, {measure} {value:.5g})"
    saved = checkpoint.load(latest)
    name, words = ("average", "averaged") if weights == "ema" else ("model", "as trained")
    return model, saved.tensors[name], f"{latest} ({words})"


def save_best(run: RunDirectory, trainer: Trainer, measure: str, value: float) -> None:
    """Keep the averaged weights as the best so far."""
    numbers = {"step": trainer.progress.step, "measure": measure, "value": value}
    checkpoint.save(run.path, run.best.name, {"average": trainer.average.model.state_dict()}, numbers)


def state_hash(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over the names and values of a state."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def make_pipeline(model: Denoiser, config: Config, class_names: list[str]) -> MaskDMPipeline:
    """A pipeline with the run's scheduler around a network."""
    scheduler = make_scheduler(config.sampling.scheduler, config.diffusion.schedule, config.diffusion.target)
    pipeline = MaskDMPipeline(model, scheduler, config.diffusion.target, config.diffusion.schedule, class_names)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_pipeline(pipeline: MaskDMPipeline, folder: Path) -> None:
    """Write the model folder under another name, then put it in place."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipeline.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def load_pipeline(path: Path, weights: Weights = "ema") -> tuple[MaskDMPipeline, str]:
    """The pipeline of a run, with weights of its latest checkpoint or the best ones, on this machine's device; and whence."""
    config = RunDirectory.existing(path).config()
    model, state, origin = load_denoiser(path, weights)
    model.load_state_dict(state)
    machine = this_machine(Hardware())
    torch.set_num_threads(machine.cores)
    pipeline = make_pipeline(model.eval(), config, class_names(path))
    pipeline.to(machine.device)
    return pipeline, origin
