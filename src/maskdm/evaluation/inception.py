"""The network of the published FID (arXiv 1706.08500): Inception-v3 as TensorFlow released it on 2015-12-05, in PyTorch.

It is not the Inception-v3 of the paper (arXiv 1512.00567) nor torchvision's: average pools leave the padding out of the count, the
last block pools by maximum, and the images are resized as TensorFlow 1 did it, without antialiasing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from maskdm.errors import UserError
from maskdm.evaluation.features import FeatureNetwork, batch_on
from maskdm.evaluation.preparation import as_rgb
from maskdm.evaluation.weights import existing_file, fill, read_state, sha256_of

SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
"""91 MB, as torch-fidelity publishes it; pytorch-fid's `pt_inception-2015-12-05-6726825d.pth` is the same file."""

SIDE = 299
_NAMES = ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth")

Step: TypeAlias = tuple[int, int, int]
"""A convolution: channels, height and width of the kernel."""

Tower: TypeAlias = Sequence[Sequence[Step]]
"""Convolutions one after the other; where two stand together, both read the same and are joined."""

_average: Callable[[Tensor], Tensor] = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
_maximum: Callable[[Tensor], Tensor] = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
_halving: Callable[[Tensor], Tensor] = partial(F.max_pool2d, kernel_size=3, stride=2)


class _Convolution(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: tuple[int, int], stride: int, padding: tuple[int, int]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class _Mixed(nn.Module):
    """Towers and a pool side by side, joined by channel. `pooled`: channels after the pool, or 0 where the block halves the image."""

    def __init__(self, inputs: int, towers: dict[str, Tower], pool: Callable[[Tensor], Tensor], pooled: int) -> None:
        super().__init__()
        self.pool, self.pooled = pool, pooled
        self.towers: list[list[list[nn.Module]]] = []
        for name, tower in towers.items():
            channels, modules = inputs, list[list[nn.Module]]()
            for place, steps in enumerate(tower, start=1):
                stride = 2 if pooled == 0 and place == len(tower) else 1
                modules.append([_convolution(channels, step, stride) for step in steps])
                for letter, module in zip("ab", modules[-1], strict=False):
                    suffix = "" if len(tower) == 1 else f"_{place}{letter if len(steps) > 1 else ''}"
                    self.add_module(name + suffix, module)
                channels = sum(step[0] for step in steps)
            self.towers.append(modules)
        if pooled:
            self.branch_pool = _convolution(inputs, (pooled, 1, 1), 1)

    def forward(self, x: Tensor) -> Tensor:
        joined: list[Tensor] = []
        for tower in self.towers:
            value = x
            for modules in tower:
                value = torch.cat([module(value) for module in modules], dim=1)
            joined.append(value)
        pooled = self.pool(x)
        joined.append(self.branch_pool(pooled) if self.pooled else pooled)
        return torch.cat(joined, dim=1)


class Inception(nn.Module):
    """Pixels [n, 3, 299, 299] in -1..1 to the pooled last block; names of weights as in the published file."""

    def __init__(self) -> None:
        super().__init__()
        stem: list[tuple[str, nn.Module]] = [
            ("Conv2d_1a_3x3", _Convolution(3, 32, (3, 3), 2, (0, 0))),
            ("Conv2d_2a_3x3", _Convolution(32, 32, (3, 3), 1, (0, 0))),
            ("Conv2d_2b_3x3", _Convolution(32, 64, (3, 3), 1, (1, 1))),
            ("MaxPool_1", nn.MaxPool2d(3, 2)),
            ("Conv2d_3b_1x1", _Convolution(64, 80, (1, 1), 1, (0, 0))),
            ("Conv2d_4a_3x3", _Convolution(80, 192, (3, 3), 1, (0, 0))),
            ("MaxPool_2", nn.MaxPool2d(3, 2)),
        ]
        seven: Tower = [*_one(192), [(192, 1, 7)], [(192, 7, 1)], *_one(192, 3)]
        mixed: list[tuple[str, nn.Module]] = [
            ("Mixed_5b", _grid35(192, 32)),
            ("Mixed_5c", _grid35(256, 64)),
            ("Mixed_5d", _grid35(288, 64)),
            ("Mixed_6a", _Mixed(288, {"branch3x3": _one(384, 3), "branch3x3dbl": [*_one(64), *_one(96, 3), *_one(96, 3)]}, _halving, 0)),
            *((f"Mixed_6{letter}", _grid17(inner)) for letter, inner in zip("bcde", (128, 160, 160, 192), strict=True)),
            ("Mixed_7a", _Mixed(768, {"branch3x3": [*_one(192), *_one(320, 3)], "branch7x7x3": seven}, _halving, 0)),
            ("Mixed_7b", _grid8(1280, _average)),
            ("Mixed_7c", _grid8(2048, _maximum)),
        ]
        self.layers = [layer for _, layer in [*stem, *mixed]]
        for name, layer in [*stem, *mixed]:
            self.add_module(name, layer)
        self.fc = nn.Linear(2048, 1008)  # in the file, and not part of the features

    def forward(self, pixels: Float[Tensor, "n 3 299 299"]) -> Float[Tensor, "n 2048"]:
        """`pool3`, the layer of the FID."""
        x = pixels
        for layer in self.layers:
            x = layer(x)
        return x.mean(dim=(2, 3))


@dataclass(frozen=True)
class InceptionNetwork(FeatureNetwork):
    """The published network."""

    model: Inception
    device: torch.device

    @property
    def is_fid(self) -> bool:
        """True for the published weights alone."""
        return self.hash == SHA256

    def embed(self, images: UInt8[Tensor, "n _ _ _"]) -> Float[Tensor, "n 2048"]:
        """`pool3` of the images, resized as TensorFlow 1 did it and scaled to -1..1."""
        pixels = stretch(stretch(as_rgb(images.to(self.device)).float(), 3, SIDE), 2, SIDE)
        features: Tensor = self.model((pixels - 128) / 128)
        return features


def load_inception(path: Path, device: torch.device) -> InceptionNetwork:
    """The published network from its file. UserError for any other file."""
    digest = sha256_of(existing_file(path))
    if digest != SHA256:
        raise UserError(f"{path} is not the published FID network: its SHA-256 begins {digest[:8]}, not {SHA256[:8]}; fetch it from {URL}")
    with torch.device("meta"):
        model = Inception()
    fill(model, read_state(path), f"{path} is not the published FID network")
    preprocessing = "resized to 299 x 299 (bilinear as in TensorFlow 1, not antialiased), RGB in 0..255, minus 128, over 128"
    return InceptionNetwork("Inception-v3 2015-12-05 (FID)", digest, 2048, 0, preprocessing, batch_on(device), model.to(device), device)


def cached_inception(cache_dir: Path) -> Path:
    """The file in the cache directory, or where torch-fidelity and pytorch-fid keep it. UserError saying how to fetch it."""
    for folder in (cache_dir, Path(torch.hub.get_dir()) / "checkpoints"):
        for name in _NAMES:
            if (folder / name).is_file():
                return folder / name
    raise UserError(
        f"the Inception weights of the FID are not in {cache_dir}; `inception:download` fetches them (91 MB) from {URL},"
        " or give a copy as inception:PATH"
    )


def download_inception(cache_dir: Path) -> Path:
    """Fetch the file into the cache directory, unless it is there whole. UserError where the network or the file fails."""
    path = cache_dir / _NAMES[0]
    if not path.is_file() or sha256_of(path) != SHA256:
        cache_dir.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(URL, str(path), hash_prefix=SHA256, progress=sys.stderr.isatty())
        except (OSError, HTTPException, RuntimeError) as error:  # no network; another hash
            raise UserError(f"cannot fetch {URL}: {error}; fetch it by hand and give inception:PATH") from error
    return path


def stretch(images: Float[Tensor, "n c h w"], dim: int, size: int) -> Float[Tensor, "n c _ _"]:
    """One side resized as TensorFlow 1's bilinear: source = target * scale, with no half pixel and no antialiasing."""
    length = images.shape[dim]
    # in float32 as there, where a product can fall on the other side of a whole number
    source = torch.arange(size, dtype=torch.float32, device=images.device) * torch.tensor(length / size, dtype=torch.float32)
    low = source.long()
    before, after = images.index_select(dim, low), images.index_select(dim, (low + 1).clamp(max=length - 1))
    weight = source - low
    return before + (after - before) * (weight if dim == 3 else weight[:, None])


def _convolution(inputs: int, step: Step, stride: int) -> _Convolution:
    outputs, high, wide = step
    return _Convolution(inputs, outputs, (high, wide), stride, (0, 0) if stride == 2 else (high // 2, wide // 2))


def _one(outputs: int, kernel: int = 1) -> Tower:
    return [[(outputs, kernel, kernel)]]


def _grid35(inputs: int, pooled: int) -> _Mixed:
    towers: dict[str, Tower] = {
        "branch1x1": _one(64),
        "branch5x5": [*_one(48), *_one(64, 5)],
        "branch3x3dbl": [*_one(64), *_one(96, 3), *_one(96, 3)],
    }
    return _Mixed(inputs, towers, _average, pooled)


def _grid17(inner: int) -> _Mixed:
    towers: dict[str, Tower] = {
        "branch1x1": _one(192),
        "branch7x7": [*_one(inner), [(inner, 1, 7)], [(192, 7, 1)]],
        "branch7x7dbl": [*_one(inner), [(inner, 7, 1)], [(inner, 1, 7)], [(inner, 7, 1)], [(192, 1, 7)]],
    }
    return _Mixed(768, towers, _average, 192)


def _grid8(inputs: int, pool: Callable[[Tensor], Tensor]) -> _Mixed:
    both: Sequence[Step] = [(384, 1, 3), (384, 3, 1)]
    towers: dict[str, Tower] = {
        "branch1x1": _one(320),
        "branch3x3": [*_one(384), both],
        "branch3x3dbl": [*_one(448), *_one(384, 3), both],
    }
    return _Mixed(inputs, towers, pool, 192)
