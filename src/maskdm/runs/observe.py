"""What is kept of a run while it goes on: metrics, held-out loss, samples, checkpoints; and what it leaves at its end."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from maskdm.arithmetic import stage_flops, tokens_per_image
from maskdm.config import Config
from maskdm.data import Dataset, to_uint8
from maskdm.draws import ROWS, derive
from maskdm.engine import Step, Switch, Trainer, autocast, checkpoint, matrix_ceiling, peak_memory, reset_peak_memory, sharding, snapshots
from maskdm.engine.adapters import merged
from maskdm.masking import draw, num_sequences
from maskdm.models import build
from maskdm.pictures import grid, hide, side_by_side
from maskdm.report import write_report
from maskdm.runs.directory import RunDirectory
from maskdm.runs.display import TrainingBar
from maskdm.runs.losses import Losses
from maskdm.runs.plan import stage_records
from maskdm.runs.sample import draw_images, sampler, sampling_in_stage
from maskdm.runs.store import checkpoint_name, checkpoint_numbers, load_state, make_pipeline, save_checkpoint, save_pipeline
from maskdm.runs.watch import Watch
from maskdm.sampling import seeded
from maskdm.settings import to_plain, to_yaml
from maskdm.tracking import Trackers, network_histograms

GRID_ROWS, GRID_COLUMNS = 10, 5
STRIP_ROWS, STRIP_COLUMNS = 6, 10

SAVING, WATCHING = 600.0, 1800.0
"""Seconds that a checkpoint, and an evaluation, may take; so long the other processes wait."""


class Unsound(Exception):
    """Steps go wrong one after another, or weights are no numbers."""


class Diverged(Exception):
    """They do so from the last checkpoint on, whatever is tried. Exit code 1."""


def update_info(run: RunDirectory, trainer: Trainer, status: str, error: str | None) -> None:
    """Bring run.json up to date."""
    stages = stage_records(trainer.config, trainer.progress)
    total = sum(stage["flops"] for stage in stages)
    run.write_info(run.info() | {"status": status, "error": error, "stages": stages, "flops": total})


class Observer:
    """Follows a trainer, step by step."""

    def __init__(
        self,
        run: RunDirectory,
        config: Config,
        trainer: Trainer,
        dataset: Dataset,
        rows: tuple[NDArray[np.int64], NDArray[np.int64]],
        note: Callable[[str], None],
    ) -> None:
        self.note = run.say = note
        self.run, self.config, self.trainer, self.dataset = run, config, trainer, dataset
        self.watch = Watch(run, config, trainer, dataset, rows, self._draw)
        self.ranks, self.network = trainer.ranks, trainer.average.model
        named, step = config.tracking if run.writes else (), trainer.progress.step
        self.trackers = Trackers(named, run.path, step, to_plain(config), self._tracker_failed)
        self.trackers.text("config", to_yaml(config), step)
        self.losses = Losses(run, trainer, note)
        self.switch = Switch(trainer, self.watch.loss)
        self._sums = torch.zeros(3, device=trainer.device)  # of losses, their number, and the last gradient norm: of good steps
        self._saved, self._snapshots, self._pieces, self._waited = -1, 0, 0, 0.0
        self._ends: str | None = None  # the stage that the latest step has ended
        self._speed = (0, 0.0)  # images and seconds of the stage at the last line of metrics
        self._ceiling = matrix_ceiling(trainer.device, trainer.precision) * trainer.ranks.world

    # --- the mean of the losses since the last line is part of a run's state, so that a resumed log is the same ---

    def meter(self) -> dict[str, Any]:
        """Sum and number of the losses since the last line of metrics, the last gradient norm, and the best evaluation."""
        losses, count, grad_norm = self._sums.tolist()
        return {"losses": losses, "count": count, "grad_norm": grad_norm, "watch": self.watch.state()}

    def restore(self, meter: Mapping[str, Any]) -> None:
        """Continue with a saved meter."""
        if "watch" in meter:
            self.watch.restore(meter["watch"])
        self._sums.copy_(torch.tensor([meter["losses"], meter["count"], meter.get("grad_norm", 0.0)]))
        progress = self.trainer.progress
        self._saved = progress.step
        if progress.stage < len(progress.stages):
            self._speed = (progress.stages[progress.stage].images, progress.seconds)
            self._pieces = progress.stages[progress.stage].pieces
            self._snapshots = self._due(progress.stages[progress.stage].share(self.trainer.budget(progress.stage)))

    # --- each step ---

    def after(self, step: Step, bar: TrainingBar) -> None:
        """Do whatever is due after a step."""
        every = self.config.intervals
        if step.stage_step == 1:
            self.run.log("stage", step.number, stage=step.stage.name, state="start")
            self._speed = (0, self.trainer.progress.seconds - self._stage_seconds())
            self._pieces = step.stage.accumulate
            self.watch.enter_stage()
            self._snapshots = 0
        self._sums = torch.where(step.bad, self._sums, torch.stack([self._sums[0] + step.loss, self._sums[1] + 1, step.grad_norm]))
        grew = step.pieces > self._pieces
        if grew:
            self._say_pieces(step)
        self._pieces = step.pieces
        if step.number % every.log == 0 or step.ends_stage or step.stage_step == 1:
            self.trainer.settle()
            self._log(step, bar)
        self._look_after()
        ends = step.ends_stage or self._probe(step)
        self._ends = step.stage.name if ends else None
        if (every.evaluate and step.number % every.evaluate == 0) or ends:
            with self.ranks.at("evaluating", WATCHING):
                figures = self.watch.evaluate(step)
            self.trackers.scalars(figures, step.number)
            self.trackers.histograms(
                lambda: network_histograms(self.trainer.model, self.trainer.optimizer.param_groups, self.trainer.optimizer.state),
                step.number,
            )
            if not ends and self.watch.gives_up(step):
                self.trainer.end_stage()
                ends, self._ends = True, step.stage.name
            reset_peak_memory(self.trainer.device)  # of training steps alone
        if (every.sample and step.number % every.sample == 0) or ends:
            self._sample(step)
            reset_peak_memory(self.trainer.device)
        early = ends and not step.ends_stage and self.config.ema.snapshots > 0
        if early or self._due(step.share) > self._snapshots:  # before the checkpoint: what that has passed is on disk
            self._snapshot(step)
        if step.number % every.save == 0 or ends or grew:  # a resumed run must take up the pieces, or its sums are rounded otherwise
            self.save()

    def _look_after(self) -> None:
        """Say which steps were not applied, and what cannot be read. Raises Unsound where there are too many."""
        self.losses.look()
        for each in self.trainer.skipped:
            names = [self.dataset.name_of(row) for row in each.rows]
            figures = {
                name: value if math.isfinite(value) else str(value) for name, value in (("loss", each.loss), ("grad_norm", each.grad_norm))
            }
            self.run.log("skipped", each.number, stage=each.stage, **figures, images=names, times=each.times)
            first = f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]
            self.note(
                f"step {each.number} is skipped: loss {each.loss:.4g}, gradient norm {each.grad_norm:.4g} "
                f"({first}: the batch and its noise levels are in {self.run.metrics_log.name})"
            )
        last = self.trainer.skipped[-1] if self.trainer.skipped else None
        self.trainer.skipped.clear()
        if last is not None and self.trainer.unsound:
            found = f"loss {last.loss:.4g}, gradient norm {last.grad_norm:.4g}"
            raise Unsound(f"{self.trainer.bad_in_a_row} steps in a row went wrong, the last {last.number} (stage {last.stage}, {found})")

    def go_back(self, reason: str) -> None:
        """Take up the last checkpoint again, with other images and other noise from there on. Raises Diverged where that has not helped."""
        self._finish_save(now=True)
        saved = load_state(self.trainer, self.run)[0]
        before, advice = self.trainer.progress, "try a lower lr, or fp32"
        if saved is None:
            raise Diverged(f"{reason}; no checkpoint was written yet; {advice}")
        step = int(saved.numbers["progress"]["step"])
        returns = before.returns + 1 if before.detours and before.returned_to == step else 1
        if returns > self.config.guard.rollbacks:
            tried = f"went back to {saved.path} {returns - 1} times, for other images and noise" if returns > 1 else f"{saved.path} stands"
            raise Diverged(f"{reason}; {tried}; {advice}")
        self.trainer.restore(saved.tensors, saved.numbers)
        self.trainer.progress.detours = before.detours
        self.trainer.detour(returns)
        self.restore(saved.numbers["meter"])
        self.run.forget_after(step)
        if self.run.writes:
            snapshots.forget_after(self.run.snapshots, step)
        self.run.log("rollback", step, left=before.step, reason=reason, returns=returns)
        self.note(f"{reason}: back to {saved.path}, with other images and noise from there on")
        self._ends = saved.path.name.partition("-")[2].partition("-")[2] or None
        self.save()

    def _probe(self, step: Step) -> bool:
        """Whether the stage is ended by evidence, which a probe may have brought that was due."""
        found = self.switch.after()
        ended = self.trainer.progress.stages[self.trainer.progress.stage].ended
        if found is not None:
            self.run.log("probe", step.number, stage=step.stage.name, half=found.half, loss=found.full, until=found.until, ends=ended)
            said = "ends here" if ended else f"goes on to {found.until:.0%} of its budget"
            self.note(f"probe of whole images at step {step.number}: held-out loss {found.full:.4f}; the masked stage {said}")
        elif ended:
            self.note(f"the masked stage ends at step {step.number}: what is left goes to the next")
        return ended

    def _say_pieces(self, step: Step) -> None:
        size = step.stage.batch // step.pieces
        self.run.log("memory", step.number, stage=step.stage.name, pieces=step.pieces, images=size)
        self.note(
            f"memory ran out: stage {step.stage.name} goes on in pieces of {size} images; its batch is {step.stage.batch} as before "
            f"(--stages.{step.stage.name}.accumulate {step.pieces} begins so)"
        )

    def _due(self, share: float) -> int:
        """Snapshots that this share of a stage's budget asks for."""
        return int(share * self.config.ema.snapshots + 1e-9)

    def _snapshot(self, step: Step) -> None:
        self._snapshots = self._due(step.share)
        if self.trainer.powers.time:  # 0 where fp16 has skipped every step so far
            folder = self.run.snapshots / step.stage.name
            powers, all_of_it = self.trainer.powers, sharding.whole(self.trainer.powers.tensors())
            self.run.attempt("snapshots", lambda: snapshots.save(folder, powers, step.number, step.stage_step, all_of_it))

    def _stage_seconds(self) -> float:
        return self.trainer.progress.stages[self.trainer.progress.stage].seconds

    def _log(self, step: Step, bar: TrainingBar) -> None:
        self._finish_save(now=False)
        losses, count, grad_norm = self._sums.tolist()
        if count == 0:  # every step since the last line was skipped, which has been said
            return
        loss = losses / count
        images, seconds = step.images - self._speed[0], self.trainer.progress.seconds - self._speed[1]
        figures = {"loss": loss, "lr": step.lr, "grad_norm": grad_norm} | self._speeds(step, images, max(seconds, 1e-9))
        self.run.log(
            "train", step.number, stage=step.stage.name, stage_step=step.stage_step, images=step.images, seconds=step.seconds, **figures
        )
        self.trackers.scalars({f"train/{name}": value for name, value in figures.items()}, step.number)
        bar.update(step.stage.name, step.share, step.stage_step, self._stage_seconds(), figures)
        self._sums[:2] = 0
        self._speed = (step.images, self.trainer.progress.seconds)

    def _speeds(self, step: Step, images: int, seconds: float) -> dict[str, float]:
        """What `images` in `seconds` come to. The waiting and the peak of memory are those since the last line, too."""
        waited, self._waited = step.data_seconds - self._waited, step.data_seconds
        rate = images / seconds
        found = {
            "images_per_second": rate,
            "tokens_per_second": rate * tokens_per_image(self.config, step.stage.mask),
            "share_of_ceiling": rate * stage_flops(self.config, step.stage, 1) / self._ceiling,
            "data_wait": waited / seconds,
            "memory": float(peak_memory(self.trainer.device)),
        }
        reset_peak_memory(self.trainer.device)
        return found

    def save(self) -> None:
        """Write a checkpoint. Raises Unsound where the weights are no numbers, and what was saved before stands."""
        if not self.trainer.healthy():
            raise Unsound(f"weights are no numbers after step {self.trainer.progress.step}")
        self.losses.share()
        with self.ranks.at("saving", SAVING):
            saved = self.run.attempt("a checkpoint", self._save) if self.trainer.saver is None else self._save_parts(self.trainer.saver)
        if saved:
            self._saved = self.trainer.progress.step
            self.run.attempt(self.run.run_file.name, lambda: update_info(self.run, self.trainer, "running", None))

    def _save(self) -> None:
        self.run.sync_log()
        save_checkpoint(self.run, self.trainer, self.meter(), self._ends)

    def _save_parts(self, saver: sharding.Saver) -> bool:
        """Begin a checkpoint that all processes write while training goes on; the one before it is there first."""
        self._finish_save(now=True)
        if self.run.writes:
            self.run.sync_log()
        saver.begin(
            self.run.checkpoints,
            checkpoint_name(self.trainer, self._ends),
            self.trainer.tensors(),
            checkpoint_numbers(self.trainer, self.meter()),
        )
        return True

    def _finish_save(self, now: bool) -> None:
        """Put a checkpoint in its place that all have written."""
        if self.trainer.saver is None:
            return
        try:
            if self.trainer.saver.finish(now) and self.run.writes:
                checkpoint.rotate(self.run.checkpoints, self.config.intervals.keep)
        except OSError as error:
            self.run.failed("a checkpoint", error)

    def save_last(self) -> None:
        """Write what could not be written so far, and a checkpoint, if there is none of this step. Raises OSError."""
        self.run.say = None
        if self.run.writes:
            self.run.flush()
        if self._saved != self.trainer.progress.step:
            self.save()
        self._finish_save(now=True)

    def _tracker_failed(self, name: str, error: str) -> None:
        self.run.log("tracker", self.trainer.progress.step, name=name, error=error, state="dropped")
        self.note(f"tracking: {name} failed ({error}) and is left out from here on; the run goes on, and metrics.jsonl has its figures")

    # --- samples of the averaged weights ---

    def _sample(self, step: Step) -> None:
        num = self.config.sampling.num
        drawn = self._draw(num, [i * len(self.classes) // num for i in range(num)] if self.classes else None)
        picture = grid(drawn, columns=max(1, round(num**0.5)))
        file = self.run.samples / f"step-{step.number:08}.png"
        if self.run.attempt("pictures of samples", lambda: picture.save(file)):
            self.run.log("sample", step.number, stage=step.stage.name, file=f"samples/{file.name}")
        self.trackers.image("samples", np.asarray(picture), step.number)

    @property
    def classes(self) -> list[str]:
        """Names of the classes learned; empty when unconditional."""
        return list(self.dataset.class_names) if self.config.data.conditional else []

    def _draw(self, num: int, labels: list[int] | None) -> NDArray[np.uint8]:
        """The processes share the work, and each has all of it."""
        pipeline, each = make_pipeline(self.trainer.average.model, self.config, self.classes), -(-num // self.ranks.world)
        part = range(self.ranks.rank * each, (self.ranks.rank + 1) * each)  # as many in each: a network that is cut computes in step
        mine = None if labels is None else [labels[min(i, num - 1)] for i in part]
        with self.ranks.at("drawing samples"):
            settings = sampling_in_stage(self.config, self.trainer.progress.stage)
            drawn = draw_images(pipeline, settings, part, mine, self.config.seed, self.trainer.precision)
            return np.concatenate(self.ranks.gather(drawn))[:num]

    # --- the end ---

    def finish(self) -> None:
        """Leave the model folder, pictures and the report. Raises OSError."""
        self.save_last()
        samples = self._final_samples()
        state = sharding.whole(self.trainer.average.model.state_dict())
        if not self.run.writes:
            return
        if self.config.lora.rank:
            state = merged(state, self.config.lora)
        if self.trainer.cut or self.config.lora.rank:
            self.network = build(self.config.model, self.config.data, len(self.classes)).eval()
            self.network.load_state_dict(state)
        save_pipeline(make_pipeline(self.network, self.config, self.classes), self.run.model)
        samples.save(self.run.path / "samples.png")
        with self.ranks.at("drawing pictures"):
            self._denoising_strip().save(self.run.path / "denoising.png")
            if (masks := self._mask_picture()) is not None:
                masks.save(self.run.path / "masks.png")
        update_info(self.run, self.trainer, "finished", None)
        write_report(self.run.path)

    def _final_samples(self) -> Image.Image:
        """Samples beside real images: a row per class (the first ten that have images), or a plain grid."""
        labels = self.dataset.labels if self.classes else None
        if labels is None:
            num = GRID_COLUMNS**2
            return side_by_side(self._draw(num, None), self._real(self._spread(num)), GRID_COLUMNS, ("generated", "real"), [])
        shown = np.unique(labels[labels >= 0])[:GRID_ROWS]
        drawn = self._draw(len(shown) * GRID_COLUMNS, np.repeat(shown, GRID_COLUMNS).tolist())
        rows = np.concatenate([np.resize(np.flatnonzero(labels == label), GRID_COLUMNS) for label in shown])
        return side_by_side(drawn, self._real(rows), GRID_COLUMNS, ("generated", "real"), [self.classes[label] for label in shown])

    def _denoising_strip(self) -> Image.Image:
        """From noise to image: a row per image, the state at evenly spaced steps. Where noise is larger than the image, scaled."""
        pipeline, steps = make_pipeline(self.network, self.config, self.classes), list[torch.Tensor]()
        labels = [i * len(self.classes) // STRIP_ROWS for i in range(STRIP_ROWS)] if self.classes else None
        with autocast(self.trainer.device, self.trainer.precision):
            pipeline(
                batch_size=STRIP_ROWS,
                class_labels=labels,
                generator=seeded(self.config.seed, range(STRIP_ROWS)),
                on_step=lambda _, x: steps.append(x.float().cpu()),
                **sampler(self.config.sampling),
            )
        chosen = np.linspace(0, len(steps) - 1, min(STRIP_COLUMNS, len(steps))).round().astype(int)
        decoded = [pipeline.to_pixels(steps[i]) for i in chosen]
        shown = torch.stack([to_uint8(x / x.abs().amax(dim=(1, 2, 3), keepdim=True).clamp(min=1)) for x in decoded], dim=1)
        return grid(shown.flatten(0, 1).numpy(), columns=len(chosen))

    def _spread(self, num: int) -> NDArray[np.int64]:
        return np.linspace(0, len(self.dataset.images) - 1, num).astype(np.int64)

    def _real(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        return self.dataset.images[rows].transpose(0, 3, 1, 2)

    def _mask_picture(self) -> Image.Image | None:
        """What the first masked stage sees of six images."""
        stage = next((s for s in self.config.stages if draw(s.mask, ROWS, self.config.grid, torch.Generator()) is not None), None)
        if stage is None:
            return None
        images = self._real(self._spread(6))
        drawn = draw(stage.mask, ROWS, self.config.grid, torch.Generator().manual_seed(derive("mask picture", self.config.seed)))
        assert drawn is not None
        kept = drawn[:: num_sequences(stage.mask)][: len(images)]
        side = self.config.model.side * self.config.data.latent_factor
        seen = np.stack([hide(image, indices.tolist(), side) for image, indices in zip(images, kept, strict=False)])
        return grid(np.concatenate([images, seen]), columns=len(images))
