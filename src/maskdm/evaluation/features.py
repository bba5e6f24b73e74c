"""Feature networks: what turns images into the vectors that distances are measured between."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int, Integer, UInt8
from numpy.typing import NDArray
from torch import Tensor

from maskdm.errors import UserError

Images: TypeAlias = UInt8[Tensor, "_ _ _ _"] | UInt8[np.ndarray, "_ _ _ _"]
"""[N, C, H, W] in 0..255; C is 1 or 3. An array may be mapped from a file: it is read in pieces."""

Labels: TypeAlias = Integer[Tensor, " _"] | Integer[np.ndarray, " _"]
"""Classes [N], from 0."""


@dataclass(frozen=True)
class FeatureNetwork(ABC):
    """Images to vectors. Distances compare only where `hash`, `preprocessing` and `further` are the same.

    `hash`: SHA-256 of the weights or of their file. `num_classes`: how many classes `predict` tells apart, 0 for none.
    `preprocessing`: in words, what is done to the images before the network sees them. `batch`: images in memory at a time.
    """

    name: str
    hash: str
    dimensions: int
    num_classes: int
    preprocessing: str
    batch: int

    @property
    def is_fid(self) -> bool:
        """Whether a Frechet distance in these features may be called FID: the published Inception network alone."""
        return False

    @property
    def further(self) -> dict[str, str]:
        """What else the features depend on, where a user may choose it: which output is read, how the network is built."""
        return {}

    @abstractmethod
    def embed(self, images: UInt8[Tensor, "n _ _ _"]) -> Float[Tensor, "n _"]:
        """Features of one piece of the images, which is on the CPU; the result may be elsewhere."""

    def scores(self, images: UInt8[Tensor, "n _ _ _"]) -> Float[Tensor, "n _"] | None:
        """Class scores of one piece; None without classes."""
        return None

    @torch.no_grad()
    def features(self, images: Images, batch: int | None = None) -> Float[Tensor, "_ _"]:
        """Features [N, dimensions], float32, on the CPU. UserError for images that the network cannot read, and for NaN."""
        with _whole_precision():
            found = [self.embed(piece).float().cpu() for piece in _pieces(images, batch or self.batch)]
        joined = torch.cat(found) if found else torch.empty(0, self.dimensions)
        if not torch.isfinite(joined).all():
            raise UserError(f"the features of {self.name} hold NaN or infinity; its weights or its input range are wrong")
        return joined

    @torch.no_grad()
    def predict(self, images: Images, batch: int | None = None) -> Int[Tensor, " _"] | None:
        """The class of each image, on the CPU, or None where the network knows no classes."""
        if not self.num_classes:
            return None
        with _whole_precision():
            found = [self.scores(piece) for piece in _pieces(images, batch or self.batch)]
        classes = [scores.cpu().argmax(dim=1) for scores in found if scores is not None]
        return torch.cat(classes) if classes else torch.empty(0, dtype=torch.int64)

    def provenance(self) -> dict[str, str | int | float | bool | None]:
        """Name, hash, dimensions, preprocessing and what else the features depend on, flat and ready for JSON."""
        known = {"name": self.name, "hash": self.hash, "dimensions": self.dimensions, "preprocessing": self.preprocessing}
        return {**known, **self.further}


def take(images: Images, rows: slice | NDArray[np.int64]) -> UInt8[Tensor, "_ _ _ _"]:
    """Some of the images as a tensor of their own."""
    if isinstance(images, Tensor):
        return images[rows if isinstance(rows, slice) else torch.from_numpy(rows)]
    return torch.from_numpy(np.array(images[rows]))


def batch_on(device: torch.device) -> int:
    """Images at a time for a deep network: few of them stay in a CPU's caches, and a GPU wants many."""
    return 16 if device.type == "cpu" else 128


def label_tensor(labels: Labels) -> Int[Tensor, " _"]:
    """Labels as an int64 tensor."""
    return labels.long() if isinstance(labels, Tensor) else torch.from_numpy(labels.astype(np.int64))


def _pieces(images: Images, batch: int) -> Iterator[Tensor]:
    return (take(images, slice(first, first + batch)).cpu() for first in range(0, len(images), batch))


@contextmanager
def _whole_precision() -> Generator[None]:
    """Without TF32, which moves a GPU's features by about 1e-3: a distance must not depend on the machine."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
