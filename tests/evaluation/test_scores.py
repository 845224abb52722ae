"""Reading scores back: what evaluation wrote, and what is no such file."""

from __future__ import annotations

import json
import math

import nibabel as nib
import numpy as np
import pytest

from segkit.errors import RequestError
from segkit.evaluation.score_files import read_score_sets, read_scores
from segkit.evaluation.score_folder import evaluate_folders


def document(**others):
    cases = [{"case": "BraTS-GLI-00001-000", "regions": {"WT": {"dice": 0.5, "hd95_mm": None}}}]
    return {"protocol": "legacy", "cases": cases} | others


def write(folder, content, name="scores.json"):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_values_failures_and_patients(tmp_path):
    errors = [{"case": "b", "error": "truncated"}, {"case": "BraTS-GLI-00001-000", "error": "scored as worst"}]
    path = write(tmp_path / "m", document(errors=errors, unscored=["c"], challenge="gli"))
    scores = read_scores(path)
    assert (scores.name, scores.protocol, scores.challenge, scores.roi) == ("m", "legacy", "gli", None)
    assert scores.value("BraTS-GLI-00001-000", "WT", "dice") == 0.5
    assert math.isnan(scores.value("BraTS-GLI-00001-000", "WT", "hd95_mm"))
    assert math.isnan(scores.value("b", "WT", "dice"))
    assert scores.failed == {"b", "c"}
    assert scores.patients == {"BraTS-GLI-00001-000": "BraTS-GLI-00001", "b": "b", "c": "c"}
    assert (scores.regions, scores.metrics) == (["WT"], ["dice", "hd95_mm"])


def test_what_evaluation_wrote_is_read_back(tmp_path):
    labels = np.zeros((4, 4, 4), np.uint8)
    labels[1:3, 1:3, 1:3] = 3
    missed = np.zeros_like(labels)
    for visit, predicted in (("000", labels), ("001", missed)):
        for folder, array in (("ref", labels), ("pred", predicted)):
            (tmp_path / folder).mkdir(exist_ok=True)
            nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / folder / f"BraTS-GLI-00001-{visit}.nii.gz")
    nib.save(nib.Nifti1Image(labels, np.eye(4)), tmp_path / "ref" / "BraTS-GLI-00002-000.nii.gz")
    evaluation = evaluate_folders(tmp_path / "pred", tmp_path / "ref", protocol="brats2026")
    evaluation.write(tmp_path / "model")
    (scores,) = read_score_sets([tmp_path / "model"])
    assert (scores.name, scores.protocol, scores.challenge, scores.label_scheme) == (
        *("model", "brats2026", "gli"),
        evaluation.pairing.scheme.name,
    )
    assert scores.value("BraTS-GLI-00001-000", "ET", "dice") == 1.0
    assert scores.value("BraTS-GLI-00001-001", "ET", "sq_hd95_mm") == math.inf
    assert scores.failed == {"BraTS-GLI-00002-000"}
    assert set(scores.patients.values()) == {"BraTS-GLI-00001", "BraTS-GLI-00002"}


def test_infinite_is_told_from_undefined(tmp_path):
    regions = {"WT": {"dice": None, "hd95_mm": None}}
    entry = {"case": "a", "regions": regions, "infinite": {"WT": ["hd95_mm"]}}
    scores = read_scores(write(tmp_path, document(cases=[entry])))
    assert math.isnan(scores.value("a", "WT", "dice"))
    assert scores.value("a", "WT", "hd95_mm") == math.inf


def test_patients_that_were_written_count(tmp_path):
    cases = [{"case": "Image_01L", "patient": "Image_01", "regions": {}}]
    assert read_scores(write(tmp_path, document(cases=cases))).patients == {"Image_01L": "Image_01"}


def test_models_are_named_after_folders_and_by_paths_where_these_agree(tmp_path):
    first, second = tmp_path / "a" / "scores", tmp_path / "b" / "scores"
    for folder in (first, second, tmp_path / "other"):
        write(folder, document())
    file = write(tmp_path / "other", document(), "mine.json")
    sets = read_score_sets([first, second, tmp_path / "other", file])
    assert [own.name for own in sets] == [str(first), str(second), "other", "mine"]
    with pytest.raises(RequestError, match="is given more than once"):
        read_score_sets([first, first / "scores.json"])


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("{", "is not readable JSON"),
        ("", "is not readable JSON"),
        ("[]", "holds a list; expected a JSON object"),
        ("[" * 100_000, "is not readable JSON"),
        ({"cases": []}, "protocol: Field required"),
        (document(cases=["a"]), r"cases\.0: Input should be a valid dictionary\)"),
        (document(notes=None), "notes: Input should be a valid list"),
        (document(errors=[{"error": "no name"}]), r"errors\.0\.case: Field required"),
        (document(cases=[]), "holds no scored case"),
        (document(cases=[{"case": "a", "regions": {"WT": {"dice": "good"}}}]), r"cases\.0\.regions\.WT\.dice: Input"),
        (document(cases=[{"case": "a", "regions": {}}] * 2), "holds case a twice"),
    ],
)
def test_damaged_files_are_named_with_the_place(tmp_path, content, found):
    path = write(tmp_path, content)
    with pytest.raises(RequestError, match=f"scores.json: .*{found}.*segkit evaluate -o"):
        read_score_sets([path])


def test_names_that_are_not_utf8_are_read_back(tmp_path):
    cases = [{"case": "scan\udce9", "regions": {"r\udce9": {"dice": 0.5}}}]
    assert read_scores(write(tmp_path, document(cases=cases))).value("scan\udce9", "r\udce9", "dice") == 0.5


def test_missing_file(tmp_path):
    with pytest.raises(RequestError, match=r"scores\.json: cannot be read \(No such file"):
        read_score_sets([tmp_path])
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(RequestError, match="loop: cannot be read"):
        read_score_sets([loop])
