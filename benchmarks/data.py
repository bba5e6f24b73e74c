"""Whether data can limit training: `python -m benchmarks.data [--images 600] [--side 1024] [--out FILE.json]`.

1. Packed: batches a second from the memory-mapped cache, beside what a training step of a small network eats.
2. First decode: a folder of photo-sized JPEGs made by enlarging real ones is not at hand everywhere, so smooth random pictures are
   written; decoded, cropped and resized to --size by `maskdm`, and by the way of the examples of diffusers: the
   `imagefolder` loader of Hugging Face datasets, PIL to RGB, resize of the short side (bilinear with antialias, as
   torchvision does it on PIL images), centre crop, in one process as `set_transform` runs it and in a DataLoader with a worker per core.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.ours import OurStep
from benchmarks.timing import results_directory, write_rows
from maskdm.config import Data, DiTConfig, Hardware, PatchMask
from maskdm.data import Loader, open_source, prepare
from maskdm.engine import Machine, environment, this_machine


def write_photos(folder: Path, count: int, side: int) -> None:
    """JPEGs of side x 3/4 side: smooth colours with some grain, about as large as photos of that size."""
    random = np.random.default_rng(0)
    for number in range(count):
        small = Image.fromarray(random.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        pixels = np.asarray(small.resize((side, side * 3 // 4), Image.Resampling.BICUBIC), dtype=np.int16)
        grain = random.normal(0, 6, pixels.shape).astype(np.int16)
        path = folder / f"class{number % 2}" / f"{number:05}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8)).save(path, quality=90)


def shrink(image: Image.Image, size: int) -> torch.Tensor:
    """What torchvision's Resize and CenterCrop do to a PIL image, and ToTensor."""
    image = image.convert("RGB")
    scale = size / min(image.size)
    image = image.resize((max(size, round(image.width * scale)), max(size, round(image.height * scale))), Image.Resampling.BILINEAR)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return torch.from_numpy(np.asarray(image.crop((left, top, left + size, top + size))).copy()).permute(2, 0, 1).float() / 255


class HuggingFace(torch.utils.data.Dataset[torch.Tensor]):
    """The `imagefolder` data set, each image decoded and shrunk when asked for."""

    def __init__(self, folder: Path, size: int, cache: Path) -> None:
        import datasets

        datasets.disable_progress_bars()
        self.rows: Any = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train", cache_dir=str(cache))
        self.size = size

    def __len__(self) -> int:
        """Images."""
        return len(self.rows)

    def __getitem__(self, index: int) -> torch.Tensor:
        """One image."""
        return shrink(self.rows[index]["image"], self.size)


def seconds(run: Callable[[], Any]) -> float:
    """Of one call."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def decode_rates(count: int, side: int, size: int) -> dict[str, float]:
    """Images a second on the first reading of a folder, by each way."""
    with tempfile.TemporaryDirectory() as temporary:
        folder, cores = Path(temporary) / "photos", len(os.sched_getaffinity(0))
        folder.mkdir()
        write_photos(folder, count, side)

        def ours(number: int) -> None:
            source = open_source(str(folder))
            prepare(source, Data(str(folder), (size, size), conditional=False), Path(temporary) / f"cache{number}")

        def theirs(number: int, workers: int) -> None:
            data = HuggingFace(folder, size, Path(temporary) / f"hf{number}{workers}")
            for _ in torch.utils.data.DataLoader(data, batch_size=64, num_workers=workers):
                pass

        found: dict[str, list[float]] = {"maskdm": [], "imagefolder, one process": [], f"imagefolder, {cores} workers": []}
        for number in range(3):
            found["maskdm"].append(count / seconds(lambda number=number: ours(number)))
            found["imagefolder, one process"].append(count / seconds(lambda number=number: theirs(number, 0)))
            found[f"imagefolder, {cores} workers"].append(count / seconds(lambda number=number: theirs(number, cores)))
        return {name: statistics.median(rates) for name, rates in found.items()}


def packed_rates(side: int, batch: int, machine: Machine) -> dict[str, float]:
    """Images a second from a memory-mapped file, and what training at 75 % masking takes."""
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "images.npy"
        np.save(path, np.random.default_rng(0).integers(0, 256, (max(2000, batch), side, side, 3), dtype=np.uint8))
        from benchmarks.ours import synthetic

        data = synthetic(2, side)
        mapped = type(data)(np.load(path, mmap_mode="r"), None, (), "", "", (), (), path)
        loader = Loader(mapped, np.arange(len(mapped.images)), 0)
        times = [seconds(lambda i=i: loader.batch(i * batch, batch)) for i in range(60)]
        step = OurStep(DiTConfig(384, 9, 6, 4), side, batch, PatchMask(0.75), machine.precision, machine.device)
        for number in range(2):
            step(number)
        return {
            "packed": batch / statistics.median(times),
            "training": batch / statistics.median([seconds(lambda: step(0)) for _ in range(5)]),
        }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--side", type=int, default=1024, help="width of the JPEGs in pixels")
    parser.add_argument("--size", type=int, default=64, help="side of the images trained on")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    machine = this_machine(Hardware())
    torch.set_num_threads(machine.cores)
    rows: list[dict[str, Any]] = []
    for side, batch in ((32, 256), (64, 64)):
        rates = packed_rates(side, batch, machine)
        rows.append({"what": "packed", "side": side, "batch": batch} | rates)
        print(
            f"{side} px, batch {batch}: packed {rates['packed']:.0f} images/s, training eats {rates['training']:.0f}:",
            f"{rates['packed'] / rates['training']:.0f}x",
            flush=True,
        )
    rates = decode_rates(options.images, options.side, options.size)
    rows.append({"what": "first decode", "images": options.images, "side": options.side, "size": options.size} | rates)
    for name, rate in rates.items():
        print(
            f"first decode of {options.side} px JPEGs to {options.size} px, {name:28} {rate:7.1f} images/s",
            f"(maskdm: {rates['maskdm'] / rate:.1f}x)",
        )
    head = {"environment": environment(machine, torch.get_num_threads())}
    write_rows(options.out or results_directory(machine.device) / "data.json", head, rows)
    print(json.dumps(head | {"rows": rows}))


if __name__ == "__main__":
    main()
