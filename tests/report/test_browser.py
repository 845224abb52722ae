"""The page in a real browser: no complaint of its console, a table that sorts, a viewer that draws."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from segkit.metrics.registry import METRICS
from segkit.report.page import write_page
from segkit.report.pictures import viewer_script
from segkit.report.sections import MOST_METRICS
from tests.report_folders import write_data, write_json, write_masks, write_run, write_scores

IDS = ["BraTS2021_00001", "BraTS2021_00002", "BraTS2021_00003"]
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
EXECUTABLE = next((path for path in map(shutil.which, NAMES) if path), None)
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-sync"),
    *("--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"),
)
MISSING = (
    *(["playwright is not installed"] if importlib.util.find_spec("playwright") is None else []),
    *(["there is no Chromium on this machine"] if EXECUTABLE is None else []),
)

pytestmark = pytest.mark.skipif(
    bool(MISSING) and os.environ.get("SEGKIT_REQUIRE_BROWSER") != "1", reason=", ".join(MISSING)
)

SHOWN = "[...document.querySelectorAll('#case-table tbody tr:not([hidden]) th')].map((cell) => cell.textContent)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    write_data(folder / "data", IDS)
    write_masks(folder / "masks", IDS)
    write_scores(folder / "scores", dict(zip(IDS, (0.9, 0.4, 0.8), strict=True)))
    write_run(folder / "run")
    sources = [folder / name for name in ("run", "masks", "scores")]
    write_page(sources, folder / "page.html", data=folder / "data")
    return folder


@pytest.fixture(scope="module")
def playwright():
    if MISSING:
        pytest.fail(f"{', '.join(MISSING)}, and SEGKIT_REQUIRE_BROWSER is 1", pytrace=False)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        yield playwright


@contextlib.contextmanager
def launch(playwright, home, *flags):
    """A headless Chromium whose files go to `home`; its sockets need a shorter path."""
    with tempfile.TemporaryDirectory(prefix="chromium", ignore_cleanup_errors=True) as sockets:
        environment = {**os.environ, "HOME": str(home), "TMPDIR": sockets}
        options = {"executable_path": EXECUTABLE, "args": [*FLAGS, *flags], "env": environment}
        with playwright.chromium.launch(**options) as browser:
            yield browser


@pytest.fixture(scope="module")
def browser(playwright, tmp_path_factory):
    with launch(playwright, tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


def wait_for(page, expression, timeout_s=60.0):
    """Wait until an expression is true; `wait_for_function` needs the eval that the policy of the page forbids."""
    deadline = time.monotonic() + timeout_s
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, f"{expression} is still false"
        page.wait_for_timeout(100)


@pytest.fixture
def open_page(browser):
    """Load a file in a page of its own."""
    pages = []

    def load(path, width=1280, height=900):
        page = browser.new_page(viewport={"width": width, "height": height}, is_mobile=width < 600)
        pages.append(page)
        page.goto(path.as_uri())
        return page

    yield load
    for page in pages:
        page.close()


@pytest.fixture
def page(browser, folder):
    """The page; it must ask for no other address, and the console must stay empty."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    complaints, addresses = [], set()
    page.on("console", lambda told: told.type in ("error", "warning", "assert") and complaints.append(told.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: addresses.add(request.url))
    page.goto((folder / "page.html").as_uri())
    yield page
    page.close()
    assert {address for address in addresses if not address.startswith(("data:", "blob:"))} == {
        (folder / "page.html").as_uri()
    }
    assert [complaint for complaint in complaints if "GL Driver Message" not in complaint] == []


def processes_of(home):
    """The processes that have this home folder, as far as /proc shows; ended ones do not count."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"HOME={home}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


def test_of_a_browser_nothing_stays(playwright, tmp_path):
    with launch(playwright, tmp_path) as browser:
        assert browser.new_page().evaluate("6 * 7") == 42
        if sys.platform == "linux":
            assert processes_of(tmp_path)
    deadline = time.monotonic() + 10.0
    while processes_of(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert processes_of(tmp_path) == []


def test_the_table_sorts_by_click_and_by_key(page):
    assert page.evaluate(SHOWN) == ["BraTS2021_00002", "BraTS2021_00003", "BraTS2021_00001"]
    page.evaluate("document.querySelectorAll('#case-table th button')[2].click()")
    assert page.evaluate(SHOWN) == ["BraTS2021_00001", "BraTS2021_00003", "BraTS2021_00002"]
    assert page.evaluate("document.querySelectorAll('#case-table thead th')[2].ariaSort") == "descending"
    page.evaluate("document.querySelectorAll('#case-table th button')[0].focus()")
    page.keyboard.press("Enter")
    assert page.evaluate(SHOWN) == IDS
    sorts = page.evaluate("[...document.querySelectorAll('#case-table thead th')].map((cell) => cell.ariaSort)")
    assert sorts[:3] == ["ascending", "none", "none"]


def test_the_table_filters_by_text_and_region(page):
    page.evaluate(
        "(() => { const box = document.getElementById('case-search'); box.value = '00003';"
        " box.dispatchEvent(new Event('input')); })()"
    )
    assert page.evaluate(SHOWN) == ["BraTS2021_00003"]
    page.evaluate(
        "(() => { const box = document.getElementById('case-region'); box.value = 'TC';"
        " box.dispatchEvent(new Event('change')); })()"
    )
    assert page.evaluate("document.querySelector('#case-table tbody tr:not([hidden])').dataset.region") == "TC"
    assert page.evaluate("document.getElementById('case-count').textContent") == "1 of 3 cases"


def test_a_link_opens_the_pictures_of_its_case(page):
    page.evaluate("for (const card of document.querySelectorAll('.card')) card.open = false")
    link = "[...document.querySelectorAll('#case-table tbody a')].at(-1)"
    opened = "[...document.querySelectorAll('.card[open]')].map((card) => '#' + card.id)"
    page.evaluate(f"{link}.click()")
    wait_for(page, f"{opened}.length > 0", 10)
    assert page.evaluate(opened) == [page.evaluate(f"{link}.hash")]


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_sticks_out_of_the_window(open_page, folder, width):
    page = open_page(folder / "page.html", width)
    assert page.evaluate("document.documentElement.scrollWidth") == width


@pytest.mark.parametrize(
    ("epoch_s", "minutes", "warns"), [(10, 1, False), (10, 4, True), (300, 4, False), (300, 16, True)]
)
def test_a_live_page_without_news_for_too_long_says_so(open_page, tmp_path, monkeypatch, epoch_s, minutes, warns):
    write_run(tmp_path / "run", is_finished=False)
    rows = [{"step": step, "loss": 1.0, "seconds": step * epoch_s, "epoch": step} for step in (1, 2)]
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    now = time.time()
    monkeypatch.setattr("segkit.report.sections.time.time", lambda: now - 60 * minutes - 5)
    write_page([tmp_path / "run"], tmp_path / "report.html", with_viewer=False, is_live=True)
    page = open_page(tmp_path / "report.html")
    shown = page.evaluate("document.querySelector('.state').innerText")
    assert (f"No news for {minutes} minutes: it may have stopped." in shown) == warns
    assert ("segkit train DATA -o run --resume" in shown) == warns
    assert ("Training." in shown) != warns


def test_a_live_page_loads_itself_again_unless_a_reader_works_with_it(browser, tmp_path):
    write_run(tmp_path / "run", is_finished=False)
    write_page([tmp_path / "run"], tmp_path / "report.html", with_viewer=False, is_live=True)
    page = browser.new_page()
    page.add_init_script("window.setInterval = ((set) => (what, ms) => set(what, ms / 100))(window.setInterval)")
    page.goto((tmp_path / "report.html").as_uri())
    page.evaluate("document.querySelector('nav a').focus(); window.mine = true")
    time.sleep(0.5)
    assert page.evaluate("window.mine") is True
    with page.expect_navigation(timeout=10_000):
        page.evaluate("document.activeElement.blur()")
    wait_for(page, "window.mine === undefined", 10)
    page.close()


def test_the_keyboard_reaches_every_heading_and_shows_where_it_is(page):
    page.evaluate("document.querySelector('#cases .scroll').focus()")
    reached = []
    headings = "[...document.querySelectorAll('#case-table thead th')].map((heading) => heading.textContent)"
    for _ in range(page.evaluate("document.querySelectorAll('#case-table th button').length")):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.textContent"))
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        assert page.evaluate("getComputedStyle(document.activeElement).outlineWidth") == "2px"
    assert reached == page.evaluate(headings)


def test_on_paper_a_wide_table_has_all_of_its_columns(open_page, tmp_path):
    case_id = "BraTS-GLI-00001-000"
    write_masks(tmp_path / "masks", [case_id])
    write_scores(tmp_path / "scores", {case_id: 0.5})
    document = json.loads((tmp_path / "scores" / "scores.json").read_text())
    document["cases"][0] |= {"missing": True, "regions": {"WT": dict.fromkeys(METRICS, 0.123456)}}
    write_json(tmp_path / "scores" / "scores.json", document)
    write_page([tmp_path / "scores", tmp_path / "masks"], tmp_path / "page.html", with_viewer=False)
    page = open_page(tmp_path / "page.html", 720)
    page.emulate_media(media="print")
    columns = page.evaluate("document.querySelectorAll('#case-table thead th').length")
    assert columns == 2 + MOST_METRICS + 2  # case and region, scores, seconds and memory
    assert page.evaluate("document.getElementById('case-table').getBoundingClientRect().right") <= 720


def coloured_pixels(page, path):
    """How many pixels of the canvas are neither grey nor nearly so."""
    place = "document.getElementById('viewer-canvas').getBoundingClientRect()"
    left, top, right, bottom = (page.evaluate(f"{place}.{side}") for side in ("left", "top", "right", "bottom"))
    page.screenshot(path=path)
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB").crop((int(left) + 4, int(top) + 4, int(right) - 4, int(bottom) - 4)))
    return int((np.ptp(pixels.astype(int), axis=-1) > 60).sum())


@pytest.mark.skipif(viewer_script() is None, reason="ipyniivue is not installed, so the page has no viewer")
def test_the_viewer_draws_and_follows_the_keys(page, folder, tmp_path):
    page.set_viewport_size({"width": 480, "height": 480})  # without a GPU every pixel counts
    page.evaluate("document.getElementById('viewer').scrollIntoView({ behavior: 'instant' })")
    wait_for(page, "document.getElementById('viewer-message').hidden")
    readout = "document.getElementById('viewer-readout').textContent"
    wait_for(page, f"{readout}.includes('reference')", 10)
    before = page.evaluate(readout)
    assert "prediction ET" in before
    page.evaluate("document.querySelector('[name=viewer-view][value=\"0\"]').click()")
    assert coloured_pixels(page, tmp_path / "masks.png") > 500
    page.evaluate("document.querySelector('#viewer-layers input').click()")
    assert coloured_pixels(page, tmp_path / "plain.png") == 0
    page.evaluate("document.getElementById('viewer-canvas').focus()")
    for _ in range(8):
        page.keyboard.press("ArrowUp")
    after = page.evaluate(readout)
    assert after != before
    assert "prediction \u2013" in after
    page.evaluate("document.querySelectorAll('.needs-viewer')[1].click()")
    wait_for(page, "document.getElementById('viewer-case').selectedIndex === 1")
    wait_for(page, "document.getElementById('viewer-message').hidden")


def test_without_webgl_the_page_says_so(playwright, folder, tmp_path):
    if viewer_script() is None:
        pytest.skip("ipyniivue is not installed, so the page has no viewer")
    with launch(playwright, tmp_path, "--disable-3d-apis") as browser:
        page = browser.new_page()
        page.goto((folder / "page.html").as_uri())
        page.evaluate("document.getElementById('viewer').scrollIntoView({ behavior: 'instant' })")
        wait_for(page, "document.getElementById('viewer-message').textContent.includes('no WebGL 2')")
        assert page.evaluate("document.querySelectorAll('svg.planes').length") == 3
