"""The networks that a demo shows: of each run the newest, and those at the ends of its stages."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import maskdm
from maskdm.config import Config, Hardware
from maskdm.engine import checkpoint, this_machine
from maskdm.errors import UserError, nearest
from maskdm.models import build
from maskdm.runs.directory import RunDirectory
from maskdm.runs.store import class_names, make_pipeline, whole_weights
from maskdm.sampling import offered

KEPT = 3
"""Networks that stay in memory."""


@dataclass(frozen=True)
class Model:
    """A network by its name; checkpoint None: the newest that is whole, so that a run that trains is followed."""

    name: str
    run: Path
    checkpoint: str | None = None


@dataclass(frozen=True)
class Opened:
    """A network, ready to draw."""

    model: Model
    pipeline: maskdm.MaskDMPipeline
    config: Config
    origin: str


@dataclass(frozen=True)
class Traits:
    """What a network's controls are set to: its classes, the schedulers that fit, and its run's own way of sampling."""

    classes: tuple[str, ...]
    schedulers: tuple[str, ...]
    scheduler: str
    steps: int
    guidance: float
    guided: bool
    latent: bool


class Shelf:
    """All networks of some runs. Raises UserError where one is no run, or has nothing to show yet."""

    def __init__(self, runs: Sequence[Path]) -> None:
        self._runs: dict[str, Path] = {}
        self._opened: OrderedDict[tuple[Path, str, int], Opened] = OrderedDict()
        paths = list({path.resolve(): path for path in runs}.values())
        plain = [path.resolve().name for path in paths]
        for path, name in zip(paths, plain, strict=True):
            run = RunDirectory.existing(path)
            run.config()
            if not checkpoint.names(run.checkpoints):
                raise UserError(f"{path} has no checkpoint yet; train it first")
            self._runs[name if plain.count(name) == 1 else str(path)] = path

    def models(self) -> list[Model]:
        """The newest of each run, then the ends of stages; a run that trains may have more when asked again."""
        found: list[Model] = [Model(name, path) for name, path in self._runs.items()]
        for name, path in self._runs.items():
            known = checkpoint.names(RunDirectory(path).checkpoints)
            found += [Model(f"{name}, end of {_stage(each)}", path, each) for each in known[:-1] if _stage(each)]
        return found

    def find(self, name: str | None) -> Model:
        """A network by its name; None: the first. Raises UserError."""
        known = self.models()
        if name is None:
            return known[0]
        for model in known:
            if model.name == name:
                return model
        names = [model.name for model in known]
        raise UserError(f"'{name[:100]}' is no model here, which are {'; '.join(names)}{nearest(name[:100], names)}")

    def run(self, name: str | None) -> RunDirectory:
        """The run of a network. Raises UserError."""
        return RunDirectory.existing(self.find(name).run)

    def traits(self, name: str | None) -> Traits:
        """What can be set for a network; nothing is loaded. Raises UserError."""
        run = self.run(name)
        config, classes = run.config(), tuple(class_names(run.path))
        own = config.sampling
        guided = config.model.dial is not None or (config.diffusion.label_drop > 0 and (bool(classes) or own.guide == "path"))
        schedulers = offered(config.diffusion.schedule)
        latent = config.data.autoencoder is not None
        return Traits(classes, tuple(schedulers), own.scheduler, own.steps, own.guidance, guided, latent)

    def open(self, name: str | None) -> Opened:
        """A network with its weights, averaged; kept for the next time. Raises UserError."""
        model = self.find(name)
        run = RunDirectory.existing(model.run)
        wrong: list[checkpoint.Damaged] = []
        for each in [model.checkpoint] if model.checkpoint else list(reversed(checkpoint.names(run.checkpoints))):
            try:
                return self._kept(model, run, each)
            except checkpoint.Damaged as error:  # also one that training has rotated away meanwhile
                wrong.append(error)
        raise wrong[0] if wrong else UserError(f"{model.run} has no checkpoint any more")

    def _kept(self, model: Model, run: RunDirectory, name: str) -> Opened:
        manifest = run.checkpoints / name / "manifest.json"
        key = (model.run, name, manifest.stat().st_mtime_ns if manifest.is_file() else 0)
        if key not in self._opened:
            self._opened[key] = _load(model, run, name)
            while len(self._opened) > KEPT:
                self._opened.popitem(last=False)
        self._opened.move_to_end(key)
        return self._opened[key]


def _stage(name: str) -> str:
    """The stage that a checkpoint's name says it has ended; nothing for one on the way."""
    return name.partition("-")[2].partition("-")[2]


def _load(model: Model, run: RunDirectory, name: str) -> Opened:
    saved = checkpoint.load(run.checkpoints / name)
    config, classes, machine = run.config(), class_names(run.path), this_machine(Hardware())
    network = build(config.model, config.data, len(classes))
    network.load_state_dict(whole_weights(run, saved.tensors["average"]))
    torch.set_num_threads(machine.cores)
    pipeline = make_pipeline(network.eval(), config, classes)
    pipeline.to(machine.device)
    return Opened(model, pipeline, config, f"{saved.path} (averaged)")
