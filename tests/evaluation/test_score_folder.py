"""Folders of masks against references: pairing, schemes, bad cases, documents."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from segkit.errors import RequestError
from segkit.evaluation.pairing import Pairing, challenge_of, pair_folders
from segkit.evaluation.score_files import ScoredCase, worst_first
from segkit.evaluation.score_folder import (
    evaluate_folders,
    regions_of,
    scored_regions,
)
from segkit.labels import SCHEMES
from segkit.reading.files import stem_of
from segkit.report.figures import draw_worst_cases

AFFINE = np.diag([-1.0, -1.0, 1.0, 1.0])
AFFINE[1, 3] = 239


def tumour(et: int = 3) -> np.ndarray:
    """Nested boxes in 10^3 voxels: ED around NCR around ET."""
    labels = np.zeros((10, 10, 10), np.uint8)
    labels[2:8, 2:8, 2:8] = 2
    labels[3:7, 3:7, 3:7] = 1
    labels[4:6, 4:6, 4:6] = et
    return labels


def save(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Two BraTS 2023 cases: `-000` predicted exactly, `-001` shifted by a voxel."""
    predictions, references = tmp_path / "pred", tmp_path / "ref"
    for case, shift in (("BraTS-GLI-00001-000", 0), ("BraTS-GLI-00002-000", 1)):
        save(references / f"{case}-seg.nii.gz", tumour())
        save(predictions / f"{case}.nii.gz", np.roll(tumour(), shift, axis=0))
    return predictions, references


def test_document_follows_the_contract(folders):
    document = evaluate_folders(*folders).to_json()
    assert document["protocol"] == "legacy"
    assert document["challenge"] == "gli"
    assert [case["case"] for case in document["cases"]] == ["BraTS-GLI-00001-000", "BraTS-GLI-00002-000"]
    assert list(document["cases"][0]["regions"]) == ["WT", "TC", "ET"]
    assert document["cases"][0]["regions"]["WT"]["dice"] == 1.0
    assert document["cases"][1]["regions"]["WT"]["dice"] == pytest.approx(5 / 6)
    assert document["cases"][1]["regions"]["ET"]["dice"] == pytest.approx(1 / 2)
    # Two patients: the same one twice in a quarter of the resamples each, so the interval goes from one to the other.
    ends = [0.5, 1.0]
    expected = {"mean": 0.75, "median": 0.75, "n": 2, "ci95": ends, "median_ci95": ends}
    assert document["summary"]["ET"]["dice"] == expected
    assert document["cases"][0]["patient"] == "BraTS-GLI-00001"
    assert document["intervals"] == "95 % CI of the mean: bootstrap by case"
    assert document["summary"]["WT"]["hd95_mm"]["mean"] == pytest.approx(0.5)
    assert document["errors"] == []


def test_masks_of_different_years_compare_by_tissue(folders):
    predictions, references = folders
    for path in predictions.iterdir():
        path.unlink()
    save(predictions / "BraTS-GLI-00001-000.nii.gz", tumour(et=4))
    wrong = evaluate_folders(predictions, references)
    assert "label values 4" in wrong.errors["BraTS-GLI-00001-000"]
    assert "--prediction-scheme" in wrong.errors["BraTS-GLI-00001-000"]
    right = evaluate_folders(predictions, references, prediction_scheme="brats2017")
    assert [scores["dice"] for scores in right.cases[0].regions.values()] == [1, 1, 1]


def test_manifest_tells_the_scheme_of_each_case(folders):
    predictions, references = folders
    save(predictions / "BraTS-GLI-00001-000.nii.gz", tumour(et=4))
    entries = [{"case": "BraTS-GLI-00001-000", "status": "done", "label_scheme": "brats2017"}]
    (predictions / "manifest.json").write_text(json.dumps({"cases": entries}), encoding="utf-8")
    evaluation = evaluate_folders(predictions, references)
    assert not evaluation.errors
    assert evaluation.cases[0].regions["ET"]["dice"] == 1


def test_tissue_that_the_prediction_cannot_hold_counts_as_not_predicted(tmp_path):
    with_cavity = tumour()
    with_cavity[0, 0, 0] = 4
    save(tmp_path / "ref" / "BraTS-GLI-00001-100-seg.nii.gz", with_cavity)
    save(tmp_path / "pred" / "BraTS-GLI-00001-100.nii.gz", tumour())
    evaluation = evaluate_folders(tmp_path / "pred", tmp_path / "ref", prediction_scheme="brats2023")
    assert {region: scores["dice"] for region, scores in evaluation.cases[0].regions.items()} == {
        "WT": 1.0,
        "TC": 1.0,
        "ET": 1.0,
        "RC": 0.0,
    }


@pytest.mark.parametrize(
    ("array", "affine", "complaint"),
    [
        (tumour()[:9], AFFINE, "9 x 10 x 10 voxels"),
        (tumour(), AFFINE @ np.diag([2.0, 1.0, 1.0, 1.0]), "measure 2 x 1 x 1 mm"),
        (np.full((10, 10, 10), 2.5, np.float32), AFFINE, "values that are no labels"),
    ],
)
def test_bad_case_is_named_and_the_others_go_on(folders, array, affine, complaint):
    predictions, references = folders
    save(predictions / "BraTS-GLI-00002-000.nii.gz", array, affine)
    evaluation = evaluate_folders(predictions, references)
    assert [case.case for case in evaluation.cases] == ["BraTS-GLI-00001-000"]
    assert complaint in evaluation.errors["BraTS-GLI-00002-000"]
    assert evaluation.to_json()["errors"][0]["case"] == "BraTS-GLI-00002-000"


def test_truncated_files_on_either_side(folders):
    predictions, references = folders
    (predictions / "BraTS-GLI-00001-000.nii.gz").write_bytes(b"\x1f\x8b\x08")
    (references / "BraTS-GLI-00002-000-seg.nii.gz").write_bytes(b"")
    evaluation = evaluate_folders(predictions, references, missing="zero")
    assert set(evaluation.errors) == {"BraTS-GLI-00001-000", "BraTS-GLI-00002-000"}
    assert [case.case for case in evaluation.cases if case.is_missing] == ["BraTS-GLI-00001-000"]


def test_missing_prediction_is_left_out_loudly(folders):
    predictions, references = folders
    (predictions / "BraTS-GLI-00002-000.nii.gz").unlink()
    evaluation = evaluate_folders(predictions, references)
    alone = {"mean": 1.0, "median": 1.0, "n": 1, "ci95": None, "median_ci95": None}
    assert evaluation.summary["WT"]["dice"] == alone
    assert evaluation.unscored == ("BraTS-GLI-00002-000",)
    assert not evaluation.errors
    assert any("NOT in these scores" in note for note in evaluation.notes())


def test_missing_prediction_scored_as_worst(folders):
    predictions, references = folders
    (predictions / "BraTS-GLI-00002-000.nii.gz").unlink()
    document = evaluate_folders(predictions, references, missing="zero").to_json()
    assert document["cases"][1]["missing"] is True
    assert document["cases"][1]["regions"]["ET"]["hd95_mm"] == 373.13
    assert document["summary"]["WT"]["dice"]["mean"] == 0.5
    assert document["summary"]["WT"]["dice"]["n"] == 2
    assert document["unscored"] == []


def test_chosen_cases_only(folders):
    evaluation = evaluate_folders(*folders, case_ids=["BraTS-GLI-00002-000"])
    assert [case.case for case in evaluation.cases] == ["BraTS-GLI-00002-000"]
    with pytest.raises(RequestError, match="1 of 1 wanted cases have no reference: nobody"):
        evaluate_folders(*folders, case_ids=["nobody"])


@pytest.mark.parametrize(
    "name", ["{}.nii.gz", "{}-seg.nii.gz", "{}_seg.nii.gz", "team7_{}.nii.gz", "{}/{}-seg.nii.gz", "{}.nii"]
)
def test_names_of_predictions(tmp_path, folders, name):
    _, references = folders
    case = "BraTS-GLI-00001-000"
    path = save(tmp_path / "named" / name.format(case, case), tumour())
    pairing = pair_folders(tmp_path / "named", references)
    assert {pair.reference.id: pair.prediction for pair in pairing.pairs if pair.prediction} == {case: path}


def test_two_files_for_one_case_are_refused(folders):
    predictions, references = folders
    save(predictions / "BraTS-GLI-00001-000-seg.nii.gz", tumour())
    evaluation = evaluate_folders(predictions, references)
    assert "2 files could be the prediction" in evaluation.errors["BraTS-GLI-00001-000"]


def test_surplus_predictions_are_named(folders):
    predictions, references = folders
    save(predictions / "BraTS-GLI-00009-000.nii.gz", tumour())
    assert evaluate_folders(predictions, references).to_json()["surplus"] == ["BraTS-GLI-00009-000.nii.gz"]


def test_two_single_files_need_no_matching_names(tmp_path):
    prediction, reference = save(tmp_path / "mine.nii.gz", tumour()), save(tmp_path / "yours.nii.gz", tumour())
    evaluation = evaluate_folders(prediction, reference, label_scheme="brats2023")
    assert evaluation.pairing.surplus == ()
    assert [case.case for case in evaluation.cases] == ["yours"]
    assert evaluation.summary["TC"]["dice"]["mean"] == 1


def test_folder_of_plain_masks_scores_each_value(tmp_path):
    for folder in ("pred", "ref"):
        save(tmp_path / folder / "organ_7.nii.gz", tumour(et=9))
    evaluation = evaluate_folders(tmp_path / "pred", tmp_path / "ref")
    assert list(evaluation.cases[0].regions) == ["label_1", "label_2", "label_9"]
    assert evaluation.pairing.challenge is None


def block(*values: int) -> np.ndarray:
    """One slab of 10^3 voxels per value."""
    labels = np.zeros((10, 10, 10), np.uint8)
    for position, value in enumerate(values):
        labels[2 * position + 1, 3:6, 3:6] = value
    return labels


def dice_of(root: Path, **options: str) -> dict[str, float]:
    evaluation = evaluate_folders(root / "pred", root / "ref", **options)
    assert not evaluation.errors
    return {region: scores["dice"] for region, scores in evaluation.cases[0].regions.items()}


@pytest.mark.parametrize("with_images", [False, True])
@pytest.mark.parametrize(
    ("reference", "prediction", "expected"),
    [
        ((1,), (1, 2), {"label_1": 1.0, "label_2": 0.0}),
        ((1, 2), (1,), {"label_1": 1.0, "label_2": 0.0}),
        ((), (1,), {"label_1": 0.0}),
        ((), (3,), {"label_3": 0.0}),
        ((1,), (), {"label_1": 0.0}),
        ((), (), {"label_1": 1.0}),
    ],
)
def test_classes_without_names_are_the_values_of_both_sides(tmp_path, with_images, reference, prediction, expected):
    save(tmp_path / "ref" / "p1_seg.nii.gz", block(*reference))
    save(tmp_path / "pred" / "p1.nii.gz", block(*prediction))
    if with_images:
        save(tmp_path / "ref" / "p1.nii.gz", np.ones((10, 10, 10), np.float32))
    assert dice_of(tmp_path) == expected
    assert dice_of(tmp_path, label_scheme="classes", prediction_scheme="classes") == expected


def test_values_of_predictions_only_are_told(tmp_path):
    save(tmp_path / "ref" / "p1_seg.nii.gz", block(1))
    save(tmp_path / "pred" / "p1.nii.gz", block(1, 5, 2))
    document = evaluate_folders(tmp_path / "pred", tmp_path / "ref").to_json()
    assert document["notes"] == ["label values 2, 5 occur in predictions only, and are scored against empty references"]


def test_rare_values_of_many_references_are_classes(tmp_path):
    for number in range(402):
        save(tmp_path / "ref" / f"p{number:03d}.nii", block(2 if number == 1 else 1)[:2])
    save(tmp_path / "pred" / "p000.nii", block(1)[:2])
    assert list(dice_of(tmp_path)) == ["label_1", "label_2"]


def test_an_image_among_the_predictions_makes_no_classes(tmp_path):
    save(tmp_path / "ref" / "p1_seg.nii.gz", block(1))
    save(tmp_path / "pred" / "p1.nii.gz", (np.arange(1000) % 200).astype(np.uint8).reshape(10, 10, 10))
    evaluation = evaluate_folders(tmp_path / "pred", tmp_path / "ref")
    assert "holds label values 2, 3" in evaluation.errors["p1"]


def test_stray_values_beside_named_classes_stay_an_error(tmp_path):
    root = decathlon(tmp_path / "Task09")
    save(tmp_path / "pred" / "spleen_1.nii.gz", block(1, 2))
    assert "holds label values 2" in evaluate_folders(tmp_path / "pred", root).errors["spleen_1"]


def paired(root: Path, references: tuple[str, ...], predictions: tuple[str, ...]) -> Pairing:
    for name in references:
        save(root / "ref" / f"{name}.nii.gz", block(1))
    for name in predictions:
        save(root / "pred" / f"{name}.nii.gz", block(1))
    return pair_folders(root / "pred", root / "ref")


def names_of(pairing: Pairing) -> dict[str, str | None]:
    return {pair.reference.id: pair.prediction and stem_of(pair.prediction) for pair in pairing.pairs}


def test_a_prediction_named_as_one_case_is_not_that_of_another(tmp_path):
    pairing = paired(tmp_path, ("1_seg", "p_1_seg"), ("p_1",))
    assert names_of(pairing) == {"1": None, "p_1": "p_1"}
    assert not pairing.ambiguous


def test_a_prediction_that_fits_two_cases_is_neither(tmp_path):
    pairing = paired(tmp_path, ("1_seg", "p_1_seg", "p_2_seg"), ("x_p_1", "p_2"))
    assert names_of(pairing) == {"1": None, "p_1": None, "p_2": "p_2"}
    assert set(pairing.ambiguous) == {"1", "p_1"}
    assert "several cases: 1, p_1" in pairing.ambiguous["1"]
    assert [case.case for case in evaluate_folders(tmp_path / "pred", tmp_path / "ref").cases] == ["p_2"]


def test_ids_within_other_ids_do_not_hide_surplus(tmp_path):
    pairing = paired(tmp_path, ("1", "2"), ("case_1", "case_11", "1_probability"))
    assert names_of(pairing) == {"1": "case_1", "2": None}
    assert [path.name for path in pairing.surplus] == ["case_11.nii.gz"]


def test_references_without_the_suffix_of_the_others_are_told(tmp_path):
    pairing = paired(tmp_path, ("a_seg", "b"), ("a", "b"))
    assert names_of(pairing) == {"a": "a"}
    assert any(
        "not taken for references: b.nii.gz" in note
        for note in evaluate_folders(tmp_path / "pred", tmp_path / "ref").notes()
    )


def test_names_that_are_not_utf8_are_written(tmp_path):
    name = os.fsdecode(b"Andr\xe9")
    try:
        for folder in ("ref", "pred"):
            path = save(tmp_path / folder / "x.nii.gz", block(1))
            path.rename(path.with_name(f"{name}.nii.gz"))
    except OSError:
        pytest.skip("this file system takes only Unicode names")
    evaluation = evaluate_folders(tmp_path / "pred", tmp_path / "ref")
    evaluation.errors["bad"] = f"{name} is unreadable"
    evaluation.write(tmp_path / "out")
    document = json.loads((tmp_path / "out" / "scores.json").read_text(encoding="utf-8"))
    assert document["cases"][0]["case"] == name
    assert "Andr\\udce9,label_1,1.0" in (tmp_path / "out" / "scores.csv").read_text(encoding="utf-8")
    assert "Andr\\udce9 is unreadable" in (tmp_path / "out" / "summary.md").read_text(encoding="utf-8")


def decathlon(root: Path) -> Path:
    """A Decathlon folder with one case and named classes."""
    save(root / "imagesTr" / "spleen_1.nii.gz", np.random.default_rng(0).normal(size=(10, 10, 10)).astype(np.float32))
    save(root / "labelsTr" / "spleen_1.nii.gz", np.minimum(tumour(), 1))
    document = {
        "name": "spleen",
        "modality": {"0": "CT"},
        "labels": {"0": "background", "1": "spleen"},
        "training": [{"image": "./imagesTr/spleen_1.nii.gz", "label": "./labelsTr/spleen_1.nii.gz"}],
        "test": [],
    }
    (root / "dataset.json").write_text(json.dumps(document), encoding="utf-8")
    return root


@pytest.mark.parametrize("reference", ["", "labelsTr"])
def test_dataset_json_names_the_classes(tmp_path, reference):
    root = decathlon(tmp_path / "Task09")
    save(tmp_path / "pred" / "spleen_1.nii.gz", np.minimum(tumour(), 1))
    evaluation = evaluate_folders(tmp_path / "pred", root / reference)
    assert list(evaluation.cases[0].regions) == ["spleen"]
    assert evaluation.cases[0].regions["spleen"]["dice"] == 1


def test_worst_cases_are_drawn_over_the_images(tmp_path):
    root = decathlon(tmp_path / "Task09")
    save(tmp_path / "pred" / "spleen_1.nii.gz", np.roll(np.minimum(tumour(), 1), 2, axis=1))
    paths = draw_worst_cases(evaluate_folders(tmp_path / "pred", root), tmp_path / "figures", 3)
    assert [path.name for path in paths] == ["spleen_1.png"]
    assert paths[0].stat().st_size > 1000


def test_figures_need_images(tmp_path, folders):
    evaluation = evaluate_folders(*folders)
    with pytest.raises(RequestError, match="the references are masks only"):
        draw_worst_cases(evaluation, tmp_path, 1)


def test_written_files_agree(tmp_path, folders):
    evaluation = evaluate_folders(*folders)
    evaluation.write(tmp_path / "out")
    document = json.loads((tmp_path / "out" / "scores.json").read_text(encoding="utf-8"))
    assert (document.pop("predictions"), document.pop("references")) == ("../pred", "../ref")
    assert document == evaluation.to_json()
    assert len((tmp_path / "out" / "scores.csv").read_text(encoding="utf-8").splitlines()) == 1 + 2 * 3
    assert "| WT | 0.917 (0.917)" in (tmp_path / "out" / "summary.md").read_text(encoding="utf-8")


@pytest.fixture
def metastases(tmp_path: Path) -> tuple[Path, Path]:
    """Two lesions of which one is found, and a case whose only region is made up."""
    predictions, references = tmp_path / "met_pred", tmp_path / "met_ref"
    two = np.zeros((20, 20, 20), np.uint8)
    two[2:6, 2:6, 2:6] = two[12:16, 12:16, 12:16] = 3
    found, nothing = two.copy(), np.zeros_like(two)
    found[12:] = 0
    for case, prediction, reference in (("00001", found, two), ("00002", two, nothing)):
        save(predictions / f"BraTS-MET-{case}-000.nii.gz", prediction)
        save(references / f"BraTS-MET-{case}-000-seg.nii.gz", reference)
    return predictions, references


def test_lesions_and_infinite_values_in_the_document(metastases):
    evaluation = evaluate_folders(*metastases, protocol="brats2026")
    document = json.loads(json.dumps(evaluation.to_json(), allow_nan=False))
    assert document["challenge"] == "met"
    first, second = document["cases"]
    assert first["regions"]["ET"]["lesionwise_hd95_mm"] == 373 / 2
    exact = {"voxels": 64, "volume_mm3": 64.0, "matched": True, "dice": 1.0, "hd95_mm": 0.0, "nsd": 1.0}
    missed = {"voxels": 64, "volume_mm3": 64.0, "matched": False, "dice": None, "hd95_mm": None, "nsd": None}
    assert first["lesions"]["ET"] == [exact, missed]
    assert "infinite" not in first
    assert "lesions" not in second
    assert second["infinite"] == {region: ["sq_hd95_mm"] for region in ("WT", "TC", "ET")}
    assert second["regions"]["ET"]["sq_hd95_mm"] is second["regions"]["ET"]["lesionwise_dice"] is None
    alone = {"mean": 0.0, "median": 0.0, "n": 1, "ci95": None, "median_ci95": None}
    assert document["summary"]["ET"]["sq_hd95_mm"] == alone
    assert "infinite values are not in the means: WT sq_hd95_mm in 1 cases" in " ".join(evaluation.notes())


def test_scores_are_read_as_they_were(metastases):
    evaluation = evaluate_folders(*metastases, protocol="brats2026")
    for case, entry in zip(evaluation.cases, evaluation.to_json()["cases"], strict=True):
        read = ScoredCase.model_validate(json.loads(json.dumps(entry))).scores()
        assert list(read) == list(case.regions)
        for region, scores in case.regions.items():
            assert read[region] == pytest.approx(scores, nan_ok=True)


@pytest.mark.parametrize(
    ("protocol", "worst"),
    [
        ("legacy", {"dice": 0, "hd95_mm": 373.13}),
        ("brats2023", {"lesionwise_dice": 0, "lesionwise_hd95_mm": 374, "hd95_mm": 374}),
        ("brats2026", {"lesionwise_dice": 0, "lesionwise_hd95_mm": 373, "hd95_voxels": 373, "sq_hd95_mm": 373}),
    ],
)
def test_missing_predictions_are_the_worst_in_every_protocol(metastases, protocol, worst):
    (metastases[0] / "BraTS-MET-00002-000.nii.gz").unlink()
    evaluation = evaluate_folders(*metastases, protocol=protocol, missing="zero")
    missing = evaluation.cases[1]
    assert missing.is_missing
    assert {name: missing.regions["ET"][name] for name in worst} == worst


def test_headline_of_a_protocol_is_what_people_see(metastases, tmp_path):
    evaluation = evaluate_folders(*metastases, protocol="brats2026")
    evaluation.write(tmp_path / "out")
    table = (tmp_path / "out" / "summary.md").read_text(encoding="utf-8")
    assert (
        "| region | lesionwise_dice | lesionwise_hd95_mm | lesionwise_nsd | lesion_f1 | small_lesion_f1 | n |" in table
    )
    assert "sq_nsd_std" in (tmp_path / "out" / "scores.csv").read_text(encoding="utf-8")


def test_single_tissues_are_scored_where_the_challenge_does(folders):
    regions = {
        protocol: list(evaluate_folders(*folders, protocol=protocol).cases[0].regions)
        for protocol in ("legacy", "brats2023", "brats2026")
    }
    assert regions["legacy"] == regions["brats2023"] == ["WT", "TC", "ET"]
    assert regions["brats2026"] == ["WT", "TC", "ET", "NETC", "SNFH"]
    assert scored_regions(SCHEMES["brats2024"], "brats2026", "met").keys() == {"WT", "TC", "ET", "RC"}
    assert scored_regions(SCHEMES["brats-men-rt"], "brats2026", "men-rt") == {"GTV": (1,)}
    assert scored_regions(SCHEMES["brats2015"], "brats2026", "gli")["NETC"] == (1, 3)


def test_a_protocol_that_needs_a_challenge_says_so(tmp_path):
    save(tmp_path / "ref" / "a.nii.gz", block(1))
    save(tmp_path / "pred" / "a.nii.gz", block(1))
    with pytest.raises(RequestError, match=r"it cannot be inferred from the case IDs.*Name one with --challenge"):
        evaluate_folders(tmp_path / "pred", tmp_path / "ref", protocol="brats2023")
    evaluation = evaluate_folders(tmp_path / "pred", tmp_path / "ref", protocol="brats2026")
    assert evaluation.cases[0].regions["label_1"]["sq_dice"] == 1


def test_worst_cases_are_drawn_where_dice_is_undefined(tmp_path):
    root = decathlon(tmp_path / "Task09")
    save(root / "labelsTr" / "spleen_1.nii.gz", np.zeros((10, 10, 10), np.uint8))
    save(tmp_path / "pred" / "spleen_1.nii.gz", np.zeros((10, 10, 10), np.uint8))
    evaluation = evaluate_folders(tmp_path / "pred", root, protocol="brats2026")
    assert draw_worst_cases(evaluation, tmp_path / "figures", 1)[0].name == "spleen_1.png"


def test_wrong_requests(tmp_path, folders):
    predictions, references = folders
    with pytest.raises(RequestError, match=r"unknown protocol 'brats1999'; expected one of legacy"):
        evaluate_folders(predictions, references, protocol="brats1999")
    with pytest.raises(RequestError, match="unknown challenge 'moon'"):
        evaluate_folders(predictions, references, challenge="moon")
    with pytest.raises(RequestError, match="challenge 'men-rt' has no label scheme 'brats2023'"):
        evaluate_folders(predictions, references, challenge="men-rt", label_scheme="brats2023")
    with pytest.raises(RequestError, match="label scheme 'tissues'"):
        evaluate_folders(predictions, references, label_scheme="tissues")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RequestError, match="no prediction belongs to any of the 2 references"):
        evaluate_folders(tmp_path / "empty", references)
    with pytest.raises(RequestError, match="holds no masks"):
        evaluate_folders(predictions, tmp_path / "empty")


@pytest.mark.parametrize(
    ("ids", "challenge"),
    [
        (["BraTS-MEN-RT-0000-1"], "men-rt"),
        (["BraTS-MEN-00001-000"], "men"),
        (["BraTS-GoAT-00001-000"], "goat"),
        (["BraTS2021_00006", "BraTS20_Training_001"], "gli"),
        (["BraTS-GLI-00001-000", "BraTS-MET-00001-000"], None),
        (["hippocampus_001"], None),
    ],
)
def test_challenge_is_told_by_the_names(ids, challenge):
    assert challenge_of(ids) == challenge


def test_paediatric_regions_are_all_scored():
    assert regions_of(SCHEMES["brats-ped"]) == {
        "WT": (1, 2, 3, 4),
        "TC": (1, 2, 3),
        "CC": (3,),
        "ET": (1,),
        "NETC": (2,),
        "ED": (4,),
    }


def test_real_case_against_itself_in_another_scheme(tmp_path, shared_data):
    root = shared_data / "brats2021"
    image = nib.load(root / "BraTS2021_00006" / "BraTS2021_00006_seg.nii.gz")
    labels = np.asarray(image.dataobj).astype(np.uint8)
    save(tmp_path / "pred" / "BraTS2021_00006.nii.gz", np.where(labels == 4, 3, labels), image.affine)
    evaluation = evaluate_folders(tmp_path / "pred", root, prediction_scheme="brats2023")
    scores = evaluation.cases[0].regions
    assert {region: (value["dice"], value["hd95_mm"]) for region, value in scores.items()} == {
        "WT": (1.0, 0.0),
        "TC": (1.0, 0.0),
        "ET": (1.0, 0.0),
    }
    assert evaluation.pairing.challenge == "gli"


def test_worst_cases_come_first_and_what_is_undefined_last():
    cases = {
        "b": {"WT": {"dice": 0.5}},
        "nothing there": {"WT": {"dice": math.nan}},
        "a": {"WT": {"dice": 0.5}, "ET": {"dice": math.nan}},
        "worst": {"WT": {"dice": 0.9}, "ET": {"dice": 0.0}},
        "no Dice": {"WT": {"hd95_mm": 3.0}},
    }
    assert worst_first(cases) == ["worst", "a", "b", "no Dice", "nothing there"]
