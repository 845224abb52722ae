"""DICOM series through SimpleITK (GDCM): a folder of slices, or one enhanced multi-frame file, which needs pydicom.

The grid is computed here from the position and orientation of each slice. Slices that do not form one regular volume
are refused: a missing slice would shift all others unnoticed. Only geometry and voxels are read; the patient's name,
dates and numbers are not.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segkit.errors import DataError, some
from segkit.reading.dicom_check import DicomFile, check_dicom
from segkit.reading.geometry import format_size
from segkit.reading.itk import LPS_TO_RAS, image_reader
from segkit.reading.volume import (
    Grid,
    ImageHeader,
    as_data_errors,
    damaged,
    is_usable,
    list_folder,
    pick_channel,
    plain_numbers,
    refuse_implausible,
)
from segkit.shapes import Affine, AnyArray

DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
FEWEST_SLICES = 4
"""With fewer, gaps cannot be distinguished from spacing; such series are localisers or parts of a scan."""

_POSITION, _ORIENTATION = "0020|0032", "0020|0037"
_SPACINGS = {"PixelSpacing": "0028|0030", "ImagerPixelSpacing": "0018|1164", "NominalScannedPixelSpacing": "0018|2010"}
"""By preference; what writes slices as secondary captures, such as ITK, gives the last alone."""
_INTERCEPT, _SLOPE, _FRAMES, _INSTANCE = "0028|1052", "0028|1053", "0028|0008", "0008|0018"
_NOTES = {
    "PixelSpacing": "",
    "ImagerPixelSpacing": (
        "there is no PixelSpacing; ImagerPixelSpacing, measured at the detector and a little larger, is taken"
    ),
    "NominalScannedPixelSpacing": "there is no PixelSpacing; NominalScannedPixelSpacing is taken",
}
_FRAME_GROUPS = (
    *("PlanePositionSequence", "PlaneOrientationSequence", "PixelMeasuresSequence"),
    "PixelValueTransformationSequence",
)
_IMAGE_IO = "GDCMImageIO"
_PACKED_SLACK_BYTES = 2**16
"""JPEG 2000 packs an empty slice of 512 x 512 pixels into 200 bytes."""
_GAP_TOLERANCE = 0.1
"""Two distances between neighbours may differ by this share of the usual one; scanners round to about 0.001 mm."""
_LARGEST_TILT_DEGREES = 0.5


@dataclass(frozen=True)
class _Slice:
    """One slice in DICOM's LPS world: `position` of its first voxel (3), `axes` (2, 3) along columns and rows.

    `spacing_mm` is between columns, then rows; `scale` are slope and intercept of its voxels.
    """

    position: NDArray[np.float64]
    axes: NDArray[np.float64]
    spacing_mm: tuple[float, float]
    shape: tuple[int, int]
    scale: tuple[float, float]
    spacing_note: str
    """What to know of the spacing where it is not PixelSpacing."""
    instance: str = ""
    """SOPInstanceUID, which identifies a file of its own."""

    @property
    def normal(self) -> NDArray[np.float64]:
        return np.cross(self.axes[0], self.axes[1])


@dataclass(frozen=True)
class Frame:
    """Where one slice of a volume is stored: its file, its number there, counted from 0, and its scale factors."""

    path: Path
    number: int = 0
    scale: tuple[float, float] = (1.0, 0.0)


def has_dicom_name(path: Path) -> bool:
    """Whether the suffix is one of DICOM's."""
    return path.suffix.lower() in DICOM_SUFFIXES


def is_dicom_file(path: Path) -> bool:
    """Whether the letters DICM follow the first 128 bytes; False where the file cannot be read."""
    try:
        with path.open("rb") as stream:
            return stream.read(132)[128:] == b"DICM"
    except OSError:
        return False


def holds_frames(path: Path) -> bool:
    """Whether a DICOM file holds several slices, as enhanced files do; False where it cannot be read."""
    reader = image_reader(path, _IMAGE_IO)
    try:
        if check_dicom(path) is None:
            return False
        reader.ReadImageInformation()
    except (DataError, RuntimeError):
        return False
    size = reader.GetSize()
    return len(size) > 2 and size[2] > 1


def open_dicom(source: Path) -> ImageHeader:
    """The header of the one series in a folder, or of an enhanced multi-frame file.

    Raises DataError where a folder holds no series or several, or slices are missing.
    """
    import SimpleITK

    frames, grid = _frames_and_grid(source)
    paths = list(dict.fromkeys(frame.path for frame in frames))
    where = grid.source or source

    def read(channel: int | None) -> AnyArray:
        pick_channel(where, 1, channel)
        with as_data_errors(where):
            # File by file, as a reader of whole series takes the type and scale factors of its first slice for all.
            stacks = (SimpleITK.GetArrayFromImage(image_reader(path, _IMAGE_IO).Execute()) for path in paths)
            planes = [plain_numbers(stack, where) for stack in stacks]  # (frames, rows, columns) each
            if planes[0].ndim != 3:
                raise DataError("the slices are in colour", where=where, expected="one value per voxel")
            is_float = any(plane.dtype.kind == "f" for plane in planes)
            voxels = np.concatenate(planes, dtype=np.float32 if is_float else None, casting="same_kind")
            if len(voxels) != len(frames):
                raise damaged(where, f"it has {len(voxels)} slices, and positions of {len(frames)}")
            if len(paths) == 1:
                voxels = _rescaled(voxels, frames)[[frame.number for frame in frames]]
            return voxels.T  # (D, H, W)

    slopes = (abs(frame.scale[0]) for frame in frames)
    return ImageHeader(grid, 1, read, step=max(slope if slope % 1 else 0.0 for slope in slopes))


def _rescaled(voxels: AnyArray, frames: Sequence[Frame]) -> AnyArray:
    """The frames (N, rows, columns) of an enhanced file, each with its own scale factors; GDCM applies the first's."""
    scales = np.array([frame.scale for frame in sorted(frames, key=lambda frame: frame.number)])
    if (scales == scales[0]).all():
        return voxels
    stored = np.rint((voxels - scales[0, 1]) / scales[0, 0])
    rescaled = stored * scales[:, 0, None, None] + scales[:, 1, None, None]
    return plain_numbers(rescaled.astype(np.int32) if (scales % 1 == 0).all() else rescaled, frames[0].path)


def frames_of(source: Path) -> list[Frame]:
    """The stored frame of each slice, in the order of the last axis of the array that is read.

    Columns of a frame are the first axis of that array, rows the second. `source` and errors as for `open_dicom`.
    """
    return _frames_and_grid(source)[0]


def _frames_and_grid(source: Path) -> tuple[list[Frame], Grid]:
    paths = _files_of_series(source) if source.is_dir() else [source]
    if len(paths) > 1:
        paths, slices, notes = _distinct_slices(paths)
        order, grid = _regular_grid(source, slices, notes)
        refuse_implausible(source, grid.shape, bytes_per_voxel=0, stored_bytes=0, is_compressed=True)
        return [Frame(paths[index], scale=slices[index].scale) for index in order], grid
    path = paths[0]
    with as_data_errors(path):
        reader, checked = _read_header(path)
        count = int(reader.GetMetaData(_FRAMES)) if reader.HasMetaDataKey(_FRAMES) else 1
        if count < FEWEST_SLICES:
            raise _too_few(path, count)
        _refuse_larger_than_stored(path, reader.GetSize(), checked)
        slices = _slices_of_frames(path)
        order, grid = _regular_grid(path, slices)
    return [Frame(path, number, slices[number].scale) for number in order], grid


def _files_of_series(folder: Path) -> list[Path]:
    series: dict[str, list[Path]] = defaultdict(list)
    with as_data_errors(folder):
        for path in list_folder(folder)[1]:
            if path.is_file() and path.stat().st_size and (checked := check_dicom(path)) and checked.pixel_bytes:
                series[checked.series].append(path)
    if not series:
        expected = "an image file or a folder of DICOM slices"
        raise DataError("the folder holds no DICOM images", where=folder, expected=expected)
    if len(series) > 1:
        counts = ", ".join(str(len(paths)) for paths in series.values())
        found = f"the folder holds {len(series)} DICOM series ({counts} files)"
        remedy = "Put each series into a folder of its own"
        raise DataError(found, where=folder, expected="one series", remedy=remedy)
    return next(iter(series.values()))


def _distinct_slices(paths: Sequence[Path]) -> tuple[list[Path], list[_Slice], list[str]]:
    """The files with their slices, without those that repeat the slice of another file, and a note on these."""
    slices: dict[object, tuple[Path, _Slice]] = {}
    repeated = []
    for path in paths:
        one = _slice_of_file(path)
        # Some programs that remove names give one number to all slices, which are not the same.
        key = (one.instance, *one.position.tolist()) if one.instance else path
        if slices.setdefault(key, (path, one))[0] != path:
            repeated.append(path.name)
    note = f"slices stored twice (with equal SOPInstanceUID) are used once; not used: {some(repeated)}"
    kept, found = zip(*slices.values(), strict=True)
    return list(kept), list(found), [note] if repeated else []


def _slice_of_file(path: Path) -> _Slice:
    with as_data_errors(path):
        reader, checked = _read_header(path)
        _refuse_larger_than_stored(path, reader.GetSize(), checked)
        keys = (_POSITION, _ORIENTATION, _SLOPE, _INTERCEPT, *_SPACINGS.values())
        texts = (reader.GetMetaData(key).strip() if reader.HasMetaDataKey(key) else "" for key in keys)
        numbers = ([float(part) for part in text.split("\\")] if text else [] for text in texts)
        position, orientation, slope, intercept, *spacings = numbers
        if not position or not orientation:
            raise _no_position(path)
        axes, scale = np.reshape(orientation, (2, 3)), ((slope or [1.0])[0], (intercept or [0.0])[0])
        # Where PixelSpacing is there and empty, ITK does not read the voxels.
        is_there = reader.HasMetaDataKey(_SPACINGS["PixelSpacing"])
        spacing_mm, note = _spacing_mm(path, dict(zip(_SPACINGS, spacings[:1] if is_there else spacings, strict=False)))
        instance = reader.GetMetaData(_INSTANCE) if reader.HasMetaDataKey(_INSTANCE) else ""
        return _Slice(np.array(position), axes, spacing_mm, reader.GetSize()[:2], scale, note, instance.strip())


def _spacing_mm(path: Path, spacings: Mapping[str, Sequence[float]]) -> tuple[tuple[float, float], str]:
    """The spacing (between columns, between rows) of DICOM's first one (between rows, between columns), and a note."""
    name, between = next((found for found in spacings.items() if found[1]), ("PixelSpacing", ()))
    if len(between) != 2 or not all(0 < mm < math.inf for mm in between):
        found = f"the DICOM file gives {f'the pixel spacing {format_size(between)}' if between else 'no pixel spacing'}"
        remedy = "Export the series again with its PixelSpacing, as distances are unknown without"
        raise DataError(found, where=path, expected="two lengths in mm", remedy=remedy)
    return (between[1], between[0]), _NOTES[name]


def _read_header(path: Path) -> tuple[Any, DicomFile]:
    checked = check_dicom(path)
    if checked is None:
        raise damaged(path, "this is not a DICOM file, in spite of its name")
    reader = image_reader(path, _IMAGE_IO)
    reader.ReadImageInformation()
    return reader, checked


def _refuse_larger_than_stored(path: Path, shape: Sequence[int], checked: DicomFile) -> None:
    """Refuse frames whose pixels, of at least one bit each, the file cannot hold."""
    stored = checked.pixel_bytes + _PACKED_SLACK_BYTES if checked.is_packed else 8 * checked.pixel_bytes
    refuse_implausible(path, shape, bytes_per_voxel=1, stored_bytes=stored, is_compressed=checked.is_packed)


def _slices_of_frames(path: Path) -> list[_Slice]:
    try:
        import pydicom
    except ImportError as failure:
        found = "this is an enhanced multi-frame DICOM file, and pydicom, which reads its positions, is not installed"
        raise DataError(found, where=path, remedy='Install it with `pip install "segkit[dicom]"`') from failure
    document = pydicom.dcmread(path, stop_before_pixels=True)
    shared = document.get("SharedFunctionalGroupsSequence") or [{}]
    shape = (int(document.Columns), int(document.Rows))
    slices = []
    for frame in document.get("PerFrameFunctionalGroupsSequence") or ():
        # The entry of one frame, or else that of all of them (DICOM PS3.3, C.7.6.16).
        place, orientation, measures, values = (
            (frame.get(name) or shared[0].get(name) or [None])[0] for name in _FRAME_GROUPS
        )
        if place is None or orientation is None or measures is None:
            raise _no_position(path)
        position = np.array(place.ImagePositionPatient, np.float64)
        axes = np.reshape(np.array(orientation.ImageOrientationPatient, np.float64), (2, 3))
        spacings = {name: (measures if name == "PixelSpacing" else document).get(name) or () for name in _SPACINGS}
        spacing_mm, note = _spacing_mm(path, {name: [float(mm) for mm in mms] for name, mms in spacings.items()})
        scale = (1.0, 0.0) if values is None else (float(values.RescaleSlope), float(values.RescaleIntercept))
        slices.append(_Slice(position, axes, spacing_mm, shape, scale, note))
    if not slices:
        raise _no_position(path)
    return slices


def _regular_grid(where: Path, slices: Sequence[_Slice], notes: Iterable[str] = ()) -> tuple[list[int], Grid]:
    """The order of the slices along their normal, and the grid they form; DataError where they form none.

    The third axis is taken from the first and last position, so that a tilted gantry gives a sheared affine that is
    correct at every voxel.
    """
    if len(slices) < FEWEST_SLICES:
        raise _too_few(where, len(slices))
    first = slices[0]
    _refuse_different_slices(where, slices)
    heights = np.array([float(one.position @ first.normal) for one in slices])
    order = [int(index) for index in np.argsort(heights, kind="stable")]
    _refuse_gaps(where, np.diff(heights[order]))
    positions = np.stack([slices[index].position for index in order])
    step = (positions[-1] - positions[0]) / (len(slices) - 1)
    to_lps = np.eye(4)
    columns, rows = first.axes * np.reshape(first.spacing_mm, (2, 1))
    to_lps[:3] = np.stack([columns, rows, step, positions[0]], axis=1)
    affine: Affine = LPS_TO_RAS @ to_lps
    if not is_usable(affine):
        raise _no_position(where)
    notes = tuple(dict.fromkeys(note for note in (*notes, *(one.spacing_note for one in slices)) if note))
    return order, Grid((*first.shape, len(slices)), affine, source=where, notes=notes)


def _refuse_different_slices(where: Path, slices: Sequence[_Slice]) -> None:
    first = slices[0]
    alignment = min(float((one.axes * first.axes).sum(axis=1).min()) for one in slices)
    tilt = math.degrees(math.acos(min(1.0, max(-1.0, alignment))))
    if tilt > _LARGEST_TILT_DEGREES:
        found = f"the slices are not parallel: they are turned against each other by up to {tilt:.0f} degrees"
        remedy = "This is a localiser or a mixture of stacks: export each stack as a series of its own"
        raise DataError(found, where=where, expected="parallel slices of one volume", remedy=remedy)
    different = {(one.shape, tuple(round(length, 4) for length in one.spacing_mm)) for one in slices}
    if len(different) > 1:
        found = " and ".join(f"{shape[0]} x {shape[1]} of {spacing} mm" for shape, spacing in sorted(different))
        raise DataError(f"the slices differ in size: {found}", where=where, expected="slices of one volume")


def _refuse_gaps(where: Path, gaps_mm: NDArray[np.float64]) -> None:
    usual = float(np.median(gaps_mm))
    if float(gaps_mm.min()) < _GAP_TOLERANCE * max(usual, 0.01):
        found = "several slices lie at one and the same position"
        remedy = "This is a series of several echoes, times or contrasts: export each as a series of its own"
        raise DataError(found, where=where, expected="one slice per position", remedy=remedy)
    if float(np.abs(gaps_mm - usual).max()) > _GAP_TOLERANCE * usual:
        missing = sum(round(float(gap) / usual) - 1 for gap in gaps_mm if gap > usual * (1 + _GAP_TOLERANCE))
        distances = f"they lie {usual:.2f} mm apart, and up to {float(gaps_mm.max()):.2f} mm in places"
        found = f"slices are missing or unevenly spaced (about {missing} missing): {distances}"
        raise DataError(found, where=where, expected="evenly spaced slices", remedy="Export the complete series again")


def _too_few(where: Path, count: int) -> DataError:
    expected = f"a volume of at least {FEWEST_SLICES} slices"
    remedy = "Export the complete series again; give its folder, not one of its slices"
    return DataError(f"slices are missing: the series has only {count}", where=where, expected=expected, remedy=remedy)


def _no_position(where: Path) -> DataError:
    found = "the DICOM file has no position and orientation of its slice in the patient"
    remedy = "This is a screenshot or a report: choose the series of original slices"
    return DataError(found, where=where, remedy=remedy)
