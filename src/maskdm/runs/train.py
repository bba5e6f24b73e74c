"""`maskdm train`: prepare the data, run the stages, keep the record, leave a model, samples and a report."""

from __future__ import annotations

import os
import platform
import shutil
import signal
import threading
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import torch

import maskdm
from maskdm.config import Config, Convert, Denoise
from maskdm.data import Dataset, make_loader, prepare
from maskdm.draws import derive
from maskdm.engine import Lost, Ranks, Trainer, Transfer, adapters, checkpoint, environment, joined, keep_freed_memory, snapshots, transfer
from maskdm.errors import Told, UserError, shorten
from maskdm.models import Denoiser, build
from maskdm.report import write_report
from maskdm.runs.directory import RunDirectory
from maskdm.runs.display import Display, TrainingBar
from maskdm.runs.latents import with_latents
from maskdm.runs.observe import Observer, Unsound, update_info
from maskdm.runs.plan import plan_lines, stage_records
from maskdm.runs.resolve import Resolved, TrainRequest, other_data, resolve
from maskdm.runs.sets import is_data_of, labels_hash
from maskdm.runs.store import cache_directory, class_names, load_denoiser, load_state
from maskdm.settings import to_yaml


class Interrupted(Told):
    """The run was asked to stop, and has saved. Exit code 130."""


def train(request: TrainRequest, command: str, display: Display) -> str:
    """Train, or resume, or say that there is nothing to do; returns what to print, but of several processes only in the first.

    Raises UserError, Diverged, Interrupted.
    """
    with joined() as ranks:
        try:
            said = _of_one(request, command, display if ranks.first else Display(quiet=True), ranks)
        except Lost:
            ranks.name_the_lost()
            raise
        return said if ranks.first else ""


def _of_one(request: TrainRequest, command: str, display: Display, ranks: Ranks) -> str:
    resolved = resolve(request)
    run, config = RunDirectory(request.out), resolved.config
    display.heading(f"maskdm {maskdm.__version__}: {request.data} -> {request.out}")
    for line in (*resolved.reasons, *plan_lines(config, resolved.machine)):
        display.note(f"  {line}")
    if request.dry_run:
        return to_yaml(config)
    began = run.started
    finished = began and run.info()["status"] == "finished" and not resolved.changed
    ranks.wait()  # all have seen what is there, and the first may write
    run.writes = ranks.first
    # decided together: each machine may have a copy of its own, and files of other times
    if all(ranks.gather(finished and run.info()["data"]["fingerprint"] == resolved.source.fingerprint())):
        return _nothing_to_do(run)
    set_up_torch(config, resolved, ranks.beside)
    dataset = ranks.after_first(lambda: prepare_data(resolved, display), first=ranks.local == 0)
    if began and not is_data_of(run, dataset):
        raise other_data(run, request.data)
    if finished:
        return _nothing_to_do(run)
    config, dataset = with_latents(config, dataset, resolved.machine, ranks, display)
    resolved = replace(resolved, config=config)
    with run.alone() if run.writes else nullcontext():
        if run.writes and run.started != began:
            raise UserError(f"another process has begun a run in {run.path} meanwhile; run the command again")
        return _train(run, resolved, dataset, command, display, ranks)


def _nothing_to_do(run: RunDirectory) -> str:
    if run.writes:
        write_report(run.path)  # a kill may have come between the last two
    return f"{run.path} is finished already; nothing to do\n{_results(run)}"


def _train(run: RunDirectory, resolved: Resolved, dataset: Dataset, command: str, display: Display, ranks: Ranks) -> str:
    config = resolved.config
    classes = list(dataset.class_names) if config.data.conditional else []
    model = build(config.model, config.data, len(classes))
    begun = len(checkpoint.names(run.checkpoints)) > 0
    report = [] if begun else initialize(config, model, classes, display)
    if config.lora.rank:
        _adapt(run, config, model, report if not begun else None, display)
    training, heldout = dataset.split(config.data.heldout, config.seed, config.data.limit)
    trainer = Trainer(
        config, make_loader(dataset, training, config.seed), model, resolved.machine.device, resolved.machine.precision, ranks
    )
    saved, wrong = load_state(trainer, run)
    for error in wrong:
        display.note(f"{error.reason}: set aside as damaged-..., and the one before it used")
    if saved is not None:
        trainer.restore(saved.tensors, saved.numbers)
        display.note(f"resuming from {saved.path} (step {trainer.progress.step})")
        if trainer.powers.sigma_rel and trainer.powers.time == 0:
            display.note("  it has no averages for snapshots (an older version, or another ema.sigma_rel): they begin here")
    if run.writes:
        _begin(run, resolved, dataset, trainer, command, report, display)
    ranks.wait()
    ranks.mark("training")
    with ExitStack() as last, _recorded(run, trainer):
        if config.hardware.compile and trainer.progress.stage < len(config.stages):
            display.note("compiling the network for each stage: minutes, which count in no budget")
            trainer.rehearse()
            ranks.mark("training")
        observer = Observer(run, config, trainer, dataset, (training, heldout), display.note)
        last.callback(observer.trackers.close)  # after the record: it may wait for a server
        if saved is not None:
            observer.restore(saved.numbers["meter"])
        _run(trainer, observer, display)
        observer.finish()
    return f"trained in {trainer.progress.seconds:.0f} s\n{_results(run)}"


def _results(run: RunDirectory) -> str:
    return "\n".join(
        [
            f"  samples  {run.path / 'samples.png'}",
            f"  model    {run.model}",
            f"  report   {run.path / 'report.html'}",
            f"  more     maskdm sample {run.path} --out DIR; maskdm evaluate {run.path}",
        ]
    )


def set_up_torch(config: Config, resolved: Resolved, beside: int = 1) -> None:
    """Threads, which so many processes share, precision and the seed of the weights."""
    keep_freed_memory()
    torch.set_num_threads(config.hardware.threads or max(1, resolved.machine.cores // beside))
    torch.set_float32_matmul_precision("high" if resolved.machine.device.type == "cuda" else "highest")
    torch.manual_seed(derive("weights", config.seed))


def prepare_data(resolved: Resolved, display: Display) -> Dataset:
    """The decoded images, and what is to be said of them."""
    started = time.perf_counter()
    with display.counting("decoding images") as progress:
        dataset = prepare(resolved.source, resolved.config.data, cache_directory(), progress)
    kept = "read from the shards while training" if resolved.source.index is not None else f"cache: {dataset.path}"
    display.note(f"  {len(dataset.images)} images ready in {time.perf_counter() - started:.1f} s ({kept})")
    for note in dataset.notes:
        display.note(f"  {note}")
    if dataset.broken:
        display.note(f"  {len(dataset.broken)} broken files skipped:")
        for name, reason in dataset.broken[:20]:
            display.note(f"    {name}: {reason}")
        if len(dataset.broken) > 20:
            display.note(f"    ... and {len(dataset.broken) - 20} more; `maskdm data {resolved.config.data.source}` lists them all")
    return dataset


def initialize(config: Config, model: Denoiser, classes: list[str], display: Display) -> list[Transfer]:
    """Start from another run's weights, where `init` names one, and say what became of each tensor."""
    if config.init is None:
        return []
    path = Path(config.init)
    theirs = RunDirectory.existing(path).config()
    for name in ("target", "schedule"):
        was, now = getattr(theirs.diffusion, name), getattr(config.diffusion, name)
        converted = name == "target" and isinstance(config.stages[0].lesson, Convert)
        if was != now and not converted:
            raise UserError(f"--init {path} was trained with diffusion.{name} {was}, this run has {now}; use --{name} {was}")
    source, weights, origin = load_denoiser(path, config.stages[0].start_from)
    theirs = class_names(path)
    if theirs != classes and not isinstance(config.stages[0].lesson, Denoise):
        raise UserError(f"{path} knows the classes {shorten(', '.join(theirs), 60)}, and the data has others; give it images of its own")
    report = transfer(source, weights, model, (theirs, classes))
    display.heading(f"weights from {origin}")
    for fate in ("loaded", "resized", "re-initialised", "unused"):
        of_fate = [each for each in report if each.fate == fate]
        if fate == "loaded":
            display.note(f"  loaded: {len(of_fate)} of {len(report)} tensors")
        else:
            for each in of_fate:
                display.note(f"  {fate}: {each.name} ({each.reason})")
    return report


def _adapt(run: RunDirectory, config: Config, model: Denoiser, report: list[Transfer] | None, display: Display) -> None:
    """Give the network adapters; in a run that goes on (no report) the very weights that they began to adapt."""
    if report is not None:
        adapters.adapt(model, config.lora, [each.name for each in report if each.fate in ("resized", "re-initialised")])
    else:
        base = checkpoint.load(run.base)
        adapters.adapt(model, config.lora, base.numbers["trained"])
        model.load_state_dict(base.tensors["weights"], strict=False)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    others = [name for name, p in model.named_parameters() if p.requires_grad and not adapters.is_adapter(name)]
    beside = f", {', '.join(others)} among them" if others else ""
    display.note(f"  adapters of rank {config.lora.rank}: {count:.3g} million weights are trained{beside}; the others stay as they are")


def _save_base(run: RunDirectory, trainer: Trainer) -> None:
    """Keep what the adapters adapt, once, so that checkpoints are small and the run stands by itself."""
    state = trainer.model.state_dict()
    changed = trainer.tensors()["model"]
    others = [name for name in changed if not adapters.is_adapter(name)]
    checkpoint.save(run.path, run.base.name, {"weights": {n: v for n, v in state.items() if n not in changed}}, {"trained": others})


def _begin(
    run: RunDirectory, resolved: Resolved, dataset: Dataset, trainer: Trainer, command: str, report: list[Transfer], display: Display
) -> None:
    """Write the configuration and run.json of a new run; update those of one that goes on."""
    config = resolved.config
    step = trainer.progress.step
    resumed = step > 0
    run.create()
    info: dict[str, Any] = (
        run.info() if run.started else {"created": datetime.now().astimezone().isoformat(timespec="seconds"), "command": command}
    )
    threads = info.get("environment", {}).get("threads")
    info |= {
        "version": maskdm.__version__,
        "status": "running",
        "error": None,
        "seed": config.seed,
        "parameters": sum(p.numel() for name, p in trainer.model.named_parameters() if not adapters.is_adapter(name)),
        "model": f"{config.model.kind} {config.model.width} x {config.model.depth}, {config.model.heads} heads, patch {config.model.patch}"
        + (" of wavelets" if config.model.transform == "haar" else ""),
        "data": _describe(resolved, dataset),
        "environment": environment(resolved.machine, torch.get_num_threads()) | {"processes": trainer.ranks.world},
        "process": {"pid": os.getpid(), "host": platform.node(), "started": psutil.Process().create_time()},
        "tokens": config.grid[0] * config.grid[1],
        "choices": info.get("choices", list(resolved.reasons)),
        "stages": stage_records(config, trainer.progress),
    }
    if report:
        info["init"] = [{"name": each.name, "fate": each.fate, "reason": each.reason} for each in report]
    before = info.get("command")
    if resolved.changed:
        info["command"] = command  # the one before would be refused now
        shutil.copy2(run.config_file, run.path / f"config-before-{datetime.now():%Y%m%d-%H%M%S}.yaml")
    run.write_info(info)
    run.write_config(config)
    if config.lora.rank and run.writes and not resumed:
        _save_base(run, trainer)
    run.forget_after(step if resumed else -1)
    snapshots.forget_after(run.snapshots, step if resumed else -1)
    if resumed:
        run.log("resume", step)
    if resolved.changed:
        run.log("fork", step, changed=list(resolved.changed), before=before)
    if resumed and threads not in (None, torch.get_num_threads()):
        display.note(f"begun with {threads} threads, now {torch.get_num_threads()}: the weights are no longer the same bit for bit")


def _describe(resolved: Resolved, dataset: Dataset) -> dict[str, Any]:
    training, heldout = dataset.split(resolved.config.data.heldout, resolved.config.seed, resolved.config.data.limit)
    count, height, width, channels = dataset.images.shape
    return {
        "name": resolved.config.data.source,
        "fingerprint": dataset.fingerprint,
        "content_hash": dataset.content_hash,
        "labels_hash": labels_hash(dataset),
        "count": count,
        "train": len(training),
        "heldout": len(heldout),
        "height": height,
        "width": width,
        "channels": channels,
        "classes": list(dataset.class_names) if resolved.config.data.conditional else [],
        "broken": [list(each) for each in dataset.broken[:200]],
        "num_broken": len(dataset.broken),
        "notes": list(dataset.notes),
    }


@contextmanager
def _recorded(run: RunDirectory, trainer: Trainer) -> Generator[None, None, None]:
    """Whatever ends the run before its time, from here on, stands in run.json and in the report."""
    try:
        yield
    except (Interrupted, KeyboardInterrupt):
        _note_end(run, trainer, "stopped", None)
        raise
    except Exception as error:
        _note_end(run, trainer, "failed", str(error))
        raise


def _note_end(run: RunDirectory, trainer: Trainer, status: str, error: str | None) -> None:
    if not run.writes:
        return
    with suppress(OSError):  # a full disk, of which the exception on its way speaks
        update_info(run, trainer, status, error)
        write_report(run.path)


def _run(trainer: Trainer, observer: Observer, display: Display) -> None:
    with stop_requests() as stop, display.training() as bar:
        while trainer.progress.stage < len(trainer.config.stages):
            try:
                with trainer.ranks.together():
                    _to_the_end(trainer, observer, bar, stop)
            except Unsound as reason:
                observer.go_back(str(reason))
    assert trainer.progress.stage == len(trainer.config.stages)


def _to_the_end(trainer: Trainer, observer: Observer, bar: TrainingBar, stop: list[str]) -> None:
    trainer.asked_to_stop = lambda: bool(stop)
    for step in trainer.run():
        observer.after(step, bar)
        if trainer.stopping:
            observer.save_last()
            by = stop[0] if stop else "what another process was told"
            raise Interrupted(f"stopped by {by} at step {step.number} and saved; the same command resumes")


@contextmanager
def stop_requests() -> Generator[list[str], None, None]:
    """Names of the signals that asked the run to stop: looked at between steps, when the state is whole.

    SIGUSR1 is what SLURM sends before it takes a machine back (`--signal=USR1@120`). A second one stops at once. Python gives signals to
    the main thread alone: in another one nothing is asked, and whoever started it keeps the handlers.
    """
    asked: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def ask(number: int, _: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(signal.Signals(number).name)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: it was not Python's
