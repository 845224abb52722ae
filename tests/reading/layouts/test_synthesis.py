from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from segkit.errors import DataError
from segkit.reading.layouts.brats import HOLE_SCHEME, SYNTHESIS_LAYOUT, find_known, find_voided
from segkit.reading.layouts.table import LAYOUTS, find_cases

Write = Callable[..., Path]

CASE = "BraTS-GLI-00001-000"
TRAINING = ("t1n", "t1n-voided", "mask", "mask-healthy", "mask-unhealthy")


def _write(volume: Write, *suffixes: str, case: str = CASE) -> None:
    for suffix in suffixes:
        volume(f"{case}/{case}-{suffix}.nii.gz")


def _names(path: Path, find: Callable[[Path], object]) -> list[tuple[str, str | None]]:
    cohort = find(path)
    return [  # image and hole of each case, without the name of the case
        (
            case.images["t1n"].path.name.removeprefix(case.id).removesuffix(".nii.gz"),
            case.label.path.name.removeprefix(case.id).removesuffix(".nii.gz") if case.label else None,
        )
        for case in cohort.cases  # type: ignore[attr-defined]
    ]


def test_training_folder(volume: Write, tmp_path: Path) -> None:
    _write(volume, *TRAINING)
    _write(volume, *TRAINING, case="BraTS-GLI-00002-001")
    voided, known = find_voided(tmp_path), find_known(tmp_path)
    assert _names(tmp_path, find_voided) == [("-t1n-voided", "-mask")] * 2
    assert _names(tmp_path, find_known) == [("-t1n", "-mask-unhealthy")] * 2
    for cohort in (voided, known):
        assert (cohort.layout, cohort.scheme, cohort.modalities) == (SYNTHESIS_LAYOUT, HOLE_SCHEME, ("t1n",))
        assert [case.patient for case in cohort.cases] == ["BraTS-GLI-00001", "BraTS-GLI-00002"]
        assert [case.scheme for case in cohort.cases] == [HOLE_SCHEME] * 2
        assert not cohort.problems
    assert SYNTHESIS_LAYOUT in LAYOUTS
    assert find_cases(tmp_path).layout == SYNTHESIS_LAYOUT


def test_test_time_folder(volume: Write, tmp_path: Path) -> None:
    _write(volume, "t1n-voided", "mask")
    assert _names(tmp_path, find_voided) == [("-t1n-voided", "-mask")]
    assert _names(tmp_path, find_known) == [("-t1n-voided", "-mask")]
    assert _names(tmp_path / CASE, find_voided) == [("-t1n-voided", "-mask")]


@pytest.mark.parametrize(
    ("suffixes", "expected"),
    [
        (("t1n", "mask"), ("-t1n", "-mask")),
        (("t1n", "t1n-voided", "mask"), ("-t1n", "-mask")),
        (("t1n-voided", "mask", "mask-unhealthy"), ("-t1n-voided", "-mask")),  # the healthy hole is voided, too
        (("t1n", "mask-unhealthy"), ("-t1n", "-mask-unhealthy")),
    ],
)
def test_what_is_known_depends_on_what_is_there(
    suffixes: tuple[str, ...], expected: tuple[str, str], volume: Write, tmp_path: Path
) -> None:
    _write(volume, *suffixes)
    assert _names(tmp_path, find_known) == [expected]


def test_one_file(volume: Write, tmp_path: Path) -> None:
    for case in ("a", "b"):
        for suffix in ("t1n-voided", "mask"):
            volume(f"{case}-{suffix}.nii.gz")  # two cases in one folder, named anyhow
    assert [case.id for case in find_voided(tmp_path).cases] == ["a", "b"]
    path = tmp_path / "b-t1n-voided.nii.gz"
    cohort = find_voided(path)
    (case,) = cohort.cases
    assert cohort.root == path
    assert case.id == "b"
    assert case.images["t1n"].path == path
    assert case.label is not None
    assert case.label.path == tmp_path / "b-mask.nii.gz"
    with pytest.raises(DataError, match=r"b-mask.nii.gz: this is not the scan of a case .* Give the holes of other"):
        find_voided(tmp_path / "b-mask.nii.gz")


def test_a_case_without_a_mask_says_so(volume: Write, tmp_path: Path) -> None:
    _write(volume, "t1n-voided")
    _write(volume, "t1n-voided", "mask", case="BraTS-GLI-00002-000")
    bare, whole = find_voided(tmp_path).cases
    assert [(problem.found, problem.is_fatal) for problem in bare.problems] == [(f"case {CASE} has no mask", True)]
    assert bare.problems[0].remedy == f"Add {CASE}-mask.nii.gz, 1 in the hole"
    assert not whole.problems


def test_masks_alone_are_left_out_and_results_are_not_read(volume: Write, tmp_path: Path) -> None:
    _write(volume, "t1n-voided", "mask")
    volume("other/BraTS-GLI-00009-000-mask.nii.gz")
    volume(f"out/{CASE}-t1n-voided.nii.gz")
    cohort = find_voided(tmp_path, exclude=tmp_path / "out")
    assert [case.id for case in cohort.cases] == [CASE]
    assert not cohort.cases[0].problems
    (problem,) = cohort.problems
    assert "1 file left out, references that belong to no image: BraTS-GLI-00009-000-mask.nii.gz" in problem.found


def test_a_folder_without_voided_scans_is_refused(volume: Write, tmp_path: Path) -> None:
    volume("patient1/t1.nii.gz")
    with pytest.raises(
        DataError, match=r"no voided scan is there; the folder holds 1 images; expected CASE-t1n-voided"
    ):
        find_voided(tmp_path)
    with pytest.raises(DataError, match="neither a whole nor a voided scan is there"):
        find_known(tmp_path)
    with pytest.raises(DataError, match="no such file or folder"):
        find_voided(tmp_path / "nowhere")


def test_real_case(shared_data: Path) -> None:
    root = shared_data / "brats2023_inpainting"
    assert _names(root, find_voided) == [("-t1n-voided", "-mask")]
    assert _names(root, find_known) == [("-t1n", "-mask")]
    assert _names(root / CASE / f"{CASE}-t1n-voided.nii.gz", find_voided) == [("-t1n-voided", "-mask")]
