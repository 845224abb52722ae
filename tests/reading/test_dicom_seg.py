"""DICOM SEG: every voxel of the mask at the patient position, in mm, that segkit's own affine gives it."""

from __future__ import annotations

import builtins
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from segkit.errors import DataError, RequestError
from segkit.labels import SCHEMES
from segkit.reading.case import Case, ImageFile
from segkit.reading.dicom import frames_of
from segkit.reading.dicom_seg import is_dicom_source, write_dicom_seg
from segkit.reading.files import read_grid, read_volume
from segkit.reading.itk import LPS_TO_RAS
from segkit.reading.volume import Grid

pydicom = pytest.importorskip("pydicom")
pytest.importorskip("highdicom")

SHAPE = (5, 4, 6)
"""Columns, rows and slices of the generated series: no two alike, so that no exchange of axes goes unseen."""
SPACING_MM = (0.5, 2.0, 3.0)
SEGMENTS = SCHEMES["brats2017"].values  # NCR 1, ED 2, ET 4
MR, ENHANCED_MR = "1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.5.1.4.1.1.4.1"


def turned(degrees: float, axis: Sequence[float]) -> NDArray[np.float64]:
    """Rotation matrix (3, 3) about an axis, by Rodrigues' formula."""
    x, y, z = np.asarray(axis, float) / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    angle = np.deg2rad(degrees)
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


AXIAL = np.eye(3)
SAGITTAL = np.array([[0, 0, 1], [1, 0, 0], [0, -1, 0]], float)  # columns to P, rows to I; slices from R to L
OBLIQUE = turned(25, (1, 2, 3))
TILTED = np.column_stack([AXIAL[:, 0], AXIAL[:, 1], [0, 0.3, 1]])


def base(number: int, sop_class: str) -> Any:
    document = pydicom.Dataset()
    document.file_meta = pydicom.dataset.FileMetaDataset()
    document.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    document.SpecificCharacterSet = "ISO_IR 100"
    document.SOPClassUID, document.SOPInstanceUID = sop_class, f"1.2.3.4.{number + 1}"
    document.StudyInstanceUID, document.SeriesInstanceUID, document.FrameOfReferenceUID = "1.2.3", "1.2.3.4", "1.2.9"
    document.Modality, document.SeriesNumber, document.InstanceNumber = "MR", 7, number + 1
    document.PatientName, document.PatientID = "Müller^Jörg", "P 17"
    document.PatientBirthDate, document.PatientSex = "19600229", "M"
    document.StudyID, document.StudyDate, document.StudyTime, document.AccessionNumber = (
        "S1",
        "20240105",
        "101500",
        "A9",
    )
    document.Columns, document.Rows = SHAPE[:2]
    document.SamplesPerPixel, document.PhotometricInterpretation = 1, "MONOCHROME2"
    document.BitsAllocated = document.BitsStored = 16
    document.HighBit, document.PixelRepresentation = 15, 0
    return document


def position(axes: NDArray[np.float64], slice_index: int) -> list[float]:
    return [round(float(value), 6) for value in np.array([-11.0, 23.0, 5.0]) + axes[:, 2] * SPACING_MM[2] * slice_index]


def orientation(axes: NDArray[np.float64]) -> list[float]:
    return [round(float(value), 6) for value in (*axes[:, 0], *axes[:, 1])]


def write_series(folder: Path, axes: NDArray[np.float64] = AXIAL, order: Sequence[int] = range(6)) -> Path:
    """One file a slice; `order[i]` is the place along the stack of the slice in the i-th file."""
    folder.mkdir(parents=True)
    for number, slice_index in enumerate(order):
        document = base(number, MR)
        document.ImagePositionPatient, document.ImageOrientationPatient = position(axes, slice_index), orientation(axes)
        document.PixelSpacing, document.SliceThickness = [SPACING_MM[1], SPACING_MM[0]], 2.5
        document.SpacingBetweenSlices = 99  # scanners get it wrong; positions are what counts
        document.PixelData = np.full((SHAPE[1], SHAPE[0]), slice_index, np.uint16).tobytes()
        document.save_as(folder / f"{number}.dcm", enforce_file_format=True)
    return folder


def write_enhanced(path: Path, axes: NDArray[np.float64], order: Sequence[int], *, is_shared: bool) -> Path:
    """One file with all slices; orientation and measures said once, or of each frame."""
    document = base(0, ENHANCED_MR)
    document.ImageType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    document.NumberOfFrames = len(order)
    plane, measures = pydicom.Dataset(), pydicom.Dataset()
    plane.ImageOrientationPatient = orientation(axes)
    measures.PixelSpacing, measures.SliceThickness = [SPACING_MM[1], SPACING_MM[0]], 2.5
    shared, frames = pydicom.Dataset(), []
    for slice_index in order:
        place, frame = pydicom.Dataset(), pydicom.Dataset()
        place.ImagePositionPatient = position(axes, slice_index)
        frame.PlanePositionSequence = [place]
        frames.append(frame)
    for group in [shared] if is_shared else frames:
        group.PlaneOrientationSequence, group.PixelMeasuresSequence = [plane], [measures]
    document.SharedFunctionalGroupsSequence, document.PerFrameFunctionalGroupsSequence = [shared], frames
    document.PixelData = b"".join(np.full((SHAPE[1], SHAPE[0]), i, np.uint16).tobytes() for i in order)
    document.save_as(path, enforce_file_format=True)
    return path


def asymmetric(shape: tuple[int, ...] = SHAPE) -> NDArray[np.uint8]:
    """A mask that no flip and no exchange of axes leaves alone, with slices that are empty."""
    labels = np.zeros(shape, np.uint8)
    labels[0, 0, 0] = 1
    labels[1:4, 0, 1] = 2
    labels[2, 1:, 3] = 4
    labels[3, 2, 3] = 1
    return labels


def places_of_labels(labels: NDArray[np.uint8], grid: Grid) -> NDArray[np.float64]:
    """(value, x, y, z) of each labelled voxel in RAS mm, sorted."""
    indices = np.argwhere(labels)
    places = indices @ grid.affine[:3, :3].T + grid.affine[:3, 3]
    return in_order(np.column_stack([labels[tuple(indices.T)], places]))


def places_of_seg(path: Path, values: Sequence[int]) -> NDArray[np.float64]:
    """The same of a SEG, by the equation of DICOM PS3.3 C.7.6.2.1.1 and pydicom alone."""
    document = pydicom.dcmread(path)
    shared = document.SharedFunctionalGroupsSequence[0]
    across, down = np.reshape(np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, float), (2, 3))
    between_rows, between_columns = map(float, shared.PixelMeasuresSequence[0].PixelSpacing)
    found = []
    for frame, pixels in zip(document.PerFrameFunctionalGroupsSequence, document.pixel_array, strict=True):
        value = values[int(frame.SegmentIdentificationSequence[0].ReferencedSegmentNumber) - 1]
        corner = np.array(frame.PlanePositionSequence[0].ImagePositionPatient, float)
        for row, column in np.argwhere(pixels):
            place = corner + across * between_columns * column + down * between_rows * row
            found.append([value, *(LPS_TO_RAS[:3, :3] @ place)])
    return in_order(np.array(found))


def in_order(places: NDArray[np.float64]) -> NDArray[np.float64]:
    return places[np.lexsort(np.round(places, 2).T)]


SERIES = {
    "axial": (AXIAL, range(6)),
    "files in reverse": (AXIAL, range(5, -1, -1)),
    "files in any order, oblique": (OBLIQUE, (3, 0, 5, 1, 4, 2)),
    "sagittal": (SAGITTAL, range(6)),
    "numbered against its normal": (AXIAL * [1, -1, 1], range(6)),
    "tilted gantry": (TILTED, range(6)),
}


@pytest.mark.parametrize("name", SERIES)
def test_every_voxel_lies_where_the_affine_puts_it(tmp_path: Path, name: str) -> None:
    import highdicom

    axes, order = SERIES[name]
    series = write_series(tmp_path / "s", axes, order)
    grid, labels = read_grid(series), asymmetric()
    write_dicom_seg(tmp_path / "mask.dcm", labels, series, SEGMENTS)
    places = places_of_seg(tmp_path / "mask.dcm", [1, 2, 4])
    assert len(places) == 8
    np.testing.assert_allclose(places, places_of_labels(labels, grid), atol=1e-4)
    if name != "tilted gantry":  # a sheared stack is no volume to highdicom
        volume = highdicom.seg.segread(tmp_path / "mask.dcm").get_volume(combine_segments=True)
        read = np.array([0, 1, 2, 4], np.uint8)[volume.array.astype(int)]
        as_grid = Grid(read.shape, LPS_TO_RAS @ volume.affine)
        np.testing.assert_allclose(places_of_labels(read, as_grid), places, atol=1e-4)


@pytest.mark.parametrize("is_shared", [True, False])
def test_frames_of_an_enhanced_file(tmp_path: Path, is_shared: bool) -> None:
    order = (3, 0, 5, 1, 4, 2)
    source = write_enhanced(tmp_path / "e.dcm", OBLIQUE, order, is_shared=is_shared)
    volume = read_volume(source)
    assert volume.array[0, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert [frame.number for frame in frames_of(source)] == [1, 3, 5, 0, 4, 2]
    write_dicom_seg(tmp_path / "mask.dcm", asymmetric(), source, SEGMENTS)
    places = places_of_seg(tmp_path / "mask.dcm", [1, 2, 4])
    np.testing.assert_allclose(places, places_of_labels(asymmetric(), volume.grid), atol=1e-4)
    frame = pydicom.dcmread(tmp_path / "mask.dcm").PerFrameFunctionalGroupsSequence[-1]  # ET in slice 3
    reference = frame.DerivationImageSequence[0].SourceImageSequence[0]
    assert (reference.ReferencedSOPInstanceUID, reference.ReferencedFrameNumber) == ("1.2.3.4.1", 1)


@pytest.mark.parametrize("name", ["siemens/anatomical", "generic/compressed_j2k", "philips_enhanced/anatomical"])
def test_real_series(real_data: Path, tmp_path: Path, name: str) -> None:
    series = real_data / "dicom_headers" / name / "001"
    grid = read_grid(series)
    labels = asymmetric(grid.shape)
    labels[40:, 50:53, 2] = 2
    write_dicom_seg(tmp_path / "mask.dcm", labels, series, SEGMENTS)
    places = places_of_seg(tmp_path / "mask.dcm", [1, 2, 4])
    np.testing.assert_allclose(places, places_of_labels(labels, grid), atol=1e-3)


def test_what_a_seg_says(tmp_path: Path) -> None:
    series = write_series(tmp_path / "s", order=range(5, -1, -1))
    names = {"ET": 4, "Ödem": 2, "NCR": 1, "RC": 3}
    write_dicom_seg(tmp_path / "mask.dcm", asymmetric(), series, names, model="ab12", keeps_patient=True)
    mask = pydicom.dcmread(tmp_path / "mask.dcm")
    source = pydicom.dcmread(series / "0.dcm")
    for name in ("PatientID", "PatientBirthDate", "PatientSex", "StudyInstanceUID", "StudyID", "StudyDate"):
        assert mask[name].value == source[name].value
    assert (str(mask.PatientName), mask.AccessionNumber) == ("Müller^Jörg", "A9")
    assert (mask.FrameOfReferenceUID, mask.SeriesNumber, mask.Modality) == ("1.2.9", 1007, "SEG")
    assert mask.SeriesInstanceUID != source.SeriesInstanceUID
    assert mask.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SpacingBetweenSlices == 3
    segments = [
        (one.SegmentNumber, one.SegmentLabel, one.SegmentDescription, one.SegmentAlgorithmType)
        for one in mask.SegmentSequence
    ]
    assert segments == [
        (1, "NCR", "label value 1", "AUTOMATIC"),
        (2, "Ödem", "label value 2", "AUTOMATIC"),
        (3, "RC", "label value 3", "AUTOMATIC"),
        (4, "ET", "label value 4", "AUTOMATIC"),
    ]
    types = [one.SegmentedPropertyTypeCodeSequence[0] for one in mask.SegmentSequence]
    assert [(one.CodeValue, one.CodingSchemeDesignator, one.CodeMeaning) for one in types] == [
        ("6574001", "SCT", "Necrosis"),
        ("85756007", "SCT", "Tissue"),
        ("49755003", "SCT", "Morphologically Abnormal Structure"),
        ("C113842", "NCIt", "Enhancing Lesion"),
    ]
    algorithm = mask.SegmentSequence[0].SegmentationAlgorithmIdentificationSequence[0]
    assert (algorithm.AlgorithmName, algorithm.AlgorithmParameters) == ("segkit", "model=ab12")
    slices = {one.SOPInstanceUID: one for one in map(pydicom.dcmread, series.iterdir())}
    assert mask.NumberOfFrames == 4  # NCR in two slices, the oedema and ET in one each
    for frame in mask.PerFrameFunctionalGroupsSequence:
        reference = frame.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        assert frame.PlanePositionSequence[0].ImagePositionPatient == slices[reference].ImagePositionPatient
    assert len(mask.ReferencedSeriesSequence[0].ReferencedInstanceSequence) == 6


def test_codes_are_those_of_the_standard() -> None:
    from pydicom.sr.codedict import codes

    from segkit.reading.dicom_seg import _ABNORMAL, _CODES, _TISSUE

    def listed(code: tuple[str, str, str], collection: Any) -> bool:
        return any(code[:2] == (one.value, one.scheme_designator) for one in collection.concepts.values())

    assert {name for name, code in _CODES.items() if not listed(code, codes.cid7159)} == {"rc"}
    assert listed(_ABNORMAL, codes.cid7150)
    assert listed(_TISSUE, codes.cid7150)
    assert {tissue.casefold() for scheme in SCHEMES.values() for tissue in scheme.values} <= set(_CODES)


def test_a_mask_without_foreground_has_all_its_frames(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    series = write_series(tmp_path / "s")
    write_dicom_seg(tmp_path / "mask.dcm", np.zeros(SHAPE, np.uint8), series, SEGMENTS)
    mask = pydicom.dcmread(tmp_path / "mask.dcm")
    assert (mask.NumberOfFrames, len(mask.SegmentSequence)) == (18, 3)
    assert not mask.pixel_array.any()
    assert not caplog.records


def test_a_stripped_series(tmp_path: Path) -> None:
    series = write_series(tmp_path / "s")
    names = ("FrameOfReferenceUID", "PatientSex", "AccessionNumber", "SliceThickness", "SpacingBetweenSlices")
    for path in series.iterdir():
        document = pydicom.dcmread(path)
        for name in names:
            del document[name]
        document.save_as(path)
    for name in ("one", "two"):
        write_dicom_seg(tmp_path / f"{name}.dcm", asymmetric(), series, SEGMENTS)
    one, two = (pydicom.dcmread(tmp_path / f"{name}.dcm") for name in ("one", "two"))
    assert one.FrameOfReferenceUID == two.FrameOfReferenceUID
    assert one.SOPInstanceUID != two.SOPInstanceUID
    assert (one.PatientSex, one.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SliceThickness) == ("", 3)
    np.testing.assert_allclose(
        places_of_seg(tmp_path / "one.dcm", [1, 2, 4]), places_of_labels(asymmetric(), read_grid(series)), atol=1e-4
    )


def test_slices_whose_orientation_was_rounded_differently(tmp_path: Path) -> None:
    series = write_series(tmp_path / "s", OBLIQUE)
    document = pydicom.dcmread(series / "3.dcm")
    document.ImageOrientationPatient = [value + 1e-6 for value in document.ImageOrientationPatient]
    document.save_as(series / "3.dcm")
    write_dicom_seg(tmp_path / "mask.dcm", asymmetric(), series, SEGMENTS)
    assert len(places_of_seg(tmp_path / "mask.dcm", [1, 2, 4])) == 8


def test_a_series_without_a_study_is_refused(tmp_path: Path) -> None:
    series = write_series(tmp_path / "s")
    document = pydicom.dcmread(series / "2.dcm")
    del document.StudyInstanceUID
    document.save_as(series / "2.dcm")
    with pytest.raises(DataError, match=r"2\.dcm: the DICOM file has no StudyInstanceUID"):
        write_dicom_seg(tmp_path / "mask.dcm", asymmetric(), series, SEGMENTS)
    assert not (tmp_path / "mask.dcm").exists()


def test_labels_that_do_not_fit(tmp_path: Path) -> None:
    series = write_series(tmp_path / "s")
    with pytest.raises(ValueError, match=r"shape \(4, 5, 6\) do not fit a series of shape \(5, 4, 6\)"):
        write_dicom_seg(tmp_path / "mask.dcm", np.zeros((4, 5, 6), np.uint8), series, SEGMENTS)
    with pytest.raises(ValueError, match=r"label values \[4\] are no segments; known are \[1, 2\]"):
        write_dicom_seg(tmp_path / "mask.dcm", asymmetric(), series, {"ED": 2, "NCR": 1})


def test_a_failure_leaves_the_file_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import highdicom

    series = write_series(tmp_path / "s")
    (tmp_path / "mask.dcm").write_bytes(b"before")

    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("no such mask")

    monkeypatch.setattr(highdicom.seg, "Segmentation", refuse)
    with pytest.raises(DataError, match="the file cannot be written: no such mask"):
        write_dicom_seg(tmp_path / "mask.dcm", asymmetric(), series, SEGMENTS)
    assert (tmp_path / "mask.dcm").read_bytes() == b"before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mask.dcm", "s"]


def test_without_highdicom_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def without_highdicom(name: str, *rest: Any, **named: Any) -> Any:
        if name == "highdicom":
            raise ImportError(name)
        return real_import(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without_highdicom)
    with pytest.raises(RequestError, match=r'pip install "segkit\[dicom\]"'):
        write_dicom_seg(tmp_path / "mask.dcm", asymmetric(), tmp_path, SEGMENTS)


def test_where_images_come_from(tmp_path: Path) -> None:
    series = write_series(tmp_path / "s")
    (tmp_path / "scan.nii").write_bytes(b"")
    (tmp_path / "IM1").write_bytes((series / "0.dcm").read_bytes())
    (tmp_path / "empty").mkdir()
    assert [is_dicom_source(tmp_path / name) for name in ("s", "s/0.dcm", "IM1")] == [True] * 3
    assert [is_dicom_source(tmp_path / name) for name in ("scan.nii", "empty", "none")] == [False] * 3
    dicom, nifti = ImageFile(series), ImageFile(tmp_path / "scan.nii")
    assert is_dicom_source(Case("a", "a", {"t1n": dicom, "t1c": dicom}))
    assert not is_dicom_source(Case("a", "a", {"t1n": dicom, "t1c": nifti}))
    assert not is_dicom_source(Case("a", "a", {}))
