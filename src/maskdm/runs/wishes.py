"""What may be asked of samples beyond a run's settings: mixtures of classes, ways from one image to another, other sizes, films."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import maskdm
from maskdm.data import to_uint8
from maskdm.engine import checkpoint, transfer
from maskdm.errors import UserError, nearest
from maskdm.models import Denoiser
from maskdm.pictures import grid
from maskdm.runs.directory import RunDirectory
from maskdm.runs.store import load_denoiser, whole_weights
from maskdm.sampling import seeded, slerp

FILMED = 16
"""Images of a film, at most."""

FRAME, LAST = 80, 1500
"""Milliseconds that a film's pictures are shown, and its last one."""

Weights = dict[int, float]
"""Of classes in a mixture."""


@dataclass
class Film:
    """The first images on their way from noise: after every step, scaled where the noise is larger than the image."""

    frames: dict[int, dict[int, Tensor]] = field(default_factory=dict[int, dict[int, Tensor]])

    def take(self, numbers: Sequence[int], step: int, x: Tensor) -> None:
        """Keep what these images are after a step."""
        for number, image in zip(numbers, x, strict=True):
            if number < FILMED:
                self.frames.setdefault(step, {})[number] = image.float().cpu()

    def save(self, path: Path, pipeline: maskdm.MaskDMPipeline) -> None:
        """Write it as a GIF."""
        pictures: list[Image.Image] = []
        for _, images in sorted(self.frames.items()):
            x = pipeline.to_pixels(torch.stack([image for _, image in sorted(images.items())]))
            shown = to_uint8(x / x.abs().amax(dim=(1, 2, 3), keepdim=True).clamp(min=1)).cpu().numpy()
            pictures.append(grid(shown, columns=max(1, round(len(shown) ** 0.5))))
        save_gif(pictures, path)


def save_gif(pictures: Sequence[Image.Image], path: Path) -> None:
    """Pictures one after the other, the last one longer."""
    times = [FRAME] * (len(pictures) - 1) + [LAST]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=times, loop=0)


@dataclass(frozen=True)
class Wishes:
    """Beside the settings. `between`: numbers of two images, from whose noise to the other's all others lie; a film to be made, or none.

    size: height and width of what the network learned, where it is larger than the network's; drawn as windows.
    """

    between: tuple[int, int] | None = None
    negative: int | None = None
    weak: Denoiser | None = None
    size: tuple[int, int] | None = None
    film: Film | None = None

    def noise(self, network: Denoiser, seed: int, numbers: range, num: int) -> Tensor | None:
        """What images start from, where it is not the noise of their own numbers."""
        if self.between is None:
            return None
        shape = (1, network.config["in_channels"], *(self.size or network.size))
        ends = [torch.randn(shape, generator=seeded(seed, range(end, end + 1))[0]) for end in self.between]
        return torch.cat([slerp(ends[0], ends[1], share_of(number, num)) for number in numbers])


NO_WISHES = Wishes()


def share_of(number: int, num: int) -> float:
    """How far on its way from the first to the last of so many an image is, 0 to 1."""
    return number / max(1, num - 1)


def parse_between(text: str | None) -> tuple[int, int] | None:
    """Two numbers of images from "3,8". Raises UserError."""
    if text is None:
        return None
    parts = text.split(",")
    if len(parts) != 2 or not all(part.strip().isdecimal() for part in parts):
        raise UserError(f"--between is '{text}'; give the numbers of two images, such as 3,8")
    return int(parts[0]), int(parts[1])


def parse_label(names: Sequence[str], text: str) -> Weights:
    """A class by name or number, or a mixture such as cat:0.7+dog:0.3 or 3+8. Raises UserError."""
    whole = _class(names, text)
    if whole is not None:
        return {whole: 1.0}
    found: Weights = {}
    for part in text.split("+"):
        name, _, weight = part.rpartition(":") if _class(names, part) is None and ":" in part else (part, "", "1")
        number = _class(names, name)
        try:
            share = float(weight)
        except ValueError:
            share = float("nan")
        if number is None or not np.isfinite(share):
            known = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
            raise UserError(
                f"'{text}' is no class of this model ({known}), nor a mixture of them such as 3:0.7+8:0.3{nearest(name, list(names))}"
            )
        found[number] = found.get(number, 0.0) + share
    total = sum(found.values())
    if not 1e-6 <= abs(total) < float("inf"):
        raise UserError(f"the weights of '{text}' add up to {'nothing' if abs(total) < 1e-6 else 'no number'}")
    return {number: weight / total for number, weight in found.items()}


def _class(names: Sequence[str], text: str) -> int | None:
    if text in names:
        return list(names).index(text)
    return int(text) if text.isdecimal() and len(text) < 10 and int(text) < len(names) else None


def choose_labels(
    names: Sequence[str], wanted: Sequence[str], num: int, between: tuple[int, int] | None = None
) -> list[int] | list[list[float]] | None:
    """A label per image, or the weights of the classes and of none: those wanted in turn, or all classes in turn; None without classes.

    With `between` the class, too, goes from the one image's to the other's: from the first wanted to the last.
    """
    if not names:
        if wanted:
            raise UserError("labels are given, and this model was trained without classes; leave them out")
        return None
    chosen = [parse_label(names, text) for text in wanted] or [{number: 1.0} for number in range(len(names))]
    if between is not None:
        first, last = (chosen[0], chosen[-1]) if wanted else (chosen[end % len(chosen)] for end in between)
        return [_mixed(first, last, share_of(number, num), len(names)) for number in range(num)]
    if all(len(weights) == 1 for weights in chosen):
        return [next(iter(chosen[i % len(chosen)])) for i in range(num)]
    return [_mixed(chosen[i % len(chosen)], chosen[i % len(chosen)], 0.0, len(names)) for i in range(num)]


def _mixed(first: Weights, last: Weights, share: float, count: int) -> list[float]:
    row = [0.0] * (count + 1)
    for weights, part in ((first, 1 - share), (last, share)):
        for number, weight in weights.items():
            row[number] += part * weight
    return row


def open_weak(path: Path, like: Denoiser) -> Denoiser:
    """The averaged network of a run, or of one of its checkpoints, on the device of `like`. Raises UserError."""
    if path.parent.name == "checkpoints":
        run = RunDirectory.existing(path.parent.parent)
        network, _, _ = load_denoiser(run.path, "ema")
        state = whole_weights(run, checkpoint.load(path).tensors["average"])
    else:
        network, state, _ = load_denoiser(path, "ema")
    if (network.config["in_channels"], network.size) != (like.config["in_channels"], like.size):
        raise UserError(f"{path} draws images of another size or other channels; name a run that learned the same")
    network.load_state_dict(state)
    network.eval().to(like.device)  # pyright: ignore[reportArgumentType] - diffusers' own
    return network


def at_size(network: Denoiser, size: tuple[int, int]) -> Denoiser:
    """The same network with positions for another size, in what it learned. Raises UserError."""
    if any(side % network.patch_size for side in size):
        raise UserError(
            f"a size of {size[0]}x{size[1]} is no whole number of the network's patches of {network.patch_size}; use a multiple"
        )
    taken = inspect.signature(type(network)).parameters
    other = type(network)(**{name: value for name, value in {**network.config, "sample_size": size}.items() if name in taken})
    transfer(network, network.state_dict(), other)
    other.eval().to(network.device)  # pyright: ignore[reportArgumentType]
    return other
