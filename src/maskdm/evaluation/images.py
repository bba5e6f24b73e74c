"""Sets of images that are read in pieces, and their features, computed once and kept."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from torch import Tensor

from maskdm.data import Pixels
from maskdm.engine import Ranks
from maskdm.evaluation.features import FeatureNetwork
from maskdm.evaluation.pieces import PIECE, Progress, fill


@dataclass(frozen=True)
class ImageSet:
    """Images of one size: some `rows`, in this order, of `pixels` [n, height, width, channels] in 0..255, perhaps mapped from a file."""

    pixels: Pixels
    rows: NDArray[np.int64]
    key: str
    """Stands for the content; features are kept under it."""
    labels: NDArray[np.int64] | None = None
    """A class per row; None where any has none."""
    name_of: Callable[[int], str] | None = None
    """The name of the image in a row of `pixels`."""

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, places: NDArray[np.int64] | slice) -> UInt8[Tensor, "_ _ _ _"]:
        """Some of the images [n, channels, height, width], by their places in this set."""
        return torch.from_numpy(np.ascontiguousarray(self.pixels[self.rows[places]].transpose(0, 3, 1, 2)))

    def pieces(self, size: int = PIECE) -> Iterator[UInt8[Tensor, "_ _ _ _"]]:
        """All images in order, `size` at a time."""
        for first in range(0, len(self), size):
            yield self.take(slice(first, first + size))

    def places(self, most: int, seed: int = 0) -> NDArray[np.int64]:
        """Places of at most `most` images, drawn by `seed`, ascending."""
        if len(self) <= most:
            return np.arange(len(self))
        return np.sort(np.random.default_rng(seed).choice(len(self), most, replace=False))

    def part(self, places: NDArray[np.int64]) -> ImageSet:
        """The set of the images at these places."""
        labels = None if self.labels is None else self.labels[places]
        return ImageSet(self.pixels, self.rows[places], digest(self.key, places), labels, self.name_of)

    def name(self, place: int) -> str:
        """An image's name, or its number."""
        row = int(self.rows[place])
        return self.name_of(row) if self.name_of else f"#{row}"


def digest(key: str, rows: NDArray[np.int64]) -> str:
    """A key for some rows of what has a key."""
    return hashlib.sha256(key.encode() + np.ascontiguousarray(rows).tobytes()).hexdigest()[:32]


class Extractor:
    """Turns images into the features of one network, and keeps them in a folder that later evaluations share."""

    def __init__(self, network: FeatureNetwork, folder: Path, ranks: Ranks, progress: Progress | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.network, self.folder, self.ranks, self.progress = network, folder, ranks, progress
        about = [network.hash, network.preprocessing, *network.further.values()]
        self._key = hashlib.sha256(" ".join(about).encode()).hexdigest()[:16]

    def features(self, images: ImageSet, mirrored: bool = False) -> Float[Tensor, "_ _"]:
        """Features [n, dimensions], float32, mapped from the file; those of the images mirrored left to right, if asked."""
        path = self.folder / f"{self._key}-{images.key}{'-mirrored' if mirrored else ''}.npy"

        def make(rows: slice) -> NDArray[np.float32]:
            piece = images.take(rows)
            return self.network.features(piece.flip(-1) if mirrored else piece).numpy()

        shape = (len(images), self.network.dimensions)
        return torch.from_numpy(fill(path, shape, np.float32, make, self.ranks, self.progress))

    def classes(self, images: ImageSet) -> NDArray[np.int64] | None:
        """The class [n] that the network puts each image in, mapped from the file; None where it knows no classes."""

        def make(rows: slice) -> NDArray[np.int64]:
            predicted = self.network.predict(images.take(rows))
            assert predicted is not None
            return predicted.numpy()

        if not self.network.num_classes:
            return None
        return fill(self.folder / f"{self._key}-{images.key}-classes.npy", (len(images),), np.int64, make, self.ranks, self.progress)
