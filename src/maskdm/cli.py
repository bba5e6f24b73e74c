"""`maskdm VERB`: parses the command line, calls `runs`, prints. Heavy imports wait until a verb runs."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, assert_never

import tyro
from tyro.conf import Positional, arg, subcommand

from maskdm import __version__
from maskdm.cli_demo import Demo, show
from maskdm.cli_edit import Edit, change
from maskdm.cli_export import Export, Pack, Push, give
from maskdm.cli_sample import PrecisionName, Run, Sample, WeightsName
from maskdm.command_line import OPTIONS, TRAIN_OPTIONS, CommandLine, split_settings
from maskdm.config import GuideName, SchedulerName
from maskdm.errors import UserError, of_storage
from maskdm.recipes import OFFERED

Data = Annotated[
    Positional[str], arg(metavar="DATA", help="folder of images, shards or their URL, table, .npz/.npy array, or digits / emoji")
]

RECIPES = f"a ready-made configuration, one of {OFFERED}"


@dataclass
class Train:
    """Train a model on a folder of images, masked first, then on whole images; the same command again resumes.

    Every setting of a run is an option of its own, by its full name or any part of it that is unambiguous
    (--image-size 64, --mask.ratio 0.75, --stages.pretrain.lr 1e-3); the list is below.
    """

    data: Data
    out: Annotated[Path, arg(help="directory of the run")]
    recipe: Annotated[str | None, arg(help=RECIPES)] = None
    config: Annotated[Path | None, arg(help="YAML file of settings; what it leaves out is chosen")] = None
    dry_run: Annotated[bool, arg(help="print the whole configuration and the plan, and train nothing")] = False
    fork: Annotated[bool, arg(help="let a run go on under changed settings")] = False


@dataclass
class Plan:
    """Say what a run would take, before it is begun: a few steps of each stage are measured, and nothing is kept.

    Takes the settings that `maskdm train` takes. Speed, memory, time and cost of each stage, what masking gains on this machine
    beside the ideal, and advice.
    """

    data: Data
    recipe: Annotated[str | None, arg(help=RECIPES)] = None
    config: Annotated[Path | None, arg(help="YAML file of settings; what it leaves out is chosen")] = None
    price_per_hour: Annotated[float | None, arg(help="of the machine, in any currency: the cost is worked out")] = None
    out: Annotated[Path | None, arg(help="JSON file for the figures")] = None


@dataclass
class Compare:
    """Train several ways at equal cost, in turns, on the same data and seeds, and say which reaches what the first reaches sooner.

    Takes the settings that `maskdm train` takes. The same command again resumes; --seeds and --arms may grow. Leaves a table, compare.png
    and compare.json.
    """

    data: Data
    out: Annotated[Path, arg(help="directory of the comparison")]
    budget: Annotated[str, arg(help="of each arm and seed: 60s, 10m, 2h of training, evaluation not counted; 1e17flops; 2Mimages")]
    arms: Annotated[
        str,
        arg(
            help="comma-separated, the first is what the others are compared with: whole; maskdm (the recipe's masked stage); or masked "
            "stages joined by +, each MASK[-HIDDEN][@SHARE][/KEY=VALUE ...], such as patch-50@60, block4-75@50/batch=256, crop4, "
            "views4, route-50, sprint-75, defer-75, decode-50, or patch-90@30+patch-50@30: HIDDEN and SHARE of the budget in % (or auto), "
            "keys batch, lr, warmup, decay, start_from; the rest of the budget goes to whole images; NAME=ARM names one"
        ),
    ] = "whole,maskdm"
    seeds: Annotated[int, arg(help="runs of each arm; intervals are over them")] = 3
    first_seed: Annotated[int, arg(help="of these runs: so seeds can be spread over machines or days")] = 0
    features: Annotated[str, arg(help="feature network of the distance, as `maskdm evaluate` takes it")] = "self"
    num: Annotated[int, arg(help="samples drawn of each run, for the distance")] = 500
    recipe: Annotated[str | None, arg(help=RECIPES)] = None
    config: Annotated[Path | None, arg(help="YAML file of settings; what it leaves out is chosen")] = None


@dataclass
class Distil:
    """Distil a run: a network that samples as it does in a few steps, with the guidance scale as a condition; the same command resumes.

    Stages: guidance in one evaluation (where the run has classes), then half the sampling steps, again and again. Takes settings as
    `maskdm train` does (--batch 64, --guided.lr 1e-4).
    """

    run: Run
    out: Annotated[Path, arg(help="directory of the distilled run, a run as any other")]
    steps: Annotated[int, arg(help="sampling steps of the teacher at the beginning: --end times a power of two")] = 32
    end: Annotated[int, arg(help="sampling steps at the end")] = 1
    scales: Annotated[str | None, arg(help="least and largest guidance scale; 1,4 if left out, for a run with classes")] = None
    method: Annotated[
        Literal["halve", "shortcut"], arg(help="progressive halving; or shortcut: all numbers of steps at once, in one stage")
    ] = "halve"
    updates: Annotated[int | None, arg(help="optimizer steps of all stages together; as many as RUN took if left out")] = None
    mask: Annotated[str | None, arg(help="mask under which teacher and student see images, such as patch-50; none if left out")] = None
    data: Annotated[str | None, arg(help="the images, where those that RUN was trained on have moved")] = None
    dry_run: Annotated[bool, arg(help="print the whole configuration and the plan, and train nothing")] = False
    fork: Annotated[bool, arg(help="let a run go on under changed settings")] = False


@dataclass
class DataVerb:
    """Say what is in a data set: count, sizes, channels, classes, broken and duplicate files, and what is done to them."""

    data: Data
    image_size: Annotated[str | None, arg(help="height and width to prepare for: 64, or 64x96; chosen from the data if left out")] = None


@dataclass
class Evaluate:
    """Measure a run's samples, or a folder of images, against real images: distances, copies, colours, each with its interval.

    maskdm evaluate RUN                         draws samples, writes RUN/metrics.json and the report
    maskdm evaluate --images A --data B         measures two folders of images against each other
    """

    run: Annotated[Positional[Path | None], arg(metavar="RUN", help="directory of a run of `maskdm train`")] = None
    images: Annotated[str | None, arg(help="images to measure, instead of a run's samples: anything that --data takes")] = None
    data: Annotated[str | None, arg(help="the real images; for a run only where those it was trained on have moved")] = None
    features: Annotated[
        str,
        arg(
            help="feature network: self (trained on the real images), inception[:FILE] (the one of the FID), onnx:FILE, resnet:FILE, "
            "dinov2:FOLDER, clip:FOLDER, transformers:FOLDER"
        ),
    ] = "self"
    out: Annotated[Path | None, arg(help="JSON file for the figures (a run's also go to RUN/metrics.json)")] = None
    num: Annotated[int, arg(help="number of samples")] = 1000
    num_reference: Annotated[int | None, arg(help="real images measured against, drawn at random; all if left out")] = None
    image_size: Annotated[str | None, arg(help="with --images: size both are brought to; that of A if left out")] = None
    weights: Annotated[WeightsName, arg(help="as trained, averaged, or averaged at the best evaluation")] = "ema"
    ema: Annotated[float | None, arg(help="length (sigma_rel) of the weights' average, from the snapshots; as trained if left out")] = None
    steps: Annotated[int | None, arg(help="denoising steps; the run's setting if left out")] = None
    scheduler: Annotated[SchedulerName | None, arg(help="sampler; the run's setting if left out")] = None
    eta: Annotated[float | None, arg(help="noise added back by ddim, 0 to 1; the run's setting if left out")] = None
    guidance: Annotated[float | None, arg(help="guidance scale, 1 for none; the run's setting if left out")] = None
    guide: Annotated[GuideName | None, arg(help="what guidance leads away from: the null class, or the shallow path")] = None
    seed: Annotated[int, arg(help="seed of the samples' noise")] = 0
    precision: Annotated[PrecisionName, arg(help="arithmetic of the network; auto is bf16 where the machine has it")] = "auto"


@dataclass
class EmaSweep:
    """Make averages of the weights of several lengths from a run's snapshots, measure each, and write ema_sweep.json."""

    run: Run
    sigma_rel: Annotated[str, arg(help="lengths, as shares of the stage")] = "0.02,0.03,0.05,0.075,0.1,0.15,0.2,0.25"
    stage: Annotated[str | None, arg(help="stage whose snapshots are taken; the last that has any if left out")] = None
    measure: Annotated[
        Literal["heldout-loss", "kernel-distance"],
        arg(help="held-out noise loss, or a distance of samples, which is dearer"),
    ] = "heldout-loss"
    num: Annotated[int | None, arg(help="held-out images measured, all if left out; or samples drawn, 500 if left out")] = None
    save: Annotated[bool, arg(help="also write the best as RUN/model-ema-LENGTH, a diffusers pipeline folder")] = False


@dataclass
class Report:
    """Write a run's report.html anew from its files; of several runs, one page that puts them side by side.

    maskdm report RUN                           writes RUN/report.html
    maskdm report A B C --out compare.html      compares the runs A, B and C
    """

    run: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN [RUN ...]", help="directories of runs of `maskdm train`")]
    out: Annotated[Path | None, arg(help="with two or more runs: the page to write; compare.html in this folder if left out")] = None


Verb = (
    Annotated[Train, subcommand("train")]
    | Annotated[Plan, subcommand("plan")]
    | Annotated[Compare, subcommand("compare")]
    | Annotated[Distil, subcommand("distil")]
    | Annotated[DataVerb, subcommand("data")]
    | Annotated[Pack, subcommand("pack")]
    | Annotated[Sample, subcommand("sample")]
    | Annotated[Edit, subcommand("edit")]
    | Annotated[Demo, subcommand("demo")]
    | Annotated[Evaluate, subcommand("evaluate")]
    | Annotated[EmaSweep, subcommand("ema-sweep")]
    | Annotated[Report, subcommand("report")]
    | Annotated[Export, subcommand("export")]
    | Annotated[Push, subcommand("push")]
)

AnyVerb = Train | Plan | Compare | Distil | DataVerb | Pack | Sample | Edit | Demo | Evaluate | EmaSweep | Report | Export | Push


def main() -> None:
    """Entry point. Exit codes: 0 done, 1 failed, 2 bad input, 130 stopped on request (saved)."""
    sys.exit(run_command(sys.argv[1:]))


def run_command(arguments: list[str]) -> int:
    """Run one command line; returns the exit code. Errors in what the user gave are one line on standard error."""
    if arguments in (["--version"], ["-V"]):
        print(f"maskdm {__version__}")
        return 0
    own = OPTIONS.get(arguments[0]) if arguments else None
    has_settings = own is not None
    line = CommandLine(arguments) if own is None else split_settings(arguments, TRAIN_OPTIONS + own)
    try:
        verb = _parse(line.rest)
        if isinstance(verb, int):
            if verb == 0 and has_settings:
                print(_settings_help())
            return verb
        return _perform(verb, line.settings, arguments)
    except UserError as error:
        return _fail(str(error), 2)
    except KeyboardInterrupt:
        return _fail("stopped", 130)
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except RuntimeError as error:
        from maskdm.engine import out_of_memory

        if not out_of_memory(error):
            raise
        return _fail("memory ran out, with one image at a time too; use a smaller --model.width, or --checkpoint-activations all", 1)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM):
            return _fail(f"{error.filename or 'a file'} cannot be read or written: {error.strerror}", 2)
        if not of_storage(error):
            raise
        return _fail(f"cannot write {error.filename or 'a file'}: {error.strerror}; mend that, and the same command goes on", 1)


def _say(text: str) -> None:
    if text:  # in the first of several processes
        print(text)


def _fail(message: str, code: int) -> int:
    print(f"maskdm: error: {' '.join(message.split())}", file=sys.stderr)
    return code


def _parse(arguments: list[str]) -> AnyVerb | int:
    """The verb, or an exit code after --help. Raises UserError: tyro's boxed message, as one line."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(Verb, prog="maskdm", description=_ABOUT, args=arguments or ["--help"])  # pyright: ignore[reportArgumentType, reportReturnType, reportCallIssue]
    except SystemExit as stop:
        if stop.code in (0, None):
            return 0
        text = " ".join(re.sub(r"\x1b\[[0-9;]*m|[^\x20-\x7e]", " ", printed.getvalue()).split())
        text = re.sub(r"^Parsing error\s*|-{3,}", " ", text).split("For full helptext")[0]
        raise UserError(" ".join(text.split()).strip() or "the command line cannot be read; see maskdm --help") from None


_ABOUT = (
    "Train your own image diffusion model by masked pre-training and fine-tuning. Shell completion: maskdm --tyro-print-completion bash"
)


def _settings_help() -> str:
    """Every setting with its default in the digits recipe and its meaning."""
    from maskdm.recipes import recipe
    from maskdm.settings import leaves

    lines = ["settings of a run (defaults shown as the digits recipe has them; `--dry-run` shows those of your run):"]
    for leaf in leaves(recipe("digits", "DATA")):
        name = leaf.path.removesuffix(".kind")
        lines.append(f"  --{name} {leaf.value if leaf.value is not None else 'none'}\n        {leaf.meaning}")
    return "\n".join(lines)


def _perform(verb: AnyVerb, settings: list[tuple[str, str]], arguments: list[str]) -> int:
    import logging
    import shlex
    import warnings

    command = shlex.join(["maskdm", *arguments])
    # Threads that spin long while they wait make a step forty times slower when another process wants the cores (docs/experiments.md).
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not isinstance(verb, Train | Sample | Evaluate):
        raise UserError(f"{arguments[0]} is work for one process; start it without torchrun (train, sample and evaluate are shared)")
    warnings.filterwarnings("ignore", module=r"diffusers|torch\.utils\.tensorboard|multiprocessing")
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    from maskdm import runs

    match verb:
        case Train():
            asked = runs.TrainRequest(verb.data, verb.out, verb.recipe, verb.config, tuple(settings), verb.dry_run, verb.fork)
            return _trained(lambda: runs.train(asked, command, runs.Display()))
        case Plan():
            nowhere = Path(os.devnull).parent / "maskdm-plan"  # no run is there: `plan` writes none
            request = runs.TrainRequest(verb.data, nowhere, verb.recipe, verb.config, tuple(settings))
            print(runs.plan(request, verb.price_per_hour, verb.out, runs.Display()))
        case Compare():
            return _compare(verb, settings)
        case Distil():
            request = runs.DistilRequest(**vars(verb), settings=tuple(settings))
            return _trained(lambda: runs.distil_run(request, command, runs.Display()))
        case DataVerb():
            print(runs.describe_data(verb.data, verb.image_size, runs.Display()))
        case Sample():
            request = runs.SampleRequest(**vars(verb))
            paths = runs.sample_run(request, runs.Display())
            _say(f"{len(paths) - 1} images in {verb.out}; overview in {paths[-1]}" if paths else "")
        case Edit():
            print(change(verb))
        case Demo():
            show(verb)
        case Evaluate():
            _say(_evaluate(verb))
        case EmaSweep():
            sweep = runs.SweepRequest(verb.run, runs.parse_lengths(verb.sigma_rel), verb.stage, verb.measure, verb.num, verb.save)
            print(runs.ema_sweep(sweep, runs.Display()))
        case Report():
            print(_report(verb))
        case Export() | Pack() | Push():
            print(give(verb))
        case _ as unreachable:
            assert_never(unreachable)
    return 0


def _compare(verb: Compare, settings: list[tuple[str, str]]) -> int:
    from maskdm import runs

    request = runs.TrainRequest(verb.data, verb.out, verb.recipe, verb.config, tuple(settings))
    asked = runs.CompareRequest(request, verb.budget, verb.arms, verb.seeds, verb.features, verb.num, verb.first_seed)
    return _trained(lambda: runs.compare(asked, runs.Display()))


def _evaluate(verb: Evaluate) -> str:
    from maskdm import runs

    of_a_run = ("num", "steps", "scheduler", "eta", "guidance", "guide", "seed", "precision", "weights", "ema")
    sampling = None
    if verb.run is not None:
        sampling = runs.SampleRequest(verb.run, verb.run, **{name: getattr(verb, name) for name in of_a_run})
    wrong = [name for name in of_a_run if vars(verb)[name] != vars(Evaluate())[name]] if sampling is None else []
    if verb.images is not None and wrong:
        raise UserError(f"--{wrong[0]} says how a run is sampled; leave it out with --images")
    request = runs.EvaluateRequest(sampling, verb.images, verb.data, verb.features, verb.num_reference, verb.image_size, verb.out)
    return runs.evaluate(request, runs.Display()).summary


def _report(verb: Report) -> Path:
    from maskdm import runs

    folders = list(verb.run)
    if not folders:
        raise UserError("name the directory of a run, or of several to compare")
    if len(folders) > 1:
        return runs.compare_reports(folders, verb.out or Path("compare.html"))
    if verb.out is not None:
        raise UserError("--out is for the page that compares two or more runs; the report of one is RUN/report.html")
    return runs.report_run(folders[0])


def _trained(work: Callable[[], str]) -> int:
    from maskdm import runs

    try:
        _say(work())
    except runs.Interrupted as stop:
        return _fail(str(stop), 130)
    except (runs.Diverged, runs.Lost) as failure:
        return _fail(str(failure), 1)
    return 0
