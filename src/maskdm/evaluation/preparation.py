"""Images as a published network reads them: RGB, of its size, in its range of values."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped, UInt8
from PIL import Image
from torch import Tensor

from maskdm.errors import UserError

Triple = tuple[float, float, float]

IMAGENET_MEAN: Triple = (0.485 * 255, 0.456 * 255, 0.406 * 255)
IMAGENET_STD: Triple = (0.229 * 255, 0.224 * 255, 0.225 * 255)

_BY_TORCH = {Image.Resampling.BILINEAR: "bilinear", Image.Resampling.BICUBIC: "bicubic"}


@dataclass(frozen=True)
class Preparation:
    """uint8 images [n, 1 or 3, H, W] to float32 [n, 3, h, w]: resized, cut, then (pixel - mean) / std with pixels in 0..255.

    `size`: (height, width), or the length of the shorter side, or None for the images' own. `crop`: (height, width) about the
    centre. Pillow resizes the uint8 image and averages over all pixels when it shrinks: interpolation that skips pixels changes
    a distance more than a model does ("On Aliased Resizing", arXiv 2104.11222).
    """

    size: tuple[int, int] | int | None
    mean: Triple
    std: Triple
    crop: tuple[int, int] | None = None
    resample: Image.Resampling = Image.Resampling.BILINEAR

    def __call__(self, images: UInt8[Tensor, "n _ _ _"]) -> Float[Tensor, "n 3 _ _"]:
        """Prepared images, on the CPU. UserError for another number of channels than 1 or 3."""
        shaped = as_rgb(self._cut(self._resized(images))).float()
        return shaped.sub_(torch.tensor(self.mean)[:, None, None]).div_(torch.tensor(self.std)[:, None, None])

    def differentiable(self, images: Float[Tensor, "n _ _ _"]) -> Float[Tensor, "n 3 _ _"]:
        """The same of images with pixels in 0..255 that need not be whole, by torch: on their device, and with a gradient.

        Like Pillow's but for its rounding, and for what a bicubic filter overshoots, which Pillow cuts off. UserError for other filters.
        """
        target = self._target(*images.shape[2:])
        if target != tuple(images.shape[2:]):
            if self.resample not in _BY_TORCH:
                raise UserError(f"images are resized by the filter {self.resample.name.lower()}, which has no gradient here; use bicubic")
            images = F.interpolate(images, target, mode=_BY_TORCH[self.resample], antialias=True, align_corners=False)
        mean, std = (torch.tensor(each, device=images.device)[:, None, None] for each in (self.mean, self.std))
        return (as_rgb(self._cut(images)) - mean) / std

    def __str__(self) -> str:
        parts: list[str] = []
        if self.size is not None:
            size = f"shorter side {self.size}" if isinstance(self.size, int) else f"{self.size[1]} x {self.size[0]}"
            parts.append(f"resized to {size} (Pillow, {self.resample.name.lower()}, antialiased)")
        if self.crop is not None:
            parts.append(f"cut to the middle {self.crop[1]} x {self.crop[0]}")
        if (self.mean, self.std) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)):
            parts.append("RGB in 0..255")
        else:
            parts.append(f"RGB in 0..255, minus {_numbers(self.mean)}, over {_numbers(self.std)}")
        return ", ".join(parts)

    def _resized(self, images: Tensor) -> Tensor:
        height, width = images.shape[2:]
        target = self._target(height, width)
        if target == (height, width):
            return images
        planes = [Image.fromarray(plane.numpy()).resize((target[1], target[0]), self.resample) for plane in images.flatten(0, 1)]
        stacked = torch.from_numpy(np.stack([np.asarray(plane) for plane in planes]))
        return stacked.reshape(*images.shape[:2], *target)

    def _target(self, height: int, width: int) -> tuple[int, int]:
        if self.size is None:
            return height, width
        if isinstance(self.size, tuple):
            return self.size
        shorter = min(height, width)
        return height * self.size // shorter, width * self.size // shorter

    def _cut(self, images: Tensor) -> Tensor:
        if self.crop is None:
            return images
        (height, width), (high, wide) = images.shape[2:], self.crop
        top, left = (height - high) // 2, (width - wide) // 2
        return images[:, :, top : top + high, left : left + wide]


def as_rgb(images: Shaped[Tensor, "n _ h w"]) -> Shaped[Tensor, "n 3 h w"]:
    """Gray is repeated; RGB stays. UserError for anything else."""
    if images.shape[1] not in (1, 3):
        raise UserError(f"the images have {images.shape[1]} channels; a feature network reads 1 (gray) or 3 (RGB)")
    return images.expand(-1, 3, -1, -1)


def _numbers(values: Triple) -> str:
    return f"{values[0]:.6g}" if len(set(values)) == 1 else f"({', '.join(f'{value:.6g}' for value in values)})"
