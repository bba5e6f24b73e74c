"""Sizes of images, as people write them."""

from __future__ import annotations

from typing import Any

from maskdm.errors import UserError, shorten


def parse_size(size: Any) -> tuple[int, int]:
    """Height and width from 64, "64", "64x96" or [64, 96]. Raises UserError."""
    sides = [str(side) for side in size] if isinstance(size, list) else str(size).lower().split("x")
    if not all(side.isdecimal() and 0 < len(side) < 10 for side in sides) or len(sides) not in (1, 2) or "0" in sides:
        raise UserError(f"--image-size is '{shorten(str(size))}'; give a number of pixels, or height x width such as 64x96")
    return int(sides[0]), int(sides[-1])
