"""One-level Haar wavelets: an orthonormal transform of images, and two tokens for each patch of it (arXiv 2306.11363, wavelet variant).

A coefficient of the transform stands for 2 x 2 pixels, so a patch of p x p coefficients holds exactly what a patch of 2p x 2p pixels does.
The networks transform their patches inside: noise, masks, losses and samples stay in pixels.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from maskdm.config import Transform
from maskdm.models.layers import Patches, Tokens


def haar(images: Float[Tensor, "*batch channels height width"]) -> tuple[Tensor, Tensor]:
    """Approximation [..., channels, height / 2, width / 2] and detail [..., 3 * channels, height / 2, width / 2] of images.

    Height and width must be even. Detail is the differences down, across and diagonally, `channels` of each. Sums of squares are
    kept, so white noise stays white; an approximation ranges over twice what the pixels do.
    """
    above, below = images[..., 0::2, :], images[..., 1::2, :]
    (mean, across), (down, diagonal) = _halves(above + below), _halves(above - below)
    return mean, torch.cat([down, across, diagonal], dim=-3)


def _halves(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Half the sums and half the differences of neighbours in a row."""
    left, right = rows[..., 0::2], rows[..., 1::2]
    return (left + right) / 2, (left - right) / 2


def inverse_haar(
    approximation: Float[Tensor, "*batch channels height width"], detail: Float[Tensor, "*batch details height width"]
) -> Float[Tensor, "*batch channels rows columns"]:
    """The images [..., channels, 2 * height, 2 * width] that `haar` made these of."""
    down, across, diagonal = detail.chunk(3, dim=-3)
    sums = _interleaved(approximation + across, approximation - across, dim=-1)  # of the rows above and below
    differences = _interleaved(down + diagonal, down - diagonal, dim=-1)
    return _interleaved(sums + differences, sums - differences, dim=-2) / 2


def _interleaved(first: Tensor, second: Tensor, dim: int) -> Tensor:
    """Alternately of the first and the second along dimension -1 or -2."""
    return torch.stack([first, second], dim=dim).flatten(dim - 1, dim)


class HaarEmbedding(nn.Module):
    """Two tokens for each patch, by a linear layer each: those of all approximations, then those of all details.

    Each layer's bias tells its tokens from the other's, where positions do not.
    """

    def __init__(self, channels: int, patch: int, width: int) -> None:
        super().__init__()
        self.shape = (channels, 2 * patch, 2 * patch)
        self.approximation = nn.Linear(channels * patch**2, width)
        self.detail = nn.Linear(3 * channels * patch**2, width)

    def reset_parameters(self) -> None:
        """As a linear layer begins."""
        self.approximation.reset_parameters()
        self.detail.reset_parameters()

    def forward(self, patches: Patches) -> Tokens:
        """Tokens [batch, 2 * patches, width] of patches of pixels [batch, patches, features]."""
        approximation, detail = (x.flatten(-3) for x in haar(patches.unflatten(-1, self.shape)))
        return torch.cat([self.approximation(approximation), self.detail(detail)], dim=1)


class HaarHead(nn.Module):
    """The way back from two tokens a patch to its pixels, by a linear layer each."""

    def __init__(self, width: int, channels: int, patch: int) -> None:
        super().__init__()
        self.channels, self.patch = channels, patch
        self.approximation = nn.Linear(width, channels * patch**2)
        self.detail = nn.Linear(width, 3 * channels * patch**2)

    def forward(self, tokens: Tokens) -> Patches:
        """Patches of pixels [batch, patches, features] of tokens as `HaarEmbedding` orders them."""
        first, second = tokens.chunk(2, dim=1)
        shape = (-1, self.patch, self.patch)
        approximation = self.approximation(first).unflatten(-1, shape)
        return inverse_haar(approximation, self.detail(second).unflatten(-1, shape)).flatten(-3)


def embedding(transform: Transform, channels: int, patch: int, width: int) -> nn.Linear | HaarEmbedding:
    """The first layer: from patches to tokens."""
    match transform:
        case "pixels":
            return nn.Linear(channels * patch**2, width)
        case "haar":
            return HaarEmbedding(channels, patch, width)


def head(transform: Transform, width: int, channels: int, patch: int) -> nn.Linear | HaarHead:
    """The last layer: from tokens to patches."""
    match transform:
        case "pixels":
            return nn.Linear(width, channels * patch**2)
        case "haar":
            return HaarHead(width, channels, patch)
