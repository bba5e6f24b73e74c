"""Estimates with their 95 % intervals: bootstrap for means and medians, Wilson's for shares."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

Z = 1.959964
"""The normal distribution's 97.5 % point: all intervals are of 95 %."""

REPEATS = 1000
_SEED = 0
_BLOCK = 50


class Estimate(NamedTuple):
    """A value and the ends of its 95 % interval."""

    value: float
    low: float
    high: float

    @staticmethod
    def around(value: float, standard_error: float, degrees: int | None = None) -> Estimate:
        """The interval of a value that is about normally distributed; Student's where the error is known to so many degrees of freedom."""
        half = half_width(standard_error, degrees)
        return Estimate(value, value - half, value + half)


def half_width(standard_error: float, degrees: int | None = None) -> float:
    """Half the 95 % interval of a value with this standard error, itself known to some degrees of freedom (None: exactly)."""
    return standard_error * (Z if degrees is None else float(stdtrit(degrees, 0.975)))


def share(count: int, total: int) -> Estimate:
    """count / total with Wilson's interval (1927). A bootstrap of no hits among n would claim certainty; this does not."""
    value, square = count / total, Z**2
    centre = (value + square / (2 * total)) / (1 + square / total)
    half = Z / (1 + square / total) * math.sqrt(value * (1 - value) / total + square / (4 * total**2))
    return Estimate(value, max(0.0, min(value, centre - half)), min(1.0, max(value, centre + half)))


def difference_of_shares(first: Estimate, second: Estimate) -> Estimate:
    """first - second of two independent shares, with Newcombe's interval (1998, method 10): the root of the squared half-widths.

    Of Wilson's intervals it is his; of wider ones, that hold further variance, it holds theirs too.
    """
    value = first.value - second.value
    low = math.hypot(first.value - first.low, second.high - second.value)
    high = math.hypot(first.high - first.value, second.value - second.low)
    return Estimate(value, value - low, value + high)


def bootstrap_mean(values: NDArray[np.float64]) -> Estimate:
    """The mean of values [N], with the percentile bootstrap's interval."""
    return _percentiles(float(values.mean()), bootstrap_means(values[:, None], np.random.default_rng(_SEED))[:, 0])


def bootstrap_difference(first: NDArray[np.float64], second: NDArray[np.float64]) -> list[Estimate]:
    """mean(first) - mean(second) of each column of [N, K] and [M, K], both resampled."""
    random = np.random.default_rng(_SEED)
    drawn = bootstrap_means(first, random) - bootstrap_means(second, random)
    values = first.mean(axis=0) - second.mean(axis=0)
    return [_percentiles(float(value), column) for value, column in zip(values, drawn.T, strict=True)]


def bootstrap_median_ratio(first: NDArray[np.float64], second: NDArray[np.float64]) -> Estimate | None:
    """median(first) / median(second) of values [N] and [M], both resampled; None where the second median is 0."""
    if np.median(second) <= 0:
        return None
    random = np.random.default_rng(_SEED)
    above, below = _bootstrap_medians(first, random), _bootstrap_medians(second, random)
    kept = below > 0
    return _percentiles(float(np.median(first) / np.median(second)), above[kept] / below[kept])


def bootstrap_means(values: NDArray[np.float64], random: np.random.Generator) -> NDArray[np.float64]:
    """Means [REPEATS, K] of as many resamples of the rows of [N, K]."""
    count = len(values)
    even = np.full(count, 1 / count)
    blocks = [random.multinomial(count, even, size=_BLOCK) @ values for _ in range(REPEATS // _BLOCK)]
    means: NDArray[np.float64] = np.concatenate(blocks) / count
    return means


def _bootstrap_medians(values: NDArray[np.float64], random: np.random.Generator) -> NDArray[np.float64]:
    blocks = [np.median(values[random.integers(len(values), size=(_BLOCK, len(values)))], axis=1) for _ in range(REPEATS // _BLOCK)]
    medians: NDArray[np.float64] = np.concatenate(blocks)
    return medians


def _percentiles(value: float, drawn: NDArray[np.float64]) -> Estimate:
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Estimate(value, float(low), float(high))
