"""Which patches of each image the network sees (arXiv 2306.11363, section 3.2).

Masks are drawn on the device from a generator. The number of kept patches depends on the mask and the grid alone, so that
shapes stay static. The model gathers by these indices, the objective reads them; nothing else knows about masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int, Num
from torch import Tensor

from maskdm.config import BlockMask, CropMask, DecodeMask, DeferMask, Mask, NoMask, PatchMask, ReduceMask, RouteMask, ViewsMask

Grid = tuple[int, int]
Kept = Int[Tensor, "batch kept"]
"""Row-major patch indices of each image that stay visible, in increasing order."""


@dataclass(frozen=True)
class Route:
    """What a network's inner blocks work on, where all patches enter.

    kept: the patches that go through them; None: all. first: blocks at the beginning that work on all. back: blocks at the end that do so
    again; 0: the others are dropped for good. shallow: images [batch] whose inner blocks count for nothing (`Fusion`). reconstruct: weight
    of the reconstruction of the patches that are not kept; None: the loss is of all that come out.
    """

    kept: Kept | None
    first: int
    back: int
    shallow: Bool[Tensor, " batch"] | None = None
    reconstruct: float | None = None


def num_kept(mask: Mask, grid: Grid) -> int:
    """Patches of a sequence that the denoising loss is of, out of grid[0] * grid[1]."""
    total = grid[0] * grid[1]
    match mask:
        case NoMask() | RouteMask():
            return total
        case PatchMask(ratio=ratio) | DeferMask(ratio=ratio) | DecodeMask(ratio=ratio):
            return total - int(ratio * total)
        case BlockMask(ratio=ratio, size=size):
            return total - int(ratio * total) // size**2 * size**2
        case CropMask(size=size):
            return size**2
        case ViewsMask(groups=groups):
            return total // groups
        case ReduceMask(factor=factor):
            return total // factor**2


def num_entering(mask: Mask, grid: Grid) -> int:
    """Patches of a sequence that are noised and embedded."""
    return grid[0] * grid[1] if isinstance(mask, RouteMask | DeferMask | DecodeMask) else num_kept(mask, grid)


def reduction(mask: Mask) -> int:
    """How many times less wide and high images are."""
    return mask.factor if isinstance(mask, ReduceMask) else 1


def num_sequences(mask: Mask) -> int:
    """Sequences that an image becomes."""
    return mask.groups if isinstance(mask, ViewsMask) else 1


def tokens_of_blocks(mask: Mask, grid: Grid, blocks: int) -> list[int]:
    """Patches that each of a network's blocks works on, of one sequence."""
    total, kept = grid[0] * grid[1], num_kept(mask, grid)
    match mask:
        case RouteMask(ratio=ratio, edge=edge):
            return [total] * edge + [total - int(ratio * total)] * (blocks - 2 * edge) + [total] * edge
        case DeferMask(mixer=mixer):
            return [total] * mixer + [kept] * (blocks - mixer)
        case DecodeMask(decoder=decoder):
            return [kept] * (blocks - decoder) + [total] * decoder
        case _:
            return [kept] * blocks


def hidden_rate(mask: Mask, grid: Grid) -> float:
    """The true share of patches that a sequence is not learned from, which rounding moves away from the nominal one."""
    return 1 - num_kept(mask, grid) / (grid[0] * grid[1])


def draw(mask: Mask, batch: int, grid: Grid, *generators: torch.Generator) -> Kept | None:
    """Draw the patches of each of `batch` sequences that enter, on the generators' device; None when all do.

    The indices are int64 [batch, kept], sorted, with the same `kept` = num_kept(mask, grid) for all. Of a ViewsMask consecutive
    sequences are of one image. Each generator draws for an equal share of the sequences, in order, as it would alone; a share is a
    multiple of a ViewsMask's groups. One call for many sorts once, and not in many small kernels.
    """
    kept = num_kept(mask, grid)
    if kept == grid[0] * grid[1]:
        return None
    match mask:
        case NoMask() | RouteMask() | DeferMask() | DecodeMask() | ReduceMask():
            return None
        case ViewsMask(groups=groups):
            order = _random_order(batch // groups, grid[0] * grid[1], generators)
            return order[:, : groups * kept].reshape(batch, kept).sort(dim=1).values
        case PatchMask():
            return _random_subset(batch, grid[0] * grid[1], kept, generators)
        case BlockMask(size=size):
            return _blocks(batch, grid, size, kept // size**2, generators)
        case CropMask(size=size):
            return _crop(batch, grid, size, generators)


def draw_route(mask: Mask, batch: int, grid: Grid, *generators: torch.Generator) -> Route | None:
    """Draw what the inner blocks work on, for masks that let every patch enter; None for the others. Generators: as `draw`'s."""
    total = grid[0] * grid[1]
    match mask:
        case RouteMask(ratio=ratio, edge=edge, spread=False):
            return Route(_random_subset(batch, total, total - int(ratio * total), generators), edge, edge)
        case RouteMask(ratio=ratio, edge=edge):
            return Route(_spread(batch, grid, round(4 * (1 - ratio)), generators), edge, edge)
        case DeferMask(mixer=mixer):
            return Route(_random_subset(batch, total, num_kept(mask, grid), generators), mixer, 0)
        case DecodeMask(decoder=decoder, weight=weight):
            return Route(_random_subset(batch, total, num_kept(mask, grid), generators), 0, decoder, reconstruct=weight)
        case _:
            return None


Generators = Sequence[torch.Generator]


def _random_subset(batch: int, total: int, kept: int, generators: Generators) -> Kept:
    """A uniformly random `kept`-subset of range(total) per row, ascending."""
    return _random_order(batch, total, generators)[:, :kept].sort(dim=1).values


def _random_order(batch: int, total: int, generators: Generators) -> Int[Tensor, "batch total"]:
    """A uniformly random permutation of range(total) per row: the order of uniform draws.

    In float64, because at the 2^24 levels of float32 ties are common enough to bias the choice.
    """
    device = generators[0].device
    size, dtype = (batch // len(generators), total), torch.float32 if device.type == "mps" else torch.float64
    keys = torch.cat([torch.rand(size, generator=each, device=device, dtype=dtype) for each in generators])
    return keys.argsort(dim=1)


def _blocks(batch: int, grid: Grid, size: int, kept_blocks: int, generators: Generators) -> Kept:
    down, across = grid[0] // size, grid[1] // size
    blocks = _random_subset(batch, down * across, kept_blocks, generators)
    row, column = blocks // across * size, blocks % across * size
    return _windows(row, column, size, grid).flatten(1).sort(dim=1).values


def _spread(batch: int, grid: Grid, each: int, generators: Generators) -> Kept:
    """`each` random patches of every 2 x 2 neighbours."""
    down, across = grid[0] // 2, grid[1] // 2
    chosen = _random_order(batch * down * across, 4, generators)[:, :each].reshape(batch, down, across, each)
    row = 2 * torch.arange(down, device=chosen.device)[:, None, None] + chosen // 2
    column = 2 * torch.arange(across, device=chosen.device)[:, None] + chosen % 2
    return (row * grid[1] + column).flatten(1).sort(dim=1).values


def span(route: Route | None, fuse: int, blocks: int) -> tuple[int, int]:
    """Numbers of the first block that works on what a route keeps and of the first after them; -1 where there is none."""
    if route is None:
        return (fuse, blocks - fuse) if fuse else (-1, -1)
    return route.first, blocks - route.back if route.back else -1


def _crop(batch: int, grid: Grid, size: int, generators: Generators) -> Kept:
    def place(free: int) -> Tensor:
        each = (batch // len(generators), 1)
        return torch.cat([torch.randint(free + 1, each, generator=one, device=one.device) for one in generators])

    return _windows(place(grid[0] - size), place(grid[1] - size), size, grid).flatten(1)


def _windows(row: Tensor, column: Tensor, size: int, grid: Grid) -> Tensor:
    """Indices [batch, windows, size * size] of the patches in windows whose top left patch is at (row, column)."""
    step = torch.arange(size, device=row.device)
    inside = (step[:, None] * grid[1] + step).flatten()
    return (row * grid[1] + column)[..., None] + inside


def take(patches: Num[Tensor, "batch all features"], kept: Kept | None) -> Num[Tensor, "batch kept features"]:
    """The kept patches of each image; all of them, untouched, when `kept` is None."""
    if kept is None:
        return patches
    return patches.gather(1, kept[..., None].expand(-1, -1, patches.shape[-1]))


def put_back(
    patches: Num[Tensor, "batch kept features"], kept: Kept, among: Num[Tensor, "batch all features"]
) -> Num[Tensor, "batch all features"]:
    """All patches, those of `kept` replaced: the inverse of `take`."""
    return among.scatter(1, kept[..., None].expand(-1, -1, patches.shape[-1]), patches)
