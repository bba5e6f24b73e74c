"""Our own recipes: for two CPU cores, and one for a GPU. Their measured results are in docs/recipes.md."""

from __future__ import annotations

from collections.abc import Callable

from maskdm.config import Budget, Config, Data, Diffusion, DiTConfig, Ema, Intervals, Optimizer, PatchMask, Sampling, Stage

SMALL = DiTConfig(width=128, depth=8, heads=4, patch=2)
"""256 tokens of 32 px: on two cores ahead of a wider network on fewer tokens, and of larger batches (docs/experiments.md)."""

MEDIUM = DiTConfig(width=192, depth=9, heads=6, patch=4)
"""256 tokens of 64 px."""

MUON = Optimizer(name="muon", betas=(0.9, 0.99))


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
        model=SMALL,
        diffusion=Diffusion(schedule="cosine", target="v", stratified=True),
        stages=(
            Stage("pretrain", Budget(images=80_000), PatchMask(0.75), batch=32, lr=1.5e-3, warmup=50),
            Stage("finetune", Budget(images=70_000), batch=16, lr=1.5e-3, warmup=50, decay="cosine"),
        ),
        optimizer=MUON,
    )


def cifar10(source: str) -> Config:
    """CIFAR-10: 32 x 32, ten classes, in about an hour."""
    return Config(
        data=Data(source=source, image_size=(32, 32), conditional=True, heldout=0.02, flip=0.5),
        model=SMALL,
        diffusion=Diffusion(schedule="cosine", target="v", stratified=True),
        stages=(
            Stage("pretrain", Budget(images=100_000), PatchMask(0.75), batch=32, lr=1.5e-3, warmup=50),
            Stage("finetune", Budget(images=160_000), batch=16, lr=1.5e-3, warmup=50, decay="cosine"),
        ),
        optimizer=MUON,
    )


def flowers(source: str) -> Config:
    """Oxford Flowers 102 at 64 x 64, 102 classes, on two cores: `maskdm train flowers102.parquet --recipe flowers --out runs/flowers`."""
    return Config(
        data=Data(source=source, image_size=(64, 64), conditional=True, heldout=0.05, flip=0.5),
        model=MEDIUM,
        diffusion=Diffusion(schedule="cosine", target="v", stratified=True),
        stages=(
            Stage("pretrain", Budget(images=160_000), PatchMask(0.75), batch=32, lr=1e-3, warmup=50),
            Stage("finetune", Budget(images=200_000), batch=16, lr=1e-3, warmup=50, decay="cosine"),
        ),
        optimizer=MUON,
    )


def tiny_imagenet64(source: str) -> Config:
    """Tiny ImageNet at 64 x 64, 200 classes, on one GPU: `maskdm train tiny.parquet --recipe tiny-imagenet64 --out runs/tiny`."""
    return Config(
        data=Data(source=source, image_size=(64, 64), conditional=True, heldout=0.02, flip=0.5),
        model=DiTConfig(width=512, depth=12, heads=8, patch=4),
        diffusion=Diffusion(schedule="cosine", target="v", stratified=True),
        stages=(
            Stage("pretrain", Budget(images=20_000_000), PatchMask(0.5), batch=256, lr=2e-4, warmup=1000),
            Stage("finetune", Budget(images=8_000_000), batch=128, lr=1.2e-4, warmup=1000, decay="cosine"),
        ),
        optimizer=Optimizer(betas=(0.9, 0.99)),
        intervals=Intervals(log=100, evaluate=5000, sample=5000, save=1000),
        sampling=Sampling(guidance=1.5),
    )


def transfer_pretrain(source: str) -> Config:
    """Masked pre-training on a large folder, for `transfer` to start from: 64 x 64, two cores.

    `maskdm train ./many --recipe transfer-pretrain --out runs/many`
    """
    return Config(
        data=Data(source=source, image_size=(64, 64), heldout=0.02),
        model=MEDIUM,
        diffusion=Diffusion(schedule="cosine", target="v", stratified=True),
        stages=(Stage("pretrain", Budget(images=250_000), PatchMask(0.75), batch=32, lr=1e-3, warmup=50),),
        optimizer=MUON,
    )


def transfer(source: str) -> Config:
    """Fine-tuning on a small folder, whole images at a low rate from the averaged weights; network and noise are those of --init.

    `maskdm train ./few --recipe transfer --init runs/many --out runs/few`, with --image-size where that run has another than 64.
    Without --init the same from scratch, to compare with (at --lr 1e-3 or so).
    """
    return Config(
        data=Data(source=source, image_size=(64, 64), heldout=0.1),
        model=MEDIUM,
        diffusion=Diffusion(schedule="cosine", target="v", stratified=True),
        stages=(Stage("finetune", Budget(images=25_000), batch=16, lr=3e-4, warmup=50, decay="cosine", start_from="ema"),),
        optimizer=MUON,
        intervals=Intervals(evaluate=250, sample=500, save=250),
    )


OURS: dict[str, Callable[[str], Config]] = {
    "cifar10": cifar10,
    "digits": digits,
    "emoji": emoji,
    "flowers": flowers,
    "tiny-imagenet64": tiny_imagenet64,
    "transfer": transfer,
    "transfer-pretrain": transfer_pretrain,
}
