"""The order of images that lie in shards: near to sequential reading, and still a function of (seed, epoch, position) alone.

An epoch's shards, permuted, are one long sequence. It is cut into lanes of equal length; a column of the batch reads one lane, so a
process that computes a slice of every batch reads the shards of few lanes. Within a lane images are shuffled in windows.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

from maskdm.errors import UserError

KEPT = 256
"""Orders of windows kept in memory."""


def num_lanes(batch: int, most: int) -> int:
    """The largest divisor of the batch that is not above `most`."""
    return max(number for number in range(1, min(batch, most) + 1) if batch % number == 0)


class Lanes:
    """Images of shards of the given sizes by position in an endless stream. `start` is where a stage began: its first epoch starts there.

    The order depends on the batch, so a stage with another batch starts a fresh epoch.
    """

    def __init__(self, counts: NDArray[np.int64], batch: int, seed: int, start: int, window: int, most: int) -> None:
        self.counts, self.seed, self.start, self.window = counts, seed, start, window
        self.total = int(counts.sum())
        if self.total == 0:
            raise UserError("the shards hold no images")
        self.lanes = num_lanes(batch, most)
        self.batch, self.width = batch, batch // self.lanes
        self.length = self.total // batch * self.width
        self.firsts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self._kept: OrderedDict[tuple[int, int, int], NDArray[np.int64]] = OrderedDict()

    def __len__(self) -> int:
        """Images in an epoch."""
        return self.total

    def indices_at(self, position: int, count: int) -> NDArray[np.int64]:
        """Images [count] at the positions [position, position + count), numbered through all shards in their given order."""
        if position < self.start:
            raise ValueError(f"position {position} lies before the stage, which began at {self.start}")
        places = [divmod(each - self.start, self.total) for each in range(position, position + count)]
        return np.array([self._image(epoch, offset) for epoch, offset in places], dtype=np.int64)

    def _image(self, epoch: int, offset: int) -> int:
        step, column = divmod(offset, self.batch)
        if offset < self.lanes * self.length:
            lane, length = column // self.width, self.length
            place = step * self.width + column % self.width
        else:  # what is left of the epoch, less than a batch
            lane, length = self.lanes, self.total - self.lanes * self.length
            place = offset - self.lanes * self.length
        window, within = divmod(place, self.window)
        order = self._order(epoch, lane, window, min(self.window, length - window * self.window))
        return self._numbered(epoch, lane * self.length + window * self.window + int(order[within]))

    def _numbered(self, epoch: int, place: int) -> int:
        """The image at a place of the sequence that the epoch's permuted shards make."""
        shards = self._order(epoch, -1, 0, len(self.counts))
        ends = np.cumsum(self.counts[shards])
        turn = int(np.searchsorted(ends, place, side="right"))
        shard = int(shards[turn])
        return int(self.firsts[shard]) + place - int(ends[turn] - self.counts[shard])

    def _order(self, epoch: int, lane: int, window: int, count: int) -> NDArray[np.int64]:
        key = epoch, lane, window
        if key not in self._kept:
            random = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, epoch, lane + 1, window])))
            self._kept[key] = random.permutation(count).astype(np.int64)
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]
