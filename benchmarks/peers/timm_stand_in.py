"""The few names that the peers import from timm, which needs torchvision: written from their use, with timm's own arithmetic.

Attention goes through `scaled_dot_product_attention`, as in timm since 0.9: the peers get the fast one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


class Mlp(nn.Module):
    """Linear, activation, linear."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features or in_features)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden_features or in_features, out_features or in_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, dim: int, num_heads: int = 8, qkv_bias: bool = False, **_: Any) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width))


class PatchEmbed(nn.Module):
    """Non-overlapping patches by a strided convolution."""

    def __init__(self, img_size: int = 224, patch_size: int = 16, in_chans: int = 3, embed_dim: int = 768, bias: bool = True) -> None:
        super().__init__()
        self.patch_size = (patch_size, patch_size)
        self.num_patches = (img_size // patch_size) ** 2
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


def install() -> None:
    """Answer `import timm` with these, where the real one is not imported already."""
    if "timm" in sys.modules:
        return
    layers, vision, models, timm = (
        ModuleType(name) for name in ("timm.models.layers", "timm.models.vision_transformer", "timm.models", "timm")
    )
    names = {"Mlp": Mlp, "Attention": Attention, "PatchEmbed": PatchEmbed, "trunc_normal_": nn.init.trunc_normal_}
    for module in (layers, vision):
        vars(module).update(names)
    vars(models).update(layers=layers, vision_transformer=vision)
    vars(timm).update(models=models)
    sys.modules |= {module.__name__: module for module in (layers, vision, models, timm)}
