"""The feature network of an evaluation: one from a file, or one trained on the real images and kept."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray

from maskdm.engine import Ranks
from maskdm.evaluation import FeatureNetwork, ImageSet, cached_self, is_self, load_network
from maskdm.runs.display import Display
from maskdm.runs.store import cache_directory

MOST_BYTES = 2**29
"""Of training images held in memory to train a `self` network; beyond, an even part of them is used."""


def choose_network(
    spec: str, training: ImageSet, heldout: ImageSet | None, seed: int, device: torch.device, ranks: Ranks, display: Display
) -> FeatureNetwork:
    """The network of `--features SPEC`. `self` is trained by the first process; the others read it. Raises UserError."""
    if not is_self(spec):
        return load_network(spec, cache_directory() / "networks", device)
    if ranks.first:
        display.note("features: a small network trained on the real images (about a minute; kept for the next time)")
        found = _self(training, heldout, seed, device)
        ranks.wait()
        return found
    ranks.wait()
    return _self(training, heldout, seed, device)


def _self(training: ImageSet, heldout: ImageSet | None, seed: int, device: torch.device) -> FeatureNetwork:
    places = training.places(max(100, MOST_BYTES // int(np.prod(training.pixels.shape[1:]))))
    images, labels = training.take(places), None if training.labels is None else training.labels[places]
    new = _nothing(training) if heldout is None else heldout.take(slice(None))
    new_labels: NDArray[np.int64] | None = np.zeros(0, dtype=np.int64) if labels is not None else None
    new_labels = new_labels if heldout is None else heldout.labels
    key = hashlib.sha256(f"{training.key} {labels is not None and labels.tolist()} {None if heldout is None else heldout.key}".encode())
    return cached_self(cache_directory() / "networks", key.hexdigest()[:32], images, labels, new, new_labels, seed, device=device)


def _nothing(like: ImageSet) -> torch.Tensor:
    _, height, width, channels = like.pixels.shape
    return torch.zeros(0, channels, height, width, dtype=torch.uint8)
