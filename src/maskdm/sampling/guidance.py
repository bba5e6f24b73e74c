"""Training-free guidance: images drawn by a network that was trained for none of it, so that they fulfil a task.

At each step the predicted image is moved towards the task: by the gradient through the network (arXiv 2209.14687, 2302.07121; of a linear
task PiGDM's), by the task's own step alone, or by both; steps may be repeated after noise was put back (self-recurrence, 2302.07121,
algorithm 1). What makes it cheap (2312.13253): a correction kept for some evaluations, noise levels at which it matters alone, no pass
back through the network, repeats only while they help.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from maskdm.diffusion import Prediction, Schedule, alpha_sigma, convert
from maskdm.errors import UserError
from maskdm.sampling.tasks import Linear, Task

Predict = Callable[[Tensor], Prediction]
"""What the network, guided by classes or not, predicts at x_t; differentiable where gradients are asked for."""


@dataclass(frozen=True)
class Moment:
    """A step: its number, its time, the next step's (None: it is the last), the noise schedule, and whether images end at -1 and 1."""

    number: int
    t: Tensor
    after: Tensor | None
    schedule: Schedule
    clip: bool = True

    def in_range(self, image: Tensor) -> Tensor:
        """A predicted image as the scheduler gets it."""
        return image.clamp(-1, 1) if self.clip else image

    def scales(self, t: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """alpha and sigma, of this step's time or another; of a clean image before the first."""
        if t is None:
            t = self.t
        alpha, sigma = alpha_sigma(self.schedule, t.float().reshape(1))
        return alpha, sigma


@runtime_checkable
class Guidance(Protocol):
    """Called at each step of sampling, between the network and the scheduler."""

    def __call__(self, moment: Moment, x: Tensor, predict: Predict) -> tuple[Tensor, Prediction]:
        """x_t (as it is, or noised anew) and what the scheduler is to take for the network's prediction at it."""
        ...


@dataclass(frozen=True)
class Steering:
    """How a task leads.

    through: by the gradient through the network, too. steps: of the task's own on the predicted image. strength: of both. repeats: times
    that a step is taken; falling: no more of them once one lowers the loss by less than a tenth. window: noise levels (sigma / alpha) at
    which it acts; fooled: below this one a task that is not linear does not, for what it changes there it alone sees. reuse: evaluations
    for which the gradient through the network is kept (without one, what the task's own steps changed), this one counted. variance: of an
    image's values, which says how far the gradient goes.
    """

    through: bool = True
    steps: int = 1
    strength: float = 1.0
    repeats: int = 1
    falling: bool = False
    window: tuple[float, float] = (0.0, float("inf"))
    fooled: float = 0.0
    reuse: int = 1
    variance: float = 1.0

    def __post_init__(self) -> None:
        for name, least in (("steps", 0), ("repeats", 1), ("reuse", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if self.steps == 0 and not self.through:
            raise UserError("neither the gradient through the network nor a step of the task's own is taken; ask for one")
        for name in ("strength", "variance"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"{name} is {getattr(self, name):g}; it must be above 0")
        if not self.window[0] < self.window[1]:
            raise UserError(f"window is {self.window[0]:g} to {self.window[1]:g}; give two noise levels, the lower one first")


Method = Literal["full", "cheap", "project"]

METHODS: dict[Method, Steering] = {
    "full": Steering(through=True, steps=2, repeats=4),
    "cheap": Steering(through=True, steps=3, repeats=2, window=(0.02, 20.0), fooled=0.1, reuse=4),
    "project": Steering(through=False, steps=1),
}
"""full: universal guidance; cheap: with a pass back through the network in every fourth evaluation (docs/editing.md); project: of a linear
task the null-space method (arXiv 2212.00490)."""


@dataclass
class Cost:
    """Evaluations of the network, each of a batch and twice the work under guidance by classes; passes back through it."""

    evaluations: int = 0
    backward: int = 0


@dataclass
class Steered:
    """The guidance that fulfils a task. `generator` draws the noise of repeats."""

    task: Task
    steering: Steering
    generator: torch.Generator | None = None
    cost: Cost = field(default_factory=Cost)
    _kept: Tensor | None = None
    _left: int = 0

    def __call__(self, moment: Moment, x: Tensor, predict: Predict) -> tuple[Tensor, Prediction]:
        """As `Guidance` has it."""
        if moment.number == 0:  # of other images, it may be, than those of the call before
            self._kept, self._left = None, 0
        alpha, sigma = moment.scales()
        low, high = self.steering.window
        if not isinstance(self.task, Linear):
            low = max(low, self.steering.fooled)
        if not low <= float(sigma / alpha.clamp(min=1e-8)) <= high:
            return x, self._predict(x, predict)
        loss: float | None = None
        for again in range(self.steering.repeats):
            prediction, found = self._corrected(moment, x, predict)
            last = again + 1 == self.steering.repeats or moment.after is None
            if self.steering.falling and not last:
                before, loss = loss, float(self.task.loss(found).mean())
                last = before is not None and loss > 0.9 * before
            if last:
                return x, prediction
            x = self._again(moment, x, prediction)
        raise AssertionError("repeats is at least 1")

    def _predict(self, x: Tensor, predict: Predict) -> Prediction:
        self.cost.evaluations += 1
        return predict(x)

    def _corrected(self, moment: Moment, x: Tensor, predict: Predict) -> tuple[Prediction, Tensor]:
        """The prediction moved towards the task, and the image that the network predicted."""
        through = self.steering.through
        if self._left > 0 and self._kept is not None:
            self._left -= 1
            prediction = self._predict(x, predict)
            moved = prediction.x0 + self._kept
            return self._at(moment, x, self._stepped(moment, moved) if through else moved), prediction.x0
        if through:
            prediction, moved = self._through(moment, x, predict)
        else:
            prediction = self._predict(x, predict)
            moved = prediction.x0
        led = self._stepped(moment, moved)
        self._kept, self._left = (moved if through else led) - prediction.x0, self.steering.reuse - 1
        return self._at(moment, x, led), prediction.x0

    def _stepped(self, moment: Moment, image: Tensor) -> Tensor:
        """The task's own steps, from an image; of a linear task in turns with the range, so that the image nears what is in both."""
        for _ in range(self.steering.steps):
            image = moment.in_range(torch.lerp(image, self.task.step(image), self.steering.strength))
        return image

    def _through(self, moment: Moment, x: Tensor, predict: Predict) -> tuple[Prediction, Tensor]:
        """The gradient of the loss with respect to x_t, as a change of the predicted image.

        By Tweedie's formula a score g changes it by sigma^2 / alpha g; the score of what is known is the gradient over r^2, the variance
        that an image of variance v has left at x_t: v sigma^2 / (v alpha^2 + sigma^2) (PiGDM, section 3.2). So the factor is
        (alpha^2 + sigma^2 / v) / alpha.
        """
        alpha, sigma = moment.scales()
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            prediction = self._predict(x, predict)
            loss = self.task.loss(prediction.x0)
            (gradient,) = torch.autograd.grad(loss.sum(), x)
        self.cost.backward += 1
        found = Prediction(prediction.x0.detach(), prediction.eps.detach(), prediction.v.detach())
        factor = self.steering.strength * (alpha.square() + sigma.square() / self.steering.variance) / alpha.clamp(min=1e-3)
        return found, found.x0 - factor[:, None, None, None].to(gradient) * gradient

    def _at(self, moment: Moment, x: Tensor, image: Tensor) -> Prediction:
        return convert(moment.schedule, "x0", moment.in_range(image), x, moment.t.to(x).expand(len(x)))

    def _again(self, moment: Moment, x: Tensor, prediction: Prediction) -> Tensor:
        """x_t anew: a step to the next time, and noise back (arXiv 2302.07121, algorithm 1)."""
        assert moment.after is not None
        (alpha, sigma), (alpha_after, sigma_after) = moment.scales(), moment.scales(moment.after)
        lower = alpha_after * prediction.x0 + sigma_after * prediction.eps
        back = alpha / alpha_after
        noise = torch.randn(x.shape, generator=self.generator, dtype=x.dtype).to(x.device)
        return (back * lower + (sigma.square() - (back * sigma_after).square()).clamp(min=0).sqrt() * noise).to(x.dtype)


def with_strength(method: Method, strength: float) -> Steering:
    """A method by its name, as strong as asked."""
    return replace(METHODS[method], strength=strength)
