"""What strangers send: an image, or a mask painted over one, checked before anything is decoded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from maskdm.config import Data
from maskdm.data import BrokenImage, decode
from maskdm.data.decode import open_image
from maskdm.errors import UserError

MOST_BYTES, MOST_PIXELS = 20 << 20, 50_000_000
"""Of an uploaded image: a camera's fits, and decoded it takes less than a quarter of a GiB."""

COVERED = 0.25
"""Share of a pixel that has to be painted over for it to be drawn anew: a thin stroke on an enlarged image must not be lost."""


def read_upload(path: Path, settings: Data) -> NDArray[np.uint8]:
    """An uploaded image [channels, height, width] as a run takes it. Raises UserError."""
    if not path.is_file():
        raise UserError("the upload is not there any more; give it again")
    if path.stat().st_size > MOST_BYTES:
        raise UserError(f"the upload has more than {MOST_BYTES >> 20} MiB; give a smaller image")
    width, height = _size(path)
    if width * height > MOST_PIXELS:
        raise UserError(f"the upload has {width} x {height} pixels; give an image of at most {MOST_PIXELS // 1_000_000} million")
    try:
        pixels, _ = decode(path, settings)
    except BrokenImage as error:
        raise UserError(f"the upload cannot be read as an image: {error}") from error
    return pixels.transpose(2, 0, 1).copy()


def _size(path: Path) -> tuple[int, int]:
    """Width and height, of which no pixel is decoded; 0 where the header says nothing: `decode` says what is wrong."""
    try:
        with open_image(path) as header:
            return header.size
    except Exception:  # Pillow's readers raise whatever a damaged header leads them to
        return 0, 0


def open_layers(paths: Sequence[Path]) -> list[Image.Image]:
    """What was painted, of which no pixel is decoded yet. Raises UserError."""
    try:
        return [open_image(path) for path in paths]
    except Exception:  # as above
        raise UserError("the mask cannot be read as an image; paint it again") from None


def read_mask(layers: Sequence[Image.Image], settings: Data) -> NDArray[np.bool_]:
    """Where strokes cover an image [height, width], from what was painted on transparent layers of any size. Raises UserError."""
    height, width = settings.image_size
    covered = np.zeros((height, width), dtype=np.bool_)
    if sum(layer.width * layer.height for layer in layers) > MOST_PIXELS:
        raise UserError("the mask has too many pixels; paint on the image that is shown")
    for layer in layers:
        try:
            alpha = layer.convert("RGBA").getchannel("A")
        except Exception:
            raise UserError("the mask cannot be read as an image; paint it again") from None
        share = np.asarray(alpha.resize((width, height), Image.Resampling.BOX), dtype=np.float32) / 255
        covered |= share >= COVERED
    if not covered.any():
        raise UserError("nothing is painted over; paint over what is to be drawn anew")
    if covered.all():
        raise UserError("all of the image is painted over; leave something that is known, or generate a new one")
    return covered
