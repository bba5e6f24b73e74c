"""The verbs that give a model away: `maskdm export` and `maskdm push`."""

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


def give(verb: Export | Push) -> str:
    """Do it; returns what to print. Raises UserError."""
    from maskdm import runs

    formats = runs.parse_formats(verb.format)
    match verb:
        case Export():
            request = runs.ExportRequest(verb.run, verb.out, formats, verb.licence, verb.name, verb.weights, verb.ema)
            return runs.export(request, runs.Display())
        case Push():
            return runs.push(runs.PushRequest(verb.source, verb.to, verb.public, verb.licence, formats), runs.Display())
