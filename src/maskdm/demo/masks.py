"""What a masked stage sees of a training image."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from maskdm.config import Config, DecodeMask, DeferMask, Mask, ReduceMask, RouteMask, Stage
from maskdm.data import Dataset
from maskdm.draws import derive
from maskdm.errors import UserError
from maskdm.masking import draw, draw_route, hidden_rate, num_sequences
from maskdm.pictures import hide

VIEWS = 4
"""Masks that are drawn of one image, or the groups that it is cut into."""


@dataclass(frozen=True)
class Masked:
    """Images uint8 [n, channels, height, width]: the training image, then what is seen of it; and what that is, in a sentence."""

    images: NDArray[np.uint8]
    name: str
    text: str


def masked_stages(config: Config) -> list[str]:
    """Names of the stages that hide patches from something."""
    return [stage.name for stage in config.stages if _kept(stage.mask, config, 0) is not None]


def masked(config: Config, dataset: Dataset, stage: str | None, number: int, seed: int) -> Masked:
    """A training image and a stage's masks of it. Raises UserError where there is no such image, or no such stage."""
    names = masked_stages(config)
    if not names:
        raise UserError("this run has no stage that hides patches")
    if stage is not None and stage not in names:
        raise UserError(f"'{stage[:100]}' is no masked stage of this run, which has {', '.join(names)}")
    chosen = next(each for each in config.stages if each.name == (stage or names[0]))
    rows = dataset.split(config.data.heldout, config.seed, config.data.limit)[0]
    if number >= len(rows):
        raise UserError(f"there is no training image {number}; the last is {len(rows) - 1}")
    row = rows[number : number + 1]
    image = np.ascontiguousarray(dataset.images[row].transpose(0, 3, 1, 2))[0]
    kept = _kept(chosen.mask, config, derive("demo mask", seed))
    assert kept is not None
    side = config.model.side * config.data.latent_factor
    seen = [hide(image, indices.tolist(), side) for indices in kept]
    return Masked(np.stack([image, *seen]), dataset.name_of(int(row[0])), _words(chosen, config))


def _kept(mask: Mask, config: Config, seed: int) -> torch.Tensor | None:
    """Patches [views, kept] that a mask leaves, or that go through the inner blocks; None where it leaves all."""
    generator = torch.Generator().manual_seed(seed)
    if isinstance(mask, ReduceMask):
        return None
    num = num_sequences(mask) if num_sequences(mask) > 1 else VIEWS
    kept = draw(mask, num, config.grid, generator)
    if kept is not None:
        return kept
    route = draw_route(mask, num, config.grid, generator)
    return None if route is None else route.kept


def _words(stage: Stage, config: Config) -> str:
    down, across = config.grid
    share, patches = hidden_rate(stage.mask, config.grid), f"{down} x {across} patches of {config.model.side} x {config.model.side}"
    patches += " latents" if config.data.autoencoder is not None else ""
    match stage.mask:
        case RouteMask(ratio=ratio):
            return f"Stage {stage.name}: all of the {patches} enter, and {ratio:.0%} of them, gray here, pass by the inner blocks."
        case DeferMask(mixer=mixer):
            return f"Stage {stage.name}: {share:.0%} of the {patches}, gray here, are dropped after the first {mixer} blocks."
        case DecodeMask(decoder=decoder):
            return f"Stage {stage.name}: {share:.0%} of the {patches}, gray here, are hidden from all but the last {decoder} blocks."
        case _:
            groups = num_sequences(stage.mask)
            if groups > 1:
                return f"Stage {stage.name}: the {patches} are cut into {groups} groups, and each is a sequence of its own."
            return (
                f"Stage {stage.name} sees {1 - share:.0%} of the {patches}; {share:.0%}, gray here, are hidden. Another mask at every step."
            )
