"""Precision, recall, density and coverage: whether samples lie among the real images, and reach all of them.

Precision and recall: arXiv 1904.06991. Density and coverage: arXiv 2002.09797. All depend on the counts, recall above all.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from maskdm.errors import UserError
from maskdm.evaluation.intervals import Estimate, bootstrap_mean, share
from maskdm.evaluation.neighbours import nearest, squared_distances


class Manifold(NamedTuple):
    """Shares in [0, 1], but for the density, which is 1 on average where samples are drawn as the real images are."""

    precision: Estimate
    recall: Estimate
    density: Estimate
    coverage: Estimate


def manifold(real: Tensor, fake: Tensor, k: int = 5, block: int = 2048) -> Manifold:
    """How samples and real images cover each other, by balls around each vector of [N, D] and [M, D].

    A ball reaches as far as its centre's k-th nearest neighbour in the same set. Precision: share of fakes in any ball of a
    real. Recall: share of reals in any ball of a fake. Density: balls of reals that a fake lies in, over k. Coverage: share of
    reals with a fake in their ball. Intervals are over the images counted, the balls held fixed. At most block^2
    distances are held. More than k images each (UserError).
    """
    if min(len(real), len(fake)) <= k:
        raise UserError(f"precision and recall need more than {k} images, here {len(real)} and {len(fake)}; give more images")
    real_radii, fake_radii = _radii(real, k), _radii(fake, k)
    balls = torch.zeros(len(fake), dtype=torch.int64)
    reached, covered = (torch.zeros(len(real), dtype=torch.bool) for _ in range(2))
    for first in range(0, len(fake), block):
        rows = slice(first, first + block)
        for start in range(0, len(real), block):
            columns = slice(start, start + block)
            squared = squared_distances(fake[rows].double(), real[columns].double())
            in_real = squared <= real_radii[columns]
            balls[rows] += in_real.sum(dim=1)
            covered[columns] |= in_real.any(dim=0)
            reached[columns] |= (squared <= fake_radii[rows, None]).any(dim=0)
    return Manifold(
        share(int((balls > 0).sum()), len(fake)),
        share(int(reached.sum()), len(real)),
        bootstrap_mean(np.asarray(balls.double() / k)),
        share(int(covered.sum()), len(real)),
    )


def _radii(features: Tensor, k: int) -> Tensor:
    """Squared distance of each vector to its k-th nearest other."""
    return nearest(features, features, k + 1).distances[:, -1].square()
