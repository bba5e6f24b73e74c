"""What a run will do, in words and records: masks at their true rates, tokens, ideal speed-ups."""

from __future__ import annotations

from typing import Any

from maskdm.config import BlockMask, Budget, Config, CropMask, Mask, NoMask, PatchMask, UViTConfig
from maskdm.engine import Machine, Progress
from maskdm.masking import hidden_rate, num_kept


def describe_mask(mask: Mask) -> str:
    """A mask in a few words, with its nominal rate."""
    match mask:
        case NoMask():
            return "none"
        case PatchMask(ratio=ratio):
            return f"patch, {ratio:.0%}"
        case BlockMask(ratio=ratio, size=size):
            return f"block {size}, {ratio:.0%}"
        case CropMask(size=size):
            return f"crop {size} x {size}"


def describe_budget(budget: Budget) -> str:
    """A budget in a few words."""
    parts = [f"{budget.steps} steps"] if budget.steps else []
    parts += [f"{budget.images} images"] if budget.images else []
    parts += [f"{budget.minutes:g} minutes"] if budget.minutes else []
    return " or ".join(parts)


def ideal_speedup(config: Config, mask: Mask) -> float:
    """How much cheaper the blocks' arithmetic is per image under a mask: (1/r) (6d + N) / (6d + rN) at keep rate r."""
    tokens, width = config.grid[0] * config.grid[1], config.model.width
    keep = num_kept(mask, config.grid) / tokens
    return (6 * width + tokens) / (6 * width + keep * tokens) / keep


def flops(config: Config, mask: Mask, images: int) -> float:
    """Arithmetic of the blocks, forward and backward, for training images of n kept patches each.

    3 blocks (24 n d^2 + 4 n^2 d), and for U-ViT 12 n d^2 for each long skip.
    """
    kept, width, depth = num_kept(mask, config.grid), config.model.width, config.model.depth
    is_uvit = isinstance(config.model, UViTConfig)
    skips = depth // 2 if is_uvit else 0
    blocks = 2 * skips + 1 if is_uvit else depth
    return 3.0 * images * (blocks * (24 * kept * width**2 + 4 * kept**2 * width) + 4 * skips * kept * width**2)


def plan_lines(config: Config, machine: Machine) -> list[str]:
    """The plan of a run, a line per stage."""
    threads = f", {config.hardware.threads or machine.cores} threads" if machine.device.type == "cpu" else ""
    lines = [f"device {machine.device} ({machine.name}){threads}, {machine.precision}"]
    tokens = config.grid[0] * config.grid[1]
    for stage in config.stages:
        kept = num_kept(stage.mask, config.grid)
        hidden = f"mask {describe_mask(stage.mask)}: hides {hidden_rate(stage.mask, config.grid):.1%}, sees {kept} of {tokens} patches, "
        speed = f"ideally {ideal_speedup(config, stage.mask):.1f}x the speed, " if kept < tokens else ""
        what = hidden + speed if kept < tokens else f"whole images ({tokens} patches), "
        lines.append(f"stage {stage.name}: {what}{describe_budget(stage.budget)}, batch {stage.batch}, lr {stage.lr:g}")
    return lines


def stage_records(config: Config, progress: Progress) -> list[dict[str, Any]]:
    """Each stage as the run's record has it: what it is, and what it has done."""
    records: list[dict[str, Any]] = []
    for number, (stage, done) in enumerate(zip(config.stages, progress.stages, strict=True)):
        records.append(
            {
                "name": stage.name,
                "mask": describe_mask(stage.mask),
                "hidden": hidden_rate(stage.mask, config.grid),
                "kept": num_kept(stage.mask, config.grid),
                "batch": stage.batch,
                "lr": stage.lr,
                "budget": describe_budget(stage.budget),
                "ideal_speedup": ideal_speedup(config, stage.mask),
                "steps": done.steps,
                "images": done.images,
                "seconds": round(done.seconds, 3),
                "images_per_second": done.images / done.seconds if done.seconds else None,
                "flops": flops(config, stage.mask, done.images),
                "flops_per_image": flops(config, stage.mask, 1),
                "done": number < progress.stage or done.share(stage.budget) >= 1 or done.ended,
                "ended_early": done.ended,
            }
        )
    return records
