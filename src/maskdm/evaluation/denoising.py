"""Whole-image denoising loss by noise level: the measure in which stages, masks and targets can be compared, and overfitting shows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from maskdm.config import Diffusion
from maskdm.data import to_model_range
from maskdm.diffusion import NUM_STEPS, add_noise, convert
from maskdm.draws import derive
from maskdm.evaluation.intervals import bootstrap_difference
from maskdm.models import Denoiser

LEVELS = 8

COST = LEVELS / 3
"""Images to train on for the arithmetic of measuring one: a forward pass at each level, and none backward."""

BATCH = 128
TIMES = tuple((level + 0.5) * NUM_STEPS / LEVELS for level in range(LEVELS))


@dataclass(frozen=True)
class DenoisingLoss:
    """Mean squared error of the noise, per element, of each image at each of the times [n, levels]."""

    errors: Float[Tensor, "n levels"]

    @property
    def loss(self) -> float:
        """Over all images and levels."""
        return float(self.errors.mean())

    @property
    def levels(self) -> list[dict[str, float]]:
        """By noise level, ready for JSON."""
        return [{"t": t, "loss": loss} for t, loss in zip(TIMES, self.errors.mean(dim=0).tolist(), strict=True)]


@torch.no_grad()
def denoising_loss(
    model: Denoiser,
    diffusion: Diffusion,
    images: UInt8[Tensor, "batch channels height width"] | Float[Tensor, "batch channels height width"],
    labels: Int[Tensor, " batch"] | None,
    batch: int = BATCH,
    first: int = 0,
) -> DenoisingLoss:
    """The error of the predicted noise (whatever the target) on whole images, at eight evenly spaced times.

    Noise is the same at every call, so that two measurements differ by the model alone. Images on the model's device. first: where these
    images stand among more, of which another process measures the rest; a multiple of `batch`.
    """
    parts: list[Tensor] = []
    for start in range(0, len(images), batch):
        x0 = to_model_range(images[start : start + batch])
        generator = torch.Generator().manual_seed(derive("heldout", first + start))
        eps = torch.randn(x0.shape, generator=generator).to(x0.device)
        columns: list[Tensor] = []
        for time in TIMES:
            t = torch.full((len(x0),), time, device=x0.device)
            x_t = add_noise(diffusion, x0, eps, t).x_t
            output = model(x_t, t, None if labels is None else labels[start : start + batch]).sample.float()
            predicted = convert(diffusion.schedule, diffusion.target, output, x_t, t).eps
            columns.append((predicted - eps).square().mean(dim=(1, 2, 3)))
        parts.append(torch.stack(columns, dim=1).cpu().double())  # in this order: Apple's GPUs have no float64
    return DenoisingLoss(torch.cat(parts))


def overfitting(training: DenoisingLoss, heldout: DenoisingLoss) -> dict[str, object]:
    """The two losses, by level too, and their gap (held-out - training, above 0 when training images are learnt by heart).

    Intervals by bootstrap over the images of both.
    """
    by_level = bootstrap_difference(np.asarray(heldout.errors), np.asarray(training.errors))
    whole = bootstrap_difference(*(np.asarray(each.errors.mean(dim=1, keepdim=True)) for each in (heldout, training)))[0]
    levels = [
        {"t": t, "train": float(ours), "heldout": float(theirs), "gap": gap.value, "gap_interval": [gap.low, gap.high]}
        for t, ours, theirs, gap in zip(TIMES, training.errors.mean(dim=0), heldout.errors.mean(dim=0), by_level, strict=True)
    ]
    return {
        "num_images": [len(training.errors), len(heldout.errors)],
        "train": training.loss,
        "heldout": heldout.loss,
        "gap": whole.value,
        "gap_interval": [whole.low, whole.high],
        "levels": levels,
    }
