"""Memorisation: whether samples are training images, also mirrored or shifted, where new real images are not.

A sample is suspected when its nearest training image is less than a third as far away as its tenth nearest, in pixels or in
features: a picture seen in training stands out from its neighbours, a new one lies among them. The rule of one third is that of
arXiv 2308.12219 and 2310.02664 (there against the second nearest, which a training image that is in the data twice would fool).
Held-out real images are put to the same test: the share of them that it suspects is what to expect without copying.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from numpy.typing import NDArray
from torch import Tensor

from maskdm.evaluation.images import ImageSet
from maskdm.evaluation.neighbours import nearest

THRESHOLD = 1 / 3
RANK = 10
"""The neighbour whose distance is the measure of nearness."""

Candidates = tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]
"""Training images that an image is compared with: their places [k], distances [k], best shifts [k, 2]."""

_SIDE, _COARSE = 32, 8
_BATCH = 32


@dataclass(frozen=True)
class Matches:
    """For each of n images: distance to, and place of, the nearest training image, and that distance over the RANK-th nearest's.

    In pixels (root mean square difference, 0..255, at 32 pixels a side at most, over the best of small shifts and mirroring), with
    the mirroring and the shift (down, across) of the best match; and in features.
    """

    pixel_distances: NDArray[np.float64]
    pixel_ratios: NDArray[np.float64]
    pixel_places: NDArray[np.int64]
    mirrored: NDArray[np.bool_]
    shifts: NDArray[np.int64]
    feature_distances: NDArray[np.float64]
    feature_ratios: NDArray[np.float64]
    feature_places: NDArray[np.int64]

    @property
    def ratios(self) -> NDArray[np.float64]:
        """The smaller of the two ratios [n]."""
        return np.minimum(self.pixel_ratios, self.feature_ratios)

    @property
    def suspected(self) -> NDArray[np.bool_]:
        """Which images look like copies."""
        return self.ratios < THRESHOLD

    def place(self, image: int) -> int:
        """The training image that an image is most like, in the space where that stands out more."""
        return int((self.pixel_places if self.in_pixels(image) else self.feature_places)[image])

    def in_pixels(self, image: int) -> bool:
        """Whether that space is the pixels."""
        return bool(self.pixel_ratios[image] <= self.feature_ratios[image])

    @staticmethod
    def joined(parts: Sequence[Matches]) -> Matches:
        """The matches of several groups of images, in order."""
        return Matches(**{each.name: np.concatenate([getattr(part, each.name) for part in parts]) for each in fields(Matches)})


class Searcher:
    """Looks for images among all training images, and among the features [m, d] of those at `places` [m]."""

    def __init__(self, training: ImageSet, features: Tensor, places: NDArray[np.int64]) -> None:
        self.training, self.features, self.places = training, features, torch.from_numpy(places)
        self._coarse = torch.cat([coarse(thumbnails(piece)) for piece in training.pieces()])
        self._most = min(RANK, len(places))

    def match(self, images: UInt8[Tensor, "n _ _ _"], features: Float[Tensor, "n d"], mirrored_features: Float[Tensor, "n d"]) -> Matches:
        """The training images nearest to these, whose own features and those of their mirror images are given."""
        small = thumbnails(images)
        turned = small.flip(-1)
        by_features = [nearest(each, self.features, self._most) for each in (features, mirrored_features)]
        by_coarse = [nearest(coarse(each), self._coarse, self._most) for each in (small, turned)]
        found: list[list[Candidates]] = [[], []]
        for variant, each in enumerate((small, turned)):
            candidates = torch.cat([by_coarse[variant].indices, self.places[by_features[variant].indices]], dim=1)
            for first in range(0, len(images), _BATCH):
                rows = slice(first, first + _BATCH)
                places = candidates[rows].numpy()
                pictures = thumbnails(self.training.take(places.ravel())).unflatten(0, places.shape)
                distances, shifts = aligned(each[rows], pictures)
                found[variant] += [*zip(places, distances.double().numpy(), shifts.numpy(), strict=True)]
        ratios = torch.stack([_ratio(each.distances) for each in by_features])
        better = ratios.argmin(dim=0)
        every = torch.arange(len(images))
        return Matches(
            **_merge(found[0], found[1], self._most),
            feature_distances=torch.stack([each.distances[:, 0] for each in by_features])[better, every].numpy(),
            feature_ratios=ratios[better, every].numpy(),
            feature_places=self.places[torch.stack([each.indices[:, 0] for each in by_features])[better, every]].numpy(),
        )


def _merge(plain: list[Candidates], mirrored: list[Candidates], most: int) -> dict[str, NDArray[Any]]:
    """The best candidate of each image over both variants; a training image counts once, at its better distance."""
    distances, ratios, places, turned, shifts = [], [], [], [], []
    for straight, reflected in zip(plain, mirrored, strict=True):
        place, distance, shift = (np.concatenate(pair) for pair in zip(straight, reflected, strict=True))
        order = np.argsort(distance, kind="stable")
        _, first = np.unique(place[order], return_index=True)
        ranked = distance[order[np.sort(first)]]
        best = order[0]
        distances.append(ranked[0])
        ratios.append(_relative(ranked[0], ranked[min(most, len(ranked)) - 1]))
        places.append(place[best])
        turned.append(best >= len(straight[0]))
        shifts.append(shift[best])
    return {
        "pixel_distances": np.array(distances),
        "pixel_ratios": np.array(ratios),
        "pixel_places": np.array(places),
        "mirrored": np.array(turned),
        "shifts": np.stack(shifts),
    }


def _relative(near: float, far: float) -> float:
    return float(near / far) if far > 0 else 0.0


def _ratio(distances: Float[Tensor, "n k"]) -> Float[Tensor, " n"]:
    """Nearest over farthest; 0 where even that is at 0: the image is in the data, many times over."""
    far = distances[:, -1]
    return torch.where(far > 0, distances[:, 0] / far.clamp(min=1e-300), 0.0)


def thumbnails(images: UInt8[Tensor, "n _ _ _"]) -> UInt8[Tensor, "n _ _ _"]:
    """The images at no more than 32 pixels a side."""
    height, width = images.shape[2:]
    scale = min(1.0, _SIDE / max(height, width))
    if scale == 1:
        return images
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    return F.interpolate(images.float(), size, mode="area").round().to(torch.uint8)


def coarse(images: UInt8[Tensor, "n _ _ _"]) -> UInt8[Tensor, "n _"]:
    """At most 8 x 8 averages of an image, flat: a small shift hardly changes them, so candidates are sought by them."""
    height, width = images.shape[2:]
    return F.adaptive_avg_pool2d(images.float(), (min(_COARSE, height), min(_COARSE, width))).round().to(torch.uint8).flatten(1)


def aligned(images: UInt8[Tensor, "n c h w"], candidates: UInt8[Tensor, "n k c h w"]) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k 2"]]:
    """Root mean square difference of each image to its candidates at the best shift (down, across), over what then overlaps.

    Shifts reach a sixteenth of the longer side, 1 pixel at least.
    """
    height, width = images.shape[2:]
    reach = max(1, round(max(height, width) / 16))
    own, others = images[:, None].float(), candidates.float()
    least = torch.full(candidates.shape[:2], float("inf"))
    shifts = torch.zeros(*candidates.shape[:2], 2, dtype=torch.int64)
    for down in range(-min(reach, height - 1), min(reach, height - 1) + 1):
        for across in range(-min(reach, width - 1), min(reach, width - 1) + 1):
            difference = _window(own, -down, -across) - _window(others, down, across)
            found = difference.square_().mean(dim=(2, 3, 4))
            closer = found < least
            least = torch.where(closer, found, least)
            shifts[closer] = torch.tensor([down, across])
    return least.sqrt(), shifts


def _window(images: Tensor, down: int, across: int) -> Tensor:
    """Without the first `down` rows (the last ones if negative), and the same across."""
    height, width = images.shape[-2:]
    return images[..., max(0, down) : height + min(0, down), max(0, across) : width + min(0, across)]
