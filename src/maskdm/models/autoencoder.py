"""Autoencoders of diffusers, whose latents a network may learn in place of pixels."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskdm.errors import UserError

KINDS = ("AutoencoderKL", "AutoencoderDC")


@cache
def open_autoencoder(path: str) -> Any:
    """A diffusers autoencoder from a folder, or by its name on the hub. Raises UserError."""
    from diffusers import AutoModel

    folder = Path(path) / "vae" if (Path(path) / "vae" / "config.json").is_file() else Path(path)  # a pipeline's folder has it there
    try:
        found: Any = AutoModel.from_pretrained(str(folder), use_safetensors=True)
    except (OSError, ValueError, AttributeError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"--autoencoder {path} cannot be opened ({reason}); give the folder of a diffusers autoencoder, or its hub id"
        ) from None
    if type(found).__name__ not in KINDS:
        raise UserError(f"--autoencoder {path} is a {type(found).__name__}; give one of {', '.join(KINDS)}")
    return found.requires_grad_(False).eval()


@torch.no_grad()
def encode(autoencoder: Any, images: Tensor) -> Tensor:
    """Latents of images [batch, channels, height, width] in -1..1: the mean, where the autoencoder has a distribution."""
    found = autoencoder.encode(images)
    return found.latent_dist.mode() if hasattr(found, "latent_dist") else found.latent
