"""What may be asked of the demo, and within which bounds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_args

from maskdm.config import SCHEDULERS, SchedulerName
from maskdm.errors import UserError, nearest, shorten

MOST_IMAGES, MOST_STEPS, MOST_GUIDANCE = 64, 1000, 100.0

MOST_SEED = 2**63 - 1


@dataclass(frozen=True)
class Wish:
    """Images to draw, as `maskdm sample` would. model None: the first; others None: as the run's own settings have it.

    Raises UserError, in one sentence, for what is out of bounds.
    """

    model: str | None = None
    num: int = 4
    labels: tuple[str, ...] = ()
    seed: int = 0
    steps: int | None = None
    scheduler: str | None = None
    guidance: float | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.num <= MOST_IMAGES:
            raise UserError(f"num is {self.num}; give 1 to {MOST_IMAGES} images")
        if not 0 <= self.seed <= MOST_SEED:
            raise UserError(f"seed is {self.seed}; give a whole number from 0 to 2^63 - 1")
        if self.steps is not None and not 1 <= self.steps <= MOST_STEPS:
            raise UserError(f"steps is {self.steps}; give 1 to {MOST_STEPS}")
        if self.scheduler is not None and self.scheduler not in SCHEDULERS:
            name = shorten(self.scheduler, 40)
            raise UserError(f"scheduler '{name}' is none of {', '.join(SCHEDULERS)}{nearest(name, list(SCHEDULERS))}")
        if self.guidance is not None and not (math.isfinite(self.guidance) and 0 <= self.guidance <= MOST_GUIDANCE):
            raise UserError(f"guidance is {self.guidance:g}; give 0 to {MOST_GUIDANCE:g}, 1 for none")
        if len(self.labels) > MOST_IMAGES or any(len(each) > 200 for each in self.labels):
            raise UserError(f"labels are too many or too long; give at most {MOST_IMAGES} classes, or mixtures such as 3:0.7+8:0.3")

    @property
    def scheduler_name(self) -> SchedulerName | None:
        """The scheduler."""
        return next((name for name in get_args(SchedulerName) if name == self.scheduler), None)
