"""Batches of images that lie in shards, read window by window ahead of their use."""

from __future__ import annotations

from concurrent.futures import Future

import numpy as np
import torch
from numpy.typing import NDArray

from maskdm.data.dataset import Dataset
from maskdm.data.lanes import Lanes, Window, num_lanes
from maskdm.data.loader import Batch, Loader
from maskdm.data.shards import Loss, ShardDataset
from maskdm.data.threads import readers
from maskdm.errors import UserError

LANES = 256
"""Places of an epoch from which a batch is read, at most."""

TRIES = 1000
"""Images drawn in place of one that is lost, at most."""

Rows = NDArray[np.int64]


def make_loader(dataset: Dataset, indices: Rows, seed: int) -> Loader:
    """The loader that goes with where a data set's images are."""
    if isinstance(dataset, ShardDataset) and dataset.latents is None:
        return ShardLoader(dataset, indices, seed)
    return Loader(dataset, indices, seed)


class ShardLoader(Loader):
    """Some rows of shards, once an epoch, in the order of `Lanes`.

    What a window holds for this process is read at once, when the window before it comes into use; images that are lost are replaced by
    others, which depend on the seed and the row alone.
    """

    streams = True
    patience = 900.0

    def __init__(self, dataset: ShardDataset, indices: Rows, seed: int) -> None:
        super().__init__(dataset, indices, seed)
        self.reader = dataset.reader
        self.shuffle = dataset.reader.settings.shuffle
        self.counts = np.diff(np.searchsorted(self.indices, dataset.index.firsts)).astype(np.int64)
        self._windows: dict[Window, tuple[int, Future[dict[int, bytes]]]] = {}
        self.order, self._part = self._lanes(0, 1), range(1)

    def _lanes(self, start: int, batch: int) -> Lanes:
        lanes = num_lanes(batch, LANES)
        return Lanes(self.counts, batch, self.seed, start, max(batch // lanes, self.shuffle // lanes), LANES)

    def begin(self, start: int, batch: int, part: range) -> None:
        """Take up the batches of a stage that began at a position; this process computes a part of each."""
        if (start, batch) != (self.order.start, self.order.batch):
            self.order = self._lanes(start, batch)
            self._windows.clear()
        self._part = part

    def reorder(self, seed: int) -> None:
        """Shuffle by another seed."""
        if seed != self.seed:
            self.seed = seed
            self.order = self._lanes(self.order.start, self.order.batch)
            self._windows.clear()

    def news(self) -> list[Loss]:
        """What was found lost since this was last asked."""
        return self.reader.news()

    def admit(self, losses: list[Loss]) -> list[Loss]:
        """Take it as lost too, as other processes have found; returns what was not known. Raises UserError where it is too much."""
        return [loss for loss in losses if self.reader.lose(loss, tell=False)]

    def indices_at(self, position: int, count: int) -> Rows:
        """Rows [count] at the positions [position, position + count) of the stream; an epoch ends where the next begins."""
        return self.indices[self.order.indices_at(position, count)]

    def batch(self, position: int, count: int) -> Batch:
        """The images at the positions [position, position + count) of the stream. Raises UserError where too many are lost."""
        wanted, order = np.arange(position, position + count), self.order
        windows, _ = order.windows_at(wanted)
        ahead, _ = order.windows_at(wanted + order.batch * (order.window // order.width))
        for window in dict.fromkeys([*windows, *ahead]):
            if window not in self._windows:
                self._windows[window] = self._fetch(window)
        rows = self.indices_at(position, count).tolist()
        self.reader.check()
        bodies: dict[int, bytes] = {}
        for row, window in zip(rows, windows, strict=True):
            body = self._windows[window][1].result().get(row)
            if body is not None:
                bodies[row] = body
        others = [row for row in rows if row not in bodies and not self.reader.is_lost(row)]  # of another part than was said
        bodies |= self.reader.bodies(np.array(others, dtype=np.int64))
        pixels = self.reader.decode(list(bodies.items()))
        taken = [row if row in pixels else self._replace(row, pixels) for row in rows]
        self._windows = {key: kept for key, kept in self._windows.items() if kept[0] >= position}
        images = np.ascontiguousarray(np.stack([pixels[row] for row in taken]).transpose(0, 3, 1, 2))
        found = np.array(taken, dtype=np.int64)
        labels = None if self.dataset.labels is None else torch.from_numpy(self.dataset.labels[found])
        return Batch(torch.from_numpy(images), labels, torch.from_numpy(found))

    def _fetch(self, window: Window) -> tuple[int, Future[dict[int, bytes]]]:
        """Have a thread read what this process needs of a window; and the last position for which it is kept."""
        positions, order = self.order.positions(window), self.order
        column = (positions - order.start) % order.batch
        mine = (column >= self._part.start) & (column < self._part.stop)
        rows = self.indices[order.images(window)[mine]]
        return int(positions[-1]), readers().submit(lambda: self.reader.read(rows))

    def _replace(self, row: int, pixels: dict[int, NDArray[np.uint8]]) -> int:
        """The row of an image, read, in place of one that is lost."""
        random = np.random.default_rng(np.random.SeedSequence([self.seed, 7, row]))
        for _ in range(TRIES):
            other = int(self.indices[random.integers(len(self.indices))])
            if other not in pixels and not self.reader.is_lost(other):
                pixels |= self.reader.decode(list(self.reader.bodies(np.array([other])).items()))
            if other in pixels:
                return other
        raise UserError(f"too many images of {self.dataset.path} cannot be read")
