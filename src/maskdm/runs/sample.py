"""`maskdm sample`: images from a run, each a function of the seed and its number alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

import maskdm
from maskdm.config import Config, GuideName, Halve, Hardware, Sampling, SchedulerName
from maskdm.data import to_uint8
from maskdm.engine import Precision, Ranks, autocast, out_of_memory, this_machine
from maskdm.errors import UserError, nearest
from maskdm.pictures import grid, to_pil
from maskdm.runs.directory import Weights
from maskdm.sampling import make_scheduler, seeded

TOKENS = {"cpu": 4096, "cuda": 1 << 18, "mps": 1 << 15}
"""Tokens that the network is given at once, unless the user says otherwise: enough to fill the machine (docs/performance.md)."""

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
    labels: Sequence[int] | None,
    seed: int,
    precision: Precision,
    batch: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> NDArray[np.uint8]:
    """Draw the images with these indices, uint8 [len(indices), channels, height, width].

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
                    class_labels=None if labels is None else list(labels[start : start + batch]),
                    generator=seeded(seed, here),
                    num_inference_steps=settings.steps,
                    eta=settings.eta,
                    guidance_scale=settings.guidance,
                    guide=settings.guide,
                    output_type="pt",
                    return_dict=False,
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
    seed: int = 0
    labels: tuple[str, ...] = ()
    batch: int | None = None
    precision: Precision | Literal["auto"] = "auto"
    compile: bool = False
    weights: Weights = "ema"
    ema: float | None = None
    """Length (sigma_rel) of the average made from the snapshots; None: the one that training kept."""


def sample(
    request: SampleRequest, pipeline: maskdm.MaskDMPipeline, settings: Sampling, ranks: Ranks, progress: Callable[[int, int], None] | None
) -> list[Path]:
    """Write sample-000000.png and so on, and grid.png, under settings from `sampling_settings`; each process draws its share.

    Returns the paths, the grid last. Raises UserError.
    """
    if request.num < 1 or (request.batch is not None and request.batch < 1):
        raise UserError("--num and --batch must be at least 1")
    pipeline.scheduler = make_scheduler(settings.scheduler, pipeline.config["schedule"], pipeline.config["target"])
    labels = choose_labels(pipeline.config["class_names"], request.labels, request.num)
    try:
        request.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to --out {request.out}: {error.strerror}") from None
    precision = this_machine(Hardware(precision=request.precision)).precision
    if request.compile:
        pipeline.unet.compile()
    paths, part = [request.out / f"sample-{i:06}.png" for i in range(request.num)], ranks.part(request.num)
    wanted = labels and labels[part.start : part.stop]
    images = list(draw_images(pipeline, settings, part, wanted, request.seed, precision, request.batch, progress)) if part else []
    for number, image in zip(part, images, strict=True):
        to_pil(image).save(paths[number])
    first_ones = [image for share in ranks.gather(images[: max(0, SHOWN - part.start)]) for image in share]
    overview = request.out / "grid.png"
    if ranks.first:
        grid(np.stack(first_ones), columns=max(1, round(len(first_ones) ** 0.5))).save(overview)
    return [*paths, overview]


def check_guidance(settings: Sampling, config: Config) -> None:
    """Raise UserError where guidance would have nothing to work with."""
    if settings.guidance == 1:
        return
    if config.model.dial is not None:
        low, high = config.model.dial
        if settings.guide == "path" or not low <= settings.guidance <= high:
            raise UserError(f"this network is told the guidance scale, from {low:g} to {high:g}; give one of these, and guide label")
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
    given = {key: getattr(request, key) for key in ("steps", "scheduler", "eta", "guidance", "guide") if getattr(request, key) is not None}
    settings = replace(config.sampling, **given)
    check_guidance(settings, config)
    return settings


def sampling_in_stage(config: Config, number: int) -> Sampling:
    """How samples are drawn in a stage, by its number: in as many steps as its student, or the next one's teacher, is made for."""
    here = config.stages[number].lesson if number < len(config.stages) else None
    if isinstance(here, Halve):
        return replace(config.sampling, steps=here.steps)
    coming = [2 * stage.lesson.steps for stage in config.stages[number:] if isinstance(stage.lesson, Halve)]
    return replace(config.sampling, steps=coming[0]) if coming else config.sampling


def choose_labels(names: Sequence[str], wanted: Sequence[str], num: int) -> list[int] | None:
    """A label per image: those wanted (by name or number) in turn, or all classes in turn; None without classes."""
    if not names:
        if wanted:
            raise UserError("--labels given, but this model was trained without classes")
        return None
    chosen = [_label(names, text) for text in wanted] or list(range(len(names)))
    return [chosen[i % len(chosen)] for i in range(num)]


def _label(names: Sequence[str], text: str) -> int:
    if text in names:
        return list(names).index(text)
    if text.isdigit() and int(text) < len(names):
        return int(text)
    known = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    raise UserError(f"--labels '{text}' is no class of this model ({known}){nearest(text, list(names))}")
