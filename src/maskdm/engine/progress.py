"""What is known of a run's progress: how far it is, and what became of its steps."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from maskdm.config import Budget, Stage


@dataclass
class StageProgress:
    """What a stage has done: optimizer steps, training images, seconds inside steps; and whether it was ended before its budget.

    `terms`: the budget and patience under which it was ended; under others it goes on. `pieces`: what its batches are
    computed in, more than `asked` for where memory ran out; 0: it has not begun.
    """

    steps: int = 0
    images: int = 0
    seconds: float = 0.0
    ended: bool = False
    terms: dict[str, Any] | None = None
    pieces: int = 0
    asked: int = 0
    probes: list[dict[str, float]] = field(default_factory=list[dict[str, float]])

    def probed(self, what: Literal["steps", "images", "seconds", "taken"]) -> float:
        """What probes have spent of the stage's budget, in its own steps and images (`switch`); taken: the steps that they are of."""
        return float(sum(probe.get(what, 0.0) for probe in self.probes))

    def share(self, budget: Budget) -> float:
        """Part of the budget used up, 0..1: that of the limit nearest to its end."""
        used = (
            (self.steps + self.probed("steps"), budget.steps),
            (self.images + self.probed("images"), budget.images),
            ((self.seconds + self.probed("seconds")) / 60, budget.minutes),
        )
        return min(1.0, max(done / limit for done, limit in used if limit is not None))

    def course(self, budget: Budget) -> float:
        """How far the learning rate's course has run: by steps and images where they are limited, so that no clock disturbs it."""
        timeless = Budget(budget.steps, budget.images) if budget.steps or budget.images else budget
        return self.share(timeless)


@dataclass
class Progress:
    """Where a run stands. `stage` counts up to the number of stages; `images` is the place in the data.

    `detours` counts how often the run has gone back to a checkpoint, each time for another order of images and other draws; `returns`, how
    often to the one of step `returned_to`.
    """

    stage: int = 0
    step: int = 0
    images: int = 0
    detours: int = 0
    returns: int = 0
    returned_to: int = 0
    stages: list[StageProgress] = field(default_factory=list[StageProgress])

    @property
    def seconds(self) -> float:
        """Seconds of training so far; evaluation, sampling and saving are not counted."""
        return sum(stage.seconds + stage.probed("seconds") for stage in self.stages)


@dataclass(frozen=True)
class Step:
    """One optimizer step. Tensors are scalars left on the device, so that reading them is the caller's choice.

    bad: whether the step went wrong, and was not applied.
    data_seconds: of the run so far, waiting for images. pieces: micro-batches that the batch was computed in.
    """

    number: int
    stage: Stage
    stage_step: int
    share: float
    loss: Tensor
    grad_norm: Tensor
    bad: Tensor
    lr: float
    images: int
    seconds: float
    data_seconds: float
    pieces: int
    ends_stage: bool


@dataclass(frozen=True)
class Skipped:
    """A step that was not applied: its loss and gradient norm, and the batch, by the images' rows and their times (0..1 or 0..1000)."""

    number: int
    stage: str
    loss: float
    grad_norm: float
    rows: list[int]
    times: list[float]


@dataclass(frozen=True)
class Verdict:
    """What is known of a step on the device, and where its batch is from: the position, in all and within the stage."""

    bad: Tensor
    loss: Tensor
    grad_norm: Tensor
    told: Tensor | None
    number: int
    position: int
    within: int
    stage: Stage
    done: StageProgress

    def on_its_way(self) -> Verdict:
        """Its figures on the host as soon as the device has them: nobody waits."""
        figures = torch.stack([self.bad.float(), self.loss.float(), self.grad_norm.float()])
        figures = figures if self.told is None else torch.cat([figures, self.told])
        found = torch.empty(len(figures), pin_memory=True)
        found.copy_(figures, non_blocking=True)
        return replace(self, bad=found[0], loss=found[1], grad_norm=found[2], told=None if self.told is None else found[3:])
