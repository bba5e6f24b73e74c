"""U-ViT (arXiv 2209.12152) as MaskDM uses it: every condition a token, long skips, no decoder."""

from __future__ import annotations

import torch
from diffusers.configuration_utils import register_to_config
from jaxtyping import Float, Int, Num
from torch import Tensor, nn

from maskdm.config import Transform
from maskdm.masking import Kept, Route, put_back, span, take
from maskdm.models.denoiser import Denoiser, SampleSize, Scales
from maskdm.models.layers import Attention, GeluMLP, Norm, Patches, Tokens, in_compute_precision, sinusoidal
from maskdm.models.wavelet import embedding, head


class UViTBlock(nn.Module):
    """Pre-norm attention and MLP; with a skip, the input is first joined with an earlier block's output."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, qkv_bias: bool, skip: bool) -> None:
        super().__init__()
        self.skip = nn.Linear(2 * width, width) if skip else None
        self.norm1 = Norm(width)
        self.attention = Attention(width, heads, qkv_bias)
        self.norm2 = Norm(width)
        self.mlp = GeluMLP(width, int(width * mlp_ratio))

    def forward(self, x: Tokens, earlier: Tokens | None = None) -> Tokens:
        """`earlier` is the output of the block that the skip comes from."""
        if self.skip is not None and earlier is not None:
            x = self.skip(torch.cat([x, earlier], dim=-1))
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class UViT(Denoiser):
    """The paper's network.

    Tokens are [class, when conditional] [time] [kept patches], of wavelets [kept approximations] [kept details]. One learned table holds
    the positions of extras and of all patches (of each set), and is read at the kept ones. The time token is a bare sinusoid.
    2 * (depth // 2) + 1 blocks are built.

    sample_size: height and width, or one side, in pixels; a multiple of patch_size, of twice that with
    transform "haar", where a patch is of wavelets (`HaarEmbedding`). num_classes: 0 for unconditional;
    else index num_classes is the null class, trained by dropping labels.
    """

    __module__ = "maskdm"  # the public home, which a saved pipeline names

    @register_to_config
    def __init__(
        self,
        sample_size: SampleSize,
        in_channels: int = 3,
        patch_size: int = 4,
        width: int = 512,
        depth: int = 13,
        heads: int = 8,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        num_classes: int = 0,
        transform: Transform = "pixels",
        fuse: int = 0,
        mask_token: bool = False,
        dial: Scales = None,
        shortcuts: int = 0,
    ) -> None:
        super().__init__()
        self._set_geometry(sample_size, patch_size, num_classes, transform)
        self.num_extras = 2 if num_classes else 1
        self.patch_embedding = embedding(transform, in_channels, patch_size, width)
        self.class_embedding = nn.Embedding(num_classes + 1, width) if num_classes else None
        self.positions = nn.Embedding(self.num_extras + self.tokens, width)

        def block(skip: bool) -> UViTBlock:
            return UViTBlock(width, heads, mlp_ratio, qkv_bias, skip)

        self.down_blocks = nn.ModuleList(block(skip=False) for _ in range(depth // 2))
        self.middle_block = block(skip=False)
        self.up_blocks = nn.ModuleList(block(skip=True) for _ in range(depth // 2))
        self._set_rejoining(width, fuse, mask_token)
        self._set_dials(width, dial, shortcuts)
        self.norm = Norm(width)
        self.out = head(transform, width, in_channels, patch_size)
        self.apply(_initialize)
        if self.fusion is not None:
            self.fusion.start()
        self._start_dials()
        self.patch_embedding.reset_parameters()  # the published code leaves the patch embedding at the framework's default

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
        x = self.patch_embedding(patches)
        table = self.positions.weight
        x = x + (self._pooled(table[self.num_extras :], reduced) if kept is None else self.positions(kept + self.num_extras))
        time = sinusoidal(t, x.shape[-1])
        extras = [time if shift is None else time + shift]
        if self.class_embedding is not None and labels is not None:
            extras.insert(0, self._class(self.class_embedding, labels))
        x = in_compute_precision(torch.cat([torch.stack(extras, dim=1) + table[: self.num_extras], x], dim=1))
        inner = None if route is None or route.kept is None else self._with_extras(route.kept)
        skips: list[Tensor] = []  # a literal: torch.compile stops at list[Tensor]()
        everything, count = x, 2 * len(self.down_blocks) + 1
        first, end = span(route, self.fuse, count)
        for number, block in enumerate((*self.down_blocks, self.middle_block, *self.up_blocks)):
            if number == first:
                everything, x = x, take(x, inner)
            if number == end:
                x = self._rejoin(x, everything, table, inner, route)
            if not x.shape[1]:  # passed by
                continue
            if number <= count // 2:
                x = self._run(block, x)
                skips.append(x)
            else:
                skip = skips[count - 1 - number]
                if inner is not None and skip.shape[1] != x.shape[1]:
                    skip = take(skip, inner) if skip.shape[1] > x.shape[1] else put_back(skip, inner, torch.zeros_like(x))
                x = self._run(block, x, skip)
        return self.out(self.norm(x[:, self.num_extras :]))

    def _with_extras(self, kept: Kept) -> Int[Tensor, "batch tokens"]:
        """Places of these patches among all tokens, after those of the extras; none where no patch is left."""
        extras = torch.arange(self.num_extras if kept.shape[1] else 0, device=kept.device).expand(len(kept), -1)
        return torch.cat([extras, kept + self.num_extras], dim=1)


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.trunc_normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:  # pyright: ignore[reportUnnecessaryComparison] - torch's type leaves the None out
        nn.init.zeros_(module.bias)
