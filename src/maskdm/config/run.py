"""The whole of a run, and the short names of its parts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from maskdm.config.check import require
from maskdm.config.lessons import Convert, Denoise, Guided, Halve, Shortcut, is_halved
from maskdm.config.masks import BlockMask, CropMask, DecodeMask, DeferMask, Mask, NoMask, PatchMask, ReduceMask, RouteMask, ViewsMask
from maskdm.config.network import (
    Data,
    Diffusion,
    DiTConfig,
    LogitNormalTimesteps,
    MinSNRWeight,
    Model,
    UniformTimesteps,
    UniformWeight,
    UViTConfig,
)
from maskdm.config.training import Ema, Evaluation, Guard, Hardware, Intervals, Lora, Optimizer, Sampling, Stage, TrackerName
from maskdm.errors import UserError


@dataclass(frozen=True)
class Config:
    """One run."""

    data: Annotated[Data, "the images"]
    model: Annotated[Model, "the network: uvit or dit, or one of uvit-s, uvit-b, uvit-l"]
    stages: Annotated[tuple[Stage, ...], "the stages, in order"]
    diffusion: Annotated[Diffusion, "noise and target"] = field(default_factory=Diffusion)
    optimizer: Annotated[Optimizer, "AdamW or Muon"] = field(default_factory=Optimizer)
    ema: Annotated[Ema, "average of the weights"] = field(default_factory=Ema)
    hardware: Annotated[Hardware, "device and precision"] = field(default_factory=Hardware)
    guard: Annotated[Guard, "what is done about steps that go wrong"] = field(default_factory=Guard)
    intervals: Annotated[Intervals, "how often what happens"] = field(default_factory=Intervals)
    evaluation: Annotated[Evaluation, "what is measured during training"] = field(default_factory=Evaluation)
    sampling: Annotated[Sampling, "how samples are drawn"] = field(default_factory=Sampling)
    seed: Annotated[int, "seed of every random draw"] = 0
    init: Annotated[str | None, "run whose weights to start from"] = None
    lora: Annotated[Lora, "adapters, trained in place of all weights"] = field(default_factory=Lora)
    tracking: Annotated[tuple[TrackerName, ...], "where figures also go: tensorboard, wandb, trackio, or none"] = ("tensorboard",)

    def __post_init__(self) -> None:
        require(len(self.stages) > 0, "stages is empty; a run needs at least one stage")
        names = [stage.name for stage in self.stages]
        require(len(set(names)) == len(names), f"stages: the name '{max(names, key=names.count)}' is used twice")
        require(len(set(self.tracking)) == len(self.tracking), "tracking names one tracker twice")
        require(0 <= self.seed < 2**63, f"seed is {self.seed}; give a number from 0 to 2^63 - 1")

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across."""
        height, width = self.data.field_size
        return height // self.model.side, width // self.model.side

    @property
    def tokens(self) -> int:
        """Tokens of a whole image, conditions not counted."""
        return self.model.tokens(self.data.field_size)

    @property
    def blocks(self) -> int:
        """Transformer blocks of the network."""
        return 2 * (self.model.depth // 2) + 1 if isinstance(self.model, UViTConfig) else self.model.depth

    def _check_patience(self) -> None:
        """A stage that is to end when nothing gets better needs something that is measured meanwhile."""
        if self.evaluation.patience is None:
            return
        require(self.intervals.evaluate > 0, "evaluation.patience is set, and intervals.evaluate is 0; give the steps between evaluations")
        blind = self.evaluation.measure == "heldout-loss" and self.data.heldout == 0
        require(not blind, "evaluation.patience goes by the held-out loss, and data.heldout is 0; hold some images out, or leave it out")

    def _check_auto(self) -> None:
        """A stage that ends by evidence needs a whole-image stage to compare with and images to measure on."""
        for stage, following in zip(self.stages, (*self.stages[1:], None), strict=True):
            if not stage.budget.auto:
                continue
            where = f"stages.{stage.name}.budget.auto"
            if following is None or not isinstance(following.mask, NoMask) or isinstance(stage.mask, NoMask):
                raise UserError(f"{where} is for a masked stage before one on whole images")
            ours, theirs = (
                [name for name in ("steps", "images", "minutes") if getattr(each.budget, name) is not None] for each in (stage, following)
            )
            if ours != theirs:
                limits = f"{stage.name} is limited by {', '.join(ours)} and {following.name} by {', '.join(theirs)}"
                raise UserError(f"{where}: {limits}; limit both by the same")
            require(self.data.heldout > 0, f"{where} goes by the held-out loss, and data.heldout is 0; hold some images out")

    def _check_lessons(self) -> None:
        """What a teacher needs, and what a student must be told."""
        lessons = [stage.lesson for stage in self.stages]
        orphan = self.init is None and not isinstance(lessons[0], Denoise)
        require(not orphan, f"stages.{self.stages[0].name}.lesson {lessons[0].kind} has no teacher; name a run with --init")
        taught = self.init is not None or any(isinstance(lesson, Guided | Shortcut) for lesson in lessons)
        require(self.model.dial is None or taught, "model.dial is set, and no stage teaches it; add one with lesson guided")
        require(not self.model.shortcuts or taught, "model.shortcuts is set, and no stage teaches it; add one with lesson shortcut")
        blind = self.evaluation.patience is not None and self.evaluation.measure == "heldout-loss"
        for number, stage in enumerate(self.stages):
            if isinstance(stage.lesson, Denoise):
                continue
            where, what = f"stages.{stage.name}", f"lesson {stage.lesson.kind}"
            whole = isinstance(stage.mask, NoMask | PatchMask | BlockMask | CropMask | ViewsMask)
            require(whole, f"{where}.mask {stage.mask.kind} does not go with {what}; give none, patch, block, crop or views")
            require(not self.hardware.shard, f"{where}: with {what} a whole teacher is kept in each process; leave hardware.shard out")
            require(not blind, f"evaluation.patience goes by the held-out loss, which says nothing of {where}; leave it out")
            self._check_lesson(f"{where}.{what}", stage, number)

    def _check_lesson(self, where: str, stage: Stage, number: int) -> None:
        stepwise = isinstance(stage.lesson, Halve | Shortcut)
        flow = stepwise and self.diffusion.schedule == "flow"
        require(not flow, f"{where} is of DDIM steps, which schedule flow has none of; distil a model of another schedule")
        require(self.diffusion.target != "eps", f"{where} needs target v or x0: at full noise nothing can be told from eps")
        match stage.lesson:
            case Convert():
                require(number == 0, f"{where} is for the first stage alone")
            case Guided():
                require(self.data.conditional, f"{where} needs a teacher with classes, and this run is unconditional")
                require(self.diffusion.label_drop > 0, f"{where} needs a null class, and diffusion.label_drop is 0")
                require(self.model.dial is not None, f"{where} needs the range of scales; set model.dial, such as 1,4")
            case Shortcut(steps=end):
                good = self.model.shortcuts > end and is_halved(self.model.shortcuts, end)
                need = f"{where} needs {end} times a power of two, such as {32 * end}"
                require(good, f"model.shortcuts is {self.model.shortcuts}; {need}")
            case _:
                pass

    def _check_lora(self) -> None:
        """Adapters need weights to adapt, and them whole."""
        if self.lora.rank:
            require(self.init is not None, f"lora.rank is {self.lora.rank}, and there are no weights to adapt; name a run with --init")
            require(not self.hardware.shard, "lora.rank does not go with hardware.shard; leave one of the two out")

    def check(self) -> None:
        """What no part can check alone: that patches divide the image and masks the grid. Raises UserError."""
        together = self.hardware.shard and self.optimizer.name == "muon"
        require(not together, "optimizer.name muon needs whole matrices, which hardware.shard cuts; set one of the two back")
        height, width = self.data.image_size
        unit = self.model.side * self.data.latent_factor
        if height % unit or width % unit:
            size = f"{height}x{width}" if height != width else f"{height}"
            near = [max(unit, round(side / unit) * unit) for side in (height, width)]
            fitting = f"{near[0]}x{near[1]}" if near[0] != near[1] else f"{near[0]}"
            patch = (
                f"patch {self.model.side}"
                if self.model.sets == 1
                else f"{self.model.side}, patch {self.model.patch} at half the size (transform haar)"
            )
            patch += f" of latents that cover {self.data.latent_factor} pixels" if self.data.autoencoder else ""
            raise UserError(f"image_size {size} is not a multiple of {patch}; use --image-size {fitting} or another --patch")
        self._check_patience()
        self._check_auto()
        self._check_lessons()
        self._check_lora()
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
                case ViewsMask(groups=groups) if groups > down * across:
                    raise UserError(f"stages.{stage.name}.mask.groups {groups} is more than the {down * across} patches of an image")
                case RouteMask(edge=edge) if 2 * edge >= self.blocks:
                    raise UserError(f"stages.{stage.name}.mask.edge {edge} leaves no inner block of the {self.blocks}")
                case DeferMask(mixer=mixer) if mixer >= self.blocks:
                    raise UserError(f"stages.{stage.name}.mask.mixer {mixer} leaves no other block of the {self.blocks}")
                case ReduceMask(factor=factor) if down % factor or across % factor:
                    raise UserError(f"stages.{stage.name}.mask.factor {factor} does not divide the grid of {down} x {across} patches")
                case ReduceMask() if self.model.sets > 1:
                    raise UserError(f"stages.{stage.name}.mask reduce does not go with model.transform haar")
                case RouteMask(edge=edge) if self.model.fuse not in (0, edge):
                    raise UserError(f"stages.{stage.name}.mask.edge {edge} is not model.fuse {self.model.fuse}, where the parts are joined")
                case RouteMask(spread=True) if down % 2 or across % 2:
                    raise UserError(f"stages.{stage.name}.mask.spread does not go with the odd grid of {down} x {across} patches")
                case DeferMask() | DecodeMask() if self.model.fuse:
                    raise UserError(f"stages.{stage.name}.mask {stage.mask.kind} does not go with model.fuse; set it to 0")
                case DecodeMask() if not self.model.mask_token:
                    raise UserError(f"stages.{stage.name}.mask decode needs a token for hidden patches; add --model.mask_token true")
                case DecodeMask(decoder=decoder) if decoder >= self.blocks:
                    raise UserError(f"stages.{stage.name}.mask.decoder {decoder} leaves no other block of the {self.blocks}")
                case RouteMask(ratio=ratio) | DeferMask(ratio=ratio) | DecodeMask(ratio=ratio) if int(ratio * down * across) < 1:
                    raise UserError(f"stages.{stage.name}.mask spares nothing: {ratio:.0%} of {down} x {across} patches is no whole patch")
                case _:
                    pass


SHORTHANDS: dict[str, Mask | Model | UniformWeight | MinSNRWeight | UniformTimesteps | LogitNormalTimesteps] = {
    "none": NoMask(),
    "patch": PatchMask(),
    "block": BlockMask(),
    "crop": CropMask(),
    "views": ViewsMask(),
    "route": RouteMask(),
    "defer": DeferMask(),
    "decode": DecodeMask(),
    "reduce": ReduceMask(),
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
