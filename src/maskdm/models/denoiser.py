"""What every network shares: a diffusers model that takes whole images, or only the kept patches and where they sit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.utils import BaseOutput
from jaxtyping import Float, Int, Num
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from maskdm.config import Transform
from maskdm.masking import Kept, Route, put_back
from maskdm.models.dials import Dial, as_batch, make_dials
from maskdm.models.layers import Fusion, Patches, Some, Tokens, patchify, unpatchify

_KEPT = [
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
]
"""What selective recomputation keeps: the dear operations. The rest, elementwise, is most of the memory and little of the time."""

SampleSize = int | tuple[int, int] | list[int]
"""Height and width, or one side; a list when read back from JSON."""

Scales = tuple[float, float] | list[float] | None
"""Range of guidance scales that are a condition; a list when read back from JSON."""


@dataclass
class DenoiserOutput(BaseOutput):
    """The network's output for its target, in the shape of its input."""

    sample: Tensor


class Denoiser(ModelMixin, ConfigMixin):
    """Base of the networks. A subclass embeds and transforms patches in `denoise`; the cost is that of the kept ones."""

    _supports_gradient_checkpointing = True
    gradient_checkpointing = False
    _gradient_checkpointing_func: Any = None

    patch_size: int
    """Side in pixels of what a patch covers: twice that of the configuration where it is of wavelets."""
    num_classes: int
    size: tuple[int, int]
    sets: int
    """Tokens of a patch."""
    fuse: int
    fusion: Fusion | None
    hidden_token: nn.Parameter | None
    guidance_dial: Dial | None
    """Takes the guidance scale, where that is a condition."""
    steps_dial: Dial | None
    """Takes the number of sampling steps, where that is a condition."""

    def _set_geometry(self, sample_size: SampleSize, patch_size: int, num_classes: int, transform: Transform = "pixels") -> None:
        height, width = (sample_size, sample_size) if isinstance(sample_size, int) else tuple(sample_size)
        self.sets = 2 if transform == "haar" else 1
        self.size, self.patch_size, self.num_classes = (height, width), patch_size * self.sets, num_classes
        self.guidance_dial = self.steps_dial = None

    def _set_rejoining(self, width: int, fuse: int, mask_token: bool) -> None:
        self.fuse = fuse
        self.fusion = Fusion(width) if fuse else None
        self.hidden_token = nn.Parameter(0.02 * torch.randn(width)) if mask_token else None

    def _set_dials(self, width: int, dial: Scales, shortcuts: int) -> None:
        self.guidance_dial, self.steps_dial = make_dials(width, dial, shortcuts)

    def _start_dials(self) -> None:
        for each in (self.guidance_dial, self.steps_dial):
            if each is not None:
                each.start()

    def _conditions(self, guidance: Tensor | float, steps: Tensor | float | None, like: Tensor) -> Tensor | None:
        """What the dials add to the embedding of the time [batch, width]; None without any. As many steps as there can be: steps None."""
        parts: list[Tensor] = []
        if self.guidance_dial is not None:
            parts.append(self.guidance_dial(as_batch(guidance, like)))
        if self.steps_dial is not None:
            most = 2.0**self.steps_dial.high
            parts.append(self.steps_dial(self.steps_dial.high - as_batch(most if steps is None else steps, like).log2()))
        return sum(parts[1:], parts[0]) if parts else None

    def _rejoin(self, deep: Some, everything: Tokens, positions: Tensor, kept: Tensor | None, route: Route | None) -> Tokens:
        """All tokens again, after inner blocks on those `kept`, of `everything` that went in."""
        if self.fusion is not None:
            return self.fusion(everything, deep, kept, None if route is None else route.shallow)
        if kept is None:
            return deep
        if self.hidden_token is not None and route is not None and route.first == 0:
            everything = (positions + self.hidden_token).to(deep.dtype).expand_as(everything)
        return put_back(deep, kept, everything)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across."""
        return self.size[0] // self.patch_size, self.size[1] // self.patch_size

    @property
    def tokens(self) -> int:
        """Tokens of a whole image, conditions not counted."""
        return self.grid[0] * self.grid[1] * self.sets

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        class_labels: Int[Tensor, " batch"] | None = None,
        kept: Int[Tensor, "batch kept"] | None = None,
        route: Route | None = None,
        return_dict: bool = True,
        reduced: int = 1,
        guidance: Tensor | float = 1.0,
        steps: Tensor | float | None = None,
    ) -> DenoiserOutput | tuple[Tensor]:
        """Predict the target.

        sample: noisy images [batch, channels, height, width] in about -1..1, or patches [batch, kept, features] as
        `patchify` makes them, then with `kept`, their row-major indices (None: all patches, in order).
        timestep: 0..1000, one for all or [batch]. class_labels: 0..num_classes, where num_classes is the null class,
        which is also what None means; ignored by an unconditional network. route: what the inner blocks work on, in training on
        all patches. reduced: how many times less wide and high than `sample_size` the image is whose patches are given, all in order; each
        sits in the middle of what it covers. guidance: the scale, and steps: the number of sampling steps, one for all or
        [batch], of networks that take them as a condition (`dial`, `shortcuts`); ignored by others. Returns the shape of `sample`, or of
        the patches that a route did not drop.
        """
        whole = sample.ndim == 4
        patches = patchify(sample, self.patch_size) if whole else sample
        t = torch.as_tensor(timestep, device=sample.device).expand(sample.shape[0])
        if self.num_classes and class_labels is None:
            class_labels = torch.full((sample.shape[0],), self.num_classes, device=sample.device)
        if self.sets > 1:
            kept = None if kept is None else self._places(kept)
            if route is not None and route.kept is not None:
                route = replace(route, kept=self._places(route.kept))
        shift = self._conditions(guidance, steps, sample)
        told = () if shift is None else (shift,)
        output = self.denoise(patches, t, class_labels if self.num_classes else None, kept, route, reduced, *told)
        output = unpatchify(output, self.patch_size, self.size) if whole else output
        return DenoiserOutput(sample=output) if return_dict else (output,)

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
        """Predict the target on patches [batch, kept, features]; `kept` and `route` are of tokens. shift: added to the time's embedding."""
        raise NotImplementedError

    def _pooled(self, table: Tensor, factor: int) -> Tensor:
        """Means [patches / factor^2, width] of a table [patches, width] over squares of neighbours."""
        return table if factor == 1 else F.avg_pool2d(table.T.unflatten(1, self.grid), factor).flatten(1).T

    def _places(self, kept: Kept) -> Int[Tensor, "batch tokens"]:
        """Among all tokens, where those of these patches stand: the sets follow one another."""
        patches = self.grid[0] * self.grid[1]
        return torch.cat([kept + number * patches for number in range(self.sets)], dim=1)

    def recompute(self, what: Literal["off", "selective", "all"]) -> None:
        """What a block's backward pass computes again instead of keeping: nothing, all but matrix products and attention, or all."""
        match what:
            case "off":
                self.disable_gradient_checkpointing()
            case "selective":
                context = partial(create_selective_checkpoint_contexts, _KEPT)
                self.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False, context_fn=context))
            case "all":
                self.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False))

    def undecayed(self) -> set[str]:
        """Names of the embeddings and position tables, which weight decay leaves alone; norms and biases are known by shape."""
        return {f"{name}.weight" for name, module in self.named_modules() if isinstance(module, nn.Embedding)}

    def hidden_matrices(self) -> set[str]:
        """Names of the matrices from one hidden state to another: the blocks' linear layers, but for what scales and shifts by the time."""
        return {
            f"{blocks}.{name}.weight"
            for blocks, modules in self.named_modules()
            if isinstance(modules, nn.ModuleList)
            for name, module in modules.named_modules()
            if isinstance(module, nn.Linear) and "modulation" not in name
        }

    def _run(self, block: nn.Module, *inputs: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(block, *inputs)
        return block(*inputs)
