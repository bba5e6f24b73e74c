"""Colour and contrast of samples against real images: what a distance in features may not see, and an eye does not measure."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from maskdm.evaluation.images import ImageSet
from maskdm.evaluation.intervals import Estimate

NOTICEABLE = 0.02
"""A drift is called one when all of its interval lies beyond this share of the whole range (5 of 255 steps)."""

NOTICEABLE_SPREAD, NOTICEABLE_PART = 0.01, 0.05
"""Of contrast and saturation: beyond this share of the whole range, and beyond this share of the real images' own."""

SHOWN_BINS = 32
_NAMES = {1: ("gray",), 3: ("red", "green", "blue")}


@dataclass(frozen=True)
class Colours:
    """Statistics of a set of images: of each image [n, s], with their names, and the shares of each channel's values [channels, 256]."""

    names: tuple[str, ...]
    per_image: Float[Tensor, "n s"]
    histograms: Float[Tensor, "channels 256"]

    @staticmethod
    def of(images: ImageSet) -> Colours:
        """Read all images once: means of the channels, brightness, contrast, saturation, each in 0..1."""
        parts, counts = [], None
        for piece in images.pieces():
            parts.append(_statistics(piece))
            here = torch.stack([torch.bincount(piece[:, c].flatten().long(), minlength=256) for c in range(piece.shape[1])])
            counts = here if counts is None else counts + here
        assert counts is not None
        channels = _NAMES[len(counts)]
        names = (*channels, "brightness", "contrast", "saturation") if len(channels) == 3 else (*channels, "contrast")
        shares = counts.double() / counts.sum(dim=1, keepdim=True)
        return Colours(names, torch.cat(parts), shares)


def _statistics(images: UInt8[Tensor, "n c h w"]) -> Float[Tensor, "n _"]:
    values = images.double() / 255
    if values.shape[1] == 1:
        gray = values[:, 0]
        return torch.stack([gray.mean(dim=(1, 2)), gray.std(dim=(1, 2))], dim=1)
    weights = torch.tensor([0.2126, 0.7152, 0.0722], dtype=torch.float64)  # luma of ITU-R BT.709
    luma = torch.einsum("nchw,c->nhw", values, weights)
    largest, smallest = values.amax(dim=1), values.amin(dim=1)
    saturation = torch.where(largest > 0, (largest - smallest) / largest.clamp(min=1e-9), 0.0)  # as in HSV
    means = values.mean(dim=(2, 3))
    further = [luma.mean(dim=(1, 2)), luma.std(dim=(1, 2)), saturation.mean(dim=(1, 2))]
    return torch.cat([means, torch.stack(further, dim=1)], dim=1)


def colour_drift(samples: ImageSet, real: ImageSet) -> dict[str, object]:
    """How samples differ from real images in brightness, contrast, saturation and each channel, with 95 % intervals; and in words.

    `histogram_distance` is the Wasserstein-1 distance of a channel's values, 0..255, with that between two halves of the real images.
    """
    ours, theirs = Colours.of(samples), Colours.of(real)
    statistics = [_compare(name, ours.per_image[:, i], theirs.per_image[:, i]) for i, name in enumerate(ours.names)]
    order = np.random.default_rng(0).permutation(len(real))
    halves = [Colours.of(real.part(np.sort(part))) for part in np.array_split(order, 2)]
    channels = _NAMES[len(ours.histograms)]
    found = {
        "statistics": statistics,
        "histogram_distance": [
            {
                "channel": name,
                "samples": _wasserstein(ours.histograms[c], theirs.histograms[c]),
                "halves": _wasserstein(halves[0].histograms[c], halves[1].histograms[c]),
            }
            for c, name in enumerate(channels)
        ],
        "histograms": [
            {"channel": name, "samples": _binned(mine), "real": _binned(other)}
            for name, mine, other in zip(channels, ours.histograms, theirs.histograms, strict=True)
        ],
    }
    drifted = [each for each in statistics if each["drift"]]
    return {"drift": bool(drifted), "verdict": _verdict(drifted), **found}


def _compare(name: str, samples: Tensor, real: Tensor) -> dict[str, object]:
    difference = float(samples.mean() - real.mean())
    error = math.sqrt(float(samples.var() / len(samples) + real.var() / len(real)))
    found = Estimate.around(difference, error)
    limit = NOTICEABLE
    if name in ("contrast", "saturation"):
        limit = max(NOTICEABLE_SPREAD, NOTICEABLE_PART * float(real.mean()))
    return {
        "name": name,
        "samples": float(samples.mean()),
        "real": float(real.mean()),
        "difference": found.value,
        "interval": [found.low, found.high],
        "drift": found.low > limit or found.high < -limit,
    }


def _wasserstein(first: Tensor, second: Tensor) -> float:
    return float((first.cumsum(0) - second.cumsum(0)).abs().sum())


def _binned(histogram: Tensor) -> list[float]:
    return [round(float(share), 5) for share in histogram.view(SHOWN_BINS, -1).sum(dim=1)]


_WORDS = {
    "brightness": ("brighter", "darker"),
    "gray": ("brighter", "darker"),
    "contrast": ("richer in contrast", "flatter"),
    "saturation": ("more saturated", "paler"),
}


def _verdict(drifted: list[dict[str, object]]) -> str:
    if not drifted:
        return "Colours and contrast are those of the real images."
    parts = []
    for each in drifted:
        difference, name = float(str(each["difference"])), str(each["name"])
        up, down = _WORDS.get(name, (f"more {name}", f"less {name}"))
        parts.append(f"{up if difference > 0 else down} by {100 * abs(difference):.1f} % of the range")
    return f"Samples are {', '.join(parts)} than the real images."
