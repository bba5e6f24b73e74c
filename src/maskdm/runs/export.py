"""`maskdm export`: a run's network in forms that open elsewhere, with a card."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import maskdm
from maskdm.config import Config
from maskdm.errors import UserError, nearest
from maskdm.export import SAMPLER, Facts, card, write_folder, write_onnx, write_program
from maskdm.runs.directory import RunDirectory, Weights
from maskdm.runs.display import Display
from maskdm.runs.store import load_pipeline, state_hash
from maskdm.settings import to_yaml

Format = Literal["diffusers", "onnx", "torch"]
FORMATS: tuple[Format, ...] = ("diffusers", "onnx", "torch")
MARK = "export.json"
"""In an export alone: what it is, and of what."""


@dataclass(frozen=True)
class ExportRequest:
    """What `maskdm export` was asked for."""

    run: Path
    out: Path
    formats: tuple[Format, ...] = ("diffusers",)
    licence: str = "unknown"
    name: str | None = None
    """Of the model, on its card; that of the run's directory if left out."""
    weights: Weights = "ema"
    ema: float | None = None


def parse_formats(text: str) -> tuple[Format, ...]:
    """Formats from names with commas between. Raises UserError."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = next((name for name in names if name not in FORMATS), None)
    if unknown is not None or not names:
        hint = "" if unknown is None else nearest(unknown, list(FORMATS))
        raise UserError(f"--format is '{text}'; give some of {', '.join(FORMATS)}, with commas between{hint}")
    return tuple(each for each in FORMATS if each in names)


def export(request: ExportRequest, display: Display) -> str:
    """Write the network of a run in the formats asked for, with a card; returns what to print. Raises UserError."""
    run = RunDirectory.existing(request.run)
    if not request.licence.strip():
        raise UserError("--licence is empty; give the licence's name, such as cc-by-4.0, or leave it out")
    check_free(request.out, request.run)
    pipeline, origin = load_pipeline(request.run, request.weights, request.ema)
    pipeline.to("cpu")
    display.note(f"weights: {origin}")
    try:
        request.out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to --out {request.out}: {error.strerror}") from None
    with tempfile.TemporaryDirectory(prefix=f".{request.out.name}.", dir=request.out.parent) as place:
        folder = Path(place) / "export"
        folder.mkdir()
        _fill(folder, request, run, pipeline, origin, display)
        shutil.rmtree(request.out, ignore_errors=True)
        os.replace(folder, request.out)
    return f"exported to {request.out}:\n" + "\n".join(f"  {path.name}" for path in sorted(request.out.iterdir()))


def check_free(out: Path, run: Path) -> None:
    """Raise UserError where an export cannot be: a file, or a directory with other things in it than an export."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; give a directory")
    if out.resolve() == run.resolve():
        raise UserError(f"--out {out} is the run itself; give another directory")
    if out.is_dir() and any(out.iterdir()) and not (out / MARK).is_file():
        raise UserError(f"--out {out} holds files that are not an export's; give an empty or a new directory")


def _fill(folder: Path, request: ExportRequest, run: RunDirectory, pipeline: maskdm.MaskDMPipeline, origin: str, display: Display) -> None:
    """Write all files of an export into a folder."""
    files: dict[str, float | None] = {}
    if "diffusers" in request.formats:
        write_folder(pipeline, folder)
    if "onnx" in request.formats:
        with display.counting("writing ONNX"):
            files["model.onnx"] = write_onnx(pipeline, folder / "model.onnx")
        shutil.copy(SAMPLER, folder / SAMPLER.name)
        if files["model.onnx"] is None:
            display.note("onnxruntime is not installed, so model.onnx was not compared with the network: pip install 'maskdm[export]'")
    if "torch" in request.formats:
        with display.counting("writing torch.export"):
            files["model.pt2"] = write_program(pipeline, folder / "model.pt2")
    for name, difference in files.items():
        if difference is not None:
            display.note(f"{name}: at most {difference:.1g} from the network's output, relative")
    config, digest = _anonymous(run.config()), state_hash(pipeline.unet.state_dict())
    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    pictures = sorted(run.samples.glob("step-*.png"))
    if pictures:
        shutil.copy(pictures[-1], folder / "samples.png")
    measures = _measures(run)
    facts = Facts(
        name=request.name or request.run.resolve().name,
        licence=request.licence.strip(),
        config=config,
        info=run.info(),
        measures=measures,
        same_weights=measures is not None and measures.get("provenance", {}).get("weights_hash") == digest,
        origin={"ema": "averaged", "raw": "as trained", "best": "averaged, of the best evaluation"}[request.weights]
        if request.ema is None
        else f"averaged over sigma_rel {request.ema:g}",
        files=files,
        folder="diffusers" in request.formats,
        picture=bool(pictures),
    )
    (folder / "README.md").write_text(card(facts), encoding="utf-8")
    mark = {"maskdm": maskdm.__version__, "weights_hash": digest, "formats": list(request.formats), "differences": files}
    (folder / MARK).write_text(json.dumps(mark, indent=1) + "\n", encoding="utf-8")


def _anonymous(config: Config) -> Config:
    """The configuration without the folders of this machine, of which nobody else need know."""

    def last(path: str) -> str:
        return Path(path).name or path

    kind, colon, path = config.evaluation.features.partition(":")
    return replace(
        config,
        data=replace(config.data, source=last(config.data.source)),
        evaluation=replace(config.evaluation, features=kind + colon + last(path)),
        init=None if config.init is None else last(config.init),
    )


def _measures(run: RunDirectory) -> dict[str, Any] | None:
    """The figures of the latest `maskdm evaluate`, where there are any."""
    try:
        found: dict[str, Any] = json.loads(run.metrics_file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        raise UserError(f"{run.metrics_file} is damaged; run `maskdm evaluate {run.path}` again, or delete it") from None
    return found
