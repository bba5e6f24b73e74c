"""The verbs that write for elsewhere: `maskdm export` and `push` a model, `maskdm pack` images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

FORMAT = "with commas between: diffusers, a folder with its code; onnx; torch, of torch.export"
LICENCE = "licence of the images and so of the model, for the card, such as cc-by-4.0"


@dataclass
class Export:
    """Write a run's network in forms that open without maskdm, with a model card (README.md) filled from the run."""

    run: Annotated[Positional[Path], arg(metavar="RUN", help="directory of a run of `maskdm train`")]
    out: Annotated[Path, arg(help="directory of the export; one that is there is replaced")]
    format: Annotated[str, arg(help=FORMAT)] = "diffusers"
    licence: Annotated[str, arg(help=LICENCE)] = "unknown"
    name: Annotated[str | None, arg(help="the model's name, for the card; that of RUN's directory if left out")] = None
    weights: Annotated[Literal["raw", "ema", "best"], arg(help="as trained, averaged, or averaged at the best evaluation")] = "ema"
    ema: Annotated[float | None, arg(help="length (sigma_rel) of the weights' average, from the snapshots; as trained if left out")] = None


@dataclass
class Push:
    """Send a run, exported on the way, or an export to the Hugging Face hub. Nothing else of maskdm sends anything anywhere."""

    source: Annotated[Positional[Path], arg(metavar="RUN_OR_EXPORT", help="a run of `maskdm train`, or what `maskdm export` has written")]
    to: Annotated[str, arg(help="where: user/name, made if it is not there")]
    public: Annotated[bool, arg(help="for all to see; private if left out")] = False
    format: Annotated[str, arg(help=f"of a run: {FORMAT}")] = "diffusers"
    licence: Annotated[str, arg(help=f"of a run: {LICENCE}")] = "unknown"


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


def give(verb: Export | Push | Pack) -> str:
    """Do it; returns what to print. Raises UserError."""
    from maskdm import runs

    match verb:
        case Pack():
            return runs.pack_data(runs.PackRequest(**vars(verb)), runs.Display())
        case Export():
            formats = runs.parse_formats(verb.format)
            request = runs.ExportRequest(verb.run, verb.out, formats, verb.licence, verb.name, verb.weights, verb.ema)
            return runs.export(request, runs.Display())
        case Push():
            formats = runs.parse_formats(verb.format)
            return runs.push(runs.PushRequest(verb.source, verb.to, verb.public, verb.licence, formats), runs.Display())
