"""The pages in a browser: headless Chromium over its DevTools protocol."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_helpers import make_run
from websockets.sync.client import ClientConnection, connect

from maskdm.report import compare_runs, write_report

CHROMIUM = shutil.which("chromium")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
FLAGS += ["--disable-sync", "--no-first-run", "--remote-debugging-port=0"]
FAILURES = ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled", "Inspector.targetCrashed")

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")


class Tab:
    """One page of the browser; `complaints` gathers whatever the console says."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket, self.number = socket, 0
        self.complaints: list[str] = []
        for domain in ("Page", "Runtime", "Log"):
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

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def show(self, path: Path) -> None:
        """Open a file, and wait until all of it is there."""
        self.call("Page.navigate", url=path.as_uri())
        self.wait(f"location.href === {json.dumps(path.as_uri())} && document.readyState === 'complete'")

    def wait(self, expression: str) -> None:
        """Wait until the expression holds."""
        until = time.monotonic() + 10
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

    def screenshot(self, path: Path) -> None:
        """Save the whole page as PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]))


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    profile = tmp_path_factory.mktemp("chromium")
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", "about:blank"]
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


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    long = "a-rather-long-name-of-a-run-without-any-place-to-break-it-in-two"
    runs = [
        make_run(folder / "first"),
        make_run(folder / long, config="seed: 1\n", status="failed", error="loss is not finite"),
        make_run(folder / "c"),
    ]
    return {"run": write_report(runs[1]), "compare": compare_runs(runs, folder / "compare.html")}


@pytest.fixture(params=["run", "compare"])
def opened(request: pytest.FixtureRequest, tab: Tab, pages: dict[str, Path]) -> Iterator[Tab]:
    """The tab with a page in it, which must not have complained by the end of the test."""
    tab.complaints.clear()
    tab.set_screen(1280, "light")
    tab.show(pages[request.param])
    yield tab
    assert tab.complaints == []


def test_a_complaint_is_heard(tab: Tab, tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text("<script>setTimeout(() => { throw new Error('oh') }); console.error('no')</script>")
    tab.complaints.clear()
    tab.show(bad)
    tab.ask("new Promise(done => setTimeout(done, 50))")
    assert len(tab.complaints) == 2
    tab.complaints.clear()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_reaches_past_the_window(opened: Tab, width: int, scheme: str) -> None:
    opened.set_screen(width, scheme)
    opened.wait(f"innerWidth === {width} && matchMedia('(prefers-color-scheme: {scheme})').matches")
    assert opened.ask("document.documentElement.scrollWidth") <= width
    light = opened.ask("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).reduce((sum, part) => sum + Number(part), 0) > 384")
    assert light == (scheme == "light")


def test_the_slider_changes_the_picture_by_key(opened: Tab) -> None:
    shown = "[...document.querySelectorAll('[data-caption]')].filter(each => each.checkVisibility()).map(each => each.dataset.caption)"
    before = opened.ask(shown)
    opened.ask("document.querySelector('.slider input').focus()")
    opened.press("ArrowLeft")
    opened.wait(f"{shown}[0] !== {json.dumps(before[0])}")
    after = opened.ask(shown)
    assert len(before) == len(after) == 1
    assert opened.ask("document.querySelector('.slider output').textContent") == after[0]


def test_pictures_are_whole_and_have_words(opened: Tab) -> None:
    pictures = opened.ask("[...document.images].map(each => [each.alt, each.naturalWidth])")
    assert len(pictures) >= 5 and all(alt.strip() and width > 0 for alt, width in pictures)


def test_every_section_is_reached_from_the_links(opened: Tab) -> None:
    sections = opened.ask("[...document.querySelectorAll('section')].map(each => each.id)")
    assert opened.ask("[...document.querySelectorAll('nav a')].map(each => each.hash.slice(1))") == sections and len(sections) > 3
    for section in sections:
        opened.ask(f"document.querySelector('nav a[href=\"#{section}\"]').click()")
        heading = f"document.querySelector('#{section} h2').getBoundingClientRect()"
        opened.wait(f"location.hash === '#{section}' && {heading}.top >= 0 && {heading}.bottom <= innerHeight")
