"""The evaluation during training: held-out and training loss, a kernel distance if asked for, the best weights, and when to stop."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from maskdm.config import Config, Denoise
from maskdm.data import Dataset
from maskdm.engine import Step, Trainer, autocast, sharding
from maskdm.evaluation import DenoisingLoss, Estimate, Extractor, ImageSet, denoising_loss, kernel_distance
from maskdm.evaluation.denoising import BATCH
from maskdm.runs.directory import RunDirectory
from maskdm.runs.display import Display
from maskdm.runs.judge import choose_network
from maskdm.runs.sets import CLASSES, image_set, images_and_labels, natural_labels
from maskdm.runs.store import cache_directory, save_best

MEASURED = 256
"""Held-out images, and training images, of the loss during training: enough to rank, few enough to cost little."""

REFERENCE = 2000

Rows = NDArray[np.int64]

Draw = Callable[[int, list[int] | None], NDArray[np.uint8]]
"""Samples [n, channels, height, width] of the averaged weights, of these classes if any."""


class Watch:
    """Measures the averaged weights and remembers the best."""

    def __init__(
        self,
        run: RunDirectory,
        config: Config,
        trainer: Trainer,
        dataset: Dataset,
        rows: tuple[Rows, Rows],
        draw: Draw,
    ) -> None:
        self.ranks = trainer.ranks
        self.run, self.config, self.trainer, self.dataset, self.draw = run, config, trainer, dataset, draw
        self.training, self.heldout = rows
        self._best, self._stage_best, self._since = math.inf, math.inf, 0
        self._judge = self._choose_judge() if config.evaluation.samples else None  # now: a missing file must not end a run later
        self._basis = self._what_counts()

    def state(self) -> dict[str, Any]:
        """What a resumed run must know."""
        best, stage_best = (None if math.isinf(value) else value for value in (self._best, self._stage_best))
        return {"basis": self._basis, "best": best, "stage_best": stage_best, "since": self._since}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue with a saved state; afresh where its figures rest on something else than those to come, and do not compare."""
        before = state.get("basis", {"measure": state.get("measure")})  # an older version kept only that
        if before != self._basis:
            self.run.log("afresh", self.trainer.progress.step, before=before, now=self._basis)
            return
        self._best, self._stage_best = (math.inf if state[key] is None else state[key] for key in ("best", "stage_best"))
        patience = self.config.evaluation.patience
        if patience is None or state["since"] < patience:  # else a fork lets the stage go on, and patience begins anew
            self._since = state["since"]

    def enter_stage(self) -> None:
        """Forget how long the stage before had not improved."""
        self._stage_best, self._since = math.inf, 0

    def evaluate(self, step: Step) -> dict[str, float]:
        """Measure, log, keep the best; returns the figures by name."""
        settings, found = self.config.evaluation, dict[str, float]()
        where = {"stage": step.stage.name, "seconds": step.seconds, "seen": step.images}
        if len(self.heldout):
            new, known = self._loss(self.heldout), self._loss(self.training)
            levels = {"levels": new.levels, "train_levels": known.levels}
            self.run.log("heldout", step.number, **where, loss=new.loss, train_loss=known.loss, **levels, images=len(new.errors))
            found |= {"heldout/loss": new.loss, "heldout/train_loss": known.loss}
            found |= {f"heldout/t={level['t']:.0f}": level["loss"] for level in new.levels}
        if self._judge is not None:
            drawn = self.draw(settings.samples, natural_labels(self.config, self.dataset, self.training, settings.samples))
            measured = self.ranks.from_first(self._distance(drawn, self._judge) if self.ranks.first else None)
            assert measured is not None  # the first has it
            distance, features = measured
            figures = {"kernel_distance": distance.value, "kernel_distance_interval": [distance.low, distance.high]}
            self.run.log("evaluate", step.number, **where, **figures, num_samples=settings.samples, features=features)
            found["evaluate/kernel_distance"] = distance.value
        value = found.get("heldout/loss" if settings.measure == "heldout-loss" else "evaluate/kernel_distance")
        blind = settings.measure == "heldout-loss" and not isinstance(step.stage.lesson, Denoise)  # it is of images, and the lesson is not
        if value is not None and not blind:
            self._compare(step, value)
        return found

    def loss(self) -> float:
        """The held-out loss alone, nothing written."""
        return self._loss(self.heldout).loss

    def gives_up(self, step: Step) -> bool:
        """Whether the stage has gone without a better evaluation for as long as it may."""
        patience = self.config.evaluation.patience
        if patience is None or self._since < patience:
            return False
        measure = self.config.evaluation.measure
        self.run.log("early_stop", step.number, stage=step.stage.name, measure=measure, best=self._stage_best, since=self._since)
        return True

    def _compare(self, step: Step, value: float) -> None:
        measure = self.config.evaluation.measure
        if not math.isfinite(value):
            self.run.log("not_finite", step.number, stage=step.stage.name, measure=measure, value=str(value))
            value = math.inf  # no better than any other; a NaN would be the best there is from now on
        self._since = 0 if value < self._stage_best else self._since + 1
        self._stage_best = min(value, self._stage_best)
        if value >= self._best:
            return
        averaged = sharding.whole(self.trainer.tensors()["average"])
        if self.run.attempt("the best weights", lambda: save_best(self.run, self.trainer, averaged, measure, value)):
            self._best = value
            self.run.log("best", step.number, stage=step.stage.name, measure=measure, value=value)

    def _loss(self, rows: Rows) -> DenoisingLoss:
        """Of an even part of the rows, in batches that the processes share."""
        some = rows[np.linspace(0, len(rows) - 1, min(MEASURED, len(rows))).astype(np.int64)]
        errors: dict[int, Tensor] = {}
        starts, world = range(0, len(some), BATCH), self.ranks.world
        for turn in range(0, len(starts), world):  # as many in each, and some twice: a network that is cut computes in step
            start = starts[min(turn + self.ranks.rank, len(starts) - 1)]
            pixels, labels = images_and_labels(self.config, self.dataset, some[start : start + BATCH], self.trainer.device)
            with autocast(self.trainer.device, self.trainer.precision):
                model, diffusion = self.trainer.average.model, self.config.diffusion
                errors[start] = denoising_loss(model, diffusion, pixels, labels, first=start).errors
        everywhere = {start: each for part in self.ranks.gather(errors) for start, each in part.items()}
        return DenoisingLoss(torch.cat([everywhere[start] for start in sorted(everywhere)]))

    def _distance(self, drawn: NDArray[np.uint8], judge: tuple[Extractor, Tensor]) -> tuple[Estimate, str]:
        extractor, real = judge
        fake = extractor.network.features(torch.from_numpy(drawn))
        return kernel_distance(fake, real).estimate, extractor.network.name

    def _what_counts(self) -> dict[str, Any]:
        """The measure that decides, and all that a fork can change of what its figures rest on; plain values."""
        settings = self.config.evaluation
        if settings.measure == "heldout-loss" or self._judge is None:
            return {"measure": settings.measure}
        network, sampling = self._judge[0].network, asdict(self.config.sampling)
        del sampling["num"]  # of the grids
        about = {"features": network.hash, "preprocessing": network.preprocessing, "classes": CLASSES}
        return {"measure": settings.measure, "samples": settings.samples, **about, "sampling": sampling}

    def _choose_judge(self) -> tuple[Extractor, Tensor]:
        training = image_set(self.dataset, self.training, self.config.data.conditional, whole=False)
        heldout: ImageSet | None = None
        if len(self.heldout):
            heldout = image_set(self.dataset, self.heldout, self.config.data.conditional, whole=False)
        settings = self.config.evaluation
        network = choose_network(settings.features, training, heldout, 0, self.trainer.device, self.ranks, Display(quiet=True))
        extractor = Extractor(network, cache_directory() / "features", self.ranks)
        return extractor, extractor.features(training.part(training.places(REFERENCE)))
