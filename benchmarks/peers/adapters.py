"""Each peer's network behind one interface. Nothing of theirs is here: a model file is loaded from the clone it lies in."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers import timm_stand_in


@dataclass(frozen=True)
class Shape:
    """What all networks of a table have in common. Square images of `side` pixels.

    classes: labels are 0..classes, the last of them for none; 0: unconditional.
    """

    side: int
    patch: int
    width: int
    depth: int
    heads: int
    channels: int = 3
    classes: int = 0

    @property
    def labels(self) -> int:
        """Rows of a table of labels, that for none among them."""
        return self.classes + 1 if self.classes else 0

    @property
    def tokens(self) -> int:
        """Patches of an image."""
        return (self.side // self.patch) ** 2


@dataclass(frozen=True)
class Peer:
    """A network, and its loss on noised images [batch, 3, side, side], noise, times [batch] (0..999), at a share of hidden patches.

    `masks` says whether it trains on part of the patches at all; `decodes`, whether a decoder then works on all of them.
    """

    network: nn.Module
    loss: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    masks: bool
    decodes: bool = False


@functools.cache
def load_file(path: Path, package: str | None = None) -> ModuleType:
    """Import one Python file; with `package`, as a member of the folder it lies in, for its relative imports."""
    timm_stand_in.install()
    name = f"{package}.{path.stem}" if package else f"peer_{path.stem}"
    if package:
        parent = ModuleType(package)
        parent.__path__ = [str(path.parent)]
        sys.modules[package] = parent
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    with contextlib.redirect_stdout(None):  # one of them says what attention it found
        spec.loader.exec_module(module)
    return module


def _rows_of_patches(images: Tensor, patch: int) -> Tensor:
    """Patches in row-major order as (row, column, channel): what the MaskDM and U-ViT code predicts."""
    batch, channels, height, width = images.shape
    x = images.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, channels * patch**2)


def maskdm_authors(clone: Path, shape: Shape) -> Peer:
    """The authors' MaskDM (github jiachenlei/maskdm): models/mask_uvit.py. It embeds all patches and drops the hidden ones after."""
    module = load_file(clone / "models" / "mask_uvit.py")
    network = module.MaskedUViT(
        img_size=shape.side,
        patch_size=shape.patch,
        in_chans=shape.channels,
        num_classes=shape.labels,
        encoder_embed_dim=shape.width,
        encoder_depth=shape.depth,
        encoder_heads=shape.heads,
    )

    def loss(noised: Tensor, noise: Tensor, t: Tensor, hidden: float) -> Tensor:
        if hidden == 0:
            return F.mse_loss(network(noised, t).float(), noise)
        batch, keep = len(noised), shape.tokens - int(hidden * shape.tokens)
        order = torch.rand(batch, shape.tokens, device=noised.device).argsort(dim=1)
        mask = torch.ones(batch, shape.tokens, dtype=torch.bool, device=noised.device).scatter(1, order[:, :keep], False)
        extras = torch.zeros(batch, network.extras, dtype=torch.bool, device=noised.device)
        output = network(noised, t, mask=torch.cat([extras, mask], dim=1))
        target = _rows_of_patches(noise, shape.patch)[~mask].reshape(output.shape)
        return F.mse_loss(output.float(), target)

    return Peer(network, loss, masks=True)


def uvit(clone: Path, shape: Shape) -> Peer:
    """U-ViT (github baofff/U-ViT): libs/uvit.py, with its final convolution; whole images only."""
    module = load_file(clone / "libs" / "uvit.py", package="peer_uvit_libs")
    network = module.UViT(
        img_size=shape.side,
        patch_size=shape.patch,
        in_chans=shape.channels,
        num_classes=shape.labels,
        embed_dim=shape.width,
        depth=shape.depth,
        num_heads=shape.heads,
    )

    def loss(noised: Tensor, noise: Tensor, t: Tensor, hidden: float) -> Tensor:
        return F.mse_loss(network(noised, t).float(), noise)

    return Peer(network, loss, masks=False)


def _resize_decoder(module: ModuleType, network: Any, shape: Shape, width: int, depth: int) -> None:
    """Give MaskDiT a decoder of other than its fixed size, of its own layers, and begin anew. Heads are 32 wide, as in its own."""
    network.decoder_pos_embed = nn.Parameter(torch.zeros(1, shape.tokens, width), requires_grad=False)
    network.decoder_layer = module.DecoderLayer(shape.width, width)
    network.decoder_blocks = nn.ModuleList(module.DiTBlock(width, shape.width, width // 32) for _ in range(depth))
    network.mask_token = nn.Parameter(torch.zeros(1, 1, width))
    network.final_layer = module.FinalLayer(width, shape.width, shape.patch, shape.channels)
    network.initialize_weights()


def maskdit(clone: Path, shape: Shape, decoder: tuple[int, int] | None = None) -> Peer:
    """MaskDiT (github Anima-Lab/MaskDiT): models/maskdit.py with its weight 0.1 of reconstruction.

    decoder: its width, in multiples of 32, and its blocks; its own 512 and 8 where left out.
    """
    module = load_file(clone / "models" / "maskdit.py")
    network = module.DiT(
        input_size=shape.side,
        patch_size=shape.patch,
        in_channels=shape.channels,
        hidden_size=shape.width,
        depth=shape.depth,
        num_heads=shape.heads,
        num_classes=shape.classes,
        use_decoder=True,
        mae_loss_coef=0.1,
    )
    if decoder is not None:
        _resize_decoder(module, network, shape, *decoder)

    def loss(noised: Tensor, noise: Tensor, t: Tensor, hidden: float) -> Tensor:
        output: dict[str, Any] = network(noised, t.float(), None, mask_ratio=hidden)
        errors = (output["x"].float() - noise).square()
        if hidden == 0:
            return errors.mean()
        per_patch = F.avg_pool2d(errors.mean(dim=1, keepdim=True), shape.patch).flatten(1)
        mask = output["mask"]
        return (per_patch * (1 - mask)).sum() / (1 - mask).sum() + 0.1 * (per_patch * mask).sum() / mask.sum()

    return Peer(network, loss, masks=True, decodes=True)


def sit(clone: Path, shape: Shape) -> Peer:
    """SiT (github willisma/SiT): models.py; whole images only."""
    module = load_file(clone / "models.py")
    network = module.SiT(
        input_size=shape.side,
        patch_size=shape.patch,
        in_channels=3,
        hidden_size=shape.width,
        depth=shape.depth,
        num_heads=shape.heads,
        num_classes=1,
        learn_sigma=False,
    )

    def loss(noised: Tensor, noise: Tensor, t: Tensor, hidden: float) -> Tensor:
        return F.mse_loss(network(noised, t.float(), torch.zeros_like(t)).float(), noise)

    return Peer(network, loss, masks=False)


def unet(shape: Shape) -> Peer:
    """diffusers' UNet2DModel, whose first level is as wide as the shape says, in multiples of 8; whole images only."""
    from diffusers import UNet2DModel

    network: Any = UNet2DModel(
        sample_size=shape.side,
        in_channels=shape.channels,
        out_channels=shape.channels,
        block_out_channels=(shape.width, 2 * shape.width, 2 * shape.width),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        norm_num_groups=8,
        num_class_embeds=shape.labels or None,
    )

    def loss(noised: Tensor, noise: Tensor, t: Tensor, hidden: float) -> Tensor:
        return F.mse_loss(network(noised, t).sample.float(), noise)

    return Peer(network, loss, masks=False)
