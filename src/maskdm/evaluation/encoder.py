"""The small convolutional network behind the `self` features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

DIMENSIONS = 128
EMBEDDED = 64
LARGEST = 64
"""Pixels of the longer side that the encoder sees; larger images are averaged down to it."""


class Encoder(nn.Module):
    """Images of one size to 128 features, and to class scores where there are classes; a few million multiplications each."""

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int, height: int, width: int, classes: int) -> None:
        super().__init__()
        self.shape = (channels, height, width)
        self.classes = classes
        shrink = min(1.0, LARGEST / max(height, width))
        self.size = (max(1, round(height * shrink)), max(1, round(width * shrink)))
        stride = max(1, round(min(self.size) / 16))
        self.trunk = nn.Sequential(
            *_convolution(channels, 32, 2 * stride + 1, stride),
            *_convolution(32, 64, 3, 2),
            *_convolution(64, 64, 3, 1),
            *_convolution(64, 128, 3, 2),
            *_convolution(128, DIMENSIONS, 3, 1),
        )
        self.scale = nn.BatchNorm1d(DIMENSIONS, affine=False)
        self.embedding = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.2), nn.Linear(4 * DIMENSIONS, EMBEDDED))
        self.embedding_scale = nn.BatchNorm1d(EMBEDDED, affine=False)
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(EMBEDDED, max(1, classes)))
        self.register_buffer("mean", torch.zeros(channels, 1, 1))
        self.register_buffer("std", torch.ones(channels, 1, 1))
        # a quarter less time per step on a CPU
        self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def prepare(self, images: UInt8[Tensor, "_ _ _ _"] | Float[Tensor, "_ _ _ _"]) -> Float[Tensor, "_ _ _ _"]:
        """From 0..255 to the encoder's size, and to mean 0 and deviation 1 over the training images."""
        pixels = images.float() / 255
        if self.size != self.shape[1:]:
            pixels = F.interpolate(pixels, self.size, mode="area")
        return (pixels - self.mean) / self.std

    def forward(self, prepared: Float[Tensor, "n _ _ _"]) -> Float[Tensor, "n 64"]:
        """The embedding that is trained, and that the classes are read from."""
        embedded: Tensor = self.embedding_scale(self.embedding(self.trunk(prepared)))
        return embedded

    def features(self, prepared: Float[Tensor, "n _ _ _"]) -> Float[Tensor, "n 128"]:
        """Features: the last convolution, averaged over the image, as the published FID takes them.

        Not the embedding, which gathers each class around a point: a distance there would see little but the shares of the
        classes. Over the training images each has mean 0 and deviation 1.
        """
        scaled: Tensor = self.scale(self.trunk(prepared).mean(dim=(2, 3)))
        return scaled


def _convolution(inputs: int, outputs: int, kernel: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
