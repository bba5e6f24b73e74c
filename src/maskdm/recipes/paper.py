"""The paper's runs (arXiv 2306.11363, versions 1 to 4, and the configurations that its authors published), for a GPU and days.

Figures are theirs; what they left open says so. What deviates, here and in all of them alike, is listed in docs/recipes.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Literal

from maskdm.config import (
    BlockMask,
    Budget,
    Config,
    CropMask,
    Data,
    Diffusion,
    Ema,
    Intervals,
    Mask,
    Model,
    Optimizer,
    PatchMask,
    Sampling,
    Stage,
    UViTConfig,
)

S = UViTConfig(width=512, depth=13, heads=8)
B = UViTConfig(width=768, depth=12, heads=12)
L = UViTConfig(width=1024, depth=16, heads=16, qkv_bias=True)

STEPS = Budget(steps=200_000)
"""Of every pre-training and ablation; and, where the paper does not say how long a stage is, our choice."""

HIDDEN = BlockMask(0.9, 4)
"""The paper's own mask: 90 % in blocks of 4 x 4 patches; 87.5 % in truth on a grid of 16 x 16."""

ABLATION: dict[str, Mask] = {
    **{f"patch-{rate}": PatchMask(rate / 100) for rate in (10, 50, 90)},
    **{f"block{size}-{rate}": BlockMask(rate / 100, size) for size in (2, 4) for rate in (10, 50, 90)},
    "block8-50": BlockMask(0.5, 8),
    **{f"crop-{rate}": CropMask(size) for rate, size in ((10, 15), (50, 11), (90, 5))},
}
"""Types and rates of mask that were compared on CelebA at 64 px, by the names of the authors' thirteen configurations."""


def _run(
    source: str,
    side: int,
    model: Model,
    *stages: Stage,
    schedule: Literal["linear", "cosine"] = "cosine",
    clip: float | None = 1.0,
    flip: float = 0.0,
    decay: float = 0.999,
    heldout: float = 0.01,
) -> Config:
    """What all of them share: the noise as target, uniform steps, AdamW, DDIM with 250 steps and eta 1."""
    return Config(
        data=Data(source=source, image_size=(side, side), flip=flip, heldout=heldout),
        model=model,
        stages=stages,
        diffusion=Diffusion(schedule=schedule, target="eps"),
        optimizer=Optimizer(betas=(0.99, 0.99), weight_decay=0.03, clip=clip),
        ema=Ema(decay=decay),
        intervals=Intervals(log=100, evaluate=10_000, sample=10_000, save=1_000),
        sampling=Sampling(scheduler="ddim", steps=250, eta=1.0, num=16),
    )


def celeba64(source: str, mask: Mask = HIDDEN) -> Config:
    """CelebA at 64 px: a mask of the ablation, then whole images, no clipping; `maskdm train ./celeba --recipe celeba64 --out DIR`."""
    pretrain = Stage("pretrain", STEPS, mask, batch=256, lr=2e-4)
    finetune = Stage("finetune", STEPS, batch=128, lr=2e-4)
    return _run(source, 64, S, pretrain, finetune, schedule="linear", clip=None)


def celeba64_scratch(source: str) -> Config:
    """CelebA at 64 px on whole images alone, which `celeba64` is compared with."""
    return _run(source, 64, S, Stage("whole", STEPS, batch=128, lr=2e-4), schedule="linear", clip=None)


CELEBAHQ = (
    Stage("pretrain", STEPS, HIDDEN, batch=256, lr=2e-4),
    Stage("finetune", STEPS, batch=32, lr=1e-5, warmup=5000),
)


def celebahq256(source: str) -> Config:
    """CelebA-HQ at 256 px: 90 % hidden, then whole images, whose steps the paper does not give; FID 6.27 in the paper."""
    return _run(source, 256, B, *CELEBAHQ)


def celebahq256_chain(source: str) -> Config:
    """CelebA-HQ at 256 px by 90 %, 50 % and 0 % hidden, as published; whether they were run as one chain, and how long, is not known."""
    middle = Stage("middle", STEPS, BlockMask(0.5, 4), batch=64, lr=2e-4, warmup=5000)
    return _run(source, 256, B, CELEBAHQ[0], middle, CELEBAHQ[1])


def church256(source: str) -> Config:
    """LSUN Church at 256 px. Only the stage on whole images is published: the pre-training is CelebA-HQ's, and both lengths are ours."""
    finetune = Stage("finetune", STEPS, batch=64, lr=1e-4, warmup=5000)
    return _run(source, 256, B, CELEBAHQ[0], finetune, schedule="linear", flip=0.5, decay=0.9999)


def vggface2_transfer(source: str) -> Config:
    """VGGFace2 at 256 px, masked alone: the run for `celebahq256-finetune-10` and `-1` to start from, with --init."""
    return _run(source, 256, S, CELEBAHQ[0])


def celebahq256_finetune(source: str, steps: int) -> Config:
    """A tenth or a hundredth of CelebA-HQ on whole images; --init the run of `vggface2-transfer`, without it the paper's scratch.

    `source` holds just these images (3 000 or 300). The steps are ours: some 1 000 passes.
    """
    stage = Stage("finetune", Budget(steps=steps), batch=64, lr=5e-5)
    return _run(source, 256, S, stage, clip=None, flip=0.5, heldout=0.05)


def wavelet_l(source: str) -> Config:
    """CelebA-HQ at 256 px in one-level Haar wavelets: 70 % of the patches hidden, then whole images.

    The authors' average is 0.999 at every tenth step, which is 0.9999 a step. One mask serves approximation and detail (theirs
    were drawn apart), and the loss is of pixels (theirs counts a detail coefficient a third as much as one of the approximation).
    """
    pretrain = Stage("pretrain", STEPS, PatchMask(0.7), batch=128, lr=1e-4)
    finetune = Stage("finetune", Budget(steps=550_000), batch=16, lr=5e-5)
    return _run(source, 256, replace(L, transform="haar"), pretrain, finetune, flip=0.5, decay=0.9999)


PAPER: dict[str, Callable[[str], Config]] = {
    "celeba64": celeba64,
    **{f"celeba64-{name}": partial(celeba64, mask=mask) for name, mask in ABLATION.items()},
    "celeba64-scratch": celeba64_scratch,
    "celebahq256": celebahq256,
    "celebahq256-chain": celebahq256_chain,
    "celebahq256-finetune-10": partial(celebahq256_finetune, steps=50_000),
    "celebahq256-finetune-1": partial(celebahq256_finetune, steps=5_000),
    "church256": church256,
    "vggface2-transfer": vggface2_transfer,
    "wavelet-l": wavelet_l,
}
