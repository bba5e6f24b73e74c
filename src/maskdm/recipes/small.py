"""Recipes sized for two CPU cores. Their measured results are in docs/experiments.md."""

from __future__ import annotations

from maskdm.config import Budget, Config, Data, Diffusion, DiTConfig, Ema, Intervals, Optimizer, PatchMask, Sampling, Stage


def digits(source: str) -> Config:
    """scikit-learn's handwritten digits: 8 x 8, gray, ten classes, in about three minutes. The quickstart."""
    return Config(
        data=Data(source=source, image_size=(8, 8), channels=1, conditional=True, heldout=0.2),
        model=DiTConfig(width=128, depth=7, heads=4, patch=2),
        diffusion=Diffusion(schedule="cosine", target="v", stratified=True),
        stages=(
            Stage("pretrain", Budget(steps=1000, minutes=2.0), PatchMask(0.5), batch=128, lr=1.5e-3, warmup=100),
            Stage("finetune", Budget(steps=500, minutes=2.5), batch=128, lr=1e-3, warmup=100, decay="cosine"),
        ),
        optimizer=Optimizer(betas=(0.9, 0.99)),
        ema=Ema(decay=0.998),
        intervals=Intervals(log=20, evaluate=250, sample=250, save=250),
        sampling=Sampling(scheduler="ddim", steps=50, num=50),
    )


def emoji(source: str) -> Config:
    """The system's colour emoji at 32 x 32, unconditional, in about half an hour."""
    return Config(
        data=Data(source=source, image_size=(32, 32), heldout=0.1, fit="pad"),
        model=DiTConfig(width=192, depth=9, heads=6, patch=4),
        diffusion=Diffusion(schedule="cosine", target="v", stratified=True),
        stages=(
            Stage("pretrain", Budget(images=400_000), PatchMask(0.5), batch=128, lr=5e-4, warmup=100),
            Stage("finetune", Budget(images=200_000), batch=64, lr=3e-4, warmup=100, decay="cosine"),
        ),
        optimizer=Optimizer(betas=(0.9, 0.99)),
    )


def cifar10(source: str) -> Config:
    """CIFAR-10: 32 x 32, ten classes, in about an hour."""
    return Config(
        data=Data(source=source, image_size=(32, 32), conditional=True, heldout=0.02, flip=0.5),
        model=DiTConfig(width=192, depth=9, heads=6, patch=4),
        diffusion=Diffusion(schedule="cosine", target="v", stratified=True),
        stages=(
            Stage("pretrain", Budget(images=1_000_000), PatchMask(0.5), batch=128, lr=5e-4, warmup=200),
            Stage("finetune", Budget(images=400_000), batch=64, lr=3e-4, warmup=200, decay="cosine"),
        ),
        optimizer=Optimizer(betas=(0.9, 0.99)),
    )
