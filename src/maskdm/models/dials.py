"""Numbers told a network as a condition beside the time: guidance scale, number of sampling steps."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from maskdm.models.layers import sinusoidal

FEATURES = 256


class Dial(nn.Module):
    """Fourier features of a number through a linear layer that starts at zero: a network given one begins as it was without."""

    def __init__(self, width: int, low: float, high: float) -> None:
        super().__init__()
        self.low, self.high = low, high
        self.layer = nn.Linear(FEATURES, width)

    def start(self) -> None:
        """Initialise."""
        nn.init.zeros_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)

    def forward(self, values: Float[Tensor, " batch"]) -> Float[Tensor, "batch width"]:
        """What is added to the embedding of the time. Values beyond the range count as its end."""
        share = (values.clamp(self.low, self.high) - self.low) / (self.high - self.low)
        return self.layer(sinusoidal(1000 * share, FEATURES))


def as_batch(value: Tensor | float, like: Tensor) -> Float[Tensor, " batch"]:
    """A number for each of a batch such as `like`, from one for all or for each."""
    # a number is filled in on the device: a copy of it would wait
    every = value.float() if isinstance(value, Tensor) else torch.full((), value, dtype=torch.float32, device=like.device)
    return every.to(like.device).expand(like.shape[0])


def make_dials(width: int, dial: Any, shortcuts: int) -> tuple[Dial | None, Dial | None]:
    """Of the guidance scale in a range, and of the logarithm of the number of steps from the most, `shortcuts`, down to one."""
    of_scale = None if dial is None else Dial(width, float(dial[0]), float(dial[1]))
    steps = math.log2(max(1, shortcuts))
    return of_scale, Dial(width, 0.0, steps) if shortcuts else None
