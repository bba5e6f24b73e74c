"""Which patches of each image the network sees (arXiv 2306.11363, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from maskdm.config.check import require


@dataclass(frozen=True)
class NoMask:
    """Whole images: ordinary denoising score matching."""

    kind: ClassVar[str] = "none"


@dataclass(frozen=True)
class PatchMask:
    """Hide int(ratio * N) of the N patches at random."""

    kind: ClassVar[str] = "patch"
    ratio: Annotated[float, "share of the patches hidden, from 0 to below 1"] = 0.5

    def __post_init__(self) -> None:
        require(0 <= self.ratio < 1, f"mask.ratio is {self.ratio}; give a share from 0 to below 1")


@dataclass(frozen=True)
class BlockMask:
    """Cut the grid into aligned size x size blocks of patches and hide int(ratio * N) // size^2 of the blocks."""

    kind: ClassVar[str] = "block"
    ratio: Annotated[float, "nominal share of the patches hidden, from 0 to below 1"] = 0.9
    size: Annotated[int, "side of a block, in patches; must divide the grid"] = 4

    def __post_init__(self) -> None:
        require(0 <= self.ratio < 1, f"mask.ratio is {self.ratio}; give a share from 0 to below 1")
        require(self.size >= 1, f"mask.size is {self.size}; a block is at least 1 patch wide")


@dataclass(frozen=True)
class CropMask:
    """Keep one window of size x size patches at a uniform place."""

    kind: ClassVar[str] = "crop"
    size: Annotated[int, "side of the kept window, in patches"] = 11

    def __post_init__(self) -> None:
        require(self.size >= 1, f"mask.size is {self.size}; a window is at least 1 patch wide")


@dataclass(frozen=True)
class ViewsMask:
    """Cut each image's patches into so many random groups and learn from all, each a sequence of its own: nothing read is wasted."""

    kind: ClassVar[str] = "views"
    groups: Annotated[int, "groups, of N // groups patches each: 2, 4 or 8"] = 4

    def __post_init__(self) -> None:
        require(self.groups in (2, 4, 8), f"mask.groups is {self.groups}; give 2, 4 or 8")


@dataclass(frozen=True)
class RouteMask:
    """Every patch enters and is learned from, but in the inner blocks int(ratio * N) random ones pass by (TREAD, arXiv 2501.04765).

    With `model.fuse`, what comes out of the inner blocks is joined with what went in by a layer (SPRINT, arXiv 2510.21986).
    """

    kind: ClassVar[str] = "route"
    ratio: Annotated[float, "share of the patches that pass by the inner blocks, from 0 to below 1"] = 0.5
    edge: Annotated[int, "blocks at either end that work on every patch; model.fuse where that is set"] = 2
    spread: Annotated[bool, "leave as many of each 2 x 2 neighbours, so that no region goes without; ratio 0.25, 0.5 or 0.75"] = False

    def __post_init__(self) -> None:
        require(0 <= self.ratio < 1, f"mask.ratio is {self.ratio}; give a share from 0 to below 1")
        require(not self.spread or self.ratio in (0.25, 0.5, 0.75), f"mask.ratio is {self.ratio}; with mask.spread give 0.25, 0.5 or 0.75")
        require(self.edge >= 1, f"mask.edge is {self.edge}; at least 1 block at either end works on every patch")


@dataclass(frozen=True)
class DeferMask:
    """Hide int(ratio * N) patches at random, but only after the first blocks have mixed all of them (MicroDiT, arXiv 2407.15811)."""

    kind: ClassVar[str] = "defer"
    ratio: Annotated[float, "share of the patches that are dropped, from 0 to below 1"] = 0.75
    mixer: Annotated[int, "blocks that work on every patch before"] = 2

    def __post_init__(self) -> None:
        require(0 <= self.ratio < 1, f"mask.ratio is {self.ratio}; give a share from 0 to below 1")
        require(self.mixer >= 1, f"mask.mixer is {self.mixer}; at least 1 block works on every patch")


@dataclass(frozen=True)
class DecodeMask:
    """Hide int(ratio * N) random patches from all but the last blocks; a learned token stands for each there (MaskDiT, arXiv 2306.09305).

    The loss of the hidden ones is of x_t itself, which no one can denoise unseen: the reconstruction of a masked autoencoder.
    """

    kind: ClassVar[str] = "decode"
    ratio: Annotated[float, "share of the patches hidden, from 0 to below 1"] = 0.5
    decoder: Annotated[int, "blocks at the end that work on every patch"] = 2
    weight: Annotated[float, "weight of the reconstruction of hidden patches in the loss"] = 0.1

    def __post_init__(self) -> None:
        require(0 <= self.ratio < 1, f"mask.ratio is {self.ratio}; give a share from 0 to below 1")
        require(self.decoder >= 1, f"mask.decoder is {self.decoder}; at least 1 block works on every patch")
        require(self.weight >= 0, f"mask.weight is {self.weight}; give 0 or more")


@dataclass(frozen=True)
class ReduceMask:
    """Whole images, reduced: what a sceptic would train on first instead (progressive resolution)."""

    kind: ClassVar[str] = "reduce"
    factor: Annotated[int, "how many times less wide and high the images are; must divide the grid"] = 2

    def __post_init__(self) -> None:
        require(self.factor >= 2, f"mask.factor is {self.factor}; give 2 or more")


Mask = NoMask | PatchMask | BlockMask | CropMask | ViewsMask | RouteMask | DeferMask | DecodeMask | ReduceMask
