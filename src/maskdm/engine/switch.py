"""When a masked stage has done its part: `budget.auto`, by short probes of what whole images would bring.

The whole-image loss of a network that has seen masked images alone says little of what they taught it: most of it comes back within a
few steps on whole images. So the stage is asked by probes: at some moments the next stage is begun, apart, and its loss measured when
half of the probe and all of it is spent. As long as the probes' losses fall faster from one to the next, per cost of masked training
between them, than within the latest probe, per cost of its second half, masked training pays.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from maskdm.arithmetic import cost_ratio
from maskdm.config import Budget, Stage
from maskdm.engine.progress import StageProgress
from maskdm.engine.trainer import Trainer

MARKS = (0.1, 0.2, 0.35, 0.5, 0.7)
"""Shares of the stage's budget spent on masked steps at which it is probed: the best fixed splits are early ones (docs/experiments.md)."""

LENGTH = 0.02
"""Cost of a probe, as a share of the stage's budget, on which it is spent: 10 % if it is never cut short. The time of its
measurements, which a stage that is not probed has no use for, is spent on it too."""

WARMUP = 10
"""Steps of a probe over which its learning rate rises, at most: its stage's own warm-up may be longer than the probe."""


@dataclass(frozen=True)
class Probe:
    """A probe's outcome: losses by its middle and its end, and whether it ends the stage."""

    half: float
    full: float
    ends: bool


class Switch:
    """Probes the stages of a trainer whose budget is `auto`, and ends them. `measure` gives the held-out loss of the averaged weights."""

    def __init__(self, trainer: Trainer, measure: Callable[[], float]) -> None:
        self.trainer, self.measure = trainer, measure

    def after(self) -> Probe | None:
        """What is due after a step: None, or a probe, which may have ended the stage."""
        number = self.trainer.progress.stage
        if number + 1 >= len(self.trainer.config.stages) or not self.trainer.config.stages[number].budget.auto:
            return None
        stage, done = self.trainer.config.stages[number], self.trainer.progress.stages[number]
        at = replace(done, probes=[]).share(stage.budget)
        last = done.probes[-1]["at"] if done.probes else 0.0
        if done.ended or at < next((mark for mark in MARKS if mark > last), math.inf):
            return None
        done.probes.append({"at": at} | self._probe(stage, self.trainer.config.stages[number + 1]))
        ends = not pays(done.probes) or done.share(stage.budget) >= 1
        if ends:
            self.trainer.end_stage()
        return Probe(done.probes[-1]["half"], done.probes[-1]["full"], ends)

    def _probe(self, stage: Stage, following: Stage) -> dict[str, float]:
        """Begin the next stage, measure, and forget it; costs in units of this stage's budget."""
        ratio = cost_ratio(self.trainer.config, following.mask, stage.mask)
        steps = ratio * following.batch / stage.batch
        spent, quick, measuring = StageProgress(), replace(following, warmup=min(following.warmup, WARMUP)), 0.0
        losses, costs = list[float](), list[float]()
        with self.trainer.apart(following):
            for part in (LENGTH / 2, LENGTH):
                begun = spent.steps
                while spent.steps == begun or used(spent, stage.budget, ratio, steps) < part:
                    self.trainer.step(quick, spent, following.budget)
                costs.append(used(spent, stage.budget, ratio, steps))
                started = time.perf_counter()
                losses.append(self.measure())
                measuring += time.perf_counter() - started
        found = {"half": losses[0], "full": losses[1], "second": costs[1] - costs[0], "taken": float(spent.steps)}
        seconds = spent.seconds + self.trainer.ranks.from_first(measuring)  # the first's clock is all processes'
        return found | {"seconds": seconds, "images": spent.images * ratio, "steps": spent.steps * steps}


def used(spent: StageProgress, budget: Budget, ratio: float, steps: float) -> float:
    """Share of a budget that a probe has used, whose images cost `ratio` and whose steps cost `steps` of the stage's."""
    found = ((spent.steps * steps, budget.steps), (spent.images * ratio, budget.images), (spent.seconds / 60, budget.minutes))
    return max(done / limit for done, limit in found if limit is not None)


def pays(probes: Sequence[dict[str, float]]) -> bool:
    """Whether masked training between the last two probes brought more, per cost, than the second half of the last one, of cost `second`.

    It does as long as there are not two probes of one kind: those of an older version were longer.
    """
    if len(probes) < 2 or "second" not in probes[-2]:
        return True
    before, last = probes[-2], probes[-1]
    masked = (before["full"] - last["full"]) / (last["at"] - before["at"])
    whole = (last["half"] - last["full"]) / last["second"]
    return masked >= whole
