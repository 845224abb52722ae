"""Masks as DICOM Segmentation objects (SEG) that refer to their source series, through highdicom.

Every frame of the mask carries the position and UID of its source frame, independent of file names and order. Segments
are of type BINARY, which every viewer reads, and numbered 1, 2, 3 ... by increasing label value; the label value is in
each segment's description. A mask without foreground is written with all its frames, as DICOM requires at least one.
"""

import warnings
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from segkit.errors import DataError, RequestError
from segkit.reading.case import Case
from segkit.reading.dicom import Frame, frames_of, has_dicom_name, is_dicom_file
from segkit.reading.files import read_grid, written_atomically
from segkit.reading.volume import Grid, as_data_errors, list_folder
from segkit.shapes import AnyArray, LabelMap

_ABNORMAL = ("49755003", "SCT", "Morphologically Abnormal Structure")
_TISSUE = ("85756007", "SCT", "Tissue")
_LESION = ("52988006", "SCT", "Lesion")
_NEOPLASM = ("108369006", "SCT", "Neoplasm")

_CODES: dict[str, tuple[str, str, str]] = {
    "ncr": ("6574001", "SCT", "Necrosis"),
    "net": ("C81175", "NCIt", "Non-Enhancing Lesion"),
    "ed": ("79654002", "SCT", "Edema"),
    "et": ("C113842", "NCIt", "Enhancing Lesion"),
    "cc": ("367643001", "SCT", "Cyst"),
    "rc": _ABNORMAL,  # the lists of DICOM have no code for a resection cavity
    "gtv": _NEOPLASM,
    **dict.fromkeys(("lesion", "lesions"), _LESION),
    **dict.fromkeys(("tumor", "tumors", "tumour", "tumours"), _NEOPLASM),
}
"""Code, coding scheme and meaning by tissue name (DICOM PS3.16, CID 7159); other names are coded as tissue."""
_NEEDED = ("StudyInstanceUID", "SeriesInstanceUID", "SOPClassUID", "SOPInstanceUID")
_MAY_BE_EMPTY = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex"),
    *("AccessionNumber", "StudyID", "StudyDate", "StudyTime"),
)
"""Must be there and may be empty; tools that remove names often remove the element as well."""
_PATIENT_GROUPS = (0x0010, 0x0012, 0x0032, 0x0038)
"""Patient, clinical trial, request and visit (PS3.6, chapter 6)."""
_IMPERSONAL = frozenset(["AT", "CS", "DS", "FD", "FL", "IS", "SL", "SS", "UI", "UL", "US"])
"""Kinds of values that are numbers, identifiers of documents and terms of DICOM's own lists (PS3.5, 6.2)."""
_FUNCTIONAL_GROUPS = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
_LONGEST_LABEL = 64
_FIRST_SERIES_NUMBER = 1000
"""Added to the number of the source series, so that viewers list the mask behind the images."""


def is_dicom_source(source: Case | Path) -> bool:
    """Whether every image of a case is DICOM; of a path, whether it is a DICOM file or a folder that holds one."""
    if isinstance(source, Case):
        return bool(source.images) and all(is_dicom_source(image.path) for image in source.images.values())
    with as_data_errors(source):
        files = list_folder(source)[1] if source.is_dir() else [source] if source.is_file() else []
    return any(has_dicom_name(path) or is_dicom_file(path) for path in files)


def require_highdicom() -> Any:
    """The module highdicom; RequestError where it is not installed."""
    try:
        import highdicom
    except ImportError as failure:
        remedy = 'Install it with `pip install "segkit[dicom]"`, or write another format'
        raise RequestError("DICOM SEG files need highdicom, which is not installed", remedy=remedy) from failure
    return highdicom


def write_dicom_seg(
    path: Path,
    labels: LabelMap,
    series: Path,
    segments: Mapping[str, int],
    *,
    model: str | None = None,
    keeps_patient: bool = False,
) -> None:
    """Write a label map as a DICOM SEG of the study and frame of reference of its source; atomically.

    Args:
        path: the file to write, usually `.dcm`.
        labels: (D, H, W) uint8 on the grid that `files.read_grid(series)` gives.
        series: the folder of the source series, or the enhanced multi-frame file.
        segments: label value by tissue name, such as `LabelScheme.values`; each becomes a segment, present or not.
        model: what made the mask, such as the digest of its weights; recorded beside segkit's version.
        keeps_patient: copy the patient and study modules, as an archive needs them; else they are empty.

    Raises:
        DataError: the series cannot be read or lacks the numbers that a SEG refers to, or the file cannot be written.
        RequestError: highdicom is not installed.
        ValueError: the labels do not have the shape of the series, or hold values that no segment names.
    """
    highdicom = require_highdicom()
    grid, frames = read_grid(series), frames_of(series)
    ordered = sorted(segments.items(), key=lambda segment: segment[1])
    planes = _planes(labels, frames, grid, [value for _, value in ordered])
    sources = _source_images(series, frames, grid, keeps_patient=keeps_patient)
    version = metadata.version("segkit")
    with written_atomically(path) as temporary, warnings.catch_warnings():
        # Warnings about oddities in the source would print the patient's name.
        warnings.simplefilter("ignore")
        mask = highdicom.seg.Segmentation(
            source_images=sources,
            pixel_array=planes,
            segmentation_type="BINARY",
            segment_descriptions=[
                _description(number, name, value, version, model) for number, (name, value) in enumerate(ordered, 1)
            ],
            series_instance_uid=highdicom.UID(),
            series_number=_FIRST_SERIES_NUMBER + int(sources[0].get("SeriesNumber") or 0),
            series_description="Segmentation by segkit",
            sop_instance_uid=highdicom.UID(),
            instance_number=1,
            manufacturer="segkit",
            manufacturer_model_name="segkit",
            software_versions=version,
            device_serial_number="none",
            content_label="SEGMENTATION",
            content_qualification="RESEARCH",
            omit_empty_frames=bool(planes.any()),
            specific_character_set="ISO_IR 192",
        )
        mask.save_as(temporary)


def _remove_words(document: Any, *, is_inside: bool = False) -> None:
    """Delete text, dates and patient data from a source image's header, so that highdicom cannot copy them.

    The mask is not marked as de-identified, as its UIDs link it to the study.
    """
    for element in list(document):
        if element.VR == "SQ" and (is_inside or element.keyword in _FUNCTIONAL_GROUPS):
            for item in element.value:
                _remove_words(item, is_inside=True)
        elif element.VR not in _IMPERSONAL or element.tag.group in _PATIENT_GROUPS or element.tag.is_private:
            del document[element.tag]


def _source_images(series: Path, frames: Sequence[Frame], grid: Grid, *, keeps_patient: bool) -> list[Any]:
    """The headers of the series' files in the order of its slices, with one geometry and one frame of reference."""
    import pydicom

    paths = list(dict.fromkeys(frame.path for frame in frames))
    with as_data_errors(series):
        sources = [pydicom.dcmread(path, stop_before_pixels=True, force=True) for path in paths]
        for path, source in zip(paths, sources, strict=True):
            if not keeps_patient:
                _remove_words(source)
            _complete(path, source)
        first = sources[0]
        _set_spacing(_shared_measures(first) if len(frames) > len(paths) else first, grid)
    for source in sources[1:]:
        # Scanners round each slice separately; highdicom compares the digits.
        source.ImageOrientationPatient = first.ImageOrientationPatient
        source.FrameOfReferenceUID = first.FrameOfReferenceUID
    return sources


def _complete(path: Path, source: Any) -> None:
    """Add empty elements, and a frame of reference, where a series was stripped of them."""
    from pydicom.uid import generate_uid

    missing = [name for name in _NEEDED if not source.get(name)]
    if missing:
        found = f"the DICOM file has no {', '.join(missing)}, which a DICOM SEG refers to"
        raise DataError(found, where=path, remedy="Export the series again, or write the masks as .nii.gz")
    for name in _MAY_BE_EMPTY:
        if name not in source:
            setattr(source, name, "")
    if not source.get("FrameOfReferenceUID"):
        # The same for each mask of a series, so that viewers can overlay them.
        source.FrameOfReferenceUID = generate_uid(entropy_srcs=[source.SeriesInstanceUID])


def _shared_measures(source: Any) -> Any:
    """The shared pixel measures of an enhanced file, where highdicom reads size and orientation; added if missing."""
    from pydicom import Dataset

    if not source.get("SharedFunctionalGroupsSequence"):
        source.SharedFunctionalGroupsSequence = [Dataset()]
    shared, first = source.SharedFunctionalGroupsSequence[0], source.PerFrameFunctionalGroupsSequence[0]
    for name in ("PlaneOrientationSequence", "PixelMeasuresSequence"):
        if not shared.get(name):
            setattr(shared, name, first[name].value)
    return shared.PixelMeasuresSequence[0]


def _set_spacing(measures: Any, grid: Grid) -> None:
    """Set the distance between slices from their positions: readers place omitted frames by it."""
    columns, rows, step = grid.affine[:3, :3].T
    normal = np.cross(columns, rows)
    between_mm = round(abs(float(step @ normal / np.linalg.norm(normal))), 6)
    measures.SpacingBetweenSlices = between_mm
    if not measures.get("SliceThickness"):
        measures.SliceThickness = between_mm
    if not measures.get("PixelSpacing"):
        measures.PixelSpacing = [grid.spacing_mm[1], grid.spacing_mm[0]]


def _planes(labels: LabelMap, frames: Sequence[Frame], grid: Grid, values: Sequence[int]) -> AnyArray:
    """Label values (D, H, W) to segment numbers 1, 2, 3 ... in the order of `values`, (frames, rows, columns).

    The frames of a series are in the order of its slices, those of an enhanced file in stored order.
    """
    if labels.shape != grid.shape:
        raise ValueError(f"labels of shape {labels.shape} do not fit a series of shape {grid.shape}")
    present = np.flatnonzero(np.bincount(labels.ravel(), minlength=256))
    if strays := sorted({int(value) for value in present} - {0, *values}):
        raise ValueError(f"label values {strays} are no segments; known are {list(values)}")
    numbers = np.zeros(256, np.uint8)
    numbers[list(values)] = np.arange(1, len(values) + 1)
    planes = labels.transpose(2, 1, 0)  # (slice, rows, columns)
    return numbers[planes[np.argsort([frame.number for frame in frames], kind="stable")]]


def _description(number: int, name: str, value: int, version: str, model: str | None) -> Any:
    import highdicom
    from pydicom.sr.codedict import codes

    code = _CODES.get(name.casefold(), _TISSUE)
    parameters = None if model is None else {"model": model}
    description = highdicom.seg.SegmentDescription(
        segment_number=number,
        segment_label=name[:_LONGEST_LABEL],
        segmented_property_category=highdicom.sr.CodedConcept(*(_TISSUE if code == _TISSUE else _ABNORMAL)),
        segmented_property_type=highdicom.sr.CodedConcept(*code),
        algorithm_type="AUTOMATIC",
        algorithm_identification=highdicom.AlgorithmIdentificationSequence(
            "segkit", codes.cid7162.ArtificialIntelligence, version, parameters=parameters
        ),
    )
    description.SegmentDescription = f"label value {value}"
    return description
