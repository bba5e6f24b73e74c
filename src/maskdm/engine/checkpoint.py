"""Checkpoints: a folder of safetensors files and a manifest, written under another name, synced, then renamed.

Nothing in a checkpoint is code. The manifest holds each file's size and SHA-256, so that damage is found before use. One process at a
time writes to a folder (`RunDirectory.alone`).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from maskdm.errors import UserError

FORMAT = 2
"""Raised when the same tensors, or the draws of the steps to come, mean something else than before."""
_MANIFEST = "manifest.json"
SMALL = "small.safetensors"
"""Of a checkpoint that is cut: what is not, counts of steps and the like."""


@dataclass(frozen=True)
class Checkpoint:
    """What was saved: tensors by file and name, on the CPU, and plain values."""

    path: Path
    tensors: dict[str, dict[str, Tensor]]
    numbers: dict[str, Any]
    cut: bool = False
    """Whether its files are parts of tensors, one of each process."""


class Damaged(UserError):
    """The checkpoint at `path` is not what was written. `reason` is the message without the way out."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{reason}; delete {path} to use the checkpoint before it")
        self.path, self.reason = path, reason


def save(folder: Path, name: str, tensors: Mapping[str, Mapping[str, Tensor]], numbers: Mapping[str, Any]) -> Path:
    """Write the checkpoint `folder/name` atomically: it is there whole, or not at all. Raises OSError, and what was there stands."""
    partial = partial_of(folder, name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        for file, group in tensors.items():
            save_tensors({key: value.detach().contiguous().cpu() for key, value in group.items()}, partial / f"{file}.safetensors")
        return put_in_place(folder, name, digests(partial, "*"), numbers)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)  # of no use, and the disk may be full
        raise


def put_in_place(
    folder: Path, name: str, files: Mapping[str, Mapping[str, str | int]], numbers: Mapping[str, Any], cut: bool = False
) -> Path:
    """Give a checkpoint, whose files are all on the disk, its manifest and its name."""
    partial = partial_of(folder, name)
    manifest = partial / _MANIFEST
    manifest.write_text(json.dumps({"format": FORMAT, "cut": cut, "files": files, **numbers}, indent=1))
    sync(manifest)
    sync(partial)
    final, old = folder / name, _old(folder / name)
    if final.exists():  # out of the way in one move: a kill must not leave half of it
        shutil.rmtree(old, ignore_errors=True)
        os.replace(final, old)
    os.replace(partial, final)
    sync(folder)
    shutil.rmtree(old, ignore_errors=True)
    return final


def partial_of(folder: Path, name: str) -> Path:
    """Where a checkpoint is until all of it is on the disk."""
    return folder / f".{name}.partial"


def digests(folder: Path, pattern: str) -> dict[str, dict[str, str | int]]:
    """Size and SHA-256 of files, by their names."""
    return {path.name: {"bytes": path.stat().st_size, "sha256": _digest(path)} for path in sorted(folder.glob(pattern))}


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """As safetensors' `save_file`, synced. Raises OSError where the disk refuses."""
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:  # it has the number in its text alone
        found = re.search(r"os error (\d+)", str(error))
        number = int(found[1]) if found else errno.EIO
        raise OSError(number, os.strerror(number), str(path)) from error
    sync(path)


def _old(path: Path) -> Path:
    """Where a checkpoint is while another of its name takes its place."""
    return path.with_name(f".{path.name}.old")


def _there(path: Path) -> Path:
    """The checkpoint, or the one before it where a kill came between the two moves that replace it."""
    return _old(path) if not path.exists() and _old(path).is_dir() else path


def names(folder: Path) -> list[str]:
    """Names of the checkpoints in `folder`, oldest first."""
    found = {p.name for p in folder.glob("step-*") if p.is_dir()}
    found |= {p.name[1 : -len(".old")] for p in folder.glob(".step-*.old") if p.is_dir()}
    return sorted(found, key=lambda name: (_step(name), name))


def _step(name: str) -> int:
    digits = name.split("-")[1]
    return int(digits) if digits.isdigit() else -1


def numbers(path: Path) -> dict[str, Any]:
    """The plain values of a checkpoint, its tensors left alone. Raises UserError as `load` does."""
    return _plain(_manifest(path))


def _manifest(path: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((_there(path) / _MANIFEST).read_text())
        manifest["files"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise Damaged(path, f"checkpoint {path / _MANIFEST} is missing or damaged") from None
    if manifest.get("format") != FORMAT:
        raise UserError(f"checkpoint {path} has format {manifest.get('format')}, and this version of maskdm reads format {FORMAT}")
    return manifest


def _plain(manifest: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in manifest.items() if key not in ("format", "files", "cut")}


def load(path: Path, parts: bool = False) -> Checkpoint:
    """Read and verify a checkpoint. Raises Damaged, naming the file and the way out, and UserError for another version's.

    parts: leave the tensors of one that is cut to `sharding.read`, in each process its part; else they are put together.
    """
    manifest = _manifest(path)
    files: dict[str, dict[str, Any]] = manifest["files"]
    tensors: dict[str, dict[str, Tensor]] = {}
    cut = manifest.get("cut", False)
    for file, expected in files.items():
        whole = _there(path) / file
        try:
            if whole.stat().st_size != expected["bytes"] or _digest(whole) != expected["sha256"]:
                raise Damaged(path, f"checkpoint file {whole} is damaged (size or checksum differs)")
            if not cut:
                tensors[whole.stem] = load_file(whole)
        except (OSError, SafetensorError) as error:
            raise Damaged(path, f"checkpoint file {whole} cannot be read ({error})") from None
    if cut and not parts:
        tensors = _put_together(_there(path))
    return Checkpoint(path, tensors, _plain(manifest), cut)


def _put_together(path: Path) -> dict[str, dict[str, Tensor]]:
    """All of a checkpoint that is cut, in this process."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    small = load_file(path / SMALL)
    metadata = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    state: dict[str, Any] = {}
    for name, each in metadata.items():
        if name not in small and isinstance(each, TensorStorageMetadata):
            state[name] = torch.empty(each.size, dtype=each.properties.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process alone
        dcp.load(state, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=True)
    return grouped(state | small)


def grouped(flat: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors by file and name, from `file/name`."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, value in flat.items():
        file, _, key = name.partition("/")
        found.setdefault(file, {})[key] = value
    return found


def load_latest(folder: Path, parts: bool = False) -> tuple[Checkpoint | None, list[Damaged]]:
    """The newest whole checkpoint of a folder, and what is wrong with those after it, which are set aside as damaged-NAME.

    Raises Damaged where there are checkpoints and none is whole: the run must not begin again unasked.
    """
    wrong: list[Damaged] = []
    for name in reversed(names(folder)):
        try:
            found = load(folder / name, parts)
        except Damaged as error:
            wrong.append(error)
            continue
        for each in wrong:
            aside = folder / f"damaged-{each.path.name}"
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(_there(each.path), aside)
        return found, wrong
    if wrong:
        raise wrong[0]
    return None, []


def rotate(folder: Path, keep: int) -> None:
    """Delete all but the `keep` latest checkpoints, and what kills have left; those with a name of their own after the step stay."""
    plain = [name for name in names(folder) if name.count("-") == 1]
    for name in plain[:-keep]:
        shutil.rmtree(folder / name, ignore_errors=True)
        shutil.rmtree(_old(folder / name), ignore_errors=True)
    for path in (*folder.glob(".step-*.partial"), *folder.glob(".step-*.old")):
        if path.suffix == ".partial" or (folder / path.name[1 : -len(".old")]).is_dir():
            shutil.rmtree(path, ignore_errors=True)


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
