"""What a run will do, in words and records: masks at their true rates, tokens, ideal speed-ups."""

from __future__ import annotations

from typing import Any

from maskdm.arithmetic import ideal_speedup, stage_flops
from maskdm.config import (
    BlockMask,
    Budget,
    Config,
    Convert,
    CropMask,
    DecodeMask,
    DeferMask,
    Denoise,
    Guided,
    Halve,
    Lesson,
    Mask,
    NoMask,
    PatchMask,
    ReduceMask,
    RouteMask,
    Shortcut,
    ViewsMask,
)
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
        case ViewsMask(groups=groups):
            return f"{groups} disjoint views"
        case RouteMask(ratio=ratio, edge=edge, spread=spread):
            return f"route, {ratio:.0%}{' evenly spread' if spread else ''} pass by all but {edge} blocks at either end"
        case DeferMask(ratio=ratio, mixer=mixer):
            return f"defer, {ratio:.0%} after {mixer} blocks"
        case DecodeMask(ratio=ratio, decoder=decoder):
            return f"decode, {ratio:.0%} until the last {decoder} blocks"
        case ReduceMask(factor=factor):
            return f"whole images reduced {factor} times"


def describe_lesson(lesson: Lesson) -> str:
    """What a stage learns in a few words; nothing for images, which is what most do."""
    match lesson:
        case Denoise():
            return ""
        case Convert():
            return "another target, from images"
        case Guided():
            return "guidance in one evaluation, from the teacher"
        case Halve(steps=steps):
            return f"sampling in {steps} step{'s' if steps > 1 else ''}, two of the teacher's in one"
        case Shortcut(steps=steps):
            return f"sampling in any number of steps down to {steps}, from the teacher and itself"


def describe_budget(budget: Budget) -> str:
    """A budget in a few words."""
    parts = [f"{budget.steps} steps"] if budget.steps else []
    parts += [f"{budget.images} images"] if budget.images else []
    parts += [f"{budget.minutes:g} minutes"] if budget.minutes else []
    return ("at most " if budget.auto else "") + " or ".join(parts) + (", to end by probes of the next stage" if budget.auto else "")


def plan_lines(config: Config, machine: Machine) -> list[str]:
    """The plan of a run, a line per stage."""
    threads = f", {config.hardware.threads or machine.cores} threads" if machine.device.type == "cpu" else ""
    lines = [f"device {machine.device} ({machine.name}){threads}, {machine.precision}"]
    tokens = config.grid[0] * config.grid[1]
    patches = f"{tokens} patches" + (" of two tokens" if config.model.sets == 2 else "")
    for stage in config.stages:
        hides = f"hides {hidden_rate(stage.mask, config.grid):.1%}, learns from {num_kept(stage.mask, config.grid)} of {patches}, "
        all_of_them = f"learns from all {patches}, "
        of_reduced = f"learns from {num_kept(stage.mask, config.grid)} patches, "
        hides = of_reduced if isinstance(stage.mask, ReduceMask) else hides
        hidden = f"mask {describe_mask(stage.mask)}: {all_of_them if isinstance(stage.mask, ViewsMask | RouteMask) else hides}"
        speed = f"ideally {ideal_speedup(config, stage.mask):.1f}x the speed, "
        what = f"whole images ({patches}), " if isinstance(stage.mask, NoMask) else hidden + speed
        learns = describe_lesson(stage.lesson)
        what = f"learns {learns}; {what}" if learns else what
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
                "lesson": describe_lesson(stage.lesson) or "images",
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
                "flops": stage_flops(config, stage, done.images),
                "flops_per_image": stage_flops(config, stage, 1),
                "done": number < progress.stage or done.share(stage.budget) >= 1 or done.ended,
                "ended_early": done.ended,
            }
        )
    return records
