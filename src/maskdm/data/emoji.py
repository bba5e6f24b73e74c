"""The colour emoji of the system's font: about 1 400 drawings that need no download."""

from __future__ import annotations

import shutil
import subprocess
import unicodedata
from functools import partial
from pathlib import Path
from threading import Lock

from PIL import Image, ImageDraw, ImageFont

from maskdm.data.source import Source, digest_files
from maskdm.errors import UserError

SIZES = (109, 160, 96, 137, 128, 64)
"""Pixel sizes at which the known bitmap fonts have their drawings: Noto has 109 alone, Apple 160, 96 and 64."""

PLACES = (
    "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",
    "/usr/share/fonts/noto/NotoColorEmoji.ttf",
    "/usr/share/fonts/google-noto-emoji/NotoColorEmoji.ttf",
    "/usr/share/fonts/google-noto-color-emoji-fonts/NotoColorEmoji.ttf",
    "/usr/local/share/fonts/NotoColorEmoji.ttf",
    "/System/Library/Fonts/Apple Color Emoji.ttc",
)

BLOCKS = (
    range(0x231A, 0x2400),
    range(0x25AA, 0x2600),
    range(0x2600, 0x27C0),
    range(0x2B00, 0x2B60),
    range(0x1F004, 0x1F1E6),  # up to the letters that make flags in pairs
    range(0x1F201, 0x1F3FB),  # up to the skin tones
    range(0x1F400, 0x1F650),
    range(0x1F680, 0x1F700),
    range(0x1F7E0, 0x1F7F1),
    range(0x1F90C, 0x1FA00),
    range(0x1FA70, 0x1FB00),
)


def open_emoji(location: str) -> Source:
    """One image per emoji of a single code point that the font draws, named as in Unicode. Raises UserError without a font."""
    path = _find_font()
    if path is None:
        raise UserError("emoji needs a colour emoji font, and none is here; apt-get install fonts-noto-color-emoji")
    font = _open_font(path)
    characters = [character for block in BLOCKS for character in map(chr, block) if _is_drawn(font, character)]
    if not characters:
        raise UserError(f"emoji: {path} draws no emoji here; apt-get install fonts-noto-color-emoji, or give a folder")
    lock = Lock()  # a FreeType face is not for several threads

    def read(index: int) -> Image.Image:
        with lock:
            return _draw(font, characters[index])

    return Source(
        name=location,
        description=f"colour emoji drawn by {path.name}",
        class_names=(),
        notes=(),
        names=[unicodedata.name(character).lower() for character in characters],
        labels=None,
        read=read,
        identify=partial(digest_files, [("".join(characters), path)]),
    )


def _find_font() -> Path | None:
    if shutil.which("fc-list"):
        command = ["fc-list", "--format", "%{file}\n", ":lang=und-zsye"]
        listed = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
        found = sorted(line for line in listed if Path(line).name in {"NotoColorEmoji.ttf", "Apple Color Emoji.ttc"})
        if found:
            return Path(found[-1])
    return next((Path(place) for place in PLACES if Path(place).is_file()), None)


def _open_font(path: Path) -> ImageFont.FreeTypeFont:
    for size in SIZES:
        try:
            return ImageFont.truetype(path, size)
        except OSError:  # no drawings of this size
            continue
    raise UserError(f"emoji: Pillow cannot use {path}; apt-get install fonts-noto-color-emoji, or give a folder")


def _is_drawn(font: ImageFont.FreeTypeFont, character: str) -> bool:
    if unicodedata.category(character) != "So":
        return False
    _, top, _, bottom = font.getbbox(character)
    return bottom > top


def _draw(font: ImageFont.FreeTypeFont, character: str) -> Image.Image:
    left, top, right, bottom = font.getbbox(character)
    width, height = round(right - left), round(bottom - top)
    side = max(width, height)
    image = Image.new("RGBA", (side, side))
    place = ((side - width) // 2 - left, (side - height) // 2 - top)
    ImageDraw.Draw(image).text(place, character, font=font, embedded_color=True)
    return image
