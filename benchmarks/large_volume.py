"""Made-up CT of 25 organs: a small training set at 1.5 mm, and one volume of 512 x 512 x 600 voxels at 0.8 mm.

    python benchmarks/large_volume.py OUT

writes OUT/Dataset501_CT (nnU-Net's layout, six cases), OUT/large/large_0000.nii.gz and its reference
OUT/reference/large.nii.gz. docs/benchmarks.md says what they are used for.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import nibabel as nib
import numpy as np

ORGANS = 25
NOISE_HU = 8


def make_volume(shape: tuple[int, int, int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Hounsfield units (D, H, W) int16 of a cylindrical body with ellipsoids in it, and their labels 1 to 25, uint8."""
    rng, anatomy = np.random.default_rng(seed), np.random.default_rng(0)
    axes = [(np.arange(size) + 0.5) / size * 2 - 1 for size in shape]
    inside = (axes[0][:, None] / 0.92) ** 2 + (axes[1][None] / 0.85) ** 2 < 1
    image = np.full(shape, -1000, np.int16)
    image[inside] = 20
    labels = np.zeros(shape, np.uint8)
    centres, radii = anatomy.uniform(-0.55, 0.55, (ORGANS, 3)), anatomy.uniform(0.14, 0.24, (ORGANS, 3))
    centres[:, 2] *= 1.4
    for organ in range(ORGANS):
        centre, radius = centres[organ] + rng.normal(0, 0.03, 3), radii[organ] * rng.uniform(0.9, 1.1, 3)
        first = np.maximum((centre - radius + 1) / 2 * shape, 0).astype(int)
        last = np.minimum((centre + radius + 1) / 2 * shape + 1, shape).astype(int)
        box = tuple(slice(start, stop) for start, stop in zip(first, last, strict=True))
        distances = [((axes[axis][box[axis]] - centre[axis]) / radius[axis]) ** 2 for axis in range(3)]
        hit = distances[0][:, None, None] + distances[1][:, None] + distances[2] < 1
        labels[box][hit] = organ + 1
        image[box][hit] = 60 + 40 * organ
    for index in range(shape[2]):
        image[:, :, index] += rng.normal(0, NOISE_HU, shape[:2]).astype(np.int16)
    return image, labels


def save(path: Path, array: np.ndarray, spacing_mm: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.diag([spacing_mm, spacing_mm, spacing_mm, 1.0])), path)


def main(out: Path) -> None:
    data = out / "Dataset501_CT"
    for number in range(6):
        image, labels = make_volume((128, 128, 144), seed=number + 1)
        save(data / "imagesTr" / f"ct_{number:03d}_0000.nii.gz", image, 1.5)
        save(data / "labelsTr" / f"ct_{number:03d}.nii.gz", labels, 1.5)
    values = {"background": 0, **{f"organ{organ}": organ for organ in range(1, ORGANS + 1)}}
    document = {"channel_names": {"0": "CT"}, "labels": values, "numTraining": 6, "file_ending": ".nii.gz"}
    (data / "dataset.json").write_text(json.dumps(document, indent=1), encoding="utf-8")
    image, labels = make_volume((512, 512, 600), seed=99)
    save(out / "large" / "large_0000.nii.gz", image, 0.8)
    save(out / "reference" / "large.nii.gz", labels, 0.8)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
