"""A modern diffusion transformer: adaLN-zero (arXiv 2212.09748), RMSNorm, 2-D RoPE, QK-norm, SwiGLU."""

from __future__ import annotations

import torch
from diffusers.configuration_utils import register_to_config
from jaxtyping import Float, Num
from torch import Tensor, nn

from maskdm.config import Transform, swiglu_width
from maskdm.masking import Route, span, take
from maskdm.models.denoiser import Denoiser, SampleSize, Scales
from maskdm.models.layers import Attention, Patches, RMSNorm, RotaryPositions, SwiGLU, Tokens, in_compute_precision, sinusoidal, turned
from maskdm.models.wavelet import embedding, head


def _modulate(x: Tokens, scale: Tensor, shift: Tensor) -> Tokens:
    return torch.addcmul(shift, x, 1 + scale)


class DiTBlock(nn.Module):
    """Attention and MLP, each scaled, shifted and gated by the condition; the identity at the start of training."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = RMSNorm(width)
        self.attention = Attention(width, heads, qkv_bias=False, normalize=True)
        self.norm2 = RMSNorm(width)
        self.mlp = SwiGLU(width, swiglu_width(width, mlp_ratio))
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tokens, condition: Float[Tensor, "batch width"], turn: tuple[Tensor, Tensor]) -> Tokens:
        """Tokens and their condition; `turn` as `RotaryPositions` gives it."""
        scale1, shift1, gate1, scale2, shift2, gate2 = self.modulation(condition)[:, None].chunk(6, dim=-1)
        x = torch.addcmul(x, gate1, self.attention(_modulate(self.norm1(x), scale1, shift1), turn))
        return torch.addcmul(x, gate2, self.mlp(_modulate(self.norm2(x), scale2, shift2)))


class DiT(Denoiser):
    """The modern network, with the same contract and settings as `UViT`.

    Rotary positions are relative; a fixed 2-D sinusoid added to each patch says where it sits absolutely, which a masked
    sequence cannot infer. Neither is learned, so both are right at any image size.
    """

    __module__ = "maskdm"  # the public home, which a saved pipeline names

    @register_to_config
    def __init__(
        self,
        sample_size: SampleSize,
        in_channels: int = 3,
        patch_size: int = 4,
        width: int = 384,
        depth: int = 12,
        heads: int = 6,
        mlp_ratio: float = 4.0,
        num_classes: int = 0,
        transform: Transform = "pixels",
        fuse: int = 0,
        mask_token: bool = False,
        dial: Scales = None,
        shortcuts: int = 0,
    ) -> None:
        super().__init__()
        self._set_geometry(sample_size, patch_size, num_classes, transform)
        self.patch_embedding = embedding(transform, in_channels, patch_size, width)
        self.time_embedding = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.class_embedding = nn.Embedding(num_classes + 1, width) if num_classes else None
        self.register_buffer("positions", _absolute_positions(self.grid, width).repeat(self.sets, 1), persistent=False)
        self.rotary = RotaryPositions(width // heads, self.grid, self.sets)
        self.blocks = nn.ModuleList(DiTBlock(width, heads, mlp_ratio) for _ in range(depth))
        self._set_rejoining(width, fuse, mask_token)
        self._set_dials(width, dial, shortcuts)
        self.norm = RMSNorm(width)
        self.modulation = nn.Linear(width, 2 * width)
        self.out = head(transform, width, in_channels, patch_size)
        self._initialize()

    positions: Tensor

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:  # pyright: ignore[reportUnnecessaryComparison] - torch's type leaves the None out
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for block in self.blocks:
            assert isinstance(block, DiTBlock)
            nn.init.zeros_(block.modulation.weight)
        for layer in (self.modulation, *self.out.modules()):
            if isinstance(layer, nn.Linear):
                nn.init.zeros_(layer.weight)
        if self.fusion is not None:
            self.fusion.start()
        self._start_dials()

    def denoise(
        self,
        patches: Patches,
        t: Num[Tensor, " batch"],
        labels: Tensor | None,
        kept: Tensor | None,
        route: Route | None = None,
        reduced: int = 1,
        shift: Tensor | None = None,
    ) -> Float[Tensor, "batch out features"]:
        """As `Denoiser.denoise`."""
        positions = self._pooled(self.positions, reduced) if kept is None else self.positions[kept]
        x = in_compute_precision(self.patch_embedding(patches) + positions)
        condition = self.time_embedding(sinusoidal(t, 256))
        if self.class_embedding is not None and labels is not None:
            condition = condition + self.class_embedding(labels)
        condition = nn.functional.silu(condition if shift is None else condition + shift)
        turn = self.rotary(kept) if reduced == 1 else turned(self._pooled(self.rotary.angles, reduced)[None])
        everything, whole_turn = x, turn
        first, end = span(route, self.fuse, len(self.blocks))
        for number, block in enumerate(self.blocks):
            if number == first:
                everything = x
                if route is not None and route.kept is not None:
                    x, turn = take(x, route.kept), self.rotary(route.kept)
            if number == end:
                x, turn = self._rejoin(x, everything, positions, None if route is None else route.kept, route), whole_turn
            if x.shape[1]:
                x = self._run(block, x, condition, turn)
        return self.out(_modulate(self.norm(x), *self.modulation(condition)[:, None].chunk(2, dim=-1)))


def _absolute_positions(grid: tuple[int, int], width: int) -> Float[Tensor, "patches width"]:
    """Sinusoids of row and column, a quarter of the width each for the sines and cosines of each."""
    row, column = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    half = width // 4 * 2
    table = torch.cat([sinusoidal(row.flatten(), half), sinusoidal(column.flatten(), half)], dim=1)
    return nn.functional.pad(table, (0, width - table.shape[1]))
