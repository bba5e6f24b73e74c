"""What a network that takes them is told beside the time: the guidance scale, the number of steps."""

from __future__ import annotations

from maskdm.config import GuideName
from maskdm.errors import UserError
from maskdm.models import Denoiser


def conditions(network: Denoiser, guidance: float, guide: GuideName, steps: int) -> dict[str, float]:
    """The network's further arguments in sampling; none for one without dials. One with the scale's needs no second evaluation.

    Raises UserError for a scale that it has not learned.
    """
    if network.guidance_dial is not None:
        low, high = network.guidance_dial.low, network.guidance_dial.high
        if guidance != 1 and (guide == "path" or not low <= guidance <= high):
            raise UserError(f"this network is told the guidance scale, from {low:g} to {high:g}; give one of these, and guide label")
    return (
        {"guidance": float(guidance), "steps": float(steps)} if network.guidance_dial is not None or network.steps_dial is not None else {}
    )
