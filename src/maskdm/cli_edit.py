"""The verb that has images fulfil a task: `maskdm edit`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from maskdm.cli_sample import Run
from maskdm.config import SchedulerName


@dataclass
class Edit:
    """Complete, enlarge, sharpen, colour or redraw an image with a run that was trained for none of it.

    maskdm edit RUN --task inpaint --image face.png --mask hole.png --out edited     white in the mask is drawn anew
    maskdm edit RUN --task upscale --image small.png --factor 4 --out edited
    maskdm edit RUN --task sketch --image rough.png --strength 0.6 --out edited
    """

    run: Run
    task: Annotated[
        Literal["inpaint", "outpaint", "upscale", "deblur", "colourise", "palette", "classify", "text", "sketch"],
        arg(help="what is asked for"),
    ]
    out: Annotated[Path, arg(help="directory for the images")]
    image: Annotated[Path | None, arg(help="the image, brought to the run's size; palette, classify and text take none")] = None
    mask: Annotated[Path | None, arg(help="for inpaint: white where the image is to be drawn anew")] = None
    factor: Annotated[int, arg(help="for upscale and outpaint: how many times larger than the given image")] = 2
    blur: Annotated[float, arg(help="for deblur: deviation of the blur, in pixels")] = 1.0
    colours: Annotated[str | None, arg(help="for palette: #rrggbb, with commas between")] = None
    target: Annotated[str | None, arg(help="for classify: class, or mixture of classes, that a small network is to see")] = None
    data: Annotated[str | None, arg(help="for classify: the images, where those that RUN was trained on have moved")] = None
    prompt: Annotated[str | None, arg(help="for text: what a CLIP network is to see, such as 'a red flower'")] = None
    clip: Annotated[Path | None, arg(help="for text: folder of a CLIP network with its tokenizer, as transformers saves it")] = None
    strength: Annotated[float | None, arg(help="of the task, 1; of a sketch: how much is drawn anew, 0 to 1; 0.6 if left out")] = None
    method: Annotated[
        Literal["cheap", "full", "project"],
        arg(help="full: gradients through the network, steps repeated; cheap: each for four evaluations; project: one evaluation a step"),
    ] = "cheap"
    simulate: Annotated[bool, arg(help="take the image for the truth: spoil it first, and say how near the results come")] = False
    num: Annotated[int, arg(help="number of images")] = 4
    steps: Annotated[int | None, arg(help="denoising steps; the run's setting if left out")] = None
    scheduler: Annotated[SchedulerName | None, arg(help="sampler; the run's setting if left out")] = None
    guidance: Annotated[float | None, arg(help="guidance scale by class, 1 for none; the run's setting if left out")] = None
    labels: Annotated[tuple[str, ...], arg(help="classes to draw, in turn; none if left out")] = ()
    seed: Annotated[int, arg(help="seed of the noise")] = 0


def change(verb: Edit) -> str:
    """Do it; returns what to print. Raises UserError."""
    from maskdm import runs

    return runs.edit(runs.EditRequest(**vars(verb)), runs.Display())
