"""What is said of a patient in the headers of the input is in nothing that segkit writes."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from fuzzing import seeds

from segkit.errors import DataError
from segkit.reading.files import read_grid, read_volume, rewrite_image, write_image, write_labels
from tests.helpers import run_segkit

SECRET = "Xq7Zmustermann"
"""Stands in every field of the input that takes free text; 14 letters fit into the shortest of them."""


def traces(folder: Path) -> list[Path]:
    """The files below a folder that hold the secret, packed or not, in any of the usual encodings."""
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and any(map(_tells, _contents(path)))]


def _contents(path: Path) -> Iterator[bytes]:
    data = path.read_bytes()
    yield data
    yield path.name.encode()
    for start in (place for place in range(len(data)) if data[place : place + 2] in (b"\x1f\x8b", b"\x78\x9c")):
        try:
            yield gzip.decompress(data) if data[start] == 0x1F else zlib.decompressobj().decompress(data[start:])
        except (OSError, EOFError, zlib.error):
            continue


def _tells(data: bytes) -> bool:
    return any(SECRET.encode(code) in data for code in ("ascii", "utf-16-le", "utf-16-be"))


def talkative_nifti(path: Path, version: int = 1) -> Path:
    image = (nib.Nifti1Image if version == 1 else nib.Nifti2Image)(
        np.arange(216, dtype=np.int16).reshape(6, 6, 6), np.diag([-1.0, -1.0, 1.0, 1.0])
    )
    texts = [name for name in image.header if image.header[name].dtype.kind == "S" and name not in ("magic", "regular")]
    assert len(texts) >= 4
    for name in texts:
        image.header[name] = SECRET.encode()
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", f"patient {SECRET}".encode()))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.to_filename(path)
    return path


def talkative_itk(path: Path) -> Path:
    import SimpleITK

    path.parent.mkdir(parents=True, exist_ok=True)
    image = SimpleITK.GetImageFromArray(np.arange(216, dtype=np.int16).reshape(6, 6, 6))
    image.SetMetaData("Name", SECRET)
    image.SetMetaData("0010|0010", SECRET)
    SimpleITK.WriteImage(image, str(path))
    return path


def talkative_series(folder: Path) -> Path:
    """Slices with the secret in every element of free text that DICOM has for patient, study, series and device."""
    import pydicom
    from pydicom.datadict import DicomDictionary

    folder.mkdir(parents=True)
    texts = [
        (tag, kind)
        for tag, (kind, multiplicity, _, is_retired, _) in DicomDictionary.items()
        if kind in ("PN", "LO", "SH", "ST", "LT", "UT") and multiplicity in ("1", "1-n") and not is_retired
    ]
    for number in range(5):
        path = folder / f"{number}.dcm"
        path.write_bytes(seeds.dicom_slice(number))
        document = pydicom.dcmread(path)
        for tag, kind in texts:
            if tag >> 16 in (0x0008, 0x0010, 0x0012, 0x0018, 0x0020, 0x0032, 0x0038, 0x0040):
                document.add_new(tag, kind, SECRET)
        document.PatientBirthDate = "19010203"
        document.PatientSex = "M"
        document.PixelData = bytes([number + 1] * len(document.PixelData))  # an image of one value is not segmented
        document.save_as(path)
    return folder


SOURCES: dict[str, Callable[[Path], Path]] = {
    "nifti-1": lambda folder: talkative_nifti(folder / "x.nii.gz"),
    "nifti-2": lambda folder: talkative_nifti(folder / "x.nii", 2),
    "nrrd": lambda folder: talkative_itk(folder / "x.nrrd"),
    "metaimage": lambda folder: talkative_itk(folder / "x.mha"),
    "dicom": lambda folder: talkative_series(folder / "x"),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_masks_and_changed_copies_do_not_tell(tmp_path: Path, kind: str) -> None:
    if kind == "dicom":
        pytest.importorskip("pydicom")
    source = SOURCES[kind](tmp_path / "in")
    assert traces(tmp_path / "in"), "the input itself tells"
    out = tmp_path / "out"
    volume = read_volume(source)
    where = np.zeros(volume.grid.shape, bool)
    where[1, 1, 1] = True
    for suffix in (".nii.gz", ".nrrd", ".mha"):
        write_labels(out / f"mask{suffix}", where.astype(np.uint8), volume.grid)
        write_image(out / f"map{suffix}", volume.array, volume.grid)
        rewrite_image(out / f"filled{suffix}", source, where, np.array([3.0]))
    assert len(list(out.iterdir())) == 9
    assert read_volume(out / "filled.nii.gz").array[1, 1, 1] == 3
    assert traces(out) == []


def test_a_dicom_seg_tells_only_when_it_is_asked(tmp_path: Path) -> None:
    pydicom = pytest.importorskip("pydicom")
    pytest.importorskip("highdicom")
    from segkit.reading.dicom_seg import write_dicom_seg

    series = talkative_series(tmp_path / "in")
    labels = np.ones(read_grid(series).shape, np.uint8)
    write_dicom_seg(tmp_path / "out" / "mask.dcm", labels, series, {"ET": 1})
    write_dicom_seg(tmp_path / "kept" / "mask.dcm", labels, series, {"ET": 1}, keeps_patient=True)
    assert traces(tmp_path / "out") == []
    mask, kept = (pydicom.dcmread(tmp_path / folder / "mask.dcm") for folder in ("out", "kept"))
    assert (mask.PatientName, mask.PatientID, mask.PatientBirthDate, mask.PatientSex) == ("", "", "", "")
    assert "PatientIdentityRemoved" not in mask
    assert (kept.PatientName, kept.PatientID, kept.PatientBirthDate) == (SECRET, SECRET, "19010203")
    for document in (mask, kept):
        assert (document.StudyInstanceUID, document.FrameOfReferenceUID) == ("1.2.3", "1.2.9")


def test_errors_do_not_tell(tmp_path: Path) -> None:
    pytest.importorskip("pydicom")
    series = talkative_series(tmp_path / "x")
    (series / "2.dcm").unlink()
    with pytest.raises(DataError, match="slices are missing") as caught:
        read_volume(series)
    assert SECRET not in str(caught.value)


def test_a_run_of_the_command_line_does_not_tell(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Masks, probabilities, manifest, scores and what is printed, of good scans and of one that cannot be used."""
    pytest.importorskip("highdicom")
    model = Path(__file__).resolve().parents[2] / "weights" / "hippocampus-revmbunet"
    for number in range(2):
        talkative_nifti(tmp_path / "in" / f"scan{number}.nii.gz")
    talkative_itk(tmp_path / "in" / "other.nrrd")
    (tmp_path / "in" / "broken.nii.gz").write_bytes(talkative_nifti(tmp_path / "b.nii").read_bytes()[:600])
    talkative_series(tmp_path / "series" / "mr")
    for source in ("in", "series"):
        arguments = ["-i", tmp_path / source, "-o", tmp_path / "out" / source, "-d", "cpu", "-v", "--json"]
        run_segkit("infer", "-m", model, *arguments, "--backend", "torch", "--save-probabilities")
    masks = [str(path) for path in (tmp_path / "out").rglob("*.nii.gz")]
    assert len(masks) >= 4
    assert (tmp_path / "out" / "series" / "mr.dcm").is_file()
    run_segkit("evaluate", "-p", masks[0], "-r", masks[0], "-o", tmp_path / "out" / "scores")
    manifest = json.loads((tmp_path / "out" / "in" / "manifest.json").read_text())
    assert {case["status"] for case in manifest["cases"]} == {"done", "failed"}
    printed: Any = capfd.readouterr()
    assert SECRET not in printed.out + printed.err + caplog.text
    assert traces(tmp_path / "out") == []
