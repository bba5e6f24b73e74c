"""How it is learned: stages, optimizer, averages, hardware; and what is measured, kept and drawn meanwhile."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

from maskdm.config.check import require
from maskdm.config.lessons import DENOISE, Lesson
from maskdm.config.masks import Mask, NoMask

WHOLE = NoMask()


@dataclass(frozen=True)
class Budget:
    """How long a stage lasts: it ends at the first of the limits that are set."""

    steps: Annotated[int | None, "optimizer steps"] = None
    images: Annotated[int | None, "training images seen, repetitions counted"] = None
    minutes: Annotated[float | None, "minutes of training, evaluation and saving not counted"] = None
    auto: Annotated[bool, "end at what short probes of the next stage say is best, or before; what is left goes to the next stage"] = False

    def __post_init__(self) -> None:
        limits = [v for v in (self.steps, self.images, self.minutes) if v is not None]
        require(bool(limits), "a stage's budget is empty; set budget.steps, budget.images or budget.minutes")
        require(all(v > 0 for v in limits), "a stage's budget must be above 0")

    def extended(self, other: Budget, share: float, images: float, steps: float) -> Budget:
        """Longer by a share of another stage's budget, of which an image is worth `images` of this one's, and a step `steps`."""
        return replace(
            self,
            steps=self.steps and round(self.steps + share * steps * (other.steps or 0)),
            images=self.images and round(self.images + share * images * (other.images or 0)),
            minutes=self.minutes and self.minutes + share * (other.minutes or 0.0),
        )


@dataclass(frozen=True)
class Stage:
    """One part of a run: a mask, a budget and an optimizer of its own."""

    name: Annotated[str, "the stage's name, in logs and on the command line"]
    budget: Annotated[Budget, "how long the stage lasts"]
    mask: Annotated[Mask, "which patches are seen: none, patch, block, crop, views, route, defer, decode or reduce"] = WHOLE
    lesson: Annotated[Lesson, "what is learned: denoise, images; or of a teacher: convert, guided, halve or shortcut"] = DENOISE
    batch: Annotated[int, "images per optimizer step"] = 128
    accumulate: Annotated[int, "pieces a batch is computed in, to save memory; must divide the batch"] = 1
    lr: Annotated[float, "learning rate after warm-up"] = 2e-4
    warmup: Annotated[int, "steps over which the learning rate rises from 0; a tenth of the budget at most"] = 0
    decay: Annotated[Literal["constant", "cosine", "linear"], "course of the learning rate over the stage's budget"] = "constant"
    start_from: Annotated[Literal["raw", "ema"], "weights taken over from the stage (or run) before: as trained, or averaged"] = "raw"

    def __post_init__(self) -> None:
        where = f"stages.{self.name}"
        good = bool(self.name) and all(c.isalnum() or c in "-_" for c in self.name) and not self.name.isdigit()
        require(good, f"stage name '{self.name}': use letters, digits, - and _, with at least one letter")
        require(self.batch >= 1, f"{where}.batch is {self.batch}; it must be at least 1")
        require(
            self.accumulate >= 1 and self.batch % self.accumulate == 0,
            f"{where}.accumulate {self.accumulate} does not divide {where}.batch {self.batch}",
        )
        require(self.lr > 0, f"{where}.lr is {self.lr}; it must be above 0")
        require(self.warmup >= 0, f"{where}.warmup is {self.warmup}; it must be 0 or more")


@dataclass(frozen=True)
class Optimizer:
    """AdamW (arXiv 1711.05101), or with Muon for the matrices of blocks; no decay on norms, biases, positions and embeddings."""

    name: Annotated[Literal["adamw", "muon"], "muon: steps along orthogonalised gradients for the matrices of the blocks"] = "adamw"
    muon: Annotated[float, "Muon's learning rate, relative to the stage's at AdamW's size of step"] = 2.0
    betas: Annotated[tuple[float, float], "decay of the gradient's mean and of its square"] = (0.99, 0.99)
    weight_decay: Annotated[float, "decoupled weight decay of the matrices"] = 0.03
    clip: Annotated[float | None, "largest gradient norm; none for no clipping"] = 1.0

    def __post_init__(self) -> None:
        require(self.muon > 0, f"optimizer.muon is {self.muon}; it must be above 0")
        require(all(0 <= b < 1 for b in self.betas), f"optimizer.betas are {self.betas}; each must be from 0 to below 1")
        require(self.weight_decay >= 0, f"optimizer.weight_decay is {self.weight_decay}; it must be 0 or more")
        require(self.clip is None or self.clip > 0, f"optimizer.clip is {self.clip}; it must be above 0, or none")


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters (arXiv 2106.09685), trained in place of all weights, of a run that starts from another; merged in the result."""

    rank: Annotated[int, "rank of the adapters of attention and MLPs, such as 8; 0: all weights are trained"] = 0
    scale: Annotated[float, "weight of the adapters beside the layers they adapt (in other words alpha over rank)"] = 1.0

    def __post_init__(self) -> None:
        require(self.rank >= 0, f"lora.rank is {self.rank}; it must be 0 or more")
        require(self.scale > 0, f"lora.scale is {self.scale}; it must be above 0")


@dataclass(frozen=True)
class Ema:
    """Exponential moving average of the weights; samples and the result use it."""

    longest: ClassVar[float] = 0.288  # sigma_rel of the plain mean of all steps, 1 / sqrt(12)
    decay: Annotated[float, "share of the average kept at each step"] = 0.999
    warmup: Annotated[bool, "start with a short average: decay at step n is at most (1 + n) / (10 + n)"] = True
    snapshots: Annotated[int, "snapshots per stage, from which an average of any length is made afterwards; 0 for none"] = 8
    sigma_rel: Annotated[tuple[float, float], "lengths of the two averages in a snapshot, over the stage: 0.05,0.1"] = (0.05, 0.1)

    def __post_init__(self) -> None:
        require(0 <= self.decay < 1, f"ema.decay is {self.decay}; it must be from 0 to below 1")
        require(self.snapshots >= 0, f"ema.snapshots is {self.snapshots}; it must be 0 or more")
        good = all(0 < s <= self.longest for s in self.sigma_rel) and self.sigma_rel[0] != self.sigma_rel[1]
        require(good, f"ema.sigma_rel are {self.sigma_rel}; give two lengths above 0, up to {self.longest}")


@dataclass(frozen=True)
class Guard:
    """What is done about steps that go wrong: they are not applied, and after several in a row the run goes back."""

    spike: Annotated[
        float | None,
        "a step is skipped whose loss or gradient norm is so many times the median of the 64 before; none: only what is no number",
    ] = 10.0
    in_a_row: Annotated[int, "steps skipped in a row after which the run goes back to its last checkpoint, for other images and noise"] = 5
    rollbacks: Annotated[int, "times that it goes back to the same checkpoint before it gives up"] = 3

    def __post_init__(self) -> None:
        require(self.spike is None or self.spike > 1, f"guard.spike is {self.spike}; it must be above 1, or none")
        require(self.in_a_row >= 1, f"guard.in_a_row is {self.in_a_row}; it must be at least 1")
        require(self.rollbacks >= 0, f"guard.rollbacks is {self.rollbacks}; it must be 0 or more")


@dataclass(frozen=True)
class Hardware:
    """How the arithmetic is done."""

    device: Annotated[Literal["auto", "cpu", "cuda", "mps"], "where to compute; auto takes a GPU if there is one"] = "auto"
    precision: Annotated[
        Literal["auto", "fp32", "bf16", "fp16"],
        "arithmetic of the network; weights are fp32 always; auto is bf16 where matrix units have it",
    ] = "auto"
    compile: Annotated[bool, "compile the network with torch.compile: slow to start, faster steps"] = False
    checkpoint_activations: Annotated[
        Literal["off", "selective", "all"],
        "recompute in the backward pass, for less memory: off; selective, all but the matrix products; or all, a third slower",
    ] = "off"
    threads: Annotated[int, "CPU threads; 0 for all cores"] = 0
    shard: Annotated[bool, "cut weights, averages and moments over the processes (FSDP), for models that one device does not hold"] = False

    def __post_init__(self) -> None:
        require(self.threads >= 0, f"hardware.threads is {self.threads}; it must be 0 or more")


@dataclass(frozen=True)
class Intervals:
    """What happens how often, in steps; and what is kept."""

    log: Annotated[int, "steps between lines of metrics"] = 20
    evaluate: Annotated[int, "steps between measurements of the held-out loss; 0: at the ends of stages only"] = 1000
    sample: Annotated[int, "steps between grids of samples; 0: at the ends of stages only"] = 1000
    save: Annotated[int, "steps between checkpoints"] = 500
    keep: Annotated[int, "checkpoints kept, the latest ones; the ends of stages are kept always"] = 2

    def __post_init__(self) -> None:
        require(min(self.log, self.save, self.keep) >= 1, "intervals.log, save and keep must be at least 1")
        require(min(self.evaluate, self.sample) >= 0, "intervals.evaluate and sample must be 0 or more")


@dataclass(frozen=True)
class Evaluation:
    """The evaluation during training, every intervals.evaluate steps and at the ends of stages; and what follows from it."""

    measure: Annotated[
        Literal["heldout-loss", "kernel-distance"], "what the best weights (folder best) and early stopping go by; lower is better"
    ] = "heldout-loss"
    samples: Annotated[int, "samples drawn for the kernel distance; 0: the held-out loss alone is measured, which is cheap"] = 0
    features: Annotated[str, "network of the kernel distance, as `maskdm evaluate --features` takes it"] = "self"
    patience: Annotated[int | None, "a stage ends early after as many evaluations without a better one; none: never"] = None

    def __post_init__(self) -> None:
        require(self.samples == 0 or self.samples >= 10, f"evaluation.samples is {self.samples}; give 0, or at least 10")
        require(self.patience is None or self.patience >= 1, f"evaluation.patience is {self.patience}; give at least 1, or none")
        good = self.measure == "heldout-loss" or self.samples > 0
        require(good, "evaluation.measure is kernel-distance, and evaluation.samples is 0; give the number of samples, such as 500")


SCHEDULERS = ("ddim", "ddpm", "deis", "dpm++", "dpm++sde", "euler", "euler-a", "heun", "lms", "pndm", "sa", "unipc")
TrackerName = Literal["tensorboard", "wandb", "trackio"]
SchedulerName = Literal["ddim", "ddpm", "deis", "dpm++", "dpm++sde", "euler", "euler-a", "heun", "lms", "pndm", "sa", "unipc"]


GuideName = Literal["label", "path", "auto"]


@dataclass(frozen=True)
class Sampling:
    """How samples are drawn during and after training."""

    scheduler: Annotated[SchedulerName, "sampler, by its name in diffusers"] = "ddim"
    steps: Annotated[int, "denoising steps"] = 50
    eta: Annotated[float, "noise added back by ddim: 0 for none, 1 for as much as ddpm"] = 0.0
    guidance: Annotated[float, "guidance scale; 1 for none"] = 1.0
    guide: Annotated[
        GuideName,
        "what guidance leads away from: label, the null class; path, the outer blocks alone of a network with model.fuse; or auto, another "
        "network (`maskdm sample --weak`)",
    ] = "label"
    guidance_window: Annotated[
        tuple[float, float] | None, "noise levels (sigma / alpha) at which guidance acts, the lower one first: 0.3,5; none: at all"
    ] = None
    guidance_rescale: Annotated[float, "how far the contrast that guidance adds is taken back, 0 to 1"] = 0.0
    threshold: Annotated[float, "below 1: quantile of the predicted image that is scaled to white, where it is brighter: 0.995"] = 1.0
    num: Annotated[int, "images in a grid of samples"] = 64

    def __post_init__(self) -> None:
        require(1 <= self.steps <= 1000, f"sampling.steps is {self.steps}; it must be from 1 to 1000")
        require(0 <= self.eta <= 1, f"sampling.eta is {self.eta}; it must be from 0 to 1")
        require(self.guidance >= 0, f"sampling.guidance is {self.guidance}; it must be 0 or more")
        low, high = self.guidance_window or (0.0, 1.0)
        require(0 <= low < high, f"sampling.guidance_window is {low:g},{high:g}; give two noise levels from 0 up, the lower one first")
        require(0 <= self.guidance_rescale <= 1, f"sampling.guidance_rescale is {self.guidance_rescale}; it must be from 0 to 1")
        require(0.5 <= self.threshold <= 1, f"sampling.threshold is {self.threshold}; it must be from 0.5 to 1")
        require(self.num >= 1, f"sampling.num is {self.num}; it must be at least 1")
