"""maskdm in Python: from a folder to samples in a few lines. What the command line does, by the same functions of `runs`."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, get_args

from PIL import Image

import maskdm
from maskdm import runs
from maskdm.config import SchedulerName
from maskdm.errors import UserError, nearest
from maskdm.report.page import read_events
from maskdm.runs.directory import RunDirectory, Weights
from maskdm.runs.store import load_pipeline
from maskdm.settings import to_plain

PathLike = str | os.PathLike[str]


@dataclass(frozen=True, init=False)
class Run:
    """A run of `train` or `maskdm train`, by its directory; it may be given wherever a path may.

    quiet: say nothing of what goes on. Raises UserError where there is no run.
    """

    path: Path
    quiet: bool = field(repr=False)

    def __init__(self, path: PathLike, quiet: bool = False) -> None:
        object.__setattr__(self, "path", Path(path))
        object.__setattr__(self, "quiet", quiet)
        RunDirectory.existing(self.path)

    def __fspath__(self) -> str:
        return str(self.path)

    def _repr_png_(self) -> bytes | None:  # what a notebook shows of it
        picture = self.path / "samples.png"
        return picture.read_bytes() if picture.is_file() else None

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The records of its log, metrics.jsonl (docs/guide.md says which there are)."""
        return read_events(RunDirectory(self.path).metrics_log)

    def pipeline(self, weights: Weights = "ema") -> maskdm.MaskDMPipeline:
        """Its network in a diffusers pipeline, on this machine's device. weights: as trained (raw), averaged, or averaged at the best."""
        _check("weights", weights, get_args(Weights))
        return load_pipeline(self.path, weights)[0]

    def sample(
        self,
        num: int = 16,
        *,
        labels: str | int | Sequence[str | int] = (),
        seed: int = 0,
        steps: int | None = None,
        scheduler: SchedulerName | None = None,
        guidance: float | None = None,
        weights: Weights = "ema",
    ) -> list[Image.Image]:
        """Draw images, those of `maskdm sample` under the same options; None: as the run's own settings have it.

        labels: classes by name or number, or mixtures (cat:0.7+dog:0.3), in turn; all if left out. Raises UserError.
        """
        _check("weights", weights, get_args(Weights))
        _check("scheduler", scheduler or "ddim", get_args(SchedulerName))
        names = tuple(map(str, [labels] if isinstance(labels, str | int) else labels))
        drawing: dict[str, Any] = {"steps": steps, "scheduler": scheduler, "guidance": guidance}
        request = runs.SampleRequest(self.path, self.path, num, seed=seed, labels=names, weights=weights, **drawing)
        return runs.draw_run(request, runs.Display(self.quiet))

    def evaluate(
        self,
        num: int = 1000,
        *,
        features: str = "self",
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        weights: Weights = "ema",
        data: PathLike | None = None,
    ) -> dict[str, Any]:
        """Draw so many samples, measure them and return the figures (docs/evaluation.md), as `maskdm evaluate` also writes them.

        features: the feature network. data: the real images, where they have moved. Raises UserError.
        """
        _check("weights", weights, get_args(Weights))
        sampling = runs.SampleRequest(self.path, self.path, num, steps, guidance=guidance, seed=seed, weights=weights)
        request = runs.EvaluateRequest(sampling, data=None if data is None else os.fspath(data), features=features)
        return _measured(request, self.quiet)

    def export(
        self,
        out: PathLike,
        *,
        formats: str = "diffusers",
        licence: str = "unknown",
        name: str | None = None,
        weights: Weights = "ema",
    ) -> Path:
        """Write its network in forms that open without maskdm, with a model card (docs/export.md); returns the folder.

        formats: some of diffusers, onnx and torch, with commas between. licence: of the images. Raises UserError.
        """
        _check("weights", weights, get_args(Weights))
        request = runs.ExportRequest(self.path, Path(out), runs.parse_formats(formats), licence, name, weights)
        _say(runs.export(request, runs.Display(self.quiet)), self.quiet)
        return Path(out)


def train(
    data: PathLike,
    out: PathLike,
    *,
    recipe: str | None = None,
    config: PathLike | None = None,
    fork: bool = False,
    quiet: bool = False,
    **settings: Any,
) -> Run:
    """Train as `maskdm train` does, masked first, then on whole images; the same call again resumes, or returns at once what is done.

    data: a folder, or anything else that the command takes. Settings are the command's, by the same names with `__` for a dot:
    `image_size=64, mask__ratio=0.75, stages__finetune__lr=1e-4`. Values are Python's: numbers, None, (64, 96), a mask of `maskdm.config`.

    An interrupt (Ctrl-C, the notebook's stop button) has the step finished and saved, and raises `maskdm.Interrupted`. Raises UserError
    for bad input.
    """
    given = assignments(settings)
    words = ["maskdm", "train", os.fspath(data), "--out", os.fspath(out)]
    options = (("recipe", recipe), ("config", None if config is None else os.fspath(config)), *given)
    words += [part for name, text in options if text is not None for part in (f"--{name}", text)] + ["--fork"] * fork
    request = runs.TrainRequest(os.fspath(data), Path(out), recipe, None if config is None else Path(config), given, fork=fork)
    _say(runs.train(request, shlex.join(words), runs.Display(quiet)), quiet)
    return Run(out, quiet)


def compare(
    data: PathLike,
    out: PathLike,
    *,
    budget: str,
    arms: str = "whole,maskdm",
    seeds: int = 3,
    features: str = "self",
    num: int = 500,
    recipe: str | None = None,
    config: PathLike | None = None,
    quiet: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Train several ways at equal cost, as `maskdm compare` does, and return what its compare.json holds: `arms`, `verdicts`, `curves`.

    budget: of each arm and seed, such as "10m" or "2Mimages". arms: as docs/guide.md has them. Settings as of `train`. The same call again
    resumes; an interrupt saves, and raises `maskdm.Interrupted`. Raises UserError.
    """
    request = runs.TrainRequest(os.fspath(data), Path(out), recipe, None if config is None else Path(config), assignments(settings))
    _say(runs.compare(runs.CompareRequest(request, budget, arms, seeds, features, num), runs.Display(quiet)), quiet)
    found: dict[str, Any] = json.loads((Path(out) / "compare.json").read_text(encoding="utf-8"))
    return found


def evaluate_images(
    images: PathLike, data: PathLike, *, features: str = "self", image_size: str | int | None = None, quiet: bool = False
) -> dict[str, Any]:
    """Measure a collection of images against real ones, as `maskdm evaluate --images` does, and return the figures. Raises UserError."""
    size = None if image_size is None else str(image_size)
    return _measured(runs.EvaluateRequest(None, os.fspath(images), os.fspath(data), features, image_size=size), quiet)


def assignments(settings: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Settings by their names in Python, as the command line has them: `mask__ratio=0.75` is --mask.ratio 0.75."""
    return tuple((name.replace("__", "."), _text(value)) for name, value in settings.items())


def _text(value: Any) -> str:
    if isinstance(value, str | os.PathLike):
        return os.fspath(value)  # pyright: ignore[reportUnknownVariableType]
    return "none" if value is None else json.dumps(value, default=_plain)  # which is YAML, too


def _plain(value: Any) -> Any:
    """What JSON does not know: parts of a configuration, numbers of numpy, and what is known by its words."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)  # pyright: ignore[reportUnknownVariableType]
    if is_dataclass(value):
        return to_plain(value)
    return value.item() if hasattr(value, "item") else str(value)


def _measured(request: runs.EvaluateRequest, quiet: bool) -> dict[str, Any]:
    found = runs.evaluate(request, runs.Display(quiet))
    _say(found.summary, quiet)
    return found.measures


def _say(text: str, quiet: bool) -> None:
    if text:
        runs.Display(quiet).note(text)


def _check(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{name} is '{value}'; give one of {', '.join(choices)}{nearest(value, list(choices))}")
