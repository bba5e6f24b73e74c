"""Batches by position in an endless stream: the order is a function of (seed, epoch), so a position is all there is to resume."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, UInt8
from numpy.typing import NDArray
from torch import Tensor

from maskdm.data.dataset import Dataset
from maskdm.data.shards import Loss
from maskdm.errors import UserError


@dataclass(frozen=True)
class Batch:
    """Images in 0..255, or their latents; labels where the data has classes; each image's row in the data set, on the CPU."""

    images: UInt8[Tensor, "batch channels height width"] | Float[Tensor, "batch views channels height width"]
    labels: Int64[Tensor, " batch"] | None
    rows: Int64[Tensor, " batch"]

    def to(self, device: torch.device) -> Batch:
        """The batch on a device; from pinned memory the copy goes on while the host does."""
        labels = None if self.labels is None else self.labels.to(device, non_blocking=self.labels.is_pinned())
        return replace(self, images=self.images.to(device, non_blocking=self.images.is_pinned()), labels=labels)


class Loader:
    """Some rows of a data set, shuffled anew each epoch, without end. Keeps no state but the orders of the latest epochs."""

    streams = False
    """Whether images are read from elsewhere."""
    patience = 45.0
    """Seconds that a batch may take."""

    def __init__(self, dataset: Dataset, indices: NDArray[np.int64], seed: int) -> None:
        if len(indices) == 0:
            raise UserError(f"no image of {dataset.path} is left to train on; lower data.heldout")
        self.dataset, self.indices, self.seed = dataset, np.asarray(indices, dtype=np.int64), seed
        self._orders: dict[int, NDArray[np.int64]] = {}

    def __len__(self) -> int:
        """Images in an epoch."""
        return len(self.indices)

    def begin(self, start: int, batch: int, part: range) -> None:
        """Take up the batches of a stage that began at a position; of each this process computes a part. The order is the same for all."""

    def reorder(self, seed: int) -> None:
        """Shuffle by another seed."""
        if seed != self.seed:
            self.seed = seed
            self._orders.clear()

    def news(self) -> list[Loss]:
        """What was found lost since this was last asked; nothing, where all images lie on this machine."""
        return []

    def admit(self, losses: list[Loss]) -> list[Loss]:
        """Take it as lost too, as other processes have found; returns what was not known. Raises UserError where it is too much."""
        return []

    def indices_at(self, position: int, count: int) -> NDArray[np.int64]:
        """Rows [count] at the positions [position, position + count) of the stream; an epoch ends where the next begins."""
        parts: list[NDArray[np.int64]] = []
        while count > 0:
            epoch, offset = divmod(position, len(self.indices))
            part = self._order(epoch)[offset : offset + count]
            parts.append(part)
            position, count = position + len(part), count - len(part)
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    def batch(self, position: int, count: int) -> Batch:
        """The images at the positions [position, position + count) of the stream, on the CPU."""
        rows = self.indices_at(position, count)
        images = self.dataset.field(rows)
        labels = None if self.dataset.labels is None else torch.from_numpy(self.dataset.labels[rows])
        return Batch(images, labels, torch.from_numpy(rows))

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._orders:
            random = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, epoch])))
            self._orders = {key: order for key, order in self._orders.items() if abs(key - epoch) == 1}
            self._orders[epoch] = self.indices[random.permutation(len(self.indices))]
        return self._orders[epoch]


def to_model_range(images: UInt8[Tensor, "*shape"] | Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """From 0..255 to float32 in -1..1; latents as they are."""
    return images.float() if images.is_floating_point() else images.float() / 127.5 - 1


def to_uint8(images: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """From -1..1 to 0..255, rounded; what lies outside is cut off."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def flip(
    images: UInt8[Tensor, "batch channels height width"] | Float[Tensor, "batch views channels height width"], mask: Bool[Tensor, " batch"]
) -> UInt8[Tensor, "batch channels height width"] | Float[Tensor, "batch channels height width"]:
    """The images, those of the mask mirrored left to right; of latents the last view, which is that."""
    if images.ndim == 5:
        return torch.where(mask[:, None, None, None], images[:, -1], images[:, 0])
    return torch.where(mask[:, None, None, None], images.flip(-1), images)
