"""From an image of any kind to an array of one shape: the only place that knows about modes, orientation and fitting."""

from __future__ import annotations

import io
import stat
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError

from maskdm.config import Data

REDUCING_GAP = 3.0
"""Large images are first halved until this many times the target; no visible difference from 3 on, says Pillow."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "MPO", "PPM", "AVIF", "JPEG2000", "QOI", "TGA")
"""Formats taken, the common ones first. Others, PostScript above all, would have Pillow start programs on strangers' files."""

ORIENTED = {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif", "Raw profile type APP1"}
"""What Pillow calls the places where an orientation may stand."""

ANIMATED = "animated: first frame taken"
TRANSPARENT = "transparent: laid on the background colour"
ENLARGED = "smaller than the target: enlarged"
STRETCHED = "values of no known range: darkest made black, brightest white"

Size = tuple[int, int]
RGB = tuple[int, int, int]


MOST_BYTES = 1 << 30
"""The largest encoded image taken; more would be read into memory before Pillow sees its header."""


class BrokenImage(Exception):
    """An image that cannot be used. The message is the reason, without the image's name."""


def decode(image: Image.Image | bytes | Path, settings: Data) -> tuple[NDArray[np.uint8], tuple[str, ...]]:
    """Pixels [height, width, channels] in 0..255, upright and opaque, of the size set, and notes on what was done.

    16-bit gray is scaled to 8; an alpha channel is laid on `settings.background`; of an animation the first frame is
    taken. Images of more than 179 million pixels are refused, as by Pillow. Raises BrokenImage, and nothing else.
    """
    try:
        if isinstance(image, Image.Image):
            return _decode(image, settings)
        with open_image(image) as opened:
            if opened.format in ("JPEG", "MPO"):
                _draft(opened, settings.image_size, settings.fit)
            return _decode(opened, settings)
    except BrokenImage:
        raise
    except Exception as error:  # Pillow's readers raise whatever a damaged file leads them to
        raise BrokenImage(_reason(error)) from error


def open_image(item: bytes | Path) -> Image.Image:
    """Read the header. Raises BrokenImage for what is no file, or one of no bytes or too many, and what Pillow raises."""
    if isinstance(item, Path):
        status = item.stat()
        if not stat.S_ISREG(status.st_mode):  # a table may name a device, which has no end, or a pipe, which waits
            raise BrokenImage("not a file")
        if status.st_size > MOST_BYTES:
            raise BrokenImage("a file of more than 1 GiB")
    data = item if isinstance(item, bytes) else item.read_bytes()
    if not data:
        raise BrokenImage("empty file")
    return Image.open(io.BytesIO(data), formats=_formats())


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def orientation_swaps(image: Image.Image) -> bool:
    """Whether turning the image upright, as its EXIF data say, exchanges height and width."""
    try:
        return image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    except Exception:  # damaged EXIF data, of which only the orientation is lost
        return False


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    if isinstance(error, Image.DecompressionBombError):
        return "more than 179 million pixels"
    if isinstance(error, FileNotFoundError):
        return "a link to nowhere, or deleted since"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    if isinstance(error, MemoryError):
        return "too large for the memory"
    return f"damaged ({(str(error).splitlines() or [type(error).__name__])[0]})"


def _decode(image: Image.Image, settings: Data) -> tuple[NDArray[np.uint8], tuple[str, ...]]:
    height, width = settings.image_size
    notes: list[str] = []
    # MPO is what phones write: a photograph with a preview or a depth map behind it, no animation
    if image.format != "MPO" and getattr(image, "is_animated", False):
        notes.append(ANIMATED)
    image = _upright(image)
    background = background_colour(settings)
    mode = "L" if settings.channels == 1 else "RGB"
    image = _opaque(_eight_bit(image, notes), background, mode, notes)
    smaller = (image.width < width, image.height < height)
    if all(smaller) if settings.fit == "pad" else any(smaller):
        notes.append(ENLARGED)
    fitted = _fit(image, settings, background)
    pixels = np.asarray(fitted)
    return pixels.reshape(height, width, settings.channels), tuple(notes)


def background_colour(settings: Data) -> RGB:
    """The colour set, as red, green and blue in 0..255."""
    red, green, blue = ImageColor.getrgb("#" + settings.background.removeprefix("#"))[:3]
    return red, green, blue


def _draft(image: Image.Image, target: Size, fit: str) -> None:
    """Let the JPEG reader decode at 1/2, 1/4 or 1/8, to no less than twice the target whichever way up the image is."""
    scales = [side / own for side in target for own in image.size]
    scale = 2 * max(scales)
    if fit == "pad":
        scale = 2 * max(min(scales[0], scales[3]), min(scales[1], scales[2]))
    if scale < 1:
        image.draft(image.mode, (int(np.ceil(image.width * scale)), int(np.ceil(image.height * scale))))


def _upright(image: Image.Image) -> Image.Image:
    if image.format != "TIFF" and not ORIENTED & image.info.keys():  # spares small files a seventh of their time
        return image
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF data, of which only the orientation is lost
        return image


def _eight_bit(image: Image.Image, notes: list[str]) -> Image.Image:
    """Gray of more than 8 bits as mode L: 16 bit scaled, floats by their range."""
    if not (image.mode.startswith("I") or image.mode == "F"):
        return image
    values = np.asarray(image, dtype=np.float64)
    low, high = float(values.min()), float(values.max())
    if not np.isfinite(low) or not np.isfinite(high):
        raise BrokenImage("has values that are no numbers")
    if image.mode == "F" and low >= 0 and high <= 1:
        values = values * 255
    elif image.mode.startswith("I;16") or (image.mode == "I" and low >= 0 and 255 < high <= 65535):
        values = values / 257
    elif not (low >= 0 and high <= 255):
        values = (values - low) * (255 / max(high - low, 1e-300))
        notes.append(STRETCHED)
    return Image.fromarray(np.rint(values).astype(np.uint8))


def _opaque(image: Image.Image, background: RGB, mode: str, notes: list[str]) -> Image.Image:
    """The image in mode L or RGB, what shows through it replaced by the background."""
    if image.has_transparency_data:
        layer = image.convert("LA" if image.mode == "La" else image.mode).convert("RGBA")
        lowest = layer.getchannel("A").getextrema()[0]
        if isinstance(lowest, int) and lowest < 255:
            notes.append(TRANSPARENT)
            layer = Image.alpha_composite(Image.new("RGBA", layer.size, background), layer)
        image = layer.convert("RGB")
    return image if image.mode == mode else image.convert(mode)


def _fit(image: Image.Image, settings: Data, background: RGB) -> Image.Image:
    height, width = settings.image_size
    if image.size == (width, height):
        return image
    match settings.fit:
        case "stretch":
            return _resize(image, width, height)
        case "crop":
            scale = min(image.width / width, image.height / height)
            left, top = (image.width - width * scale) / 2, (image.height - height * scale) / 2
            return _resize(image, width, height, (left, top, image.width - left, image.height - top))
        case "pad":
            scale = min(width / image.width, height / image.height)
            inner = max(1, round(image.width * scale)), max(1, round(image.height * scale))
            whole = Image.new("RGB", (width, height), background).convert(image.mode)
            corner = ((width - inner[0]) // 2, (height - inner[1]) // 2)
            whole.paste(_resize(image, *inner), corner)
            return whole


def _resize(image: Image.Image, width: int, height: int, box: tuple[float, float, float, float] | None = None) -> Image.Image:
    return image.resize((width, height), Image.Resampling.LANCZOS, box=box, reducing_gap=REDUCING_GAP)
