"""Averages of the weights of any length, after training: EDM2's post-hoc EMA (arXiv 2312.02696, section 3 and appendix C).

A power-function average at time t weighs the weights at time tau by (gamma + 1) tau^gamma / t^(gamma + 1). Its length is said as
sigma_rel, the standard deviation of that profile over t. A few averages stored at a few times are combined, with coefficients that
bring the sum of their profiles as near as can be to the profile wanted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from maskdm.config import Ema
from maskdm.errors import UserError


@dataclass(frozen=True)
class Profile:
    """How an average at `time` (steps since the averages began, above 0) weighs the weights before: by tau^gamma."""

    time: int | float
    gamma: float


@dataclass(frozen=True)
class Fit:
    """Coefficients of the stored averages, float64, their sum 1; misfit: distance of the profiles' L2 norms, 0 for exact."""

    coefficients: NDArray[np.float64]
    misfit: float


def gamma_of(sigma_rel: float) -> float:
    """The exponent of a profile of this relative width: the largest root of (g + 2)^2 (g + 3) sigma^2 = g + 1.

    Raises UserError outside 0 < sigma_rel <= 0.288, the width of the plain mean (gamma 0).
    """
    if not 0 < sigma_rel <= Ema.longest:
        raise UserError(f"sigma_rel is {sigma_rel:g}; give a number above 0 and up to {Ema.longest} (the plain mean of all steps)")
    inverse = sigma_rel**-2
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    return max(0.0, float(roots.real.max()))


def sigma_rel_of(gamma: float) -> float:
    """The standard deviation of a profile over its time: sqrt((g + 1) / ((g + 2)^2 (g + 3)))."""
    return math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))


def kept_share(time: int, gamma: float) -> float:
    """Share of the average kept at an update, `time` counted from 1: (1 - 1/t)^(gamma + 1), so that the first takes the weights."""
    return (1 - 1 / time) ** (gamma + 1)


def inner(a: Profile, b: Profile) -> float:
    """The integral of the product of two profiles, from 0 to the earlier of their times."""
    early, late = (a, b) if a.time <= b.time else (b, a)
    scale = (early.gamma + 1) * (late.gamma + 1) / (early.gamma + late.gamma + 1)
    return scale * (early.time / late.time) ** late.gamma / late.time


def fit(stored: Sequence[Profile], wanted: Profile) -> Fit:
    """The combination of the stored profiles nearest to the one wanted, by least squares, of all whose coefficients sum to 1.

    The constraint is not in the paper: with it, a weight that training left alone comes out as it was, whatever the misfit.
    """
    unit = [Profile(p.time / wanted.time, p.gamma) for p in stored]
    target = Profile(1.0, wanted.gamma)
    gram = np.array([[inner(a, b) for b in unit] for a in unit])
    right = np.array([inner(a, target) for a in unit])
    ones = np.ones((len(unit), 1))
    system = np.block([[gram, ones], [ones.T, np.zeros((1, 1))]])
    found = np.linalg.lstsq(system, np.append(right, 1.0), rcond=None)[0][:-1]
    found = found / found.sum()
    square = float(found @ gram @ found - 2 * found @ right) + inner(target, target)
    return Fit(found, math.sqrt(max(0.0, square) / inner(target, target)))


def reconstruct(averages: Iterable[Mapping[str, Tensor]], coefficients: NDArray[np.float64]) -> dict[str, Tensor]:
    """The weighted sum of the stored averages, tensor by tensor: summed in float64, returned in fp32."""
    total: dict[str, Tensor] = {}
    for average, coefficient in zip(averages, coefficients.tolist(), strict=True):
        for name, value in average.items():
            part = value.to(torch.float64) * coefficient
            total[name] = total[name].add_(part) if name in total else part
    return {name: value.to(torch.float32) for name, value in total.items()}
