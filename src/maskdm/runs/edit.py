"""`maskdm edit`: an image completed, enlarged, sharpened, coloured or redrawn by a network that was trained for none of it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import maskdm
from maskdm.config import Config, Data, Hardware, Sampling, SchedulerName
from maskdm.data import BrokenImage, decode, to_model_range, to_uint8
from maskdm.engine import Machine, Ranks, autocast, this_machine
from maskdm.errors import UserError
from maskdm.evaluation import SelfNetwork
from maskdm.evaluation.clip_text import read_prompt
from maskdm.pictures import grid, to_pil
from maskdm.runs.directory import RunDirectory
from maskdm.runs.display import Display
from maskdm.runs.judge import choose_network
from maskdm.runs.sample import check_guidance, sampler
from maskdm.runs.sets import dataset_of, sets_of
from maskdm.runs.store import load_pipeline
from maskdm.runs.wishes import choose_labels, parse_label
from maskdm.sampling import make_scheduler, seeded
from maskdm.sampling.guidance import Cost, Method, Steered, with_strength
from maskdm.sampling.tasks import Colourise, Deblur, Fulfil, Inpaint, Linear, Palette, Task, Upscale

TaskName = Literal["inpaint", "outpaint", "upscale", "deblur", "colourise", "palette", "classify", "text", "sketch"]

UNSUITED = ("heun", "lms", "pndm")
"""Schedulers that mix the past into a step, and forget what a task put right."""

NEEDS_IMAGE = ("inpaint", "outpaint", "upscale", "deblur", "colourise", "sketch")


@dataclass(frozen=True)
class EditRequest:
    """What `maskdm edit` was asked for; None: as the run's own settings have it.

    simulate: the image is taken for the truth, spoilt as the task says, and the results are compared with it.
    """

    run: Path
    out: Path
    task: TaskName
    image: Path | None = None
    mask: Path | None = None
    factor: int = 2
    blur: float = 1.0
    colours: str | None = None
    target: str | None = None
    data: str | None = None
    prompt: str | None = None
    clip: Path | None = None
    strength: float | None = None
    method: Method = "cheap"
    simulate: bool = False
    num: int = 4
    steps: int | None = None
    scheduler: SchedulerName | None = None
    guidance: float | None = None
    labels: tuple[str, ...] = ()
    seed: int = 0


@dataclass(frozen=True)
class Asked:
    """A task, what was given for it as an image to be shown, the truth where it is known, and what to start from (a sketch)."""

    task: Task | None
    given: Tensor | None = None
    truth: Tensor | None = None
    start: Tensor | None = None


def edit(request: EditRequest, display: Display) -> str:
    """Draw the images, write them, a grid and edit.json; returns what to print. Raises UserError."""
    if request.num < 1:
        raise UserError("--num must be at least 1")
    pipeline, origin = load_pipeline(request.run)
    if pipeline.vae is not None:
        raise UserError(f"{request.run} draws latents, in which nothing of this is known; edit with a run on pixels")
    display.note(f"weights: {origin}")
    config, machine = RunDirectory(request.run).config(), this_machine(Hardware())
    settings = edit_settings(request, config)
    pipeline.scheduler = make_scheduler(settings.scheduler, pipeline.config["schedule"], pipeline.config["target"])
    asked = _asked(request, pipeline, config, machine, display)
    try:
        request.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to --out {request.out}: {error.strerror}") from None
    started = time.perf_counter()
    images, cost = draw_task(request, pipeline, settings, asked, machine)
    about = _about(request, asked, images, cost, time.perf_counter() - started)
    pixels = to_uint8(images).cpu().numpy()
    for number, image in enumerate(pixels):
        to_pil(image).save(request.out / f"edit-{number:06}.png")
    rows = [to_uint8(each[:1]).cpu().numpy() for each in (asked.given, asked.truth) if each is not None]
    grid(np.concatenate([*rows, pixels]), columns=len(rows) + len(pixels)).save(request.out / "grid.png")
    (request.out / "edit.json").write_text(json.dumps(about) + "\n")
    near = f", {about['psnr']:.1f} dB from the truth" if "psnr" in about else ""
    return f"{len(pixels)} images in {request.out}{near}; overview in {request.out / 'grid.png'}\n{json.dumps(about)}"


def edit_settings(request: EditRequest, config: Config) -> Sampling:
    """A run's settings with those that a request gives in their place. Raises UserError for those that do not go with tasks."""
    given = {key: getattr(request, key) for key in ("steps", "scheduler", "guidance") if getattr(request, key) is not None}
    settings = replace(config.sampling, **given)
    if settings.guide == "label" and settings.guidance != 1 and not request.labels:
        if request.guidance is not None:
            raise UserError(f"--guidance {request.guidance:g} leads to classes, and none is named; give --labels, or leave it out")
        settings = replace(settings, guidance=1.0)
    check_guidance(settings, config)
    if settings.scheduler in UNSUITED:
        raise UserError(f"scheduler {settings.scheduler} forgets what a task has put right; use ddim, dpm++, unipc or another")
    return settings


def draw_task(
    request: EditRequest,
    pipeline: maskdm.MaskDMPipeline,
    settings: Sampling,
    asked: Asked,
    machine: Machine,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> tuple[Tensor, Cost]:
    """Images [num, channels, height, width] in -1..1, and what they cost. on_step: called with the step's number and x_t."""
    labels = choose_labels(pipeline.config["class_names"], request.labels, request.num) if request.labels else None
    guidance = None
    if asked.task is not None:
        strength = 1.0 if request.strength is None else request.strength
        guidance = Steered(asked.task, with_strength(request.method, strength), torch.Generator().manual_seed(request.seed))
    with autocast(machine.device, machine.precision):
        drawn: Any = pipeline(
            request.num,
            None if labels is None else torch.tensor(labels),
            seeded(request.seed, range(request.num)),
            output_type="pt",
            image=None if asked.start is None else asked.start.expand(request.num, -1, -1, -1),
            strength=(0.6 if request.strength is None else request.strength) if asked.start is not None else 1.0,
            guidance=guidance,
            on_step=on_step,
            **sampler(settings),
        )
    images = drawn.images.float() * 2 - 1
    if isinstance(asked.task, Inpaint):  # to the last bit, whatever the last step did
        images = torch.where(asked.task.where, asked.task.known, images)
    if guidance is None:
        return images, Cost(evaluations=max(1, round(settings.steps * (0.6 if request.strength is None else request.strength))))
    return images, guidance.cost


def _about(request: EditRequest, asked: Asked, images: Tensor, cost: Cost, seconds: float) -> dict[str, Any]:
    """The line of JSON."""
    about: dict[str, Any] = {"task": request.task, "method": request.method if asked.task is not None else None, "num": len(images)}
    about |= {"evaluations": cost.evaluations, "backward": cost.backward, "seconds": round(seconds, 3)}
    if asked.task is not None:
        with torch.no_grad():
            about["loss"] = asked.task.loss(images).mean().item()
    if asked.truth is not None:
        about["psnr"] = float((10 * (4 / (images - asked.truth).square().flatten(1).mean(1).clamp(min=1e-10)).log10()).mean())
    return about


# --- the tasks ------------------------------------------------------------------------------------------------------


def _asked(request: EditRequest, pipeline: maskdm.MaskDMPipeline, config: Config, machine: Machine, display: Display) -> Asked:
    """The task, from files and numbers. Raises UserError for what is missing or does not fit."""
    if request.task not in get_args(TaskName):
        raise UserError(f"--task {request.task} is none of {', '.join(get_args(TaskName))}")
    if (request.image is None) == (request.task in NEEDS_IMAGE):
        raise UserError(f"task {request.task} {'needs an --image' if request.image is None else 'takes no --image'}")
    belong = (("mask", "inpaint"), ("colours", "palette"), ("target", "classify"), ("prompt", "text"), ("clip", "text"))
    for name, task in belong:
        value = getattr(request, name)
        if (value is not None) != (request.task == task):
            raise UserError(f"--{name} belongs to task {task}: " + ("give it" if value is None else f"leave it out of {request.task}"))
    if request.data is not None and request.task != "classify":
        raise UserError(f"--data belongs to task classify: leave it out of {request.task}")
    match request.task:
        case "palette":
            assert request.colours is not None
            return Asked(Palette(_colours(request.colours, config.data.channels).to(machine.device)))
        case "classify":
            return Asked(_classify(request, config, machine, display))
        case "text":
            assert request.prompt is not None and request.clip is not None
            return Asked(Fulfil(read_prompt(request.clip, request.prompt, machine.device).distance))
        case _:
            assert request.image is not None
            return _of_image(request, request.image, config.data, machine)


def _of_image(request: EditRequest, path: Path, data: Data, machine: Machine) -> Asked:
    def read(file: Path, size: tuple[int, int], channels: int = data.channels) -> Tensor:
        return _read(file, replace(data, image_size=size, channels=channels)).to(machine.device)

    height, width = data.image_size
    whole = read(path, (height, width))
    task: Linear
    match request.task:
        case "sketch":
            return Asked(None, whole, whole if request.simulate else None, whole)
        case "inpaint":
            assert request.mask is not None
            hidden = read(request.mask, (height, width), 1)[0, 0] > 0
            if not hidden.any() or hidden.all():
                colour = "white" if hidden.all() else "black"
                raise UserError(f"--mask {request.mask} is {colour} all over; paint white what is to be drawn")
            task = Inpaint(whole, ~hidden)
        case "outpaint":
            _whole_number(request.factor, (height, width))
            inner = (height // request.factor, width // request.factor)
            top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
            where, known = torch.zeros(height, width, dtype=torch.bool, device=whole.device), torch.zeros_like(whole)
            where[top : top + inner[0], left : left + inner[1]] = True
            known[..., top : top + inner[0], left : left + inner[1]] = read(path, inner)
            task = Inpaint(whole if request.simulate else known, where)
        case "upscale":
            _whole_number(request.factor, (height, width))
            small = (height // request.factor, width // request.factor)
            task = Upscale(F.avg_pool2d(whole, request.factor) if request.simulate else read(path, small), request.factor)
        case "deblur":
            if request.blur <= 0:
                raise UserError(f"--blur is {request.blur:g}; give its deviation in pixels, above 0")
            task = Deblur(whole, request.blur)
            if request.simulate:
                task.known = task.apply(whole)
        case _:
            if data.channels != 3:
                raise UserError(f"{request.run} draws gray images; task colourise needs a run in colour")
            task = Colourise(whole.mean(1, keepdim=True))
            task.known = task.apply(whole)
    given = task.known.expand_as(whole) if isinstance(task, Deblur | Colourise) else task.invert(task.known)
    return Asked(task, given, whole if request.simulate else None)


def _whole_number(factor: int, size: tuple[int, int]) -> None:
    if factor < 2 or any(side % factor for side in size):
        raise UserError(f"--factor is {factor}; give a whole number from 2 that divides {size[0]}x{size[1]}")


def _read(path: Path, data: Data) -> Tensor:
    """An image [1, channels, height, width] in -1..1. Raises UserError."""
    try:
        pixels, _ = decode(path, data)
    except BrokenImage as error:
        raise UserError(f"{path} cannot be read as an image: {error}") from error
    return to_model_range(torch.tensor(pixels.transpose(2, 0, 1))[None])


def _colours(text: str, channels: int) -> Tensor:
    """Colours [n, channels] in -1..1 from "#102030,#ffffff". Raises UserError."""
    found: list[list[int]] = []
    for part in text.split(","):
        digits = part.strip().removeprefix("#")
        if len(digits) != 6 or any(each not in "0123456789abcdefABCDEF" for each in digits):
            raise UserError(f"--colours is '{text}'; give colours as #rrggbb, with commas between")
        found.append([int(digits[i : i + 2], 16) for i in (0, 2, 4)])
    colours = torch.tensor(found) / 127.5 - 1
    return colours if channels == 3 else colours.mean(1, keepdim=True)


def _classify(request: EditRequest, config: Config, machine: Machine, display: Display) -> Task:
    """Towards a class, as a small network sees it that is trained on the run's images."""
    assert request.target is not None
    labelled = replace(config, data=replace(config.data, conditional=True))
    dataset = dataset_of(RunDirectory.existing(request.run), labelled, request.data, display)
    if not dataset.class_names:
        raise UserError("task classify needs images with classes, and those of this run have none")
    wanted = parse_label(list(dataset.class_names), request.target)
    training, heldout = sets_of(labelled, dataset)
    network = choose_network("self", training, heldout, 0, machine.device, Ranks(), display)
    assert isinstance(network, SelfNetwork)
    shares = torch.zeros(len(dataset.class_names), device=machine.device)
    for number, weight in wanted.items():
        shares[number] = weight
    encoder = network.encoder

    def loss(images: Tensor) -> Tensor:
        scores = encoder.head(encoder(encoder.prepare((images.float() + 1) * 127.5)))
        return F.cross_entropy(scores, shares.expand(len(images), -1), reduction="none")

    return Fulfil(loss)
