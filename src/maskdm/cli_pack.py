"""The verb that writes shards: `maskdm pack`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg


@dataclass
class Pack:
    """Write images, prepared, as tar shards with an index, from which runs read where they lie: for data larger than a machine.

    The same command again goes on where it was stopped. `maskdm train OUT`, or the URL of a copy of OUT, trains on them.
    """

    data: Annotated[
        Positional[str],
        arg(metavar="DATA", help="anything that train takes; also URLs and patterns of tar or parquet files (hf://..., {000..099}.tar)"),
    ]
    out: Annotated[Path, arg(help="folder for the shards")]
    image_size: Annotated[str | None, arg(help="height and width in pixels: 64, or 64x96; chosen from the data if left out")] = None
    channels: Annotated[Literal[1, 3] | None, arg(help="1 for gray, 3 for RGB; chosen from the data if left out")] = None
    fit: Annotated[Literal["crop", "pad", "stretch"], arg(help="how an image of another shape is fitted")] = "crop"
    background: Annotated[str, arg(help="colour laid under transparent images and around padded ones, as #rrggbb")] = "#ffffff"
    max_broken: Annotated[float, arg(help="share of unreadable files that is left out; above it there is no index")] = 0.05
    shard_images: Annotated[int, arg(help="images of a shard")] = 1000


def write(verb: Pack) -> str:
    """Do it; returns what to print. Raises UserError."""
    from maskdm import runs

    return runs.pack_data(runs.PackRequest(**vars(verb)), runs.Display())
