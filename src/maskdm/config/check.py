"""What a value may be."""

from __future__ import annotations

from maskdm.errors import UserError


def require(condition: bool, message: str) -> None:
    """Raise UserError with the message unless the condition holds."""
    if not condition:
        raise UserError(message)
