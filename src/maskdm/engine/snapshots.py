"""Snapshots of a stage's power-function averages: small files on disk, from which an average of any length is made.

A file holds the averages of one moment in fp16 (docs/experiments.md: its rounding shows in no loss), named by the run's step. It is
written under another name, synced and renamed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from maskdm.engine.checkpoint import save_tensors, sync
from maskdm.engine.optim import PowerAverages
from maskdm.engine.posthoc import Fit, Profile, fit, gamma_of, reconstruct
from maskdm.errors import UserError


@dataclass(frozen=True)
class Snapshot:
    """One file: `step` of the run, `stage_step`, and the averages' lengths and time, counted from the step at which they began."""

    step: int
    stage_step: int
    began: int
    time: int
    sigma_rel: tuple[float, ...]


def save(folder: Path, averages: PowerAverages, step: int, stage_step: int, whole: Mapping[str, Tensor] | None = None) -> Path:
    """Write the averages into a stage's folder. whole: their tensors, where they are cut over processes."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08}.safetensors"
    partial = folder / f".{path.name}.partial"
    about = Snapshot(step, stage_step, averages.began, averages.time, averages.sigma_rel)
    tensors = {name: value.to(torch.float16).contiguous().cpu() for name, value in (whole or averages.tensors()).items()}
    save_tensors(tensors, partial, {"snapshot": json.dumps(asdict(about))})
    os.replace(partial, path)
    sync(folder)
    return path


def found(folder: Path) -> dict[Path, Snapshot]:
    """The snapshots of a stage that share the beginning of the latest, oldest first. Raises UserError naming a damaged one."""
    known = {path: _about(path) for path in sorted(folder.glob("step-*.safetensors"), key=_step)}
    latest = next(reversed(known.values()), None)
    return {path: each for path, each in known.items() if latest is not None and each.began == latest.began}


def forget_after(root: Path, step: int) -> None:
    """Delete the snapshots of steps after `step`, in the folders of all stages, which a resumed run does again; and cut ones."""
    for path in root.glob("*/.step-*.partial"):
        path.unlink()
    for path in root.glob("*/step-*.safetensors"):
        if _step(path) > step:
            path.unlink()


def average(stored: dict[Path, Snapshot], sigma_rel: float) -> tuple[dict[str, Tensor], Fit]:
    """The average of this length at the time of the latest of the snapshots, and how well its profile is met.

    Raises UserError for a length that no average has, and for a damaged file.
    """
    latest = max(each.time for each in stored.values())
    profiles = [Profile(each.time, gamma_of(width)) for each in stored.values() for width in each.sigma_rel]
    best = fit(profiles, Profile(latest, gamma_of(sigma_rel)))
    return reconstruct(_each(stored), best.coefficients), best


def _each(stored: dict[Path, Snapshot]) -> Iterator[dict[str, Tensor]]:
    """The averages, one in memory at a time, in the order of `average`'s profiles."""
    for path, about in stored.items():
        for width in about.sigma_rel:
            try:
                with safe_open(path, "pt") as file:
                    named = {name: name.removeprefix(f"{width}/") for name in file.keys()}  # noqa: SIM118 - a file, not a dictionary
                    yield {short: file.get_tensor(name) for name, short in named.items() if short != name}
            except (OSError, SafetensorError) as error:
                raise _damaged(path, error) from None


def _about(path: Path) -> Snapshot:
    try:
        with safe_open(path, "pt") as file:
            plain: dict[str, Any] = json.loads(file.metadata()["snapshot"])
        return Snapshot(plain["step"], plain["stage_step"], plain["began"], plain["time"], tuple(plain["sigma_rel"]))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"snapshot {path} cannot be read ({error}); delete it to do without")


def _step(path: Path) -> int:
    digits = path.stem.partition("-")[2]
    return int(digits) if digits.isdigit() else -1
