"""The report's pages in a browser."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser_helpers import Tab, needs_browser, open_tab
from report_helpers import make_run

from maskdm.report import compare_runs, write_report

pytestmark = needs_browser


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with open_tab(tmp_path_factory.mktemp("chromium")) as opened:
        yield opened


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
