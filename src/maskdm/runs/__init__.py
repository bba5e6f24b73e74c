"""The verbs: the only place where data, models, training, sampling and evaluation meet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from maskdm.engine import Lost
from maskdm.report import compare_runs, write_report
from maskdm.runs.compare import CompareRequest, compare
from maskdm.runs.data import describe_data
from maskdm.runs.directory import RunDirectory
from maskdm.runs.display import Display
from maskdm.runs.evaluate import EvaluateRequest, evaluate
from maskdm.runs.forecast import plan
from maskdm.runs.observe import Diverged
from maskdm.runs.pack import PackRequest, pack_data
from maskdm.runs.resolve import TrainRequest
from maskdm.runs.sample import SampleRequest, sample, sampling_settings
from maskdm.runs.store import load_pipeline
from maskdm.runs.sweep import SweepRequest, ema_sweep, parse_lengths
from maskdm.runs.train import Interrupted, train

__all__ = [
    "CompareRequest",
    "Display",
    "Diverged",
    "EvaluateRequest",
    "Interrupted",
    "Lost",
    "PackRequest",
    "SampleRequest",
    "SweepRequest",
    "TrainRequest",
    "compare",
    "compare_reports",
    "describe_data",
    "ema_sweep",
    "evaluate",
    "pack_data",
    "parse_lengths",
    "plan",
    "report_run",
    "sample_run",
    "train",
]


def sample_run(request: SampleRequest, display: Display) -> list[Path]:
    """Draw images from the run that the request names. Raises UserError."""
    pipeline, origin = load_pipeline(request.run, request.weights, request.ema)
    display.note(f"weights: {origin}")
    settings = sampling_settings(RunDirectory(request.run).config(), request)
    with display.counting(f"drawing {request.num} images") as progress:
        return sample(request, pipeline, settings, progress)


def report_run(path: Path) -> Path:
    """Write a run's report anew; returns its path. Raises UserError."""
    return write_report(path)


def compare_reports(paths: Sequence[Path], out: Path) -> Path:
    """Write one page that puts several runs side by side; returns its path. Raises UserError."""
    return compare_runs(paths, out)
