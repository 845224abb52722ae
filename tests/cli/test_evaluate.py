"""`segkit evaluate` as it is typed: streams, exit codes, files."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import PIL.Image
import pytest
import typer
from typer.testing import CliRunner

from segkit.cli.evaluate import evaluate
from segkit.errors import RequestError

app = typer.Typer()
app.command()(evaluate)


@pytest.fixture
def folders(tmp_path):
    labels = np.zeros((8, 8, 8), np.uint8)
    labels[2:6, 2:6, 2:6] = 2
    labels[3:5, 3:5, 3:5] = 4
    for folder in ("pred", "ref"):
        (tmp_path / folder).mkdir()
        for case in ("BraTS2021_00001", "BraTS2021_00002"):
            nib.save(nib.Nifti1Image(labels, np.diag([-1.0, -1.0, 1.0, 1.0])), tmp_path / folder / f"{case}.nii.gz")
    return tmp_path


def run(folder, *options):
    return CliRunner().invoke(app, ["-p", str(folder / "pred"), "-r", str(folder / "ref"), *options])


def test_json_is_alone_on_standard_output(folders):
    (folders / "pred" / "BraTS2021_00002.nii.gz").unlink()
    result = run(folders, "--json")
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    alone = {"mean": 1.0, "median": 1.0, "n": 1, "ci95": None, "median_ci95": None}
    assert document["summary"]["ET"]["dice"] == alone
    assert "NOT in these scores" in result.stderr


def test_failed_case_gives_exit_code_1(folders):
    (folders / "pred" / "BraTS2021_00002.nii.gz").write_bytes(b"not an image")
    result = run(folders, "--json")
    assert result.exit_code == 1
    assert [case["case"] for case in json.loads(result.stdout)["cases"]] == ["BraTS2021_00001"]
    assert "BraTS2021_00002" in result.stderr


def test_table_for_people(folders):
    result = run(folders)
    assert result.exit_code == 0
    assert "2 cases, protocol legacy" in result.stdout
    assert "1.000 (1.000)" in result.stdout


def test_tables_of_the_other_protocols(folders):
    by_lesion = run(folders, "--protocol", "brats2023")
    assert by_lesion.exit_code == 0
    assert "2 cases, protocol brats2023" in by_lesion.stdout
    matched = run(folders, "--protocol", "brats2026", "--json")
    scores = json.loads(matched.stdout)["summary"]
    assert list(scores) == ["WT", "TC", "ET", "NETC", "SNFH"]
    perfect = {"mean": 1.0, "median": 1.0, "n": 2, "ci95": [1.0, 1.0], "median_ci95": [1.0, 1.0]}
    assert scores["SNFH"]["lesion_f1"] == perfect


def test_output_folder(folders):
    result = run(folders, "-o", str(folders / "out"), "--quiet")
    assert result.exit_code == 0
    assert {path.name for path in (folders / "out").iterdir()} == {"scores.json", "scores.csv", "summary.md"}


def test_list_of_cases_and_missing_policy(folders):
    (folders / "cases.txt").write_text("BraTS2021_00002\n", encoding="utf-8")
    (folders / "pred" / "BraTS2021_00002.nii.gz").unlink()
    (folders / "pred" / "BraTS2021_00001.nii.gz").rename(folders / "pred" / "other_BraTS2021_00002.nii.gz")
    result = run(folders, "--cases", str(folders / "cases.txt"), "--missing", "zero", "--json")
    assert [case["case"] for case in json.loads(result.stdout)["cases"]] == ["BraTS2021_00002"]


def test_wrong_requests_have_exit_code_2(folders):
    for options in (["--protocol", "brats1999"], ["--figures", "2"], ["--challenge", "moon"]):
        error = run(folders, *options).exception
        assert isinstance(error, RequestError)
        assert error.exit_code == 2
    assert run(folders, "--missing", "perhaps").exit_code == 2


@pytest.fixture
def pictures(tmp_path):
    reference, prediction, roi = (np.zeros((4, 6), np.uint8) for _ in range(3))
    reference[0, :4], prediction[0, :2], roi[:, :3] = 1, 1, 255
    for folder, name, array in (
        ("ref", "a.png", np.arange(24, dtype=np.uint8).reshape(4, 6)),
        ("ref", "a_mask.png", reference),
        ("fov", "a_fov.png", roi),
        ("pred", "a.png", prediction),
        ("pred/probabilities", "a_foreground.tif", prediction.astype(np.float32)),
    ):
        (tmp_path / folder).mkdir(exist_ok=True, parents=True)
        PIL.Image.fromarray(array).save(tmp_path / folder / name)
    return tmp_path


def test_inside_a_region_of_interest_with_probabilities(pictures):
    options = ["--roi", str(pictures / "fov"), "--probabilities", str(pictures / "pred" / "probabilities")]
    result = run(pictures, *options, "--json")
    assert result.exit_code == 0
    scores = json.loads(result.stdout)["summary"]["foreground"]
    assert scores["dice"]["mean"] == 2 * 2 / (2 + 3)
    assert scores["auc"]["mean"] == (2 + 1 / 2) / 3  # two of three vessels above all others, one beside them
    table = run(pictures, *options).stdout
    assert "inside the regions of interest" in " ".join(table.split())
    assert "auc" in table
    assert "auc" not in run(pictures).stdout


def test_wrong_companions_have_exit_code_2(pictures):
    for options in (["--roi", "_roi.png"], ["--probabilities", str(pictures / "ref")]):
        error = run(pictures, *options).exception
        assert isinstance(error, RequestError)
        assert error.exit_code == 2
