"""Other people's networks as arms of `maskdm compare`: quality at equal cost, in one table with ours.

`python -m benchmarks.peers.compare DATA --budget 20m --peers uvit,unet --uvit CLONE --out DIR [--arms ...] [any setting of a run]`
"""

from __future__ import annotations

import logging
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from tyro.conf import arg

from benchmarks.peers.arms import parse_peers
from maskdm import cli, runs
from maskdm.errors import UserError

CLONE = "a clone of github.com/{}"


@dataclass
class PeerCompare(cli.Compare):
    """As `maskdm compare`, with other people's networks among the arms; the same command again resumes.

    All have the same data, noise, target, optimizer, learning rate, batch, precision, average of weights and evaluation. Sizes are matched
    to ours (see benchmarks/peers/arms.py).
    """

    peers: Annotated[
        str,
        arg(
            help="comma-separated PEER[@parameters][=STAGES]: authors, uvit, maskdit or unet, of about our FLOPs for a whole image (or "
            "our parameters); STAGES as --arms reads them, where the peer knows their masks"
        ),
    ] = "unet"
    authors: Annotated[Path | None, arg(help=CLONE.format("jiachenlei/maskdm"))] = None
    uvit: Annotated[Path | None, arg(help=CLONE.format("baofff/U-ViT"))] = None
    maskdit: Annotated[Path | None, arg(help=CLONE.format("Anima-Lab/MaskDiT"))] = None


OWN = ("--peers", "--authors", "--uvit", "--maskdit")


def run_command(arguments: list[str]) -> int:
    """Run one command line; returns the exit code, as that of `maskdm`."""
    warnings.filterwarnings("ignore", module=r"diffusers")
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # plain attention in bf16, on a CPU too: as our own
    line = cli.split_settings(arguments, (*cli.TRAIN_OPTIONS, *cli.OPTIONS["compare"], *OWN))
    verb = tyro.cli(PeerCompare, prog="python -m benchmarks.peers.compare", args=line.rest)
    clones = {name.removeprefix("--"): getattr(verb, name.removeprefix("--")) for name in OWN[1:]}
    request = runs.TrainRequest(verb.data, verb.out, verb.recipe, verb.config, tuple(line.settings))
    asked = runs.CompareRequest(request, verb.budget, verb.arms, verb.seeds, verb.features, verb.num, verb.first_seed)
    try:
        print(runs.compare(asked, runs.Display(), lambda base: parse_peers(verb.peers, clones, base)))
    except (UserError, runs.Interrupted) as error:
        print(f"error: {error}", file=sys.stderr)
        return 130 if isinstance(error, runs.Interrupted) else 2
    return 0


if __name__ == "__main__":
    sys.exit(run_command(sys.argv[1:]))
