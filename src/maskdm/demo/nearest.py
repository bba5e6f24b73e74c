"""The training images that an image is most like, by their pixels: the search for copies without its network of features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from maskdm.config import Config
from maskdm.data import Dataset
from maskdm.evaluation import nearest
from maskdm.evaluation.copies import RANK, THRESHOLD, aligned, coarse, thumbnails

PIECE = 4096
"""Training images whose averages are made at a time."""

CANDIDATES = 4 * RANK
"""Images that are near by their 8 x 8 averages, and looked at closely."""


@dataclass(frozen=True)
class Found:
    """Training images uint8 [n, channels, height, width], nearest first, with their names and distances.

    Distances are root mean square differences, 0..255, at the best of small shifts and mirroring. ratio: the nearest's over the RANK-th's.
    """

    images: NDArray[np.uint8]
    names: tuple[str, ...]
    distances: tuple[float, ...]
    mirrored: tuple[bool, ...]
    ratio: float

    @property
    def verdict(self) -> str:
        """What the distances say, in a sentence."""
        if self.ratio < THRESHOLD:
            return f"The nearest is {self.ratio:.2f} times as far as the tenth nearest: below {THRESHOLD:.2f}, so this looks like a copy."
        return f"The nearest is {self.ratio:.2f} times as far as the tenth nearest: a copy would be below {THRESHOLD:.2f}."


class Search:
    """Looks among the images that a run was trained on. check: called now and then, to raise where the search is to end."""

    def __init__(self, config: Config, dataset: Dataset, check: Callable[[], None]) -> None:
        self.dataset, self.rows = dataset, dataset.split(config.data.heldout, config.seed, config.data.limit)[0]
        pieces: list[torch.Tensor] = []
        for start in range(0, len(self.rows), PIECE):
            check()
            pieces.append(coarse(thumbnails(self._take(self.rows[start : start + PIECE]))))
        self._coarse = torch.cat(pieces)

    def _take(self, rows: NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(self.dataset.images[rows].transpose(0, 3, 1, 2)))

    def find(self, image: NDArray[np.uint8], num: int) -> Found:
        """The `num` training images that an image [channels, height, width] is most like."""
        small = thumbnails(torch.from_numpy(image)[None])
        most = min(CANDIDATES, len(self.rows))
        best: dict[int, tuple[float, bool]] = {}
        for mirrored, each in ((False, small), (True, small.flip(-1))):
            places = nearest(coarse(each), self._coarse, most).indices[0].numpy()
            distances = aligned(each, thumbnails(self._take(self.rows[places]))[None])[0][0]
            for place, distance in zip(places.tolist(), distances.tolist(), strict=True):
                if place not in best or distance < best[place][0]:
                    best[place] = (distance, mirrored)
        ranked = sorted(best, key=lambda place: best[place][0])
        far = best[ranked[min(RANK, len(ranked)) - 1]][0]
        rows = self.rows[ranked[:num]]
        return Found(
            np.ascontiguousarray(self.dataset.images[rows].transpose(0, 3, 1, 2)),
            tuple(self.dataset.name_of(int(row)) for row in rows),
            tuple(best[place][0] for place in ranked[:num]),
            tuple(best[place][1] for place in ranked[:num]),
            best[ranked[0]][0] / far if far > 0 else 0.0,
        )
