"""The page in a real browser: no complaint of its console, a table that sorts, a viewer that draws."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from PIL import Image

from segkit.report.page.page import write_page
from segkit.report.page.viewer import viewer_script
from tests.report.page.browser import Browser, find_browser
from tests.report.page.folders import write_data, write_masks, write_run, write_scores

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
def browser(folder):
    with Browser(EXECUTABLE) as browser:
        yield browser


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


def test_without_webgl_the_page_says_so(folder):
    if viewer_script() is None:
        pytest.skip("ipyniivue is not installed, so the page has no viewer")
    with Browser(EXECUTABLE, flags=("--disable-3d-apis",)) as browser:
        browser.open(folder / "page.html")
        browser.value("document.getElementById('viewer').scrollIntoView({ behavior: 'instant' })")
        browser.wait_for("document.getElementById('viewer-message').textContent.includes('no WebGL 2')")
        assert browser.value("document.querySelectorAll('svg.planes').length") == 3
