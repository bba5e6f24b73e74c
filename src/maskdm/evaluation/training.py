"""Training of the `self` feature network on real images alone, on the CPU: nothing to download, about a minute at most."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from maskdm.errors import UserError
from maskdm.evaluation.encoder import Encoder
from maskdm.evaluation.features import FeatureNetwork, Images, Labels, label_tensor, take
from maskdm.evaluation.own import RECIPE, SelfNetwork, Training, load_self

BATCH = 128
LEAST = 10
"""Fewest images to train on."""

_CPU = torch.device("cpu")
_LR = 3e-3
_WEIGHT_DECAY = 0.05
_CALIBRATION = 10_000


def cached_self(
    cache_dir: Path,
    key: str,
    images: Images,
    labels: Labels | None,
    heldout_images: Images,
    heldout_labels: Labels | None,
    seed: int,
    max_seconds: float = 60.0,
    device: torch.device = _CPU,
) -> SelfNetwork:
    """`train_self`, or what it gave before for the same `key` (a hash of all images and labels) and seed.

    A file that cannot be read is trained anew and replaced.
    """
    path = cache_dir / f"self-{RECIPE}-{key}-{seed}.safetensors"
    if path.is_file():
        try:
            return load_self(path, device)
        except UserError:
            path.unlink()
    network = train_self(images, labels, heldout_images, heldout_labels, seed, max_seconds, device=device)
    network.save(path)
    return network


def train_self(
    images: Images,
    labels: Labels | None,
    heldout_images: Images,
    heldout_labels: Labels | None,
    seed: int,
    max_seconds: float = 60.0,
    steps: int | None = None,
    device: torch.device = _CPU,
) -> SelfNetwork:
    """A 128-d encoder of these images: supervised with at least two classes, else self-supervised.

    The result is a function of the images, labels, seed and steps (chosen by image size and count when None) on one machine
    and thread count, unless `max_seconds` cuts the training short, which its provenance then says. Held-out images give
    the accuracy alone. The network runs on `device` afterwards; it is trained on the CPU, where the same data give the same
    network, with a GPU or without. UserError below `LEAST` images.
    """
    if len(images) < LEAST:
        raise UserError(f"a feature network needs at least {LEAST} images, here {len(images)}; give more images")
    targets = None if labels is None else label_tensor(labels)
    classes = 0 if targets is None else int(targets.max()) + 1
    if classes < 2:
        targets, classes = None, 0
    started = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        channels, height, width = images.shape[1:]
        encoder = Encoder(channels, height, width, classes)
        _normalise(encoder, images)
        done, cut_short = _fit(encoder, images, targets, seed, steps or _num_steps(encoder, len(images)), max_seconds)
        _calibrate(encoder, images)
    training = Training(RECIPE, seed, len(images), done, round(time.perf_counter() - started, 1), cut_short)
    network = SelfNetwork.of(encoder, None, training, device)
    return replace(network, accuracy_heldout=accuracy_of(network, heldout_images, heldout_labels))


def accuracy_of(network: FeatureNetwork, images: Images, labels: Labels | None) -> float | None:
    """Share of the images that the network puts in the class of their label; None without classes, labels or images."""
    predicted = network.predict(images)
    if predicted is None or labels is None or not len(images):
        return None
    return float((predicted == label_tensor(labels)).double().mean())


def _num_steps(encoder: Encoder, num_images: int) -> int:
    """At most 50 passes over few images, for more would only be learnt by heart; but 100 steps, for fewer would learn nothing."""
    most = 400 if max(encoder.size) <= 12 else 800
    return min(most, max(100, 50 * num_images // BATCH))


def _normalise(encoder: Encoder, images: Images) -> None:
    some = take(images, _spread(len(images), 2000)).float() / 255
    encoder.mean.copy_(some.mean(dim=(0, 2, 3))[:, None, None])
    encoder.std.copy_(some.std(dim=(0, 2, 3))[:, None, None].clamp(min=1e-3))


def _spread(count: int, most: int) -> np.ndarray:
    """At most `most` of `count` indices, evenly spaced: a folder's images are often in order of class."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(np.int64)


def _fit(
    encoder: Encoder, images: Images, targets: Int[Tensor, " _"] | None, seed: int, steps: int, max_seconds: float
) -> tuple[int, bool]:
    """Train; returns the steps done and whether the time limit shortened them.

    The time takes part in the schedule in the second half of the limit alone, and only when behind: a training that runs
    evenly and within the limit is untouched by the clock, and one that does not still ends with a learning rate of 0.
    """
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=_LR, weight_decay=_WEIGHT_DECAY)
    generator = torch.Generator().manual_seed(seed)
    started, cut_short = time.perf_counter(), False
    encoder.train()
    for step in range(steps):
        late = 2 * (time.perf_counter() - started) / max_seconds - 1
        cut_short = cut_short or late > step / steps
        progress = max(step / steps, late)
        if progress >= 1:
            return step, True
        for group in optimizer.param_groups:
            group["lr"] = _LR * min(1.0, 10 * (step + 1) / steps) * 0.5 * (1 + math.cos(math.pi * progress))
        rows = torch.randint(len(images), (BATCH,), generator=generator)
        prepared = encoder.prepare(take(images, rows.numpy()))
        loss = _loss(encoder, prepared, None if targets is None else targets[rows], generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return steps, cut_short


def _loss(
    encoder: Encoder, prepared: Float[Tensor, "n _ _ _"], targets: Int[Tensor, " n"] | None, generator: torch.Generator
) -> Float[Tensor, ""]:
    """VICReg (arXiv 2105.04906) of two views, and cross-entropy where there are classes.

    With classes it still has a small part: features that know the class alone would not see what varies within one.
    """
    first, second = encoder(augment(prepared, generator)), encoder(augment(prepared, generator))
    alike = F.mse_loss(first, second)
    loss = 25 * alike + 0.5 * (_spread_loss(first) + _spread_loss(second))
    if targets is None:
        return loss
    scores = torch.cat([encoder.head(first), encoder.head(second)])
    return 0.04 * loss + 2 * F.cross_entropy(scores, torch.cat([targets, targets]), label_smoothing=0.1)


def _spread_loss(features: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """VICReg's variance (weight 25) and covariance (weight 1) terms."""
    cov = torch.cov(features.T)
    variances = cov.diagonal()
    apart = (cov.square().sum() - variances.square().sum()) / len(cov)
    return 25 * F.relu(1 - (variances + 1e-4).sqrt()).mean() + apart


def augment(prepared: Float[Tensor, "n c h w"], generator: torch.Generator) -> Float[Tensor, "n c h w"]:
    """Shift by up to 1/8 of the side, change brightness and contrast, cover a square of 1/4 of the side.

    Nothing interpolates, adds noise or changes one channel alone: the features must go on seeing blur, noise and tint. Nor is
    anything mirrored: digits and letters are not the same in a mirror.
    """
    count, _, height, width = prepared.shape

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, 1, generator=generator)

    def moved(size: int) -> Tensor:
        reach = max(1, size // 8)
        return (torch.arange(size) + uniform(-float(reach), float(reach)).round().long()).clamp(0, size - 1)

    def covered(size: int) -> Tensor:
        side = max(1, size // 4)
        start = uniform(0.0, float(size - side + 1)).floor()
        return (torch.arange(size) >= start) & (torch.arange(size) < start + side)

    everyone = torch.arange(count)[:, None, None]
    shifted = prepared[everyone, :, moved(height)[:, :, None], moved(width)[:, None, :]].permute(0, 3, 1, 2)
    lit = shifted * uniform(0.7, 1.3)[:, :, None, None] + uniform(-0.3, 0.3)[:, :, None, None]
    square = covered(height)[:, :, None] & covered(width)[:, None, :]
    return lit.masked_fill(square[:, None], 0.0)


@torch.no_grad()
def _calibrate(encoder: Encoder, images: Images) -> None:
    """Set both scales to mean 0 and deviation 1 over whole training images, not over the augmented ones of the training."""
    encoder.eval()
    rows = _spread(len(images), _CALIBRATION)
    maps = [encoder.trunk(encoder.prepare(take(images, rows[i : i + 256]))) for i in range(0, len(rows), 256)]
    pooled = torch.cat([each.mean(dim=(2, 3)) for each in maps])
    embedded = torch.cat([encoder.embedding(each) for each in maps])
    for scale, raw in ((encoder.scale, pooled), (encoder.embedding_scale, embedded)):
        mean, variance = scale.running_mean, scale.running_var
        assert mean is not None
        assert variance is not None
        mean.copy_(raw.mean(dim=0))
        variance.copy_(raw.var(dim=0))
