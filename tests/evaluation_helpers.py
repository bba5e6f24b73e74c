from __future__ import annotations

import torch
from torch import Tensor, nn


def normal(count: int, dimensions: int, seed: int, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dimensions, dimensions, generator=torch.Generator().manual_seed(dimensions))
    return torch.randn(count, dimensions, generator=generator) @ mixing + shift


class Pixels(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1).float()
