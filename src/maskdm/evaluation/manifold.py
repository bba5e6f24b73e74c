"""Precision, recall, density and coverage: whether samples lie among the real images, and reach all of them.

Precision and recall: arXiv 1904.06991. Density and coverage: arXiv 2002.09797. All depend on the counts, recall above all.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from maskdm.errors import UserError
from maskdm.evaluation.intervals import Estimate, bootstrap_mean, half_width, share
from maskdm.evaluation.neighbours import nearest, squared_distances

GROUPS = 10
"""Groups of the jackknife over the samples."""


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
    reals with a fake in their ball. Intervals are over the draw of the images counted, those of recall and coverage over the draw
    of the fakes too (a delete-one-group jackknife: Efron 1982), which varies them more; the balls of reals are held fixed.
    At most block^2 distances are held. More than k images each (UserError).
    """
    if min(len(real), len(fake)) <= k:
        raise UserError(f"precision and recall need more than {k} images, here {len(real)} and {len(fake)}; give more images")
    groups = np.array_split(np.random.default_rng(0).permutation(len(fake)), min(GROUPS, len(fake)))
    real_radii, fake_radii = _radii(real, k), _radii_without(fake, k, groups)
    balls = torch.zeros(len(fake), dtype=torch.int64)
    covered = torch.zeros(len(real), len(groups), dtype=torch.bool)  # by a fake of the group
    reached = torch.zeros(len(real), len(groups) + 1, dtype=torch.bool)  # by fakes without the group; last: by all
    for number, group in enumerate(groups):
        others = [each for each in range(len(groups) + 1) if each != number]
        for first in range(0, len(group), block):
            rows = torch.from_numpy(group[first : first + block])
            for start in range(0, len(real), block):
                columns = slice(start, start + block)
                squared = squared_distances(fake[rows].double(), real[columns].double())
                in_real = squared <= real_radii[columns]
                balls[rows] += in_real.sum(dim=1)
                covered[columns, number] |= in_real.any(dim=0)
                for left_out in others:
                    reached[columns, left_out] |= (squared <= fake_radii[rows, left_out, None]).any(dim=0)
    whole, hits = covered.any(dim=1), covered.sum(dim=1)
    covered_without = whole[:, None] & ~(covered & (hits == 1)[:, None])
    return Manifold(
        share(int((balls > 0).sum()), len(fake)),
        _over_both_draws(reached[:, -1], reached[:, :-1]),
        bootstrap_mean(np.asarray(balls.double() / k)),
        _over_both_draws(whole, covered_without),
    )


def _over_both_draws(counted: Tensor, without: Tensor) -> Estimate:
    """The share of reals counted [M], with Wilson's interval and the jackknife's over the fakes (`without`: [M, groups]) in quadrature."""
    found, groups = share(int(counted.sum()), len(counted)), without.shape[1]
    error = float((without.double().mean(dim=0).var(correction=0) * (groups - 1)).sqrt())
    half = half_width(error, groups - 1)
    low, high = (math.hypot(end - found.value, half) for end in (found.low, found.high))
    return Estimate(found.value, max(0.0, found.value - low), min(1.0, found.value + high))


def _radii(features: Tensor, k: int) -> Tensor:
    """Squared distance of each vector to its k-th nearest other."""
    return nearest(features, features, k + 1).distances[:, -1].square()


def _radii_without(features: Tensor, k: int, groups: list[NDArray[np.int64]]) -> Tensor:
    """The same [N, groups + 1] without the vectors of each group, and last with all.

    Found among the 3k nearest: of ten groups, one that holds two thirds of these is as good as never met (then it is the farthest).
    """
    found = nearest(features, features, min(3 * k + 1, len(features)))
    group_of = torch.empty(len(features), dtype=torch.int64)
    for number, group in enumerate(groups):
        group_of[torch.from_numpy(group)] = number
    neighbours, radii = group_of[found.indices], list[Tensor]()
    for number in range(len(groups) + 1):
        counted = (neighbours != number).cumsum(dim=1)  # the vector itself, at 0, is one of them
        place = (counted <= k).sum(dim=1).clamp(max=neighbours.shape[1] - 1)
        radii.append(found.distances.gather(1, place[:, None])[:, 0].square())
    return torch.stack(radii, dim=1)
