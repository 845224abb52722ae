"""The Medical Segmentation Decathlon: `dataset.json`, imagesTr, labelsTr, one 3D or 4D file a case.

Channels of a 4D file get the modality names of `dataset.json` (Task01: FLAIR, T1w, T1gd, T2w); the cohort has them in
canonical order.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from segkit.errors import DataError, Problem
from segkit.reading.case import LABEL, Cohort, ImageFile, in_channel_order
from segkit.reading.layouts.dataset_json import (
    channel_names,
    document_scheme,
    find_document,
    has_channel_names,
    inside,
    licence_of,
    listed_order,
    lists_images_as_written,
    outside,
)
from segkit.reading.layouts.layout import FolderOptions, FoundFile, Layout, build_cases, build_cohort, unused_files
from segkit.reading.layouts.listing import Listing, bare_name, read_document
from segkit.reading.layouts.schemes import patient_of


def _recognise(listing: Listing) -> float:
    document = find_document(listing)
    if document is None:
        return 0.05 if (listing.root / "imagesTr").is_dir() else 0.0
    if not listing.volumes:
        return 0.05
    return 0.9 if lists_images_as_written(document) or not has_channel_names(listing) else 0.05


def _read(listing: Listing, options: FolderOptions) -> Cohort:
    path = find_document(listing)
    if path is None:
        raise DataError("has no dataset.json", where=listing.root, remedy="Pass --layout folder to do without it")
    document = read_document(path)
    names = channel_names(document, path)
    pairs, problems = _listed_pairs(document, path)
    if listing.root != path.parent or listing.only is not None:
        references = dict(pairs)  # images that are not listed have no reference
        pairs = [(volume, references.get(volume)) for volume in listing.volumes]
    else:
        pairs += [(test, None) for test in _unlisted(listing, pairs, "imagests")]
        if left_out := _unlisted(listing, pairs, "imagestr"):
            problems.append(unused_files(left_out, "not listed in dataset.json", "List them under `training`"))
    files = _found_files(pairs, names)
    cases, more = build_cases(files, patient_of=patient_of, order=lambda kinds: listed_order(kinds, names))
    return build_cohort(
        listing,
        "msd",
        cases,
        document_scheme(document, names, options, path),
        modalities=in_channel_order(names),
        problems=(*problems, *more),
        licence=licence_of(document),
    )


def _listed_pairs(document: dict[str, Any], path: Path) -> tuple[list[tuple[Path, Path | None]], list[Problem]]:
    """(image, reference or None) for each entry of `training` and `test`; a problem for each one outside."""
    pairs: list[tuple[Path, Path | None]] = []
    problems = []
    for entry in (*_entries(document.get("training")), *_entries(document.get("test"))):
        image = inside(path.parent, entry.get("image"))
        label = inside(path.parent, entry.get("label"))
        if image is None:
            problems.append(outside(path, entry))
        else:
            pairs.append((image, label))
    return pairs, problems


def _entries(listed: object) -> Iterable[dict[str, object]]:
    """Entries {"image": ..., "label": ...}; a test image may be listed by its path alone."""
    for entry in listed if isinstance(listed, list) else ():
        yield entry if isinstance(entry, dict) else {"image": entry}


def _unlisted(listing: Listing, pairs: list[tuple[Path, Path | None]], folder: str) -> list[Path]:
    listed = {image for image, _ in pairs}
    return [path for path in listing.volumes if path.parent.name.lower() == folder and path not in listed]


def _found_files(pairs: Iterable[tuple[Path, Path | None]], names: tuple[str, ...]) -> Iterable[FoundFile]:
    for image, label in pairs:
        case_id = bare_name(image)
        for channel, name in enumerate(names):
            yield FoundFile(case_id, image.parent, name, ImageFile(image, channel if len(names) > 1 else None))
        if label is not None:
            yield FoundFile(case_id, image.parent, LABEL, ImageFile(label))


MSD = Layout(
    "msd",
    "Medical Segmentation Decathlon: dataset.json, imagesTr, labelsTr",
    "dataset.json + imagesTr/CASE.nii.gz + labelsTr/CASE.nii.gz",
    _recognise,
    _read,
)
