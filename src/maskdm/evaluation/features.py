"""Feature networks: what turns images into the vectors that distances are measured between."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int, Integer, UInt8
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from maskdm.errors import UserError
from maskdm.evaluation.encoder import DIMENSIONS, Encoder

Images: TypeAlias = UInt8[Tensor, "_ _ _ _"] | UInt8[np.ndarray, "_ _ _ _"]
"""[N, C, H, W] in 0..255; C is 1 or 3. An array may be mapped from a file: it is read in pieces."""

Labels: TypeAlias = Integer[Tensor, " _"] | Integer[np.ndarray, " _"]
"""Classes [N], from 0."""

RECIPE = 2
"""Version of the encoder and its training; a part of the cache key."""

_FORMAT = "maskdm.features"


@dataclass(frozen=True)
class Training:
    """How a `self` network was trained. `cut_short`: the time limit, not the step count, ended its schedule."""

    recipe: int
    seed: int
    num_images: int
    steps: int
    seconds: float
    cut_short: bool


@dataclass(frozen=True)
class FeatureNetwork:
    """A network trained on the real images, its `hash` (SHA-256 of the weights) and its own accuracy on held-out ones."""

    name: str
    hash: str
    dimensions: int
    accuracy_heldout: float | None
    training: Training
    encoder: Encoder

    @torch.no_grad()
    def features(self, images: Images, batch: int = 256) -> Float[Tensor, "_ _"]:
        """Features [N, dimensions], float32, on the CPU. UserError for images of another size than the network's."""
        found = [self.encoder.features(self.encoder.prepare(piece)) for piece in self._pieces(images, batch)]
        return torch.cat(found) if found else torch.empty(0, self.dimensions)

    @torch.no_grad()
    def predict(self, images: Images, batch: int = 256) -> Int[Tensor, " _"] | None:
        """The class of each image, or None where the network was trained without labels."""
        if not self.encoder.classes:
            return None
        scores = [self.encoder.head(self.encoder(self.encoder.prepare(piece))) for piece in self._pieces(images, batch)]
        return torch.cat(scores).argmax(dim=1) if scores else torch.empty(0, dtype=torch.int64)

    def provenance(self) -> dict[str, str | int | float | bool | None]:
        """Name, hash, dimensions, accuracy and training, flat and ready for JSON."""
        about: dict[str, str | int | float | bool | None] = {"name": self.name, "hash": self.hash, "dimensions": self.dimensions}
        return about | {"accuracy_heldout": self.accuracy_heldout} | asdict(self.training)

    def save(self, path: Path) -> None:
        """Write a safetensors file, all or nothing."""
        about = {**self.provenance(), "shape": self.encoder.shape, "classes": self.encoder.classes}
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        save_file(_state(self.encoder), partial, metadata={_FORMAT: json.dumps(about)})
        os.replace(partial, path)

    def _pieces(self, images: Images, batch: int) -> Iterator[Tensor]:
        if tuple(images.shape[1:]) != self.encoder.shape:
            raise UserError(
                f"the feature network was trained on images of {_size(self.encoder.shape)}, these are {_size(images.shape[1:])};"
                " give images of one size"
            )
        for first in range(0, len(images), batch):
            yield take(images, slice(first, first + batch))


def take(images: Images, rows: slice | NDArray[np.int64]) -> UInt8[Tensor, "_ _ _ _"]:
    """Some of the images as a tensor of their own."""
    if isinstance(images, Tensor):
        return images[rows if isinstance(rows, slice) else torch.from_numpy(rows)]
    return torch.from_numpy(np.array(images[rows]))


def label_tensor(labels: Labels) -> Int[Tensor, " _"]:
    """Labels as an int64 tensor."""
    return labels.long() if isinstance(labels, Tensor) else torch.from_numpy(labels.astype(np.int64))


def name_and_hash(encoder: Encoder) -> tuple[str, str]:
    """The network's name, which says how it was trained, and the SHA-256 of its weights."""
    name = f"self (supervised, {encoder.classes} classes)" if encoder.classes else "self (self-supervised)"
    digest = hashlib.sha256()
    for key, value in sorted(_state(encoder).items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.numpy().tobytes())
    return name, digest.hexdigest()


def load_self(path: Path) -> FeatureNetwork:
    """Read what `FeatureNetwork.save` wrote. UserError for a file that is another's, damaged or of another version."""
    wrong = f"{path} is not a whole feature network of this version; delete it, and it is trained again"
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})[_FORMAT])
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - the file is no dict
        channels, height, width = about["shape"]
        encoder = Encoder(channels, height, width, about["classes"]).eval()
        encoder.load_state_dict(state)
        training = Training(**{key: about[key] for key in Training.__dataclass_fields__})
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(wrong) from error
    name, digest = name_and_hash(encoder)
    if training.recipe != RECIPE or digest != about["hash"]:
        raise UserError(wrong)
    return FeatureNetwork(name, digest, DIMENSIONS, about["accuracy_heldout"], training, encoder)


def _state(encoder: Encoder) -> dict[str, Tensor]:
    return {key: value.detach().cpu().contiguous() for key, value in encoder.state_dict().items()}


def _size(shape: tuple[int, ...]) -> str:
    channels, height, width = shape
    return f"{channels} x {height} x {width} (channels, height, width)"
