"""The verb that draws images: `maskdm sample`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from maskdm.config import GuideName, SchedulerName

WeightsName = Literal["raw", "ema", "best"]
PrecisionName = Literal["auto", "fp32", "bf16", "fp16"]
Run = Annotated[Positional[Path], arg(metavar="RUN", help="directory of a run of `maskdm train`")]


@dataclass
class Sample:
    """Draw images from a run: PNG files and a grid. Image i depends on the seed and i alone."""

    run: Run
    out: Annotated[Path, arg(help="directory for the images")]
    num: Annotated[int, arg(help="number of images")] = 64
    steps: Annotated[int | None, arg(help="denoising steps; the run's setting if left out")] = None
    scheduler: Annotated[SchedulerName | None, arg(help="sampler; the run's setting if left out")] = None
    eta: Annotated[float | None, arg(help="noise added back by ddim, 0 to 1; the run's setting if left out")] = None
    guidance: Annotated[float | None, arg(help="guidance scale, 1 for none; the run's setting if left out")] = None
    guide: Annotated[GuideName | None, arg(help="what guidance leads away from: the null class, the shallow path, or --weak")] = None
    guidance_window: Annotated[tuple[float, float] | None, arg(help="noise levels (sigma / alpha) where guidance acts: 0.3 5")] = None
    guidance_rescale: Annotated[float | None, arg(help="how far the contrast that guidance adds is taken back, 0 to 1")] = None
    threshold: Annotated[float | None, arg(help="below 1: quantile of the predicted image that is scaled to white, such as 0.995")] = None
    seed: Annotated[int, arg(help="seed of the noise")] = 0
    labels: Annotated[tuple[str, ...], arg(help="classes, by name or number, or mixtures (3:0.7+8:0.3), in turn; all if left out")] = ()
    negative: Annotated[str | None, arg(help="class that guidance leads away from, in place of none")] = None
    weak: Annotated[Path | None, arg(help="for --guide auto: a run, or RUN/checkpoints/STEP, that is worse at the same")] = None
    between: Annotated[str | None, arg(help="numbers of two images, such as 3,8: draw the way from one to the other, and morph.gif")] = None
    image_size: Annotated[str | None, arg(help="another size than the trained one, 64 or 64x96: positions go on as they began")] = None
    tiles: Annotated[bool, arg(help="with --image-size: windows of the trained size that overlap, averaged at each step")] = False
    animate: Annotated[bool, arg(help="also write denoising.gif, the way from noise")] = False
    batch: Annotated[int | None, arg(help="images computed at a time; fitted to the network and the device if left out")] = None
    precision: Annotated[PrecisionName, arg(help="arithmetic of the network; auto is bf16 where the machine has it")] = "auto"
    compile: Annotated[bool, arg(help="compile the network first: a slow start that many images make up for")] = False
    weights: Annotated[WeightsName, arg(help="as trained, averaged, or averaged at the best evaluation")] = "ema"
    ema: Annotated[float | None, arg(help="length (sigma_rel) of the weights' average, from the snapshots; as trained if left out")] = None
