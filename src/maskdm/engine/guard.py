"""Steps that went wrong: found on the device, without waiting for it, and not applied.

A step is bad whose loss or gradient norm is no number, or lies far above those of the stage's latest good steps: above `spike` times
their median, and out of their spread (by six times 1.4826 times the median absolute deviation, of the logarithms). The optimizer leaves
the weights and its moments as they are; the schedule, the counters and the place in the data go on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from maskdm.config import Guard

WINDOW, LEAST = 64, 16
"""Good steps remembered, and how few are too few to call another one far from them."""

DEVIATIONS = 6.0


class Sentry:
    """Judges steps. Its memory is on the device, and part of a run's state."""

    def __init__(self, settings: Guard, device: torch.device) -> None:
        self.settings = settings
        self._recent = torch.zeros(2, WINDOW, device=device)
        self._count = torch.zeros((), dtype=torch.int64, device=device)

    def restart(self) -> None:
        """Forget what is usual: a stage begins."""
        self._recent.zero_()
        self._count.zero_()

    @torch.no_grad()
    def judge(self, loss: Float[Tensor, ""], grad_norm: Float[Tensor, ""], overflows: bool = False) -> Bool[Tensor, ""]:
        """Whether a step is bad; one that is not is remembered.

        overflows: infinite gradients are ordinary, as in fp16, whose scaler sees to them.
        """
        values = torch.stack([loss, grad_norm]).float()
        finite = values.isfinite()
        logs = values.clamp(min=1e-30).log()
        bad = ~finite[0] if overflows else ~finite.all()
        if self.settings.spike is not None:
            known = torch.arange(WINDOW, device=logs.device) < self._count
            recent = torch.where(known, self._recent, torch.nan)
            median = recent.nanmedian(dim=1, keepdim=True).values
            spread = 1.4826 * (recent - median).abs().nanmedian(dim=1).values
            far = logs > median[:, 0] + (DEVIATIONS * spread).clamp(min=math.log(self.settings.spike))  # no tensor of it: that waits
            bad = bad | ((far & finite).any() & (self._count >= LEAST))
        keep = ~bad & finite.all()
        place = (self._count % WINDOW)[None]
        self._recent.index_copy_(1, place, torch.where(keep, logs, self._recent[:, place][:, 0])[:, None])
        self._count += keep
        return bad

    def tensors(self) -> dict[str, Tensor]:
        """What it remembers."""
        return {"recent": self._recent, "count": self._count}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue with what another remembered; with nothing where that was not kept."""
        self.restart()
        for name, mine in self.tensors().items() if tensors else ():
            mine.copy_(tensors[name])


def healthy(*states: Mapping[str, Tensor] | list[Tensor]) -> bool:
    """Whether every value of these weights is a number. Waits for the device."""
    tensors = [t for state in states for t in (state.values() if isinstance(state, Mapping) else state) if t.numel()]
    tensors = [t for t in tensors if t.is_floating_point()]
    if not tensors:  # a process may have no part of a small network
        return True
    norms: Any = torch._foreach_norm(tensors, float("inf"))  # pyright: ignore[reportPrivateUsage] - as torch's own clipping does
    return bool(torch.stack(list(norms)).isfinite().all())
