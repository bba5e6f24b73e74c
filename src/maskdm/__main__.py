"""`python -m maskdm`."""

from __future__ import annotations

from maskdm.cli import main

main()
