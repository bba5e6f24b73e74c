"""Masked denoising score matching (arXiv 2306.11363, equation 6), on one screen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from maskdm.config import Diffusion
from maskdm.data.loader import flip, to_model_range
from maskdm.diffusion import Times, add_noise, drop_labels, loss_weight
from maskdm.draws import Draws
from maskdm.masking import Kept, take
from maskdm.models import Denoiser, patchify


@dataclass(frozen=True)
class Loss:
    """The weighted mean to descend, and each sample's unweighted error [batch] at its time [batch]."""

    total: Float[Tensor, ""]
    errors: Float[Tensor, " batch"]
    t: Times


def masked_denoising_loss(
    model: Denoiser,
    diffusion: Diffusion,
    images: UInt8[Tensor, "batch channels height width"] | Float[Tensor, "batch views channels height width"],
    labels: Int[Tensor, " batch"] | None,
    draws: Draws,
    network: Any = None,
) -> Loss:
    """E || target_tau - model(x_t restricted to tau, positions of tau, t) ||^2 over the kept patches tau, mean per element.

    Only patches that enter are noised, and the model sees nothing else; the loss is of those that come out. With every patch kept this is
    the ordinary loss. network: the model as it is run, compiled or in several processes; as it is if left out.
    """
    pixels = flip(images, draws.flip)
    if draws.reduced > 1:
        x0 = patchify(F.avg_pool2d(to_model_range(pixels), draws.reduced), model.patch_size)
    else:
        x0 = to_model_range(take(patchify(pixels, model.patch_size), draws.kept))
    noised = add_noise(diffusion, x0, draws.noise, draws.t)
    if labels is not None:
        labels = drop_labels(labels, draws.drop, null=model.num_classes)
    output = (model if network is None else network)(noised.x_t, draws.t, labels, draws.kept, draws.route, reduced=draws.reduced).sample
    output, target, route = output.float(), noised.target, draws.route
    extra = 0.0
    if route is not None and route.reconstruct is not None:
        extra = route.reconstruct * _reconstruction(output, noised.x_t, route.kept)
        output = take(output, route.kept)
    if output.shape != target.shape and route is not None:
        target = take(target, route.kept)
    errors = (output - target).square().mean(dim=(1, 2))
    return Loss((loss_weight(diffusion, draws.t) * errors).mean() + extra, errors.detach(), draws.t)


def _reconstruction(output: Tensor, x_t: Tensor, kept: Kept | None) -> Tensor:
    """How well the patches that are not kept are guessed, each normalised by its own mean and deviation (arXiv 2306.09305, section 3.4)."""
    error = (output - (x_t - x_t.mean(dim=2, keepdim=True)) / (x_t.var(dim=2, keepdim=True) + 1e-6).sqrt()).square().mean(dim=2)
    if kept is None or kept.shape[1] == error.shape[1]:
        return 0 * error.mean()
    hidden = torch.ones_like(error).scatter(1, kept, 0.0)
    return (error * hidden).sum() / hidden.sum()
