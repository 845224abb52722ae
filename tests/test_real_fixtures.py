"""The real fixtures of tests/data/real: small, with a named source, and what their script makes of the originals."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import nibabel as nib
import numpy as np
import PIL.Image
import pytest

LOCAL = ("brats", "deepmedic", "sri24", "met")  # of data sets that may not be redistributed


def files_below(folder: Path) -> list[Path]:
    inside = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return sorted(path.relative_to(folder) for path in inside if path.parent != folder)


def test_they_are_small_and_their_sources_are_named(real_data: Path) -> None:
    files = files_below(real_data)
    readme = (real_data / "README.md").read_text(encoding="utf-8")
    assert sum((real_data / file).stat().st_size for file in files) < 2e6
    assert all(f"`{folder}" in readme for folder in {file.parts[0] for file in files})
    assert not [file for file in files if str(file).lower().startswith(LOCAL)]


def contents(path: Path) -> np.ndarray:
    """Voxels and affine, pixels, or bytes."""
    if path.name.endswith((".nii.gz", ".mgz")):
        image = nib.load(path)
        return np.concatenate([np.ravel(image.dataobj), np.ravel(image.affine)])
    if path.suffix == ".dcm":
        return np.asarray(pytest.importorskip("pydicom").dcmread(path).pixel_array)
    if path.suffix in (".gif", ".jpg", ".png"):
        with PIL.Image.open(path) as picture:
            return np.asarray(picture)
    return np.frombuffer(path.read_bytes(), np.uint8)


def test_the_script_makes_them_from_the_originals(real_data: Path, shared_data: Path, tmp_path: Path) -> None:
    pytest.importorskip("pydicom")
    specification = importlib.util.spec_from_file_location("make_real", real_data / "make.py")
    assert specification is not None
    assert specification.loader is not None
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    script.main(shared_data, tmp_path)
    assert files_below(tmp_path) == files_below(real_data)
    for file in files_below(tmp_path):
        assert np.array_equal(contents(tmp_path / file), contents(real_data / file)), file
