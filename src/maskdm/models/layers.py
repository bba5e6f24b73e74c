"""What both networks are made of: patches, embeddings, attention, MLPs. Written from the papers."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Num
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from maskdm.masking import put_back

Tokens = Float[Tensor, "batch tokens width"]
Some = Float[Tensor, "batch kept width"]
Patches = Float[Tensor, "batch patches features"]
Heads = Float[Tensor, "batch heads tokens per_head"]


def patchify(images: Num[Tensor, "batch channels height width"], patch: int) -> Num[Tensor, "batch patches features"]:
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
    """2-D rotary embedding: half the channels of a head turn with the row, half with the column (arXiv 2104.09864).

    `sets` tokens sit at each patch, a set after the other.
    """

    angles: Tensor

    def __init__(self, per_head: int, grid: tuple[int, int], sets: int = 1) -> None:
        super().__init__()
        rates = 100.0 ** -(torch.arange(per_head // 4, dtype=torch.float32) / (per_head // 4))
        row, column = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
        angles = torch.cat([row.flatten()[:, None] * rates, column.flatten()[:, None] * rates], dim=1)
        self.register_buffer("angles", angles.repeat(sets, 1), persistent=False)

    def forward(self, kept: Int[Tensor, "batch kept"] | None) -> tuple[Tensor, Tensor]:
        """Cosines and sines [batch or 1, 1, tokens, per_head // 2] of the kept tokens, or of all."""
        return turned(self.angles[None] if kept is None else self.angles[kept])


def turned(angles: Float[Tensor, "batch tokens half"]) -> tuple[Tensor, Tensor]:
    """Cosines and sines of angles, for all heads."""
    return angles.cos()[:, None], angles.sin()[:, None]


class _Rotation(torch.autograd.Function):
    """Its gradient is the rotation back, of which plain operations would keep and multiply six half-sized pieces."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, -sin), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    y = torch.empty_like(x)
    first, second = y.chunk(2, dim=-1)
    torch.mul(a, cos, out=first).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=second).addcmul_(a, sin)
    return y


def rotate(x: Heads, turn: tuple[Tensor, Tensor]) -> Heads:
    """Turn channel pairs (i, i + half) by the angles of their token."""
    return _Rotation.apply(x, turn[0].to(x.dtype), turn[1].to(x.dtype))  # pyright: ignore[reportUnknownMemberType, reportReturnType]


def in_compute_precision(x: Tensor) -> Tensor:
    """`x` in the precision of autocast, where it is on: tokens stay in it from block to block."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


class Norm(nn.LayerNorm):
    """Layer normalisation that leaves its input's precision as it is, where autocast would go to fp32 and back. It sums in fp32."""

    def forward(self, input: Tensor) -> Tensor:
        """Over the last dimension."""
        weight, bias = (None if p is None else p.to(input.dtype) for p in (self.weight, self.bias))  # pyright: ignore[reportUnnecessaryComparison] - torch's type leaves the None out
        with torch.autocast(input.device.type, enabled=False):
            return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


class _RootMeanSquare(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) in two passes over x and its gradient in four, where torch's for a CPU takes a dozen, in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        mean = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide).square_().div_(x.shape[-1])
        scale = mean.add_(eps).rsqrt_().to(x.dtype)
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        y, scale = ctx.saved_tensors
        along = (grad * y).mean(dim=-1, keepdim=True)
        return torch.addcmul(grad, y, along, value=-1).mul_(scale), None


class RMSNorm(nn.Module):
    """Root-mean-square normalisation without a weight (arXiv 1910.07467), in the precision of its input; the squares are summed in fp32."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.width, self.eps = width, eps

    def forward(self, x: Tensor) -> Tensor:
        """Over the last dimension."""
        with torch.autocast(x.device.type, enabled=False):
            if x.device.type == "cpu":
                return _RootMeanSquare.apply(x, self.eps)  # pyright: ignore[reportUnknownMemberType, reportReturnType]
            return F.rms_norm(x, (self.width,), None, self.eps)


MOST_SCORES = 1 << 28
"""Scores of a batch that are kept for the backward pass at once: half a GiB in bf16."""


def attend(q: Heads, k: Heads, v: Heads) -> Heads:
    """softmax(q k^T / sqrt(per_head)) v: torch's fused attention, but for bf16 on a CPU, where that is slow.

    There two plain products and a softmax take half to a quarter of its time (docs/performance.md). They keep all scores,
    which is affordable up to some number of them.
    """
    shape, (tokens, per_head) = q.shape[:2], q.shape[2:]
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or shape.numel() * tokens**2 > MOST_SCORES:
        return F.scaled_dot_product_attention(q, k, v)
    with torch.autocast("cpu", enabled=False):
        q, k, v = q.flatten(0, 1) * per_head**-0.5, k.flatten(0, 1), v.flatten(0, 1)
        scores = q @ k.transpose(1, 2)
        spare = -tokens % 16
        if spare and tokens < 64:  # softmax is vectorised over whole registers only, which matters to short rows
            scores, v = F.pad(scores, (0, spare), value=float("-inf")), F.pad(v, (0, 0, 0, spare))
        return (scores.softmax(dim=-1) @ v).unflatten(0, shape)


class Attention(nn.Module):
    """Multi-head self-attention. With `normalize`, queries and keys are layer-normalised per head (arXiv 2302.05442)."""

    def __init__(self, width: int, heads: int, qkv_bias: bool, normalize: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.norm_q = Norm(width // heads, eps=1e-6, bias=False) if normalize else nn.Identity()
        self.norm_k = Norm(width // heads, eps=1e-6, bias=False) if normalize else nn.Identity()
        self.out = nn.Linear(width, width)

    def forward(self, x: Tokens, turn: tuple[Tensor, Tensor] | None = None) -> Tokens:
        """Attend among all tokens, with rotary positions where `turn` is given."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.norm_q(q), self.norm_k(k)
        if turn is not None:
            q, k = rotate(q, turn), rotate(k, turn)
        return self.out(attend(q, k, v.to(q.dtype)).transpose(1, 2).flatten(2))


class Fusion(nn.Module):
    """Joins what the first blocks made of all patches with what inner ones made of some of them (SPRINT, arXiv 2510.21986, section 3).

    A learned token stands for the others. At the start it is the mean of both.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(width))
        self.join = nn.Linear(2 * width, width)

    def start(self) -> None:
        """Initialise."""
        half = 0.5 * torch.eye(self.join.out_features)
        self.join.weight.data.copy_(torch.cat([half, half], dim=1))
        nn.init.zeros_(self.join.bias)
        nn.init.normal_(self.token, std=0.02)

    def forward(self, everything: Tokens, deep: Some, kept: Int[Tensor, "batch kept"] | None, shallow: Tensor | None) -> Tokens:
        """`deep` are the tokens `kept` (None: all), and count for nothing in the images `shallow`."""
        token = self.token.to(deep.dtype).expand_as(everything)
        if kept is not None:
            deep = put_back(deep, kept, token)
        if shallow is not None:
            deep = torch.where(shallow[:, None, None], token, deep)
        return self.join(torch.cat([everything, deep], dim=-1))


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
