"""Our own training step, as `maskdm train` runs it: the engine's trainer on synthetic images held in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from maskdm.arithmetic import flops
from maskdm.config import Budget, Config, Data, Diffusion, Ema, Hardware, Mask, Model, Optimizer, Stage
from maskdm.data import Dataset, Loader
from maskdm.engine import Precision, Trainer, this_machine
from maskdm.masking import hidden_rate
from maskdm.models import build


def synthetic(count: int, side: int) -> Dataset:
    """Images of noise, without files: their content does not matter to the time of a step."""
    images = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    return Dataset(images, None, (), "", "", (), (), Path("synthetic"))


class OurStep:
    """A step of the trainer, all that a run does but logging, evaluation and saving."""

    def __init__(
        self,
        model: Model,
        side: int,
        batch: int,
        mask: Mask,
        precision: Precision,
        device: torch.device,
        compile: bool = False,
        ema: Ema | None = None,
    ) -> None:
        data = Data("synthetic", (side, side), conditional=False)
        stage = Stage("s", Budget(steps=10**9), mask, batch=batch, lr=1e-4)
        hardware = Hardware(device="cuda" if device.type == "cuda" else "cpu", compile=compile)
        self.config = Config(data, model, (stage,), diffusion=Diffusion(), optimizer=Optimizer(), ema=ema or Ema(), hardware=hardware)
        network = build(model, data, 0)
        loader = Loader(synthetic(max(256, batch), side), np.arange(max(256, batch)), 0)
        self.trainer = Trainer(self.config, loader, network, this_machine(hardware).device, precision)
        self.images = batch
        self._steps = self.trainer.run()

    @property
    def flops(self) -> float:
        """Arithmetic of a step."""
        return flops(self.config, self.config.stages[0].mask, self.images)

    @property
    def keep(self) -> float:
        """True share of the patches seen."""
        return 1 - hidden_rate(self.config.stages[0].mask, self.config.grid)

    def __call__(self, number: int) -> None:
        """One step."""
        if next(self._steps).pieces > 1:
            raise SystemExit(f"a batch of {self.images} does not fit in memory at once; its time would mislead")
