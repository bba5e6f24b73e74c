"""The demo's page, as `maskdm demo` serves it, in a browser."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser_helpers import Tab, needs_browser, open_tab
from PIL import Image
from test_sample_command import run  # noqa: F401 - the fixture

pytestmark = needs_browser

PATIENCE = 60
"""Seconds that a machine with other things to do may take."""

SOURCES = "[...document.querySelectorAll('#%s .grid-container img')].map(each => each.src).join()"


@pytest.fixture(scope="module")
def address(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:  # noqa: F811
    folder = tmp_path_factory.mktemp("server")
    command = [sys.executable, "-m", "maskdm", "demo", str(run), "--port", "0"]
    with (folder / "out").open("wb") as out, (folder / "err").open("wb") as err:
        server = subprocess.Popen(command, stdout=out, stderr=err, env=os.environ | {"TMPDIR": str(folder), "OMP_NUM_THREADS": "1"})
    try:
        until = time.monotonic() + 2 * PATIENCE
        while "Ctrl-C" not in (folder / "out").read_text():
            assert server.poll() is None and time.monotonic() < until, (folder / "err").read_text()
            time.sleep(0.1)
        yield (folder / "out").read_text().split()[2].rstrip(";") + "/"
    finally:
        server.terminate()
        code = server.wait(timeout=PATIENCE)
    assert code == 143 and (folder / "err").read_text() == "" and list(folder.glob("maskdm-demo-*")) == []


@pytest.fixture(scope="module")
def page(address: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with open_tab(tmp_path_factory.mktemp("chromium")) as tab:
        tab.set_screen(1280, "light")
        tab.visit(address)
        said(tab, "generate", "ready")
        yield tab


@pytest.fixture
def tab(page: Tab, address: str) -> Iterator[Tab]:
    """The page, which must not have complained by the end of the test, nor asked anyone else for anything."""
    yield page
    assert [each for each in page.complaints if is_error(json.loads(each))] == []
    elsewhere = {each for each in page.requests if not each.startswith((address, "data:", "blob:"))}
    assert len(page.requests) > 20 and elsewhere == set()


def is_error(complaint: dict[str, Any]) -> bool:
    """The editor's canvas warns: of its own age, and of a browser without a graphics card."""
    return complaint.get("type", "error") in ("error", "assert") and complaint.get("entry", {}).get("level", "error") == "error"


def said(tab: Tab, where: str, words: str) -> str:
    """What the page says there, once it has these words in it."""
    text = f"(document.querySelector('#said-{where}')?.innerText ?? '')"
    try:
        tab.wait(f"{text}.includes({json.dumps(words)})", PATIENCE)
    except AssertionError as error:
        raise AssertionError(f"the page says {tab.ask(text)!r} there, and not {words!r}") from error
    return tab.ask(text)


def go(tab: Tab, name: str) -> None:
    tab.ask(f"[...document.querySelectorAll('button[role=tab]')].find(each => each.innerText.trim() === {json.dumps(name)}).click()")


def fill(tab: Tab, label: str, value: str) -> None:
    """Type into the field of the tab that is open, as a person does."""
    field = f"[...document.querySelectorAll('label')].find(l => l.checkVisibility() && l.innerText.trim() === {json.dumps(label)})"
    tab.ask(f"(input => {{ input.focus(); input.select(); }})({field}.querySelector('input'))")
    tab.call("Input.insertText", text=value)
    tab.ask("document.activeElement.blur()")
    tab.wait(f"{field}.querySelector('input').value === {json.dumps(value)}")


def test_images_are_generated_and_their_neighbours_found(tab: Tab) -> None:
    tab.click("#go-generate")
    assert "maskdm sample" in said(tab, "generate", "16 images in")
    tab.wait("document.querySelectorAll('#images .grid-container img').length === 16")
    tab.wait("[...document.querySelectorAll('#images img')].every(each => each.naturalWidth === 8)")
    tab.click("#go-nearest")
    assert "times as far as the tenth nearest" in said(tab, "nearest", "Image 0.")
    tab.wait("document.querySelectorAll('#nearest .grid-container img').length === 8")


def test_a_mask_is_painted_and_drawn_anew(tab: Tab) -> None:
    tab.click("#go-take")
    said(tab, "inpaint", "paint over")
    tab.wait("document.querySelector('#editor canvas')?.getBoundingClientRect().height > 100", PATIENCE)
    tab.click("#go-inpaint")
    said(tab, "inpaint", "nothing is painted over")
    left, top, width, height = tab.box("#editor canvas")
    tab.drag(*((left + width / 2, top + height * (0.3 + 0.1 * step)) for step in range(5)))
    tab.click("#go-inpaint")
    said(tab, "inpaint", "4 images in")
    tab.wait("[...document.querySelectorAll('#inpainted .grid-container img')].filter(each => each.naturalWidth === 8).length === 4")
    before, after = (pixels(tab, gallery) for gallery in ("images", "inpainted"))
    changed = np.array([each != before[0] for each in after])
    assert changed.any(axis=1).all() and not changed.reshape(4, 8, 8)[:, :, [0, 1, 6, 7]].any()


def pixels(tab: Tab, gallery: str) -> np.ndarray:
    """Of each image, the red ones."""
    draw = "c.width = c.height = 8; const d = c.getContext('2d'); d.drawImage(i, 0, 0); return [...d.getImageData(0, 0, 8, 8).data]"
    images = f"[...document.querySelectorAll('#{gallery} .grid-container img')]"
    return np.array(tab.ask(f"{images}.map(i => {{ const c = document.createElement('canvas'); {draw} }})")).reshape(-1, 64, 4)[:, :, 0]


def test_bad_uploads_are_said_and_good_ones_shown(tab: Tab, tmp_path: Path) -> None:
    go(tab, "Inpaint")
    (tmp_path / "text.png").write_text("no image")
    tab.give_file("#upload-input, input[type=file]", tmp_path / "text.png")
    said(tab, "inpaint", "the upload cannot be read as an image: not an image")
    Image.new("RGB", (40, 30), "white").save(tmp_path / "good.png")
    tab.give_file("#upload-input, input[type=file]", tmp_path / "good.png")
    said(tab, "inpaint", "uploaded, and brought to the network's size")


def test_cancel_stops_the_steps(tab: Tab) -> None:
    go(tab, "Generate")
    tab.ask("[...document.querySelectorAll('.label-wrap')].find(each => each.checkVisibility()).click()")
    tab.wait("[...document.querySelectorAll('label')].some(l => l.checkVisibility() && l.innerText.trim() === 'steps')")
    fill(tab, "steps", "10000")
    tab.click("#go-generate")
    said(tab, "generate", "steps is 10000; give 1 to 1000")
    fill(tab, "steps", "1000")
    tab.ask(f"window.before = {SOURCES % 'images'}")
    tab.click("#go-generate")
    said(tab, "generate", "step ")
    tab.wait(f"{SOURCES % 'images'} !== window.before")
    tab.click("#go-generate-cancel")
    assert int(said(tab, "generate", "stopped at step").split()[3]) < 1000
    tab.click("#go-generate-cancel")
    said(tab, "generate", "nothing is running")
    fill(tab, "steps", "2")


def test_ways_comparisons_and_masks(tab: Tab) -> None:
    for name, words in (("Morph", "12 images in"), ("Compare", "end of pretrain: 8 images in"), ("Mask", "sees 50%")):
        go(tab, name)
        tab.click(f"#go-{name.lower()}")
        said(tab, name.lower(), words)
    tab.wait("document.querySelectorAll('#way .grid-container img').length === 12")
    tab.wait("document.querySelector('#film img')?.src.endsWith('.gif')")
    for letter in "AB":
        tab.wait(f"document.querySelectorAll('#compare-{letter} .grid-container img').length === 8")
    tab.wait("document.querySelectorAll('#masked .grid-container img').length === 5")


def test_nothing_reaches_past_a_telephone(tab: Tab) -> None:
    go(tab, "Generate")
    tab.set_screen(390, "dark")
    tab.wait("innerWidth === 390")
    for name in ("Generate", "Inpaint"):  # the others may be in a menu
        go(tab, name)
        assert tab.ask("document.documentElement.scrollWidth") <= 390
    light = tab.ask("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).reduce((sum, part) => sum + Number(part), 0) > 384")
    assert not light


# --- what no page of ours sends ---


def post(url: str, body: bytes) -> tuple[int, bytes]:
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def test_nobody_names_files_of_this_machine(address: str) -> None:
    with urllib.request.urlopen(address + "config", timeout=PATIENCE) as answer:
        number = next(each["id"] for each in json.load(answer)["dependencies"] if each["targets"][0][1] == "upload")
    for path in ("/etc/hostname", "http://127.0.0.1:9/x.png", "/dev/zero"):
        file = {"path": path, "meta": {"_type": "gradio.FileData"}}
        asked = {"data": ["run", file], "fn_index": number, "session_hash": "hostile"}
        assert post(address + "gradio_api/queue/join", json.dumps(asked).encode())[0] == 200
        with urllib.request.urlopen(address + "gradio_api/queue/data?session_hash=hostile", timeout=PATIENCE) as answer:
            assert b"this is no request of this page's" in answer.read()


def test_requests_are_bounded(address: str) -> None:
    large = b'{"data": ["' + b"a" * (22 << 20) + b'"], "fn_index": 0, "session_hash": "hostile"}'
    assert post(address + "gradio_api/queue/join", large)[0] in (400, 413)
    assert post(address + "gradio_api/component_server", b"{}")[0] == 404
