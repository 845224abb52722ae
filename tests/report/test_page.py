"""The page: what is in it, what must never be, and how large it may grow."""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
import os
import re
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest

from segkit.errors import RequestError
from segkit.report import page as page_module
from segkit.report.page import write_page
from tests.helpers import LPS
from tests.report_folders import Parsed, write_data, write_json, write_masks, write_run, write_scores

IDS = ["BraTS2021_00001", "BraTS2021_00002", "BraTS2021_00003"]
HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "</script><script>alert(2)</script>",
    'a" onmouseover="alert(3)',
    "\u202ex&amp;\x00",
]


@pytest.fixture
def folders(tmp_path):
    write_data(tmp_path / "data", IDS)
    write_masks(tmp_path / "masks", IDS, failed={"BraTS2021_00009": "/srv/scans/private/x.nii.gz: is truncated"})
    write_scores(tmp_path / "scores", dict(zip(IDS, (0.9, 0.4, 0.8), strict=True)))
    write_run(tmp_path / "run")
    return tmp_path


def written(target, *sources, **options):
    facts = write_page(sources, target, **options)
    text = target.read_text(encoding="utf-8")
    return facts, text, Parsed(text)


def test_everything_that_was_found_is_told(folders):
    sources = [folders / name for name in ("run", "masks", "scores")]
    facts, text, page = written(folders / "page.html", *sources, data=folders / "data")
    assert facts.cases == 4  # three scored, and the one that failed
    assert facts.stills == 3
    headings = page.text("h2")
    wanted = ["Summary", "Failed cases", "Training", "Spread over cases", "Cases", "Pictures", "Time and memory"]
    assert [heading for heading in headings if heading in wanted] == wanted
    assert {"Reliability", "Configuration and environment"} <= set(headings)
    for told in (
        "brats2021: gli, 8 cases",
        "CC BY 4.0",
        "legacy \u00b7 gli",
        "<small>0.650 \u2013 0.750</small>",
        "0.062",
        "first rate",
    ):
        assert told in text
    # 3.00 s were measured of 2.00 s expected, and 1000 MB of 800 MB
    assert "time 1.50 of what was expected" in text
    assert "memory 1.25 of what was expected" in text


def test_worst_cases_come_first(folders):
    _, text, page = written(folders / "page.html", folders / "masks", folders / "scores", data=folders / "data")
    rows = [attributes for attributes in page.all("tr") if attributes.get("data-region") == "mean"]
    assert len(rows) == 4
    assert text.index(">BraTS2021_00009<") < text.index(">BraTS2021_00002<") < text.index(">BraTS2021_00003<")
    names = [text for text in page.text("strong") if text.startswith("BraTS")]
    assert names == ["BraTS2021_00009", "BraTS2021_00002", "BraTS2021_00003", "BraTS2021_00001"]


def test_the_table_can_be_sorted_and_filtered(folders):
    _, _, page = written(folders / "page.html", folders / "scores")
    headings = [attributes for attributes in page.all("th") if "aria-sort" in attributes]
    assert [attributes["aria-sort"] for attributes in headings] == ["none", "none", "ascending", "none"]
    assert [attributes["data-kind"] for attributes in headings] == ["text", "text", "number", "number"]
    values = [attributes["data-value"] for attributes in page.all("td") if "data-value" in attributes]
    assert values[:2] == ["0.4", "6"]  # Dice and HD95 of the worst case
    assert [attributes["value"] for attributes in page.all("option")] == ["mean", "WT", "TC", "ET"]
    assert sum("hidden" in attributes for attributes in page.all("tr")) == 9  # three regions of three cases


def test_nothing_is_loaded_from_anywhere(folders):
    sources = [folders / name for name in ("run", "masks", "scores")]
    _, _, page = written(folders / "page.html", *sources, data=folders / "data")
    for _, attributes in page.elements:
        for name in ("src", "href", "action", "data", "srcset", "poster"):
            address = attributes.get(name)
            assert address is None or address.startswith(("data:image/", "#")), (name, address)
    policy = next(meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert "http" not in policy


def test_the_policy_allows_just_the_scripts_of_the_page(folders):
    _, text, _ = written(folders / "page.html", folders / "masks", folders / "scores", data=folders / "data")
    policy = re.search(r"script-src ([^;]*);", html.unescape(text))[1]
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert policy.split() == [*(f"'sha256-{digest}'" for digest in digests), "blob:"]


def test_names_and_notes_cannot_become_markup(tmp_path):
    write_scores(tmp_path / "scores", dict.fromkeys(HOSTILE, 0.5))
    document = json.loads((tmp_path / "scores" / "scores.json").read_text())
    document |= {"protocol": HOSTILE[1], "notes": HOSTILE, "errors": [{"case": HOSTILE[0], "error": HOSTILE[1]}]}
    document["cases"][0]["regions"][HOSTILE[2]] = {HOSTILE[0]: 1.0, "dice": 0.25}
    document["summary"][HOSTILE[2]] = {"dice": {"mean": 0.5, "median": 0.5, "n": 1}}
    document["reliability"][HOSTILE[0]] = {"whole": {"confidence": [0.5], "frequency": [0.5]}}
    write_json(tmp_path / "scores" / "scores.json", document)
    write_masks(tmp_path / "masks", [], failed={name: name for name in HOSTILE})
    write_run(tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text(f"name: {HOSTILE[1]}  # {HOSTILE[0]}\n")
    sources = [tmp_path / name for name in ("scores", "masks", "run")]
    _, text, page = written(tmp_path / "page.html", *sources, title=HOSTILE[1])
    assert page.text("h1") == [HOSTILE[1]]
    assert not page.all("img")
    assert len(page.all("script")) == 1
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert "alert(1)" in text
    assert "\x00" not in text


def test_hostile_case_ids_in_the_data_of_the_viewer(tmp_path):
    case_id = "<!--<script>alert(1)"
    image = np.zeros((8, 8, 8), np.float32)
    image[2:6, 2:6, 2:6] = 5
    labels = (image > 0).astype(np.uint8)
    for folder, array in (("imagesTr", image), ("labelsTr", labels), ("masks", labels)):
        (tmp_path / folder).mkdir()
        nib.save(nib.Nifti1Image(array, LPS), tmp_path / folder / f"{case_id}.nii.gz")
    entry = {"image": f"./imagesTr/{case_id}.nii.gz", "label": f"./labelsTr/{case_id}.nii.gz"}
    dataset = {"modality": {"0": "MRI"}, "labels": {"0": "background", "1": "</script><b>"}, "training": [entry]}
    write_json(tmp_path / "dataset.json", dataset)
    write_scores(tmp_path / "scores", {case_id: 1.0})
    facts, text, _ = written(tmp_path / "page.html", tmp_path / "scores", tmp_path / "masks", data=tmp_path)
    assert facts.stills == 1
    assert "<!--" not in text
    assert "</script><b>" not in text
    blocks = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', text, re.DOTALL)
    for block in blocks:
        assert json.loads(block)["cases"][0]["id"] == case_id


def test_folders_of_the_machine_stay_private(tmp_path):
    home = tmp_path / "jane doe" / "study"
    write_data(home / "data", IDS)
    write_masks(home / "masks", IDS, failed={"BraTS2021_00009": f"{home / 'data'}/x y.nii.gz: is truncated"})
    write_scores(home / "scores", dict.fromkeys(IDS, 0.5))
    write_run(home / "run")
    sources = [home / name for name in ("masks", "scores", "run")]
    _, text, _ = written(home / "page.html", *sources, data=home / "data")
    for private in (str(tmp_path), "jane doe", "/srv/scans", "private/gli"):
        assert private not in text
    assert "x y.nii.gz: is truncated" in text
    assert "glioma" in text  # the last name of the model's folder


def test_free_text_of_headers_stays_private(folders):
    for path in (folders / "data").rglob("*.nii.gz"):
        image = nib.load(path)
        image.header["descrip"] = b"DOE^JANE 1970"
        nib.save(nib.Nifti1Image(np.asanyarray(image.dataobj), image.affine, image.header), path)
    pytest.importorskip("ipyniivue", reason="ipyniivue is not installed, so no volumes are in the page")
    facts, text, _ = written(folders / "page.html", folders / "masks", folders / "scores", data=folders / "data")
    assert facts.volumes == 3
    stored = re.findall(r'<script type="application/octet-stream" id="v\d-[a-z]+">([^<]*)</script>', text)
    assert len(stored) == 3 * 5  # image, prediction, reference, difference, uncertainty
    for block in stored:
        header = nib.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(block))).header
        assert bytes(header["descrip"]).strip(b"\0") == b""


def test_without_the_viewer_package_the_stills_remain(folders, monkeypatch):
    monkeypatch.setattr(page_module, "viewer_script", lambda: None)
    facts, text, page = written(folders / "page.html", folders / "masks", folders / "scores", data=folders / "data")
    assert (facts.stills, facts.volumes) == (3, 0)
    assert "pip install 'segkit[viewer]'" in html.unescape(text)
    assert not [attributes for attributes in page.all("script") if attributes]
    assert len(page.all("script")) == 1


def test_a_page_that_would_be_too_large_leaves_out_volumes_then_pictures(folders, monkeypatch):
    monkeypatch.setattr(page_module, "viewer_script", lambda: "AAAA")
    sources = (folders / "masks", folders / "scores")
    facts, text, _ = written(folders / "page.html", *sources, data=folders / "data")
    assert (facts.volumes, facts.stills) == (3, 3)
    volume = max(len(block) for block in re.findall(r'id="v2-image">([^<]*)<', text))
    monkeypatch.setattr(page_module, "_SPARE_BYTES", 0)
    monkeypatch.setattr(page_module, "MOST_BYTES", facts.size_bytes - volume)
    fewer, text, _ = written(folders / "page.html", *sources, data=folders / "data")
    assert fewer.size_bytes <= facts.size_bytes - volume
    assert (fewer.volumes, fewer.stills) == (2, 3)
    assert "1 of the worst cases are not in the viewer, so that the page stays below" in text
    monkeypatch.setattr(page_module, "MOST_BYTES", 40_000)
    least, text, _ = written(folders / "page.html", *sources, data=folders / "data")
    assert least.size_bytes <= 40_000
    assert least.stills < 3
    assert f"{3 - least.stills} cases have no picture, so that" in text


def test_infinite_scores_are_shown_and_undefined_ones_are_not(tmp_path):
    write_scores(tmp_path / "scores", {"case 1": 0.0})
    document = json.loads((tmp_path / "scores" / "scores.json").read_text())
    document["cases"][0] |= {"infinite": {"WT": ["hd95_mm"]}}
    document["cases"][0]["regions"]["WT"]["hd95_mm"] = None
    write_json(tmp_path / "scores" / "scores.json", document)
    _, text, _ = written(tmp_path / "page.html", tmp_path / "scores")
    assert '<td data-value="Infinity">\u221e</td>' in text
    assert "NSD" not in text


def test_many_metrics_are_cut_and_named(tmp_path):
    write_scores(tmp_path / "scores", {"case 1": 0.5})
    document = json.loads((tmp_path / "scores" / "scores.json").read_text())
    document["cases"][0]["regions"]["WT"] |= {f"metric_{number}": 0.5 for number in range(12)}
    write_json(tmp_path / "scores" / "scores.json", document)
    facts, _, page = written(tmp_path / "page.html", tmp_path / "scores")
    assert len([attributes for attributes in page.all("th") if "aria-sort" in attributes]) == 2 + 12
    assert "Metrics that are in scores.csv and not in the table: metric 10, metric 11." in facts.notes


def test_a_page_of_a_run_in_progress_refreshes_itself_without_a_script_too(tmp_path):
    write_run(tmp_path / "run", is_finished=False)
    _, text, page = written(tmp_path / "page.html", tmp_path / "run", with_viewer=False, is_live=True)
    assert [meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "refresh"] == ["30"]
    assert "<noscript><meta http-equiv" in text
    assert "This page is updated during the training" in text
    _, text, page = written(tmp_path / "page.html", tmp_path / "run", with_viewer=False)
    assert not [meta for meta in page.all("meta") if meta.get("http-equiv") == "refresh"]
    assert "run was still training when this page was written" in text
    write_run(tmp_path / "done")
    _, text, _ = written(tmp_path / "page.html", tmp_path / "done", with_viewer=False)
    assert 'class="state"' not in text


def test_a_run_that_was_interrupted_tells_where_why_and_what_goes_on_with_it(tmp_path):
    write_run(tmp_path / "my run", is_finished=False)
    write_json(tmp_path / "my run" / "split.json", {"data": ["/srv/scans/gli"]})
    write_json(tmp_path / "my run" / "interrupted.json", {"reason": "/srv/scans/private/x.nii.gz vanished"})
    _, text, _ = written(tmp_path / "page.html", tmp_path / "my run", with_viewer=False)
    assert "my run stopped after step 40: \u2026/private/x.nii.gz vanished." in text
    assert "<code>segkit train gli -o 'my run' --resume</code>" in html.unescape(text)
    assert "/srv/scans" not in text
    (tmp_path / "my run" / "interrupted.json").unlink()
    os.utime(tmp_path / "my run" / "metrics.jsonl", (0, 0))
    _, text, _ = written(tmp_path / "page.html", tmp_path / "my run", with_viewer=False)
    assert "my run stopped after step 40 for an unknown reason." in text


def test_validation_of_a_run_is_scored_where_no_evaluation_is_given(tmp_path):
    write_run(tmp_path / "run")
    facts, text, _ = written(tmp_path / "page.html", tmp_path / "run")
    assert facts.cases == 1
    assert 'data-value="0.625"' in text  # the mean of 0.75 and 0.5


@pytest.mark.parametrize("digest", ["ab12", "other"])
def test_the_card_of_the_model_is_told_if_it_made_the_masks(tmp_path, digest):
    write_masks(tmp_path / "masks", IDS[:1])
    path = tmp_path / "masks" / "manifest.json"
    document = json.loads(path.read_text())
    document["model"] |= {"name": str(tmp_path / "model"), "sha256": ["ab12"]}
    write_json(path, document)
    trained = {"identity": "gliomas of 2021", "licence": "CC BY 4.0"}
    write_json(tmp_path / "model" / "model.json", {"sha256": digest, "training_data": trained})
    _, text, _ = written(tmp_path / "page.html", tmp_path / "masks")
    assert ("gliomas of 2021" in text) == (digest == "ab12")
    assert ("CC BY 4.0" in text) == (digest == "ab12")


def test_images_are_found_where_the_documents_tell(folders):
    document = json.loads((folders / "scores" / "scores.json").read_text())
    write_json(folders / "scores" / "scores.json", document | {"references": "../data", "predictions": "../masks"})
    facts, _, _ = written(folders / "page.html", folders / "scores")
    assert facts.stills == 3
    assert facts.notes == ()


def test_missing_images_are_told(folders):
    facts, text, _ = written(folders / "page.html", folders / "scores")
    assert facts.stills == 0
    assert "name their folder with --data" in text


def test_a_prediction_on_another_grid_costs_only_its_picture(folders):
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), np.uint8), LPS), folders / "masks" / f"{IDS[1]}.nii.gz")
    facts, text, _ = written(folders / "page.html", folders / "masks", folders / "scores", data=folders / "data")
    assert facts.stills == 2
    assert f"No picture of {IDS[1]}" in text


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(RequestError, match="holds nothing to report"):
        write_page([tmp_path / "empty"], tmp_path / "page.html")
    with pytest.raises(RequestError, match="there is no such folder"):
        write_page([tmp_path / "nowhere"], tmp_path / "page.html")
    write_json(tmp_path / "bad" / "manifest.json", [1])
    with pytest.raises(RequestError, match="holds a list; expected a JSON object"):
        write_page([tmp_path / "bad"], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_two_evaluations_of_one_case_are_refused(tmp_path):
    for name in ("a", "b"):
        write_scores(tmp_path / name, {"case": 0.5})
    with pytest.raises(RequestError, match="two evaluations score case case"):
        write_page([tmp_path / "a", tmp_path / "b"], tmp_path / "page.html")


def test_a_page_is_written_without_torch(folders):
    script = (
        "import sys; from pathlib import Path; from segkit.report.page import write_page; "
        f"write_page([Path({str(folders / 'run')!r})], Path({str(folders / 'page.html')!r})); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'matplotlib', 'segkit.inference')))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
