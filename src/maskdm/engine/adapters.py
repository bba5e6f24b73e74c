"""Low-rank adapters (LoRA, arXiv 2106.09685), by peft: beside the linear layers of attention and MLPs, trained in their place.

What else is trained is what the weights to start from did not have: embeddings of other classes, positions of another size, layers for
other channels. Merging is arithmetic on a state, and needs no peft.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from importlib.util import find_spec

from torch import Tensor, nn

from maskdm.config import Lora
from maskdm.errors import UserError
from maskdm.models import Denoiser

PARTS = ("attention", "mlp")
"""Modules whose linear layers are adapted."""
_BASE, _DOWN, _UP = ".base_layer.", ".lora_A.default.", ".lora_B.default."


def require(lora: Lora) -> None:
    """Raise UserError where adapters are asked for and peft is not installed."""
    if lora.rank and find_spec("peft") is None:
        raise UserError("--lora.rank needs peft: pip install 'maskdm[lora]'; or leave it out, and all weights are trained")


def adapt(model: Denoiser, lora: Lora, also: Collection[str]) -> None:
    """Give a network adapters that change nothing yet. They, and the parameters named in `also`, are all that is trained."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft  # pyright: ignore[reportMissingImports] - of an extra

        linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        chosen = sorted(name for name in linear if set(PARTS) & set(name.split(".")))
        settings = peft.LoraConfig(r=lora.rank, lora_alpha=lora.scale * lora.rank, target_modules=chosen)  # pyright: ignore[reportArgumentType]
        peft.inject_adapter_in_model(settings, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(name) or name in also)


def is_adapter(name: str) -> bool:
    """Whether a parameter of an adapted network is of an adapter."""
    return _DOWN in name or _UP in name


def merged(state: Mapping[str, Tensor], lora: Lora) -> dict[str, Tensor]:
    """The state of a plain network that computes what an adapted one of this state does: W + scale B A."""
    plain: dict[str, Tensor] = {}
    for name, value in state.items():
        if is_adapter(name):
            continue
        module, wrapped, tail = name.rpartition(_BASE)
        if wrapped and tail == "weight":
            down, up = state[f"{module}{_DOWN}weight"], state[f"{module}{_UP}weight"]
            value = value + lora.scale * (up.float() @ down.float())
        plain[f"{module}.{tail}" if wrapped else name] = value
    return plain
