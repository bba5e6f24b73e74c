"""`maskdm pack`: a data set written as shards, from which runs read where they lie."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from maskdm.config import Hardware
from maskdm.data import inspect, open_source, pack
from maskdm.engine import this_machine
from maskdm.errors import UserError
from maskdm.recipes import choose
from maskdm.runs.display import Display
from maskdm.runs.resolve import facts_of
from maskdm.runs.sizes import parse_size


@dataclass(frozen=True)
class PackRequest:
    """What `maskdm pack` was asked for; None is chosen from the data, as `maskdm train` does."""

    data: str
    out: Path
    image_size: str | None = None
    channels: Literal[1, 3] | None = None
    fit: Literal["crop", "pad", "stretch"] = "crop"
    background: str = "#ffffff"
    max_broken: float = 0.05
    shard_images: int = 1000


def pack_data(request: PackRequest, display: Display) -> str:
    """Write the shards, or those that are missing; returns what to print. Raises UserError."""
    source = open_source(request.data)
    summary = inspect(source)
    if summary.readable == 0:
        raise UserError(f"no image of {request.data} can be read; `maskdm data {request.data}` lists what is wrong with each")
    size = parse_size(request.image_size) if request.image_size else None
    chosen = choose(facts_of(source, summary, this_machine(Hardware())), size).config.data
    settings = replace(chosen, fit=request.fit, background=request.background, max_broken=request.max_broken)
    settings = replace(settings, channels=request.channels or chosen.channels)
    height, width = settings.image_size
    display.note(f"{request.data}: {source.description}, {len(source)} images")
    display.note(f"packed as {height} x {width}, {'gray' if settings.channels == 1 else 'RGB'}, fit {settings.fit}")
    for note in source.notes:
        display.note(note)
    with display.counting("packing images") as progress:
        index = pack(source, settings, request.out, request.shard_images, progress, display.note)
    left = len(source) - len(index)
    size_mb = sum(shard.size for shard in index.shards) / 1e6
    skipped = f", {left} that cannot be read left out" if left else ""
    return f"{len(index)} images in {len(index.shards)} shards, {size_mb:.3g} MB, in {request.out}{skipped}; train on it, or on its URL"
