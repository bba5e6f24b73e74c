"""What a student learns from a teacher: guidance in one evaluation, two sampling steps in one (docs/distillation.md), on one screen.

All of it is of patches [batch, kept, features], so that a masked stage differs by the patches alone. Errors are of x0, weighted by the
truncated signal-to-noise ratio (arXiv 2202.00512, section 4).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from maskdm.config import Config, Halve, Lesson, Shortcut
from maskdm.data.loader import flip, to_model_range
from maskdm.diffusion import NUM_STEPS, Schedule, Times, add_noise, alpha_sigma, convert, drop_labels
from maskdm.draws import Draws
from maskdm.masking import Kept, take
from maskdm.models import Denoiser, patchify
from maskdm.objective import Loss

CLEAN = -1.0
"""The time of an image without noise: one step below the last that is trained, as diffusers' DDIM counts."""

MOST_SNR = 1000.0
"""Weight of an error of x0 at most: below this noise everything is known in any case."""

TURNS = 4
"""Of as many sequences one learns two steps in one in the lesson `shortcut`, and the others the teacher."""

UNGUIDED = 1 / 8
"""Share of sequences whose guidance scale is 1: the end of most ranges, and what the student is at first."""

Predict = Callable[[Tensor, Times], Tensor]
"""x0 from x_t and t."""


@dataclass(frozen=True)
class Asked:
    """What a network is asked: noised patches, times, labels, the patches' places, guidance scales and numbers of steps [batch] or one."""

    x: Float[Tensor, "batch kept features"]
    t: Times
    labels: Int[Tensor, " batch"] | None
    kept: Kept | None
    guidance: Tensor | float
    steps: Tensor | float | None

    def some(self, rows: Tensor) -> Asked:
        """Of some of the batch."""
        parts = {name: value[rows] if isinstance(value, Tensor) else value for name, value in vars(self).items()}
        return Asked(**parts)


def level(schedule: Schedule, t: Times, like: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma at times t, CLEAN among them, shaped to multiply `like`."""
    alpha, sigma = alpha_sigma(schedule, t.clamp(min=0))
    clean, shape = t < 0, (-1, *[1] * (like.ndim - 1))
    return torch.where(clean, 1.0, alpha).reshape(shape), torch.where(clean, 0.0, sigma).reshape(shape)


def sampling_time(number: Tensor, steps: Tensor | float) -> Times:
    """The time of a step, counted from 0, of so many in all: diffusers' "trailing" spacing. CLEAN after the last."""
    return (NUM_STEPS - number.double() * NUM_STEPS / steps).round().float() - 1


def ddim_step(schedule: Schedule, x0: Tensor, x: Tensor, t: Times, to: Times) -> Tensor:
    """From x at t to another time, along the line through the predicted image and noise (arXiv 2010.02502, equation 12, eta 0)."""
    (alpha, sigma), (alpha_to, sigma_to) = level(schedule, t, x), level(schedule, to, x)
    return alpha_to * x0 + sigma_to * (x - alpha * x0) / sigma


def halving_target(schedule: Schedule, predict: Predict, x: Tensor, t: Times, middle: Times, end: Times) -> Tensor:
    """The image that a network must predict at t for one DDIM step to land where two of `predict` do (arXiv 2202.00512, algorithm 2)."""
    there = ddim_step(schedule, predict(x, t), x, t, middle)
    there = ddim_step(schedule, predict(there, middle), there, middle, end)
    (alpha, sigma), (alpha_end, sigma_end) = level(schedule, t, x), level(schedule, end, x)
    ratio = sigma_end / sigma
    return (there - ratio * x) / (alpha_end - ratio * alpha)


def image_of(network: Any, config: Config, asked: Asked) -> Tensor:
    """The network's answer as x0."""
    diffusion = config.diffusion
    output = network(asked.x, asked.t, asked.labels, asked.kept, guidance=asked.guidance, steps=asked.steps).sample
    return convert(diffusion.schedule, diffusion.target, output.float(), asked.x, asked.t).x0


def in_range(config: Config, image: Tensor) -> Tensor:
    """A predicted image as sampling takes it: pixels end at -1 and 1, latents nowhere."""
    return image if config.data.autoencoder is not None else image.clamp(-1, 1)


def seen_error(config: Config, image: Tensor, wanted: Tensor) -> Tensor:
    """What of the difference sampling sees: an answer beyond the range is as good as its end.

    Much of the error of a large guidance scale lies there, and so does some of the teacher's own answer.
    """
    wanted = in_range(config, wanted)
    return torch.where(in_range(config, image) == wanted, torch.zeros_like(image), image - wanted)


def scales(config: Config, drawn: Float[Tensor, " batch"]) -> Tensor:
    """Guidance scales from values in [0, 1): 1 for the share UNGUIDED, uniform in the dial's range for the others."""
    low, high = config.model.dial or (1.0, 1.0)
    return torch.where(drawn < UNGUIDED, 1.0, low + (high - low) * (drawn - UNGUIDED) / (1 - UNGUIDED))


def guided(teacher: Denoiser, config: Config, asked: Asked) -> Tensor:
    """The teacher's x0 under classifier-free guidance (arXiv 2207.12598): linear in the output, so as well of x0."""
    plain = replace(asked, guidance=1.0, steps=None)
    conditional = image_of(teacher, config, plain)
    if config.model.dial is None or asked.labels is None:
        return conditional
    unconditional = image_of(teacher, config, replace(plain, labels=torch.full_like(asked.labels, teacher.num_classes)))
    scale = torch.as_tensor(asked.guidance, device=conditional.device).reshape(-1, 1, 1)
    return unconditional + scale * (conditional - unconditional)


def two_steps(teacher: Denoiser, config: Config, asked: Asked, number: Tensor, steps: Tensor) -> Tensor:
    """What a network sampled in `steps` must answer at its step `number` for two of the teacher's, which knows there are twice as many.

    The teacher's images are kept in range, as sampling does.
    """
    start, middle, end = (sampling_time(2 * number + part, 2 * steps) for part in range(3))

    def predict(x: Tensor, t: Times) -> Tensor:
        return in_range(config, image_of(teacher, config, replace(asked, x=x, t=t, steps=2 * steps)))

    return halving_target(config.diffusion.schedule, predict, asked.x, start, middle, end)


@dataclass(frozen=True)
class Places:
    """Which sequences of a piece learn two steps in one, their numbers of steps, and which of the steps; and the others."""

    rows: Int[Tensor, " own"]
    steps: Float[Tensor, " own"]
    number: Float[Tensor, " own"]
    rest: Int[Tensor, " rest"]


def places(config: Config, lesson: Lesson, drawn: Float[Tensor, "batch 3"], first: int) -> Places:
    """Of a piece of the batch that begins with its sequence `first`. drawn: `draw_lesson`."""
    every = torch.arange(first, first + len(drawn), device=drawn.device)
    match lesson:
        case Halve(steps=count):
            rows, rest, steps = every - first, every[:0], torch.full_like(drawn[:, 0], count)
        case Shortcut(steps=end):
            own = range(-first % TURNS, len(drawn), TURNS)
            others = [row for row in range(len(drawn)) if row not in own]
            rows, rest = (torch.tensor([*each], dtype=torch.int64, device=drawn.device) for each in (own, others))
            halvings = round(math.log2(config.model.shortcuts / end))
            steps = end * 2 ** (drawn[rows, 2] * halvings).floor()
        case _:
            rows, rest, steps = every[:0], every - first, drawn[:0, 0]
    return Places(rows, steps, (drawn[rows, 1] * steps).floor(), rest)


def distillation_loss(
    config: Config,
    lesson: Lesson,
    networks: tuple[Any, Denoiser, Denoiser],
    images: UInt8[Tensor, "batch channels height width"],
    labels: Int[Tensor, " batch"] | None,
    draws: Draws,
    drawn: Float[Tensor, "batch 3"],
    first: int,
) -> Loss:
    """The student's error in the lesson guided, halve or shortcut, over the kept patches.

    networks: the student as it is run, the teacher, and the student's average, which teaches two steps in one in the lesson shortcut.
    drawn: `draw_lesson`. first: the place of the first sequence in the whole batch.
    """
    student, teacher, average = networks
    x0 = to_model_range(take(patchify(flip(images, draws.flip), teacher.patch_size), draws.kept))
    if labels is not None:
        labels = drop_labels(labels, draws.drop, null=teacher.num_classes)
    here = places(config, lesson, drawn, first)
    t = draws.t.index_copy(0, here.rows, sampling_time(here.number, here.steps))
    steps = torch.full_like(t, max(1, config.model.shortcuts)).index_copy(0, here.rows, here.steps)
    noised = add_noise(config.diffusion, x0, draws.noise, t).x_t
    asked = Asked(noised, t, labels, draws.kept, scales(config, drawn[:, 0]), steps)
    wanted = torch.empty_like(asked.x)
    with torch.no_grad():
        if len(here.rows):
            of_steps = average if isinstance(lesson, Shortcut) else teacher
            wanted[here.rows] = two_steps(of_steps, config, asked.some(here.rows), here.number, here.steps)
        if len(here.rest):
            wanted[here.rest] = guided(teacher, config, asked.some(here.rest))
    alpha, sigma = alpha_sigma(config.diffusion.schedule, t)
    weight = (alpha / sigma.clamp(min=1e-4)).square().clamp(1, MOST_SNR)
    errors = seen_error(config, image_of(student, config, asked), wanted).square().mean(dim=(1, 2))
    return Loss((weight * errors).mean(), errors.detach(), t)
