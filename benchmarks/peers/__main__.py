"""Training steps of other people's networks beside ours, in one run, interleaved.

`python -m benchmarks.peers --maskdm CLONE --uvit CLONE --maskdit CLONE --sit CLONE [--case small ...] [--out FILE.json]`

A clone is a folder made by `git clone` from github.com/jiachenlei/maskdm, baofff/U-ViT, Anima-Lab/MaskDiT or willisma/SiT; what is not
given is left out. Needs einops. All have the same width, depth, heads, patches, optimizer (fused AdamW) and an average of the weights
(MaskDiT a decoder of its own besides); each is timed in fp32 and in bf16 autocast, and stands in the table with its faster one. A
masked row holds the visible patches of a batch about constant: its batch grows with the share hidden, but for a network whose decoder
works on all patches.
"""

from __future__ import annotations

import argparse
import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.ours import OurStep
from benchmarks.peers import adapters, sizes
from benchmarks.peers.adapters import Peer, Shape
from benchmarks.timing import Arm, cast, interleave, results_directory, write_rows
from maskdm.config import DiTConfig, Ema, Hardware, Mask, Model, NoMask, PatchMask, UViTConfig
from maskdm.engine import Precision, environment, this_machine

CASES = {
    "small": (Shape(32, 4, 192, 9, 6), 64),
    "s": (Shape(64, 4, 384, 9, 6), 16),
    "uvit-s": (Shape(64, 4, 512, 13, 8), 16),
    "b": (Shape(64, 4, 768, 12, 12), 256),
    "long": (Shape(128, 4, 384, 9, 6), 4),
}
HIDDEN = (0.0, 0.75, 0.9)
PRECISIONS: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


class PeerStep:
    """Noise, forward, backward, fused AdamW, average: what a peer's own loop does, without its waste."""

    def __init__(
        self, peer: Peer, shape: Shape, batch: int, hidden: float, dtype: torch.dtype, device: torch.device, compile: bool
    ) -> None:
        self.peer, self.shape, self.images, self.hidden, self.dtype, self.device = peer, shape, batch, hidden, dtype, device
        peer.network.to(device).train()
        self.loss: Any = torch.compile(peer.loss) if compile else peer.loss
        parameters = [p for p in peer.network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
        self.parameters, self.average = parameters, [copy.deepcopy(p.detach()) for p in parameters]
        self.data = torch.randint(0, 256, (max(256, batch), 3, shape.side, shape.side), dtype=torch.uint8, device=device)

    def __call__(self, number: int) -> None:
        images = self.data[torch.randperm(len(self.data), device=self.device)[: self.images]].float() / 127.5 - 1
        noise, t = torch.randn_like(images), torch.randint(0, 1000, (len(images),), device=self.device)
        level = (t.float() / 1000)[:, None, None, None]
        with cast(self.device, self.dtype):
            loss = self.loss((1 - level**2).sqrt() * images + level * noise, noise, t, self.hidden)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.parameters, 0.001)  # pyright: ignore[reportPrivateUsage] - there is no public form


def parameters(arm: Arm) -> int:
    """Of its network."""
    network = arm.step.trainer.model if isinstance(arm.step, OurStep) else arm.step.peer.network  # type: ignore[attr-defined]
    return sizes.parameters(network)


def unet_like(shape: Shape, wanted: int) -> Peer:
    """diffusers' U-Net of about so many parameters."""
    widths = [replace(shape, width=width) for width in sizes.UNET_WIDTHS]

    def measure(shape: Shape) -> int:
        with torch.device("meta"):
            return sizes.parameters(adapters.unet(shape).network)

    return adapters.unet(sizes.nearest(widths, measure, wanted))


def mask_of(hidden: float) -> Mask:
    """The same share hidden, for our own network."""
    return PatchMask(hidden) if hidden else NoMask()


def steps(options: argparse.Namespace, shape: Shape, batch: int, hidden: float, device: torch.device) -> list[Arm]:
    """All arms of one row: ours, then the peers that mask (or all of them, on whole images), in both precisions."""
    whole, batch = batch, max(1, round(batch / (1 - hidden)))
    arms: list[Arm] = []
    ours: dict[str, Model] = {
        "maskdm uvit": UViTConfig(shape.width, shape.depth, shape.heads, shape.patch),
        "maskdm dit": DiTConfig(shape.width, shape.depth, shape.heads, shape.patch),
    }
    for precision, dtype in PRECISIONS.items():
        for name, model in ours.items():
            step = OurStep(model, shape.side, batch, mask_of(hidden), precision, device, options.compile, Ema(snapshots=0))
            arms.append(Arm(f"{name} {precision}", step))
        for name, make in (
            ("authors", adapters.maskdm_authors),
            ("u-vit", adapters.uvit),
            ("maskdit", adapters.maskdit),
            ("sit", adapters.sit),
        ):
            clone: Path | None = getattr(options, "maskdm" if name == "authors" else name.replace("-", ""))
            if clone is None:
                continue
            peer = make(clone, shape)
            if peer.masks or hidden == 0:
                size = whole if peer.decodes else batch
                arms.append(Arm(f"{name} {precision}", PeerStep(peer, shape, size, hidden, dtype, device, options.compile)))
        if hidden == 0 and not options.no_unet:
            peer = unet_like(shape, parameters(arms[0]))
            arms.append(Arm(f"diffusers unet {precision}", PeerStep(peer, shape, batch, 0.0, dtype, device, options.compile)))
    return arms


def main() -> None:
    """Time all rows and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("maskdm", "uvit", "maskdit", "sit"):
        parser.add_argument(f"--{name}", type=Path, help=f"a clone of {name}")
    parser.add_argument("--no-unet", action="store_true")
    parser.add_argument("--case", nargs="+", choices=CASES, default=["s"])
    parser.add_argument("--hidden", nargs="+", type=float, default=list(HIDDEN))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="torch.compile for all of them")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    machine = this_machine(Hardware())
    device = machine.device
    rows: list[dict[str, Any]] = []
    print(f"{machine.name}, {machine.cores} cores, torch {torch.__version__}")
    for case in options.case:
        shape, batch = CASES[case]
        for hidden in options.hidden:
            arms = steps(options, shape, batch, hidden, device)
            interleave(arms, device, 2, warm=1)  # of both precisions; the rest of the faster one alone
            fastest: dict[str, Arm] = {}
            for arm in arms:
                name = arm.name.rpartition(" ")[0]
                if name not in fastest or arm.images_per_second > fastest[name].images_per_second:
                    fastest[name] = arm
            interleave(list(fastest.values()), device, options.repeats, warm=0)
            reference = fastest["maskdm uvit"].images_per_second
            print(
                f"\n{case}: {shape.side} px, {shape.tokens} tokens, width {shape.width} x {shape.depth},",
                f"{hidden:.0%} hidden, batch {arms[0].step.images}",
            )
            for name, arm in fastest.items():
                print(
                    f"  {name:16} {arm.images_per_second:9.1f} images/s  {arm.name.rpartition(' ')[2]} ",
                    f"{parameters(arm) / 1e6:6.1f} M parameters  our U-ViT is {reference / arm.images_per_second:.2f}x",
                )
            for arm in arms:
                row = {"case": case, "hidden": hidden, "arm": arm.name, "batch": arm.step.images, "images_per_s": arm.images_per_second}
                row["parameters"] = parameters(arm)
                rows.append(row | vars(shape))
    head = {"environment": environment(machine, torch.get_num_threads()), "compile": options.compile}
    write_rows(options.out or results_directory(device) / "peers.json", head, rows)
    print(json.dumps(head | {"rows": rows}))


if __name__ == "__main__":
    main()
