from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from segkit.errors import DataError, RequestError
from segkit.labels import SCHEMES, translate
from segkit.phantoms.layouts import (
    PHANTOM_LAYOUTS,
    STRAY_VALUE,
    write_phantoms,
    write_phantoms_with_problems,
)
from segkit.phantoms.phantom import PHANTOM_SCHEME, Phantom, best_single_thresholds, make_phantom
from segkit.reading.case import BRATS_MODALITIES
from segkit.reading.checks import check_cohort
from segkit.reading.files import read_labels, read_volume
from segkit.reading.geometry import reorientation_to
from segkit.reading.layouts.table import find_cases

NCR, ED, ET, RC = (PHANTOM_SCHEME.values[tissue] for tissue in ("NCR", "ED", "ET", "RC"))
SIZE = 32


@pytest.fixture(scope="module")
def phantoms() -> list[Phantom]:
    return [make_phantom(number, size=40, seed=1) for number in range(1, 13)]


def test_a_case_depends_on_seed_and_number_only() -> None:
    first, again = (make_phantom(7, size=SIZE, seed=3) for _ in range(2))
    other_number, other_seed = make_phantom(8, size=SIZE, seed=3), make_phantom(7, size=SIZE, seed=4)
    for modality in BRATS_MODALITIES:
        assert np.array_equal(first.images[modality], again.images[modality])
        assert not np.array_equal(first.images[modality], other_number.images[modality])
        assert not np.array_equal(first.images[modality], other_seed.images[modality])
    assert np.array_equal(first.labels, again.labels)


def test_shape_types_and_background(phantoms: list[Phantom]) -> None:
    for phantom in phantoms:
        assert phantom.shape == (40, 40, 32)
        brain = phantom.images["t1n"] != 0
        assert 0.2 < brain.mean() < 0.4
        for image in phantom.images.values():
            assert image.dtype == np.int16
            assert np.array_equal(image != 0, brain)  # the background is exactly 0, the brain is not
        assert not phantom.labels[~brain].any()
        assert not brain[[0, -1]].any()
        assert not brain[:, [0, -1]].any()


def test_the_enhancing_rim_encloses_the_necrotic_core(phantoms: list[Phantom]) -> None:
    for phantom in phantoms:
        necrosis, oedema = (np.argwhere(phantom.labels == value) for value in (NCR, ED))
        assert len(necrosis) > 0
        assert len(oedema) > 0
        if not phantom.is_low_grade:
            rim = np.argwhere(phantom.labels == ET)
            centre = necrosis.mean(axis=0)
            mean_radius = [np.linalg.norm(voxels - centre, axis=1).mean() for voxels in (necrosis, rim, oedema)]
            assert mean_radius == sorted(mean_radius)


def test_some_cases_do_not_enhance() -> None:
    assert make_phantom(1, size=SIZE, low_grade_probability=1.0).is_low_grade
    assert not make_phantom(1, size=SIZE, low_grade_probability=0.0).is_low_grade
    is_low = [make_phantom(number, size=24).is_low_grade for number in range(60)]
    assert 1 <= sum(is_low) <= 15


def test_a_resection_cavity_changes_nothing_else() -> None:
    plain = make_phantom(1, size=SIZE, low_grade_probability=0.0)
    resected = make_phantom(1, size=SIZE, low_grade_probability=0.0, resection_probability=1.0)
    cavity = resected.labels == RC
    assert cavity.any()
    assert not (plain.labels == RC).any()
    assert np.isin(plain.labels[cavity], (NCR, ET)).all()
    assert np.array_equal(plain.labels[~cavity], resected.labels[~cavity])
    ours, theirs = plain.images["t2f"].astype(int), resected.images["t2f"].astype(int)
    changed = np.argwhere(ours != theirs)
    inside = np.argwhere(cavity)
    # Partial volume blurs the edge of the cavity by no more than 4 standard deviations of 0.55 voxels.
    assert (changed.min(axis=0) >= inside.min(axis=0) - 3).all()
    assert (changed.max(axis=0) <= inside.max(axis=0) + 3).all()
    assert theirs[cavity].mean() < 0.7 * ours[cavity].mean()  # fluid is dark on FLAIR


@pytest.mark.parametrize(
    ("tissue", "modality", "low", "high"),
    [  # deviations from the mean of the brain, as in a BraTS 2021 case and as radiology has it
        (ED, "t2f", 1.0, 2.8),
        (ED, "t2w", 0.6, 1.8),
        (ED, "t1c", -0.9, 0.4),
        (ET, "t1c", 2.0, 4.5),
        (ET, "t1n", -0.6, 0.8),
        (NCR, "t1n", -1.8, -0.3),
        (NCR, "t1c", -1.2, 0.3),
        (NCR, "t2w", 1.0, 2.8),
    ],
)
def test_contrasts_are_those_of_real_cases(
    phantoms: list[Phantom], tissue: int, modality: str, low: float, high: float
) -> None:
    means = []
    for phantom in phantoms:
        image = phantom.images[modality].astype(float)
        brain = image != 0
        inside = phantom.labels == tissue
        if inside.any():
            means.append((image[inside].mean() - image[brain].mean()) / image[brain].std())
    assert low < np.mean(means) < high


def test_intensity_scales_differ_between_cases(phantoms: list[Phantom]) -> None:
    for modality in BRATS_MODALITIES:
        means = [phantom.images[modality][phantom.images[modality] != 0].mean() for phantom in phantoms]
        assert max(means) > 1.5 * min(means)


def test_no_single_threshold_solves_a_region(phantoms: list[Phantom]) -> None:
    best = best_single_thresholds(
        [np.stack([phantom.images[m] for m in BRATS_MODALITIES]).astype(np.float32) for phantom in phantoms],
        [phantom.labels for phantom in phantoms],
        modalities=BRATS_MODALITIES,
        regions={"WT": (NCR, ED, ET), "TC": (NCR, ET), "ET": (ET,)},
    )
    assert {region: score.dice < 0.6 for region, score in best.items()} == {"WT": True, "TC": True, "ET": True}


def test_impossible_phantoms_are_refused() -> None:
    with pytest.raises(RequestError, match="phantoms of 8 voxels are too small"):
        make_phantom(1, size=8)
    with pytest.raises(RequestError, match="case -1 of seed 0 does not exist"):
        make_phantom(-1)


@pytest.mark.parametrize("convention", PHANTOM_LAYOUTS)
def test_every_convention_holds_the_same_patient(convention: str, tmp_path: Path) -> None:
    layout = PHANTOM_LAYOUTS[convention]
    numbers = (1, 7)  # 7 is low-grade
    write_phantoms(tmp_path / "data", numbers, convention=convention, size=SIZE)
    cohort = find_cases(tmp_path / "data", require_labels=True)
    assert cohort.scheme == SCHEMES[layout.scheme]
    assert cohort.modalities == BRATS_MODALITIES
    assert not [problem for problem in cohort.problems if problem.is_fatal]
    assert len(cohort.cases) == len(numbers)
    for case, number in zip(cohort.cases, numbers, strict=True):
        expected = make_phantom(number, size=SIZE, resection_probability=layout.resection_probability)
        for modality, image in case.images.items():
            volume = read_volume(image.path, image.channel)
            assert volume.grid.orientation == layout.orientation
            assert volume.grid.spacing_mm == (1.0, 1.0, 1.0)
            assert volume.array.dtype == np.int16
            in_ras = reorientation_to(volume.grid, "RAS").apply(volume.array)
            assert np.array_equal(in_ras, expected.images[modality])
        assert case.label is not None
        labels, grid = read_labels(case.label.path)
        in_ras = reorientation_to(grid, "RAS").apply(labels)
        assert np.array_equal(in_ras, translate(expected.labels, PHANTOM_SCHEME, SCHEMES[layout.scheme]))


def test_only_brats2024_has_resection_cavities(tmp_path: Path) -> None:
    has_cavity = {}
    for convention in ("brats2023", "brats2024"):
        written = write_phantoms(tmp_path / convention, range(1, 6), convention=convention, size=24)
        has_cavity[convention] = any((read_labels(case.label)[0] == RC).any() for case in written)
    assert has_cavity == {"brats2023": False, "brats2024": True}


def test_brats_affine_is_that_of_the_challenge(tmp_path: Path) -> None:
    written = write_phantoms(tmp_path / "data", [1], convention="brats2021", size=SIZE)
    image = nib.load(written[0].images["t1n"])
    assert np.array_equal(image.affine, [[-1, 0, 0, 0], [0, -1, 0, SIZE - 1], [0, 0, 1, 0], [0, 0, 0, 1]])


@pytest.mark.parametrize(
    ("convention", "number", "expected"),
    [
        ("brats2018", 1, "HGG/Brats18_PHANTOM_001_1/Brats18_PHANTOM_001_1_seg.nii.gz"),
        ("brats2018", 7, "LGG/Brats18_PHANTOM_007_1/Brats18_PHANTOM_007_1_seg.nii.gz"),
        ("brats2020", 1, "BraTS20_Training_001/BraTS20_Training_001_seg.nii"),
        ("brats2020", 355, "BraTS20_Training_355/W39_1998.09.19_Segm.nii"),
        ("brats2021", 1, "BraTS2021_00001/BraTS2021_00001_seg.nii.gz"),
        ("brats2023", 1, "BraTS-GLI-00001-000/BraTS-GLI-00001-000-seg.nii.gz"),
        ("brats2024", 1, "BraTS-GLI-00001-100/BraTS-GLI-00001-100-seg.nii.gz"),
        ("msd", 1, "labelsTr/BRATS_001.nii.gz"),
        ("nnunet", 1, "labelsTr/PHANTOM_001.nii.gz"),
        ("bids", 1, "derivatives/reference/sub-0001/anat/sub-0001_dseg.nii.gz"),
    ],
)
def test_names_are_those_of_the_data_set(convention: str, number: int, expected: str, tmp_path: Path) -> None:
    write_phantoms(tmp_path, [number], convention=convention, size=24)
    assert (tmp_path / expected).is_file()


def test_the_decathlon_stacks_its_channels_in_its_own_order(tmp_path: Path) -> None:
    write_phantoms(tmp_path, [1], convention="msd", size=24)
    stacked = np.asarray(nib.load(tmp_path / "imagesTr" / "BRATS_001.nii.gz").dataobj)
    phantom = make_phantom(1, size=24)
    for channel, modality in enumerate(("t2f", "t1n", "t1c", "t2w")):  # FLAIR, T1w, T1gd, T2w
        assert np.array_equal(stacked[..., channel], phantom.images[modality])
    document = json.loads((tmp_path / "dataset.json").read_text())
    assert document["training"] == [{"image": "./imagesTr/BRATS_001.nii.gz", "label": "./labelsTr/BRATS_001.nii.gz"}]


@pytest.mark.parametrize("convention", PHANTOM_LAYOUTS)
def test_planted_problems_are_there(convention: str, tmp_path: Path) -> None:
    written, problems = write_phantoms_with_problems(tmp_path, range(1, 6), convention=convention, size=24)
    bare, flipped, truncated, stray = (problem.where for problem in problems)
    assert len({next(c.case for c in written if c.case in where) for where in (bare, flipped, truncated, stray)}) == 4
    spoilt = next(case for case in written if case.case == bare)
    if convention == "msd":
        assert nib.load(spoilt.images["t2f"]).shape == (24, 24, 19, 3)
    else:
        assert sorted(spoilt.images) == ["t1n", "t2f", "t2w"]
        assert not [
            path for path in spoilt.images["t1n"].parent.iterdir() if spoilt.case in path.name and "ce" in path.name
        ]
    owner = next(case for case in written if str(case.images["t2w"]) == flipped)
    assert nib.load(flipped).affine[0] @ nib.load(owner.label).affine[0] == pytest.approx(
        -(np.linalg.norm(nib.load(owner.label).affine[0]) ** 2)
    )
    with pytest.raises((DataError, EOFError, OSError, gzip.BadGzipFile), match=r"."):
        read_volume(Path(truncated), 0 if convention == "msd" else None)
    assert STRAY_VALUE in read_labels(Path(stray))[0]


@pytest.mark.parametrize("convention", ["brats2021", "nnunet", "bids"])
def test_check_finds_every_planted_problem(convention: str, tmp_path: Path) -> None:
    written, problems = write_phantoms_with_problems(tmp_path, range(1, 7), convention=convention, size=24)
    spoilt = {next(case.case for case in written if case.case in problem.where) for problem in problems}
    reports = check_cohort(find_cases(tmp_path))
    assert {report.case for report in reports if any(problem.is_fatal for problem in report.problems)} == spoilt


def test_wrong_requests_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"convention 'brats1999' is not known; expected one of brats2018"):
        write_phantoms(tmp_path / "new", [1], convention="brats1999")
    with pytest.raises(RequestError, match="3 cases cannot hold four problems"):
        write_phantoms_with_problems(tmp_path / "new", [1, 2, 3])
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(RequestError, match=r"this folder is not empty. Name a new or an empty folder"):
        write_phantoms(tmp_path, [1])
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_phantoms_need_no_torch() -> None:
    code = "import sys, segkit.phantoms.layouts; sys.exit('torch' in sys.modules or 'monai' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
