from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from segkit.data.layouts.table import find_cases


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
    assert any("Image_01L.gif" in problem.found for problem in cohort.problems)


def test_jpeg_masks_are_refused(tmp_path: Path) -> None:
    _picture(tmp_path / "images" / "a.png")
    _picture(tmp_path / "masks" / "a.jpg", values=(255, 0, 255))
    cohort = find_cases(tmp_path)
    assert cohort.scheme is None
    assert [(problem.is_fatal, problem.remedy) for problem in cohort.problems] == [(True, "Save them as PNG")]


def test_real_retina_pictures(shared_data: Path) -> None:
    cohort = find_cases(shared_data / "chase_db1")
    assert (cohort.layout, cohort.dims, cohort.modalities) == ("folder2d", 2, ("red", "green", "blue"))
    assert len(cohort.cases) == 20
    assert len({case.patient for case in cohort.cases}) == 10
    assert all(case.label is not None and case.label.path.stem.endswith("_1stHO") for case in cohort.cases)
    assert cohort.scheme is not None
    assert dict(cohort.scheme.values) == {"foreground": 1}
