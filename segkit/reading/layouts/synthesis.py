"""The folders of the BraTS local-synthesis challenge, seen as scans with holes.

A case has `<case>-t1n-voided` (0 where tissue is to be made up) and `<case>-mask` (1 there); in training folders also
`<case>-t1n` (whole), `<case>-mask-healthy` and `<case>-mask-unhealthy`, whose union is the mask. In the table of
layouts such a folder is `brats-inpainting`, which serves to check and to segment it. Inpainting needs other views of
it, in which the *reference* of a case is a hole (`HOLE_SCHEME`: 1) and its one modality is t1n:

- `find_voided`, to fill holes: the image is the voided scan, the hole is the mask;
- `find_known`, to learn from: the image is the whole scan if it is there, else the voided one; the hole is what nobody
  knows the healthy truth of: of a whole scan the unhealthy mask, of a voided one the mask. Where a whole scan has no
  unhealthy mask the mask is taken, which is at least as large.

Any case name will do, for the endings tell. Other files of the folder (t1c, segmentations) are not looked at.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from segkit.errors import DataError, Problem
from segkit.labels import LabelScheme, classes_scheme
from segkit.reading.case import Case, Cohort, ImageFile
from segkit.reading.files import VOLUME_SUFFIXES, suffix_of
from segkit.reading.layouts.layout import FoundFile, SchemeChoice, build_cases, build_cohort
from segkit.reading.layouts.listing import Listing, bare_name, list_images
from segkit.reading.layouts.schemes import patient_of
from segkit.reading.modalities import LABEL

SYNTHESIS_LAYOUT = "brats-inpainting"
"""The name of the layout that such folders have in the table of layouts."""

HOLE_SCHEME: LabelScheme = classes_scheme("hole", {"hole": 1})
"""The values of a mask: 1 where voxels are missing, or where their truth is not known."""

_MODALITY = "t1n"
_WHOLE, _VOIDED, _MASK, _UNHEALTHY = "t1n", "t1n-voided", "mask", "mask-unhealthy"
_NAME = re.compile(r"^(?P<case>.+?)[-_](?P<kind>t1n-voided|t1n|mask-unhealthy|mask-healthy|mask)$", re.IGNORECASE)
_EXPECTED = "CASE-t1n-voided.nii.gz and CASE-mask.nii.gz"


def find_voided(root: Path, *, exclude: Path | None = None) -> Cohort:
    """The scans with holes of a data folder, one case folder or one voided file, each with the mask of its hole.

    `exclude` is a folder below `root` of which nothing is read. A case without a mask carries a fatal problem.

    Raises:
        DataError: nothing there, or no voided scan.
    """
    listing = _list(Path(root), exclude)
    files = [
        FoundFile(case_id, folder, kind, found[name])
        for (case_id, folder), found in _sort(listing.volumes).items()
        for name, kind in ((_VOIDED, _MODALITY), (_MASK, LABEL))
        if name in found
    ]
    return _as_cohort(listing, files, "no voided scan")


def find_known(root: Path, *, exclude: Path | None = None) -> Cohort:
    """The scans of a data folder or case folder to learn from, each with the hole of which the truth is not known.

    `exclude` is a folder below `root` of which nothing is read. A case without any mask carries a fatal problem.

    Raises:
        DataError: nothing there, or neither whole nor voided scans.
    """
    listing = _list(Path(root), exclude)
    files = []
    for (case_id, folder), found in _sort(listing.volumes).items():
        image = _WHOLE if _WHOLE in found else _VOIDED
        hole = _UNHEALTHY if image == _WHOLE and _UNHEALTHY in found else _MASK
        files += [
            FoundFile(case_id, folder, kind, found[name])
            for name, kind in ((image, _MODALITY), (hole, LABEL))
            if name in found
        ]
    return _as_cohort(listing, files, "neither a whole nor a voided scan")


def _list(root: Path, exclude: Path | None) -> Listing:
    """The files below a folder; of one file those of its case beside it."""
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
    beside = (path for path in listing.root.glob("[!.]*") if suffix_of(path) in VOLUME_SUFFIXES)
    return replace(listing, volumes=tuple(sorted(path for path in beside if _case_of(path) == match["case"])))


def _case_of(path: Path) -> str | None:
    match = _NAME.match(bare_name(path))
    return match["case"] if match else None


def _sort(paths: Iterable[Path]) -> Mapping[tuple[str, Path], dict[str, ImageFile]]:
    """The files of each case and folder by their ending; of two with one ending (.nii and .nii.gz) the first."""
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
    checked = [case if case.label is not None else _without_mask(case) for case in cases]
    return build_cohort(listing, SYNTHESIS_LAYOUT, checked, SchemeChoice(HOLE_SCHEME), problems=problems)


def _without_mask(case: Case) -> Case:
    image = next(iter(case.images.values())).path
    problem = Problem(str(image.parent), f"case {case.id} has no mask", f"Add {case.id}-mask.nii.gz, 1 in the hole")
    return replace(case, problems=(*case.problems, problem))
