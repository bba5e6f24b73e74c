"""A network cut over the processes (torch's FSDP2), for models that one device does not hold, and its checkpoints.

Weights, averages and moments are fp32 and cut. A block's weights are gathered while it computes, in bf16 where the arithmetic is. Of a
checkpoint each process writes its part while training goes on, as safetensors that know their places (`torch.distributed.checkpoint`), so
that any number of processes reads it, and no code is in it.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from maskdm.engine import checkpoint
from maskdm.engine.ranks import Ranks
from maskdm.models import Denoiser

Groups = Mapping[str, Mapping[str, Tensor]]


def cut(model: Denoiser, ranks: Ranks, device: torch.device, bf16: bool) -> None:
    """Cut a network's weights over all processes, block by block."""
    mesh = init_device_mesh(device.type, (ranks.world,))
    policy = MixedPrecisionPolicy(torch.bfloat16 if bf16 else None, torch.float32 if bf16 else None, cast_forward_inputs=False)
    for blocks in [module for module in model.modules() if isinstance(module, nn.ModuleList)]:
        for block in blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
    # the outermost too: an evaluation has no backward pass after which its weights would be cut again
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All of what may be cut. Every process must come here."""
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in tensors.items()}


def part(value: Tensor) -> Tensor:
    """This process's part of what may be cut."""
    return value.to_local() if isinstance(value, DTensor) else value


def like(value: Tensor, model: Tensor) -> Tensor:
    """A tensor on the device of `model`, and cut as that one is."""
    if isinstance(model, DTensor) and not isinstance(value, DTensor):
        return distribute_tensor(value.to(model.device), model.device_mesh, model.placements, src_data_rank=None)
    return value.to(model.device)


def everywhere(value: Tensor, model: Tensor) -> Tensor:
    """A value that all processes have, so that kernels take it beside tensors that are cut as `model` is."""
    return DTensor.from_local(value, model.device_mesh, [Replicate()], run_check=False) if isinstance(model, DTensor) else value


@dataclass
class Save:
    """A checkpoint on its way to the disk."""

    folder: Path
    name: str
    numbers: Mapping[str, Any]
    future: Future[Any]


class Saver:
    """Writes checkpoints of a network that is cut, one at a time, while training goes on. All processes do the same."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._group: Any = dist.new_group(backend="gloo")  # of its own: the thread that writes talks too
        self._pending: Save | None = None

    def begin(self, folder: Path, name: str, groups: Groups, numbers: Mapping[str, Any]) -> None:
        """Copy the state, and write it from there."""
        partial = checkpoint.partial_of(folder, name)
        flat = {f"{file}/{key}": value for file, group in groups.items() for key, value in group.items()}
        if self.ranks.first:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            small = {name: value.detach().cpu().clone() for name, value in flat.items() if not isinstance(value, DTensor)}
            checkpoint.save_tensors(small, partial / checkpoint.SMALL)
        self.ranks.wait("the folder of a checkpoint")
        state = {name: value for name, value in flat.items() if isinstance(value, DTensor)}
        writer = HuggingFaceStorageWriter(str(partial), save_distributed=True)
        future: Any = dcp.async_save(state, storage_writer=writer, process_group=self._group)
        self._pending = Save(folder, name, numbers, future)

    def finish(self, now: bool = True) -> Path | None:
        """Put a checkpoint in its place once all have written; with `now` wait for them. Raises OSError in the first process."""
        save = self._pending
        if save is None or not (now or all(self.ranks.gather(save.future.done()))):
            return None
        self._pending, error = None, save.future.exception()
        mine = {} if error else checkpoint.digests(checkpoint.partial_of(save.folder, save.name), f"shard-{self.ranks.rank + 1:05}-*")
        errors, files = zip(*self.ranks.gather((None if error is None else repr(error), mine)), strict=True)
        path = save.folder / save.name
        if self.ranks.first:
            wrong = next((each for each in errors if each), None)
            if wrong:
                shutil.rmtree(checkpoint.partial_of(save.folder, save.name), ignore_errors=True)
                raise OSError(5, wrong, str(path))
            named = {name: digest for each in files for name, digest in each.items()}
            named |= checkpoint.digests(checkpoint.partial_of(save.folder, save.name), checkpoint.SMALL)
            checkpoint.put_in_place(save.folder, save.name, named, save.numbers, cut=True)
        self.ranks.wait("a checkpoint")
        return path


def read(path: Path, groups: Groups) -> dict[str, dict[str, Tensor]]:
    """This process's part of a checkpoint, by file and name; `groups`: tensors cut as what is read shall be, of at least its names."""
    small = load_file(path / checkpoint.SMALL)
    there = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata.keys() - small.keys()
    models = {f"{file}/{key}": value for file, group in groups.items() for key, value in group.items()}
    state = {name: torch.empty_like(models[name]) for name in sorted(there)}
    dcp.load(state, storage_reader=HuggingFaceStorageReader(str(path)))
    return checkpoint.grouped(state | small)
