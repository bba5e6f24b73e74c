"""The verb that serves a page: `maskdm demo`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg


@dataclass
class Demo:
    """Serve a page to play with runs: generate, inpaint, morph, nearest training images, two networks side by side, what the mask hid.

    For this machine alone, unless --host says otherwise; with a JSON API, POST /generate. A run that trains is followed. Ctrl-C ends it.
    """

    run: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN [RUN ...]", help="directories of runs of `maskdm train`")]
    host: Annotated[str, arg(help="address to listen at; 0.0.0.0 lets in whoever reaches this machine, without a password")] = "127.0.0.1"
    port: Annotated[int, arg(help="port to listen at; 0 for any that is free")] = 7860


def show(verb: Demo) -> None:
    """Serve until it is stopped. Raises UserError."""
    from maskdm.demo.server import serve

    serve(verb.run, verb.host, verb.port)
