"""Muon: steps along the orthogonalised momentum of each matrix (https://kellerjordan.github.io/posts/muon; arXiv 2502.16982).

Torch's own does the same a matrix at a time, twice as slowly for small ones, and asks the host whether to step at all.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from maskdm.engine.hardware import multiplies_bf16

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration: the steepest at zero that keeps singular values within about 0.7 to 1.2."""

ITERATIONS = 5


def orthogonalised(matrices: Float[Tensor, "batch rows columns"]) -> Float[Tensor, "batch rows columns"]:
    """The nearest semi-orthogonal matrices, roughly: all singular values near 1. In bf16, where the device multiplies in it."""
    a, b, c = NEWTON_SCHULZ
    upright = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if upright else matrices).to(torch.bfloat16 if multiplies_bf16(matrices.device.type) else torch.float32)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if upright else x


def flops(rows: int, columns: int) -> float:
    """Arithmetic of a step on a matrix: in each iteration two products with the matrix, and one of its smaller square."""
    low, high = sorted((rows, columns))
    return ITERATIONS * (4.0 * low**2 * high + 2.0 * low**3)


class Muon(torch.optim.Optimizer):
    """For matrices. A step has the root mean square of AdamW's, 0.2 of the rate (arXiv 2502.16982, section 2.2), times `factor`.

    Where `found_inf` is set and not 0, a step changes nothing, as AdamW's fused kernels do.
    """

    found_inf: Tensor | None = None

    def __init__(self, params: Iterable[dict[str, Any]], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": 0.0, "factor": 1.0, "fused": True})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride] - no closure is used here
        """Change the weights; matrices of one shape together."""
        for group in self.param_groups:
            alike: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in alike.items():
                self._step(group, parameters, group["lr"] * 0.2 * max(shape) ** 0.5)

    def _step(self, group: dict[str, Any], parameters: list[Tensor], size: float) -> None:
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        gradients, before = torch.stack([p.grad for p in parameters if p.grad is not None]), torch.stack(buffers)
        momentum = before.lerp(gradients, 1 - group["momentum"])
        direction = orthogonalised(gradients.lerp(momentum, group["momentum"]))
        weights = torch.stack(parameters)
        changed = torch.add(weights * (1 - group["lr"] * group["weight_decay"]), direction, alpha=-size)
        if self.found_inf is not None:
            fine = self.found_inf == 0
            momentum, changed = torch.where(fine, momentum, before), torch.where(fine, changed, weights)
        for buffer, parameter, new, moved in zip(buffers, parameters, momentum, changed, strict=True):
            buffer.copy_(new)
            parameter.copy_(moved)
