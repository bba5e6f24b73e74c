"""When a masked stage has done its part: `budget.auto`, by short probes of what whole images would bring.

The whole-image loss of a network that has seen masked images alone says little of what they taught it: most of it comes back within a
few steps on whole images. So the stage is asked by probes: at some moments the next stage is begun, apart, and its loss measured when
half of the probe and all of it is spent. Two laws are read off them, which held in runs of hundreds of steps (docs/experiments.md):
the loss after as many whole steps is a + b / t for t of masked training, and after the switch it falls by c for each e-fold of whole
training. Whole training makes up for a part of b, and `KEPT` of it is left. So the run ends at a + b / t - c log(T - t), T being what
both stages may cost, which is least where c t^2 = b (T - t).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from maskdm.config import Budget, Stage
from maskdm.engine.progress import StageProgress
from maskdm.engine.ranks import LONG
from maskdm.engine.trainer import Trainer

MARKS = (0.1, 0.25, 0.5)
"""Shares of the stage's budget spent on masked steps at which it is probed, unless it ends before."""

LENGTH = 0.02
"""Cost of a probe, as a share of the stage's budget, on which it is spent. The time of its measurements, which a stage that is not
probed has no use for, is spent on it too."""

LEAST = 32
"""Steps of a probe: in fewer the loss is that of the change, and not of what comes after it."""

UNPROBED = 0.5
"""Share of its budget at which a stage ends whose probes would be of fewer steps."""

KEPT = 0.45
"""Of what longer masked training is ahead by at the end of a probe, what it is ahead by at the end of the run: measured, 0.2 to 0.47."""

WARMUP = 10
"""Steps of a probe over which its learning rate rises, at most: its stage's own warm-up may be longer than the probe."""


@dataclass(frozen=True)
class Probe:
    """A probe's outcome: losses by its middle and its end, and the share of its budget at which the stage is to end, as known now."""

    half: float
    full: float
    until: float


class Switch:
    """Probes the stages of a trainer whose budget is `auto`, and ends them. `measure` gives the held-out loss of the averaged weights."""

    def __init__(self, trainer: Trainer, measure: Callable[[], float]) -> None:
        self.trainer, self.measure = trainer, measure

    def after(self) -> Probe | None:
        """What is due after a step: nothing, or a probe. It may have ended the stage, of which `ended` tells in its progress."""
        number, stages = self.trainer.progress.stage, self.trainer.config.stages
        if number + 1 >= len(stages) or not stages[number].budget.auto:
            return None
        stage, following, done = stages[number], stages[number + 1], self.trainer.progress.stages[number]
        at = replace(done, probes=[]).share(stage.budget)
        last = done.probes[-1]["at"] if done.probes else 0.0
        if done.ended or at < MARKS[0]:
            return None
        costs = Costs.of(stage, following, self.trainer.cost(following) / self.trainer.cost(stage))
        spent, found = done.share(stage.budget) - at, None
        tells = done.probes or LENGTH * done.steps / at / costs.steps >= LEAST
        until = best_end(done.probes, costs.total - spent) if tells else UNPROBED
        if tells and at < until and at >= next((mark for mark in MARKS if mark > last), math.inf):
            probe = self._probe(stage, following, costs)
            done.probes.append({"at": at} | probe)
            until = best_end(done.probes, costs.total - (done.share(stage.budget) - at))
            found = Probe(probe["half"], probe["full"], until)
        if at >= until or (found and done.share(stage.budget) >= 1):
            self.trainer.end_stage()
        return found

    def _probe(self, stage: Stage, following: Stage, costs: Costs) -> dict[str, float]:
        """Begin the next stage, measure, and forget it; costs in units of this stage's budget."""
        spent, quick, measuring = StageProgress(), replace(following, warmup=min(following.warmup, WARMUP)), 0.0
        losses, taken = list[float](), list[int]()
        with self.trainer.apart(following):
            for part in (LENGTH / 2, LENGTH):
                begun = spent.steps
                while spent.steps == begun or costs.used(spent, stage.budget) < part:
                    self.trainer.step(quick, spent, following.budget)
                taken.append(spent.steps)
                started = time.perf_counter()
                with self.trainer.ranks.at("evaluating", LONG):
                    losses.append(self.measure())
                measuring += time.perf_counter() - started
        found = {"half": losses[0], "full": losses[1], "middle": float(taken[0]), "taken": float(taken[1])}
        seconds = spent.seconds + self.trainer.ranks.from_first(measuring)  # the first's clock is all processes'
        return found | {"seconds": seconds, "images": spent.images * costs.images, "steps": spent.steps * costs.steps}


@dataclass(frozen=True)
class Costs:
    """What the next stage costs, in this one's: an image, a step; and what both may, in units of this one's budget."""

    images: float
    steps: float
    total: float

    @staticmethod
    def of(stage: Stage, following: Stage, images: float) -> Costs:
        """Of two stages, where an image of the second costs `images` of the first."""
        steps = images * following.batch / stage.batch
        ours, theirs = stage.budget, following.budget
        limits = ((ours.steps, theirs.steps, steps), (ours.images, theirs.images, images), (ours.minutes, theirs.minutes, 1.0))
        return Costs(images, steps, 1 + min(its / own * cost for own, its, cost in limits if own is not None and its is not None))

    def used(self, spent: StageProgress, budget: Budget) -> float:
        """Share of this stage's budget that steps of the next have used."""
        found = (
            (spent.steps * self.steps, budget.steps),
            (spent.images * self.images, budget.images),
            (spent.seconds / 60, budget.minutes),
        )
        return max(done / limit for done, limit in found if limit is not None)


def best_end(probes: Sequence[dict[str, float]], total: float) -> float:
    """Share of its budget at which a masked stage ends best, 0..1, when both may cost `total`; 1 until there are two probes.

    b is read off the last two, c off all but the first, whose loss falls faster than it will. Probes of an older version, which did not
    count their steps, tell nothing, nor do those whose losses are not numbers; where two are not to be had any more, it is `UNPROBED`.
    """
    known = [probe for probe in probes if "middle" in probe and math.isfinite(probe["half"]) and math.isfinite(probe["full"])]
    if len(known) < 2:
        return 1.0 if not probes or any(mark > probes[-1]["at"] for mark in MARKS) else UNPROBED
    before, last = known[-2:]
    masked = KEPT * (before["full"] - last["full"]) / (1 / before["at"] - 1 / last["at"])
    rates = [(each["half"] - each["full"]) / math.log(each["taken"] / each["middle"]) for each in known[1:]]
    if masked <= 0:
        return 0.0
    whole = max(0.0, sum(rates) / len(rates))
    return min(1.0, 2 * total / (1 + math.sqrt(1 + 4 * whole * total / masked)))  # where c t^2 = b (T - t)
