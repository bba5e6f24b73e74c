"""The order of images that lie in shards: near to sequential reading, and still a function of (seed, epoch, position) alone.

An epoch's shards, permuted, are one long sequence. It is cut into lanes of equal length; a column of the batch reads one lane, so a
process that computes a slice of every batch reads the shards of few lanes. Within a lane images are shuffled in windows.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from maskdm.errors import UserError

KEPT = 1024
"""Orders of windows kept in memory."""


class Window(NamedTuple):
    """A window by its place: epoch, lane, number within the lane."""

    epoch: int
    lane: int
    number: int


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
        self._epochs: OrderedDict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = OrderedDict()
        self._kept: OrderedDict[Window, NDArray[np.int64]] = OrderedDict()

    def __len__(self) -> int:
        """Images in an epoch."""
        return self.total

    def indices_at(self, position: int, count: int) -> NDArray[np.int64]:
        """Images [count] at the positions [position, position + count), numbered through all shards in their given order."""
        windows, within = self.windows_at(np.arange(position, position + count))
        return np.array([self.images(window)[place] for window, place in zip(windows, within.tolist(), strict=True)], dtype=np.int64)

    def windows_at(self, positions: NDArray[np.int64]) -> tuple[list[Window], NDArray[np.int64]]:
        """The window of each position, and the place [n] in it."""
        if len(positions) and positions.min() < self.start:
            raise ValueError(f"position {positions.min()} lies before the stage, which began at {self.start}")
        epoch, offset = np.divmod(positions - self.start, self.total)
        step, column = np.divmod(offset, self.batch)
        regular = offset < self.lanes * self.length  # what is left of the epoch, less than a batch, is a lane of its own
        lane = np.where(regular, column // self.width, self.lanes)
        place = np.where(regular, step * self.width + column % self.width, offset - self.lanes * self.length)
        number, within = np.divmod(place, self.window)
        return [Window(*each) for each in zip(epoch.tolist(), lane.tolist(), number.tolist(), strict=True)], within

    def positions(self, window: Window) -> NDArray[np.int64]:
        """The positions [n] of a window's images, ascending."""
        first = window.number * self.window
        place = np.arange(first, min(first + self.window, self._length(window.lane)), dtype=np.int64)
        if window.lane < self.lanes:
            step, column = np.divmod(place, self.width)
            offset = step * self.batch + window.lane * self.width + column
        else:
            offset = self.lanes * self.length + place
        return self.start + window.epoch * self.total + offset

    def images(self, window: Window) -> NDArray[np.int64]:
        """A window's images [n], in the order in which they come."""
        if window not in self._kept:
            first = window.number * self.window
            count = min(self.window, self._length(window.lane) - first)
            random = np.random.SeedSequence([self.seed, window.epoch, window.lane + 1, window.number])
            order = np.random.Generator(np.random.PCG64(random)).permutation(count)
            self._kept[window] = self._numbered(window.epoch, window.lane * self.length + first + order)
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(window)
        return self._kept[window]

    def _length(self, lane: int) -> int:
        return self.length if lane < self.lanes else self.total - self.lanes * self.length

    def _numbered(self, epoch: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """The images at places of the sequence that the epoch's permuted shards make."""
        if epoch not in self._epochs:
            random = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, epoch, 0])))
            shards = random.permutation(len(self.counts)).astype(np.int64)
            self._epochs[epoch] = shards, np.cumsum(self.counts[shards])
            if len(self._epochs) > 2:
                self._epochs.popitem(last=False)
        shards, ends = self._epochs[epoch]
        turns = np.searchsorted(ends, places, side="right")
        found = shards[turns]
        return self.firsts[found] + places - (ends[turns] - self.counts[found])
