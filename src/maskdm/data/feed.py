"""Batches on the device that trains, before it has to wait for them."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from maskdm.data.loader import Batch, Loader

RESIDENT_SHARE = 0.25
"""Of a GPU's free memory that the images may take to be kept there."""


class Feed:
    """A loader's batches on a device. `seconds` is the time its callers have waited.

    Images that fit are kept on a GPU, so that a batch is gathered there. Others are read and copied to pinned memory by a
    thread while the batch before is computed. On a CPU they are read when asked for: a thread would take its cores.
    """

    def __init__(self, loader: Loader, device: torch.device) -> None:
        self.loader, self.device = loader, device
        self.seconds = 0.0
        self._images: Tensor | None = None
        self._next: tuple[tuple[int, int], Future[Batch]] | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._stretch: tuple[int, int, list[range]] | None = None
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            local = not loader.streams and loader.dataset.latents is None
            if local and loader.dataset.images.nbytes <= RESIDENT_SHARE * free:
                self.keep()
            else:
                self.read_ahead()

    def read_ahead(self) -> None:
        """Have a thread read the batch after the one that was asked for."""
        self._thread = ThreadPoolExecutor(1, "maskdm-data")

    def keep(self) -> None:
        """Copy all images to the device, once, in pieces of about 64 MiB."""
        images = self.loader.dataset.images
        count, height, width, channels = images.shape
        self._images = torch.empty((count, channels, height, width), dtype=torch.uint8, device=self.device)
        rows = max(1, (64 << 20) // images[:1].nbytes)
        for first in range(0, count, rows):
            piece = images[first : first + rows].transpose(0, 3, 1, 2)
            self._images[first : first + rows] = torch.from_numpy(piece.copy()).to(self.device)

    def reorder(self, seed: int) -> None:
        """Take the images in the order of another seed."""
        self._forget_next()
        self.loader.reorder(seed)

    def begin(self, start: int, batch: int, pieces: list[range]) -> None:
        """Take up the batches of a stage that began at position `start`; this process computes these pieces of each."""
        if self._stretch != (start, batch, pieces):
            self._forget_next()
            self._stretch = start, batch, pieces
            self.loader.begin(start, batch, range(pieces[0].start, pieces[-1].stop))

    def rows(self, start: int, batch: int, position: int) -> NDArray[np.int64]:
        """The rows of the whole batch at a position, in a stage that began at position `start`."""
        self._forget_next()
        self._stretch = None
        self.loader.begin(start, batch, range(batch))
        return self.loader.indices_at(position, batch)

    def _forget_next(self) -> None:
        if self._next is not None:
            self._next[1].result()  # the loader serves one at a time
            self._next = None

    def _following(self, position: int, count: int) -> tuple[int, int]:
        """The piece after one, in this process."""
        if self._stretch is None:
            return position + count, count
        start, batch, pieces = self._stretch
        first = (position - start) % batch
        after = next((piece for piece in pieces if piece.start > first), None)
        begins = position - first + (pieces[0].start + batch if after is None else after.start)
        return begins, len(pieces[0] if after is None else after)

    def batch(self, position: int, count: int) -> Batch:
        """As `Loader.batch`, on the device."""
        started = time.perf_counter()
        batch = self._batch(position, count)
        self.seconds += time.perf_counter() - started
        return batch

    def _batch(self, position: int, count: int) -> Batch:
        if self._images is not None:
            rows = torch.from_numpy(self.loader.indices_at(position, count))
            labels = None if self.loader.dataset.labels is None else torch.from_numpy(self.loader.dataset.labels[rows.numpy()])
            return Batch(self._images[self._sent(rows)], None if labels is None else self._sent(labels), rows)
        if self._thread is None:
            return self.loader.batch(position, count).to(self.device)
        key, waiting = self._next or ((-1, -1), None)
        ahead = None if waiting is None else waiting.result()  # in any case: the loader serves one at a time
        ready = ahead if ahead is not None and key == (position, count) else self._pinned(position, count)
        following = self._following(position, count)
        self._next = following, self._thread.submit(self._pinned, *following)
        return ready.to(self.device)

    def _sent(self, numbers: Tensor) -> Tensor:
        """On the device, without waiting for what it is doing: from pageable memory a copy would."""
        return numbers.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else numbers.to(self.device)

    def _pinned(self, position: int, count: int) -> Batch:
        batch = self.loader.batch(position, count)
        labels = None if batch.labels is None else batch.labels.pin_memory()
        return Batch(batch.images.pin_memory(), labels, batch.rows)
