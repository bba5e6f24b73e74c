"""`maskdm compare`: arms trained in turns at equal cost, on the same data and seeds, measured alike; and a verdict."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import maskdm
from maskdm.config import Budget, Config, Stage
from maskdm.data import Dataset, Loader
from maskdm.draws import derive
from maskdm.engine import Machine, Ranks, Trainer, autocast, checkpoint, environment
from maskdm.errors import UserError
from maskdm.evaluation import Extractor, FeatureNetwork, ImageSet, Subject, denoising_loss, digest, evaluate_samples, overfitting
from maskdm.models import build
from maskdm.pictures import grid
from maskdm.recipes.arms import Arm, parse_arms
from maskdm.runs.compare_results import Contest, Record, summarize
from maskdm.runs.directory import write_text
from maskdm.runs.display import Display
from maskdm.runs.judge import choose_network
from maskdm.runs.plan import flops, stage_records
from maskdm.runs.resolve import Resolved, TrainRequest, resolve
from maskdm.runs.sample import draw_images
from maskdm.runs.sets import CLASSES, images_and_labels, natural_labels, sets_of
from maskdm.runs.store import cache_directory, make_pipeline, state_hash
from maskdm.runs.train import Interrupted, initialize, prepare_data, set_up_torch, stop_requests
from maskdm.settings import differences, from_plain, to_plain

SLICES = 20
"""Turns that a budget is cut into; the loss is measured after each."""

MEASURED, LEAST_MEASURED = 256, 32
"""Held-out images of a measurement: fewer where it would take more than a tenth of a turn."""

FINAL = 1000
MAX_REFERENCE = 5000
UNITS = {"s": ("seconds", 1.0), "m": ("seconds", 60.0), "h": ("seconds", 3600.0), "flops": ("flops", 1.0), "images": ("images", 1.0)}
PREFIXES = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9}


@dataclass(frozen=True)
class Cost:
    """What every arm may spend: seconds of training, FLOPs or images."""

    unit: str
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

    def stage_budget(self, config: Config) -> Callable[[Stage, float], Budget]:
        """Budgets of stages from their shares, for `Arm.config`."""

        def budget(stage: Stage, share: float) -> Budget:
            part = share * self.amount
            match self.unit:
                case "seconds":
                    return Budget(minutes=part / 60)
                case "images":
                    return Budget(images=max(1, round(part)))
                case _:
                    return Budget(images=max(1, round(part / flops(config, stage.mask, 1))))

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


class Contestant:
    """One arm under one seed: a trainer, what has been measured of it, and where both are kept."""

    def __init__(
        self, arm: Arm, config: Config, folder: Path, dataset: Dataset, rows: NDArray[np.int64], machine: Machine, display: Display
    ) -> None:
        self.arm, self.config, self.folder = arm, config, folder / f"seed-{config.seed}"
        classes = list(dataset.class_names) if config.data.conditional else []
        torch.manual_seed(derive("weights", config.seed))
        model = build(config.model, config.data, len(classes))
        found = checkpoint.names(self.folder)
        if not found:
            initialize(config, model, classes, display)
        self.trainer = Trainer(config, Loader(dataset, rows, config.seed), model, machine.device, machine.precision)
        self.records: list[Record] = []
        self.final: dict[str, Any] | None = None
        if found:
            saved = checkpoint.load(self.folder / found[-1])
            self.trainer.restore(saved.tensors, saved.numbers)
            self.records = saved.numbers["records"]
        self._steps = self.trainer.run()
        if (self.folder / "final.json").is_file():
            self.final = json.loads((self.folder / "final.json").read_text())

    def spent(self) -> Record:
        """Seconds, steps, images and FLOPs so far."""
        progress, stages = self.trainer.progress, self.config.stages
        work = sum(flops(self.config, stage.mask, done.images) for stage, done in zip(stages, progress.stages, strict=True))
        return {"seconds": progress.seconds, "steps": progress.step, "images": progress.images, "flops": work}

    def advance(self, unit: str, until: float, stop: list[str]) -> bool:
        """Train until so much has been spent, or all stages have ended, or `stop` holds something; True unless stopped."""
        while self.spent()[unit] < until and not stop:
            if next(self._steps, None) is None:
                return True
        return not stop

    def save(self) -> None:
        """Keep the trainer and the records."""
        numbers = {**self.trainer.numbers(), "records": self.records}
        checkpoint.save(self.folder, f"step-{self.trainer.progress.step:08}", self.trainer.tensors(), numbers)
        checkpoint.rotate(self.folder, 1)


def compare(request: CompareRequest, display: Display) -> str:
    """Run what is left of a comparison; returns the table and the verdicts. Raises UserError, Interrupted."""
    out, cost = request.train.out, Cost.parse(request.budget)
    if request.seeds < 1:
        raise UserError(f"--seeds is {request.seeds}; give at least 1")
    if request.num < 10:
        raise UserError(f"--num is {request.num}; give at least 10 samples")
    resolved = resolve(replace(request.train, out=out / "run"))  # where no run is
    base = replace(resolved.config, ema=replace(resolved.config.ema, snapshots=0), tracking=(), init=resolved.config.init)
    arms = parse_arms(request.arms, base)
    if base.init is not None:
        raise UserError("--init would be every arm's; name the arm that starts from a run: pretrained=whole/init=RUN")
    _begin(request, base, out)
    display.heading(f"maskdm {maskdm.__version__}: {', '.join(arm.name for arm in arms)} on {request.train.data}, {request.budget} each")
    set_up_torch(base, resolved)
    dataset = prepare_data(resolved, display)
    training, heldout = dataset.split(base.data.heldout, base.seed, base.data.limit)
    if len(heldout) < LEAST_MEASURED:
        raise UserError(f"{len(heldout)} held-out images are too few to compare by; hold at least {LEAST_MEASURED} out (--heldout)")
    budgets = cost.stage_budget(base)
    contestants = [
        Contestant(arm, arm.config(base, base.seed + i, budgets), out / "arms" / arm.name, dataset, training, resolved.machine, display)
        for i in range(request.seeds)
        for arm in arms
    ]
    with stop_requests() as stop:
        _train(contestants, cost, _Ruler(base, dataset, heldout, resolved.machine), stop, display)
        judge = _Judge(request, resolved, base, dataset, display)
        for each in contestants:
            if each.final is None:
                display.note(f"measuring {each.arm.name}, seed {each.config.seed}")
                each.final = judge.measure(each) | {"stages": stage_records(each.config, each.trainer.progress)}
                write_text(each.folder / "final.json", json.dumps(each.final, indent=1))
            if stop:
                raise Interrupted(f"stopped by {stop[0]}, and saved; the same command resumes")
    contest = Contest(
        {arm.name: [each.records for each in contestants if each.arm is arm] for arm in arms},
        {arm.name: [each.final or {} for each in contestants if each.arm is arm] for arm in arms},
        cost.unit,
    )
    about = {"budget": request.budget, "seeds": request.seeds, "data": request.train.data, "config": to_plain(base)}
    about |= {"environment": environment(resolved.machine, torch.get_num_threads()), "maskdm": maskdm.__version__}
    return summarize(contest, about, out)


def _begin(request: CompareRequest, base: Config, out: Path) -> None:
    """Write what was asked for; refuse to go on with something else. Raises UserError."""
    asked = {"data": request.train.data, "budget": request.budget, "arms": request.arms, "seeds": request.seeds}
    asked |= {"features": request.features, "num": request.num}
    file = out / "request.json"
    if out.is_dir() and not file.is_file() and any(out.iterdir()):
        raise UserError(f"--out {out} holds files that are not a comparison's; give an empty or a new directory")
    if file.is_file():
        before = json.loads(file.read_text())
        changed = [f"{key} {before.get(key)} -> {value}" for key, value in asked.items() if before.get(key) != value and key != "seeds"]
        changed += differences(from_plain(before["config"]), base)
        if changed or before["seeds"] > request.seeds:
            what = changed[0] if changed else f"seeds {before['seeds']} -> {request.seeds}"
            raise UserError(f"{out} holds another comparison ({what}); give another --out, or the same arguments to resume")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to --out {out}: {error.strerror}") from None
    write_text(file, json.dumps({**asked, "config": to_plain(base)}, indent=1))


def _train(contestants: list[Contestant], cost: Cost, ruler: _Ruler, stop: list[str], display: Display) -> None:
    """All contestants, a slice each in turns, so that a drifting machine hurts all alike; saved after each."""
    with display.counting("training in turns") as progress:
        for number in range(SLICES):
            for place in range(len(contestants)):
                each = contestants[(place + number) % len(contestants)]
                if len(each.records) > number:
                    continue
                going = each.advance(cost.unit, (number + 1) / SLICES * cost.amount, stop)
                if not going:
                    each.save()
                    raise Interrupted(f"stopped by {stop[0]}, and saved; the same command resumes")
                each.records.append(each.spent() | ruler.measure(each, cost, number))
                each.save()
                progress(number * len(contestants) + place + 1, SLICES * len(contestants))


class _Ruler:
    """Measures the held-out loss of whole images, on the same images and noise every time."""

    def __init__(self, base: Config, dataset: Dataset, heldout: NDArray[np.int64], machine: Machine) -> None:
        self.base, self.dataset, self.heldout, self.machine = base, dataset, heldout, machine
        self._count = 0

    def measure(self, each: Contestant, cost: Cost, number: int) -> Record:
        """The loss of the averaged weights, and by noise level."""
        if not self._count:
            known = [record["num_images"] for record in each.records]
            self._count = known[-1] if known else self._affordable(each, cost)
        found = self._loss(each, self._count)
        return {"loss": found.loss, "levels": found.levels, "num_images": self._count, "slice": number}

    def _affordable(self, each: Contestant, cost: Cost) -> int:
        """Images whose measurement takes a tenth of a turn, as long as turns are timed."""
        most = min(MEASURED, len(self.heldout))
        if cost.unit != "seconds":
            return most
        self._loss(each, LEAST_MEASURED)
        started = time.perf_counter()
        self._loss(each, LEAST_MEASURED)
        seconds = (time.perf_counter() - started) / LEAST_MEASURED
        return int(min(most, max(LEAST_MEASURED, 0.1 * cost.amount / SLICES / seconds)))

    def _loss(self, each: Contestant, count: int) -> Any:
        some = self.heldout[np.linspace(0, len(self.heldout) - 1, count).astype(np.int64)]
        pixels, labels = images_and_labels(self.base, self.dataset, some, self.machine.device)
        with autocast(self.machine.device, self.machine.precision):
            return denoising_loss(each.trainer.average.model, self.base.diffusion, pixels, labels)


class _Judge:
    """What is measured once, at the end: all held-out images' loss, and samples in features that no arm was trained on."""

    def __init__(self, request: CompareRequest, resolved: Resolved, base: Config, dataset: Dataset, display: Display) -> None:
        self.base, self.dataset, self.machine, self.num = base, dataset, resolved.machine, request.num
        self.training, self.heldout = sets_of(base, dataset)
        self.features, self.display = request.features, display
        self._network: FeatureNetwork | None = None

    def measure(self, each: Contestant) -> dict[str, Any]:
        """The keys are those of `maskdm evaluate` (docs/evaluation.md)."""
        if self._network is None:
            self._network = choose_network(self.features, self.training, self.heldout, 0, self.machine.device, Ranks(), self.display)
        model, names = each.trainer.average.model, list(self.dataset.class_names) if self.base.data.conditional else []
        labels = natural_labels(self.base, self.dataset, self.training.rows, self.num)
        pipeline = make_pipeline(model, self.base, names)
        drawn = draw_images(pipeline, self.base.sampling, range(self.num), labels, each.config.seed, self.machine.precision)
        pixels = drawn.transpose(0, 2, 3, 1)
        key = digest(state_hash(model.state_dict()), np.arange(self.num))
        samples = ImageSet(pixels, np.arange(self.num), key, None if labels is None else np.array(labels))
        losses = []
        for images in (self.training, self.heldout):
            assert images is not None
            rows = images.rows[images.places(FINAL)]
            shown, classes = images_and_labels(self.base, self.dataset, rows, self.machine.device)
            with autocast(self.machine.device, self.machine.precision):
                losses.append(denoising_loss(model, self.base.diffusion, shown, classes))
        extractor = Extractor(self._network, cache_directory() / "features", Ranks())
        subject = Subject(samples, self.training, self.heldout, names)
        about = {"sampling": to_plain(self.base)["sampling"], "seed": each.config.seed, "classes": None if labels is None else CLASSES}
        found = evaluate_samples(extractor, subject, about, MAX_REFERENCE, overfitting(*losses))
        grid(drawn[:64], columns=8).save(each.folder / "samples.png")
        return found.measures
