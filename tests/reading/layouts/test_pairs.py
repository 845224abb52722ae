"""Which files belong together, by names and, where names do not say it, by contents."""

from __future__ import annotations

from pathlib import Path

import pytest

from segkit.reading.files import read_reference
from segkit.reading.layouts.pairs import identity, is_companion, matched_by_wildcards
from segkit.reading.layouts.table import find_cases
from tests.zoo.build import masks, scans


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("volume-0", "segmentation-0"), ("0",)),
        (("img0001", "label0001", "Mask_1"), ("1",)),
        (("CT_p3", "p3_gt", "p3_0000"), ("p", "3")),
        (("ISIC_0000012", "ISIC_0000012_segmentation"), ("isic", "12")),
        (("a_T1_seg", "a_image"), ("a",)),
        (("imaging", "seg", "ct"), ()),
    ],
)
def test_identity_is_what_images_and_references_share(names: tuple[str, ...], expected: tuple[str, ...]) -> None:
    assert {identity(name) for name in names} == {expected}


@pytest.mark.parametrize(
    ("pattern", "name", "rest"),
    [
        ("volume-*", "volume-12.nii.gz", "12"),
        ("*_ct", "p1_ct.nii", "p1"),
        ("*_ct.nii", "p1_ct.nii", "p1"),
        ("case?_t[12]", "case7_t2.nii", "7_2"),
        ("*", "p1.nii", "p1"),
        ("volume-*", "segmentation-12.nii.gz", None),
    ],
)
def test_a_case_is_named_by_what_wildcards_match(pattern: str, name: str, rest: str | None) -> None:
    assert matched_by_wildcards(name.split(".")[0], name, pattern) == rest


def test_patterns_of_image_and_reference_pair_what_they_match(tmp_path: Path) -> None:
    scans(tmp_path, "export-{7,8}-final.nii.gz")
    masks(tmp_path, "drawn-{7,8}.nii.gz")
    cohort = find_cases(tmp_path, modalities={"image": "export-*-final", "label": "drawn-*"})
    assert [(case.id, case.label and case.label.path.name) for case in cohort.cases] == [
        ("7", "drawn-7.nii.gz"),
        ("8", "drawn-8.nii.gz"),
    ]


def test_a_mask_is_a_companion_and_a_scan_is_none(tmp_path: Path) -> None:
    scans(tmp_path, "{anna,anna_2,anna_pred}.nii.gz")
    masks(tmp_path, "anna_corrected.nii.gz")
    anna = tmp_path / "anna.nii.gz"
    beside = ("anna_2", "anna_pred", "anna_corrected")
    assert [is_companion(tmp_path / f"{name}.nii.gz", anna) for name in beside] == [False, True, True]


def test_one_mask_per_class_is_painted_in_the_order_of_the_names(tmp_path: Path) -> None:
    scans(tmp_path, "s1/ct.nii.gz", "s2/ct.nii.gz")
    masks(tmp_path, "s{1,2}/segmentations/{spleen,liver}.nii.gz")
    masks(tmp_path, "s2/segmentations/aorta.nii.gz")
    cohort = find_cases(tmp_path)
    assert cohort.scheme is not None
    assert dict(cohort.scheme.values) == {"aorta": 1, "liver": 2, "spleen": 3}
    labels = [read_reference(case.label)[0] for case in cohort.cases if case.label]
    # All three are the same box of 4 x 4 x 4 voxels: the last one, spleen, paints over the others.
    assert [(int((own == 3).sum()), int(own.max()), int((own > 0).sum())) for own in labels] == [(64, 3, 64)] * 2


def test_a_visit_is_no_class(tmp_path: Path) -> None:
    scans(tmp_path, "{anna,berta}.nii.gz")
    masks(tmp_path, "{anna,berta}_seg.nii.gz", "anna_followup_seg.nii.gz")
    cohort = find_cases(tmp_path)
    assert [case.label and case.label.path.name for case in cohort.cases] == ["anna_seg.nii.gz", "berta_seg.nii.gz"]
    assert "anna_followup_seg.nii.gz" in cohort.problems[0].found
    assert cohort.scheme is not None
    assert dict(cohort.scheme.values) == {"label_1": 1}


def test_references_of_other_scans_only_are_an_error(tmp_path: Path) -> None:
    scans(tmp_path, "{anna,berta}.nii.gz")
    masks(tmp_path, "{carla,dora}_seg.nii.gz")
    (problem,) = find_cases(tmp_path).problems
    assert problem.is_fatal
    assert [Path(path).name for path in problem.left_out] == ["carla_seg.nii.gz", "dora_seg.nii.gz"]
