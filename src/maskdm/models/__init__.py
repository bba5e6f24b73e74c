"""The networks: the paper's U-ViT and a modern DiT, both diffusers models that take kept patches by index."""

from __future__ import annotations

from maskdm.config import Data, DiTConfig, Model, UViTConfig
from maskdm.models.autoencoder import encode, open_autoencoder
from maskdm.models.denoiser import Denoiser, DenoiserOutput
from maskdm.models.dit import DiT
from maskdm.models.layers import patchify, unpatchify
from maskdm.models.uvit import UViT
from maskdm.models.wavelet import haar, inverse_haar

__all__ = [
    "Denoiser",
    "DenoiserOutput",
    "DiT",
    "UViT",
    "build",
    "encode",
    "haar",
    "inverse_haar",
    "open_autoencoder",
    "patchify",
    "unpatchify",
]


def build(model: Model, data: Data, num_classes: int) -> Denoiser:
    """The network for images as `data` describes them. num_classes 0: unconditional."""
    size = data.field_size if data.field_size[0] != data.field_size[1] else data.field_size[0]
    match model:
        case UViTConfig():
            return UViT(
                size,
                data.field_channels,
                model.patch,
                model.width,
                model.depth,
                model.heads,
                model.mlp_ratio,
                model.qkv_bias,
                num_classes,
                model.transform,
                model.fuse,
                model.mask_token,
                model.dial,
                model.shortcuts,
            )
        case DiTConfig():
            return DiT(
                size,
                data.field_channels,
                model.patch,
                model.width,
                model.depth,
                model.heads,
                model.mlp_ratio,
                num_classes,
                model.transform,
                model.fuse,
                model.mask_token,
                model.dial,
                model.shortcuts,
            )
