"""The process that serves the page and the API: one address, nothing from or to anywhere else."""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from maskdm.demo.service import Service
from maskdm.demo.uploads import MOST_BYTES
from maskdm.errors import UserError

MOST_BODY = MOST_BYTES + (1 << 20)
"""Bytes of any request: an upload, and what is around it."""

UNUSED = "/component_server"
"""Where gradio takes pictures of its editor by another way than our page's, as many and as large as anyone sends, into memory."""

LINGER = 2
"""Seconds that open connections have when the demo is stopped."""

POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
    "object-src 'none'; form-action 'self'; frame-ancestors 'self'; base-uri 'self'"
)
"""What a browser lets the page load: nothing but what it comes from (Content-Security-Policy)."""


def serve(runs: Sequence[Path], host: str, port: int) -> None:
    """Serve until stopped. Raises UserError where a run cannot be shown, the port is taken, or gradio is not installed."""
    if not runs:
        raise UserError("name the directory of a run, or of several")
    if importlib.util.find_spec("gradio") is None:
        raise UserError("maskdm demo needs gradio: pip install 'maskdm[demo]'")
    with (
        closing(Service(runs)) as service,
        _listening(host, port) as listener,
        tempfile.TemporaryDirectory(prefix="maskdm-demo-") as folder,
    ):
        os.environ.update(GRADIO_ANALYTICS_ENABLED="False", GRADIO_TEMP_DIR=folder, HF_HUB_DISABLE_TELEMETRY="1")
        _run(_app(service, host), listener, service)


def _listening(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises UserError."""
    if not 0 <= port <= 65535:
        raise UserError(f"--port is {port}; give a number from 0 to 65535")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, UnicodeError):
        raise UserError(f"--host {host} is no address of this machine; leave it out for this machine alone") from None
    listener = socket.socket(family, kind)
    try:
        if os.name == "posix":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()
    except OSError as error:
        listener.close()
        raise UserError(
            f"cannot listen at {host}, port {port} ({error.strerror}); give another --port, or 0 for any that is free"
        ) from None
    return listener


def _app(service: Service, host: str) -> Any:
    """The page and the API."""
    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from maskdm.demo.api import Api
    from maskdm.demo.page import mount

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_route("/generate", Api(service).generate, methods=["POST"])
    app = mount(app, service)
    app.add_middleware(_Policy)
    if _loopback(host):  # a name of a stranger's that leads here is a page of theirs that wants in
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1", "::1", "[::1]", host], www_redirect=False)
    return app


def _loopback(host: str) -> bool:
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


class _Policy:
    """Sends POLICY with every answer, and takes no more than an upload may have."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from starlette.requests import ClientDisconnect
        from starlette.responses import JSONResponse

        taken, begun = 0, False

        async def received() -> Any:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            return message if taken <= MOST_BODY else {"type": "http.disconnect"}

        async def sent(message: Any) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                message["headers"] = [*message.get("headers", []), (b"content-security-policy", POLICY.encode())]
            await send(message)

        if scope["type"] == "http" and scope["path"].rstrip("/").endswith(UNUSED):
            await JSONResponse({"error": "there is no such thing here"}, 404)(scope, received, sent)
            return
        with suppress(ClientDisconnect):  # whoever leaves while a file comes in is no error
            await self._app(scope, received, sent)
        if taken > MOST_BODY and not begun:
            await JSONResponse({"error": f"the request has more than {MOST_BODY >> 20} MiB"}, 413)(scope, receive, sent)


def _run(app: Any, listener: socket.socket, service: Service) -> None:
    import uvicorn

    class Server(uvicorn.Server):
        """Stops what is computed before it waits for whoever waits for that."""

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            service.worker.stop()
            super().handle_exit(sig, frame)

    host, port = listener.getsockname()[:2]
    shown = "127.0.0.1" if host == "0.0.0.0" else host
    print(f"demo at http://{f'[{shown}]' if ':' in shown else shown}:{port}; Ctrl-C ends it", flush=True)
    if not _loopback(host):
        print("whoever reaches this machine can use it: there is no password", file=sys.stderr, flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which uvicorn raises again when it has ended: files are cleared away then
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=LINGER)
    with suppress(KeyboardInterrupt):
        Server(config).run(sockets=[listener])
