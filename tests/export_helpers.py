"""Small networks of every kind, with weights that are not those of a start: a DiT's output is zero there."""

from __future__ import annotations

import torch

from maskdm.models import DiT, UViT
from maskdm.sampling import MaskDMPipeline, make_scheduler

CLASSES = ["a", "b", "c"]


def networks() -> dict[str, DiT | UViT]:
    torch.manual_seed(0)
    found: dict[str, DiT | UViT] = {
        "dit-classes": DiT(8, 1, 2, 16, 1, 2, num_classes=3),
        "dit-haar-fuse": DiT((8, 16), 3, 2, 16, 3, 2, transform="haar", fuse=1),
        "uvit": UViT(8, 3, 2, 16, 3, 2),
        "uvit-haar-classes": UViT(8, 3, 1, 16, 3, 2, qkv_bias=True, num_classes=3, transform="haar", mask_token=True),
    }
    for network in found.values():
        for parameter in network.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        network.eval()
    return found


def pipeline(network: DiT | UViT) -> MaskDMPipeline:
    made = MaskDMPipeline(network, make_scheduler("ddim", "cosine", "v"), "v", "cosine", CLASSES[: network.num_classes])
    made.set_progress_bar_config(disable=True)
    return made
