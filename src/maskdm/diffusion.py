"""Noise schedules and prediction targets: x_t = alpha(t) x0 + sigma(t) eps.

Time t is in units of 1/1000 of the schedule, as diffusers counts: 0 to 999 for the variance-preserving schedules, whose
whole numbers are the steps of DDPM (arXiv 2006.11239), and 0 to 1000 for rectified flow (arXiv 2209.03003).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from maskdm.config import Diffusion, LogitNormalTimesteps, MinSNRWeight, UniformTimesteps, UniformWeight

Times = Float[Tensor, " batch"]
Target = Literal["eps", "x0", "v"]
Schedule = Literal["linear", "cosine", "vp", "flow"]
NUM_STEPS = 1000


@cache
def betas(schedule: Literal["linear", "cosine", "vp"]) -> Float[Tensor, "1000"]:
    """The 1000 betas of the discrete chain, in float64: what a diffusers scheduler is given as `trained_betas`."""
    step = torch.arange(NUM_STEPS, dtype=torch.float64)
    match schedule:
        case "linear":  # DDPM, section 4
            return torch.linspace(1e-4, 0.02, NUM_STEPS, dtype=torch.float64)
        case "cosine":  # arXiv 2102.09672, equation 17
            bar = [torch.cos((step + i) / NUM_STEPS / 1.008 * torch.pi / 2 + 0.008 / 1.008 * torch.pi / 2).square() for i in (0, 1)]
            return (1 - bar[1] / bar[0]).clamp(max=0.999)
        case "vp":
            log_bar = _vp_log_alpha_bar(step)
            before = torch.cat([torch.zeros(1, dtype=torch.float64), log_bar[:-1]])
            return -torch.expm1(log_bar - before)


def _vp_log_alpha_bar(t: Tensor) -> Tensor:
    """The VP-SDE with beta from 0.1 to 20 (arXiv 2011.13456, equation 33), time shifted by one step to start above 0."""
    s = (t + 1) / NUM_STEPS
    return -0.1 * s - 0.5 * (20 - 0.1) * s**2


@cache
def _log_alpha_bar_table(schedule: Literal["linear", "cosine"], device: torch.device) -> Tensor:
    return torch.log1p(-betas(schedule)).cumsum(0).to(device)


def alpha_sigma(schedule: Schedule, t: Times) -> tuple[Times, Times]:
    """Scale of the image and of the noise at times t. Between whole steps log(alpha^2) is interpolated linearly."""
    match schedule:
        case "flow":
            return 1 - t / NUM_STEPS, t / NUM_STEPS
        case "vp":
            log_bar = _vp_log_alpha_bar(t.double() if t.device.type != "mps" else t)
        case "linear" | "cosine":
            table = (
                _log_alpha_bar_table(schedule, t.device)
                if t.device.type != "mps"
                else _log_alpha_bar_table(schedule, torch.device("cpu")).float().to(t.device)
            )
            below = t.long().clamp(0, NUM_STEPS - 2)
            log_bar = torch.lerp(table[below], table[below + 1], (t - below).to(table.dtype))
    return (log_bar / 2).exp().to(t.dtype), (-torch.expm1(log_bar)).sqrt().to(t.dtype)


def draw_times(diffusion: Diffusion, uniform: Times) -> Times:
    """Map uniform draws in [0, 1) to times: whole steps for the tabulated schedules, as in the paper, else continuous."""
    match diffusion.timesteps:
        case UniformTimesteps():
            share = uniform
        case LogitNormalTimesteps(mean=mean, std=std):
            share = torch.sigmoid(mean + std * torch.special.ndtri(uniform.clamp(1e-6, 1 - 1e-6)))
    match diffusion.schedule:
        case "linear" | "cosine":
            return (share * NUM_STEPS).floor().clamp(0, NUM_STEPS - 1)
        case "vp":
            return share * (NUM_STEPS - 1)
        case "flow":
            return share * NUM_STEPS


def _spread(values: Times, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.ndim - 1))


@dataclass(frozen=True)
class Noised:
    """Images (or patches) x0 [batch, ...] with noise eps at times t: x_t and the target, in the shape of x0."""

    x_t: Tensor
    target: Tensor


def add_noise(diffusion: Diffusion, x0: Tensor, eps: Tensor, t: Times) -> Noised:
    """x_t = alpha x0 + sigma eps, and what the network is asked for: eps, x0, or v.

    v is alpha eps - sigma x0 (arXiv 2202.00512) for the variance-preserving schedules, the velocity eps - x0 for the flow.
    """
    alpha, sigma = (_spread(s, x0) for s in alpha_sigma(diffusion.schedule, t))
    x_t = alpha * x0 + sigma * eps
    match diffusion.target:
        case "eps":
            return Noised(x_t, eps)
        case "x0":
            return Noised(x_t, x0)
        case "v":
            return Noised(x_t, eps - x0 if diffusion.schedule == "flow" else alpha * eps - sigma * x0)


@dataclass(frozen=True)
class Prediction:
    """One network output in every parametrisation, each in the shape of x_t."""

    x0: Tensor
    eps: Tensor
    v: Tensor


def convert(schedule: Schedule, target: Target, output: Tensor, x_t: Tensor, t: Times) -> Prediction:
    """Read a network's `output` for `target` as image, noise and velocity. Where alpha or sigma is 0 the division gives inf or nan."""
    alpha, sigma = (_spread(s, x_t) for s in alpha_sigma(schedule, t))
    by_eps, by_x0 = (1.0, 1.0) if schedule == "flow" else (alpha, sigma)  # v = by_eps * eps - by_x0 * x0
    match target:
        case "eps":
            x0, eps = (x_t - sigma * output) / alpha, output
        case "x0":
            x0, eps = output, (x_t - alpha * output) / sigma
        case "v":  # alpha * by_eps + sigma * by_x0 = 1 for every schedule here
            return Prediction(by_eps * x_t - sigma * output, by_x0 * x_t + alpha * output, output)
    return Prediction(x0, eps, by_eps * eps - by_x0 * x0)


def loss_weight(diffusion: Diffusion, t: Times) -> Times:
    """Weight of the squared error of the target at times t."""
    match diffusion.weight:
        case UniformWeight():
            return torch.ones_like(t)
        case MinSNRWeight(gamma=gamma):
            alpha, sigma = alpha_sigma(diffusion.schedule, t)
            snr = (alpha / sigma.clamp(min=1e-4)).square()
            capped = snr.clamp(max=gamma)  # the weight of the squared error of x0 (arXiv 2303.09556, section 3.4)
            match diffusion.target:
                case "x0":
                    return capped
                case "eps":
                    return torch.where(snr > gamma, gamma / snr.clamp(min=gamma), torch.ones_like(snr))
                case "v":
                    return capped * sigma.square()


def drop_labels(labels: Tensor, drop: Bool[Tensor, " batch"], null: int) -> Tensor:
    """`labels` with the null class where `drop` says so (arXiv 2207.12598), and where an image has no class (-1)."""
    return torch.where(drop | (labels < 0), torch.full_like(labels, null), labels)
