"""Batches on the device that trains, before it has to wait for them."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor

import torch
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
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            if loader.dataset.latents is None and loader.dataset.images.nbytes <= RESIDENT_SHARE * free:
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
        if self._next is not None:
            self._next[1].result()  # the loader serves one at a time
            self._next = None
        self.loader.reorder(seed)

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
        self._next = (position + count, count), self._thread.submit(self._pinned, position + count, count)
        return ready.to(self.device)

    def _sent(self, numbers: Tensor) -> Tensor:
        """On the device, without waiting for what it is doing: from pageable memory a copy would."""
        return numbers.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else numbers.to(self.device)

    def _pinned(self, position: int, count: int) -> Batch:
        batch = self.loader.batch(position, count)
        labels = None if batch.labels is None else batch.labels.pin_memory()
        return Batch(batch.images.pin_memory(), labels, batch.rows)
