"""`--features SPEC`: which network the distances are measured with."""

from __future__ import annotations

from pathlib import Path

import torch

from maskdm.errors import UserError, nearest
from maskdm.evaluation.features import FeatureNetwork
from maskdm.evaluation.inception import cached_inception, download_inception, load_inception
from maskdm.evaluation.onnx_network import load_onnx
from maskdm.evaluation.resnet import load_resnet
from maskdm.evaluation.transformers_network import load_transformers

CHOICES = (
    "self",
    "inception",
    "inception:download",
    "inception:PATH",
    "onnx:PATH",
    "resnet:PATH",
    "dinov2:PATH",
    "clip:PATH",
    "transformers:PATH",
)
"""What a SPEC can be."""


def is_self(spec: str) -> bool:
    """Whether SPEC means the network that is trained on the images themselves (`cached_self`)."""
    return spec == "self"


def load_network(spec: str, cache_dir: Path, device: torch.device) -> FeatureNetwork:
    """The network of a SPEC other than `self`, on the device, ready to use.

    `cache_dir` is where `inception` looks for its weights, and `inception:download` puts them; nothing else is ever fetched.
    UserError for an unknown SPEC, and for a file or folder that is absent, damaged or of another kind.
    """
    kind, _, place = spec.partition(":")
    path = Path(place).expanduser()
    match kind:
        case "inception" if not place:
            return load_inception(cached_inception(cache_dir), device)
        case "inception" if place == "download":
            return load_inception(download_inception(cache_dir), device)
        case "inception":
            return load_inception(path, device)
        case "onnx" if place:
            return load_onnx(place, device)
        case "resnet" if place:
            return load_resnet(path, device)
        case "transformers" | "dinov2" | "clip" if place:
            return load_transformers(kind, path, device)
        case "timm":
            raise UserError(
                f"{spec}: timm needs torchvision, which breaks diffusers beside this torch; export the network to ONNX where timm runs"
                " and give onnx:PATH"
            )
        case _:
            kinds = sorted({choice.partition(":")[0] for choice in CHOICES})
            raise UserError(f"no feature network is called {spec!r}{nearest(kind, kinds)}; choose from {', '.join(CHOICES)}")
