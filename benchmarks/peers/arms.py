"""The arms of `benchmarks.peers.compare`: which peers there are, how large each is made, and the stages it trains in.

Sizes: a transformer has our width, heads and patch, and as many blocks as bring its FLOPs for a whole image nearest to ours (its
parameters, for PEER@parameters); a U-Net has the width that does. FLOPs are torch's count of a forward pass, ours and theirs alike;
parameters are counted with one class where there are classes.
"""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch

from benchmarks.peers import sizes
from benchmarks.peers.adapters import Shape
from benchmarks.peers.networks import Authors, MaskDiT, PeerDenoiser, UNet, UViT, decoder_of
from maskdm.config import BlockMask, Config, CropMask, DecodeMask, Diffusion, Mask, NoMask, PatchMask, Stage, ViewsMask
from maskdm.errors import UserError, nearest
from maskdm.models import build
from maskdm.recipes.arms import Arm, Network, parse_arm

Match = Literal["flops", "parameters"]
Make = Callable[[Shape], PeerDenoiser]


@dataclass(frozen=True)
class Source:
    """Someone's network. file: what is loaded from a clone of the repository. stages: its own way to train, as `--arms` reads it."""

    network: Callable[[Any, Shape, Diffusion], PeerDenoiser]
    stages: str = "whole"
    masks: tuple[type[Mask], ...] = (NoMask,)
    repository: str | None = None
    file: str = ""


PEERS = {
    # its own kinds of mask on kept patches alone; mask, learning rate and share of the budget as our recipe sets them
    "authors": Source(Authors, "maskdm", (NoMask, PatchMask, BlockMask, CropMask, ViewsMask), "jiachenlei/maskdm", "models/mask_uvit.py"),
    "uvit": Source(UViT, repository="baofff/U-ViT", file="libs/uvit.py"),
    # half of the patches hidden, and whole images for a twentieth of the steps, as its published configurations have it
    "maskdit": Source(MaskDiT, "decode-50@95", (NoMask, DecodeMask), "Anima-Lab/MaskDiT", "models/maskdit.py"),
    "unet": Source(UNet),
}


def parse_peers(texts: str, clones: Mapping[str, Path | None], base: Config) -> list[Arm]:
    """Arms from PEER[@parameters][=STAGES], separated by commas. Raises UserError."""
    return [_arm(text.strip(), clones, base) for text in texts.split(",") if text.strip()]


def _arm(text: str, clones: Mapping[str, Path | None], base: Config) -> Arm:
    label, _, stages = text.partition("=")
    name, _, by = label.partition("@")
    if name not in PEERS or by not in ("", "flops", "parameters"):
        known = f"{', '.join(PEERS)}, each also as PEER@parameters"
        raise UserError(f"--peers '{label}' is no peer{nearest(name, list(PEERS))}; there are {known}")
    source = PEERS[name]
    arm = replace(parse_arm(stages or source.stages, base), name=label)
    if arm.init:
        raise UserError(f"--peers '{text}': a peer starts from nothing; leave /init out")
    for stage in arm.stages:
        if not isinstance(stage.mask, source.masks):
            known = ", ".join(mask.kind for mask in source.masks)
            raise UserError(f"--peers '{text}': {name} knows no mask {stage.mask.kind}; give it one of {known}")
    clone, origin = _clone(name, source, clones.get(name))

    def make(shape: Shape) -> PeerDenoiser:
        return source.network(clone, shape, base.diffusion)

    shape, match = _sized(source, make, base, "parameters" if by == "parameters" else "flops")
    arm = replace(arm, stages=tuple(_own(stage, source, shape) for stage in arm.stages))
    return replace(arm, network=_network(source, make, shape, origin, match, [stage.mask for stage in arm.stages]))


def _own(stage: Stage, source: Source, shape: Shape) -> Stage:
    """A stage that says how many blocks MaskDiT's own decoder has, where the grammar counts blocks of ours."""
    own = isinstance(stage.mask, DecodeMask) and source.network is MaskDiT
    return replace(stage, mask=replace(stage.mask, decoder=decoder_of(shape)[1])) if own else stage


def _clone(name: str, source: Source, clone: Path | None) -> tuple[Path | None, dict[str, str]]:
    """The folder of a peer's code, and where it is from. Raises UserError with the command that fetches it."""
    if source.repository is None:
        return None, {"source": "diffusers", "version": diffusers.__version__}
    fetch = f"git clone https://github.com/{source.repository} {name}, and give --{name} {name}"
    if clone is None:
        raise UserError(f"peer {name} needs its code: {fetch}")
    if not (clone / source.file).is_file():
        raise UserError(f"--{name} {clone} holds no {source.file}; {fetch}")
    if importlib.util.find_spec("einops") is None:
        raise UserError(f"peer {name} needs einops: pip install einops")
    line = ["git", "-c", "safe.directory=*", "-C", str(clone), "rev-parse", "HEAD"]
    found = subprocess.run(line, capture_output=True, text=True, check=False)
    if found.returncode:
        raise UserError(f"--{name} {clone} is no git clone, so that its commit is not known; {fetch}")
    digest = hashlib.sha256((clone / source.file).read_bytes()).hexdigest()
    return clone, {"source": f"github.com/{source.repository}", "commit": found.stdout.strip(), "file": source.file, "sha256": digest}


def _sized(source: Source, make: Make, base: Config, by: Match) -> tuple[Shape, dict[str, Any]]:
    """The size at which a peer is nearest to ours, and how near."""
    side, across = base.data.image_size
    if side != across:
        raise UserError(f"peers take square images only, and these are {side}x{across}; give --image-size {min(side, across)}")
    if source.network is UNet and side % 4:
        raise UserError(f"peer unet halves an image twice, and {side} pixels cannot be; give --image-size {max(4, side // 4 * 4)}")
    model, classes = base.model, int(base.data.conditional)
    ours = build(model, base.data, classes)
    wanted = {"flops": sizes.work(ours), "parameters": float(sizes.parameters(ours))}
    shape = Shape(side, model.side, model.width, base.blocks, model.heads, base.data.channels, classes)

    def measure(shape: Shape) -> dict[str, float]:
        with torch.device("meta"):
            network = make(shape)
        return {"flops": sizes.work(network), "parameters": float(sizes.parameters(network))}

    if source.network is UNet:
        candidates = [replace(shape, width=width) for width in sizes.UNET_WIDTHS]
    else:  # both U-ViTs build 2 * (depth // 2) + 1 blocks
        candidates = [replace(shape, depth=depth) for depth in range(1, 3 * base.blocks + 1, 1 if source.network is MaskDiT else 2)]
    chosen = sizes.nearest(candidates, lambda each: measure(each)[by], wanted[by])
    found = measure(chosen)
    near = {key: {"ours": wanted[key], "its": found[key]} for key in wanted}
    return chosen, {"matched": by, **near}


def _network(source: Source, make: Make, shape: Shape, origin: dict[str, str], match: dict[str, Any], masks: Sequence[Mask]) -> Network:
    """What the comparison needs to know of a peer at its size; its arithmetic is counted here, under each mask."""
    size: dict[str, Any] = {"width": shape.width}
    if source.network is not UNet:
        size |= {"blocks": shape.depth, "heads": shape.heads, "patch": shape.patch}
    if source.network is MaskDiT:
        size |= dict(zip(("decoder_width", "decoder_blocks"), decoder_of(shape), strict=True))
    counted = make(shape)
    hidden = counted.hidden_matrices()
    matrices = sum(p.numel() for name, p in counted.named_parameters() if name in hidden)
    size["share_for_muon"] = round(matrices / sum(p.numel() for p in counted.parameters()), 3)
    words = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in size.items())
    near = ", ".join(f"{match[key]['its'] / match[key]['ours']:.2f} of our {key}" for key in ("flops", "parameters"))
    note = f"{origin['source']}, {words}, {match['parameters']['its'] / 1e6:.2f} M parameters: {near}, matched by {match['matched']}"
    flops = {mask: sizes.work(counted, mask) for mask in {NoMask(), *masks}}
    return Network(note, {**origin, **size, **match}, flops, lambda classes: make(replace(shape, classes=classes)))
