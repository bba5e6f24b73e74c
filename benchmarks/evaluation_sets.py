"""Do the measures order sets of real images as they must, and agree with another library's? CIFAR-10, 5 000 images a side.

python benchmarks/evaluation_sets.py --features self resnet:FILE onnx:FILE --out benchmarks/results/NAME/evaluation_sets.jsonl

Real training images play the samples, the test images the reference; then the same training images with noise, a red tint, a
blur, with five of ten classes missing, and with a tenth replaced by copies of reference images. Also a table for the documents.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from maskdm.config import Data
from maskdm.data import open_source, prepare
from maskdm.engine import Ranks
from maskdm.evaluation import Extractor, ImageSet, Subject, evaluate_samples
from maskdm.runs import Display
from maskdm.runs.judge import choose_network
from maskdm.runs.sets import image_set
from maskdm.runs.store import cache_directory

COUNT = 5000


def main() -> None:
    """Measure, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--features", nargs="+", default=["self"])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    found: list[dict[str, Any]] = []
    train, test = (dataset(options.data / f"cifar10-{part}.parquet") for part in ("train", "test"))
    reference = image_set(test, np.arange(COUNT))
    for spec in options.features:
        network = choose_network(spec, reference, None, 0, torch.device("cpu"), Ranks(), Display())
        extractor = Extractor(network, cache_directory() / "features", Ranks())
        for name, samples in sets(train, test).items():
            started = time.perf_counter()
            measures = evaluate_samples(extractor, Subject(samples, reference, None, train.class_names), {"set": name}).measures
            row: dict[str, Any] = {
                "set": name,
                "network": spec.split("/")[-1],
                "seconds": round(time.perf_counter() - started, 1),
            } | measures
            row |= oracle(extractor.features(samples), extractor.features(reference))
            found.append(row)
            print(line(row), flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text("".join(json.dumps(row) + "\n" for row in found))
    print("\n".join(["", *HEAD, *map(line, found)]))


def dataset(path: Path) -> Any:
    """A CIFAR-10 file, decoded."""
    return prepare(open_source(str(path)), Data(str(path), (32, 32)), cache_directory(), None)


def sets(train: Any, test: Any) -> dict[str, ImageSet]:
    """The same 5 000 training images, whole and spoilt."""
    random = np.random.default_rng(0)
    rows = np.sort(random.permutation(len(train.images))[:COUNT])
    real, labels = train.images[rows], train.labels[rows]
    pixels = real.astype(np.float32)
    blurred = F.avg_pool2d(torch.from_numpy(pixels).permute(0, 3, 1, 2), 3, 1, 1, count_include_pad=False).permute(0, 2, 3, 1).numpy()
    dropped = np.sort(random.permutation(np.flatnonzero(train.labels < 5))[:COUNT])
    copied = real.copy()
    copied[: COUNT // 10] = test.images[: COUNT // 10][:, :, ::-1]  # mirrored: harder to see
    copied_labels = np.concatenate([test.labels[: COUNT // 10], labels[COUNT // 10 :]])
    kinds: dict[str, tuple[NDArray[Any], NDArray[np.int64]]] = {
        "real": (real, labels),
        "copied": (copied, copied_labels),
        "tinted": (pixels + np.array([12, 0, 0], dtype=np.float32), labels),
        "mode-dropped": (train.images[dropped], train.labels[dropped]),
        "blurred": (blurred, labels),
        "noise 10": (pixels + random.normal(0, 10, pixels.shape), labels),
        "noise 40": (pixels + random.normal(0, 40, pixels.shape), labels),
        "pure noise": (random.uniform(0, 255, pixels.shape), labels),
    }
    return {
        name: ImageSet(images.round().clip(0, 255).astype(np.uint8), np.arange(len(images)), f"cifar-train-{name}-{COUNT}", each)
        for name, (images, each) in kinds.items()
    }


class Given(torch.nn.Module):
    """Hands features through torchmetrics as if they were images."""

    num_features: int

    def __init__(self, dimensions: int) -> None:
        super().__init__()
        self.num_features = dimensions

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """The features."""
        return features


def oracle(fake: torch.Tensor, real: torch.Tensor) -> dict[str, float]:
    """The same distances by torchmetrics."""
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    frechet = FrechetInceptionDistance(feature=Given(fake.shape[1]), normalize=False, input_img_size=(3, 4, 4))
    frechet.set_dtype(torch.float64)
    kernel = KernelInceptionDistance(feature=Given(fake.shape[1]), subsets=1, subset_size=len(fake))
    kernel.set_dtype(torch.float64)
    for features, is_real in ((real, True), (fake, False)):
        frechet.update(features.double(), real=is_real)
        kernel.update(features.double(), real=is_real)
    return {"oracle_frechet_distance": float(frechet.compute()), "oracle_kernel_distance": float(kernel.compute()[0])}


HEAD = [
    "| features | set | Frechet (oracle) | interval | endless | kernel x 1000 (oracle) | interval | precision | recall | density "
    "| coverage | accuracy | copies | colour drift |",
    "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
]


def line(row: dict[str, Any]) -> str:
    """A row of the table."""

    def between(key: str, factor: float = 1.0) -> str:
        low, high = row[f"{key}_interval"]
        return f"{factor * low:.4g} to {factor * high:.4g}"

    endless = f"{row['frechet_distance_infinity']:.4g}" if "frechet_distance_infinity" in row else "-"
    drifted = [each["name"] for each in row["colour"]["statistics"] if each["drift"]]
    cells = [
        row["network"],
        row["set"],
        f"{row['frechet_distance']:.4g} ({row['oracle_frechet_distance']:.4g})",
        between("frechet_distance"),
        endless,
        f"{1e3 * row['kernel_distance']:.4g} ({1e3 * row['oracle_kernel_distance']:.4g})",
        between("kernel_distance", 1e3),
        *(f"{row[key]:.3f}" for key in ("precision", "recall", "density", "coverage")),
        f"{row['class_accuracy']:.1%}" if "class_accuracy" in row else "-",
        f"{row['copies']['share']:.1%}",
        ", ".join(drifted) or "none",
    ]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
