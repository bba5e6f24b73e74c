"""Checkpoints: a folder of safetensors files and a manifest, written under another name, synced, then renamed.

Nothing in a checkpoint is code. The manifest holds each file's size and SHA-256, so that damage is found before use.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from maskdm.errors import UserError

FORMAT = 2
"""Raised when the same tensors, or the draws of the steps to come, mean something else than before."""
_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """What was saved: tensors by file and name, on the CPU, and plain values."""

    path: Path
    tensors: dict[str, dict[str, Tensor]]
    numbers: dict[str, Any]


def save(folder: Path, name: str, tensors: Mapping[str, Mapping[str, Tensor]], numbers: Mapping[str, Any]) -> Path:
    """Write the checkpoint `folder/name` atomically: it is there whole, or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    files: dict[str, dict[str, str | int]] = {}
    for file, group in tensors.items():
        path = partial / f"{file}.safetensors"
        save_file({key: value.detach().contiguous().cpu() for key, value in group.items()}, path)
        sync(path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": _digest(path)}
    manifest = partial / _MANIFEST
    manifest.write_text(json.dumps({"format": FORMAT, "files": files, **numbers}, indent=1))
    sync(manifest)
    final, old = folder / name, folder / f".{name}.old"
    if final.exists():  # out of the way in one move: a kill must not leave half of it
        shutil.rmtree(old, ignore_errors=True)
        os.replace(final, old)
    os.replace(partial, final)
    sync(folder)
    shutil.rmtree(old, ignore_errors=True)
    return final


def names(folder: Path) -> list[str]:
    """Names of the checkpoints in `folder`, oldest first."""
    found = [p for p in folder.glob("step-*") if p.is_dir()]
    return [p.name for p in sorted(found, key=lambda p: _step(p.name))]


def _step(name: str) -> int:
    digits = name.split("-")[1]
    return int(digits) if digits.isdigit() else -1


def numbers(path: Path) -> dict[str, Any]:
    """The plain values of a checkpoint, its tensors left alone. Raises UserError as `load` does."""
    return _plain(_manifest(path))


def _manifest(path: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((path / _MANIFEST).read_text())
        manifest["files"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"checkpoint {path / _MANIFEST} is missing or damaged{_way_out(path)}") from None
    if manifest.get("format") != FORMAT:
        raise UserError(f"checkpoint {path} has format {manifest.get('format')}, and this version of maskdm reads format {FORMAT}")
    return manifest


def _plain(manifest: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in manifest.items() if key not in ("format", "files")}


def _way_out(path: Path) -> str:
    return f"; delete {path} to go on from the checkpoint before it"


def load(path: Path) -> Checkpoint:
    """Read and verify a checkpoint. Raises UserError naming the damaged file and the way out."""
    manifest, way_out = _manifest(path), _way_out(path)
    files: dict[str, dict[str, Any]] = manifest["files"]
    tensors: dict[str, dict[str, Tensor]] = {}
    for file, expected in files.items():
        whole = path / file
        try:
            if whole.stat().st_size != expected["bytes"] or _digest(whole) != expected["sha256"]:
                raise UserError(f"checkpoint file {whole} is damaged (size or checksum differs){way_out}")
            tensors[whole.stem] = load_file(whole)
        except (OSError, SafetensorError) as error:
            raise UserError(f"checkpoint file {whole} cannot be read ({error}){way_out}") from None
    return Checkpoint(path, tensors, _plain(manifest))


def rotate(folder: Path, keep: int) -> None:
    """Delete all but the `keep` latest checkpoints; those with a name of their own after the step stay."""
    plain = [name for name in names(folder) if name.count("-") == 1]
    for name in plain[:-keep]:
        shutil.rmtree(folder / name)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Ask the disk to have it: a rename may otherwise become durable before the content does."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
