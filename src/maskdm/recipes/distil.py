"""The run that distils another: its stages, from the teacher's configuration (docs/distillation.md)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from maskdm.config import (
    Budget,
    Config,
    Convert,
    Evaluation,
    Guided,
    Halve,
    Hardware,
    Lesson,
    Mask,
    NoMask,
    Sampling,
    Shortcut,
    Stage,
    UniformWeight,
    is_halved,
)
from maskdm.errors import UserError
from maskdm.recipes.arms import parse_arm

Method = Literal["halve", "shortcut"]

LONG = 2
"""Share of the optimizer steps of the first stages and of those for one and two sampling steps; 1 of the others (arXiv 2202.00512)."""


@dataclass(frozen=True)
class Plan:
    """What is asked for: from `steps` sampling steps to `end`, a range of guidance scales (None: 1 to 4 where the teacher has classes),
    the method, optimizer steps in all, and a mask as `--arms` of compare has it (None: whole images)."""

    steps: int = 32
    end: int = 1
    scales: tuple[float, float] | None = None
    method: Method = "halve"
    updates: int = 10_000
    mask: str | None = None


def distil(teacher: Config, path: str, plan: Plan) -> tuple[Config, tuple[str, ...]]:
    """The configuration that distils the run at `path`, whose own is `teacher`, and the reasons. Raises UserError for what cannot be."""
    _check(teacher, path, plan)
    guided = teacher.data.conditional and teacher.diffusion.label_drop > 0
    scales = (plan.scales or (1.0, 4.0)) if guided else None
    lessons, reasons = _lessons(teacher, plan, guided)
    mask = _mask(plan.mask, teacher) if plan.mask else NoMask()
    weights = [1 if isinstance(lesson, Halve) and lesson.steps > 2 else LONG for _, lesson in lessons]
    if plan.updates < len(lessons):
        raise UserError(f"--updates is {plan.updates}; give at least {len(lessons)}, one for each stage")
    last = teacher.stages[-1]
    stages = [
        Stage(
            name,
            Budget(steps=max(1, round(plan.updates * weight / sum(weights)))),
            mask,
            lesson,
            batch=last.batch,
            lr=last.lr,
            warmup=min(last.warmup, round(plan.updates * weight / sum(weights) / 10)),
            decay="linear",
            start_from="ema",
        )
        for (name, lesson), weight in zip(lessons, weights, strict=True)
    ]
    target = "v" if teacher.diffusion.target == "eps" else teacher.diffusion.target
    guidance = 1.0 if scales is None else min(max(teacher.sampling.guidance, scales[0]), scales[1])
    config = replace(
        teacher,
        model=replace(teacher.model, dial=scales, shortcuts=plan.steps if plan.method == "shortcut" else 0),
        stages=tuple(stages),
        diffusion=replace(teacher.diffusion, target=target, weight=UniformWeight()),
        ema=replace(teacher.ema, snapshots=0, warmup=True),
        hardware=Hardware(),
        intervals=replace(teacher.intervals, evaluate=0, sample=0),
        evaluation=Evaluation(),
        sampling=Sampling(steps=plan.end, guidance=guidance, num=teacher.sampling.num),
        init=path,
    )
    dial = () if scales is None else (f"guidance from {scales[0]:g} to {scales[1]:g} is told the network: one evaluation a step",)
    return config, (f"teacher {path}, and its network, data and noise", *dial, *reasons)


def _mask(text: str, teacher: Config) -> Mask:
    try:
        return parse_arm(text, teacher).stages[0].mask
    except UserError as error:
        raise UserError(str(error).replace("--arms", "--mask")) from None


def _check(teacher: Config, path: str, plan: Plan) -> None:
    if teacher.model.dial is not None or teacher.model.shortcuts:
        raise UserError(f"{path} is distilled already; distil the run that it was made from, or go on in it with more --updates and --fork")
    if plan.end < 1 or plan.steps <= plan.end or not is_halved(plan.steps, plan.end):
        raise UserError(f"--steps {plan.steps} is not --end {plan.end} times a power of two; give such as --steps {max(1, plan.end) * 16}")
    if plan.scales is not None and not teacher.data.conditional:
        raise UserError(
            f"--scales: {path} was trained without classes, and there is no guidance to distil; leave it out for fewer steps alone"
        )
    if plan.scales is not None and teacher.diffusion.label_drop == 0:
        raise UserError(f"--scales: {path} was trained with diffusion.label_drop 0, so there is no guidance to distil; leave it out")
    if teacher.diffusion.schedule == "flow":
        raise UserError(f"{path} has the schedule flow, for which there are no DDIM steps to halve; distil a model of another schedule")


def _lessons(teacher: Config, plan: Plan, guided: bool) -> tuple[list[tuple[str, Lesson]], tuple[str, ...]]:
    """Names and lessons of the stages, in order."""
    found: list[tuple[str, Lesson]] = []
    reasons: list[str] = []
    if teacher.diffusion.target == "eps":
        found.append(("convert", Convert()))
        reasons.append("target v: at full noise nothing can be told from eps, so the teacher learns v from the images first")
    if plan.method == "shortcut":
        return [*found, ("shortcut", Shortcut(plan.end))], tuple(reasons)
    if guided:
        found.append(("guided", Guided()))
    steps = plan.steps
    while steps > plan.end:
        steps //= 2
        found.append((f"halve-{steps}", Halve(steps)))
    return found, tuple(reasons)
