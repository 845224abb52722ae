"""The page in a real browser: no complaint of its console, a table that sorts, a viewer that draws."""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import pytest
from PIL import Image

from segkit.metrics.registry import METRICS
from segkit.report.cases import MOST_METRICS
from segkit.report.page import write_page
from segkit.report.viewer import viewer_script
from tests.report.browser import Browser, find_browser, processes_of
from tests.report_folders import write_data, write_json, write_masks, write_run, write_scores

IDS = ["BraTS2021_00001", "BraTS2021_00002", "BraTS2021_00003"]
EXECUTABLE = find_browser()

pytestmark = [
    pytest.mark.skipif(EXECUTABLE is None, reason="there is no Chromium on this machine"),
    pytest.mark.skipif(sys.platform == "win32", reason="the browser is driven through file descriptors"),
]

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
def browser(folder, tmp_path_factory):
    with Browser(EXECUTABLE, tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


def test_of_a_browser_nothing_stays(tmp_path):
    with Browser(EXECUTABLE, tmp_path) as browser:
        assert browser.value("6 * 7") == 42
        assert (tmp_path / "profile").is_dir()
        if sys.platform == "linux":
            assert processes_of(tmp_path)
    assert processes_of(tmp_path) == []


@pytest.fixture
def page(browser, folder):
    browser.requests.clear()
    browser.open(folder / "page.html")
    yield browser
    addresses = {address for address in browser.requests if not address.startswith(("data:", "blob:"))}
    assert addresses == {(folder / "page.html").as_uri()}
    own = [complaint for complaint in browser.complaints if "GL Driver Message" not in complaint]
    browser.complaints.clear()
    assert own == []


def test_the_table_sorts_by_click_and_by_key(page):
    assert page.value(SHOWN) == ["BraTS2021_00002", "BraTS2021_00003", "BraTS2021_00001"]
    page.value("document.querySelectorAll('#case-table th button')[2].click()")
    assert page.value(SHOWN) == ["BraTS2021_00001", "BraTS2021_00003", "BraTS2021_00002"]
    assert page.value("document.querySelectorAll('#case-table thead th')[2].ariaSort") == "descending"
    page.value("document.querySelectorAll('#case-table th button')[0].focus()")
    page.press("Enter")
    assert page.value(SHOWN) == IDS
    sorts = page.value("[...document.querySelectorAll('#case-table thead th')].map((cell) => cell.ariaSort)")
    assert sorts[:3] == ["ascending", "none", "none"]


def test_the_table_filters_by_text_and_region(page):
    page.value(
        "(() => { const box = document.getElementById('case-search'); box.value = '00003';"
        " box.dispatchEvent(new Event('input')); })()"
    )
    assert page.value(SHOWN) == ["BraTS2021_00003"]
    page.value(
        "(() => { const box = document.getElementById('case-region'); box.value = 'TC';"
        " box.dispatchEvent(new Event('change')); })()"
    )
    assert page.value("document.querySelector('#case-table tbody tr:not([hidden])').dataset.region") == "TC"
    assert page.value("document.getElementById('case-count').textContent") == "1 of 3 cases"


def test_a_link_opens_the_pictures_of_its_case(page):
    page.value("for (const card of document.querySelectorAll('.card')) card.open = false")
    page.value("document.querySelector('#case-table tbody a').click()")
    page.wait_for("document.querySelector('.card').open", 10)


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_sticks_out_of_the_window(browser, folder, width):
    browser.open(folder / "page.html", width=width)
    assert browser.value("document.documentElement.scrollWidth") == width


@pytest.mark.parametrize(
    ("epoch_s", "minutes", "warns"), [(10, 1, False), (10, 4, True), (300, 4, False), (300, 16, True)]
)
def test_a_live_page_without_news_for_too_long_says_so(browser, tmp_path, monkeypatch, epoch_s, minutes, warns):
    write_run(tmp_path / "run", is_finished=False)
    rows = [{"step": step, "loss": 1.0, "seconds": step * epoch_s, "epoch": step} for step in (1, 2)]
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    now = time.time()
    monkeypatch.setattr("segkit.report.sections.time.time", lambda: now - 60 * minutes - 5)
    write_page([tmp_path / "run"], tmp_path / "report.html", with_viewer=False, is_live=True)
    browser.open(tmp_path / "report.html")
    shown = browser.value("document.querySelector('.state').innerText")
    assert (f"No news for {minutes} minutes: it may have stopped." in shown) == warns
    assert ("segkit train DATA -o run --resume" in shown) == warns
    assert ("Training." in shown) != warns


def test_a_live_page_loads_itself_again_unless_a_reader_works_with_it(browser, tmp_path):
    write_run(tmp_path / "run", is_finished=False)
    write_page([tmp_path / "run"], tmp_path / "report.html", with_viewer=False, is_live=True)
    hurry = "window.setInterval = ((set) => (what, ms) => set(what, ms / 100))(window.setInterval)"
    script = browser.call("Page.addScriptToEvaluateOnNewDocument", source=hurry)["identifier"]
    browser.open(tmp_path / "report.html")
    browser.value("document.querySelector('nav a').focus(); window.mine = true")
    time.sleep(0.5)
    assert browser.value("window.mine") is True
    browser.value("document.activeElement.blur()")
    browser.wait_for("window.mine === undefined", 10)
    browser.call("Page.removeScriptToEvaluateOnNewDocument", identifier=script)


def test_the_keyboard_reaches_every_heading_and_shows_where_it_is(page):
    page.value("document.querySelector('#cases .scroll').focus()")
    reached = []
    for _ in page.value("[...document.querySelectorAll('#case-table th button')].map((button) => button.textContent)"):
        page.press("Tab")
        reached.append(page.value("document.activeElement.textContent"))
        assert page.value("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        assert page.value("getComputedStyle(document.activeElement).outlineWidth") == "2px"
    assert reached == page.value("[...document.querySelectorAll('#case-table thead th')].map((h) => h.textContent)")


def test_on_paper_a_wide_table_has_all_of_its_columns(browser, tmp_path):
    case_id = "BraTS-GLI-00001-000"
    write_masks(tmp_path / "masks", [case_id])
    write_scores(tmp_path / "scores", {case_id: 0.5})
    document = json.loads((tmp_path / "scores" / "scores.json").read_text())
    document["cases"][0] |= {"missing": True, "regions": {"WT": dict.fromkeys(METRICS, 0.123456)}}
    write_json(tmp_path / "scores" / "scores.json", document)
    write_page([tmp_path / "scores", tmp_path / "masks"], tmp_path / "page.html", with_viewer=False)
    browser.open(tmp_path / "page.html", width=720)
    browser.prefer("light", "print")
    columns = browser.value("document.querySelectorAll('#case-table thead th').length")
    assert columns == 2 + MOST_METRICS + 2  # case and region, scores, seconds and memory
    assert browser.value("document.getElementById('case-table').getBoundingClientRect().right") <= 720
    browser.prefer("light")


def coloured_pixels(page, path):
    """How many pixels of the canvas are neither grey nor nearly so."""
    place = "document.getElementById('viewer-canvas').getBoundingClientRect()"
    left, top, right, bottom = (page.value(f"{place}.{side}") for side in ("left", "top", "right", "bottom"))
    page.screenshot(path)
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB").crop((int(left) + 4, int(top) + 4, int(right) - 4, int(bottom) - 4)))
    return int((np.ptp(pixels.astype(int), axis=-1) > 60).sum())


@pytest.mark.skipif(viewer_script() is None, reason="ipyniivue is not installed, so the page has no viewer")
def test_the_viewer_draws_and_follows_the_keys(page, folder, tmp_path):
    page.open(folder / "page.html", width=480, height=480)  # without a GPU every pixel counts
    page.value("document.getElementById('viewer').scrollIntoView({ behavior: 'instant' })")
    page.wait_for("document.getElementById('viewer-message').hidden")
    readout = "document.getElementById('viewer-readout').textContent"
    page.wait_for(f"{readout}.includes('reference')", 10)
    before = page.value(readout)
    assert "prediction ET" in before
    page.value("document.querySelector('[name=viewer-view][value=\"0\"]').click()")
    assert coloured_pixels(page, tmp_path / "masks.png") > 500
    page.value("document.querySelector('#viewer-layers input').click()")
    assert coloured_pixels(page, tmp_path / "plain.png") == 0
    page.value("document.getElementById('viewer-canvas').focus()")
    for _ in range(8):
        page.press("ArrowUp")
    after = page.value(readout)
    assert after != before
    assert "prediction \u2013" in after
    page.value("document.querySelectorAll('.needs-viewer')[1].click()")
    page.wait_for("document.getElementById('viewer-case').selectedIndex === 1")
    page.wait_for("document.getElementById('viewer-message').hidden")


def test_without_webgl_the_page_says_so(folder, tmp_path):
    if viewer_script() is None:
        pytest.skip("ipyniivue is not installed, so the page has no viewer")
    with Browser(EXECUTABLE, tmp_path, flags=("--disable-3d-apis",)) as browser:
        browser.open(folder / "page.html")
        browser.value("document.getElementById('viewer').scrollIntoView({ behavior: 'instant' })")
        browser.wait_for("document.getElementById('viewer-message').textContent.includes('no WebGL 2')")
        assert browser.value("document.querySelectorAll('svg.planes').length") == 3
