"""Decoded images on disk, memory-mapped: what training reads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from maskdm.data.latents import Latents

MAX_HELDOUT = 5000

IMAGES, LABELS, HASHES, MANIFEST, SUMMARY = "images.npy", "labels.npy", "hashes.npy", "manifest.jsonl", "summary.json"


@runtime_checkable
class Pixels(Protocol):
    """Images [n, height, width, channels] in 0..255, in memory, mapped from a file, or read when they are asked for."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of all."""
        ...

    @property
    def nbytes(self) -> int:
        """That are kept on this machine."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, key: slice | NDArray[np.int64], /) -> NDArray[np.uint8]: ...


@dataclass(frozen=True)
class Dataset:
    """Images that could be read, in the order of their source."""

    images: Pixels
    """[n, height, width, channels], a read-only memory map."""
    labels: NDArray[np.int64] | None
    """[n], indices into `class_names`, -1 for an image without a class; None when there are no classes."""
    class_names: tuple[str, ...]
    fingerprint: str
    """The source's."""
    content_hash: str
    """SHA-256 over the decoded pixels, in hex."""
    broken: tuple[tuple[str, str], ...]
    """(name, reason) of each image that could not be read."""
    notes: tuple[str, ...]
    path: Path
    """The folder of the cache."""
    latents: Latents | None = None
    """What an autoencoder makes of the images, where that is learned."""

    def __len__(self) -> int:
        """The number of images."""
        return len(self.images)

    @property
    def whole(self) -> Pixels:
        """The images, of which every one is there: for what is kept, or compared with another run's. Else a UserError when asked."""
        return self.images

    def field(self, rows: NDArray[np.int64]) -> Tensor:
        """What a network sees of some rows: uint8 [n, channels, height, width], or latents [n, views, channels, height, width]."""
        if self.latents is not None:
            return self.latents.take(rows)
        return torch.from_numpy(np.ascontiguousarray(self.images[rows].transpose(0, 3, 1, 2)))

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The name of each image, such as its path below the folder. Read from the manifest when first asked for."""
        with (self.path / MANIFEST).open(encoding="utf-8") as lines:
            items = [json.loads(line) for line in lines]
        return tuple(item["name"] for item in items if item["index"] is not None)

    def name_of(self, row: int) -> str:
        """The name of one image."""
        return self.names[row]

    @cached_property
    def hashes(self) -> NDArray[np.uint8]:
        """[n, 32], SHA-256 of each image's pixels."""
        return np.load(self.path / HASHES, allow_pickle=False)

    def split(self, heldout_share: float, seed: int, limit: int | None = None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows to train on and rows held out, each in ascending order: a function of the data, share, limit and seed alone.

        About min(5 000, share * n) are held out, at least one; each class gives its share, and keeps an image to train
        on where it can. Images with the same pixels are never on both sides. None is held out where all are the same. Of those to
        train on at most `limit` are taken, at random; a smaller limit takes some of a larger one's.
        """
        count = min(MAX_HELDOUT, round(heldout_share * len(self)))
        if heldout_share <= 0 or len(self) < 2:
            return _some(np.arange(len(self), dtype=np.int64), limit, seed), np.zeros(0, dtype=np.int64)
        heldout = _hold_out(self.hashes, self.labels, max(1, count), np.random.default_rng(np.random.SeedSequence([seed])))
        return _some(np.flatnonzero(~heldout).astype(np.int64), limit, seed), np.flatnonzero(heldout).astype(np.int64)


def _some(rows: NDArray[np.int64], limit: int | None, seed: int) -> NDArray[np.int64]:
    if limit is None or limit >= len(rows):
        return rows
    return np.sort(np.random.default_rng(np.random.SeedSequence([seed, 1])).permutation(rows)[:limit])


def duplicates(dataset: Dataset) -> list[list[str]]:
    """Names of the images with the same decoded pixels, a list for each group of two or more."""
    rows: dict[bytes, list[int]] = {}
    for row, digest in enumerate(dataset.hashes):
        rows.setdefault(digest.tobytes(), []).append(row)
    return [[dataset.name_of(row) for row in group] for group in rows.values() if len(group) > 1]


def _hold_out(hashes: NDArray[np.uint8], labels: NDArray[np.int64] | None, count: int, random: np.random.Generator) -> NDArray[np.bool_]:
    """Which rows [n] to hold out: `count` of them, or the nearest below that keeps images of the same pixels together."""
    keys = np.ascontiguousarray(hashes[:, :8]).view(np.uint64).ravel()  # 8 bytes do: a collision would only join two groups
    _, first, group_of = np.unique(keys, return_index=True, return_inverse=True)
    sizes = np.bincount(group_of)
    class_of = np.zeros(len(sizes), dtype=np.int64) if labels is None else labels[first] - labels.min()
    quotas = _quotas(np.bincount(class_of, weights=sizes).astype(np.int64), count, labels is not None)
    taken = np.zeros(len(sizes), dtype=np.bool_)
    order = random.permutation(len(sizes))
    for group in order:
        if sizes[group] <= quotas[class_of[group]]:
            quotas[class_of[group]] -= sizes[group]
            taken[group] = True
    missing = count - int(sizes[taken].sum())
    for group in order:  # classes that could give no more leave the rest to the others; one group is kept to train on
        if missing > 0 and not taken[group] and sizes[group] <= missing and np.count_nonzero(~taken) > 1:
            missing -= int(sizes[group])
            taken[group] = True
    if not taken.any() and len(sizes) > 1:
        taken[order[np.argmin(sizes[order])]] = True
    return taken[group_of]


def _quotas(of_class: NDArray[np.int64], count: int, keep_one: bool) -> NDArray[np.int64]:
    """How many of each class to hold out: in proportion, the largest remainders rounded up."""
    exact = of_class * (count / of_class.sum())
    quotas = np.floor(exact).astype(np.int64)
    up = np.argsort(quotas - exact, kind="stable")[: count - int(quotas.sum())]
    quotas[up] += 1
    return np.minimum(quotas, np.maximum(of_class - 1, 0)) if keep_one else quotas


def open_cached(path: Path, class_names: tuple[str, ...], source_notes: tuple[str, ...]) -> Dataset | None:
    """The data set in a folder of the cache; None where there is none, or where files are missing or of another size."""
    try:
        summary: dict[str, Any] = json.loads((path / SUMMARY).read_text(encoding="utf-8"))
        if any((path / name).stat().st_size != size for name, size in summary["sizes"].items()):
            return None
        images = np.load(path / IMAGES, mmap_mode="r", allow_pickle=False)
        labels = np.load(path / LABELS, allow_pickle=False)
        return Dataset(
            images=images,
            labels=labels if class_names else None,
            class_names=class_names,
            fingerprint=summary["fingerprint"],
            content_hash=summary["content_hash"],
            broken=tuple((name, reason) for name, reason in summary["broken"]),
            notes=(*source_notes, *summary["notes"]),
            path=path,
        )
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None
