from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from segkit.errors import DataError
from segkit.reading.files import read_volume
from segkit.reading.layouts.layout import bare_name, list_images, read_document
from segkit.reading.layouts.table import find_cases


def _touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    return path


def test_kinds_of_files_and_hidden_ones(tmp_path: Path) -> None:
    for name in ("b/x.nii.gz", "b/._x.nii.gz", "a y/ü.mha", "p.PNG", "notes.txt", "__MACOSX/x.nii.gz"):
        _touch(tmp_path / name)
    listing = list_images(tmp_path)
    assert listing.volumes == (tmp_path / "a y" / "ü.mha", tmp_path / "b" / "x.nii.gz")
    assert listing.pictures == (tmp_path / "p.PNG",)
    assert listing.others == (tmp_path / "notes.txt",)
    assert listing.problems == ()


def test_links_in_a_circle_are_named_and_left(tmp_path: Path) -> None:
    _touch(tmp_path / "a" / "x.nii.gz")
    (tmp_path / "a" / "back").symlink_to(tmp_path)
    (tmp_path / "self").symlink_to(tmp_path / "self")
    (tmp_path / "gone.nii.gz").symlink_to(tmp_path / "nowhere.nii.gz")
    listing = list_images(tmp_path)
    assert listing.volumes == (tmp_path / "a" / "x.nii.gz",)
    assert {(Path(problem.where).name, problem.found) for problem in listing.problems} == {
        ("back", "is a link to a folder that contains it"),
        ("gone.nii.gz", "is a link to a file that does not exist"),
    }
    assert [problem.left_out for problem in listing.problems if problem.left_out] == [(str(tmp_path / "gone.nii.gz"),)]


def test_a_link_to_a_folder_elsewhere_is_followed(tmp_path: Path) -> None:
    _touch(tmp_path / "store" / "x.nii.gz")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "case").symlink_to(tmp_path / "store")
    assert list_images(tmp_path / "data").volumes == (tmp_path / "data" / "case" / "x.nii.gz",)


def test_a_dicom_series_is_one_volume(tmp_path: Path) -> None:
    for number in range(3):
        _touch(tmp_path / "series.one" / f"{number}.dcm")
    bare = _touch(tmp_path / "other" / "IM0001")
    bare.write_bytes(bytes(128) + b"DICM")
    assert list_images(tmp_path).volumes == (tmp_path / "other", tmp_path / "series.one")
    assert bare_name(tmp_path / "series.one") == "series.one"


def _slice(path: Path) -> None:
    _touch(path).write_bytes(bytes(128) + b"DICM")


def test_the_index_and_the_programs_of_a_dicom_disc_are_no_images(tmp_path: Path) -> None:
    _slice(tmp_path / "DICOMDIR")
    _touch(tmp_path / "pat7" / "T1" / "AUTORUN")
    for number in range(3):
        _slice(tmp_path / "pat7" / "T1" / f"IM{number:04d}")
    assert list_images(tmp_path).volumes == (tmp_path / "pat7" / "T1",)


def test_multi_frame_files_are_volumes_of_their_own(tmp_path: Path) -> None:
    import numpy as np
    import SimpleITK

    for name, frames in (("p1/T1.dcm", 6), ("p1/FLAIR.dcm", 6), ("p2/one.dcm", 6), ("p3/1.dcm", 1), ("p3/2.dcm", 1)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        image = SimpleITK.GetImageFromArray(np.zeros((frames, 3, 4), np.uint8))
        SimpleITK.WriteImage(image, str(tmp_path / name))
    volumes = [path.relative_to(tmp_path).as_posix() for path in list_images(tmp_path).volumes]
    assert volumes == ["p1/FLAIR.dcm", "p1/T1.dcm", "p2", "p3"]
    bare = (tmp_path / "p2" / "one.dcm").rename(tmp_path / "p2" / "IM0001")
    assert list_images(tmp_path / "p2").volumes == (tmp_path / "p2",)
    assert (list_images(bare).volumes, list_images(bare).only) == ((bare,), bare)


def test_an_excluded_folder_is_not_read_by_whatever_path(tmp_path: Path) -> None:
    kept = _touch(tmp_path / "x.nii.gz")
    _touch(tmp_path / "out" / "deep" / "x.nii.gz")
    (tmp_path / "link").symlink_to(tmp_path / "out")
    for exclude in (tmp_path / "out", tmp_path / "link", tmp_path / "out" / "deep" / ".."):
        assert list_images(tmp_path, exclude).volumes == (kept,)
    assert len(list_images(tmp_path, tmp_path / "missing").volumes) == 3
    assert len(list_images(tmp_path / "out", tmp_path / "out").volumes) == 1


def test_a_single_file_and_nothing(tmp_path: Path) -> None:
    path = _touch(tmp_path / "x.nii.gz")
    _touch(tmp_path / "y.nii.gz")
    listing = list_images(path)
    assert (listing.volumes, listing.only) == ((path,), path)
    with pytest.raises(DataError, match="no such file or folder"):
        list_images(tmp_path / "missing")


def test_read_document(tmp_path: Path) -> None:
    path = tmp_path / "dataset.json"
    path.write_text('\ufeff{"labels": {}}', encoding="utf-8")
    assert read_document(path) == {"labels": {}}
    path.write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match="not readable JSON"):
        read_document(path)
    path.write_text("[]", encoding="utf-8")
    with pytest.raises(DataError, match="holds a list"):
        read_document(path)


@pytest.mark.parametrize("kind", [nib.Nifti1Pair, nib.AnalyzeImage])
def test_pairs_of_hdr_and_img_are_named_and_count(tmp_path: Path, kind: Any) -> None:
    array = np.arange(64, dtype=np.int16).reshape(4, 4, 4)
    kind(array, np.eye(4)).to_filename(tmp_path / "scan 2.img")
    (tmp_path / "notes.hdr").write_text("no image")
    with pytest.raises(DataError, match=r"nib-convert"):
        find_cases(tmp_path)
    with pytest.raises(DataError, match=r"kind '\.img' cannot be read.*nib-convert"):
        read_volume(tmp_path / "scan 2.img")
    nib.Nifti1Image(array, np.eye(4)).to_filename(tmp_path / "scan 1.nii")
    cohort = find_cases(tmp_path)
    (problem,) = cohort.problems
    assert problem.found == "1 file left out, images in formats that are not read: scan 2.img"
    assert problem.left_out == (str(tmp_path / "scan 2.img"),)
    arguments = [str(tmp_path / name) for name in ("scan 2.img", "scan 2.nii.gz")]
    subprocess.run([Path(sys.executable).with_name("nib-convert"), *arguments], check=True)  # the remedy
    assert np.array_equal(read_volume(tmp_path / "scan 2.nii.gz").array, array)


@pytest.mark.parametrize(
    ("names", "left_out"),
    [
        (("a.nii", "p2.HDR", "p2.IMG"), ["p2.IMG"]),
        (("a.nii", "p2.hdr.gz", "p2.img.gz", "p3.img"), ["p2.img.gz"]),
        (
            ("a.nii", "p2.mnc", "p3.nhdr", "p3.raw", "p4.nii.bz2", "p5.par", "p5.rec"),
            ["p2.mnc", "p3.nhdr", "p4.nii.bz2", "p5.rec"],
        ),
        (("a.nii", "preview.webp", "notes.txt", "mesh.vtk"), []),
        (("a.png", "b.webp", "c.HEIC"), ["b.webp", "c.HEIC"]),
    ],
)
def test_images_in_formats_that_are_not_read_count(tmp_path: Path, names: tuple[str, ...], left_out: list[str]) -> None:
    for name in names:
        (tmp_path / name).touch()
    assert [Path(path).name for problem in list_images(tmp_path).problems for path in problem.left_out] == left_out
