"""Optimizer, learning rate and the averages of the weights."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.swa_utils import get_ema_multi_avg_fn

from maskdm.config import Ema, Optimizer, Stage
from maskdm.engine.muon import Muon, flops
from maskdm.engine.posthoc import gamma_of, kept_share
from maskdm.engine.sharding import like
from maskdm.models import Denoiser


class Together:
    """Optimizers of different weights, as one. `factor` of a group: its learning rate relative to the stage's."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts
        self.param_groups = [group for part in parts for group in part.param_groups]
        self.state: defaultdict[Tensor, Any] = defaultdict(dict)
        self.fused = all(part.defaults.get("fused", False) for part in parts)
        self.found_inf: Tensor | None = None
        """1 where a step shall change nothing; read on the device by kernels that are `fused`."""
        for part in parts:
            part.state = self.state

    def step(self) -> None:
        """Change the weights by their gradients."""
        for part in self.parts:
            if self.found_inf is not None:
                part.found_inf = self.found_inf  # pyright: ignore[reportAttributeAccessIssue] - as torch's scaler tells it
            part.step()

    @property
    def flops(self) -> float:
        """Arithmetic of a step: Muon's, beside which the others' is nothing."""
        muons = [group for part in self.parts if isinstance(part, Muon) for group in part.param_groups]
        return sum((flops(*p.shape) for group in muons for p in group["params"]), 0.0)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def set_rate(self, lr: float) -> None:
        """The learning rate of the next step."""
        for group in self.param_groups:
            group["lr"] = lr * group["factor"]


def make_optimizer(model: Denoiser, settings: Optimizer, lr: float) -> Together:
    """AdamW, decaying matrices only: no norms, biases, embeddings or position tables. With Muon for the matrices of the blocks or without.

    Muon's steps are scaled to the size of AdamW's (arXiv 2502.16982), then by `muon`.
    """
    undecayed = model.undecayed()
    hidden = {name: p for name, p in model.named_parameters() if name in model.hidden_matrices()}
    whole = all(p.requires_grad for p in hidden.values())  # adapters are no maps between hidden states: AdamW's, as their papers have it
    muon = set(hidden) if settings.name == "muon" and whole else set[str]()
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad and name not in muon]
    decay = [p for name, p in named if p.ndim >= 2 and name not in undecayed]
    rest = [p for name, p in named if p.ndim < 2 or name in undecayed]
    kept = {"weight_decay": settings.weight_decay, "factor": 1.0}
    groups = [{"params": decay} | kept, {"params": rest, "weight_decay": 0.0, "factor": 1.0}]
    fused = all(p.device.type in ("cpu", "cuda") for p in model.parameters())
    adamw = torch.optim.AdamW(groups, lr=lr, betas=settings.betas, fused=fused)
    if not muon:
        return Together(adamw)
    matrices = {"params": [*hidden.values()]} | kept | {"factor": settings.muon}
    return Together(adamw, Muon([matrices], lr))


def trained(model: Denoiser) -> list[Parameter]:
    """The parameters of a network that training changes."""
    return [p for p in model.parameters() if p.requires_grad]


def part(model: Denoiser, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of a state of the network's shape what training changes, and so has to be kept."""
    still = {name for name, p in model.named_parameters() if not p.requires_grad}
    return {name: value for name, value in state.items() if name not in still}


LONGEST_WARMUP = 0.1
"""Share of a stage's budget over which its learning rate rises, at most: else a short stage would be nothing else."""


def learning_rate(stage: Stage, step: int, progress: float) -> float:
    """The rate of a stage's step (from 0), `progress` (0..1) of the way through its budget."""
    warm = min(1.0, max((step + 1) / stage.warmup, progress / LONGEST_WARMUP)) if stage.warmup else 1.0
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

    def decay(self, step: int) -> float:
        """Share of the average kept at a stage's step, counted from 0."""
        return min(self.settings.decay, (1 + step) / (10 + step)) if self.settings.warmup else self.settings.decay

    @torch.no_grad()
    def update(self, model: Denoiser, step: int) -> None:
        """Move the average towards `model`, after a stage's step."""
        update = get_ema_multi_avg_fn(self.decay(step))
        mine = [own for own, p in zip(self.model.parameters(), model.parameters(), strict=True) if p.requires_grad]
        update(mine, trained(model), torch.tensor(step))  # pyright: ignore[reportArgumentType]

    def restart(self, model: Denoiser) -> None:
        """Make the average equal to `model`."""
        self.model.load_state_dict(model.state_dict())


class PowerAverages:
    """Power-function averages of a model's parameters, in fp32, for `posthoc` (arXiv 2312.02696, section 3). Of no length: no cost.

    `time` counts the updates since the averages began, as the profiles do; a step that fp16 skipped is no update. `began` is
    the run's step at which they did.
    """

    def __init__(self, model: Denoiser, sigma_rel: Sequence[float]) -> None:
        self.sigma_rel = tuple(sigma_rel)
        self.time = self.began = 0
        self._names = [name for name, p in model.named_parameters() if p.requires_grad]
        self._gammas = [gamma_of(width) for width in self.sigma_rel]
        self._averages = [[p.detach().clone() for p in trained(model)] for _ in self.sigma_rel]

    @torch.no_grad()
    def update(self, model: Denoiser) -> None:
        """Take the weights after a step in."""
        self.time += 1
        for gamma, average in zip(self._gammas, self._averages, strict=True):
            update = get_ema_multi_avg_fn(kept_share(self.time, gamma))
            update(average, trained(model), torch.tensor(self.time))  # pyright: ignore[reportArgumentType]

    def restart(self, began: int) -> None:
        """Forget everything, at this step of the run: the next update takes the weights as they are."""
        self.time, self.began = 0, began

    def tensors(self) -> dict[str, Tensor]:
        """The averages, by `sigma_rel/name`."""
        return {
            f"{width}/{name}": value
            for width, average in zip(self.sigma_rel, self._averages, strict=True)
            for name, value in zip(self._names, average, strict=True)
        }

    def numbers(self) -> dict[str, Any]:
        """The rest of the state."""
        return {"sigma_rel": list(self.sigma_rel), "time": self.time, "began": self.began}

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Continue from a saved state of the same averages."""
        for name, mine in self.tensors().items():
            mine.copy_(like(tensors[name], mine))
        self.time, self.began = int(numbers["time"]), int(numbers["began"])
