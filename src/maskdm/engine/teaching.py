"""The loss of a stage's batches, and the teacher that it learns from: what the network was when the stage began."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from maskdm.config import Config, Convert, Denoise, Stage
from maskdm.distillation import distillation_loss
from maskdm.draws import Draws, Where, draw_lesson
from maskdm.models import Denoiser
from maskdm.objective import Loss, masked_denoising_loss


class Teaching:
    """Of a run's stages. The teacher is part of a run's state; there is none where all stages learn from images alone."""

    def __init__(self, config: Config, model: Denoiser) -> None:
        self.config, self.model = config, model
        taught = any(not isinstance(stage.lesson, Denoise | Convert) for stage in config.stages)
        self.teacher = copy.deepcopy(model).requires_grad_(False).eval() if taught else None

    def enter(self) -> None:
        """A stage begins: the network as it stands is its teacher."""
        if self.teacher is not None:
            self.teacher.load_state_dict(self.model.state_dict())

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Its part of the state."""
        return {} if self.teacher is None else {"teacher": self.teacher.state_dict()}

    def restore(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Continue with a saved teacher; with the network as restored where none was saved: no stage before had one."""
        if self.teacher is not None:
            self.teacher.load_state_dict(tensors.get("teacher") or self.model.state_dict())

    def loss(
        self, stage: Stage, network: Any, average: Denoiser, images: Tensor, labels: Tensor | None, draws: Draws, where: Where
    ) -> Loss:
        """Of a piece of a batch, which stands `where`; `network` is the model as it is run."""
        match stage.lesson:
            case Denoise() | Convert():
                return masked_denoising_loss(self.model, self.config.diffusion, images, labels, draws, network)
            case lesson:
                assert self.teacher is not None
                drawn = draw_lesson(where, images.device)
                return distillation_loss(self.config, lesson, (network, self.teacher, average), images, labels, draws, drawn, where[2])
