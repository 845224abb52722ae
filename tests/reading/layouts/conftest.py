"""Tiny volumes on disk: the contents matter only where a test says so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest


@pytest.fixture
def volume(tmp_path: Path) -> Callable[..., Path]:
    """Write a 4x4x4 volume below tmp_path whose first voxels hold `values`, the others 0."""

    def write(name: str, values: Sequence[float] = (5,), channels: int = 1) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        array = np.zeros((4, 4, 4), np.int16)
        array.reshape(-1)[: len(values)] = values
        if channels > 1:
            array = np.stack([array] * channels, axis=-1)
        nib.Nifti1Image(array, np.eye(4)).to_filename(path)
        return path

    return write
