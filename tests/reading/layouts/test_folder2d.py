from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from segkit.preparing.splits import patient_folds
from segkit.reading.layouts.folder import join_both_eyes
from segkit.reading.layouts.table import find_cases


def _picture(path: Path, *, colour: bool = False, values: tuple[int, ...] = (7,)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.zeros((4, 5), np.uint8)
    array.reshape(-1)[: len(values)] = values
    if colour:
        array = np.stack([array, array + 1, array + 2], axis=-1)
    PIL.Image.fromarray(array).save(path)


def test_images_and_masks_folders(tmp_path: Path) -> None:
    for stem in ("a b", "ü"):
        _picture(tmp_path / "images" / f"{stem}.jpg")
        _picture(tmp_path / "masks" / f"{stem}.png", values=(255, 255))
    cohort = find_cases(tmp_path)
    assert (cohort.layout, cohort.dims, cohort.modalities) == ("folder2d", 2, ("grey",))
    assert [(case.id, case.label is not None) for case in cohort.cases] == [("a b", True), ("ü", True)]
    assert cohort.scheme is not None
    assert dict(cohort.scheme.values) == {"foreground": 255}


def test_masks_of_several_values(tmp_path: Path) -> None:
    _picture(tmp_path / "images" / "a.png", colour=True)
    _picture(tmp_path / "masks" / "a.png", values=(1, 2))
    cohort = find_cases(tmp_path)
    assert cohort.modalities == ("red", "green", "blue")
    assert [image.channel for image in cohort.cases[0].images.values()] == [0, 1, 2]
    assert cohort.scheme is not None
    assert dict(cohort.scheme.values) == {"label_1": 1, "label_2": 2}


@pytest.mark.parametrize("suffix", ["_1stHO", "_mask", "_vessels"])
def test_pairs_by_suffix(tmp_path: Path, suffix: str) -> None:
    for stem in ("Image_01L", "Image_01R", "Image_02L"):
        _picture(tmp_path / f"{stem}.jpg", colour=True)
        _picture(tmp_path / f"{stem}{suffix}.png", values=(1,))
        _picture(tmp_path / f"{stem}.gif", values=(1,))
    cohort = find_cases(tmp_path)
    assert [(case.id, case.patient) for case in cohort.cases] == [
        ("Image_01L", "Image_01"),
        ("Image_01R", "Image_01"),
        ("Image_02L", "Image_02L"),
    ]
    assert [case.label.path.name for case in cohort.cases if case.label] == [
        f"Image_01L{suffix}.png",
        f"Image_01R{suffix}.png",
        f"Image_02L{suffix}.png",
    ]
    (about_views,) = (problem for problem in cohort.problems if "Image_01L.gif" in problem.found)
    assert about_views.found.startswith("3 files left out, fields of view by their names")
    assert about_views.remedy == "`segkit evaluate --roi .gif` scores inside them"


def test_a_second_reader_and_fields_of_view_are_told_and_left_out(tmp_path: Path) -> None:
    for stem in ("Image_01L", "Image_01R"):
        _picture(tmp_path / f"{stem}.jpg", colour=True)
        _picture(tmp_path / f"{stem}_1stHO.png", values=(1,))
        _picture(tmp_path / f"{stem}_2ndHO.png", values=(0, 1))
        _picture(tmp_path / f"{stem}_fov.png", values=(1, 1))
        _picture(tmp_path / f"{stem}_prediction.png", values=(1, 1))
    cohort = find_cases(tmp_path)
    assert [case.label.path.stem for case in cohort.cases if case.label] == ["Image_01L_1stHO", "Image_01R_1stHO"]
    views, readers, others = cohort.problems
    assert views.found == "2 files left out, fields of view by their names: Image_01L_fov.png, Image_01R_fov.png"
    assert views.remedy == "`segkit evaluate --roi _fov.png` scores inside them"
    assert readers.found.startswith(
        "2 files left out, drawn by a second reader; the first is the reference: Image_01L_"
    )
    assert others.found.endswith("by their names: Image_01L_prediction.png, Image_01R_prediction.png")


def test_a_copy_in_another_format_is_no_field_of_view(tmp_path: Path) -> None:
    for suffix in ("png", "jpg"):
        _picture(tmp_path / f"a.{suffix}")
    _picture(tmp_path / "a_mask.png", values=(1,))
    (problem,) = find_cases(tmp_path).problems
    assert problem.found == "1 file left out, with the name of another image: a.jpg"


@pytest.mark.parametrize(
    ("case_ids", "patients"),
    [
        (("Image_01L", "Image_01R", "Image_02L"), ("Image_01", "Image_01", "Image_02L")),
        (("p7_OD", "p7_OS", "p8_OD"), ("p7", "p7", "p8_OD")),
        (("10_left", "10_right", "11_right"), ("10", "10", "11_right")),
        (("3L", "3-l"), ("3L", "3-l")),  # the same side twice
        (("control", "colour"), ("control", "colour")),  # no number before the letter
        (("4 OD", "4_os", "4R"), ("4", "4", "4")),
    ],
)
def test_both_eyes_are_one_patient(case_ids: tuple[str, ...], patients: tuple[str, ...]) -> None:
    assert tuple(join_both_eyes({case_id: case_id for case_id in case_ids}).values()) == patients


def test_jpeg_masks_are_refused(tmp_path: Path) -> None:
    _picture(tmp_path / "images" / "a.png")
    _picture(tmp_path / "masks" / "a.jpg", values=(255, 0, 255))
    cohort = find_cases(tmp_path)
    assert cohort.scheme is None
    assert [(problem.is_fatal, problem.remedy) for problem in cohort.problems] == [(True, "Save them as PNG")]


def test_real_retina_pictures(real_data: Path) -> None:
    cohort = find_cases(real_data / "chase_db1")
    assert (cohort.layout, cohort.dims, cohort.modalities) == ("folder2d", 2, ("red", "green", "blue"))
    assert len(cohort.cases) == 20
    assert len({case.patient for case in cohort.cases}) == 10
    assert all(len(ids) % 2 == 0 for ids in patient_folds(cohort.cases, 5, 0))
    assert all(case.label is not None and case.label.path.stem.endswith("_1stHO") for case in cohort.cases)
    assert sorted(problem.found.split(": ")[0] for problem in cohort.problems) == [
        "20 files left out, drawn by a second reader; the first is the reference",
        "20 files left out, fields of view by their names",
    ]
    assert cohort.scheme is not None
    assert dict(cohort.scheme.values) == {"foreground": 1}


def test_drawings_go_before_fields_of_view(tmp_path: Path) -> None:
    for number in (21, 22, 23):
        _picture(tmp_path / "training" / "images" / f"{number}_training.tif", colour=True)
        _picture(tmp_path / "training" / "mask" / f"{number}_training_mask.gif", values=(255, 255))
    for number in (21, 22):
        _picture(tmp_path / "training" / "1st_manual" / f"{number}_manual1.gif", values=(255,))
    _picture(tmp_path / "test" / "images" / "01_test.tif", colour=True)
    _picture(tmp_path / "test" / "mask" / "01_test_mask.gif", values=(255, 255))
    cohort = find_cases(tmp_path)
    assert [(case.id, case.label and case.label.path.name) for case in cohort.cases] == [
        ("21", "21_manual1.gif"),
        ("22", "22_manual1.gif"),
        ("23_training", None),
        ("test", None),
    ]
    losers, lonely = (problem.found for problem in cohort.problems)
    assert losers.startswith("4 files left out, as another folder beside theirs holds the references")
    assert "test/mask" in cohort.problems[0].remedy.replace("\\", "/")
    assert lonely.endswith("01_test.tif, 23_training.tif")


def test_manual1_goes_before_fields_of_view(tmp_path: Path) -> None:
    for stem in ("01_dr", "01_h"):
        _picture(tmp_path / "images" / f"{stem}.JPG", colour=True)
        _picture(tmp_path / "manual1" / f"{stem}.tif", values=(1,))
        _picture(tmp_path / "mask" / f"{stem}_mask.tif", values=(1, 1))
    cohort = find_cases(tmp_path)
    assert [(case.id, case.label and case.label.path.parent.name) for case in cohort.cases] == [
        ("01_dr", "manual1"),
        ("01_h", "manual1"),
    ]


def test_a_mask_folder_alone_holds_the_references(tmp_path: Path) -> None:
    for stem in ("a", "b"):
        _picture(tmp_path / "images" / f"{stem}.png")
        _picture(tmp_path / "mask" / f"{stem}.png", values=(1,))
    assert all(case.label is not None for case in find_cases(tmp_path).cases)


@pytest.mark.parametrize("mask", ["tumor_{}", "tumor_{}_mask"])
def test_images_named_like_references(tmp_path: Path, mask: str) -> None:
    for number in range(2):
        _picture(tmp_path / "images" / f"tumor_{number}.png")
        _picture(tmp_path / "masks" / f"{mask.format(number)}.png", values=(1,))
    cohort = find_cases(tmp_path)
    assert [(case.id, case.label is not None) for case in cohort.cases] == [("tumor_0", True), ("tumor_1", True)]


def test_references_beside_their_images_in_the_images_folder(tmp_path: Path) -> None:
    for stem in ("a", "b"):
        _picture(tmp_path / "images" / f"{stem}.png")
        _picture(tmp_path / "images" / f"{stem}_mask.png", values=(1,))
    cohort = find_cases(tmp_path)
    assert [(case.id, case.label and case.label.path.name) for case in cohort.cases] == [
        ("a", "a_mask.png"),
        ("b", "b_mask.png"),
    ]
