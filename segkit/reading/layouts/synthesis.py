"""Folders of the BraTS local-synthesis challenge, read for inpainting.

A case has `<case>-t1n-voided` (0 in the region to fill) and `<case>-mask` (1 there); in training folders also
`<case>-t1n` (whole), `<case>-mask-healthy` and `<case>-mask-unhealthy`, whose union is the mask. The layout
`brats-inpainting` of the table reads such a folder for checking and segmentation. For inpainting, the *reference* of a
case is a hole (`HOLE_SCHEME`: 1) and its only modality is t1n:

- `find_voided`, for filling: the image is the voided scan, the hole is the mask;
- `find_known`, for training: the image is the whole scan if it exists, else the voided one; the hole is the region
  without healthy ground truth: the unhealthy mask of a whole scan, else the mask, which is at least as large.

Case ids may have any form. Other files of the folder (t1c, segmentations) are ignored.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from segkit.errors import DataError, Problem
from segkit.labels import LabelScheme, classes_scheme
from segkit.reading.case import LABEL, Cohort, ImageFile
from segkit.reading.files import VOLUME_SUFFIXES, suffix_of
from segkit.reading.layouts.layout import FoundFile, SchemeChoice, build_cases, build_cohort
from segkit.reading.layouts.listing import Listing, bare_name, list_images
from segkit.reading.layouts.schemes import patient_of
from segkit.reading.volume import list_folder

SYNTHESIS_LAYOUT = "brats-inpainting"
"""The name of such folders in the table of layouts."""

HOLE_SCHEME: LabelScheme = classes_scheme("hole", {"hole": 1})
"""1 where voxels are missing, or have no healthy ground truth."""

_MODALITY = "t1n"
_WHOLE, _VOIDED, _MASK, _UNHEALTHY = "t1n", "t1n-voided", "mask", "mask-unhealthy"
_NAME = re.compile(r"^(?P<case>.+?)[-_](?P<kind>t1n-voided|t1n|mask-unhealthy|mask-healthy|mask)$", re.IGNORECASE)
_EXPECTED = "CASE-t1n-voided.nii.gz and CASE-mask.nii.gz"


def find_voided(root: Path, *, exclude: Path | None = None) -> Cohort:
    """The voided scans of a data folder, one case folder or one file, each with the mask of its hole.

    `exclude` is a folder below `root` to leave out. A case without a mask carries a fatal problem.

    Raises:
        DataError: nothing there, or no voided scan.
    """
    listing = _list(Path(root), exclude)
    files = [
        FoundFile(case_id, folder, kind, found[name])
        for (case_id, folder), found in _by_case(listing.volumes).items()
        for name, kind in ((_VOIDED, _MODALITY), (_MASK, LABEL))
        if name in found
    ]
    return _as_cohort(listing, files, "no voided scan")


def find_known(root: Path, *, exclude: Path | None = None) -> Cohort:
    """The training scans of a data folder or case folder, each with the region without healthy ground truth.

    `exclude` is a folder below `root` to leave out. A case without any mask carries a fatal problem.

    Raises:
        DataError: nothing there, or neither whole nor voided scans.
    """
    listing = _list(Path(root), exclude)
    files = []
    for (case_id, folder), found in _by_case(listing.volumes).items():
        image = _WHOLE if _WHOLE in found else _VOIDED
        hole = _UNHEALTHY if image == _WHOLE and _UNHEALTHY in found else _MASK
        files += [
            FoundFile(case_id, folder, kind, found[name])
            for name, kind in ((image, _MODALITY), (hole, LABEL))
            if name in found
        ]
    return _as_cohort(listing, files, "neither a whole nor a voided scan")


def _list(root: Path, exclude: Path | None) -> Listing:
    """The files below a folder; for one file, those of its case in the same folder."""
    if not root.is_file():
        return list_images(root, exclude)
    match = _NAME.match(bare_name(root))
    if match is None or match["kind"].lower() not in (_WHOLE, _VOIDED):
        raise DataError(
            "this is not the scan of a case of BraTS local synthesis",
            where=root,
            expected="CASE-t1n-voided.nii.gz beside CASE-mask.nii.gz",
            remedy="Give the holes of other scans by a mask of their own",
        )
    listing = list_images(root)
    volumes = [path for path in list_folder(listing.root)[1] if suffix_of(path) in VOLUME_SUFFIXES]
    own = [path for path in volumes if (other := _NAME.match(bare_name(path))) and other["case"] == match["case"]]
    return replace(listing, volumes=tuple(own))


def _by_case(paths: Iterable[Path]) -> Mapping[tuple[str, Path], dict[str, ImageFile]]:
    """The files of each case and folder by kind; the first one where two differ in suffix only (.nii and .nii.gz)."""
    cases: dict[tuple[str, Path], dict[str, ImageFile]] = defaultdict(dict)
    for path in paths:
        if match := _NAME.match(bare_name(path)):
            cases[match["case"], path.parent].setdefault(match["kind"].lower(), ImageFile(path))
    return cases


def _as_cohort(listing: Listing, files: Iterable[FoundFile], nothing: str) -> Cohort:
    cases, problems = build_cases(files, patient_of=patient_of)
    if not cases:
        raise DataError(
            f"{nothing} is there; the folder holds {len(listing.images)} images",
            where=listing.only or listing.root,
            expected=_EXPECTED,
            remedy="Give the holes of other scans by a mask of their own",
        )
    for index, case in enumerate(cases):
        if case.label is None:
            folder = str(next(iter(case.images.values())).path.parent)
            problem = Problem(folder, f"case {case.id} has no mask", f"Add {case.id}-mask.nii.gz, 1 in the hole")
            cases[index] = replace(case, problems=(*case.problems, problem))
    return build_cohort(listing, SYNTHESIS_LAYOUT, cases, SchemeChoice(HOLE_SCHEME), problems=problems)
