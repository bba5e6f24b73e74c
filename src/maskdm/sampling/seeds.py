"""A seed for every image."""

from __future__ import annotations

import torch

from maskdm.draws import derive


def seeded(seed: int, indices: range) -> list[torch.Generator]:
    """One generator per image, a function of (seed, index): image i is the same in whatever batch it is drawn."""
    return [torch.Generator().manual_seed(derive("sample", seed, i)) for i in indices]
