"""From what was computed to what the page shows: tiles, sentences, pictures to paint on."""

from __future__ import annotations

import html
import shlex
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from maskdm.demo.nearest import Found
from maskdm.pictures import to_pil

CRISP = 96
"""Images up to this side are shown with their pixels as squares."""

CANVAS = 512
"""Side of an image that is painted on, about."""


def tiles(images: NDArray[np.uint8], captions: list[str] | None = None) -> list[tuple[Image.Image, str | None]]:
    """Images [n, channels, height, width], each with its caption."""
    return [(to_pil(image), None if captions is None else captions[i]) for i, image in enumerate(images)]


def classes_of(images: NDArray[np.uint8], large: bool = False) -> list[str]:
    """CSS classes of a gallery with such images."""
    return ["tiles", *(["large"] if large else []), *(["crisp"] if max(images.shape[2:]) <= CRISP else [])]


def canvas(image: NDArray[np.uint8]) -> dict[str, Any]:
    """What an editor is given to paint on, large enough for a brush."""
    scale = max(1, CANVAS // max(image.shape[1:]))
    picture = to_pil(image).convert("RGB")
    large = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    return {"background": large, "layers": [], "composite": None}


def sentence(text: str, wrong: bool = False) -> str:
    """A line that says where things stand, or what is wrong."""
    return f'<p role="status" class="{"wrong" if wrong else "well"}">{html.escape(text)}</p>'


def used_in_words(used: dict[str, Any]) -> str:
    """What images were drawn with."""
    images = "1 image" if used["num"] == 1 else f"{used['num']} images"
    guidance = "" if used["guidance"] == 1 else f", guidance {used['guidance']:g}"
    how = f"seed {used['seed']}, {used['steps']} steps of {used['scheduler']}{guidance}"
    return f"{images} in {used['seconds']:.1f} s: {how}. Weights: {used['weights']}."


def command_of(run: Path, used: dict[str, Any], labels: tuple[str, ...]) -> str:
    """The command that draws the same images; the guidance is named even where it is 1, as the run's own may be another."""
    words = ["maskdm", "sample", str(run), "--num", str(used["num"]), "--seed", str(used["seed"]), "--steps", str(used["steps"])]
    words += ["--scheduler", used["scheduler"], "--guidance", str(used["guidance"])]
    return shlex.join([*words, *(["--labels", *labels] if labels else []), "--out", "drawn"])


def captions_of(found: Found) -> list[str]:
    """Under each training image: how far it is."""
    return [f"{distance:.1f}{' mirrored' if mirrored else ''}" for distance, mirrored in zip(found.distances, found.mirrored, strict=True)]
