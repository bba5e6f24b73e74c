"""Exact nearest neighbours in bounded memory, in feature or in pixel space."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_ELEMENTS = 2**24
"""Numbers of one side held in float64 at a time: 128 MiB."""


class Neighbours(NamedTuple):
    """Euclidean distances [N, k], float64, ascending, and the indices [N, k] of the references, int64."""

    distances: Tensor
    indices: Tensor


def squared_distances(queries: Tensor, references: Tensor) -> Tensor:
    """Squared distances [N, M] of float64 [N, D] and [M, D], through the inner product: fast, rounded at 1e-16 of |x|^2.

    For whole numbers, as pixels are, it is exact.
    """
    squares = queries.square().sum(dim=1)[:, None] + references.square().sum(dim=1)
    return squares.addmm_(queries, references.T, alpha=-2).clamp_(min=0)


def nearest(queries: Tensor, references: Tensor, k: int = 1, block: int = 4096) -> Neighbours:
    """The k nearest `references` [M, ...] to each of `queries` [N, ...], of any dtype; further dimensions are flattened.

    Ranked by float64 inner products, then measured by differences, so that a copy is at exactly 0. Of references equally
    far away, any may be named. At most block^2 distances are held. ValueError unless 1 <= k <= M.
    """
    if not 1 <= k <= len(references):
        raise ValueError(f"k is {k}, with {len(references)} references")
    flat, table = queries.flatten(1), references.flatten(1)
    rows = max(1, min(block, _ELEMENTS // flat.shape[1]))
    found = [_nearest_in_blocks(flat[i : i + rows].double(), table, k, rows) for i in range(0, len(flat), rows)]
    if not found:
        return Neighbours(torch.empty(0, k, dtype=torch.float64), torch.empty(0, k, dtype=torch.int64))
    return Neighbours(torch.cat([each.distances for each in found]), torch.cat([each.indices for each in found]))


def _nearest_in_blocks(queries: Tensor, references: Tensor, k: int, rows: int) -> Neighbours:
    squared = torch.empty(len(queries), 0, dtype=torch.float64)
    indices = torch.empty(len(queries), 0, dtype=torch.int64)
    for first in range(0, len(references), rows):
        piece = squared_distances(queries, references[first : first + rows].double())
        values, places = piece.topk(min(k, piece.shape[1]), dim=1, largest=False)
        squared, indices = torch.cat([squared, values], dim=1), torch.cat([indices, places + first], dim=1)
        squared, order = squared.topk(min(k, squared.shape[1]), dim=1, largest=False)
        indices = indices.gather(1, order)
    exact = torch.stack([(queries - references[indices[:, j]].double()).norm(dim=1) for j in range(k)], dim=1)
    distances, order = exact.sort(dim=1)
    return Neighbours(distances, indices.gather(1, order))
