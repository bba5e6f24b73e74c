"""`maskdm sample`: images from a run, each a function of the seed and its number alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

import maskdm
from maskdm.config import Config, Data, GuideName, Halve, Hardware, Sampling, SchedulerName
from maskdm.data import to_uint8
from maskdm.engine import Precision, Ranks, autocast, out_of_memory, this_machine
from maskdm.errors import UserError
from maskdm.pictures import grid, to_pil
from maskdm.runs.directory import Weights
from maskdm.runs.sizes import parse_size
from maskdm.runs.wishes import (
    NO_WISHES,
    Film,
    Wishes,
    at_size,
    choose_labels,
    open_weak,
    parse_between,
    parse_label,
    save_gif,
)
from maskdm.sampling import make_scheduler, seeded

TOKENS = {"cpu": 4096, "cuda": 1 << 18, "mps": 1 << 15}
"""Tokens that the network is given at once, unless the user says otherwise: enough to fill the machine (docs/performance.md)."""

SETTINGS = ("steps", "scheduler", "eta", "guidance", "guide", "guidance_window", "guidance_rescale", "threshold")
"""Of a run's sampling, that a request may give."""

SHOWN = 400
"""Images in grid.png at most."""


def fitting_batch(pipeline: maskdm.MaskDMPipeline, guidance: float = 1.0, guide: GuideName = "label") -> int:
    """Images to compute at a time: a function of the network and the kind of device, so that a seed gives the same images again."""
    twice = 2 if guidance != 1 and guide == "label" and pipeline.unet.num_classes and pipeline.unet.guidance_dial is None else 1
    return max(1, TOKENS[pipeline.device.type] // (pipeline.unet.tokens * twice))


def draw_images(
    pipeline: maskdm.MaskDMPipeline,
    settings: Sampling,
    indices: range,
    labels: Sequence[int] | Sequence[Sequence[float]] | None,
    seed: int,
    precision: Precision,
    batch: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    wishes: Wishes = NO_WISHES,
    num: int = 1,
) -> NDArray[np.uint8]:
    """Draw the images with these indices, of `num` in all, uint8 [len(indices), channels, height, width].

    Image i starts from noise that is a function of (seed, i), so it does not depend on the batch or on the other images, but
    for rounding. Where memory runs out, the batch is halved.
    """
    batch = max(1, min(batch or fitting_batch(pipeline, settings.guidance, settings.guide), len(indices)))
    drawn: list[NDArray[np.uint8]] = []
    start = 0
    while start < len(indices):
        here = indices[start : start + batch]
        try:
            with autocast(pipeline.device, precision):
                output = pipeline(
                    batch_size=len(here),
                    class_labels=None if labels is None else torch.tensor(labels[start : start + batch]),
                    generator=seeded(seed, here),
                    output_type="pt",
                    return_dict=False,
                    on_step=None if wishes.film is None else partial(wishes.film.take, here),
                    negative_labels=None if wishes.negative is None else [wishes.negative] * len(here),
                    weak=wishes.weak,
                    latents=wishes.noise(pipeline.unet, seed, here, num),
                    height=wishes.size and wishes.size[0],
                    width=wishes.size and wishes.size[1],
                    **sampler(settings),
                )
        except RuntimeError as error:
            if not out_of_memory(error) or batch == 1:
                raise
            batch //= 2
            continue
        images: torch.Tensor = output[0]  # pyright: ignore[reportIndexIssue]
        drawn.append(to_uint8(images.float() * 2 - 1).cpu().numpy())
        start += len(here)
        if progress is not None:
            progress(start, len(indices))
    return np.concatenate(drawn)


def sampler(settings: Sampling) -> dict[str, Any]:
    """The settings as arguments of a pipeline."""
    return {
        "num_inference_steps": settings.steps,
        "eta": settings.eta,
        "guidance_scale": settings.guidance,
        "guide": settings.guide,
        "guidance_window": settings.guidance_window or (0.0, float("inf")),
        "guidance_rescale": settings.guidance_rescale,
        "threshold": settings.threshold,
    }


@dataclass(frozen=True)
class SampleRequest:
    """What `maskdm sample` was asked for; None: as the run's own settings have it."""

    run: Path
    out: Path
    num: int = 64
    steps: int | None = None
    scheduler: SchedulerName | None = None
    eta: float | None = None
    guidance: float | None = None
    guide: GuideName | None = None
    guidance_window: tuple[float, float] | None = None
    guidance_rescale: float | None = None
    threshold: float | None = None
    seed: int = 0
    labels: tuple[str, ...] = ()
    negative: str | None = None
    weak: Path | None = None
    between: str | None = None
    image_size: str | None = None
    tiles: bool = False
    animate: bool = False
    batch: int | None = None
    precision: Precision | Literal["auto"] = "auto"
    compile: bool = False
    weights: Weights = "ema"
    ema: float | None = None
    """Length (sigma_rel) of the average made from the snapshots; None: the one that training kept."""


def ready(
    request: SampleRequest, pipeline: maskdm.MaskDMPipeline, settings: Sampling, wishes: Wishes
) -> Callable[[range, Callable[[int, int], None] | None], list[NDArray[np.uint8]]]:
    """Check what is asked for; what is returned draws those of the images that have these numbers, as `draw_images`. Raises UserError."""
    if request.num < 1 or (request.batch is not None and request.batch < 1):
        raise UserError("--num and --batch must be at least 1")
    pipeline.scheduler = make_scheduler(settings.scheduler, pipeline.config["schedule"], pipeline.config["target"])
    labels = choose_labels(pipeline.config["class_names"], request.labels, request.num, wishes.between)
    precision = this_machine(Hardware(precision=request.precision)).precision
    if request.compile:
        pipeline.unet.compile()

    def draw(part: range, progress: Callable[[int, int], None] | None) -> list[NDArray[np.uint8]]:
        if not part:
            return []
        wanted = labels and labels[part.start : part.stop]
        return list(draw_images(pipeline, settings, part, wanted, request.seed, precision, request.batch, progress, wishes, request.num))

    return draw


def sample(
    request: SampleRequest,
    pipeline: maskdm.MaskDMPipeline,
    settings: Sampling,
    wishes: Wishes,
    ranks: Ranks,
    progress: Callable[[int, int], None] | None,
) -> list[Path]:
    """Write sample-000000.png and so on, and grid.png, under settings from `sampling_settings`; each process draws its share.

    A way between two images is written as morph.gif too, a film as denoising.gif. Returns the paths, the grid last. Raises UserError.
    """
    draw = ready(request, pipeline, settings, wishes)
    try:
        request.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to --out {request.out}: {error.strerror}") from None
    paths, part = [request.out / f"sample-{i:06}.png" for i in range(request.num)], ranks.part(request.num)
    images = draw(part, progress)
    for number, image in zip(part, images, strict=True):
        to_pil(image).save(paths[number])
    first_ones = [image for share in ranks.gather(images[: max(0, SHOWN - part.start)]) for image in share]
    overview = request.out / "grid.png"
    if ranks.first:
        if wishes.film is not None:
            wishes.film.save(request.out / "denoising.gif", pipeline)
        if wishes.between is not None:
            save_gif([grid(image[None], columns=1) for image in first_ones], request.out / "morph.gif")
        grid(np.stack(first_ones), columns=max(1, round(len(first_ones) ** 0.5))).save(overview)
    return [*paths, overview]


def wishes_of(request: SampleRequest, pipeline: maskdm.MaskDMPipeline, data: Data) -> Wishes:
    """What a request asks for beside the settings; the pipeline's network is changed for one of another size. Raises UserError."""
    names, negative = pipeline.config["class_names"], None
    if request.negative is not None:
        found = parse_label(names, request.negative)
        if len(found) > 1:
            raise UserError(f"--negative is '{request.negative}'; name one class")
        negative = next(iter(found))
    weak = None if request.weak is None else open_weak(request.weak, pipeline.unet)
    size = None
    if request.image_size is not None:
        factor, pixels = data.latent_factor, parse_size(request.image_size)
        if any(side % factor for side in pixels):
            raise UserError(f"--image-size is {request.image_size}; the autoencoder wants multiples of {factor}")
        size = pixels[0] // factor, pixels[1] // factor
        if not request.tiles:
            pipeline.unet, size = at_size(pipeline.unet, size), None
    elif request.tiles:
        raise UserError("--tiles draws an image larger than the trained ones; give its --image-size")
    return Wishes(parse_between(request.between), negative, weak, size, Film() if request.animate else None)


def check_guidance(settings: Sampling, config: Config) -> None:
    """Raise UserError where guidance would have nothing to work with."""
    if settings.guidance == 1:
        return
    if config.model.dial is not None:
        low, high = config.model.dial
        if settings.guide != "label" or not low <= settings.guidance <= high:
            raise UserError(f"this network is told the guidance scale, from {low:g} to {high:g}; give one of these, and guide label")
        if settings.guidance_window is not None or settings.guidance_rescale:
            raise UserError("this network is told the guidance scale, and knows no guidance_window and no guidance_rescale; leave them out")
    if settings.guide == "auto":
        raise UserError("guide auto leads away from another network, which `maskdm sample --weak` names; a run's own is label or path")
    if settings.guide == "path" and not config.model.fuse:
        raise UserError("guide path needs a network trained with model.fuse, and this one has none; use guide label, or guidance 1")
    if settings.guide == "label" and not config.data.conditional:
        raise UserError("guidance needs a model trained with classes, and this one is not; leave it at 1")
    if config.diffusion.label_drop == 0:
        lacking = "a null class" if settings.guide == "label" else "the shallow path by itself"
        raise UserError(f"guidance needs {lacking} that was trained, and diffusion.label_drop is 0; leave it at 1")


def sampling_settings(config: Config, request: SampleRequest) -> Sampling:
    """A run's settings with those that a request gives in their place. Raises UserError for those that the run cannot follow."""
    scheduler = request.scheduler or config.sampling.scheduler
    if request.eta and scheduler != "ddim":
        raise UserError(f"--eta belongs to the scheduler ddim, and not to {scheduler}; leave it out")
    given = {key: getattr(request, key) for key in SETTINGS if getattr(request, key) is not None}
    settings = replace(config.sampling, **given)
    if (settings.guide == "auto") != (request.weak is not None) or (settings.guide == "auto" and settings.guidance == 1):
        raise UserError("guide auto leads away from a weaker network: give --guide auto, --weak RUN and a --guidance above 1 together")
    if request.negative is not None and config.model.dial is not None:
        raise UserError("--negative: this network is told the guidance scale, and leads away from no class but none; leave it out")
    if request.negative is not None and (settings.guide != "label" or settings.guidance == 1):
        raise UserError("--negative names the class that guidance leads away from; give a --guidance above 1, and guide label")
    if settings.guide != "auto":
        check_guidance(settings, config)
    return settings


def sampling_in_stage(config: Config, number: int) -> Sampling:
    """How samples are drawn in a stage, by its number: in as many steps as its student, or the next one's teacher, is made for."""
    here = config.stages[number].lesson if number < len(config.stages) else None
    if isinstance(here, Halve):
        return replace(config.sampling, steps=here.steps)
    coming = [2 * stage.lesson.steps for stage in config.stages[number:] if isinstance(stage.lesson, Halve)]
    return replace(config.sampling, steps=coming[0]) if coming else config.sampling
