"""What an image is asked to fulfil while it is drawn: what is known of it, or a loss. Images are in -1..1."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

Images = Float[Tensor, "batch channels height width"]

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in the brightness (ITU-R BT.601)."""

LEAST = 0.03
"""Of what a blur leaves of a frequency, that can still be brought back."""

TURN = 0.1
"""Root mean square of a step along the gradient of a loss without a natural size, in units of the image's values."""


@runtime_checkable
class Task(Protocol):
    """What an image is asked to fulfil."""

    def loss(self, image: Images) -> Float[Tensor, " batch"]:
        """How far each image is from it, 0 where it is fulfilled; differentiable."""
        ...

    def step(self, image: Images) -> Images:
        """An image moved towards it, by its own gradient alone."""
        ...


class Linear:
    """A task of which A x = y is known. The loss is half the squared length of what A+ y - A+ A x would change."""

    def __init__(self, known: Tensor) -> None:
        self.known = known

    def apply(self, image: Images) -> Tensor:
        """A x."""
        raise NotImplementedError

    def invert(self, known: Tensor) -> Images:
        """A+ y, the pseudo-inverse."""
        raise NotImplementedError

    def missing(self, image: Images) -> Images:
        """A+ (y - A x): what has to be added for A x = y, and nothing else."""
        return self.invert(self.known - self.apply(image))

    def loss(self, image: Images) -> Float[Tensor, " batch"]:
        """Half its squared length."""
        return self.missing(image).square().flatten(1).sum(1) / 2

    def step(self, image: Images) -> Images:
        """The image in which A x = y, next to this one (arXiv 2212.00490, equation 13)."""
        return image + self.missing(image)


class Inpaint(Linear):
    """Pixels that are known. known: an image; where: [height, width] or [batch, 1, height, width], true where it is known."""

    def __init__(self, known: Images, where: Bool[Tensor, "*shape"]) -> None:
        self.where = where
        super().__init__(known * where)

    def apply(self, image: Images) -> Tensor:
        """The image with what is not known at 0."""
        return image * self.where

    def invert(self, known: Tensor) -> Images:
        """The same."""
        return known * self.where


class Upscale(Linear):
    """A larger image, whose means over squares of `factor` pixels are known: super-resolution. known: the small image."""

    def __init__(self, known: Images, factor: int) -> None:
        self.factor = factor
        super().__init__(known)

    def apply(self, image: Images) -> Tensor:
        """Means of squares."""
        return F.avg_pool2d(image, self.factor)

    def invert(self, known: Tensor) -> Images:
        """Each pixel as a square."""
        return known.repeat_interleave(self.factor, -1).repeat_interleave(self.factor, -2)


class Colourise(Linear):
    """The brightness of a colour image. known: [batch, 1, height, width]."""

    def apply(self, image: Images) -> Tensor:
        """The brightness."""
        return (image * self._weights(image)).sum(1, keepdim=True)

    def invert(self, known: Tensor) -> Images:
        """Spread over the channels."""
        weights = self._weights(known)
        return known * weights / weights.square().sum()

    def _weights(self, like: Tensor) -> Tensor:
        return torch.tensor(LUMA, device=like.device, dtype=like.dtype)[:, None, None]


class Deblur(Linear):
    """An image blurred by a Gaussian whose deviation is in pixels, going on at the other side of its borders. known: the blurred image."""

    def __init__(self, known: Images, deviation: float) -> None:
        height, width = known.shape[-2:]
        down, across = torch.fft.fftfreq(height, device=known.device), torch.fft.rfftfreq(width, device=known.device)
        self.passed = torch.exp(-2 * (torch.pi * deviation) ** 2 * (down[:, None].square() + across.square()))
        super().__init__(known)

    def apply(self, image: Images) -> Tensor:
        """The blurred image."""
        return self._filtered(image, self.passed)

    def invert(self, known: Tensor) -> Images:
        """Sharpened, where something is left of a frequency."""
        return self._filtered(known, torch.where(self.passed > LEAST, 1 / self.passed.clamp(min=LEAST), 0.0))

    def _filtered(self, image: Images, by: Tensor) -> Tensor:
        return torch.fft.irfft2(torch.fft.rfft2(image.float()) * by, s=image.shape[-2:]).to(image.dtype)


@dataclass(frozen=True)
class Palette:
    """Few colours. colours: [colours, channels]. The loss is half the squared distance of each pixel to the nearest of them."""

    colours: Float[Tensor, "colours channels"]

    def loss(self, image: Images) -> Float[Tensor, " batch"]:
        """Half the squared distance."""
        return (self._nearest(image) - image).square().flatten(1).sum(1) / 2

    def step(self, image: Images) -> Images:
        """Half of the way."""
        return torch.lerp(image, self._nearest(image), 0.5)

    def _nearest(self, image: Images) -> Images:
        pixels = image.movedim(1, -1)
        return self.colours[torch.cdist(pixels.flatten(0, 2), self.colours).argmin(1)].view_as(pixels).movedim(-1, 1)


@dataclass(frozen=True)
class Fulfil:
    """Any differentiable function of images that gives a loss for each [batch], such as a classifier's cross-entropy."""

    function: Callable[[Images], Tensor]

    def loss(self, image: Images) -> Float[Tensor, " batch"]:
        """What it gives."""
        return self.function(image)

    def step(self, image: Images) -> Images:
        """A step of a fixed length against the gradient; one that would raise the loss is no longer than Polyak's (1969) to a loss of 0.

        So it settles where the loss is fulfilled, and is not slowed where a step leads further, as that of a classifier does.
        """
        with torch.enable_grad():
            image = image.detach().requires_grad_()
            loss = self.function(image)
            (gradient,) = torch.autograd.grad(loss.sum(), image)
        image, loss = image.detach(), loss.detach()
        square = gradient.square().flatten(1).sum(1).clamp(min=1e-24)
        length = TURN * (gradient[0].numel() / square).sqrt()
        with torch.no_grad():
            worse = self.function(image - length[:, None, None, None] * gradient) > loss
        length = torch.where(worse, torch.minimum(length, loss.clamp(min=0) / square), length)
        return image - length[:, None, None, None] * gradient
