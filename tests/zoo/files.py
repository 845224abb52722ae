"""What single files hold that people have: scale factors, headers, values; the folders around them are plain."""

from __future__ import annotations

import gzip
import json
import shutil
import struct
from pathlib import Path

import nibabel as nib
import numpy as np
import PIL.Image

from tests.dicom_files import write_slice
from tests.zoo.build import SHAPE, Expected, Situation, masks, save_volume, scans

THICK = np.diag([1.5, 1.5, 9.0, 1.0])
_SLICES = [np.random.default_rng(height).integers(50, 150, (10, 12)).astype(np.uint16) for height in range(8)]


def scale_factors_per_dicom_slice(folder: Path) -> None:
    for case in ("p1", "p2"):
        for height, stored in enumerate(_SLICES):
            write_slice(folder / case / f"{height}.dcm", stored, height, (1, 0) if height == 0 else (0.1 * height, 2))


def dicom_with_imager_pixel_spacing_only(folder: Path) -> None:
    for height, stored in enumerate(_SLICES):
        more = [(0x18, 0x1164, "DS", r"0.5\0.5")]
        write_slice(folder / "p1" / f"{height}.dcm", stored, height, spacing="", more=more)


def dicom_without_any_spacing(folder: Path) -> None:
    for case, spacing in (("p1", ""), ("p2", r"0.5\0.5")):
        for height, stored in enumerate(_SLICES):
            write_slice(folder / case / f"{height}.dcm", stored, height, spacing=spacing)


def dicom_slices_stored_twice(folder: Path) -> None:
    for height, stored in enumerate(_SLICES):
        write_slice(folder / "p1" / f"{height}.dcm", stored, height)
    for height in (0, 3):
        shutil.copy(folder / "p1" / f"{height}.dcm", folder / "p1" / f"copy of {height}.dcm")


def photographs_with_an_exif_turn(folder: Path) -> None:
    for name in ("a", "b"):
        picture = np.random.default_rng(1).integers(0, 255, (24, 16, 3)).astype(np.uint8)
        exif = PIL.Image.Exif()
        exif[274] = 6
        (folder / "images").mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(picture).save(folder / "images" / f"{name}.jpg", exif=exif)
    masks(folder, "masks/{a,b}.png", shape=(16, 24, 8))  # as drawn on what viewers show


def sform_without_voxel_sizes(folder: Path) -> None:
    for name in ("p1", "p2"):
        scans(folder, f"{name}.nii.gz")
        masks(folder, f"{name}_seg.nii.gz")
        for path in (folder / f"{name}.nii.gz", folder / f"{name}_seg.nii.gz"):
            image = nib.load(path)
            image = nib.Nifti1Image(np.asarray(image.dataobj), None)
            image.header.set_qform(THICK, code=1)
            image.header.set_sform(np.eye(4), code=1)
            image.header["pixdim"][1:4] = 1.5, 1.5, 9
            image.to_filename(path)


def voxel_size_of_zero(folder: Path) -> None:
    scans(folder, "p1.nii", "p2.nii")
    content = bytearray((folder / "p1.nii").read_bytes())
    content[80:92] = struct.pack("<3f", 1, 0, 1)
    content[252:256] = struct.pack("<2h", 1, 0)  # qform_code, sform_code
    (folder / "p1.nii").write_bytes(bytes(content))


def labels_with_a_scale_factor(folder: Path) -> None:
    scans(folder, "{p1,p2}.nii.gz")
    for name in ("p1", "p2"):
        stored = np.zeros(SHAPE, np.uint8)
        stored[2:6, 2:6, 2:4], stored[2:6, 2:6, 4:6] = 64, 255  # 1.004 and 4
        image = nib.Nifti1Image(stored, np.eye(4))
        image.header.set_slope_inter(4 / 255, 0)
        image.to_filename(folder / f"{name}_seg.nii.gz")


def masks_that_were_jpeg(folder: Path) -> None:
    scans(folder, "images/{a,b}.png", shape=(32, 32, 8))
    masks(folder, "lossy/{a,b}.jpg", value=255, shape=(32, 32, 8))
    (folder / "masks").mkdir()
    for name in ("a", "b"):
        PIL.Image.open(folder / "lossy" / f"{name}.jpg").save(folder / "masks" / f"{name}.png")
    shutil.rmtree(folder / "lossy")


def masks_of_1_beside_masks_of_255(folder: Path) -> None:
    scans(folder, "images/{a,b}.png")
    masks(folder, "masks/a.png")
    masks(folder, "masks/b.png", value=255)


def layers_and_parts_of_3d_slicer(folder: Path) -> None:
    for name in ("p1", "p2"):
        scans(folder, f"{name}.nii.gz")
        layers = np.zeros((2, 4, 5, 6), np.uint8)
        layers[0, :2], layers[1, 1:3] = 1, 1
        lines = ["NRRD0004", "type: uint8", "dimension: 4", "sizes: 2 4 5 6", "space: right-anterior-superior"]
        lines += ["space directions: none (1,0,0) (0,1,0) (0,0,1)", "kinds: list domain domain domain"]
        lines += ["space origin: (3,2,1)", "encoding: gzip"]
        for number, segment in enumerate(("liver", "lesion")):
            for key, value in (("Layer", number), ("LabelValue", 1), ("Name", segment)):
                lines.append(f"Segment{number}_{key}:={value}")
        header = "\n".join([*lines, "", ""]).encode()
        (folder / f"{name}.seg.nrrd").write_bytes(header + gzip.compress(layers.tobytes(order="F")))


def labels_above_255(folder: Path) -> None:
    scans(folder, "{p1,p2}.nii.gz")
    for name in ("p1", "p2"):
        mask = np.zeros(SHAPE, np.int16)
        mask[2:6, 2:6, 2:4], mask[2:6, 2:6, 4:6] = 205, 550
        save_volume(folder / f"{name}_seg.nii.gz", mask)


def one_voxel_of_minus_1(folder: Path) -> None:
    scans(folder, "{p1,p2}.nii.gz")
    masks(folder, "p1_seg.nii.gz")
    mask = np.zeros(SHAPE, np.int16)
    mask[2:6, 2:6, 2:6], mask[0, 0, 0] = 1, -1
    save_volume(folder / "p2_seg.nii.gz", mask)


def one_hot_masks(folder: Path) -> None:
    scans(folder, "{p1,p2}.nii.gz")
    for name in ("p1", "p2"):
        channels = np.zeros((*SHAPE, 2), np.uint8)
        channels[2:4, 2:6, 2:6, 0], channels[4:6, 2:6, 2:6, 1] = 1, 1
        save_volume(folder / f"{name}_seg.nii.gz", channels)


def backslashes_in_dataset_json(folder: Path) -> None:
    scans(folder, "imagesTr/{a,b}.nii.gz")
    masks(folder, "labelsTr/{a,b}.nii.gz")
    training = [{"image": rf".\imagesTr\{name}.nii.gz", "label": rf".\labelsTr\{name}.nii.gz"} for name in "ab"]
    document = {"modality": {"0": "CT"}, "labels": {"0": "background", "1": "liver"}, "training": training}
    (folder / "dataset.json").write_text(json.dumps(document))


def an_empty_sequence(folder: Path) -> None:
    scans(folder, "{p1,p2}_{t1,flair}.nii.gz")
    save_volume(folder / "p1_flair.nii.gz", np.zeros(SHAPE, np.int16))


def one_huge_voxel(folder: Path) -> None:
    scans(folder, "{p1,p2}.nii.gz")
    array = np.asarray(nib.load(folder / "p1.nii.gz").dataobj).copy()
    array[3, 3, 3] = 3e38
    save_volume(folder / "p1.nii.gz", array)


def pairs_of_hdr_and_img(folder: Path) -> None:
    scans(folder, "p1.nii.gz")
    nib.Nifti1Pair(np.ones(SHAPE, np.int16), np.eye(4)).to_filename(folder / "p2.img")


_COLOUR = {"channels": "red green blue", "layout": "folder2d"}

FILES: tuple[Situation, ...] = (
    (scale_factors_per_dicom_slice, Expected(2, 2)),
    (dicom_with_imager_pixel_spacing_only, Expected(1, 1)),
    (dicom_without_any_spacing, Expected(2, 2, check=1, done=1)),
    (dicom_slices_stored_twice, Expected(1, 1)),
    (photographs_with_an_exif_turn, Expected(2, 2, 2, classes="foreground", **_COLOUR)),
    (sform_without_voxel_sizes, Expected(2, 2, 2, classes="label_1")),
    (voxel_size_of_zero, Expected(2, 2, check=1, done=1)),
    (labels_with_a_scale_factor, Expected(2, 2, 2, classes="label_1 label_4")),
    (masks_that_were_jpeg, Expected(2, 2, 2, check=1, is_scored=False, **_COLOUR)),
    (masks_of_1_beside_masks_of_255, Expected(2, 2, 2, check=1, is_scored=False, **_COLOUR)),
    (layers_and_parts_of_3d_slicer, Expected(2, 2, 2, classes="label_1 label_2", trains=True)),
    (labels_above_255, Expected(2, 2, 2, check=1, is_scored=False)),
    (one_voxel_of_minus_1, Expected(2, 2, 2, classes="label_1", check=1, is_scored=False)),
    (one_hot_masks, Expected(2, 2, 2, check=1, is_scored=False)),
    (backslashes_in_dataset_json, Expected(2, 2, 2, channels="CT", classes="liver", layout="msd")),
    (an_empty_sequence, Expected(2, 2, channels="t1n t2f", check=1, done=1)),
    (one_huge_voxel, Expected(2, 2, check=1, done=1)),
    (pairs_of_hdr_and_img, Expected(1, 1, check=1, left_out=1)),
)
