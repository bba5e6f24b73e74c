"""Held-out whole-image loss by noise level: the measure in which stages, masks and targets can be compared."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from maskdm.config import Diffusion
from maskdm.data import to_model_range
from maskdm.diffusion import NUM_STEPS, add_noise, convert
from maskdm.draws import derive
from maskdm.models import Denoiser

LEVELS = 8


@dataclass(frozen=True)
class HeldoutLoss:
    """Mean squared error of the noise, per element: `loss` over all levels, `levels` as (t, loss) pairs."""

    loss: float
    levels: tuple[tuple[float, float], ...]


@torch.no_grad()
def heldout_loss(
    model: Denoiser,
    diffusion: Diffusion,
    images: UInt8[Tensor, "batch channels height width"],
    labels: Int[Tensor, " batch"] | None,
    batch: int = 128,
) -> HeldoutLoss:
    """The error of the predicted noise (whatever the target) on whole images, at eight evenly spaced times.

    Noise is the same at every call, so that two measurements differ by the model alone. Images on the model's device.
    """
    errors = torch.zeros(LEVELS, dtype=torch.float64)
    times = [(level + 0.5) * NUM_STEPS / LEVELS for level in range(LEVELS)]
    for start in range(0, len(images), batch):
        x0 = to_model_range(images[start : start + batch])
        generator = torch.Generator().manual_seed(derive("heldout", start))
        eps = torch.randn(x0.shape, generator=generator).to(x0.device)
        for level, time in enumerate(times):
            t = torch.full((len(x0),), time, device=x0.device)
            x_t = add_noise(diffusion, x0, eps, t).x_t
            output = model(x_t, t, None if labels is None else labels[start : start + batch]).sample.float()
            predicted = convert(diffusion.schedule, diffusion.target, output, x_t, t).eps
            errors[level] += (predicted - eps).square().mean(dim=(1, 2, 3)).sum().cpu()
    errors /= len(images)
    return HeldoutLoss(float(errors.mean()), tuple(zip(times, errors.tolist(), strict=True)))
