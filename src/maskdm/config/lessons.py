"""What a stage learns: images, or from a teacher, the network that the stage before has left (docs/distillation.md)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from maskdm.config.check import require


@dataclass(frozen=True)
class Denoise:
    """Images: ordinary denoising score matching."""

    kind: ClassVar[str] = "denoise"


@dataclass(frozen=True)
class Convert:
    """Images too, from weights that were trained for another target: eps models predict v from here on."""

    kind: ClassVar[str] = "convert"


@dataclass(frozen=True)
class Guided:
    """The teacher under classifier-free guidance, in one evaluation; the scale is a condition, `model.dial` (arXiv 2210.03142)."""

    kind: ClassVar[str] = "guided"


@dataclass(frozen=True)
class Halve:
    """Two DDIM steps of the teacher in one, the network to be sampled in so many (arXiv 2202.00512)."""

    kind: ClassVar[str] = "halve"
    steps: Annotated[int, "sampling steps that are left after the stage; the teacher takes twice as many"] = 16

    def __post_init__(self) -> None:
        require(1 <= self.steps <= 500, f"lesson.steps is {self.steps}; give 1 to 500")


@dataclass(frozen=True)
class Shortcut:
    """All numbers of steps at once, the number a condition, `model.shortcuts`: a quarter of each batch learns two of the network's own
    averaged steps in one, the rest the teacher (arXiv 2410.12557, with a teacher in place of the data)."""

    kind: ClassVar[str] = "shortcut"
    steps: Annotated[int, "fewest sampling steps that are learned; model.shortcuts is a power of two times as many"] = 1

    def __post_init__(self) -> None:
        require(1 <= self.steps <= 500, f"lesson.steps is {self.steps}; give 1 to 500")


Lesson = Denoise | Convert | Guided | Halve | Shortcut

DENOISE = Denoise()


def is_halved(steps: int, end: int) -> bool:
    """Whether halving leads from one number of steps to the other."""
    while steps > end and steps % 2 == 0:
        steps //= 2
    return steps == end
