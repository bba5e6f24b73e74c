"""A seed for every image."""

from __future__ import annotations

import torch
from torch import Tensor

from maskdm.draws import derive


def seeded(seed: int, indices: range) -> list[torch.Generator]:
    """One generator per image, a function of (seed, index): image i is the same in whatever batch it is drawn."""
    return [torch.Generator().manual_seed(derive("sample", seed, i)) for i in indices]


def slerp(first: Tensor, last: Tensor, share: float) -> Tensor:
    """Noise on the arc from one to another of the same shape, so that it keeps their length (share 0 to 1); its ends exactly."""
    if share in (0, 1):
        return last if share else first
    angle = torch.arccos(torch.nn.functional.cosine_similarity(first.flatten(), last.flatten(), dim=0).clamp(-1, 1))
    if angle < 1e-4:
        return torch.lerp(first, last, share)
    return (torch.sin((1 - share) * angle) * first + torch.sin(share * angle) * last) / torch.sin(angle)
