"""The training loop, a generator: it yields a record of each step, and the caller logs, samples and saves.

A trainer's whole state is what `tensors` and `progress` return: weights, their average, the optimizer's moments, the stage,
the step and the place in the data. Everything random is a function of the seed and the step (`draws.py`), so there is no
generator state, and a run resumed from them continues bit for bit.
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import asdict
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import record_function

from maskdm.arithmetic import stage_flops
from maskdm.config import Budget, Config, Stage
from maskdm.data import Feed, Loader
from maskdm.draws import derive, draw_step
from maskdm.engine import sharding
from maskdm.engine.guard import Sentry, healthy
from maskdm.engine.hardware import Precision, autocast, compiled, out_of_memory, synchronize
from maskdm.engine.memory import more_pieces
from maskdm.engine.optim import Average, PowerAverages, learning_rate, make_optimizer, part
from maskdm.engine.progress import Progress, Skipped, StageProgress, Step, Verdict
from maskdm.engine.ranks import LONG, STEP, Ranks, pieces_of
from maskdm.engine.teaching import Teaching
from maskdm.errors import UserError
from maskdm.masking import num_sequences
from maskdm.models import Denoiser


class Trainer:
    """Runs the stages of a configuration over a loader's images."""

    def __init__(
        self, config: Config, loader: Loader, model: Denoiser, device: torch.device, precision: Precision, ranks: Ranks | None = None
    ) -> None:
        self.config, self.device, self.ranks = config, device, ranks or Ranks()
        for stage in config.stages:
            if stage.batch < self.ranks.world:
                raise UserError(f"stages.{stage.name}.batch {stage.batch} leaves some of {self.ranks.world} processes without an image")
        self.feed = Feed(loader, device)
        self.precision: Precision = precision
        self.model = model
        self.cut = config.hardware.shard and self.ranks.world > 1
        if not self.cut:
            self.model.to(device=device)  # pyright: ignore[reportCallIssue] - diffusers wraps the method
        self.average = Average(self.model, config.ema)
        self.teaching = Teaching(config, self.model)
        if self.cut:
            for each in (self.model, self.average.model):
                sharding.cut(each, self.ranks, device, bf16=precision == "bf16")
        self.saver = sharding.Saver(self.ranks) if self.cut else None
        self.model.train()
        self.model.recompute(config.hardware.checkpoint_activations)
        self.network: Any = compiled(self.model) if config.hardware.compile else self.model
        if self.ranks.world > 1 and not self.cut:
            seldom = config.model.fuse > 0 or config.model.mask_token  # layers that not every mask needs
            with warnings.catch_warnings(action="ignore", category=FutureWarning):  # newer torch has another word for it
                self.network = DistributedDataParallel(self.network, broadcast_buffers=False, find_unused_parameters=seldom)
        self.powers = PowerAverages(self.model, config.ema.sigma_rel if config.ema.snapshots else ())
        self.optimizer = make_optimizer(self.model, config.optimizer, config.stages[0].lr)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.progress = Progress(stages=[StageProgress() for _ in config.stages])
        self._names: dict[Tensor, str] = {p: name for name, p in self.model.named_parameters()}
        self.sentry = Sentry(config.guard, device)
        self.skipped: list[Skipped] = []
        """Steps found bad since the caller last looked, and emptied this."""
        self.bad_in_a_row = 0
        self.asked_to_stop: Callable[[], bool] = lambda: False
        self.stopping = False
        """Whether any process had been asked to stop: the same after each step in all of them."""
        self._clock = 0.0  # of this process; that of the first is the stages'
        self._ahead: deque[tuple[torch.cuda.Event | None, Verdict]] = deque()

    # --- state ---

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """The tensors of the state, by file and name."""
        states = self.optimizer.state.items()
        moments: dict[str, Tensor] = {f"{key}/{self._names[p]}": value for p, state in states for key, value in state.items()}
        both = ("model", self.model), ("average", self.average.model)
        state = {file: part(self.model, model.state_dict()) for file, model in both} | {"optimizer": moments}
        powers = self.powers.tensors()
        return state | self.teaching.tensors() | {"guard": self.sentry.tensors()} | ({"powers": powers} if powers else {})

    def numbers(self) -> dict[str, Any]:
        """The rest of the state, as plain values."""
        return {"progress": asdict(self.progress), "scaler": self.scaler.state_dict(), "powers": self.powers.numbers()}

    def restore(self, tensors: Mapping[str, Mapping[str, Tensor]], numbers: Mapping[str, Any]) -> None:
        """Continue from a state that `tensors` and `numbers` returned."""
        for model, file in ((self.model, "model"), (self.average.model, "average")):
            mine = model.state_dict()
            saved = {name: sharding.like(tensors[file][name], own) for name, own in part(self.model, mine).items()}
            model.load_state_dict(mine | saved)
        self.teaching.restore(tensors)
        parameters = dict(self.model.named_parameters())
        self.optimizer = make_optimizer(self.model, self.config.optimizer, self.config.stages[0].lr)
        for key, value in tensors["optimizer"].items():
            kind, _, name = key.partition("/")
            of_weights = value.shape == parameters[name].shape and kind != "step"
            self.optimizer.state[parameters[name]][kind] = sharding.like(value, parameters[name]) if of_weights else value.to(self.device)
        progress: dict[str, Any] = dict(numbers["progress"])
        progress["stages"] = [StageProgress(**stage) for stage in progress["stages"]]
        progress["stages"] += [StageProgress() for _ in self.config.stages[len(progress["stages"]) :]]
        self.progress = Progress(**progress)
        self.feed.reorder(self._seed("order"))
        self.sentry.restore(tensors.get("guard", {}))
        self._ahead.clear()
        self.skipped, self.bad_in_a_row = [], 0
        self._reopen()
        if numbers.get("powers", {}).get("sigma_rel") == list(self.powers.sigma_rel):
            self.powers.restore(tensors.get("powers", {}), numbers["powers"])
        else:  # saved by a version without them, or under another setting: they begin here
            self.powers.restart(self.progress.step)
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(numbers["scaler"])

    @contextlib.contextmanager
    def apart(self, stage: Stage | None = None) -> Generator[None]:
        """What is done inside is forgotten. With `stage` it is begun, as after the one at hand."""
        self._catch_up()
        kept = self.skipped, self.bad_in_a_row
        tensors = {file: {name: value.clone() for name, value in group.items()} for file, group in self.tensors().items()}
        numbers, progress = copy.deepcopy(self.numbers()), self.progress
        self.progress = copy.deepcopy(progress)
        if stage is not None:
            self._enter(stage)
        yield
        self.restore(tensors, numbers)
        self.progress = progress  # the very one: the loop holds on to its stage
        self.skipped, self.bad_in_a_row = kept

    def detour(self, returns: int) -> None:
        """Another order of images and other draws from here on; `returns`: how often the run has come back to here."""
        self.progress.detours += 1
        self.progress.returns, self.progress.returned_to = returns, self.progress.step
        self.feed.reorder(self._seed("order"))

    def _seed(self, what: Literal["train", "order"]) -> int:
        """Of the draws, or of the order of images."""
        seed, detours = self.config.seed, self.progress.detours
        if detours:
            return derive(what, seed, detours)
        return derive("train", seed) if what == "train" else seed

    @property
    def unsound(self) -> bool:
        """Whether so many steps in a row were bad that going on is of no use."""
        return self.bad_in_a_row >= self.config.guard.in_a_row

    def healthy(self) -> bool:
        """Whether the weights and their averages are numbers. Waits for the device."""
        states = (self.model.state_dict(), self.average.model.state_dict(), self.powers.tensors())
        fine = healthy(*([sharding.part(value) for value in state.values()] for state in states))
        return self.ranks.total(torch.tensor(float(not fine), device=self.device)).item() == 0

    def rehearse(self) -> None:
        """Run a step of every stage that is left and forget it: what the first steps of a process cost beside is then paid."""
        clock = self._clock
        with self.apart():
            for stage in self.config.stages[self.progress.stage :]:
                self.step(stage, StageProgress(), stage.budget, LONG)
        self._clock = clock  # else the next step would tell the others of the time

    # --- the loop ---

    def run(self) -> Iterator[Step]:
        """Train to the end of the last stage, yielding after each step. The state is consistent at every yield."""
        while self.progress.stage < len(self.config.stages):
            stage = self.config.stages[self.progress.stage]
            done = self.progress.stages[self.progress.stage]
            if done.steps == 0:
                self._enter(stage)
            budget = self.budget(self.progress.stage)
            while done.share(budget) < 1 and not done.ended:
                yield self.step(stage, done, budget)
            self.progress.stage += 1

    def budget(self, number: int) -> Budget:
        """A stage's budget, with what the one before has left, where that was to end by evidence; worth as much arithmetic."""
        stage, before = self.config.stages[number], self.config.stages[max(0, number - 1)]
        if number == 0 or not before.budget.auto:
            return stage.budget
        left = 1 - self.progress.stages[number - 1].share(before.budget)
        images = self.cost(before) / self.cost(stage)
        return stage.budget.extended(before.budget, left, images, images * before.batch / stage.batch)

    def cost(self, stage: Stage) -> float:
        """Arithmetic of a stage for an image, with its part of the optimizer's in one process."""
        return stage_flops(self.config, stage, 1) + self.optimizer.flops / stage.batch

    def end_stage(self) -> None:
        """End the stage at the step just yielded, whatever is left of its budget."""
        done = self.progress.stages[self.progress.stage]
        done.ended, done.terms = True, self._terms(self.config.stages[self.progress.stage])

    def _terms(self, stage: Stage) -> dict[str, Any]:
        return {"budget": asdict(stage.budget), "patience": self.config.evaluation.patience}

    def _reopen(self) -> None:
        """Let a stage go on that was ended under another budget or patience, unless the next has begun.

        An older version did not keep them: a stage that it ended stays so.
        """
        here = self.progress.stage
        for stage, done in zip(self.config.stages[here:], self.progress.stages[here:], strict=True):
            if done.terms is not None and done.terms != self._terms(stage):
                done.ended, done.terms = False, None

    def _enter(self, stage: Stage) -> None:
        """Start a stage: weights raw or averaged from what came before, a new average and a fresh optimizer."""
        if stage.start_from == "ema":
            self.model.load_state_dict(self.average.model.state_dict())
        self.teaching.enter()
        self.average.restart(self.model)
        self.powers.restart(self.progress.step)
        self.sentry.restart()
        self.optimizer = make_optimizer(self.model, self.config.optimizer, stage.lr)

    def step(self, stage: Stage, done: StageProgress, budget: Budget, limit: float = STEP) -> Step:
        """One optimizer step of a stage that has done so much of a budget; of several processes each may take `limit` seconds."""
        started = time.perf_counter()
        number = self.progress.step
        self.optimizer.set_rate(lr := learning_rate(stage, done.steps, done.course(budget)))
        self.ranks.mark(f"step {number + 1}", limit)
        loss, told = self._tell(self._gradients(stage, done, number))
        with record_function("maskdm: optimizer"):
            for part in self.optimizer.parts:
                self.scaler.unscale_(part)
            grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.clip or math.inf)
            grad_norm = sharding.whole({"norm": grad_norm})["norm"]
            scale = self.scaler.get_scale()
            bad = self.sentry.judge(loss, grad_norm, overflows=self.scaler.is_enabled())
            self._apply(bad, grad_norm)
            self.scaler.update()
            self.optimizer.zero_grad()
        with record_function("maskdm: average"):
            if self.scaler.get_scale() >= scale:  # fp16 skips a step whose gradients overflowed; the averages must not count it
                self.average.update(self.model, done.steps)
                self.powers.update(self.model)
        self._stay_near(Verdict(bad, loss, grad_norm, told, number, self.progress.images, done.images, stage, done))
        done.steps += 1
        done.images += stage.batch
        self.progress.step += 1
        self.progress.images += stage.batch
        self._spend(done, time.perf_counter() - started)
        share = done.share(budget)
        return Step(
            number=self.progress.step,
            stage=stage,
            stage_step=done.steps,
            share=share,
            loss=loss,
            grad_norm=grad_norm,
            bad=bad,
            lr=lr,
            images=done.images,
            seconds=self.progress.seconds,
            data_seconds=self.feed.seconds,
            pieces=done.pieces,
            ends_stage=share >= 1,
        )

    def settle(self) -> None:
        """Wait for the device, on the clock of the stage: for whoever is about to read from it."""
        started = time.perf_counter()
        synchronize(self.device)
        self._catch_up()
        self._spend(self.progress.stages[self.progress.stage], time.perf_counter() - started)

    def _spend(self, done: StageProgress, seconds: float) -> None:
        """Put time on a stage's clock: with several processes on the first one's, which they all go by, a step late (`_tell`)."""
        if self.ranks.world == 1:
            done.seconds += seconds
        else:
            self._clock += seconds

    def _tell(self, loss: Tensor) -> tuple[Tensor, Tensor | None]:
        """The whole batch's loss; and of several processes how many were asked to stop, and the seconds that the first has spent."""
        if self.ranks.world == 1:
            self.stopping = self.asked_to_stop()
            return loss, None
        clock, self._clock = self._clock, 0.0
        mine = torch.tensor([float(self.asked_to_stop()), clock if self.ranks.first else 0.0])
        shared = self.ranks.total(torch.cat([loss[None], mine.to(self.device, non_blocking=True)]))
        return shared[0], shared[1:]

    def _apply(self, bad: Tensor, grad_norm: Tensor) -> None:
        """The optimizer's step, which leaves everything as it is where `bad`: told so on the device where its kernel can be."""
        if self.scaler.is_enabled() or not self.optimizer.fused:  # the first reads from the device in any case
            if not bad and grad_norm.isfinite():  # fp16 may overflow in the weights of one part alone
                for part in self.optimizer.parts:
                    self.scaler.step(part)
        else:
            self.optimizer.found_inf = sharding.everywhere(bad.float(), next(self.model.parameters()))
            self.optimizer.step()

    def _stay_near(self, verdict: Verdict) -> None:
        """Let the host run at most two steps ahead of a GPU: enough to keep it busy, and seconds stay those of the work."""
        event = None
        if self.device.type == "cuda":
            verdict = verdict.on_its_way()
            event = torch.cuda.Event()
            event.record()
        self._ahead.append((event, verdict))
        if event is None or len(self._ahead) > 2:
            self._look(*self._ahead.popleft())

    def _catch_up(self) -> None:
        while self._ahead:
            self._look(*self._ahead.popleft())

    def _look(self, event: torch.cuda.Event | None, verdict: Verdict) -> None:
        """Read what became of a step that the device is done with."""
        if event is not None:
            event.synchronize()
        if verdict.told is not None:
            stopping, seconds = verdict.told.tolist()
            self.stopping = self.stopping or stopping > 0
            verdict.done.seconds += seconds
        if not verdict.bad:
            self.bad_in_a_row = 0
            return
        self.bad_in_a_row += 1
        stage, each = verdict.stage, num_sequences(verdict.stage.mask)
        rows = self.feed.rows(verdict.position - verdict.within, stage.batch, verdict.position)
        draws = draw_step(
            self.config, stage.mask, self._seed("train"), verdict.number, 0, stage.batch * each, stage.batch * each, self.device
        )
        figures = float(verdict.loss), float(verdict.grad_norm)
        self.skipped.append(Skipped(verdict.number + 1, stage.name, *figures, rows.tolist(), draws.t.flatten().tolist()))

    def _gradients(self, stage: Stage, done: StageProgress, number: int) -> Tensor:
        """The gradients of a batch, and its loss. Where memory runs out it is computed in more pieces: the same step."""
        if done.asked != stage.accumulate:  # a new stage, or another setting since
            done.asked = done.pieces = stage.accumulate
        while True:
            try:
                pieces, loss = pieces_of(self.ranks.part(stage.batch), done.pieces), torch.zeros((), device=self.device)
                self.feed.begin(self.progress.images - done.images, stage.batch, pieces)
                for piece in pieces:
                    with contextlib.nullcontext() if piece is pieces[-1] else self._unshared():
                        loss += self._backward(stage, number, piece.start, len(piece))
                return loss
            except RuntimeError as error:  # of several processes the others would wait for this one's gradients
                if not out_of_memory(error) or done.pieces >= stage.batch or self.ranks.world > 1:
                    raise
            self.optimizer.zero_grad()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            done.pieces = more_pieces(stage.batch, done.pieces)

    @contextlib.contextmanager
    def _unshared(self) -> Generator[None]:
        """Gradients are summed over processes with the last piece of a batch alone."""
        if self.cut:
            self.model.set_requires_gradient_sync(False)  # pyright: ignore - of FSDPModule, which `cut` has made it
            yield
            self.model.set_requires_gradient_sync(True)  # pyright: ignore
        else:
            with self.network.no_sync() if self.ranks.world > 1 else contextlib.nullcontext():
                yield

    def template(self) -> dict[str, dict[str, Tensor]]:
        """Tensors of all names that a state may have, cut as this one's."""
        moments: dict[str, Tensor] = {f"{key}/{name}": p for name, p in self.model.named_parameters() for key in ("exp_avg", "exp_avg_sq")}
        return self.tensors() | {"optimizer": moments}

    def _backward(self, stage: Stage, number: int, first: int, count: int) -> Tensor:
        """Add the gradients of a piece of the batch; returns its share of the loss."""
        each = num_sequences(stage.mask)
        with record_function("maskdm: data"), self.ranks.at("reading images", self.feed.loader.patience):
            batch = self.feed.batch(self.progress.images + first, count)
            images, labels = batch.images, batch.labels
            if each > 1:
                images = images.repeat_interleave(each, dim=0)  # as `draws` counts them
                labels = None if labels is None else labels.repeat_interleave(each, dim=0)
        with record_function("maskdm: draws"):
            where = (self._seed("train"), number, first * each, count * each, stage.batch * each)
            draws = draw_step(self.config, stage.mask, *where, self.device)
        with record_function("maskdm: forward"), autocast(self.device, self.precision):
            loss = self.teaching.loss(stage, self.network, self.average.model, images, labels, draws, where)
        with record_function("maskdm: backward"):
            total = loss.total * (count / stage.batch)
            self.scaler.scale(total * self.ranks.world).backward()  # torch divides by the number of processes
        return total.detach()
