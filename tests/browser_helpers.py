"""A page in a browser: headless Chromium over its DevTools protocol."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import ClientConnection, connect

CHROMIUM = shutil.which("chromium")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
FLAGS += ["--disable-sync", "--no-first-run", "--remote-debugging-port=0"]
FAILURES = ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled", "Inspector.targetCrashed")

REQUIRED = os.environ.get("MASKDM_BROWSER") == "required"
"""Set where a browser that is not there is an error: in CI, which installs one."""

needs_browser = pytest.mark.skipif(CHROMIUM is None and not REQUIRED, reason="Chromium is not installed")


class Tab:
    """One page of the browser; `complaints` gathers whatever the console says, `requests` the addresses that were asked for."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket, self.number = socket, 0
        self.complaints: list[str] = []
        self.requests: list[str] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command and its answer; events that come before it are looked through."""
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": params}))
        while (message := json.loads(self.socket.recv(timeout=15))).get("id") != self.number:
            self._notice(message)
        assert "error" not in message, message
        return message["result"]

    def _notice(self, message: dict[str, Any]) -> None:
        if message["method"] in FAILURES:
            self.complaints.append(json.dumps(message["params"]))
        elif message["method"] == "Network.requestWillBeSent":
            self.requests.append(message["params"]["request"]["url"])
        elif message["method"] == "Network.webSocketCreated":
            self.requests.append(message["params"]["url"])

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def show(self, path: Path) -> None:
        """Open a file, and wait until all of it is there."""
        self.visit(path.as_uri())

    def visit(self, address: str) -> None:
        """Open an address, and wait until all of it is there."""
        self.call("Page.navigate", url=address)
        self.wait(f"location.href === {json.dumps(address)} && document.readyState === 'complete'")

    def wait(self, expression: str, seconds: float = 10) -> None:
        """Wait until the expression holds."""
        until = time.monotonic() + seconds
        while not self.ask(expression):
            assert time.monotonic() < until, expression
            time.sleep(0.02)

    def set_screen(self, width: int, scheme: str, height: int = 900) -> None:
        """Make the window so wide, and prefer light or dark."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def press(self, key: str) -> None:
        """Press and release a key that has no text; the code is that of ArrowLeft."""
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=37)

    def box(self, selector: str) -> tuple[float, float, float, float]:
        """Left, top, width and height of the first element, which is brought into view."""
        found = f"document.querySelector({json.dumps(selector)})"
        self.ask(f"{found}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
        before, now = None, self._place(found)
        while now != before:  # until nothing moves it any more; a busy machine draws few frames
            self.ask("new Promise(done => requestAnimationFrame(() => setTimeout(() => requestAnimationFrame(done), 100)))")
            before, now = now, self._place(found)
        return now

    def _place(self, found: str) -> tuple[float, float, float, float]:
        left, top, width, height = self.ask(f"(b => [b.left, b.top, b.width, b.height])({found}.getBoundingClientRect())")
        return left, top, width, height

    def drag(self, *points: tuple[float, float]) -> None:
        """Press the mouse at the first point, move it through the others, and let go: a click where there is one."""
        for x, y in points[:1]:
            self._mouse("mouseMoved", x, y, 0)
            self._mouse("mousePressed", x, y, 1)
        for x, y in points[1:]:
            self._mouse("mouseMoved", x, y, 1)
        self._mouse("mouseReleased", *points[-1], 0)

    def _mouse(self, kind: str, x: float, y: float, buttons: int) -> None:
        button = "none" if kind == "mouseMoved" and not buttons else "left"
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button=button, buttons=buttons, clickCount=1)

    def click(self, selector: str) -> None:
        """Click on the middle of the first element, as a person does: when it is there, and nothing lies over it or moves it away."""
        until, point = time.monotonic() + 10, self._middle(selector)
        while not self.ask(f"document.elementFromPoint(...{list(point)})?.closest({json.dumps(selector)}) != null"):
            assert time.monotonic() < until, f"{selector} is not at {point}"
            point = self._middle(selector)
        self.drag(point)

    def _middle(self, selector: str) -> tuple[float, float]:
        left, top, width, height = self.box(selector)
        return left + width / 2, top + height / 2

    def give_file(self, selector: str, path: Path) -> None:
        """Choose a file in an input."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def screenshot(self, path: Path) -> None:
        """Save the whole page as PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]))


@contextmanager
def open_tab(profile: Path) -> Generator[Tab, None, None]:
    """A tab of a browser that keeps its files in `profile`, as long as the block lasts."""
    assert CHROMIUM is not None, "MASKDM_BROWSER is required, and there is no chromium; apt-get install chromium"
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
    browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        port_file, until = profile / "DevToolsActivePort", time.monotonic() + 15
        while not port_file.is_file() or len(port_file.read_text().splitlines()) < 2:
            assert browser.poll() is None and time.monotonic() < until, "Chromium did not start"
            time.sleep(0.05)
        port, root = port_file.read_text().splitlines()
        target = _new_tab(f"ws://127.0.0.1:{port}{root}")
        with connect(f"ws://127.0.0.1:{port}/devtools/page/{target}", max_size=None, proxy=None) as socket:
            yield Tab(socket)
    finally:
        browser.terminate()
        browser.wait(timeout=10)


def _new_tab(address: str) -> str:
    with connect(address, proxy=None) as socket:
        socket.send(json.dumps({"id": 1, "method": "Target.createTarget", "params": {"url": "about:blank"}}))
        while (message := json.loads(socket.recv(timeout=15))).get("id") != 1:
            pass
    return message["result"]["targetId"]
