"""Guidance: what the network predicts, led away from what something worse predicts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from maskdm.config import GuideName
from maskdm.diffusion import Schedule, alpha_sigma
from maskdm.errors import UserError
from maskdm.masking import Route
from maskdm.models import Denoiser

Labels = Int[Tensor, " batch"] | Float[Tensor, "batch classes"]
"""A class per image, or the weights of a mixture of classes, the null class the last."""

STRIDE = 0.5
"""Of a window's side, from one to the next."""


@dataclass(frozen=True)
class Guide:
    """Away from what, how far, and at which noise levels (sigma / alpha)."""

    scale: float = 1.0
    away: GuideName = "label"
    window: tuple[float, float] = (0.0, float("inf"))
    rescale: float = 0.0
    negative: Labels | None = None
    weak: Denoiser | None = None

    def check(self, network: Denoiser) -> None:
        """Raise UserError where the network cannot be led so."""
        if self.away == "path" and not network.fuse:
            raise UserError("guide path needs a network with fuse, and this one has none; use guide label")
        if (self.weak is None) != (self.away != "auto"):
            raise UserError("guide auto needs a weak network, and no other guide takes one")
        if not 0 <= self.window[0] < self.window[1]:
            raise UserError(f"the guidance window is {self.window[0]:g} to {self.window[1]:g}; give two noise levels, the lower one first")
        if not 0 <= self.rescale <= 1:
            raise UserError(f"the guidance rescale is {self.rescale:g}; it must be from 0 to 1")


def as_labels(labels: Tensor, null: int, batch: int) -> Labels:
    """Labels that fit. Raises UserError."""
    if null == 0:
        raise UserError("this model knows no classes; leave the labels out")
    if labels.is_floating_point():
        if labels.shape != (batch, null + 1):
            raise UserError(f"weights of classes have the shape {tuple(labels.shape)}; give {(batch, null + 1)}, the null class last")
        return labels
    if labels.shape != (batch,) or labels.min() < 0 or labels.max() > null:
        raise UserError(f"give one label per image, from 0 to {null - 1} ({null} for none): {batch} images, labels {labels.tolist()}")
    return labels


def guided(
    network: Denoiser, schedule: Schedule, x: Tensor, t: Tensor, labels: Labels | None, lead: Guide, asked: dict[str, float]
) -> Tensor:
    """The network's output at x_t, led. One evaluation outside of the window, or at scale 1; two within."""
    alpha, sigma = alpha_sigma(schedule, t.float().reshape(1))
    acts = lead.scale != 1 and lead.window[0] <= float(sigma / alpha.clamp(min=1e-8)) <= lead.window[1]
    if not acts or (lead.away == "label" and labels is None):
        return tiled(network, x, lambda part: network(part, t, labels, **asked).sample)
    null = None if labels is None else torch.full((len(x),), network.num_classes, device=x.device)
    if lead.away == "path":
        nothing = Route(torch.zeros(len(x), 0, dtype=torch.int64, device=x.device), network.fuse, network.fuse)
        worse = tiled(network, x, lambda part: network(part, t, null, route=nothing, **asked).sample)
        plain = tiled(network, x, lambda part: network(part, t, labels, **asked).sample)
    elif lead.weak is not None:
        weak = lead.weak
        worse = tiled(weak, x, lambda part: weak(part, t, labels if weak.num_classes else None, **asked).sample)
        plain = tiled(network, x, lambda part: network(part, t, labels, **asked).sample)
    else:
        assert labels is not None and null is not None
        other = null if lead.negative is None else lead.negative
        if labels.is_floating_point() != other.is_floating_point():
            labels, other = (
                each if each.is_floating_point() else F.one_hot(each, network.num_classes + 1).to(x.dtype) for each in (labels, other)
            )
        both = torch.cat([labels, other])
        plain, worse = tiled(network, torch.cat([x, x]), lambda part: network(part, t, both, **asked).sample).chunk(2)
    led = torch.lerp(worse, plain, lead.scale)
    if lead.rescale:
        sides = (1, 2, 3)
        led = led * (1 - lead.rescale + lead.rescale * plain.std(dim=sides, keepdim=True) / led.std(dim=sides, keepdim=True))
    return led


def tiled(network: Denoiser, x: Tensor, ask: Callable[[Tensor], Tensor]) -> Tensor:
    """What a network predicts of an image that is larger than its own: the mean of overlapping windows (arXiv 2302.08113)."""
    height, width = network.size
    if x.shape[-2:] == (height, width):
        return ask(x)
    total, times = torch.zeros_like(x), torch.zeros_like(x[:1, :1])
    for top in _starts(x.shape[-2], height):
        for left in _starts(x.shape[-1], width):
            place = (..., slice(top, top + height), slice(left, left + width))
            total[place] += ask(x[place])
            times[place] += 1
    return total / times


def _starts(length: int, side: int) -> list[int]:
    return [*range(0, length - side, max(1, round(STRIDE * side))), length - side]
