"""Grids of images as pictures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Images = NDArray[np.uint8]
"""[batch, channels, height, width], 0..255; 1 or 3 channels."""

INK, PAPER, HIDDEN = (30, 30, 36), (255, 255, 255), (120, 124, 138)
GAP = 2


def to_pil(image: Images) -> Image.Image:
    """One image [channels, height, width]."""
    return Image.fromarray(image[0] if image.shape[0] == 1 else np.ascontiguousarray(image.transpose(1, 2, 0)))


def grid(images: Images, columns: int, tile: int = 64) -> Image.Image:
    """Images in rows of `columns`, enlarged by a whole factor to at least about `tile` pixels a side."""
    scale = max(1, tile // max(images.shape[2:]))
    height, width = images.shape[2] * scale + GAP, images.shape[3] * scale + GAP
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * width + GAP, rows * height + GAP), PAPER)
    for i, image in enumerate(images):
        enlarged = to_pil(image).convert("RGB").resize((width - GAP, height - GAP), Image.Resampling.NEAREST)
        sheet.paste(enlarged, (i % columns * width + GAP, i // columns * height + GAP))
    return sheet


def side_by_side(left: Images, right: Images, columns: int, titles: tuple[str, str], rows: Sequence[str], tile: int = 64) -> Image.Image:
    """Two grids of equal shape with a title each, and a label before each row."""
    sheets = grid(left, columns, tile), grid(right, columns, tile)
    font = ImageFont.load_default(size=14)
    probe = ImageDraw.Draw(sheets[0])
    margin = max([int(probe.textlength(_short(row), font=font)) for row in rows], default=0) + (12 if rows else 0)
    head, between = 26, 24
    width = margin + sheets[0].width + between + sheets[1].width
    picture = Image.new("RGB", (width, head + max(s.height for s in sheets)), PAPER)
    draw = ImageDraw.Draw(picture)
    for sheet, title, x in zip(sheets, titles, (margin, margin + sheets[0].width + between), strict=True):
        picture.paste(sheet, (x, head))
        draw.text((x + GAP, 5), title, fill=INK, font=font)
    pitch = (sheets[0].height - GAP) / max(1, len(rows))
    for number, row in enumerate(rows):
        draw.text((4, head + pitch * (number + 0.5)), _short(row), fill=INK, font=font, anchor="lm")
    return picture


def hide(image: Images, kept: Sequence[int], patch: int) -> Images:
    """One image with all but the kept patches greyed out."""
    shown = np.empty_like(image)
    shown[:] = (np.array(HIDDEN) if image.shape[0] == 3 else np.array([round(sum(HIDDEN) / 3)]))[:, None, None]
    across = image.shape[2] // patch
    for index in kept:
        rows = slice(index // across * patch, index // across * patch + patch)
        columns = slice(index % across * patch, index % across * patch + patch)
        shown[:, rows, columns] = image[:, rows, columns]
    return shown


def _short(text: str) -> str:
    return text if len(text) <= 24 else text[:23] + "..."
