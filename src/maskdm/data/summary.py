"""A quick look at a source's images, for the settings that are chosen by themselves."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass

import numpy as np
from PIL import Image

from maskdm.config import Data
from maskdm.data.decode import BrokenImage, decode, open_image, orientation_swaps
from maskdm.data.index import Index
from maskdm.data.source import Source

LOOKED_AT = 2000
RUN = 50
"""Images looked at in a row: tables are read in groups of rows, and a group for each image would be slow."""

COLOUR_CHECKED = 64
GRAY_TOLERANCE = 8
"""Largest difference of the channels of a pixel that counts as gray: JPEG leaves a few."""


@dataclass(frozen=True)
class Summary:
    """What up to 2 000 images, spread over the source, look like. Shares are of those that could be read."""

    count: int
    """Images in the source."""
    looked_at: int
    readable: int
    """How many of those looked at have a readable header."""
    sizes: tuple[tuple[tuple[int, int], int], ...]
    """((height, width) in pixels, how many), the most frequent first."""
    median_height: int
    """In pixels, the image upright; 0 when none is readable, as is `median_width`."""
    median_width: int
    gray_share: float
    """Images without colour, also those stored as RGB."""
    alpha_share: float
    """Images that may be transparent."""
    animated_share: float
    class_names: tuple[str, ...]
    class_counts: tuple[int, ...]
    """Images per class, over the whole source."""

    @property
    def gray(self) -> bool:
        """Whether no image has colour."""
        return self.readable > 0 and self.gray_share == 1

    @property
    def broken_share(self) -> float:
        """Share of those looked at whose header cannot be read."""
        return 1 - self.readable / max(1, self.looked_at)


@dataclass(frozen=True)
class _Header:
    height: int
    width: int
    mode: str
    alpha: bool
    animated: bool


def inspect(source: Source) -> Summary:
    """Look at the headers of images spread over the source, and at the colours of a few; an index of shards has been told."""
    if source.index is not None:
        return _of_index(source.index)
    rows = _spread(len(source), LOOKED_AT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, on odd metadata: `prepare` says what matters
        headers = {row: header for row in rows if (header := _header(source, row)) is not None}
        coloured = [row for row, header in headers.items() if Image.getmodebase(header.mode) != "L"]
        checked = [gray for row in _pick(coloured, COLOUR_CHECKED) if (gray := _is_gray(source, row)) is not None]
    found = list(headers.values())
    gray = len(found) - len(coloured) + len(coloured) * (float(np.mean(checked)) if checked else 0.0)
    known = np.zeros(0, dtype=np.int64) if source.labels is None else source.labels[source.labels >= 0]
    return Summary(
        count=len(source),
        looked_at=len(rows),
        readable=len(found),
        sizes=tuple(Counter((header.height, header.width) for header in found).most_common()),
        median_height=int(np.median([header.height for header in found])) if found else 0,
        median_width=int(np.median([header.width for header in found])) if found else 0,
        gray_share=gray / max(1, len(found)),
        alpha_share=sum(header.alpha for header in found) / max(1, len(found)),
        animated_share=sum(header.animated for header in found) / max(1, len(found)),
        class_names=source.class_names,
        class_counts=tuple(np.bincount(known, minlength=len(source.class_names)).tolist()),
    )


def _of_index(index: Index) -> Summary:
    count = len(index)
    known = np.zeros(0, dtype=np.int64) if index.labels is None else index.labels[index.labels >= 0]
    return Summary(
        count=count,
        looked_at=count,
        readable=count,
        sizes=(((index.height, index.width), count),),
        median_height=index.height,
        median_width=index.width,
        gray_share=float(index.gray),
        alpha_share=0.0,
        animated_share=0.0,
        class_names=index.class_names,
        class_counts=tuple(np.bincount(known, minlength=len(index.class_names)).tolist()),
    )


def _spread(count: int, most: int) -> list[int]:
    """All indices, or runs of neighbours spread evenly."""
    if count <= most:
        return list(range(count))
    starts = np.linspace(0, count - RUN, most // RUN).astype(int)
    return sorted({int(start) + offset for start in starts for offset in range(RUN)})


def _pick(rows: list[int], most: int) -> list[int]:
    return [rows[i] for i in np.unique(np.linspace(0, len(rows) - 1, min(most, len(rows))).astype(int))] if rows else []


def _header(source: Source, row: int) -> _Header | None:
    try:
        item = source.load(row)
        image = item if isinstance(item, Image.Image) else open_image(item)
        height, width = (image.width, image.height) if orientation_swaps(image) else (image.height, image.width)
        animated = image.format != "MPO" and bool(getattr(image, "is_animated", False))
        return _Header(height, width, image.mode, image.has_transparency_data, animated)
    except Exception:  # whatever is wrong, `prepare` says it of the whole source
        return None


def _is_gray(source: Source, row: int) -> bool | None:
    """Whether an image stored with colour has none, at 64 x 64; None where it cannot be decoded."""
    try:
        pixels, _ = decode(source.load(row), Data(source=source.name, image_size=(64, 64), channels=3, fit="stretch"))
    except BrokenImage:
        return None
    return bool(np.ptp(pixels.astype(np.int16), axis=2).max() <= GRAY_TOLERANCE)
