"""Does uncertainty show where a mask is wrong?

    segkit infer -m RUN -i DATA -o OUT --uncertainty --cases IDS
    python benchmarks/uncertainty.py OUT REFERENCES

prints, over all cases, the area under the ROC curve of the entropy as a test for wrong voxels: the probability that a
wrong voxel is more uncertain than a right one. Over whole volumes this is easy, for most of a volume is background far
from anything; so it is also printed for the voxels within 3 voxels of mask or reference.
"""

from __future__ import annotations

import sys
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy.ndimage import binary_dilation
from scipy.stats import rankdata

NEAR = 3


def area(scores: np.ndarray, is_wrong: np.ndarray) -> float:
    """Area under the ROC curve, ties counted half (Mann and Whitney's U by the number of pairs)."""
    ranks = rankdata(scores)
    wrong = int(is_wrong.sum())
    return float((ranks[is_wrong].sum() - wrong * (wrong + 1) / 2) / (wrong * (len(scores) - wrong)))


def main(out: Path, references: Path) -> None:
    rows: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {"whole volumes": [], f"within {NEAR} voxels": []}
    for path in sorted(out.glob("*.nii.gz")):
        mask, reference = (np.asarray(nib.load(file).dataobj) for file in (path, references / path.name))
        entropy = nib.load(out / "uncertainty" / path.name.replace(".nii.gz", "_entropy.nii.gz")).get_fdata()
        near = binary_dilation((mask > 0) | (reference > 0), iterations=NEAR)
        for name, chosen in zip(rows, (np.ones_like(near), near), strict=True):
            rows[name].append((entropy[chosen], (mask != reference)[chosen]))
    for name, cases in rows.items():
        scores, is_wrong = (np.concatenate(parts) for parts in zip(*cases, strict=True))
        each = [area(*case) for case in cases if case[1].any()]
        print(
            f"{name}: AUROC {area(scores, is_wrong):.3f} over all voxels, {np.mean(each):.3f} mean over "
            f"{len(each)} cases ({is_wrong.mean():.1%} of {len(scores):,} voxels wrong)"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
