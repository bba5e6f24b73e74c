"""Weights of one network into another, with a report of what became of each tensor: nothing is lost silently."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from maskdm.errors import UserError
from maskdm.models import Denoiser, UViT

POSITIONS = "positions.weight"
CLASSES = "class_embedding.weight"
DIALS = ("guidance_dial.", "steps_dial.")
"""Layers of numbers that are conditions: they start at zero, so a network may be given them."""

PIXELS = ("patch_embedding.", "out.")
"""Where the tensors are whose shape depends on the patch size and the channels of the images."""


@dataclass(frozen=True)
class Transfer:
    """What became of one tensor: loaded, resized, re-initialised or unused; and why."""

    name: str
    fate: str
    reason: str = ""


def transfer(source: Denoiser, weights: Mapping[str, Tensor], target: Denoiser, same_classes: bool = True) -> list[Transfer]:
    """Load `weights` of a network like `source` into `target`; returns each tensor's fate.

    Positions are interpolated to another grid, class embeddings re-initialised for other classes (the null class is kept),
    and the first and last layer re-initialised for other channels. Raises UserError for any other difference, by name.
    """
    _check_same_network(source, target)
    state = target.state_dict()
    fates: list[Transfer] = []
    for name, fresh in state.items():
        old = weights.get(name)
        if old is not None and old.shape == fresh.shape and not _renumbered(name, source, target, same_classes):
            state[name] = old
            fates.append(Transfer(name, "loaded"))
            continue
        value, fate = _adapt(name, old, fresh, source, target)
        state[name] = value
        fates.append(fate)
    fates += [Transfer(name, "unused", "the new model has no classes") for name in weights if name == CLASSES and name not in state]
    lost = [name for name in weights if name not in state and name != CLASSES]
    if lost:
        raise UserError(f"the weights to start from have '{lost[0]}', which this model does not; give both the same model settings")
    target.load_state_dict(state)
    return fates


def _check_same_network(source: Denoiser, target: Denoiser) -> None:
    if type(source) is not type(target):
        raise UserError(
            f"--init is a {type(source).__name__} and this model a {type(target).__name__}; use --model {type(source).__name__.lower()}"
        )
    for key in ("width", "depth", "heads", "mlp_ratio", "qkv_bias", "patch_size", "transform", "fuse", "mask_token"):
        theirs, ours = source.config.get(key), target.config.get(key)
        if theirs != ours:
            setting = "patch" if key == "patch_size" else key
            raise UserError(f"--init has model.{setting} {theirs} and this run {ours}; use --model.{setting} {theirs}")


def _renumbered(name: str, source: Denoiser, target: Denoiser, same_classes: bool) -> bool:
    """Tables of equal shape whose rows mean something else: 16 x 4 positions are not 8 x 8, ten digits not ten animals."""
    return (name == POSITIONS and source.grid != target.grid) or (name == CLASSES and not same_classes)


def _adapt(name: str, old: Tensor | None, fresh: Tensor, source: Denoiser, target: Denoiser) -> tuple[Tensor, Transfer]:
    if name == POSITIONS and old is not None and isinstance(source, UViT) and isinstance(target, UViT):
        change = f"{source.grid[0]} x {source.grid[1]} -> {target.grid[0]} x {target.grid[1]} patches"
        if source.num_extras != target.num_extras:
            change += f", {source.num_extras} -> {target.num_extras} condition tokens"
        return _resize_positions(old, fresh, source, target), Transfer(name, "resized", change)
    if name == CLASSES:
        value = fresh.clone()
        if old is not None:
            value[-1] = old[-1]
        other = ", other ones" if source.num_classes == target.num_classes else ""
        return value, Transfer(name, "re-initialised", f"{source.num_classes} -> {target.num_classes} classes{other}")
    if name.startswith(DIALS):
        return fresh, Transfer(name, "re-initialised", "a condition that the weights do not know; it changes nothing at the start")
    channels = (source.config["in_channels"], target.config["in_channels"])
    if name.startswith(PIXELS) and channels[0] != channels[1]:
        return fresh, Transfer(name, "re-initialised", f"{channels[0]} -> {channels[1]} channels")
    what = "is missing" if old is None else f"has shape {list(old.shape)}, not {list(fresh.shape)},"
    raise UserError(f"'{name}' {what} in the weights to start from; give both the same model settings")


def _resize_positions(old: Tensor, fresh: Tensor, source: UViT, target: UViT) -> Tensor:
    """Patch positions interpolated over the grid; those of the time token (last of the extras) and class token kept."""
    shared = min(source.num_extras, target.num_extras)
    extras = fresh[: target.num_extras].clone()
    extras[target.num_extras - shared :] = old[source.num_extras - shared : source.num_extras]
    patches = old[source.num_extras :]
    if source.grid != target.grid:
        image = patches.unflatten(0, (source.sets, *source.grid)).permute(0, 3, 1, 2)
        patches = F.interpolate(image, size=target.grid, mode="bicubic", align_corners=False).permute(0, 2, 3, 1).flatten(0, 2)
    return torch.cat([extras, patches])
