"""Pictures inside a page: their bytes in the page itself, no heavier than they need be, alone or under a slider."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from maskdm.report.page import text

LARGE, FRAMES = 600_000, 2_500_000
"""Bytes that one picture may take in a page, and all those that share a slider: more would make the page heavy."""

_SIDES = (1600, 1100, 800, 560, 400, 280)


def _smaller(image: Any, most: int) -> bytes:
    """The picture as a JPEG of at most so many bytes (or about, when even the smallest has more)."""
    found, data = image.convert("RGB"), b""
    for side in _SIDES:
        found.thumbnail((side, side))
        stream = io.BytesIO()
        found.save(stream, "JPEG", quality=85)
        data = stream.getvalue()
        if len(data) <= most:
            break
    return data


def allowance(files: Sequence[Path]) -> int:
    """Bytes that each of the pictures of a slider may take."""
    total = sum(path.stat().st_size for path in files)
    return LARGE if total <= FRAMES else FRAMES // len(files)


def picture(path: Path, alt: str, width: int = 640, attributes: str = "", most: int = LARGE) -> str | None:
    """The image file as an <img> with its bytes inside, small ones enlarged by a whole factor up to `width` pixels.

    A file of more than `most` bytes is shown smaller. None when the file is absent or is no whole image (one that is being written, say).
    """
    from PIL import Image

    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            across, down, kind = image.width, image.height, Image.MIME[image.format or "PNG"]
            if len(data) > most:
                data, kind = _smaller(image, most), "image/jpeg"
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
    factor = max(1, width // across)
    pixel = ' class="pixel"' if factor > 1 else ""
    encoded = base64.b64encode(data).decode("ascii")
    size = f'width="{across * factor}" height="{down * factor}"'
    return f'<img{pixel} {size} alt="{text(alt)}" {attributes} src="data:{kind};base64,{encoded}">'


def shrunk(files: Sequence[Path], most: int) -> str:
    """A remark where one of the files is shown smaller than it is."""
    large = any(path.stat().st_size > most for path in files)
    return " Shown smaller than the file, so that this page stays light." if large else ""


def figure(path: Path, alt: str, note: str, width: int = 640, most: int = LARGE) -> str:
    """The picture with a line below it; nothing when there is no picture."""
    image = picture(path, alt, width, most=most)
    return f"<figure>{image}<figcaption>{note}{shrunk([path], most)}</figcaption></figure>" if image else ""


def strip(path: Path, alt: str, note: str) -> str:
    """A wide picture with a line below it: where the page is narrow, it scrolls sideways instead of shrinking to nothing."""
    image = picture(path, alt, 1000)
    if not image:
        return ""
    box = f'<div class="strip" tabindex="0" role="region" aria-label="{text(alt)}">{image}</div>'
    return f"<figure>{box}<figcaption>{note}{shrunk([path], LARGE)}</figcaption></figure>"


def slider(frames: Sequence[tuple[Path, str]]) -> str:
    """Pictures (file, caption) that share one place, with a control over which shows: the last before, or without, the script."""
    images: list[str] = []
    most = allowance([path for path, _ in frames])
    for path, caption in reversed(frames):
        hidden = f'data-caption="{text(caption)}"' + (" hidden" if images else "")
        frame = picture(path, f"Samples at {caption}", 640, hidden, most)
        images += [frame] if frame else []
    if not images:
        return ""
    last = len(images) - 1
    control = f'<input type="range" min="0" max="{last}" value="{last}" autocomplete="off">'
    label = f'<label class="slider" hidden><span>Time</span>{control}<output></output></label>'
    return f'<div class="frames">{label}{"".join(reversed(images))}</div>'


def joint_slider(frames: Sequence[tuple[str, str]]) -> str:
    """Groups (caption, finished content) that share one place, with a control over which shows: the last without the script."""
    last = len(frames) - 1
    groups = [
        f'<div class="side-by-side" data-caption="{caption}"{"" if index == last else " hidden"}>{content}</div>'
        for index, (caption, content) in enumerate(frames)
    ]
    control = f'<input type="range" min="0" max="{last}" value="{last}" autocomplete="off">'
    return (
        f'<div class="frames"><label class="slider" hidden><span>Progress</span>{control}<output></output></label>{"".join(groups)}</div>'
    )
