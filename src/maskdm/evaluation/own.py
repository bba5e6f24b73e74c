"""The `self` network: trained on the user's own images, so that nothing has to be fetched."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from maskdm.errors import UserError
from maskdm.evaluation.encoder import DIMENSIONS, Encoder
from maskdm.evaluation.features import FeatureNetwork

RECIPE = 2
"""Version of the encoder and its training; a part of the cache key."""

_FORMAT = "maskdm.features"
_CPU = torch.device("cpu")


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
class SelfNetwork(FeatureNetwork):
    """A network trained on the real images, with its own accuracy on held-out ones."""

    accuracy_heldout: float | None
    training: Training
    encoder: Encoder
    device: torch.device

    @classmethod
    def of(cls, encoder: Encoder, accuracy_heldout: float | None, training: Training, device: torch.device) -> SelfNetwork:
        """The network of a trained encoder, which is moved to the device. Its name says how it was trained."""
        name = f"self (supervised, {encoder.classes} classes)" if encoder.classes else "self (self-supervised)"
        height, width = encoder.size
        shrunk = "" if encoder.size == encoder.shape[1:] else f"averaged down to {width} x {height}, "
        preprocessing = f"{shrunk}each channel to mean 0 and deviation 1 over the training images"
        digest = _digest(encoder)
        encoder.to(device)
        return cls(name, digest, DIMENSIONS, encoder.classes, preprocessing, 256, accuracy_heldout, training, encoder, device)

    def embed(self, images: UInt8[Tensor, "n _ _ _"]) -> Float[Tensor, "n 128"]:
        """The encoder's features. UserError for images of another size than the network's."""
        return self.encoder.features(self._prepared(images))

    def scores(self, images: UInt8[Tensor, "n _ _ _"]) -> Float[Tensor, "n _"] | None:
        """The class scores that the encoder was trained with."""
        scores: Tensor = self.encoder.head(self.encoder(self._prepared(images)))
        return scores if self.num_classes else None

    def provenance(self) -> dict[str, str | int | float | bool | None]:
        """As every network's, with accuracy and training."""
        return super().provenance() | {"accuracy_heldout": self.accuracy_heldout} | asdict(self.training)

    def save(self, path: Path) -> None:
        """Write a safetensors file, all or nothing."""
        about = {**self.provenance(), "shape": self.encoder.shape, "classes": self.encoder.classes}
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        save_file(_state(self.encoder), partial, metadata={_FORMAT: json.dumps(about)})
        os.replace(partial, path)

    def _prepared(self, images: Tensor) -> Tensor:
        if tuple(images.shape[1:]) != self.encoder.shape:
            raise UserError(
                f"the feature network was trained on images of {_size(self.encoder.shape)}, these are {_size(images.shape[1:])};"
                " give images of one size"
            )
        return self.encoder.prepare(images.to(self.device))


def load_self(path: Path, device: torch.device = _CPU) -> SelfNetwork:
    """Read what `SelfNetwork.save` wrote. UserError for a file that is another's, damaged or of another version."""
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
    network = SelfNetwork.of(encoder, about["accuracy_heldout"], training, device)
    if training.recipe != RECIPE or network.hash != about["hash"]:
        raise UserError(wrong)
    return network


def _digest(encoder: Encoder) -> str:
    """SHA-256 of the names, types, shapes and values of the weights."""
    digest = hashlib.sha256()
    for key, value in sorted(_state(encoder).items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


def _state(encoder: Encoder) -> dict[str, Tensor]:
    return {key: value.detach().cpu().contiguous() for key, value in encoder.state_dict().items()}


def _size(shape: tuple[int, ...]) -> str:
    channels, height, width = shape
    return f"{channels} x {height} x {width} (channels, height, width)"
