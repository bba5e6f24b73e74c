"""A collection of images that can be read one by one, whatever it is stored in."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from maskdm.data.index import Index

Item = Image.Image | bytes | Path
"""One image: opened, or as the bytes or the path of an encoded file."""

EDGE = 1 << 20
"""Bytes at either end of a file that go into its fingerprint: headers and footers lie there, and reading all would be slow."""


@dataclass(frozen=True)
class Source:
    """Images in a fixed order. `load` and the rest may be called from several threads at once."""

    name: str
    """The location as the user gave it."""
    description: str
    class_names: tuple[str, ...]
    """Empty when there are no classes."""
    notes: tuple[str, ...]
    """What the user should know, a line each: files passed over, choices made."""
    names: Sequence[str]
    labels: NDArray[np.int64] | None
    """One class index per image, -1 where one has none; None when there are no classes."""
    read: Callable[[int], Item]
    identify: Callable[[], str]
    index: Index | None = None
    """Where the images lie, if they do in shards: then they are used from there."""

    def __len__(self) -> int:
        """The number of images, unreadable ones included."""
        return len(self.names)

    def item_name(self, index: int) -> str:
        """A name that stays the same between calls, such as the path below the folder."""
        return self.names[index]

    def label(self, index: int) -> int:
        """The index of the image's class, or -1."""
        return -1 if self.labels is None else int(self.labels[index])

    def load(self, index: int) -> Item:
        """One image, not decoded yet where it is a file. Raises BrokenImage or OSError."""
        return self.read(index)

    def fingerprint(self) -> str:
        """SHA-256, in hex, that changes when the images do. It does not depend on where the data lies."""
        return self.identify()


def readable_name(path: str) -> str:
    """A path as text that can be printed: bytes that are no UTF-8 are replaced."""
    return os.fsencode(path).decode("utf-8", "replace")


def digest_files(files: Iterable[tuple[str, Path]]) -> str:
    """SHA-256, in hex, over (name, size, time of change, first and last MiB) of each file."""
    digest = hashlib.sha256()
    for name, path in files:
        status = path.stat()
        digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode("utf-8", "surrogateescape"))
        with path.open("rb") as file:
            digest.update(file.read(EDGE))
            file.seek(max(EDGE, status.st_size - EDGE))
            digest.update(file.read(EDGE))
    return digest.hexdigest()


def class_labels(values: Sequence[int | str | None]) -> tuple[NDArray[np.int64] | None, tuple[str, ...]]:
    """Labels and class names for values whose classes have no other names: each distinct value is a class, in order.

    None and "" are no class. Fewer than two classes count as none: there would be nothing to learn.
    """
    known = sorted({value for value in values if value is not None and value != ""}, key=lambda v: (isinstance(v, str), v))
    if len(known) < 2:
        return None, ()
    index: dict[int | str | None, int] = {value: i for i, value in enumerate(known)}
    return np.array([index.get(value, -1) for value in values], dtype=np.int64), tuple(map(str, known))
