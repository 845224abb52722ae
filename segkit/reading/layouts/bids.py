"""BIDS: sub-*/[ses-*/]anat/*_T1w with contrast agents as `ce-`, and references, often in derivatives.

Entities and suffixes follow the BIDS specification 1.9, "Magnetic resonance imaging, anatomy imaging data" and
"Imaging derivatives", and what data sets use besides: references `seg-manual`, `lesion-manual` and `msk`, one mask per
`label-`, and `dwi` and `adc` of strokes (ISLES 2022), whose FLAIR is on another grid.
"""

import csv
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from segkit.errors import DataError
from segkit.reading.case import IGNORED, LABEL, Cohort, ImageFile, canonical_modality
from segkit.reading.layouts.dataset_json import require_label_values, require_shown
from segkit.reading.layouts.layout import (
    FolderOptions,
    FoundFile,
    Layout,
    Listing,
    SchemeChoice,
    bare_name,
    build_cases,
    build_cohort,
    common_modalities,
    matches_ending,
    on_grid_of_reference,
    read_document,
    unused_files,
)
from segkit.reading.layouts.schemes import scheme_by_classes, scheme_by_values, scheme_from_names

_NAME = re.compile(r"^sub-[A-Za-z0-9]+(?:_.*)?_(?P<suffix>[A-Za-z0-9]+(?:-[A-Za-z0-9]+)*)$")
_ENTITY = re.compile(r"([a-z]+)-([A-Za-z0-9+]+)")
_REFERENCE = re.compile(
    r"(?P<shown>[a-z0-9]*?)-?(dseg|seg|mask|msk|roi|lesion|segmentation)(-(manual|expert)\d*)?", re.IGNORECASE
)
"""Suffixes of references; `gmseg-manual` and `lesion-msk` also name what they show."""
_TISSUES = frozenset({"gm", "wm", "csf"})
_ANATOMICAL_MASKS = frozenset({"brain", "head", "fov", "gm", "wm", "csf"})
"""Values of `desc-` or `label-` for masks of anatomy."""


def _recognise(listing: Listing) -> float:
    if not listing.volumes:
        return 0.0
    named = sum(1 for path in listing.volumes if _NAME.match(bare_name(path)) and _is_in_bids_folder(path))
    has_description = (listing.root / "dataset_description.json").is_file()
    return 0.95 if has_description and named else 0.9 * (named / len(listing.volumes))


def _is_in_bids_folder(path: Path) -> bool:
    return path.parent.name in ("anat", "dwi") or path.parent.name.startswith(("sub-", "ses-"))


def _read(listing: Listing, options: FolderOptions) -> Cohort:
    strokes = {_case_id(path) for path in listing.volumes if bare_name(path).lower().endswith("_adc")}
    found = {path: _find(path, path.relative_to(listing.root).parts, strokes, options) for path in listing.volumes}
    files = _with_only_masks([file for file in found.values() if file is not None])
    files, others = _of_one_image(_prefer_dseg(_in_session_of_image(files)))
    cases, problems = build_cases(files, patient_of=lambda case_id: case_id.split("_")[0])
    if left_out := [path for path, file in found.items() if file is None]:
        problems.append(unused_files(left_out, "not an anatomical image or reference as BIDS names them", cases=cases))
    if ignored := [path for path, file in found.items() if file is not None and file.kind == IGNORED]:
        problems.append(unused_files(ignored, "masks of anatomy and not of lesions"))
    if others:
        ending = "_".join(bare_name(others[0]).split("_")[-2:])
        remedy = f"To use them instead, pass --modality label={ending}"
        problems.append(unused_files(others, "references of another image of the session", remedy))
    names = _segment_names(listing)
    cases, off_grid = on_grid_of_reference(cases)
    modalities, rare = common_modalities(cases)
    if names and options.label_scheme is None and any(case.label for case in cases):
        choice = SchemeChoice(scheme_from_names(names, modalities))
    else:
        choice = scheme_by_classes(files, options) or scheme_by_values(cases, options, listing.root)
    problems += [*off_grid, *rare]
    return build_cohort(
        listing, "bids", cases, choice, modalities=modalities, problems=problems, licence=_licence(listing)
    )


def _case_id(path: Path) -> str:
    entities = dict(_ENTITY.findall(bare_name(path)))
    return "_".join(f"{key}-{entities[key]}" for key in ("sub", "ses") if key in entities)


def _find(path: Path, parts: tuple[str, ...], strokes: Collection[str], options: FolderOptions) -> FoundFile | None:
    """The file of a session; `strokes` are the sessions with an ADC map, whose `dwi` is an image and no series."""
    match = _NAME.match(bare_name(path))
    if match is None or "sourcedata" in parts:
        return None
    entities, case_id = dict(_ENTITY.findall(bare_name(path))), _case_id(path)
    suffix, wanted = match["suffix"], options.modalities.get(LABEL)
    reference = _REFERENCE.fullmatch(suffix)
    if wanted is not None and matches_ending(path, wanted):
        return FoundFile(case_id, path.parent, LABEL, ImageFile(path))
    if reference is not None:
        shown = str(entities.get("label") or reference["shown"] or ("lesion" if "lesion" in suffix.lower() else ""))
        is_anatomy = {entities.get("desc", "").lower(), shown.lower()} & _ANATOMICAL_MASKS
        kind = IGNORED if is_anatomy or wanted is not None else LABEL
        return FoundFile(case_id, path.parent, kind, ImageFile(path), shown)
    if "derivatives" in parts or not _is_in_bids_folder(path):
        return None
    if case_id in strokes and suffix.lower() in ("dwi", "adc"):
        return FoundFile(case_id, path.parent, suffix.lower(), ImageFile(path))
    modality = "t1c" if canonical_modality(suffix) == "t1n" and "ce" in entities else canonical_modality(suffix)
    if modality is None and suffix.lower() in ("ct", "pet"):
        modality = suffix.lower()
    return None if modality is None else FoundFile(case_id, path.parent, modality, ImageFile(path))


def _with_only_masks(files: Sequence[FoundFile]) -> list[FoundFile]:
    """Masks of grey and white matter as references where there are no others; classes only where several are named."""
    if not any(file.kind == LABEL for file in files):
        files = [replace(file, kind=LABEL) if file.shown.lower() in _TISSUES else file for file in files]
    is_several = len({file.shown for file in files if file.kind == LABEL} - {""}) > 1
    return [file if file.kind == LABEL and is_several else replace(file, shown="") for file in files]


def _in_session_of_image(files: Sequence[FoundFile]) -> list[FoundFile]:
    """References without a session, or with another one, go to the only session of their subject that has images."""
    sessions: dict[str, set[str]] = defaultdict(set)
    for file in files:
        if file.kind not in (LABEL, IGNORED):
            sessions[file.case_id.split("_")[0]].add(file.case_id)

    def moved(file: FoundFile) -> FoundFile:
        own = sessions[file.case_id.split("_")[0]]
        is_lost = file.kind == LABEL and file.case_id not in own and len(own) == 1
        return replace(file, case_id=next(iter(own))) if is_lost else file

    # Images of a session are in several folders (anat, dwi): the session is one folder of the case.
    folders: dict[str, Path] = {}
    for file in files:
        if file.kind not in (LABEL, IGNORED):
            folders[file.case_id] = min(folders.get(file.case_id, file.folder), file.folder)
    files = [moved(file) for file in files]
    return [file if file.kind in (LABEL, IGNORED) else replace(file, folder=folders[file.case_id]) for file in files]


def _of_one_image(files: Sequence[FoundFile]) -> tuple[list[FoundFile], list[Path]]:
    """The files with the references of one image where sessions have some of several (T1w, T2w), and the others."""
    sources = {file.image.path: _source(file.image.path) for file in files if file.kind == LABEL}
    counts = Counter(sources.values())
    by_case: dict[str, set[str]] = defaultdict(set)
    for file in files:
        if file.kind == LABEL:
            by_case[file.case_id].add(sources[file.image.path])
    if not any(len(found) > 1 for found in by_case.values()):
        return list(files), []
    best = max(sorted(counts), key=lambda source: counts[source])
    others = [path for path, source in sources.items() if source != best]
    return [file for file in files if file.image.path not in others], others


def _source(reference: Path) -> str:
    """The suffix of the image that a reference was drawn on (`T2w`); "" where its name does not have one."""
    names = [word for word in bare_name(reference).split("_") if "-" not in word]
    return next((word for word in names if canonical_modality(word)), "")


def _prefer_dseg(files: Sequence[FoundFile]) -> list[FoundFile]:
    """The files without masks of cases that have a discrete segmentation (`dseg`), of which masks show parts."""
    dsegs = [file for file in files if file.kind == LABEL and bare_name(file.image.path).endswith("_dseg")]
    segmented = {file.case_id for file in dsegs}
    return [file for file in files if file.kind != LABEL or file in dsegs or file.case_id not in segmented]


def _segment_names(listing: Listing) -> dict[str, int]:
    """Label values by name from the first `*dseg.tsv` (columns `index` and `name`); empty without one."""
    table = next((path for path in listing.others if path.name.endswith("dseg.tsv")), None)
    if table is None:
        return {}
    try:
        with table.open(encoding="utf-8-sig", newline="") as stream:
            rows: list[Mapping[str, str]] = list(csv.DictReader(stream, delimiter="\t"))
        names = {row["name"]: int(row["index"]) for row in rows}
        require_shown(names, table)
        require_label_values({name: (value,) for name, value in names.items()})
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        expected = "tab-separated columns `index` and `name`"
        raise DataError(f"cannot be read ({error})", where=table, expected=expected) from error
    return names


def _licence(listing: Listing) -> str | None:
    try:
        return str(read_document(listing.root / "dataset_description.json").get("License") or "") or None
    except DataError:
        return None  # the images can be used without it


BIDS = Layout(
    "bids",
    "BIDS: sub-*/[ses-*/]anat, references as *_dseg, *_mask or *_seg-manual, also under derivatives",
    "sub-01/ses-01/anat/sub-01_ses-01_ce-gadolinium_T1w.nii.gz",
    _recognise,
    _read,
)
