"""A network whose masks can be told by eye, and scans like flights of stairs to give it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from segkit.config.base import Config

MakeRun = Callable[..., Path]


class StepsConfig(Config):
    kind: Literal["above", "nearest"] = "above"


class Steps(nn.Module):
    """Logit k of the sum s of all channels: "above" 10 (s - k - 0.5); "nearest" -|s - k|. `bias` is added."""

    def __init__(self, config: StepsConfig, in_channels: int, out_channels: int, dims: int) -> None:
        super().__init__()
        self.kind = config.kind
        self.register_buffer("bias", torch.zeros(1))
        self.register_buffer("steps", torch.arange(out_channels, dtype=torch.float32).view(-1, *(1,) * dims))

    def forward(self, patches: Tensor) -> Tensor | list[Tensor]:
        total = patches.sum(1, keepdim=True)
        logits = 10 * (total - self.steps - 0.5) if self.kind == "above" else -(total - self.steps).abs()
        return [logits + self.bias] if self.training else logits + self.bias


LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
BRATS_SUFFIXES = {"t1n": "t1", "t1c": "t1ce", "t2w": "t2", "t2f": "flair"}


def write_nifti(path: Path, values: ArrayLike, affine: ArrayLike = LPS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(np.asarray(values, np.float32), np.asarray(affine, np.float64))
    image.set_sform(image.affine, code=4)
    image.set_qform(image.affine, code=1)
    nib.save(image, path)
    return path


def read_nifti(path: Path) -> tuple[nib.Nifti1Image, np.ndarray[Any, np.dtype[np.uint8]]]:
    image = nib.load(path)
    return image, np.asarray(image.dataobj)


def write_case(folder: Path, case_id: str, images: Mapping[str, ArrayLike], affine: ArrayLike = LPS) -> Path:
    """A case in the naming of BraTS 2021."""
    for modality, values in images.items():
        write_nifti(folder / case_id / f"{case_id}_{BRATS_SUFFIXES[modality]}.nii.gz", values, affine)
    return folder / case_id


def stairs(shape: tuple[int, ...] = (6, 5, 4)) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Intensity 1, 2, 3 on three slabs along the first axis, 0 around them: labels 2, 1, 4 in BraTS 2017."""
    values = np.zeros(shape, np.float32)
    values[1:4] = np.arange(1, 4).reshape(3, *(1,) * (len(shape) - 1))
    return values


def stairs_labels(
    shape: tuple[int, ...] = (6, 5, 4), painted: tuple[int, int, int] = (2, 1, 4)
) -> np.ndarray[Any, Any]:
    labels = np.zeros(shape, np.uint8)
    labels[1:4] = np.asarray(painted).reshape(3, *(1,) * (len(shape) - 1))
    return labels
