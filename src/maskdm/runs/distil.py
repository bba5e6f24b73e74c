"""`maskdm distil`: a run that learns to sample as another one does, in fewer evaluations."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from maskdm.errors import UserError
from maskdm.recipes.distil import Method, Plan, distil
from maskdm.runs.directory import RunDirectory
from maskdm.runs.display import Display
from maskdm.runs.resolve import Assignments, TrainRequest
from maskdm.runs.train import train


@dataclass(frozen=True)
class DistilRequest:
    """What `maskdm distil` was asked for. updates: optimizer steps in all; None: as many as the teacher took."""

    run: Path
    out: Path
    steps: int = 32
    end: int = 1
    scales: str | None = None
    method: Method = "halve"
    updates: int | None = None
    mask: str | None = None
    data: str | None = None
    settings: Assignments = ()
    dry_run: bool = False
    fork: bool = False


def distil_run(request: DistilRequest, command: str, display: Display) -> str:
    """Distil, or resume, by the same trainer as any run; returns what to print. Raises UserError, Diverged, Interrupted."""
    run = RunDirectory.existing(request.run)
    teacher = run.config()
    updates = sum(int(stage["steps"]) for stage in run.info()["stages"]) if request.updates is None else request.updates
    scales = None if request.scales is None else parse_scales(request.scales)
    plan = Plan(request.steps, request.end, scales, request.method, updates, request.mask)
    config, reasons = distil(teacher, str(request.run), plan)
    data = request.data or teacher.data.source
    asked = TrainRequest(data, request.out, None, None, request.settings, request.dry_run, request.fork, config, reasons)
    return train(asked, command, display)


def parse_scales(text: str) -> tuple[float, float]:
    """A range of guidance scales from "1,4". Raises UserError."""
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        low = high = math.nan
    if not 0 <= low <= 1 <= high < math.inf or low == high:
        raise UserError(f"--scales is '{text}'; give the least and the largest guidance scale, 1 (none) among them, such as 1,4")
    return low, high
