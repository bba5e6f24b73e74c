"""Other people's networks as denoisers of ours: the same contract, so that our training, averages and measures work on them."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.peers import adapters
from benchmarks.peers.adapters import Peer, Shape
from maskdm.config import Diffusion
from maskdm.diffusion import convert
from maskdm.errors import UserError
from maskdm.masking import Route
from maskdm.models import Denoiser, patchify, unpatchify


class PeerDenoiser(Denoiser):
    """A network that takes whole noisy images [batch, channels, side, side], times [batch] in 0..1000, and labels or None.

    A subclass is made from a clone of someone's code, a shape, and the noise and target that it is trained with.

    Patches are put together for it and its output is cut again, the same arithmetic: what it computes is what its own code computes.
    """

    def __init__(self, peer: Peer, shape: Shape) -> None:
        super().__init__()
        self.network: Any = peer.network
        self.register_to_config(in_channels=shape.channels)
        self._set_geometry(shape.side, shape.patch, shape.classes)
        self._set_rejoining(shape.width, fuse=0, mask_token=False)

    def denoise(
        self, patches: Tensor, t: Tensor, labels: Tensor | None, kept: Tensor | None, route: Route | None = None, reduced: int = 1
    ) -> Tensor:
        """As `Denoiser.denoise`. Raises ValueError for kept patches: this network takes whole images only."""
        if kept is not None:
            raise ValueError(f"{type(self).__name__} takes whole images only")
        return patchify(self.whole(unpatchify(patches, self.patch_size, self.size), t, labels), self.patch_size)

    def whole(self, images: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        """The output for whole images."""
        return self.ask(images, t, y=labels)

    def ask(self, images: Tensor, t: Tensor, **more: Any) -> Any:
        """The network's answer. On a CPU attention is torch's plain one: its fused one makes a step in bf16 up to 1.6 times as long."""
        with sdpa_kernel(SDPBackend.MATH) if images.device.type == "cpu" else contextlib.nullcontext():
            return self.network(images, t.float(), **more)

    def undecayed(self) -> set[str]:
        """Embeddings, and what the peer's own code leaves alone."""
        own: set[str] = self.network.no_weight_decay() if hasattr(self.network, "no_weight_decay") else set()
        # the authors' code returns the name within its encoder
        return super().undecayed() | {name for name, _ in self.named_parameters() if name.rpartition(".")[2] in own}

    def recompute(self, what: Literal["off", "selective", "all"]) -> None:
        """Only "off": their blocks know no recomputation of ours. Raises UserError."""
        if what != "off":
            raise UserError(f"hardware.checkpoint_activations {what} is ours alone, which peers cannot follow; set it to off")


class UViT(PeerDenoiser):
    """U-ViT (github baofff/U-ViT)."""

    def __init__(self, clone: Path, shape: Shape, diffusion: Diffusion) -> None:
        super().__init__(adapters.uvit(clone, shape), shape)


class Authors(PeerDenoiser):
    """The authors' MaskDM (github jiachenlei/maskdm): kept patches go through it alone, as it trains on them itself."""

    def __init__(self, clone: Path, shape: Shape, diffusion: Diffusion) -> None:
        super().__init__(adapters.maskdm_authors(clone, shape), shape)

    def denoise(
        self, patches: Tensor, t: Tensor, labels: Tensor | None, kept: Tensor | None, route: Route | None = None, reduced: int = 1
    ) -> Tensor:
        """As `Denoiser.denoise`. It embeds a whole image and drops the hidden patches then, whose content plays no part."""
        if kept is None:
            return super().denoise(patches, t, labels, None)
        batch, features = len(patches), patches.shape[2]
        everything = patches.new_zeros(batch, self.tokens, features)
        images = unpatchify(everything.scatter(1, kept[..., None].expand_as(patches), patches), self.patch_size, self.size)
        hidden = torch.ones(batch, self.tokens, dtype=torch.bool, device=patches.device).scatter(1, kept, False)
        extras = hidden.new_zeros(batch, self.network.extras)
        output = self.ask(images, t, mask=torch.cat([extras, hidden], dim=1), y=labels)
        # its patches are flattened as (row, column, channel), ours as (channel, row, column)
        return output.unflatten(2, (self.patch_size**2, -1)).transpose(2, 3).flatten(2)


class MaskDiT(PeerDenoiser):
    """MaskDiT (github Anima-Lab/MaskDiT), with a decoder as large beside the rest as in its published DiT-XL/2.

    There it is 512 wide beside 1152 and 8 blocks deep beside 28. Its masked training is a route of ours (mask `decode`): the
    blocks see the kept patches, the decoder all, and the loss is theirs, with 0.1 times the reconstruction of each hidden patch,
    normalised. As theirs, it is read off the predicted image, except for the target eps, whose image is unknowable at full noise.
    """

    def __init__(self, clone: Path, shape: Shape, diffusion: Diffusion) -> None:
        super().__init__(adapters.maskdit(clone, shape, decoder_of(shape)), shape)
        self.diffusion = diffusion

    def denoise(
        self, patches: Tensor, t: Tensor, labels: Tensor | None, kept: Tensor | None, route: Route | None = None, reduced: int = 1
    ) -> Tensor:
        """As `Denoiser.denoise`; a route keeps patches from all blocks but the decoder's, and of those the output is the image."""
        if route is None or route.kept is None:
            return super().denoise(patches, t, labels, kept)
        hidden = patches.new_ones(patches.shape[:2]).scatter(1, route.kept, 0.0)
        order = hidden.argsort(dim=1, stable=True)
        mask = {"mask": hidden, "ids_keep": route.kept, "ids_restore": order.argsort(dim=1)}
        images = unpatchify(patches, self.patch_size, self.size)
        share = 1 - route.kept.shape[1] / patches.shape[1]
        output = self.ask(images, t, y=self._classes(labels), mask_ratio=share, mask_dict=mask)
        predicted = patchify(output["x"], self.patch_size)
        if self.diffusion.target == "eps":
            return predicted
        image = convert(self.diffusion.schedule, self.diffusion.target, predicted, patches, t).x0
        return torch.where(hidden.bool()[..., None], image, predicted)

    def whole(self, images: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        """The output for whole images."""
        return self.ask(images, t, y=self._classes(labels))["x"]

    def _classes(self, labels: Tensor | None) -> Tensor | None:
        """As it takes them: a one for the class, and only zeros for none."""
        return None if labels is None else F.one_hot(labels, self.num_classes + 1)[:, :-1].float()

    def undecayed(self) -> set[str]:
        """The learned token and the table of classes, which is a linear layer here."""
        return super().undecayed() | {"network.mask_token", "network.y_embedder.embedding_table.weight"}


class UNet(PeerDenoiser):
    """diffusers' UNet2DModel."""

    def __init__(self, clone: Path | None, shape: Shape, diffusion: Diffusion) -> None:
        super().__init__(adapters.unet(shape), shape)

    def whole(self, images: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        """The output for whole images."""
        return self.ask(images, t, class_labels=labels).sample

    def hidden_matrices(self) -> set[str]:
        """Attention's alone: most of it are convolutions, and what shifts by the time is no map between hidden states."""
        return {name for name in super().hidden_matrices() if "time_emb" not in name}


def decoder_of(shape: Shape) -> tuple[int, int]:
    """Width and blocks of MaskDiT's decoder, in its published proportion, the width in multiples of its 32 a head."""
    return max(32, round(shape.width * 512 / 1152 / 32) * 32), max(1, round(shape.depth * 8 / 28))
