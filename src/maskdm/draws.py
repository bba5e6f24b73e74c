"""Every random draw of a training step, as a function of (seed, step, position in the global batch) alone.

So neither the worker, the rank, the world size, nor the pieces a batch is computed in can change a sample's noise, time
or mask; and a resumed run needs no generator state.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from maskdm.config import Config, Mask
from maskdm.diffusion import Times, draw_times
from maskdm.masking import Kept, Route, draw, draw_route, num_entering, num_sequences, reduction

ROWS = 8
"""Samples that share one generator: few enough to slice a batch anywhere without much waste, enough to draw quickly."""


@dataclass(frozen=True)
class Draws:
    """Times [batch], patches that enter, what inner blocks take of them, noise [batch, entering, features], dropped labels, mirroring.

    And how many times less wide and high the images are.
    """

    t: Times
    kept: Kept | None
    route: Route | None
    noise: Float[Tensor, "batch kept features"]
    drop: Bool[Tensor, " batch"]
    flip: Bool[Tensor, " batch"]
    reduced: int = 1


def derive(*parts: int | str) -> int:
    """A 63-bit seed that is a function of all parts."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def _of_images(uniform: Tensor, views: int) -> Tensor:
    """One draw for all views of an image, which are of the same patches only where all are mirrored alike."""
    return uniform.reshape(-1, views)[:, :1].expand(-1, views).flatten()


def _route(config: Config, route: Route | None, here: slice, uniform: Tensor) -> Route | None:
    """The route of the piece. Half of the images without a label go without a network's inner blocks too, where it can do without."""
    fuse = config.model.fuse
    if route is None:
        route = Route(None, fuse, fuse) if fuse else None
    elif route.kept is not None:
        route = replace(route, kept=route.kept[here])
    return replace(route, shallow=uniform < config.diffusion.label_drop / 2) if route is not None and fuse else route


Where = tuple[int, int, int, int, int]
"""Of a piece of a batch: seed, step, position of its first sequence in the global batch, sequences, those of the whole batch."""


def draw_lesson(where: Where, device: torch.device) -> Float[Tensor, "batch 3"]:
    """Three in [0, 1) of each sequence: for a guidance scale, a place among sampling steps, their number.

    Places are spread over the batch, one in each of its equal parts; which sequence has which part turns from step to step.
    """
    seed, step, first, count, batch = where
    blocks = range(first // ROWS, (first + count - 1) // ROWS + 1)
    generators = [torch.Generator(device).manual_seed(derive("lesson", seed, step, block)) for block in blocks]
    drawn = torch.cat([torch.rand(ROWS, 3, generator=each, device=device) for each in generators])[first % ROWS :][:count]
    part = (torch.arange(first, first + count, device=device) + derive("turn", seed, step) % batch) % batch
    return torch.stack([drawn[:, 0], ((part + drawn[:, 1]) / batch).clamp(max=1 - 1e-6), drawn[:, 2]], dim=1)


def draw_step(config: Config, mask: Mask, seed: int, step: int, first: int, count: int, batch: int, device: torch.device) -> Draws:
    """Draw for the samples at positions [first, first + count) of the global batch of `batch` sequences of a step.

    Noise is drawn last, for the patches that enter alone: a sample's time, label and mirroring are the same under every mask.
    """
    grid, features = config.grid, config.data.field_channels * config.model.side**2
    blocks = range(first // ROWS, (first + count - 1) // ROWS + 1)
    generators = [torch.Generator(device).manual_seed(derive(seed, step, block)) for block in blocks]
    here, rows = slice(first % ROWS, first % ROWS + count), ROWS * len(blocks)
    uniform = torch.cat([torch.rand(ROWS, 3, generator=each, device=device) for each in generators])[here]
    kept, route = draw(mask, rows, grid, *generators), draw_route(mask, rows, grid, *generators)
    entering = num_entering(mask, grid)
    noise = torch.cat([torch.randn(ROWS, entering, features, generator=each, device=device) for each in generators])[here]
    share = uniform[:, 0]
    if config.diffusion.stratified:
        number, views = torch.arange(first, first + count, device=device), num_sequences(mask)
        stratum = number // views + number % views * (batch // views)  # the views of an image are apart in time
        share = (stratum + share) / batch
    return Draws(
        t=draw_times(config.diffusion, share),
        kept=None if kept is None else kept[here],
        route=_route(config, route, here, uniform[:, 1]),
        noise=noise,
        drop=uniform[:, 1] < config.diffusion.label_drop,
        flip=_of_images(uniform[:, 2], num_sequences(mask)) < config.data.flip,
        reduced=reduction(mask),
    )
