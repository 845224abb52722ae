"""Synthetic DICOM files, written element by element (PS3.5, explicit VR little endian), with any header."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

CT = "1.2.840.10008.5.1.4.1.1.2"


def write_slice(
    path: Path,
    stored: NDArray[np.integer],
    height_mm: float,
    scale: tuple[float | str, float | str] | None = None,
    spacing: str = r"2\0.5",
    series: str = "1.2.3.4",
    instance: str = "",
    more: Sequence[tuple[int, int, str, str]] = (),
) -> Path:
    """One slice of `stored` values (rows, columns); `scale` are slope and intercept, `more` are further elements."""
    bits, signed = 8 * stored.itemsize, int(stored.dtype.kind == "i")
    instance = instance or f"1.2.3.4.{round(1000 * height_mm) + 10**6}"
    elements: list[tuple[int, int, str, str | int]] = [
        *((8, 0x16, "UI", CT), (8, 0x18, "UI", instance), (8, 0x60, "CS", "CT"), (0x10, 0x10, "PN", "Nobody")),
        *((0x20, 0xD, "UI", "1.2.3"), (0x20, 0xE, "UI", series), (0x20, 0x32, "DS", rf"-10\20\{height_mm}")),
        *((0x20, 0x37, "DS", r"1\0\0\0\1\0"), (0x28, 2, "US", 1), (0x28, 4, "CS", "MONOCHROME2")),
        *((0x28, 0x10, "US", stored.shape[0]), (0x28, 0x11, "US", stored.shape[1]), (0x28, 0x100, "US", bits)),
        *((0x28, 0x101, "US", bits), (0x28, 0x102, "US", bits - 1), (0x28, 0x103, "US", signed)),
        *([(0x28, 0x30, "DS", spacing)] if spacing else []),
        *([(0x28, 0x1052, "DS", str(scale[1])), (0x28, 0x1053, "DS", str(scale[0]))] if scale else []),
        *more,
    ]
    meta = _element(2, 2, "UI", CT) + _element(2, 3, "UI", instance) + _element(2, 0x10, "UI", "1.2.840.10008.1.2.1")
    data = b"".join(_element(*element) for element in sorted(elements, key=lambda element: element[:2]))
    pixels = stored.tobytes() + b"\0" * (stored.nbytes % 2)
    length = struct.pack("<HH2sHI", 2, 0, b"UL", 4, len(meta))
    voxels = struct.pack("<HH2sHI", 0x7FE0, 0x10, b"OW", 0, len(pixels)) + pixels
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\0" * 128 + b"DICM" + length + meta + data + voxels)
    return path


def enhanced_file(
    path: Path,
    stored: NDArray[np.uint16],
    scales: Sequence[tuple[Any, Any]] = (),
    heights_mm: Sequence[float] = (),
    spacing: Sequence[float] | None = (2, 0.5),
    imager: Sequence[float] | None = None,
) -> Path:
    """An enhanced MR file of the frames `stored` (N, rows, columns), each with its own slope and intercept."""
    pydicom = pytest.importorskip("pydicom")

    def item(**values: Any) -> list[Any]:
        dataset = pydicom.Dataset()
        for name, value in values.items():
            setattr(dataset, name, value)
        return [dataset]

    document = pydicom.dcmread(write_slice(path, stored.reshape(-1, stored.shape[2]), 0, spacing=""))
    document.SOPClassUID = document.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.4.1"
    document.NumberOfFrames, document.Rows = stored.shape[:2]
    if imager is not None:
        document.ImagerPixelSpacing = list(imager)
    document.SharedFunctionalGroupsSequence = item(
        PixelMeasuresSequence=item(SliceThickness=1, **({} if spacing is None else {"PixelSpacing": list(spacing)})),
        PlaneOrientationSequence=item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0]),
    )
    document.PerFrameFunctionalGroupsSequence = [
        item(
            PlanePositionSequence=item(ImagePositionPatient=[0, 0, height]),
            PixelValueTransformationSequence=item(RescaleSlope=slope, RescaleIntercept=intercept, RescaleType="US"),
        )[0]
        for height, (slope, intercept) in zip(
            heights_mm or range(len(stored)), scales or [(1, 0)] * len(stored), strict=True
        )
    ]
    document.save_as(path)
    return path


def _element(group: int, element: int, kind: str, value: str | int) -> bytes:
    content = struct.pack("<H", value) if isinstance(value, int) else value.encode()
    content += (b"\0" if kind == "UI" else b" ") * (len(content) % 2)
    return struct.pack("<HH2sH", group, element, kind.encode(), len(content)) + content
