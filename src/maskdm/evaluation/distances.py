"""How far two sets of feature vectors lie apart: Frechet distance, kernel distance, precision and recall.

All arithmetic is in float64. Figures compare only within one feature network and, for all but the kernel distance, within
equal counts: the Frechet distance of a finite sample is biased upwards by about (dimensions / count).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from maskdm.errors import UserError
from maskdm.evaluation.neighbours import nearest, squared_distances

GROUPS = 20
"""Groups of the jackknife: its standard error is itself known to about 1 / sqrt(2 * GROUPS), 16 %."""


class KernelDistance(NamedTuple):
    """Squared maximum mean discrepancy and its standard error; the value is unbiased, so it may be below zero."""

    value: float
    standard_error: float


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1]."""

    precision: float
    recall: float


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
    def of(features: Tensor) -> Statistics:
        """The statistics of features [N, D]."""
        gathered = Statistics(features.shape[1])
        gathered.update(features)
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


def kernel_distance(a: Tensor, b: Tensor, limit: int = 5000, seed: int = 0) -> KernelDistance:
    """Unbiased MMD^2 of features [N, D] and [M, D] under the kernel (x.y / D + 1)^3, as KID (arXiv 1801.01401).

    All pairs count, of at most `limit` vectors of each side, drawn by `seed`. The standard error is a delete-one-group
    jackknife over random groups: subsets drawn with overlap, as is usual, understate it. At least 4 images each (UserError).
    """
    groups = min(GROUPS, len(a) // 2, len(b) // 2)
    if groups < 2:
        raise UserError(f"a kernel distance needs at least 4 images on each side, here {len(a)} and {len(b)}; give more images")
    random = np.random.default_rng(seed)
    parts_a, parts_b = _groups(a, groups, limit, random), _groups(b, groups, limit, random)
    aa, bb, ab = _kernel_sums(parts_a, parts_a, True), _kernel_sums(parts_b, parts_b, True), _kernel_sums(parts_a, parts_b, False)
    sizes_a, sizes_b = np.array([len(part) for part in parts_a]), np.array([len(part) for part in parts_b])
    keep = np.ones(groups, dtype=bool)
    value = _discrepancy(aa, bb, ab, sizes_a, sizes_b, keep)
    without: list[float] = []
    for group in range(groups):
        keep[group] = False
        without.append(_discrepancy(aa, bb, ab, sizes_a, sizes_b, keep))
        keep[group] = True
    return KernelDistance(value, float(np.sqrt((groups - 1) * np.var(without))))


def _groups(features: Tensor, groups: int, limit: int, random: np.random.Generator) -> list[Tensor]:
    order = random.permutation(len(features))[:limit]
    drawn = features[torch.from_numpy(order)].double()
    return list(torch.tensor_split(drawn, groups))


def _kernel_sums(rows: list[Tensor], columns: list[Tensor], same: bool) -> np.ndarray:
    """Sums of the kernel over the pairs of each two groups [groups, groups]; of one set, a vector is no pair with itself."""
    sums = np.zeros((len(rows), len(columns)))
    for i, left in enumerate(rows):
        for j, right in enumerate(columns):
            kernel = (left @ right.T / left.shape[1] + 1) ** 3
            sums[i, j] = float(kernel.sum() - kernel.trace()) if same and i == j else float(kernel.sum())
    return sums


def _discrepancy(aa: np.ndarray, bb: np.ndarray, ab: np.ndarray, sizes_a: np.ndarray, sizes_b: np.ndarray, keep: np.ndarray) -> float:
    """MMD^2 of the groups that `keep` selects."""
    n, m, kept = int(sizes_a[keep].sum()), int(sizes_b[keep].sum()), np.ix_(keep, keep)
    return float(aa[kept].sum() / (n * (n - 1)) + bb[kept].sum() / (m * (m - 1)) - 2 * ab[kept].sum() / (n * m))


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> PrecisionRecall:
    """Share of fakes within the real manifold, and of reals within that of the fakes: arXiv 1904.06991.

    A manifold is the union of balls around the vectors [N, D], each as far as its k-th nearest neighbour among them.
    Depends on the counts, recall above all. More than k images each (UserError).
    """
    if min(len(real), len(fake)) <= k:
        raise UserError(f"precision and recall need more than {k} images, here {len(real)} and {len(fake)}; give more images")
    return PrecisionRecall(_covered(fake, real, k), _covered(real, fake, k))


def _covered(queries: Tensor, centres: Tensor, k: int, block: int = 2048) -> float:
    """Share of `queries` in a ball around one of `centres`."""
    radii = nearest(centres, centres, k + 1).distances[:, -1].square()
    inside = torch.zeros(len(queries), dtype=torch.bool)
    for first in range(0, len(queries), block):
        rows = slice(first, first + block)
        for start in range(0, len(centres), block):
            columns = slice(start, start + block)
            squared = squared_distances(queries[rows].double(), centres[columns].double())
            inside[rows] |= (squared <= radii[columns]).any(dim=1)
    return float(inside.double().mean())
