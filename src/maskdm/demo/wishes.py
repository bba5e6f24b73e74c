"""What may be asked of the demo, and within which bounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

from maskdm.config import SCHEDULERS, SchedulerName
from maskdm.errors import UserError, nearest, shorten

MOST_IMAGES, MOST_STEPS, MOST_GUIDANCE = 64, 1000, 100.0

MOST_SEED = 2**63 - 1

KINDS: dict[str, tuple[type, ...]] = {
    "model": (str,), "num": (int,), "labels": (list,), "seed": (int,), "steps": (int,), "scheduler": (str,), "guidance": (int, float),
}  # fmt: skip
WORDS = {str: "a text", int: "a whole number", list: "a list of classes, by name or number", float: "a number"}


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
            raise UserError(f"num is {_short(self.num)}; give 1 to {MOST_IMAGES} images")
        if not 0 <= self.seed <= MOST_SEED:
            raise UserError(f"seed is {_short(self.seed)}; give a whole number from 0 to 2^63 - 1")
        if self.steps is not None and not 1 <= self.steps <= MOST_STEPS:
            raise UserError(f"steps is {_short(self.steps)}; give 1 to {MOST_STEPS}")
        if self.scheduler is not None and self.scheduler not in SCHEDULERS:
            name = shorten(self.scheduler, 40)
            raise UserError(f"scheduler '{name}' is none of {', '.join(SCHEDULERS)}{nearest(name, list(SCHEDULERS))}")
        if self.guidance is not None and not 0 <= self.guidance <= MOST_GUIDANCE:  # nor is what is no number
            raise UserError(f"guidance is {_short(self.guidance)}; give 0 to {MOST_GUIDANCE:g}, 1 for none")
        if len(self.labels) > MOST_IMAGES or any(len(each) > 200 for each in self.labels):
            raise UserError(f"labels are too many or too long; give at most {MOST_IMAGES} classes, or mixtures such as 3:0.7+8:0.3")

    @property
    def scheduler_name(self) -> SchedulerName | None:
        """The scheduler."""
        return next((name for name in get_args(SchedulerName) if name == self.scheduler), None)


def wish_of(given: dict[str, Any]) -> Wish:
    """What strangers ask for, as JSON has it; None: left out. Raises UserError, in one sentence."""
    values: dict[str, Any] = {}
    for key, value in given.items():
        if key not in KINDS:
            raise UserError(f"'{key[:100]}' is no field; there are {', '.join(KINDS)}{nearest(key[:100], list(KINDS))}")
        if value is not None:
            values[key] = checked(value, key, *KINDS[key])
    if "labels" in values:
        if any(isinstance(each, bool) or not isinstance(each, str | int) for each in values["labels"]):
            raise UserError(f"labels is not {WORDS[list]}")
        values["labels"] = tuple(str(each) for each in values["labels"])
    if "guidance" in values:
        try:
            values["guidance"] = float(values["guidance"])
        except OverflowError:  # whole numbers have no end
            values["guidance"] = float("inf")
    return Wish(**values)


def checked(value: Any, name: str, *kinds: type) -> Any:
    """A value that is of one of these kinds; true and false are no numbers. Raises UserError."""
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise UserError(f"{name} is not {WORDS[kinds[-1]]}")
    return value


def _short(number: Any) -> str:
    return shorten(str(number), 24)
