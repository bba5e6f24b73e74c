"""A configuration from the data and the machine, when the user gives none; with the reason for each choice."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import floor, log10

from maskdm.config import Budget, Config, Data, Diffusion, DiTConfig, Intervals, Model, Optimizer, PatchMask, Sampling, Stage, UViTConfig

CPU_MINUTES, GPU_MINUTES = 30.0, 240.0
TOKENS = 2048
"""In a step on whole images on a CPU, at 16 images at least: fewer fill it worse, and more teach no more (docs/experiments.md)."""

MASKED = 0.25
"""Share of the time for the masked stage: what it teaches saturates (docs/experiments.md)."""

SIZES = (8, 16, 24, 28, 32, 48, 64, 96, 128, 192, 256)


@dataclass(frozen=True)
class Facts:
    """What the choice rests on. Sides in pixels; flops is the arithmetic per second that training should reach."""

    source: str
    count: int
    height: int
    width: int
    gray: bool
    num_classes: int
    on_cpu: bool
    flops: float


@dataclass(frozen=True)
class Choice:
    """A configuration, and why it is what it is, a line each."""

    config: Config
    reasons: tuple[str, ...]


def choose(facts: Facts, image_size: tuple[int, int] | None = None, init: Config | None = None) -> Choice:
    """Choose everything for some data. `image_size`: given by the user. `init`: the run to fine-tune, whose network is kept."""
    side, why_side = _side(facts)
    size, why_side = ((side, side), why_side) if image_size is None else (image_size, "as given")
    data = Data(
        source=facts.source,
        image_size=size,
        channels=1 if facts.gray else 3,
        conditional=facts.num_classes > 1,
        heldout=init.data.heldout if init else 0.2 if facts.count < 2000 else 0.05,
    )
    model, why_model = _model(facts, size) if init is None else (init.model, "as in the run to start from")
    tokens = model.tokens(size)
    stages, why_stages = _stages(facts, model, tokens, fine_tune=init is not None)
    config = Config(
        data=data,
        model=model,
        stages=stages,
        diffusion=Diffusion(target="v", stratified=True) if init is None else init.diffusion,
        optimizer=Optimizer(name="muon" if facts.on_cpu else "adamw", betas=(0.9, 0.99)),
        intervals=Intervals(),
        seed=init.seed if init else 0,  # so that images held out there stay so here
        sampling=Sampling(num=min(64, max(16, 4 * facts.num_classes))),
    )
    shape = f"{size[0]} x {size[1]}"
    reasons = (
        f"image size {shape}: {why_side}",
        f"channels {data.channels}: the images are {'gray' if facts.gray else 'in colour'}",
        f"classes: {f'{facts.num_classes}, learned' if data.conditional else 'none'}",
        f"network: {model.kind}, width {model.width}, depth {model.depth}, patch {model.patch} ({tokens} tokens): {why_model}",
        *why_stages,
    )
    return Choice(config, reasons)


def _side(facts: Facts) -> tuple[int, str]:
    short = min(facts.height, facts.width)
    most = 64 if facts.on_cpu else 256
    side = max((s for s in SIZES if s <= min(short, most)), default=SIZES[0])
    native = f"the images' median is {facts.height} x {facts.width}"
    return side, native if short <= most else f"{native}; {most} is what this machine learns in reasonable time"


def _model(facts: Facts, size: tuple[int, int]) -> tuple[Model, str]:
    side = min(size)
    patch = 2 if side < 32 or (side < 48 and facts.on_cpu) else 4 if side < 256 or facts.on_cpu else 8
    while patch > 2 and any(s % patch for s in size):
        patch //= 2
    if facts.on_cpu:
        width, depth, heads = (128, 7, 4) if side < 16 else (128, 8, 4) if side < 48 else (192, 9, 6)
    else:
        width, depth, heads = (512, 12, 8) if side <= 64 else (768, 12, 12)
    why = f"the DiT learns faster than the paper's U-ViT here (docs/experiments.md); sized for {'a CPU' if facts.on_cpu else 'a GPU'}"
    return DiTConfig(width, depth, heads, patch), why


def _stages(facts: Facts, model: Model, tokens: int, fine_tune: bool) -> tuple[tuple[Stage, ...], tuple[str, ...]]:
    minutes = CPU_MINUTES if facts.on_cpu else GPU_MINUTES
    batch = max(32, 2 * TOKENS // tokens) if facts.on_cpu else 256
    lr = 1.5e-3 if model.width < 192 else 1e-3 if model.width < 512 else 2e-4
    whole = Stage("finetune", Budget(images=1), batch=batch // 2, lr=lr if facts.on_cpu else lr * 0.6, warmup=200, decay="cosine")
    if fine_tune:
        budget, text = _budget(facts, model, tokens, 0.0, minutes * 60)
        return (replace(whole, budget=budget, lr=lr * 0.3, start_from="ema"),), (f"one stage on whole images, {text}",)
    ratio = 0.75 if tokens >= 256 else 0.5
    masked, text = _budget(facts, model, tokens, ratio, minutes * 60 * MASKED)
    rest, text_rest = _budget(facts, model, tokens, 0.0, minutes * 60 * (1 - MASKED))
    stages = (Stage("pretrain", masked, PatchMask(ratio), batch=batch, lr=lr, warmup=200), replace(whole, budget=rest))
    return stages, (
        f"stage 1, masked: {ratio:.0%} of {tokens} patches hidden, {text}",
        f"stage 2, whole images: {text_rest}",
    )


def _budget(facts: Facts, model: Model, tokens: int, ratio: float, seconds: float) -> tuple[Budget, str]:
    """As many images as the machine should manage, by arithmetic alone: the same budget on every machine of a kind."""
    images = _round(seconds * facts.flops / flops_per_image(model, tokens - int(ratio * tokens)))
    most = 2000.0 * facts.count
    if images > most:
        return Budget(images=_round(most)), f"{_round(most)} images: 2000 times the data, beyond which a model only copies"
    return Budget(images=images), f"{images} images, about {seconds / 60:.0f} minutes"


def flops_per_image(model: Model, tokens: int) -> float:
    """Arithmetic of a training step per image: three times the forward pass of the blocks over `tokens` tokens."""
    blocks = 2 * (model.depth // 2) + 1 if isinstance(model, UViTConfig) else model.depth
    return 3.0 * blocks * (24 * tokens * model.width**2 + 4 * tokens**2 * model.width)


def _round(value: float) -> int:
    """To two significant digits."""
    digits = 1 - floor(log10(value))
    return max(1, round(round(value, digits)))
