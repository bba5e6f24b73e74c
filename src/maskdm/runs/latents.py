"""Training in the latent space of an autoencoder: images are encoded once, and samples decoded."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from maskdm.config import Config, Data
from maskdm.data import Dataset, Latents, to_model_range
from maskdm.engine import Machine, Ranks
from maskdm.errors import UserError
from maskdm.evaluation import fill
from maskdm.models import encode, open_autoencoder
from maskdm.runs.display import Display
from maskdm.runs.store import cache_directory, state_hash

AT_ONCE = 1 << 20
"""Pixels that are encoded at a time."""

MEASURED = 10_000
"""Images, at most, of which the latents' scale is measured."""


def with_shape(data: Data) -> Data:
    """The settings with what the autoencoder says of its latents. Raises UserError where it does not take such images."""
    if data.autoencoder is None:
        return data
    autoencoder, (height, width) = open_autoencoder(data.autoencoder), data.image_size
    wanted = autoencoder.config["in_channels"]
    if wanted != data.channels:
        raise UserError(f"--autoencoder {data.autoencoder} takes images of {wanted} channels; use --channels {wanted}")
    try:
        shape = encode(autoencoder, torch.zeros(1, data.channels, height, width)).shape
    except RuntimeError:
        shape = torch.Size((1, 1, 0, 0))
    factor = height // shape[2] if shape[2] else 0
    if factor == 0 or (shape[2] * factor, shape[3] * factor) != (height, width):
        raise UserError(f"--autoencoder {data.autoencoder} does not take images of {height}x{width}; use an --image-size such as 64 or 128")
    return replace(data, latent_factor=factor, latent_channels=int(shape[1]))


def with_latents(config: Config, dataset: Dataset, machine: Machine, ranks: Ranks, display: Display) -> tuple[Config, Dataset]:
    """The data set with its latents, and the settings with their scale, measured where it is not known. As they are without an autoencoder.

    Encoded once, by all processes together, and kept; a killed one goes on where it stopped.
    """
    data = config.data
    if data.autoencoder is None:
        return config, dataset
    autoencoder = open_autoencoder(data.autoencoder).to(machine.device)
    views, (height, width) = 2 if data.flip > 0 else 1, data.field_size
    key = hashlib.sha256(f"{dataset.content_hash} {state_hash(autoencoder.state_dict())} {views}".encode()).hexdigest()[:32]
    folder = cache_directory() / "latents"
    folder.mkdir(parents=True, exist_ok=True)
    batch = max(1, AT_ONCE // (data.image_size[0] * data.image_size[1]))

    def make(rows: slice) -> NDArray[np.float16]:
        parts: list[Tensor] = []
        for first in range(rows.start, rows.stop, batch):
            pixels = torch.tensor(dataset.whole[first : min(first + batch, rows.stop)].transpose(0, 3, 1, 2))
            images = to_model_range(pixels.to(machine.device))
            parts.append(torch.stack([encode(autoencoder, x) for x in (images, images.flip(-1))[:views]], dim=1).cpu())
        return torch.cat(parts).numpy().astype(np.float16)

    shape = (len(dataset), views, data.latent_channels, height, width)
    with display.counting("encoding images") as progress:
        values = fill(folder / f"{key}.npy", shape, np.float16, make, ranks, progress)
    if not data.latent_mean:
        rows, _ = dataset.split(data.heldout, config.seed, data.limit)
        some = values[rows[np.linspace(0, len(rows) - 1, min(MEASURED, len(rows))).astype(np.int64)], 0].astype(np.float64)
        mean, std = some.mean(axis=(0, 2, 3)), some.std(axis=(0, 2, 3)).clip(min=1e-4)
        data = replace(data, latent_mean=tuple(map(float, mean)), latent_std=tuple(map(float, std)))
        display.note(f"  latents {shape[2]} x {height} x {width}: deviation of each channel {', '.join(f'{each:.3g}' for each in std)}")
    return replace(config, data=data), replace(dataset, latents=Latents(values, data.latent_mean, data.latent_std))
