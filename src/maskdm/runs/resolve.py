"""From what a person asked for to one whole configuration; and whether a run may go on under it."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from maskdm.config import Config
from maskdm.data import Source, Summary, inspect, open_source
from maskdm.engine import Machine, adapters, this_machine
from maskdm.errors import UserError
from maskdm.recipes import choose, recipe
from maskdm.recipes.automatic import Facts
from maskdm.runs.directory import RunDirectory
from maskdm.runs.latents import with_shape
from maskdm.runs.sample import check_guidance
from maskdm.runs.sizes import parse_size
from maskdm.sampling import make_scheduler
from maskdm.settings import differences, find, merge, override, read_yaml
from maskdm.tracking import require

Assignments = tuple[tuple[str, str], ...]
"""Settings given on the command line, as (name, text)."""

FIXED = ("data.", "model.", "diffusion.", "init", "lora.", "seed")
"""Settings that a run cannot change once begun, --fork or not: its data and what is held out, network, target, origin."""


@dataclass(frozen=True)
class TrainRequest:
    """What `maskdm train` was asked for."""

    data: str
    out: Path
    recipe: str | None = None
    config_file: Path | None = None
    settings: Assignments = ()
    dry_run: bool = False
    fork: bool = False
    base: Config | None = None
    """The configuration to begin with, where it is neither a recipe's nor chosen."""
    reasons: tuple[str, ...] = ()
    """Why that is as it is."""


@dataclass(frozen=True)
class Resolved:
    """A whole configuration, why it is so, the opened data and the machine."""

    config: Config
    reasons: tuple[str, ...]
    source: Source
    machine: Machine
    changed: tuple[str, ...]
    """Settings that differ from those the run began with; not empty only with --fork."""


def resolve(request: TrainRequest) -> Resolved:
    """The configuration of a request: recipe, file, or automatic choice; then the settings given; then `auto` replaced.

    A run that has begun keeps its settings; a request that names others is refused by name. Raises UserError.
    """
    run = RunDirectory(request.out)
    run.check_free()
    if request.recipe and request.config_file:
        raise UserError("--recipe and --config both given; name one")
    source = open_source(request.data)
    if run.started and source.index is None and len(source) < run.info()["data"]["count"]:
        raise other_data(run, source.name)  # before all of it is decoded to find that out
    base, reasons = _base(request, run, source)
    config = override(base, request.settings)
    config = replace(config, data=with_shape(replace(config.data, source=request.data)))
    if run.started and run.config().data.autoencoder == config.data.autoencoder:
        known = run.config().data  # their scale was measured when the run began
        config = replace(config, data=replace(config.data, latent_mean=known.latent_mean, latent_std=known.latent_std))
    machine = this_machine(config.hardware)
    hardware = replace(config.hardware, device=machine.device.type, precision=machine.precision)  # pyright: ignore[reportArgumentType]
    config = replace(config, hardware=hardware)
    make_scheduler(config.sampling.scheduler, config.diffusion.schedule, config.diffusion.target)  # refuses what does not fit
    require(config.tracking)
    adapters.require(config.lora)
    check_guidance(config.sampling, config)
    reasons = (
        *reasons,
        *(
            f"given: {change}"
            for change in differences(base, config)
            if ": auto -> " not in change and not change.startswith("data.source")
        ),
    )
    changed = _changes(run, config, request.fork) if run.started else ()
    return Resolved(config, reasons, source, machine, changed)


def _base(request: TrainRequest, run: RunDirectory, source: Source) -> tuple[Config, tuple[str, ...]]:
    if request.base is not None:
        return request.base, request.reasons
    if request.recipe:
        return _of_recipe(request.recipe, request)
    file = {} if request.config_file is None else read_yaml(request.config_file)
    config, reasons = (run.config(), (f"the settings that {request.out} began with",)) if run.started else _automatic(request, source, file)
    if request.config_file is None:
        return config, reasons
    return merge(config, file, str(request.config_file)), (f"settings from {request.config_file}; the rest:", *reasons)


def _of_recipe(name: str, request: TrainRequest) -> tuple[Config, tuple[str, ...]]:
    """A recipe; with --init, network and noise are those of the run to start from, whose weights fit no others."""
    config = recipe(name, request.data)
    given = _early(config, request.settings)
    start = override(config, [given["init"]]).init if "init" in given else None
    if start is None:
        return config, (f"recipe {name}",)
    init = RunDirectory.existing(Path(start)).config()
    return replace(config, model=init.model, diffusion=init.diffusion), (f"recipe {name}", f"network and noise: those of {start}")


def _automatic(request: TrainRequest, source: Source, file: Any) -> tuple[Config, tuple[str, ...]]:
    """Choose from the data and the machine, knowing the image size, device and origin where they are given."""
    summary = inspect(source)
    if summary.readable == 0:
        raise UserError(f"no image of {request.data} can be read; `maskdm data {request.data}` lists what is wrong with each")
    probe = choose(Facts(request.data, summary.count, 32, 32, False, 0, True, 1e9)).config
    early = merge(probe, {key: file[key] for key in ("hardware", "init") if key in file}, str(request.config_file))
    given = _early(probe, request.settings)
    early = override(early, [given[path] for path in ("init", "hardware.device") if path in given])
    sizes = [file["data"]["image_size"]] if isinstance(file.get("data"), dict) and "image_size" in file["data"] else []
    sizes += [given["data.image_size"][1]] if "data.image_size" in given else []
    machine = this_machine(early.hardware)
    init = RunDirectory.existing(Path(early.init)).config() if early.init else None
    facts = facts_of(source, summary, machine)
    choice = choose(facts, parse_size(sizes[-1]) if sizes else None, init)
    return choice.config, choice.reasons


def _early(probe: Config, settings: Assignments) -> dict[str, tuple[str, str]]:
    """Of the settings given, by their paths, those that must be known before the rest is chosen."""
    known: dict[str, tuple[str, str]] = {}
    for name, text in settings:
        with suppress(UserError):
            path = find(probe, name).path
            if path in ("init", "hardware.device", "data.image_size"):
                known[path] = (name, text)
    return known


def facts_of(source: Source, summary: Summary, machine: Machine) -> Facts:
    """What the automatic choice needs to know of data and machine."""
    return Facts(
        source=source.name,
        count=summary.count,
        height=summary.median_height,
        width=summary.median_width,
        gray=summary.gray,
        num_classes=len(source.class_names) if source.labels is not None and (source.labels >= 0).all() else 0,
        on_cpu=machine.device.type == "cpu",
        flops=machine.flops,
    )


def other_data(run: RunDirectory, name: str) -> UserError:
    """What is said where a run is to go on with data that is not its own."""
    known = run.info()["data"]
    return UserError(
        f"{run.path} was trained on {known['name']} ({known['count']} images), and {name} is other data, has changed since, or is decoded "
        f"otherwise by another Pillow; give the same, or another --out, and --init {run.path} to start from its weights"
    )


def _changes(run: RunDirectory, config: Config, fork: bool) -> tuple[str, ...]:
    before = run.config()
    same_data = replace(before, data=replace(before.data, source=config.data.source))
    changed = differences(same_data, config)
    fixed = [change for change in changed if change.startswith(FIXED)]
    if fixed:
        raise UserError(f"{run.path} was begun with another {fixed[0]}, which cannot change in a run; give another --out")
    began, now = ([stage.name for stage in each.stages] for each in (before, config))
    if now[: len(began)] != began:
        raise UserError(f"{run.path} has the stages {', '.join(began)}, which cannot be renamed or removed; give another --out, and --init")
    if changed and not fork:
        raise UserError(f"{run.path} was begun with another {changed[0]}; leave it out, give another --out, or --fork to go on so")
    return tuple(changed)
