"""What both networks are made of: patches, embeddings, attention, MLPs. Written from the papers."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Num
from torch import Tensor, nn

Tokens = Float[Tensor, "batch tokens width"]
Patches = Float[Tensor, "batch patches features"]


def patchify(images: Float[Tensor, "batch channels height width"], patch: int) -> Patches:
    """Images as patches in row-major order, each flattened as (channel, row, column)."""
    batch, channels, height, width = images.shape
    x = images.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * patch**2)


def unpatchify(patches: Patches, patch: int, size: tuple[int, int]) -> Float[Tensor, "batch channels height width"]:
    """The inverse of `patchify` for images of size (height, width)."""
    batch, _, features = patches.shape
    down, across, channels = size[0] // patch, size[1] // patch, features // patch**2
    x = patches.reshape(batch, down, across, channels, patch, patch)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, *size)


def sinusoidal(t: Num[Tensor, " batch"], width: int) -> Float[Tensor, "batch width"]:
    """Sines and cosines of t at geometric frequencies from 1 down to 1e-4 (arXiv 1706.03762, section 3.5)."""
    rates = torch.exp(-math.log(10_000) * torch.arange(width // 2, device=t.device, dtype=torch.float32) / (width // 2))
    angles = t.float()[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class RotaryPositions(nn.Module):
    """2-D rotary embedding: half the channels of a head turn with the row, half with the column (arXiv 2104.09864)."""

    angles: Tensor

    def __init__(self, per_head: int, grid: tuple[int, int]) -> None:
        super().__init__()
        rates = 100.0 ** -(torch.arange(per_head // 4, dtype=torch.float32) / (per_head // 4))
        row, column = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
        angles = torch.cat([row.flatten()[:, None] * rates, column.flatten()[:, None] * rates], dim=1)
        self.register_buffer("angles", angles, persistent=False)

    def forward(self, kept: Int[Tensor, "batch kept"] | None) -> tuple[Tensor, Tensor]:
        """Cosines and sines [batch or 1, 1, tokens, per_head // 2] at the kept patches, or at all of them."""
        angles = self.angles[None] if kept is None else self.angles[kept]
        return angles.cos()[:, None], angles.sin()[:, None]


def rotate(x: Float[Tensor, "batch heads tokens per_head"], turn: tuple[Tensor, Tensor]) -> Float[Tensor, "batch heads tokens per_head"]:
    """Turn channel pairs (i, i + half) by the angles of their token."""
    cos, sin = turn[0].to(x.dtype), turn[1].to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class HeadNorm(nn.RMSNorm):
    """RMS normalisation in the precision of its input: autocast leaves the weight in fp32, which the fused kernel refuses."""

    def forward(self, x: Tensor) -> Tensor:
        """Over the last dimension."""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Multi-head self-attention. With `normalize`, queries and keys are RMS-normalised per head (arXiv 2302.05442)."""

    def __init__(self, width: int, heads: int, qkv_bias: bool, normalize: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.norm_q = HeadNorm(width // heads, eps=1e-6) if normalize else nn.Identity()
        self.norm_k = HeadNorm(width // heads, eps=1e-6) if normalize else nn.Identity()
        self.out = nn.Linear(width, width)

    def forward(self, x: Tokens, turn: tuple[Tensor, Tensor] | None = None) -> Tokens:
        """Attend among all tokens, with rotary positions where `turn` is given."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.norm_q(q), self.norm_k(k)
        if turn is not None:
            q, k = rotate(q, turn), rotate(k, turn)
        x = F.scaled_dot_product_attention(q, k, v.to(q.dtype))
        return self.out(x.transpose(1, 2).flatten(2))


class GeluMLP(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tokens) -> Tokens:
        """Each token by itself."""
        return self.down(F.gelu(self.up(x)))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), gate and up in one matrix (arXiv 2002.05202)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tokens) -> Tokens:
        """Each token by itself."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)
