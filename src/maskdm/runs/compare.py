"""`maskdm compare`: arms trained in turns at equal cost, on the same data and seeds, measured alike; and a verdict."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import maskdm
from maskdm.arithmetic import flops
from maskdm.config import Budget, Config, NoMask, Stage
from maskdm.data import Dataset
from maskdm.engine import Machine, Ranks, Trainer, autocast, environment
from maskdm.errors import UserError
from maskdm.evaluation import (
    DenoisingLoss,
    Extractor,
    FeatureNetwork,
    ImageSet,
    Subject,
    denoising_loss,
    digest,
    evaluate_samples,
    is_self,
    overfitting,
)
from maskdm.evaluation.denoising import COST
from maskdm.evaluation.speedups import Unit
from maskdm.pictures import grid
from maskdm.recipes.arms import Arm, parse_arms, rates_of
from maskdm.runs.compare_results import Contest, Record, summarize
from maskdm.runs.contestant import PROBED, Contestant, Field, all_work_of
from maskdm.runs.directory import held, write_text
from maskdm.runs.display import Display
from maskdm.runs.judge import choose_network
from maskdm.runs.latents import with_latents
from maskdm.runs.resolve import Resolved, TrainRequest, resolve
from maskdm.runs.sample import draw_images
from maskdm.runs.sets import CLASSES, images_and_labels, left_out, natural_labels, sets_of
from maskdm.runs.store import cache_directory, make_pipeline, state_hash
from maskdm.runs.train import Interrupted, prepare_data, set_up_torch, stop_requests
from maskdm.settings import differences, find, from_plain, to_plain

SLICES = 20
"""Turns that a budget is cut into; the loss is measured after each."""

MEASURED, LEAST_MEASURED = 256, PROBED
"""Held-out images of a measurement at most, or all where there are fewer; and how few are too few."""

MEASURING = 0.2
"""Of an arm's arithmetic, what is spent besides on the measurements of its turns, at most, as long as they are of enough images."""

FINAL, FINALLY = 1000, 4
"""Images of the losses at the end at most, and how many times those of a turn's measurement."""

MAX_REFERENCE = 5000

COUNTED = "of the network's training and of Muon"
"""What FLOPs are of: a comparison that counted others does not go on, and is not pooled."""
UNITS: dict[str, tuple[Unit, float]] = {
    "s": ("seconds", 1.0),
    "m": ("seconds", 60.0),
    "h": ("seconds", 3600.0),
    "flops": ("flops", 1.0),
    "images": ("images", 1.0),
}
PREFIXES = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9}


@dataclass(frozen=True)
class Cost:
    """What every arm may spend: seconds of training, FLOPs or images."""

    unit: Unit
    amount: float

    @staticmethod
    def parse(text: str) -> Cost:
        """From 60s, 10m, 2h, 1e17flops or 2Mimages. Raises UserError."""
        number = text.rstrip("abcdefghijklmnopqrstuvwxyzMG ")
        unit = text[len(number) :].strip()
        prefix = unit[:1] if unit not in UNITS and unit[:1] in PREFIXES and unit[1:] in UNITS else ""
        try:
            amount = float(number) * PREFIXES[prefix] * UNITS[unit.removeprefix(prefix)][1]
        except (ValueError, KeyError):
            raise UserError(f"--budget is '{text}'; give a time such as 60s, 10m or 2h, or 1e17flops, or 2Mimages") from None
        if not 0 < amount < float("inf"):
            raise UserError(f"--budget is '{text}'; give more than nothing")
        return Cost(UNITS[unit.removeprefix(prefix)][0], amount)

    def stage_budget(self, work: Callable[[Stage], float]) -> Callable[[Stage, float], Budget]:
        """Budgets of stages from their shares, for `Arm.config`; `work`: FLOPs of training on an image, the optimizer's among them."""

        def budget(stage: Stage, share: float) -> Budget:
            part = share * self.amount
            match self.unit:
                case "seconds":
                    return Budget(minutes=part / 60)
                case "images":
                    return Budget(images=max(1, round(part)))
                case _:
                    return Budget(images=max(1, round(part / work(stage))))

        return budget


@dataclass(frozen=True)
class CompareRequest:
    """What `maskdm compare` was asked for. Arms as `recipes.arms` reads them; the first is what the others are compared with."""

    train: TrainRequest
    budget: str
    arms: str = "whole,maskdm"
    seeds: int = 3
    features: str = "self"
    num: int = 500
    first_seed: int = 0
    """Added to the configuration's seed: the same comparison in parts, seed by seed, on one machine or on several."""


def compare(request: CompareRequest, display: Display, more_arms: Callable[[Config], Sequence[Arm]] = lambda base: ()) -> str:
    """Run what is left of a comparison; returns the table and the verdicts. Raises UserError, Interrupted.

    more_arms: makes arms beside those of the request, from the configuration that they all share.
    """
    out, cost = request.train.out, Cost.parse(request.budget)
    if request.seeds < 1:
        raise UserError(f"--seeds is {request.seeds}; give at least 1")
    if request.first_seed < 0:
        raise UserError(f"--first-seed is {request.first_seed}; give 0 or more")
    if request.num < 10:
        raise UserError(f"--num is {request.num}; give at least 10 samples")
    resolved = resolve(replace(request.train, out=out / "run"))  # where no run is
    base = replace(resolved.config, ema=replace(resolved.config.ema, snapshots=0), tracking=())
    _refuse_idle(request, base)
    arms = parse_arms(request.arms, base, more_arms(base))
    display.heading(f"maskdm {maskdm.__version__}: {', '.join(arm.name for arm in arms)} on {request.train.data}, {request.budget} each")
    for arm in arms:
        display.note(f"  {arm.name}: {arm.describe()}")
    set_up_torch(base, resolved)
    dataset = prepare_data(resolved, display)
    base, dataset = with_latents(base, dataset, resolved.machine, Ranks(), display)
    training, heldout = dataset.split(base.data.heldout, base.seed, base.data.limit)
    if len(heldout) < LEAST_MEASURED:
        raise UserError(f"{len(heldout)} held-out images are too few to compare by; hold at least {LEAST_MEASURED} out (--heldout)")
    machine = environment(resolved.machine, torch.get_num_threads()) | {"maskdm": maskdm.__version__}
    measured = _begin(request, base, arms, dataset, machine, min(len(heldout), _affordable(base, cost, resolved.machine)), display)
    display.note(f"  {measured} held-out images measured at each of {SLICES} turns; the time of that is not counted")
    field = Field(dataset, training, resolved.machine, display)
    classes = len(dataset.class_names) if base.data.conditional else 0
    budgets = {arm.name: cost.stage_budget(all_work_of(arm, base, classes)) for arm in arms}
    contestants = [
        Contestant(arm, arm.config(base, base.seed + i, budgets[arm.name]), out / "arms" / arm.name, field)
        for i in range(request.first_seed, request.first_seed + request.seeds)
        for arm in arms
    ]
    ruler = _Ruler(base, dataset, heldout, resolved.machine, measured)
    judge = _Judge(request, resolved, base, dataset, FINALLY * measured, display)
    if not is_self(request.features) and any(map(judge.due, contestants)):
        _ = judge.network  # one that is not there is said now, not after hours of training
    with held(out), stop_requests() as stop:
        _train(contestants, cost, ruler, stop, display)
        _conclude(contestants, judge, stop, display)
    contest = Contest(
        {arm.name: [each.records for each in contestants if each.arm is arm] for arm in arms},
        {arm.name: [each.final or {} for each in contestants if each.arm is arm] for arm in arms},
        cost.unit,
        frozenset(arm.name for arm in arms if arm.decays),
    )
    about: dict[str, Any] = {"budget": request.budget, "seeds": request.seeds, "first_seed": request.first_seed}
    about |= {"data": request.train.data, "config": to_plain(base)}
    about |= {"data_hash": dataset.content_hash, "heldout_images": ruler.count, "training_images": len(training), "environment": machine}
    about |= {"flops": COUNTED, "specs": {arm.name: arm.record() for arm in arms}}
    about |= {"networks": {arm.name: dict(arm.network.record) for arm in arms if arm.network is not None}}
    return summarize(contest, about, out)


def _refuse_idle(request: CompareRequest, base: Config) -> None:
    """Settings that a comparison gives no part to would be ignored: name them. Raises UserError."""
    if base.init is not None:
        raise UserError("--init would be every arm's; name the arm that starts from a run: pretrained=whole/init=RUN")
    for name, _ in request.train.settings:
        path = find(base, name).path
        stage, key = path.split(".")[1:3] if path.startswith("stages.") else ("", "")
        if key in ("budget", "decay") or (key in ("lr", "warmup") and stage != rates_of(base).name):
            raise UserError(f"--{name} has no part in a comparison, whose arms say it (/{key}=); see --arms")
        if path.startswith(("evaluation.", "intervals.", "ema.snapshots", "ema.sigma_rel", "tracking")):
            raise UserError(f"--{name} has no part in a comparison; leave it out")


def _affordable(base: Config, cost: Cost, machine: Machine) -> int:
    """Held-out images that a turn can measure without costing more than training does, or the fewest that tell anything."""
    training = flops(base, NoMask(), 1)
    budget = {"seconds": cost.amount * machine.flops, "flops": cost.amount, "images": cost.amount * training}[cost.unit]
    return max(LEAST_MEASURED, min(MEASURED, int(MEASURING * budget / SLICES / (COST * training))))


def _begin(
    request: CompareRequest, base: Config, arms: Sequence[Arm], dataset: Dataset, machine: dict[str, Any], measured: int, display: Display
) -> int:
    """Write what was asked for; refuse to go on with something else. Seeds and arms may be added. Raises UserError.

    Returns how many images are measured each time: the same from beginning to end, on whatever machine.
    """
    out = request.train.out
    asked: dict[str, Any] = {"data": request.train.data, "data_hash": dataset.content_hash, "budget": request.budget, "flops": COUNTED}
    file, specs = out / "request.json", {arm.name: arm.record() for arm in arms}
    seeds, machines = request.seeds, [machine]
    if file.is_file():
        try:
            before: dict[str, Any] = json.loads(file.read_text())
            config, kept = from_plain(before["config"]), int(before["measured"])
        except (OSError, ValueError, KeyError):
            raise UserError(f"{file} cannot be read; give another --out") from None
        changed = [f"{key} {before.get(key)} -> {value}" for key, value in asked.items() if before.get(key) != value]
        changed += [f"arm {name}: {was} -> {specs[name]}" for name, was in before["arms"].items() if specs.get(name, was) != was]
        changed += differences(config, base)
        if changed:
            raise UserError(f"{out} holds another comparison ({changed[0]}); give another --out, or the same arguments to resume")
        specs, seeds, machines = before["arms"] | specs, max(seeds, before["seeds"]), before["machines"]
        measured = kept
        if machine not in machines:
            was = next(f"{key} {old} -> {machine.get(key)}" for key, old in machines[-1].items() if machine.get(key) != old)
            display.note(f"the machine or its software is another than before ({was}): times are comparable within a turn, not across")
            machines = [*machines, machine]
    elif out.is_dir() and any(path.name != ".request.json.partial" for path in out.iterdir()):
        raise UserError(f"--out {out} holds files that are not a comparison's; give an empty or a new directory")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to --out {out}: {error.strerror}") from None
    record = {**asked, "seeds": seeds, "arms": specs, "measured": measured, "machines": machines, "config": to_plain(base)}
    write_text(file, json.dumps(record, indent=1))
    return measured


def _train(contestants: list[Contestant], cost: Cost, ruler: _Ruler, stop: list[str], display: Display) -> None:
    """All contestants, a slice each in turns and in another order every time, so that a drifting machine hurts all alike.

    Saved after each. One that has diverged is left as it is.
    """
    with display.counting("training in turns") as progress:
        for number in range(SLICES):
            for place, index in enumerate(np.random.default_rng(number).permutation(len(contestants))):
                each = contestants[index]
                if len(each.records) > number:
                    continue
                if each.diverged:
                    each.records.append(each.records[-1] | {"slice": number})
                    continue
                with each.training() as trainer:
                    going = each.advance(trainer, cost.unit, (number + 1) / SLICES * cost.amount, stop, ruler.loss)
                    if going:
                        measured = ruler.measure(trainer) | ({"loss": math.nan} if trainer.unsound else {})
                        each.records.append(each.spent(trainer) | measured | {"slice": number})
                    each.save(trainer)
                if not going:
                    raise Interrupted(f"stopped by {stop[0]}, and saved; the same command resumes")
                progress(number * len(contestants) + place + 1, SLICES * len(contestants))


def _conclude(contestants: list[Contestant], judge: _Judge, stop: list[str], display: Display) -> None:
    """Measure those that have not been, or not in this way."""
    for each in contestants:
        if judge.due(each):
            display.note(f"measuring {each.arm.name}, seed {each.config.seed}")
            with each.training(rehearse=False) as trainer:
                each.conclude(trainer, {} if each.diverged else judge.measure(each, trainer), judge.asked)
        if stop:
            raise Interrupted(f"stopped by {stop[0]}, and saved; the same command resumes")


class _Ruler:
    """Measures the held-out loss of whole images, on the same images and noise every time."""

    def __init__(self, base: Config, dataset: Dataset, heldout: NDArray[np.int64], machine: Machine, count: int) -> None:
        self.base, self.machine, self.count = base, machine, count
        some = heldout[np.linspace(0, len(heldout) - 1, self.count).astype(np.int64)]
        self._pixels, self._labels = images_and_labels(base, dataset, some, machine.device)

    def loss(self, trainer: Trainer) -> float:
        """The loss of the averaged weights on few images: an arm that asks for it pays for it."""
        return self._measure(trainer, PROBED).loss

    def measure(self, trainer: Trainer) -> Record:
        """The loss of the averaged weights, and by noise level."""
        found = self._measure(trainer, self.count)
        return {"loss": found.loss, "levels": found.levels}

    def _measure(self, trainer: Trainer, count: int) -> DenoisingLoss:
        labels = None if self._labels is None else self._labels[:count]
        with autocast(self.machine.device, self.machine.precision):
            return denoising_loss(trainer.average.model, self.base.diffusion, self._pixels[:count], labels)


class _Judge:
    """What is measured once, at the end: the loss of more images, and samples in features that no arm was trained on."""

    def __init__(self, request: CompareRequest, resolved: Resolved, base: Config, dataset: Dataset, images: int, display: Display) -> None:
        self.base, self.dataset, self.machine, self.num = base, dataset, resolved.machine, request.num
        self.images = min(FINAL, images)
        self.training, self.heldout = sets_of(base, dataset)
        self.reference = left_out(base, dataset)
        self.features, self.display = request.features, display
        self.asked: dict[str, Any] = {"features": request.features, "num": request.num}
        if self.reference is not None:
            self.asked["reference"] = "images that data.limit leaves out"

    def due(self, each: Contestant) -> bool:
        """Whether it has not been measured, or not in this way."""
        return each.final is None or each.final["asked"] != self.asked

    @cached_property
    def network(self) -> FeatureNetwork:
        """What the features are of. Raises UserError."""
        return choose_network(self.features, self.training, self.heldout, 0, self.machine.device, Ranks(), self.display)

    def measure(self, each: Contestant, trainer: Trainer) -> dict[str, Any]:
        """The keys are those of `maskdm evaluate` (docs/evaluation.md)."""
        model, names = trainer.average.model, list(self.dataset.class_names) if self.base.data.conditional else []
        labels = natural_labels(self.base, self.dataset, self.training.rows, self.num)
        pipeline = make_pipeline(model, self.base, names)
        drawn = draw_images(pipeline, self.base.sampling, range(self.num), labels, each.config.seed, self.machine.precision)
        pixels = drawn.transpose(0, 2, 3, 1)
        key = digest(state_hash(model.state_dict()), np.arange(self.num))
        samples = ImageSet(pixels, np.arange(self.num), key, None if labels is None else np.array(labels))
        losses = []
        for images in (self.training, self.heldout):
            assert images is not None
            rows = images.rows[images.places(self.images)]
            shown, classes = images_and_labels(self.base, self.dataset, rows, self.machine.device)
            with autocast(self.machine.device, self.machine.precision):
                losses.append(denoising_loss(model, self.base.diffusion, shown, classes))
        extractor = Extractor(self.network, cache_directory() / "features", Ranks())
        subject = Subject(samples, self.training, self.heldout, names, reference=self.reference)
        about = {"sampling": to_plain(self.base)["sampling"], "seed": each.config.seed, "classes": None if labels is None else CLASSES}
        found = evaluate_samples(extractor, subject, about, MAX_REFERENCE, overfitting(*losses))
        grid(drawn[:64], columns=8).save(each.folder / "samples.png")
        return found.measures
