"""Optimizer, learning rate and the average of the weights."""

from __future__ import annotations

import copy
import math

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from maskdm.config import Ema, Optimizer, Stage
from maskdm.models import Denoiser


def make_optimizer(model: Denoiser, settings: Optimizer, lr: float) -> torch.optim.AdamW:
    """AdamW, decaying matrices only: no norms, biases, embeddings or position tables."""
    undecayed = model.undecayed()
    decay = [p for name, p in model.named_parameters() if p.ndim >= 2 and name not in undecayed]
    rest = [p for name, p in model.named_parameters() if p.ndim < 2 or name in undecayed]
    groups = [{"params": decay, "weight_decay": settings.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    fused = all(p.device.type in ("cpu", "cuda") for p in model.parameters())
    return torch.optim.AdamW(groups, lr=lr, betas=settings.betas, fused=fused)


def learning_rate(stage: Stage, step: int, progress: float) -> float:
    """The rate of a stage's step (from 0), `progress` (0..1) of the way through its budget."""
    warm = min(1.0, (step + 1) / stage.warmup) if stage.warmup else 1.0
    match stage.decay:
        case "constant":
            course = 1.0
        case "linear":
            course = 1 - progress
        case "cosine":
            course = (1 + math.cos(math.pi * progress)) / 2
    return stage.lr * warm * course


class Average:
    """Exponential moving average of a model's parameters, kept in fp32 as a model of its own."""

    def __init__(self, model: Denoiser, settings: Ema) -> None:
        self.settings = settings
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self._average = list(self.model.parameters())

    def decay(self, step: int) -> float:
        """Share of the average kept at a stage's step, counted from 0."""
        return min(self.settings.decay, (1 + step) / (10 + step)) if self.settings.warmup else self.settings.decay

    @torch.no_grad()
    def update(self, model: Denoiser, step: int) -> None:
        """Move the average towards `model`, after a stage's step."""
        update = get_ema_multi_avg_fn(self.decay(step))
        update(self._average, list(model.parameters()), torch.tensor(step))  # pyright: ignore[reportArgumentType]

    def restart(self, model: Denoiser) -> None:
        """Make the average equal to `model`."""
        self.model.load_state_dict(model.state_dict())
