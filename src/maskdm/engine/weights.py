"""Weights of one network into another, with a report of what became of each tensor: nothing is lost silently."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


Classes = tuple[Sequence[str], Sequence[str]]
"""Names of the classes of the one network and of the other, in the order of their labels."""


def transfer(source: Denoiser, weights: Mapping[str, Tensor], target: Denoiser, classes: Classes | None = None) -> list[Transfer]:
    """Load `weights` of a network like `source` into `target`; returns each tensor's fate.

    Positions are interpolated to another grid. `classes`, where they are not the same by number, are known by their names: those that the
    source knows keep their embedding, new ones begin as the null class. Where channels differ, the first and the last layer of
    gray images are spread over colours, or those of colours gathered; of any other number those that both have are taken. Raises
    UserError for any other difference, by name.
    """
    _check_same_network(source, target)
    same_classes = classes is None or list(classes[0]) == list(classes[1])
    state = target.state_dict()
    fates: list[Transfer] = []
    for name, fresh in state.items():
        old = weights.get(name)
        if old is not None and old.shape == fresh.shape and not _renumbered(name, source, target, same_classes):
            state[name] = old
            fates.append(Transfer(name, "loaded"))
            continue
        value, fate = _adapt(name, old, fresh, source, target, classes or ((), ()))
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


def _adapt(name: str, old: Tensor | None, fresh: Tensor, source: Denoiser, target: Denoiser, classes: Classes) -> tuple[Tensor, Transfer]:
    if name == POSITIONS and old is not None and isinstance(source, UViT) and isinstance(target, UViT):
        change = f"{source.grid[0]} x {source.grid[1]} -> {target.grid[0]} x {target.grid[1]} patches"
        if source.num_extras != target.num_extras:
            change += f", {source.num_extras} -> {target.num_extras} condition tokens"
        return _resize_positions(old, fresh, source, target), Transfer(name, "resized", change)
    if name == CLASSES:
        return _rename(old, fresh, source, target, classes)
    if name.startswith(DIALS):
        return fresh, Transfer(name, "re-initialised", "a condition that the weights do not know; it changes nothing at the start")
    channels = (source.config["in_channels"], target.config["in_channels"])
    if name.startswith(PIXELS) and channels[0] != channels[1] and old is not None:
        value = _rechannel(name, old, fresh, channels)
        return value, Transfer(name, "resized", f"{channels[0]} -> {channels[1]} channels")
    what = "is missing" if old is None else f"has shape {list(old.shape)}, not {list(fresh.shape)},"
    raise UserError(f"'{name}' {what} in the weights to start from; give both the same model settings")


def _rename(old: Tensor | None, fresh: Tensor, source: Denoiser, target: Denoiser, classes: Classes) -> tuple[Tensor, Transfer]:
    """Class embeddings: those known by name, the null class for the rest; without any, such as change a DiT's output least."""
    change = f"{source.num_classes} -> {target.num_classes} classes"
    if old is None:
        value = fresh if isinstance(target, UViT) else torch.zeros_like(fresh)
        return value, Transfer(CLASSES, "re-initialised", change)
    value = old[-1].expand_as(fresh).clone()
    known = [(names, list(classes[0]).index(each)) for names, each in enumerate(classes[1]) if each in classes[0]]
    for new, before in known:
        value[new] = old[before]
    if not known:
        other = ", other ones" if source.num_classes == target.num_classes else ""
        return value, Transfer(CLASSES, "re-initialised", f"{change}{other}, which begin as the null class")
    return value, Transfer(CLASSES, "resized", f"{change}: {len(known)} known by name, {target.num_classes - len(known)} new")


def _rechannel(name: str, old: Tensor, fresh: Tensor, channels: tuple[int, int]) -> Tensor:
    """The first or the last layer for other channels. Details of wavelets are three of each channel."""
    first = name.startswith("patch_embedding.")
    axis, kinds, (before, now) = int(first), 3 if ".detail." in name else 1, channels
    parts = old.unflatten(axis, (kinds, before, -1))
    if before == 1:  # gray for each colour; the sum of what comes in stays
        value = parts.expand(*(now if i == axis + 1 else size for i, size in enumerate(parts.shape))) / (now if first else 1)
    elif now == 1:
        value = parts.sum(axis + 1, keepdim=True) if first else parts.mean(axis + 1, keepdim=True)
    else:
        shared = min(before, now)
        value = (torch.zeros_like(fresh) if first else fresh.clone()).unflatten(axis, (kinds, now, -1))
        value.narrow(axis + 1, 0, shared).copy_(parts.narrow(axis + 1, 0, shared))
    return value.flatten(axis, axis + 2).contiguous()


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
