"""How large a network is, in parameters and in arithmetic, and which size of another comes nearest."""

from __future__ import annotations

import bisect
import functools
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from maskdm.config import Mask, NoMask
from maskdm.masking import draw, draw_route, num_entering, num_sequences
from maskdm.models import Denoiser

UNET_WIDTHS = range(8, 513, 8)

T = TypeVar("T")


def parameters(network: nn.Module) -> int:
    """Those that are trained."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


def work(model: Denoiser, mask: Mask | None = None) -> float:
    """FLOPs of training on one image, under a mask: three times those that torch counts in the forward pass, as in our own formula.

    A network on the meta device is only counted, not computed; masks need a real one.
    """
    mask, generator = mask or NoMask(), torch.Generator().manual_seed(0)
    count, channels = num_sequences(mask), model.config["in_channels"]
    kept, route = draw(mask, count, model.grid, generator), draw_route(mask, count, model.grid, generator)
    labels = torch.zeros(count, dtype=torch.int64, device=model.device) if model.num_classes else None
    patches = torch.zeros(count, num_entering(mask, model.grid), channels * model.patch_size**2, device=model.device)
    # fused attention is not counted on every device; the plain one always is
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.train()(patches, torch.zeros(count, device=model.device), labels, kept, route)
    return 3.0 * counter.get_total_flops()


def nearest(candidates: Sequence[T], measure: Callable[[T], float], wanted: float) -> T:
    """The candidate whose measure is nearest by ratio; their measures ascend."""
    measure = functools.cache(measure)
    place = bisect.bisect_left(candidates, wanted, key=measure)
    return min(candidates[max(0, place - 1) : place + 1], key=lambda each: max(measure(each) / wanted, wanted / measure(each)))
