"""Volumes, pictures and DICOM files."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

SHAPE = (4, 3, 2)


def nifti(dtype: str = "<i2", version: int = 1, channels: int = 1, *, has_extension: bool = False) -> bytes:
    """A NIfTI file, not compressed."""
    import nibabel as nib

    shape = SHAPE if channels == 1 else (*SHAPE, channels)
    voxels = (np.arange(np.prod(shape)) % 5).reshape(shape).astype(dtype)
    image = (nib.Nifti1Image if version == 1 else nib.Nifti2Image)(voxels, np.diag([-1.0, -2.0, 3.0, 1.0]))
    if has_extension:
        image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"some words of the scanner"))
    data: bytes = image.to_bytes()
    return data


def mgh() -> bytes:
    """A FreeSurfer file, not compressed."""
    import nibabel as nib

    data: bytes = nib.MGHImage(np.arange(24, dtype=np.float32).reshape(SHAPE), np.eye(4)).to_bytes()
    return data


def itk(suffix: str, *, is_compressed: bool) -> bytes:
    """An NRRD or MetaImage file."""
    import SimpleITK

    image = SimpleITK.GetImageFromArray(np.arange(24, dtype=np.int16).reshape(SHAPE))
    image.SetSpacing((1.0, 2.0, 3.0))
    return _written(lambda path: SimpleITK.WriteImage(image, path, useCompression=is_compressed), suffix)


def picture(suffix: str, mode: str = "L") -> bytes:
    """A picture of 6 x 5 pixels."""
    import PIL.Image

    grey = PIL.Image.fromarray((np.arange(30, dtype=np.uint8) * 8).reshape(5, 6))
    return _written(lambda path: grey.convert(mode).save(path), suffix)


def dicom_slice(number: int = 0) -> bytes:
    """One slice of a series, its third axis 2 mm a number."""
    import pydicom

    return _dicom(_dicom_base(number, pydicom.uid.MRImageStorage, [0.0, 0.0, 2.0 * number]))


def dicom_frames(count: int = 5) -> bytes:
    """An enhanced multi-frame file."""
    import pydicom

    document = _dicom_base(0, pydicom.uid.EnhancedMRImageStorage, None)
    document.NumberOfFrames = count
    plane, measures, shared = pydicom.Dataset(), pydicom.Dataset(), pydicom.Dataset()
    plane.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    measures.PixelSpacing, measures.SliceThickness = [1, 1], 2
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = [plane], [measures]
    frames = []
    for number in range(count):
        place, frame = pydicom.Dataset(), pydicom.Dataset()
        place.ImagePositionPatient = [0, 0, 2 * number]
        frame.PlanePositionSequence = [place]
        frames.append(frame)
    document.SharedFunctionalGroupsSequence, document.PerFrameFunctionalGroupsSequence = [shared], frames
    document.PixelData = bytes(2 * 12 * count)
    return _dicom(document)


def _dicom_base(number: int, sop_class: str, position: list[float] | None) -> Any:
    import pydicom

    document = pydicom.Dataset()
    document.file_meta = pydicom.dataset.FileMetaDataset()
    document.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    document.SOPClassUID, document.SOPInstanceUID = sop_class, f"1.2.3.4.{number + 1}"
    document.StudyInstanceUID, document.SeriesInstanceUID, document.FrameOfReferenceUID = "1.2.3", "1.2.3.4", "1.2.9"
    document.Modality, document.SeriesNumber, document.InstanceNumber = "MR", 7, number + 1
    if position is not None:
        document.ImagePositionPatient, document.ImageOrientationPatient = position, [1, 0, 0, 0, 1, 0]
        document.PixelSpacing = [1, 1]
    document.Columns, document.Rows = 4, 3
    document.SamplesPerPixel, document.PhotometricInterpretation = 1, "MONOCHROME2"
    document.BitsAllocated = document.BitsStored = 16
    document.HighBit, document.PixelRepresentation = 15, 0
    document.PixelData = bytes(24)
    return document


def _dicom(document: Any) -> bytes:
    stream = io.BytesIO()
    document.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def _written(write: Callable[[str], object], suffix: str) -> bytes:
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"seed{suffix}"
        write(str(path))
        return path.read_bytes()
