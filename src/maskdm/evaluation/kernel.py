"""The kernel distance of two sets of feature vectors: unbiased at any count, so the one to look at when images are few."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from maskdm.errors import UserError
from maskdm.evaluation.intervals import Estimate

MOST = 5000
"""Vectors of each side that are compared, all with all."""

GROUPS = 20
"""Most groups of the jackknife: its standard error is itself known to about 1 / sqrt(2 * GROUPS), 16 %."""


class KernelDistance(NamedTuple):
    """Squared maximum mean discrepancy and its standard error; the value is unbiased, so it may be below zero.

    `groups`: of the jackknife. `counts`: vectors of each side that were compared.
    """

    value: float
    standard_error: float
    groups: int
    counts: tuple[int, int]

    @property
    def estimate(self) -> Estimate:
        """With its 95 % interval, Student's of groups - 1 degrees of freedom: wide where images are too few for many groups."""
        return Estimate.around(self.value, self.standard_error, self.groups - 1)


def kernel_distance(a: Tensor, b: Tensor, limit: int = MOST, seed: int = 0) -> KernelDistance:
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
    error = float(np.sqrt((groups - 1) * np.var(without)))
    return KernelDistance(value, error, groups, (int(sizes_a.sum()), int(sizes_b.sum())))


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
