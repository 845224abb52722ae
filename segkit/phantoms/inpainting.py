"""Phantoms in the folders of the BraTS local-synthesis challenge, with holes by its procedure.

A case has the five files of the challenge's training folders and no segmentation. The patients are those of the other
conventions. Phantoms show a whole head in few voxels, so the margin and the smallest tumour of the procedure shrink
with the size: 5 voxels of 240 are 1.3 of 64.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from segkit.phantoms.layouts import PHANTOM_LAYOUTS, require_empty
from segkit.phantoms.phantom import make_phantom
from segkit.preparing.holes import ChallengeRules, brain_mask, challenge_hole, tumour_components, unhealthy_region
from segkit.reading.files import write_image, write_labels
from segkit.shapes import AnyArray

_log = logging.getLogger(__name__)

_NAMES = PHANTOM_LAYOUTS["brats2023"]
"""Case names, orientation and origin are those of the year of the first such challenge."""
_HOLE_STREAM = 4
"""The stream of random numbers for the hole of a case; 0 to 3 make the phantom itself."""
_DONORS = range(1, 9)
"""The cases whose tumours give the shapes of all holes; fixed, so that a case does not depend on the others written."""


@dataclass(frozen=True)
class WrittenHoles:
    """The files of one case by their endings: t1n, t1n-voided, mask, mask-healthy, mask-unhealthy."""

    case: str
    number: int
    files: Mapping[str, Path]


def write_inpainting_phantoms(
    root: Path, numbers: Sequence[int], *, size: int = 64, seed: int = 0, rules: ChallengeRules | None = None
) -> list[WrittenHoles]:
    """Write the cases `numbers` of a seed below `root`, each with a healthy hole and one for its tumour.

    A healthy hole has the shape of the tumour of one of the first eight cases of the seed, written or not.

    Args:
        root: a new or empty folder.
        numbers: the cases.
        size: voxels along the first two axes.
        seed: another seed, other patients and other holes.
        rules: limits of the procedure; None scales those of the challenge to the size.

    Raises:
        RequestError: `root` holds something already, or the size is too small.
        DataError: a case has no room for a hole, the disk is full or `root` cannot be written to.
    """
    require_empty(root)
    rules = rules or ChallengeRules().scaled_to(size)
    pool = [
        shape
        for donor in (make_phantom(number, size=size, seed=seed) for number in _DONORS)
        for shape in tumour_components(donor.labels > 0, brain_mask(donor.images["t1n"]), rules)
    ]
    written = []
    for number in numbers:
        phantom = make_phantom(number, size=size, seed=seed)
        image, tumour = phantom.images["t1n"], phantom.labels > 0
        generator = np.random.default_rng((seed, number, _HOLE_STREAM))
        healthy = challenge_hole(brain_mask(image), tumour, pool, generator, rules)
        unhealthy = unhealthy_region(tumour, rules)
        hole = healthy | unhealthy
        arrays: dict[str, AnyArray] = {
            "t1n": image,
            "t1n-voided": np.where(hole, 0, image).astype(image.dtype),
            "mask": hole,
            "mask-healthy": healthy,
            "mask-unhealthy": unhealthy,
        }
        written.append(_write(root, number, arrays))
        _log.info("wrote phantom %s, %d of %d", written[-1].case, len(written), len(numbers))
    return written


def _write(root: Path, number: int, arrays: Mapping[str, AnyArray]) -> WrittenHoles:
    """Write the arrays (D, H, W) in RAS order of one case: booleans as masks of 0 and 1."""
    case = _NAMES.case.format(number=number)
    files = {ending: root / case / f"{case}-{ending}.nii.gz" for ending in arrays}
    for ending, array in arrays.items():
        turn, grid = _NAMES.place(array.shape)
        if array.dtype == np.bool_:
            write_labels(files[ending], turn.apply(array).astype(np.uint8), grid)
        else:
            write_image(files[ending], turn.apply(array), grid)
    return WrittenHoles(case, number, files)
