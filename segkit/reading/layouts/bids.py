"""BIDS: sub-*/[ses-*/]anat/*_T1w with contrast agents as `ce-`, references as *_dseg or *_mask, often in derivatives.

Entities and suffixes follow the BIDS specification 1.9, "Magnetic resonance imaging, anatomy imaging data" and
"Imaging derivatives".
"""

import csv
import re
from collections.abc import Mapping, Sequence
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
    read_document,
    unused_files,
)
from segkit.reading.layouts.schemes import scheme_by_values, scheme_from_names

_NAME = re.compile(r"^sub-(?P<subject>[A-Za-z0-9]+)(?:_.*)?_(?P<suffix>[A-Za-z0-9]+)$")
_ENTITY = re.compile(r"([a-z]+)-([A-Za-z0-9+]+)")
_REFERENCE_SUFFIXES = ("dseg", "mask", "roi", "lesion")
_ANATOMICAL_MASKS = frozenset({"brain", "head", "fov", "gm", "wm", "csf"})
"""Values of `desc-` or `label-` for masks of anatomy."""


def _recognise(listing: Listing) -> float:
    if not listing.volumes:
        return 0.0
    named = sum(1 for path in listing.volumes if _NAME.match(bare_name(path)) and "anat" in path.parts)
    has_description = (listing.root / "dataset_description.json").is_file()
    return 0.95 if has_description and named else 0.9 * (named / len(listing.volumes))


def _read(listing: Listing, options: FolderOptions) -> Cohort:
    found = {path: _find(path, path.relative_to(listing.root).parts) for path in listing.volumes}
    files = _prefer_dseg([file for file in found.values() if file is not None])
    cases, problems = build_cases(files, patient_of=lambda case_id: case_id.split("_")[0])
    if left_out := [path for path, file in found.items() if file is None]:
        problems.append(unused_files(left_out, "not an anatomical image or reference as BIDS names them", cases=cases))
    if ignored := [path for path, file in found.items() if file is not None and file.kind == IGNORED]:
        problems.append(unused_files(ignored, "masks of anatomy and not of lesions"))
    names = _segment_names(listing)
    modalities, rare = common_modalities(cases)
    if names and options.label_scheme is None and any(case.label for case in cases):
        choice = SchemeChoice(scheme_from_names(names, modalities))
    else:
        choice = scheme_by_values(cases, options, listing.root)
    return build_cohort(
        listing, "bids", cases, choice, modalities=modalities, problems=[*problems, *rare], licence=_licence(listing)
    )


def _find(path: Path, parts: tuple[str, ...]) -> FoundFile | None:
    match = _NAME.match(bare_name(path))
    if match is None or "sourcedata" in parts:
        return None
    entities = dict(_ENTITY.findall(bare_name(path)))
    case_id = "_".join(f"{key}-{entities[key]}" for key in ("sub", "ses") if key in entities)
    suffix, folder = match["suffix"], path.parent
    if suffix in _REFERENCE_SUFFIXES:
        shows = {entities.get("desc", "").lower(), entities.get("label", "").lower()}
        kind = IGNORED if shows & _ANATOMICAL_MASKS else LABEL
        return FoundFile(case_id, folder, kind, ImageFile(path))
    if "derivatives" in parts or "anat" not in path.parts:
        return None
    modality = "t1c" if canonical_modality(suffix) == "t1n" and "ce" in entities else canonical_modality(suffix)
    return None if modality is None else FoundFile(case_id, folder, modality, ImageFile(path))


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
    "BIDS: sub-*/[ses-*/]anat, references as *_dseg or *_mask, also under derivatives",
    "sub-01/ses-01/anat/sub-01_ses-01_ce-gadolinium_T1w.nii.gz",
    _recognise,
    _read,
)
