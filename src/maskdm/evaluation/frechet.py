"""The Frechet distance of two sets of feature vectors: its value, its standard error, and the bias that a finite number of images gives it.

All arithmetic is in float64. Figures compare only within one feature network and equal counts: the distance of a finite sample is
biased upwards by about (dimensions / count), which `frechet_infinity` takes out and the distance between two halves of one set shows.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from maskdm.errors import UserError
from maskdm.evaluation.intervals import Estimate, half_width

_ROWS = 4096
_SMALL = 256
"""Dimensions up to which a distance takes milliseconds, so that many can be averaged."""


class Statistics:
    """Mean and covariance of feature vectors, gathered in pieces of any size; memory is dimensions^2.

    Pieces are joined by the pairwise update of Chan, Golub and LeVeque (1983), which does not cancel for large means.
    """

    def __init__(self, dimensions: int) -> None:
        self.count = 0
        self.mean = torch.zeros(dimensions, dtype=torch.float64)
        self._scatter = torch.zeros(dimensions, dimensions, dtype=torch.float64)

    def update(self, features: Tensor) -> None:
        """Add features [N, D]."""
        if not len(features):
            return
        piece = features.detach().cpu().double()
        mean = piece.mean(dim=0)
        centred = piece - mean
        self._join(len(piece), mean, centred.T @ centred)

    def merge(self, other: Statistics) -> None:
        """Add all that `other` has seen, as from another process."""
        if other.count:
            self._join(other.count, other.mean, other._scatter)

    def _join(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        total = self.count + count
        shift = mean - self.mean
        self._scatter += scatter + torch.outer(shift, shift) * (self.count * count / total)
        self.mean = self.mean + shift * (count / total)
        self.count = total

    @property
    def cov(self) -> Tensor:
        """Covariance [D, D], with the divisor count - 1. UserError below two vectors."""
        if self.count < 2:
            raise UserError(f"a covariance needs at least 2 images, here {self.count}; give more images")
        return self._scatter / (self.count - 1)

    @staticmethod
    def of(features: Tensor, rows: Tensor | None = None) -> Statistics:
        """The statistics of features [N, D], or of some rows of them, read in pieces: they may be mapped from a file."""
        gathered = Statistics(features.shape[1])
        for first in range(0, len(features) if rows is None else len(rows), _ROWS):
            piece = slice(first, first + _ROWS)
            gathered.update(features[piece if rows is None else rows[piece]])
        return gathered


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2), the squared 2-Wasserstein distance of two Gaussians.

    With A = L L^T and B = M M^T the last trace is the sum of the singular values of L^T M: real and stable for covariances
    of any rank, where a matrix square root of A B is neither. At least 2 images each (UserError).
    Dowson and Landau 1982; Heusel et al., arXiv 1706.08500.
    """
    cross = torch.linalg.svdvals(_factor(a.cov).T @ _factor(b.cov)).sum()
    means = (a.mean - b.mean).square().sum()
    return max(0.0, float(means + a.cov.trace() + b.cov.trace() - 2 * cross))


def _factor(cov: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(cov)
    return vectors * values.clamp(min=0).sqrt()


def frechet_errors(features: Tensor, own: Statistics, other: Statistics) -> Tensor:
    """What each vector of features [N, D] adds to the distance of `own`, which they are of (or a part of), to `other`: [N], of mean 0.

    The distance's derivative in the direction of the vector (its influence function). Their deviation over sqrt(own.count) is the
    standard error that a bootstrap over the images has in the limit (the infinitesimal jackknife, Efron 1982), for the cost of two
    eigendecompositions; a bootstrap of the distance itself would be biased, since repeated images lower the rank.
    """
    factor = _factor(other.cov)
    values, vectors = torch.linalg.eigh(factor.T @ own.cov @ factor)
    seen = values > values[-1] * 1e-12
    # the optimal transport map from own to other, as a square: x^T T x = |map^T x|^2
    transport = factor @ (vectors[:, seen] * values[seen] ** -0.25)
    shift = own.mean - other.mean
    pieces: list[Tensor] = []
    for first in range(0, len(features), _ROWS):
        centred = features[first : first + _ROWS].double() - own.mean
        squares = centred.square().sum(dim=1) - (centred @ transport).square().sum(dim=1)
        pieces.append(2 * centred @ shift + squares)
    errors = torch.cat(pieces)
    return errors - errors.mean()


def frechet_standard_error(a: Tensor, b: Tensor, statistics_a: Statistics, statistics_b: Statistics) -> float:
    """How far the distance would vary over other draws of as many images of both sets (their bias stays).

    `a` and `b`: the features, or a random part of them, behind the statistics.
    """
    variance = frechet_errors(a, statistics_a, statistics_b).var() / statistics_a.count
    return math.sqrt(float(variance + frechet_errors(b, statistics_b, statistics_a).var() / statistics_b.count))


def frechet_ratio(a: Tensor, b: Tensor, real: Tensor) -> Estimate:
    """The distance of a from `real` over that of b, features [N, D], [N, D] and [M, D], with an interval for pairs.

    Image i of both sets stems from the same noise, so that what its draw adds to either distance mostly cancels, as what the draw of
    the real ones adds does: the interval is that of the logarithm's influence function, far narrower than of two distances by
    themselves. The bias of a finite number of images does not cancel: it draws the ratio towards 1.
    """
    own = Statistics.of(real)
    value, fakes, reals = 1.0, torch.zeros(len(a), dtype=torch.float64), torch.zeros(len(real), dtype=torch.float64)
    for features, sign in ((a, 1), (b, -1)):
        statistics = Statistics.of(features)
        distance = frechet_distance(statistics, own)
        value *= distance**sign
        fakes += sign / distance * frechet_errors(features, statistics, own)
        reals += sign / distance * frechet_errors(real, own, statistics)
    half = half_width(math.sqrt(float(fakes.var() / len(fakes) + reals.var() / len(reals))))
    return Estimate(value, value * math.exp(-half), value * math.exp(half))


def frechet_infinity(a: Tensor, b: Tensor, standard_error: float, seed: int = 0) -> Estimate | None:
    """The distance that endless images would have: a straight line over 1 / share of the images, continued to 0 (arXiv 1911.07023).

    Shares from 1 down to 0.4 of both sets at once, so that the bias of both goes. It may come out below 0. The interval holds the
    line's own error and `standard_error`, that of the draw. None below 4.5 images a dimension: there the bias is no straight line
    (of 400 vectors of 128 dimensions, 2.36 came out for 2.98; of 600, the truth within its error: docs/experiments.md).
    """
    dimensions = a.shape[1]
    if min(len(a), len(b)) < 4.5 * dimensions:
        return None
    random = np.random.default_rng(seed)
    inverses, distances = [], []
    for inverse in np.linspace(1.0, 2.5, 7 if dimensions <= _SMALL else 4):
        parts = 1 if inverse == 1 else 8 if dimensions <= _SMALL else 2
        for _ in range(parts):
            drawn = [_drawn(each, round(len(each) / inverse), random) for each in (a, b)]
            distances.append(frechet_distance(*drawn))
            inverses.append(inverse)
    x = np.array(inverses)
    line, cov = np.polyfit(x, np.array(distances), 1, cov=True)
    return Estimate.around(float(line[1]), math.hypot(math.sqrt(float(cov[1, 1])), standard_error))


def frechet_halves(features: Tensor, most: int, seed: int = 0) -> tuple[float, int] | None:
    """The distance between two disjoint random parts of one set, of at most `most` vectors each, and that count.

    All of it is bias, as large from the one side as from the other. So many perfect samples would be less far from the whole set,
    which is larger and adds less. None below 4 vectors.
    """
    count = min(most, len(features) // 2)
    if count < 2:
        return None
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(features)))
    halves = [Statistics.of(features, order[start : start + count]) for start in (0, count)]
    return frechet_distance(*halves), count


def _drawn(features: Tensor, count: int, random: np.random.Generator) -> Statistics:
    return Statistics.of(features, torch.from_numpy(random.permutation(len(features))[:count]))
