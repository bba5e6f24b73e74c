"""The verbs: the only place where data, models, training, sampling and evaluation meet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from maskdm.engine import Lost, joined
from maskdm.pictures import to_pil
from maskdm.report import compare_runs, write_report
from maskdm.runs.compare import CompareRequest, compare
from maskdm.runs.data import describe_data
from maskdm.runs.directory import RunDirectory
from maskdm.runs.display import Display
from maskdm.runs.distil import DistilRequest, distil_run
from maskdm.runs.edit import EditRequest, edit
from maskdm.runs.evaluate import EvaluateRequest, evaluate
from maskdm.runs.export import ExportRequest, export, parse_formats
from maskdm.runs.forecast import plan
from maskdm.runs.observe import Diverged
from maskdm.runs.pack import PackRequest, pack_data
from maskdm.runs.push import PushRequest, push
from maskdm.runs.resolve import TrainRequest
from maskdm.runs.sample import SampleRequest, ready, sample, sampling_settings, wishes_of
from maskdm.runs.store import load_pipeline
from maskdm.runs.sweep import SweepRequest, ema_sweep, parse_lengths
from maskdm.runs.train import Interrupted, train

__all__ = [
    "CompareRequest",
    "Display",
    "DistilRequest",
    "Diverged",
    "EditRequest",
    "EvaluateRequest",
    "ExportRequest",
    "Interrupted",
    "Lost",
    "PackRequest",
    "PushRequest",
    "SampleRequest",
    "SweepRequest",
    "TrainRequest",
    "compare",
    "compare_reports",
    "describe_data",
    "distil_run",
    "draw_run",
    "edit",
    "ema_sweep",
    "evaluate",
    "export",
    "pack_data",
    "parse_formats",
    "parse_lengths",
    "plan",
    "push",
    "report_run",
    "sample_run",
    "train",
]


def sample_run(request: SampleRequest, display: Display) -> list[Path]:
    """Draw images from the run that the request names; no paths come from processes other than the first. Raises UserError."""
    with joined() as ranks:
        shown = display if ranks.first else Display(quiet=True)
        pipeline, origin = load_pipeline(request.run, request.weights, request.ema)
        shown.note(f"weights: {origin}")
        config = RunDirectory(request.run).config()
        settings = sampling_settings(config, request)
        with shown.counting(f"drawing {request.num} images") as progress:
            paths = sample(request, pipeline, settings, wishes_of(request, pipeline, config.data), ranks, progress)
        return paths if ranks.first else []


def draw_run(request: SampleRequest, display: Display) -> list[Image.Image]:
    """The images that `sample_run` would write, none of which is written; all of them in each process. Raises UserError."""
    pipeline, origin = load_pipeline(request.run, request.weights, request.ema)
    display.note(f"weights: {origin}")
    config = RunDirectory(request.run).config()
    settings = sampling_settings(config, request)
    draw = ready(request, pipeline, settings, wishes_of(request, pipeline, config.data))
    with display.counting(f"drawing {request.num} images") as progress:
        return [to_pil(image) for image in draw(range(request.num), progress)]


def report_run(path: Path) -> Path:
    """Write a run's report anew; returns its path. Raises UserError."""
    return write_report(path)


def compare_reports(paths: Sequence[Path], out: Path) -> Path:
    """Write one page that puts several runs side by side; returns its path. Raises UserError."""
    return compare_runs(paths, out)
