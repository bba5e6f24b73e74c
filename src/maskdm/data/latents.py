"""What an autoencoder makes of the images: kept once, read as training reads pixels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Latents:
    """The latents of a data set's images [n, views, channels, height, width] in half precision, and mean and deviation of each channel.

    Views are the image and, where images are mirrored in training, the mirrored one: its latents are not the mirrored latents.
    """

    values: NDArray[np.float16]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def take(self, rows: NDArray[np.int64]) -> Float[Tensor, "batch views channels height width"]:
        """Some images' latents, each channel at mean 0 and deviation 1."""
        values = torch.from_numpy(self.values[rows].astype(np.float32))
        mean, std = (torch.tensor(figures)[:, None, None] for figures in (self.mean, self.std))
        return (values - mean) / std
