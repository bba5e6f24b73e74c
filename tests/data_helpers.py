"""Real pictures for the tests of the data layer: scikit-learn's digits and its two sample photographs."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

from maskdm.config import Data

SHARED = Path(__file__).parents[2] / "shared" / "data"


@cache
def _photos() -> list[Image.Image]:
    return [Image.fromarray(photo) for photo in load_sample_images().images]


def photo(index: int = 0) -> Image.Image:
    """640 x 427 RGB: 0 is china.jpg, 1 is flower.jpg."""
    return _photos()[index].copy()


@cache
def _digits() -> np.ndarray:
    return np.rint(load_digits().images * 255 / 16).astype(np.uint8)


def digit(index: int) -> Image.Image:
    """8 x 8 gray."""
    return Image.fromarray(_digits()[index])


def settings(
    size: tuple[int, int] = (8, 8),
    channels: Literal[1, 3] = 3,
    fit: Literal["crop", "pad", "stretch"] = "crop",
    background: str = "#ffffff",
    conditional: bool = False,
    max_broken: float = 0.05,
) -> Data:
    return Data(
        source="test",
        image_size=size,
        channels=channels,
        fit=fit,
        background=background,
        conditional=conditional,
        max_broken=max_broken,
    )


def write_digits(folder: Path, count: int, classes: int = 0, first: int = 0) -> Path:
    """Digits as PNG files, flat or dealt to class folders c0, c1, ..."""
    for index in range(first, first + count):
        path = folder / f"c{index % classes}" / f"{index:04d}.png" if classes else folder / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        digit(index).save(path)
    return folder


def touch_later(path: Path) -> None:
    """Make a file's time of change differ, however coarse the file system's clock."""
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
