"""Folders of tiny scans, masks and pictures, made from names with braces: `p{1,2}_{t1,flair}` are four files.

A brace that occurs twice in a name stands for the same text: `p{1,2}/p{1,2}_t1` are two files.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import nibabel as nib
import numpy as np
import PIL.Image
import SimpleITK as sitk  # noqa: N813
from numpy.typing import NDArray

SHAPE = (12, 10, 8)
PICTURES = (".png", ".jpg", ".tif", ".bmp", ".gif", ".ppm")


@dataclass(frozen=True)
class Expected:
    """What becomes of a folder: its cases, patients, references, channels and classes, and what is left out.

    `check` is the exit code of `segkit check`, `left_out` the number of images that belong to no case, `done` that of
    the masks that `segkit infer` writes (None: one for each case). `trains`: a training is tried as well; `is_scored`:
    the masks are compared with the references.
    """

    cases: int
    patients: int
    references: int = 0
    channels: str = "image"
    classes: str = ""
    layout: str = "folder"
    check: int = 0
    left_out: int = 0
    done: int | None = None
    trains: bool = False
    is_scored: bool = True


Situation = tuple[Callable[[Path], object], Expected]


def scans(folder: Path, *names: str, shape: tuple[int, ...] = SHAPE) -> None:
    """Write scans: noise around 100 in (12, 10, 8) voxels of 1 mm, or colour pictures."""
    for path in (folder / name for pattern in names for name in expand(pattern)):
        noise = np.random.default_rng(crc32(path.name.encode())).normal(100, 20, shape)
        if path.suffix in PICTURES:
            save_picture(path, np.repeat(noise[..., :1], 3, axis=2).clip(0, 255).astype(np.uint8))
        else:
            save_volume(path, noise.astype(np.float32))


def masks(folder: Path, *names: str, value: int = 1, shape: tuple[int, ...] = SHAPE) -> None:
    """Write masks with one box of 4 x 4 x 4 voxels, or of 4 x 4 pixels, that holds `value`."""
    for path in (folder / name for pattern in names for name in expand(pattern)):
        mask = np.zeros(shape, np.uint8)
        mask[2:6, 2:6, 2:6] = value
        save_picture(path, mask[..., 3]) if path.suffix in PICTURES else save_volume(path, mask)


def expand(pattern: str) -> list[str]:
    """All names that a pattern with braces stands for."""
    names = [pattern]
    for brace in dict.fromkeys(re.findall(r"\{[^}]*\}", pattern)):
        names = [name.replace(brace, text) for name in names for text in brace[1:-1].split(",")]
    return names


def save_picture(path: Path, array: NDArray[np.uint8]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(array).save(path)


def save_volume(path: Path, array: NDArray[np.generic], affine: NDArray[np.float64] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in (".nii", ".gz", ".mgz"):
        nib.Nifti1Image(array, np.eye(4) if affine is None else affine).to_filename(path)
    else:
        image = sitk.GetImageFromArray(array.T)
        image.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))  # RAS, as the identity is for NIfTI
        sitk.WriteImage(image, str(path))
