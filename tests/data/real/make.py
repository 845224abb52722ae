"""Writes the fixtures of this folder from the original data sets.

`python tests/data/real/make.py ORIGINALS [FOLDER]`: ORIGINALS holds one folder for each data set of README.md, with the
files as they were released. Volumes are cropped and their affines moved with them; nothing is resampled but pictures.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import shutil
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import PIL.Image
import pydicom
from pydicom.encaps import encapsulate

Box = tuple[slice, slice, slice]

HIPPOCAMPUS = ("hippocampus_014", "hippocampus_023", "hippocampus_221", "hippocampus_320")
LESIONS: Box = (slice(20, 52), slice(88, 124), slice(44, 72))  # the edge of the brain: a part is 0
CT: Box = (slice(40, 72), slice(30, 66), slice(0, 30))
MR: Box = (slice(40, 72), slice(30, 66), slice(0, 20))
FLAIR: Box = (slice(40, 72), slice(60, 96), slice(50, 80))
BRAIN_MASK: Box = (slice(100, 132), slice(60, 100), slice(80, 128))
CORD = {
    "t1": ("t1w", "t1w_seg-manual", (slice(8, 36), slice(20, 56), slice(20, 50))),
    "t2": ("t2", "t2_seg-manual", (slice(15, 47), slice(10, 46), slice(10, 40))),
    "t2s": ("t2s", "t2s_gmseg_manual", (slice(0, 49), slice(0, 54), slice(0, 9))),
}
ROWS, COLUMNS = 64, 48  # of a DICOM image, from its first pixel on: the position in the header stays right
SERIES = ("siemens/anatomical", "generic/compressed_j2k", "philips_enhanced/anatomical")
BROKEN_SERIES = ("failing/slicecount", "failing/sliceorientation")
SHRINK = 8  # pictures


def crop_volume(source: Path, target: Path, box: Box) -> None:
    """Crop with the header, its codes and its voxel type kept; the affine becomes that of the first voxel left."""
    target.parent.mkdir(parents=True, exist_ok=True)
    image = nib.load(source)
    cropped = image.slicer[box]
    if isinstance(image, nib.Nifti1Image):
        cropped.set_sform(cropped.affine, int(image.header["sform_code"]))
        cropped.set_qform(cropped.affine, int(image.header["qform_code"]))
    nib.save(cropped, target)


def crop_nrrd(source: Path, target: Path, box: Box, twin: Path) -> None:
    """Crop voxels (unsigned char in gzip); of the header only `sizes` and `space origin` change.

    The origin is that of `twin`, the NIfTI file cropped alike, in float32, as in the original pair.
    """
    head, packed = source.read_bytes().split(b"\n\n", 1)
    text = head.decode("ascii")
    (sizes,) = re.findall(r"^sizes: (.*)$", text, re.MULTILINE)
    shape = [int(size) for size in sizes.split()]
    voxels = np.frombuffer(gzip.decompress(packed), np.uint8).reshape(shape, order="F")[box]
    text = re.sub(r"^sizes: .*$", "sizes: " + " ".join(map(str, voxels.shape)), text, flags=re.MULTILINE)
    origin = ",".join(repr(float(value)) for value in nib.load(twin).affine[:3, 3] * (-1, -1, 1))  # RAS to LPS
    text = re.sub(r"^space origin: .*$", f"space origin: ({origin})", text, flags=re.MULTILINE)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(text.encode("ascii") + b"\n\n" + gzip.compress(voxels.tobytes(order="F"), mtime=0))


def crop_slice(source: Path, target: Path) -> None:
    """The first rows and columns of a DICOM file; every other element stays. JPEG 2000 stays lossless JPEG 2000."""
    target.parent.mkdir(parents=True, exist_ok=True)
    document = pydicom.dcmread(source)
    pixels = np.ascontiguousarray(document.pixel_array[..., :ROWS, :COLUMNS])
    document.Rows, document.Columns = ROWS, COLUMNS
    if document.file_meta.TransferSyntaxUID == pydicom.uid.JPEG2000Lossless:
        stream = io.BytesIO()
        PIL.Image.fromarray(pixels).save(stream, "JPEG2000", no_jp2=True, irreversible=False)
        document.PixelData = encapsulate([stream.getvalue()])
    else:
        document.PixelData = pixels.tobytes()
    document.save_as(target)


def crop_truth(source: Path, target: Path, region: nib.Nifti1Image) -> None:
    """The voxels of a ground truth that lie where those of `region` lie, which has other axes."""
    image = nib.load(source)
    corners = np.array([[0, 0, 0], [size - 1 for size in region.shape[:3]]], float)
    places = nib.affines.apply_affine(np.linalg.inv(image.affine) @ region.affine, corners)
    first, last = np.round(places.min(0)).astype(int), np.round(places.max(0)).astype(int)
    crop_volume(source, target, tuple(slice(a, b + 1) for a, b in zip(first, last, strict=True)))


def make_dicom(source: Path, target: Path) -> None:
    for name in (*SERIES, *BROKEN_SERIES):
        for file in sorted((source / name / "001").iterdir()):
            crop_slice(file, target / name / "001" / file.name)
    for name in SERIES:
        # Columns from left to right and rows from top to bottom, as in the files: the crop is the first of both.
        truth, turned = (f"001_ground_truth{tail}.nii.gz" for tail in ("", "_reoriented"))
        image = nib.load(source / name / truth)
        columns_first = (slice(0, COLUMNS), slice(0, ROWS), *(slice(None),) * (image.ndim - 2))
        crop_volume(source / name / truth, target / name / truth, columns_first)
        crop_truth(source / name / turned, target / name / turned, image.slicer[columns_first])


def make_hippocampus(source: Path, target: Path) -> None:
    """Whole cases, as they are, and the data set's description with these cases in its list."""
    for name in HIPPOCAMPUS:
        for folder in ("imagesTr", "labelsTr"):
            (target / folder).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / folder / f"{name}.nii.gz", target / folder / f"{name}.nii.gz")
    document = json.loads((source / "dataset.json").read_text(encoding="utf-8"))
    chosen = [entry for entry in document["training"] if Path(entry["image"]).name.split(".")[0] in HIPPOCAMPUS]
    document |= {"training": chosen, "numTraining": len(chosen)}
    (target / "dataset.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def make_pictures(source: Path, target: Path) -> None:
    """All pictures at one eighth: colours as the mean of the pixels, masks as the pixel in the middle."""
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        filter_ = PIL.Image.Resampling.BOX if file.suffix == ".jpg" else PIL.Image.Resampling.NEAREST
        with PIL.Image.open(file) as picture:
            small = picture.resize((-(-picture.width // SHRINK), -(-picture.height // SHRINK)), filter_)
        small.save(target / file.name, **({"quality": 90} if file.suffix == ".jpg" else {}))


def main(originals: Path, folder: Path) -> None:
    make_hippocampus(originals / "Task04_Hippocampus", folder / "Task04_Hippocampus")
    make_dicom(originals / "dicom_headers", folder / "dicom_headers")
    make_pictures(originals / "chase_db1", folder / "chase_db1")
    for name in ("T1", "T1POST", "T2", "FLAIR", "lesions"):
        file = Path("open_ms", "patient19", f"{name}.nii.gz")
        crop_volume(originals / file, folder / file, LESIONS)
    shutil.copyfile(originals / "open_ms" / "LICENSE.txt", folder / "open_ms" / "LICENSE.txt")
    for contrast, (image, mask, box) in CORD.items():
        for name in (image, mask):
            file = Path("sct_cord", contrast, f"{name}.nii.gz")
            crop_volume(originals / file, folder / file, box)
    for name, box in {"example_ct_sm": CT, "example_seg": CT, "example_mr_sm": MR, "example_seg_mr": MR}.items():
        file = Path("totalsegmentator_ct", f"{name}.nii.gz")
        crop_volume(originals / file, folder / file, box)
    samples = Path("format_samples")
    crop_volume(originals / samples / "FLAIR.nii.gz", folder / samples / "FLAIR.nii.gz", FLAIR)
    twin = folder / samples / "FLAIR.nii.gz"
    crop_nrrd(originals / samples / "FLAIR.nrrd", folder / samples / "FLAIR.nrrd", FLAIR, twin)
    crop_volume(originals / samples / "brainmask.mgz", folder / samples / "brainmask.mgz", BRAIN_MASK)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).resolve().parent)
