"""One run, described: a tree of frozen dataclasses, each field with its meaning beside its type.

Nothing here imports torch, so that the command line stays quick. `settings.py` reads and writes the tree.
Values of a closed union (a mask, a model, ...) are their own configuration; the modules that use them match on the type.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from maskdm.errors import UserError


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


# --- masks: which patches of each image the network sees (arXiv 2306.11363, section 3.2) ---------------------------


@dataclass(frozen=True)
class NoMask:
    """Whole images: ordinary denoising score matching."""

    kind: ClassVar[str] = "none"


@dataclass(frozen=True)
class PatchMask:
    """Hide int(ratio * N) of the N patches at random."""

    kind: ClassVar[str] = "patch"
    ratio: Annotated[float, "share of the patches hidden, from 0 to below 1"] = 0.5

    def __post_init__(self) -> None:
        _require(0 <= self.ratio < 1, f"mask.ratio is {self.ratio}; give a share from 0 to below 1")


@dataclass(frozen=True)
class BlockMask:
    """Cut the grid into aligned size x size blocks of patches and hide int(ratio * N) // size^2 of the blocks."""

    kind: ClassVar[str] = "block"
    ratio: Annotated[float, "nominal share of the patches hidden, from 0 to below 1"] = 0.9
    size: Annotated[int, "side of a block, in patches; must divide the grid"] = 4

    def __post_init__(self) -> None:
        _require(0 <= self.ratio < 1, f"mask.ratio is {self.ratio}; give a share from 0 to below 1")
        _require(self.size >= 1, f"mask.size is {self.size}; a block is at least 1 patch wide")


@dataclass(frozen=True)
class CropMask:
    """Keep one window of size x size patches at a uniform place."""

    kind: ClassVar[str] = "crop"
    size: Annotated[int, "side of the kept window, in patches"] = 11

    def __post_init__(self) -> None:
        _require(self.size >= 1, f"mask.size is {self.size}; a window is at least 1 patch wide")


Mask = NoMask | PatchMask | BlockMask | CropMask


# --- data ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """Where the images come from and how each becomes an array of height x width x channels."""

    source: Annotated[str, "folder, parquet file, data set folder, .npz/.npy array, or a built-in name (digits, emoji)"]
    image_size: Annotated[tuple[int, int], "height and width in pixels: 64, or 64x96"]
    channels: Annotated[Literal[1, 3], "1 for gray, 3 for RGB"] = 3
    conditional: Annotated[bool, "learn the classes, where the data has them"] = False
    fit: Annotated[Literal["crop", "pad", "stretch"], "how an image of another shape is fitted: centre crop, pad, or stretch"] = "crop"
    background: Annotated[str, "colour laid under transparent images and around padded ones, as #rrggbb"] = "#ffffff"
    flip: Annotated[float, "probability that a training image is mirrored left to right"] = 0.0
    heldout: Annotated[float, "share of the images never trained on, kept for evaluation (5 000 at most)"] = 0.05
    max_broken: Annotated[float, "share of unreadable files that is skipped; above it the run is refused"] = 0.05

    def __post_init__(self) -> None:
        height, width = self.image_size
        _require(min(height, width) >= 4, f"data.image_size is {height}x{width}; the least is 4 pixels a side")
        _require(max(height, width) <= 4096, f"data.image_size is {height}x{width}; the most is 4096 pixels a side")
        _require(0 <= self.flip <= 1, f"data.flip is {self.flip}; give a probability from 0 to 1")
        _require(0 <= self.heldout <= 0.5, f"data.heldout is {self.heldout}; give a share from 0 to 0.5")
        _require(0 <= self.max_broken <= 1, f"data.max_broken is {self.max_broken}; give a share from 0 to 1")
        digits = self.background.removeprefix("#")
        good = len(digits) == 6 and all(c in "0123456789abcdefABCDEF" for c in digits)
        _require(good, f"data.background is '{self.background}'; write a colour as #rrggbb, such as #ffffff")


# --- models -------------------------------------------------------------------------------------------------------


def _check_transformer(width: int, depth: int, heads: int, patch: int, mlp_ratio: float) -> None:
    _require(min(width, depth, heads, patch) >= 1, "model.width, depth, heads and patch must be at least 1")
    _require(mlp_ratio > 0, f"model.mlp_ratio is {mlp_ratio}; it must be above 0")
    _require(width % heads == 0, f"model.width {width} is not a multiple of model.heads {heads}")


@dataclass(frozen=True)
class UViTConfig:
    """The paper's network: a ViT with long skip connections, every condition a token (arXiv 2209.12152)."""

    kind: ClassVar[str] = "uvit"
    width: Annotated[int, "features per token"] = 512
    depth: Annotated[int, "depth setting; 2 * (depth // 2) + 1 blocks are built"] = 13
    heads: Annotated[int, "attention heads; must divide the width"] = 8
    patch: Annotated[int, "side of a patch in pixels; must divide the image"] = 4
    mlp_ratio: Annotated[float, "hidden width of the MLP over the width"] = 4.0
    qkv_bias: Annotated[bool, "a bias on the query, key and value projections"] = False

    def __post_init__(self) -> None:
        _check_transformer(self.width, self.depth, self.heads, self.patch, self.mlp_ratio)
        _require(self.width % 2 == 0, f"model.width {self.width} must be even, for the sinusoidal time token")


@dataclass(frozen=True)
class DiTConfig:
    """A modern transformer: adaLN-zero, RMSNorm, 2-D rotary positions, QK-norm, SwiGLU (arXiv 2212.09748 and later)."""

    kind: ClassVar[str] = "dit"
    width: Annotated[int, "features per token"] = 384
    depth: Annotated[int, "number of blocks"] = 12
    heads: Annotated[int, "attention heads; the width per head must be a multiple of 4"] = 6
    patch: Annotated[int, "side of a patch in pixels; must divide the image"] = 4
    mlp_ratio: Annotated[float, "hidden width of a GELU MLP with the parameters that the SwiGLU one has"] = 4.0

    def __post_init__(self) -> None:
        _check_transformer(self.width, self.depth, self.heads, self.patch, self.mlp_ratio)
        per_head = self.width // self.heads
        _require(per_head % 4 == 0, f"model.width {self.width} over model.heads {self.heads} is {per_head}; make it a multiple of 4")


Model = UViTConfig | DiTConfig


# --- diffusion ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class UniformWeight:
    """Every noise level counts the same."""

    kind: ClassVar[str] = "uniform"


@dataclass(frozen=True)
class MinSNRWeight:
    """min(SNR, gamma), in terms of x0, translated to the target in use (arXiv 2303.09556)."""

    kind: ClassVar[str] = "min-snr"
    gamma: Annotated[float, "largest signal-to-noise ratio that counts"] = 5.0

    def __post_init__(self) -> None:
        _require(self.gamma > 0, f"diffusion.weight.gamma is {self.gamma}; it must be above 0")


@dataclass(frozen=True)
class UniformTimesteps:
    """Timesteps uniform over the schedule."""

    kind: ClassVar[str] = "uniform"


@dataclass(frozen=True)
class LogitNormalTimesteps:
    """t / 1000 = sigmoid(mean + std * normal): the middle noise levels more often (arXiv 2403.03206)."""

    kind: ClassVar[str] = "logit-normal"
    mean: Annotated[float, "centre, before the sigmoid; above 0 favours high noise"] = 0.0
    std: Annotated[float, "spread, before the sigmoid"] = 1.0

    def __post_init__(self) -> None:
        _require(self.std > 0, f"diffusion.timesteps.std is {self.std}; it must be above 0")


@dataclass(frozen=True)
class Diffusion:
    """How images are noised and what the network is asked for."""

    schedule: Annotated[Literal["linear", "cosine", "vp", "flow"], "noise: DDPM's linear, cosine, the VP-SDE, or rectified flow"] = "cosine"
    target: Annotated[Literal["eps", "x0", "v"], "what the network predicts: the noise, the image, or the velocity"] = "eps"
    weight: Annotated[UniformWeight | MinSNRWeight, "weight of a noise level in the loss: uniform or min-snr"] = UniformWeight()
    timesteps: Annotated[UniformTimesteps | LogitNormalTimesteps, "how timesteps are drawn: uniform or logit-normal"] = UniformTimesteps()
    stratified: Annotated[bool, "spread the timesteps of a batch evenly over their distribution"] = False
    label_drop: Annotated[float, "share of the labels replaced by the null class in training, which guidance needs"] = 0.1

    def __post_init__(self) -> None:
        blind = self.schedule == "flow" and self.target == "eps"  # at full noise x_t is the noise, and its image unknowable
        _require(not blind, "diffusion.target eps does not go with schedule flow; use v or x0")
        _require(0 <= self.label_drop <= 1, f"diffusion.label_drop is {self.label_drop}; give a share from 0 to 1")


# --- training -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Budget:
    """How long a stage lasts: it ends at the first of the limits that are set."""

    steps: Annotated[int | None, "optimizer steps"] = None
    images: Annotated[int | None, "training images seen, repetitions counted"] = None
    minutes: Annotated[float | None, "minutes of training, evaluation and saving not counted"] = None

    def __post_init__(self) -> None:
        limits = [v for v in (self.steps, self.images, self.minutes) if v is not None]
        _require(bool(limits), "a stage's budget is empty; set budget.steps, budget.images or budget.minutes")
        _require(all(v > 0 for v in limits), "a stage's budget must be above 0")


@dataclass(frozen=True)
class Stage:
    """One part of a run: a mask, a budget and an optimizer of its own."""

    name: Annotated[str, "the stage's name, in logs and on the command line"]
    budget: Annotated[Budget, "how long the stage lasts"]
    mask: Annotated[Mask, "which patches are seen: none, patch, block or crop"] = NoMask()
    batch: Annotated[int, "images per optimizer step"] = 128
    accumulate: Annotated[int, "pieces a batch is computed in, to save memory; must divide the batch"] = 1
    lr: Annotated[float, "learning rate after warm-up"] = 2e-4
    warmup: Annotated[int, "steps over which the learning rate rises from 0"] = 0
    decay: Annotated[Literal["constant", "cosine", "linear"], "course of the learning rate over the stage's budget"] = "constant"
    start_from: Annotated[Literal["raw", "ema"], "weights taken over from the stage (or run) before: as trained, or averaged"] = "raw"

    def __post_init__(self) -> None:
        where = f"stages.{self.name}"
        good = bool(self.name) and all(c.isalnum() or c in "-_" for c in self.name) and not self.name.isdigit()
        _require(good, f"stage name '{self.name}': use letters, digits, - and _, with at least one letter")
        _require(self.batch >= 1, f"{where}.batch is {self.batch}; it must be at least 1")
        _require(
            self.accumulate >= 1 and self.batch % self.accumulate == 0,
            f"{where}.accumulate {self.accumulate} does not divide {where}.batch {self.batch}",
        )
        _require(self.lr > 0, f"{where}.lr is {self.lr}; it must be above 0")
        _require(self.warmup >= 0, f"{where}.warmup is {self.warmup}; it must be 0 or more")


@dataclass(frozen=True)
class Optimizer:
    """AdamW (arXiv 1711.05101); no decay on norms, biases, positions and embeddings."""

    betas: Annotated[tuple[float, float], "decay of the gradient's mean and of its square"] = (0.99, 0.99)
    weight_decay: Annotated[float, "decoupled weight decay of the matrices"] = 0.03
    clip: Annotated[float | None, "largest gradient norm; none for no clipping"] = 1.0

    def __post_init__(self) -> None:
        _require(all(0 <= b < 1 for b in self.betas), f"optimizer.betas are {self.betas}; each must be from 0 to below 1")
        _require(self.weight_decay >= 0, f"optimizer.weight_decay is {self.weight_decay}; it must be 0 or more")
        _require(self.clip is None or self.clip > 0, f"optimizer.clip is {self.clip}; it must be above 0, or none")


@dataclass(frozen=True)
class Ema:
    """Exponential moving average of the weights; samples and the result use it."""

    longest: ClassVar[float] = 0.288  # sigma_rel of the plain mean of all steps, 1 / sqrt(12)
    decay: Annotated[float, "share of the average kept at each step"] = 0.999
    warmup: Annotated[bool, "start with a short average: decay at step n is at most (1 + n) / (10 + n)"] = True
    snapshots: Annotated[int, "snapshots per stage, from which an average of any length is made afterwards; 0 for none"] = 8
    sigma_rel: Annotated[tuple[float, float], "lengths of the two averages in a snapshot, over the stage: 0.05,0.1"] = (0.05, 0.1)

    def __post_init__(self) -> None:
        _require(0 <= self.decay < 1, f"ema.decay is {self.decay}; it must be from 0 to below 1")
        _require(self.snapshots >= 0, f"ema.snapshots is {self.snapshots}; it must be 0 or more")
        good = all(0 < s <= self.longest for s in self.sigma_rel) and self.sigma_rel[0] != self.sigma_rel[1]
        _require(good, f"ema.sigma_rel are {self.sigma_rel}; give two lengths above 0, up to {self.longest}")


@dataclass(frozen=True)
class Hardware:
    """How the arithmetic is done."""

    device: Annotated[Literal["auto", "cpu", "cuda", "mps"], "where to compute; auto takes a GPU if there is one"] = "auto"
    precision: Annotated[
        Literal["auto", "fp32", "bf16", "fp16"],
        "arithmetic of the network; weights are fp32 always; auto is bf16 where matrix units have it",
    ] = "auto"
    compile: Annotated[bool, "compile the network with torch.compile: slow to start, faster steps"] = False
    checkpoint_activations: Annotated[bool, "recompute activations in the backward pass: less memory, slower steps"] = False
    threads: Annotated[int, "CPU threads; 0 for all cores"] = 0

    def __post_init__(self) -> None:
        _require(self.threads >= 0, f"hardware.threads is {self.threads}; it must be 0 or more")


@dataclass(frozen=True)
class Intervals:
    """What happens how often, in steps; and what is kept."""

    log: Annotated[int, "steps between lines of metrics"] = 20
    evaluate: Annotated[int, "steps between measurements of the held-out loss; 0: at the ends of stages only"] = 1000
    sample: Annotated[int, "steps between grids of samples; 0: at the ends of stages only"] = 1000
    save: Annotated[int, "steps between checkpoints"] = 500
    keep: Annotated[int, "checkpoints kept, the latest ones; the ends of stages are kept always"] = 2

    def __post_init__(self) -> None:
        _require(min(self.log, self.save, self.keep) >= 1, "intervals.log, save and keep must be at least 1")
        _require(min(self.evaluate, self.sample) >= 0, "intervals.evaluate and sample must be 0 or more")


@dataclass(frozen=True)
class Evaluation:
    """The evaluation during training, every intervals.evaluate steps and at the ends of stages; and what follows from it."""

    measure: Annotated[
        Literal["heldout-loss", "kernel-distance"], "what the best weights (folder best) and early stopping go by; lower is better"
    ] = "heldout-loss"
    num: Annotated[int, "samples drawn for the kernel distance; 0: the held-out loss alone is measured, which is cheap"] = 0
    features: Annotated[str, "network of the kernel distance, as `maskdm evaluate --features` takes it"] = "self"
    patience: Annotated[int | None, "a stage ends early after as many evaluations without a better one; none: never"] = None

    def __post_init__(self) -> None:
        _require(self.num == 0 or self.num >= 10, f"evaluation.num is {self.num}; give 0, or at least 10")
        _require(self.patience is None or self.patience >= 1, f"evaluation.patience is {self.patience}; give at least 1, or none")
        good = self.measure == "heldout-loss" or self.num > 0
        _require(good, "evaluation.measure is kernel-distance, and evaluation.num is 0; give the number of samples, such as 500")


SCHEDULERS = ("ddim", "ddpm", "deis", "dpm++", "dpm++sde", "euler", "euler-a", "heun", "lms", "pndm", "sa", "unipc")
TrackerName = Literal["tensorboard", "wandb", "trackio"]
SchedulerName = Literal["ddim", "ddpm", "deis", "dpm++", "dpm++sde", "euler", "euler-a", "heun", "lms", "pndm", "sa", "unipc"]


@dataclass(frozen=True)
class Sampling:
    """How samples are drawn during and after training."""

    scheduler: Annotated[SchedulerName, "sampler, by its name in diffusers"] = "ddim"
    steps: Annotated[int, "denoising steps"] = 50
    eta: Annotated[float, "noise added back by ddim: 0 for none, 1 for as much as ddpm"] = 0.0
    guidance: Annotated[float, "classifier-free guidance scale; 1 for none"] = 1.0
    num: Annotated[int, "images in a grid of samples"] = 64

    def __post_init__(self) -> None:
        _require(1 <= self.steps <= 1000, f"sampling.steps is {self.steps}; it must be from 1 to 1000")
        _require(0 <= self.eta <= 1, f"sampling.eta is {self.eta}; it must be from 0 to 1")
        _require(self.guidance >= 0, f"sampling.guidance is {self.guidance}; it must be 0 or more")
        _require(self.num >= 1, f"sampling.num is {self.num}; it must be at least 1")


@dataclass(frozen=True)
class Config:
    """One run."""

    data: Annotated[Data, "the images"]
    model: Annotated[Model, "the network: uvit or dit, or one of uvit-s, uvit-b, uvit-l"]
    stages: Annotated[tuple[Stage, ...], "the stages, in order"]
    diffusion: Annotated[Diffusion, "noise and target"] = field(default_factory=Diffusion)
    optimizer: Annotated[Optimizer, "AdamW"] = field(default_factory=Optimizer)
    ema: Annotated[Ema, "average of the weights"] = field(default_factory=Ema)
    hardware: Annotated[Hardware, "device and precision"] = field(default_factory=Hardware)
    intervals: Annotated[Intervals, "how often what happens"] = field(default_factory=Intervals)
    evaluation: Annotated[Evaluation, "what is measured during training"] = field(default_factory=Evaluation)
    sampling: Annotated[Sampling, "how samples are drawn"] = field(default_factory=Sampling)
    seed: Annotated[int, "seed of every random draw"] = 0
    init: Annotated[str | None, "run whose weights to start from"] = None
    tracking: Annotated[tuple[TrackerName, ...], "where figures also go: tensorboard, wandb, trackio, or none"] = ("tensorboard",)

    def __post_init__(self) -> None:
        _require(len(self.stages) > 0, "stages is empty; a run needs at least one stage")
        names = [stage.name for stage in self.stages]
        _require(len(set(names)) == len(names), f"stages: the name '{max(names, key=names.count)}' is used twice")
        _require(len(set(self.tracking)) == len(self.tracking), "tracking names one tracker twice")
        _require(0 <= self.seed < 2**63, f"seed is {self.seed}; give a number from 0 to 2^63 - 1")

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across."""
        height, width = self.data.image_size
        return height // self.model.patch, width // self.model.patch

    def check(self) -> None:
        """What no part can check alone: that patches divide the image and masks the grid. Raises UserError."""
        height, width = self.data.image_size
        patch = self.model.patch
        if height % patch or width % patch:
            size = f"{height}x{width}" if height != width else f"{height}"
            near = [max(patch, round(side / patch) * patch) for side in (height, width)]
            fitting = f"{near[0]}x{near[1]}" if near[0] != near[1] else f"{near[0]}"
            raise UserError(f"image_size {size} is not a multiple of patch {patch}; use --image-size {fitting} or another --patch")
        down, across = self.grid
        for stage in self.stages:
            match stage.mask:
                case BlockMask(size=size) if down % size or across % size:
                    raise UserError(f"stages.{stage.name}.mask.size {size} does not divide the grid of {down} x {across} patches")
                case CropMask(size=size) if size > min(down, across):
                    raise UserError(f"stages.{stage.name}.mask.size {size} is larger than the grid of {down} x {across} patches")
                case BlockMask(ratio=ratio, size=size) if int(ratio * down * across) < size**2:
                    raise UserError(f"stages.{stage.name}.mask hides nothing: {ratio:.0%} of {down} x {across} patches is no whole block")
                case PatchMask(ratio=ratio) if int(ratio * down * across) < 1:
                    raise UserError(f"stages.{stage.name}.mask hides nothing: {ratio:.0%} of {down} x {across} patches is no whole patch")
                case CropMask(size=size) if size == down == across:
                    raise UserError(f"stages.{stage.name}.mask hides nothing: its window is the whole grid of {down} x {across} patches")
                case _:
                    pass


SHORTHANDS: dict[str, Mask | Model | UniformWeight | MinSNRWeight | UniformTimesteps | LogitNormalTimesteps] = {
    "none": NoMask(),
    "patch": PatchMask(),
    "block": BlockMask(),
    "crop": CropMask(),
    "uvit": UViTConfig(),
    "uvit-s": UViTConfig(width=512, depth=13, heads=8),
    "uvit-b": UViTConfig(width=768, depth=12, heads=12),
    "uvit-l": UViTConfig(width=1024, depth=16, heads=16, qkv_bias=True),
    "dit": DiTConfig(),
    "uniform": UniformWeight(),
    "min-snr": MinSNRWeight(),
    "logit-normal": LogitNormalTimesteps(),
}
"""Names that stand for a whole value where a union is expected."""
