"""BraTS of every year, FeTS and UPENN-GBM: cases are recognised by their ids, at any depth of the folder.

A file belongs to a case if its name starts with a case id, or if a folder above it is named like one (such as
`BraTS20_Training_355/W39_1998.09.19_Segm.nii`).

Folders of the local-synthesis challenge have `<case>-t1n-voided` (0 in the region to fill) and `<case>-mask` (1 there);
in training folders also `<case>-t1n` (whole), `<case>-mask-healthy` and `<case>-mask-unhealthy`, whose union is the
mask. The layout `brats-inpainting` reads such a folder for checking and segmentation; `find_voided` and `find_known`
read it for inpainting, where the *reference* of a case is a hole (`HOLE_SCHEME`: 1) and its only modality is t1n.
"""

import re
import shlex
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from segkit.errors import DataError, Problem, warning
from segkit.labels import SCHEMES, LabelScheme, classes_scheme
from segkit.reading.case import (
    BRATS_MODALITIES,
    IGNORED,
    LABEL,
    Case,
    Cohort,
    ImageFile,
    in_channel_order,
    kind_of,
    split_name,
)
from segkit.reading.files import VOLUME_SUFFIXES, read_grid, suffix_of
from segkit.reading.geometry import repair_command, same_grid
from segkit.reading.layouts.layout import (
    FolderOptions,
    FoundFile,
    Layout,
    Listing,
    SchemeChoice,
    bare_name,
    build_cases,
    build_cohort,
    list_images,
    unused_files,
)
from segkit.reading.layouts.schemes import CONVENTIONS, Convention, patient_of, values_of
from segkit.reading.volume import list_folder

SYNTHESIS_LAYOUT = "brats-inpainting"
"""The name of local-synthesis folders in the table of layouts."""
HOLE_SCHEME: LabelScheme = classes_scheme("hole", {"hole": 1})
"""1 where voxels are missing, or have no healthy ground truth."""

_WHOLE, _VOIDED, _MASK, _UNHEALTHY = "t1n", "t1n-voided", "mask", "mask-unhealthy"
_INPAINTING_KINDS = (_VOIDED, _MASK, "mask-healthy", _UNHEALTHY)
"""Files of the inpainting task beside the images: part of `Case.images`, but not input channels."""
_SYNTHESIS_NAME = re.compile(
    r"^(?P<case>.+?)[-_](?P<kind>t1n-voided|t1n|mask-unhealthy|mask-healthy|mask)$", re.IGNORECASE
)
_SYNTHESIS_FILES = "CASE-t1n-voided.nii.gz and CASE-mask.nii.gz"
_OTHER_HOLES = "Give the holes of other scans by a mask of their own"
_ALGORITHM_MASK = "algorithm mask"
"""The kind of a segmentation named after an algorithm (`seg-<algorithm>`), never an expert reference."""
_REFERENCE_WORDS = frozenset({"seg", "segm", "segmentation", "gtv", "ot", "otmulticlass"})
"""BraTS names of expert references; a `_mask` or `_label` may be of the brain, or of anything else."""
_GRADES = frozenset({"hgg", "lgg"})
"""Folders of 2012-2019; the files of one case may be in both."""
_GLIOMA_TIMEPOINT = re.compile(r"^BraTS-GLI-\d+-(\d{3})$", re.IGNORECASE)
_POST_TREATMENT = 100
"""BraTS-GLI time points from 100 on are scans after treatment (2024 and later)."""


def _recognise(convention: Convention, listing: Listing) -> float:
    """The share of the volumes that belong to the convention's cases."""
    files = _find_files(convention, listing.volumes)
    is_synthesis = any(file.kind == _VOIDED for file in files)
    if not files or is_synthesis != (convention.name == SYNTHESIS_LAYOUT):
        return 0.0
    share = len(files) / len(listing.volumes)
    timepoints = [match for file in files if (match := _GLIOMA_TIMEPOINT.match(file.case_id))]
    is_post_treatment = any(int(match[1]) >= _POST_TREATMENT for match in timepoints)
    if convention.name == "brats2024":
        return share if is_post_treatment else 0.0
    if convention.name == "brats2023":
        is_one_kind = len({file.case_id.split("-")[1].upper() for file in files}) == 1
        return share * (0.9 if not is_one_kind or is_post_treatment else 0.95)
    # brats2023-ped has the names of brats-ped and is chosen with --layout only.
    return share * 0.9 if convention.name == "brats2023-ped" else share


def _read(convention: Convention, listing: Listing, options: FolderOptions) -> Cohort:
    files = _find_files(convention, listing.volumes)
    masks = listing.root.parent / "images_segm"  # of UPENN-GBM, beside the root `images_structural`
    is_half = convention.name == "upenn" and listing.root.name == "images_structural" and masks.is_dir()
    if is_half and not any(file.kind == LABEL for file in files):
        files += _find_files(convention, list_images(masks).volumes)
    foreign = () if convention.name == "upenn" else _foreign_references(files)
    used = [file for file in files if file.kind != _ALGORITHM_MASK and file.image.path not in foreign]
    cases, problems = build_cases(used, patient_of=patient_of, order=_channel_order)
    cases = _with_algorithm_masks(cases, files, listing.root)
    known = {file.image.path for file in files}
    if strays := [path for path in listing.volumes if path not in known]:
        problems.append(unused_files(strays, f"names that {convention.name} does not use", cases=cases))
    if ignored := [file.image.path for file in files if file.kind == IGNORED]:
        remedy = "If they are expert references, name them like one (CASE-seg or CASE_seg)"
        problems.append(unused_files(ignored, "neither an image nor a reference (brain masks?)", remedy))
    if foreign:
        remedy = "Move expert references into the folder of their case"
        problems.append(unused_files(foreign, "masks outside the folder of their case (predictions?)", remedy))
    modalities = in_channel_order(kind for case in cases for kind in case.images)
    absent = [modality for modality in BRATS_MODALITIES if modality not in modalities]
    if convention.has_four_modalities and absent and cases:
        remedy = "Training uses the modalities that exist; a model of four modalities needs --allow-missing"
        problems.append(warning(listing.root, f"no case has {', '.join(absent)}", remedy))
    channels = [kind for kind in modalities if kind not in _INPAINTING_KINDS]
    channels = channels or [kind for kind in modalities if kind == _VOIDED]
    choice = _choose_scheme(convention, cases, options, listing.root)
    return build_cohort(listing, convention.name, cases, choice, modalities=channels, problems=problems)


def _find_files(convention: Convention, paths: Iterable[Path]) -> list[FoundFile]:
    pattern = re.compile(convention.case_pattern, re.IGNORECASE)
    kinds = _INPAINTING_KINDS if convention.name == SYNTHESIS_LAYOUT else (_VOIDED,)
    found = (_find_file(pattern, path, kinds) for path in paths)
    return [file for file in found if file is not None]


def _find_file(pattern: re.Pattern[str], path: Path, synthesis_kinds: Collection[str]) -> FoundFile | None:
    folder = next((above for above in path.parents[:2] if pattern.fullmatch(above.name)), None)
    stem = bare_name(path)
    is_leading = False
    if match := re.match(rf"({pattern.pattern})[-_.]+(.+)$", stem, re.IGNORECASE):
        case_id, word = match.group(1), match.group(2).lower()
        kind = word if word in synthesis_kinds else kind_of(word)
        folder = folder if folder is not None and folder.name == case_id else path.parent
    elif folder is not None:
        case_id, parts = folder.name, split_name(stem)
        kind, word, is_leading = parts.kind, parts.word, parts.is_leading
    else:
        return None
    if kind == LABEL:
        kind = IGNORED if word not in _REFERENCE_WORDS else _ALGORITHM_MASK if is_leading else LABEL
    return None if kind is None else FoundFile(case_id, folder, kind, ImageFile(path))


def _foreign_references(files: Sequence[FoundFile]) -> list[Path]:
    """References in another folder than the images of their case: they may be predictions."""
    image_folders: dict[str, set[Path]] = defaultdict(set)
    for file in files:
        if file.kind not in (LABEL, IGNORED, _ALGORITHM_MASK):
            image_folders[file.case_id].add(file.folder)

    def is_foreign(file: FoundFile) -> bool:
        own = image_folders.get(file.case_id)
        if file.kind != LABEL or not own or file.folder in own:
            return False
        folders = (file.folder, *own)
        return not all(folder.name == file.case_id and folder.parent.name.lower() in _GRADES for folder in folders)

    return [file.image.path for file in files if is_foreign(file)]


def _channel_order(kinds: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(in_channel_order(kinds), key=lambda kind: kind in _INPAINTING_KINDS))


def _choose_scheme(convention: Convention, cases: Sequence[Case], options: FolderOptions, where: Path) -> SchemeChoice:
    if options.label_scheme is not None:
        return SchemeChoice(options.label_scheme)
    is_labelled = any(case.label is not None for case in cases)
    if convention.name == "brats2023-met" and is_labelled and 4 in values_of(cases, stop_at=4):
        return SchemeChoice(SCHEMES["brats2024"])
    if convention.name != "brats-ped" or options.layout == convention.name:
        return SchemeChoice(SCHEMES[convention.scheme])
    # Only value 4 distinguishes BraTS-PED 2024 and later from 2023.
    both = "--label-scheme brats-ped (2024 and later) or --label-scheme brats2023"
    if not is_labelled:
        note = "the names of BraTS-PED fit two label schemes, that of 2023 and that of 2024 and later"
        return SchemeChoice(None, (warning(where, note, f"To fix the scheme pass {both}"),))
    if 4 not in values_of(cases, stop_at=4):
        note = (
            "no reference of BraTS-PED holds value 4, so that labels may be those of 2023 (1 NCR, 2 ED, 3 ET) or those "
            "of 2024 and later (1 ET, 2 NET, 3 CC) without any edema"
        )
        return SchemeChoice(None, (Problem(str(where), note, f"Choose {both}"),))
    return SchemeChoice(SCHEMES["brats-ped"])


def _with_algorithm_masks(cases: Sequence[Case], files: Iterable[FoundFile], root: Path) -> list[Case]:
    masks: dict[str, list[Path]] = defaultdict(list)
    for file in files:
        if file.kind == _ALGORITHM_MASK:
            masks[file.case_id].append(file.image.path)
    return [replace(case, problems=(*case.problems, *_mask_problems(case, masks[case.id], root))) for case in cases]


def _mask_problems(case: Case, paths: Sequence[Path], root: Path) -> list[Problem]:
    """Which masks have lost their geometry, and where there is no reference, which ones could be copied as one."""
    misfits: dict[Path, str] = {}
    for path in paths if case.images else ():
        with suppress(DataError):  # the check reads the image itself and reports it
            if reason := same_grid(read_grid(path), read_grid(next(iter(case.images.values())).path)):
                misfits[path] = reason
    good = [path for path in paths if path not in misfits]
    remedy = f"Repair a copy with `{repair_command(root)}`, or leave it out"
    problems = [
        warning(path, f"segmentation by an algorithm whose geometry is lost: {reason}", remedy)
        for path, reason in misfits.items()
    ]
    if case.label is None and good:
        target = good[0].with_name(f"{case.id}-seg.nii.gz")
        copy = f"cp {shlex.quote(str(good[0]))} {shlex.quote(str(target))}"
        names = ", ".join(path.name for path in good)
        found = f"no expert reference (-seg); {len(good)} algorithm segmentation(s) found, which are not used: {names}"
        remedy = f"To train on one all the same, copy it to the name of a reference: `{copy}`"
        problems.insert(0, warning(paths[0].parent, found, remedy))
    return problems


def find_voided(root: Path, *, exclude: Path | None = None) -> Cohort:
    """The voided scans of a data folder, one case folder or one file, each with the mask of its hole.

    `exclude` is a folder below `root` to leave out. A case without a mask carries a fatal problem. Raises DataError
    where there is no voided scan.
    """
    return _find_holes(Path(root), exclude, lambda found: (_VOIDED, _MASK), "no voided scan")


def find_known(root: Path) -> Cohort:
    """The training scans of a data folder or case folder, each with the region without healthy ground truth.

    The image is the whole scan if it exists, else the voided one; the region is the unhealthy mask of a whole scan,
    else the mask, which is at least as large. A case without any mask carries a fatal problem. Raises DataError where
    there are neither whole nor voided scans.
    """

    def pair(found: Collection[str]) -> tuple[str, str]:
        is_whole = _WHOLE in found
        return _WHOLE if is_whole else _VOIDED, _UNHEALTHY if is_whole and _UNHEALTHY in found else _MASK

    return _find_holes(Path(root), None, pair, "neither a whole nor a voided scan")


def _find_holes(
    root: Path, exclude: Path | None, pair: Callable[[Collection[str]], tuple[str, str]], nothing: str
) -> Cohort:
    """A cohort of images and holes; `pair` chooses both among the kinds of files that a case has.

    Case ids may have any form. Other files of the folder (t1c, segmentations) are ignored.
    """
    listing = list_images(root, exclude)
    if listing.only is not None:
        listing = replace(listing, volumes=_files_of_case(listing.only))
    by_case: dict[tuple[str, Path], dict[str, ImageFile]] = defaultdict(dict)
    for path in listing.volumes:
        if match := _SYNTHESIS_NAME.match(bare_name(path)):  # of .nii and .nii.gz, the first
            by_case[match["case"], path.parent].setdefault(match["kind"].lower(), ImageFile(path))
    files = [
        FoundFile(case_id, folder, kind, found[name])
        for (case_id, folder), found in by_case.items()
        for name, kind in zip(pair(found), (_WHOLE, LABEL), strict=True)
        if name in found
    ]
    cases, problems = build_cases(files, patient_of=patient_of)
    if not cases:
        found = f"{nothing} is there; the folder holds {len(listing.images)} images"
        raise DataError(found, where=listing.only or listing.root, expected=_SYNTHESIS_FILES, remedy=_OTHER_HOLES)
    for index, case in enumerate(cases):
        if case.label is None:
            remedy = f"Add {case.id}-mask.nii.gz, 1 in the hole"
            problem = Problem(str(case.images[_WHOLE].path.parent), f"case {case.id} has no mask", remedy)
            cases[index] = replace(case, problems=(*case.problems, problem))
    return build_cohort(listing, SYNTHESIS_LAYOUT, cases, SchemeChoice(HOLE_SCHEME), problems=problems)


def _files_of_case(scan: Path) -> tuple[Path, ...]:
    match = _SYNTHESIS_NAME.match(bare_name(scan))
    if match is None or match["kind"].lower() not in (_WHOLE, _VOIDED):
        found = "this is not the scan of a case of BraTS local synthesis"
        raise DataError(found, where=scan, expected=_SYNTHESIS_FILES, remedy=_OTHER_HOLES)
    volumes = [path for path in list_folder(scan.parent)[1] if suffix_of(path) in VOLUME_SUFFIXES]
    names = {path: _SYNTHESIS_NAME.match(bare_name(path)) for path in volumes}
    return tuple(path for path, other in names.items() if other and other["case"] == match["case"])


BRATS_LAYOUTS: dict[str, Layout] = {
    one.name: Layout(one.name, one.description, one.example, partial(_recognise, one), partial(_read, one))
    for one in CONVENTIONS
}
