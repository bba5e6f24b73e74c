"""One arm of a comparison under one seed: trained a turn at a time, and on disk between its turns."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from maskdm.arithmetic import flops
from maskdm.config import Config, Mask, NoMask, Stage
from maskdm.data import Dataset, make_loader
from maskdm.draws import derive
from maskdm.engine import Machine, Switch, Trainer, checkpoint, make_optimizer
from maskdm.errors import UserError
from maskdm.evaluation.denoising import COST
from maskdm.models import build
from maskdm.recipes.arms import Arm
from maskdm.runs.compare_results import Record
from maskdm.runs.directory import write_text
from maskdm.runs.display import Display
from maskdm.runs.plan import stage_records
from maskdm.runs.train import initialize

PROBED = 32
"""Held-out images of each of a probe's two measurements."""


@dataclass(frozen=True)
class Field:
    """What all contestants share: images, the rows trained on, the machine."""

    dataset: Dataset
    rows: NDArray[np.int64]
    machine: Machine
    display: Display


def work_of(arm: Arm, base: Config) -> Callable[[Mask], float]:
    """FLOPs of an arm's training on an image, by mask: by the formula of our networks, or as another's were counted."""
    config = replace(base, model=arm.model)
    return (lambda mask: flops(config, mask, 1)) if arm.network is None else arm.network.flops.__getitem__


def all_work_of(arm: Arm, base: Config, classes: int) -> Callable[[Stage], float]:
    """FLOPs of training on an image in a stage, with its share of the optimizer's step, for which a network is built when first asked."""
    work, settings = work_of(arm, base), arm.config(base, 0, lambda stage, share: stage.budget)

    @cache
    def step() -> float:
        with torch.device("meta"):
            model = build(arm.model, base.data, classes) if arm.network is None else arm.network.build(classes)
        return make_optimizer(model, settings.optimizer, 1.0).flops

    return lambda stage: work(stage.mask) + step() / stage.batch


class Contestant:
    """An arm under a seed. What has been measured of it stands in `records` and `final`; its trainer is there inside `training` alone.

    So memory holds one trainer at a time, however many contestants there are, and none is computed in more pieces for another's sake.
    """

    def __init__(self, arm: Arm, config: Config, folder: Path, field: Field) -> None:
        self.arm, self.config, self.folder, self.field = arm, config, folder / f"seed-{config.seed}", field
        self._work = work_of(arm, config)
        self.records: list[Record] = []
        self.step = 0
        self.final: dict[str, Any] | None = None
        found = checkpoint.names(self.folder)
        if found:
            numbers = checkpoint.numbers(self.folder / found[-1])
            self.records, self.step = numbers["records"], numbers["progress"]["step"]
            self.final = _read(self.folder / "final.json")
            if self.final is not None and self.final["step"] != self.step:
                self.final = None  # of a checkpoint that is gone

    @property
    def diverged(self) -> bool:
        """Whether a measured loss is not a number."""
        return any(not math.isfinite(record["loss"]) for record in self.records)

    @contextmanager
    def training(self, rehearse: bool = True) -> Generator[Trainer]:
        """Its trainer, where it stood. With `rehearse` what a process's first steps cost is paid before the clock runs."""
        classes = list(self.field.dataset.class_names) if self.config.data.conditional else []
        torch.manual_seed(derive("weights", self.config.seed))
        elsewhere = self.arm.network
        model = build(self.config.model, self.config.data, len(classes)) if elsewhere is None else elsewhere.build(len(classes))
        found = checkpoint.names(self.folder)
        if not found:
            initialize(self.config, model, classes, self.field.display)
        loader = make_loader(self.field.dataset, self.field.rows, self.config.seed)
        trainer = Trainer(self.config, loader, model, self.field.machine.device, self.field.machine.precision)
        if found:
            saved = checkpoint.load(self.folder / found[-1])
            trainer.restore(saved.tensors, saved.numbers)
        if rehearse:
            trainer.rehearse()
        yield trainer

    def spent(self, trainer: Trainer) -> Record:
        """Seconds, steps, images and FLOPs so far, Muon's and those of a probe's measurements among them, and the pieces of a batch."""
        progress, stages = trainer.progress, self.config.stages
        images = [float(done.images) for done in progress.stages]
        for place, after in enumerate(stages[1:], 1):  # probes are steps of the stage after
            images[place] += progress.stages[place - 1].probed("taken") * after.batch
        work = sum(self._work(stage.mask) * number for stage, number in zip(stages, images, strict=True))
        work += trainer.optimizer.flops * sum(done.steps + done.probed("taken") for done in progress.stages)
        work += 2 * PROBED * COST * self._work(NoMask()) * sum(len(done.probes) for done in progress.stages)
        pieces = max(done.pieces for done in progress.stages)
        return {"seconds": progress.seconds, "steps": progress.step, "images": sum(images), "flops": work, "pieces": pieces}

    def advance(self, trainer: Trainer, unit: str, until: float, stop: list[str], loss: Callable[[Trainer], float]) -> bool:
        """Train until so much has been spent, or all stages have ended, or `stop` holds something; True unless stopped.

        `loss` is the held-out one, by which stages end whose budget is `auto`.
        """
        steps, switch = trainer.run(), Switch(trainer, lambda: loss(trainer))
        while self.spent(trainer)[unit] < until and not stop and not trainer.unsound:
            if next(steps, None) is None:
                return True
            switch.after()
        if trainer.progress.stage < len(self.config.stages):
            trainer.settle()
        return not stop

    def save(self, trainer: Trainer) -> None:
        """Keep the trainer and the records."""
        numbers = {**trainer.numbers(), "records": self.records}
        checkpoint.save(self.folder, f"step-{trainer.progress.step:08}", trainer.tensors(), numbers)
        checkpoint.rotate(self.folder, 1)
        self.step = trainer.progress.step

    def conclude(self, trainer: Trainer, measures: dict[str, Any], asked: dict[str, Any]) -> None:
        """Keep the final measures, what was `asked` for and what each stage did."""
        self.final = {**measures, "asked": asked, "step": self.step, "stages": self._stages(trainer)}
        write_text(self.folder / "final.json", json.dumps(self.final, indent=1))

    def _stages(self, trainer: Trainer) -> list[dict[str, Any]]:
        """What each stage did, with the arithmetic of the network that did it."""
        records = stage_records(self.config, trainer.progress)
        if self.arm.network is None:
            return records
        for record, stage in zip(records, self.config.stages, strict=True):
            each = self._work(stage.mask)
            record |= {"network": self.arm.name, "flops": each * record["images"], "flops_per_image": each}
            record["ideal_speedup"] = self._work(NoMask()) / each
        return records


def _read(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        found: dict[str, Any] = json.loads(file.read_text())
        return found if {"step", "asked", "stages"} <= set(found) else None
    except (OSError, ValueError):
        raise UserError(f"{file} cannot be read; delete it, and it is measured again") from None
