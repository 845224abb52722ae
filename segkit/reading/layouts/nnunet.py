"""nnU-Net raw data, version 1 and 2: imagesTr/CASE_0000, labelsTr/CASE, and `dataset.json` with the channel names.

A folder of CASE_0000 files without `dataset.json`, such as nnU-Net's inference input, is read too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path

from segkit.errors import DataError, Problem, warning
from segkit.reading.case import LABEL, Cohort, ImageFile, in_channel_order, is_file_name
from segkit.reading.layouts.dataset_json import (
    CHANNEL_NAME,
    channel_names,
    document_scheme,
    find_document,
    has_channel_names,
    image_paths,
    inside,
    licence_of,
    listed_order,
    lists_images_as_written,
    outside,
)
from segkit.reading.layouts.layout import (
    FolderOptions,
    FoundFile,
    Layout,
    Listing,
    SchemeChoice,
    bare_name,
    build_cases,
    build_cohort,
    channels_or_one,
    read_document,
    unused_files,
)
from segkit.reading.layouts.schemes import patient_of, scheme_by_values
from segkit.reading.volume import list_folder

_MOST_CHANNELS = 16
"""More files than this under one name are numbered cases (scan_0000 ... scan_0099), not channels."""


def _recognise(listing: Listing) -> float:
    if not has_channel_names(listing):
        return 0.05 if find_document(listing) or (listing.root / "imagesTr").is_dir() else 0.0
    if (path := find_document(listing)) is not None:
        return 0.05 if lists_images_as_written(path) else 1.0
    channels = _channels_by_case(listing)
    is_whole = all(0 in found and max(found) < min(len(found), _MOST_CHANNELS) for found in channels.values())
    is_set = len(channels) > 1 or listing.root.name.lower().startswith("images") or set(*channels.values()) == {0}
    return 0.6 if is_whole and is_set else 0.05


def _read(listing: Listing, options: FolderOptions) -> Cohort:
    path = find_document(listing)
    document = {} if path is None else read_document(path)
    names = _numbered_names(listing, options) if path is None else channel_names(document, path)
    outsiders: list[Problem] = []
    if "dataset" in document and path:
        files, outsiders = _listed_files(document["dataset"], path, names)
    else:
        files = list(_files(listing, names))
    cases, problems = build_cases(files, patient_of=patient_of, order=lambda kinds: listed_order(kinds, names))
    problems += [*outsiders, *_left_out(listing, files, names)]
    if path is None:
        choice = scheme_by_values(cases, options, listing.root)
        if not set(names) <= set(options.modalities):
            found = "no dataset.json says what the channels are"
            remedy = "Name them (--modality t2f=0000 --modality t1n=0001), or add a dataset.json with `channel_names`"
            problems.append(warning(listing.root, found, remedy))
    else:
        choice = document_scheme(document, names, options, path)
    return build_cohort(
        listing,
        "nnunet",
        cases,
        choice if cases else SchemeChoice(None),
        modalities=in_channel_order(names),
        problems=problems,
        dims=2 if len(listing.pictures) > len(listing.volumes) else 3,
        licence=licence_of(document),
    )


def _numbered_names(listing: Listing, options: FolderOptions) -> tuple[str, ...]:
    count = 1 + max((max(numbers) for numbers in _channels_by_case(listing).values()), default=0)
    given = {pattern.lstrip("_").lstrip("0") or "0": name for name, pattern in options.modalities.items()}
    return tuple(given.get(str(index), f"channel_{index}") for index in range(count))


def _channels_by_case(listing: Listing) -> dict[tuple[Path, str], set[int]]:
    channels: dict[tuple[Path, str], set[int]] = defaultdict(set)
    for path in image_paths(listing):
        if match := CHANNEL_NAME.match(bare_name(path)):
            channels[path.parent, match["case"]].add(int(match["channel"]))
    return channels


def _files(listing: Listing, names: Sequence[str]) -> Iterable[FoundFile]:
    """Files by folder name: labels... hold references, all others images."""
    for path in listing.images:
        if path.parent.name.lower().startswith("labels"):
            yield FoundFile(bare_name(path), path.parent, LABEL, ImageFile(path))
    for path in image_paths(listing):
        if match := CHANNEL_NAME.match(bare_name(path)):
            yield from _channel_files(match["case"], path, int(match["channel"]), names)
    if listing.root.name.lower().startswith("images"):  # the references are beside this folder
        labels = listing.root.parent / ("labels" + listing.root.name[len("images") :])
        cases = {case_id for _, case_id in _channels_by_case(listing)}
        for path in chain(*list_folder(labels)) if labels.is_dir() else ():
            if bare_name(path) in cases:
                yield FoundFile(bare_name(path), labels, LABEL, ImageFile(path))


def _left_out(listing: Listing, files: Iterable[FoundFile], names: Sequence[str]) -> Iterable[Problem]:
    """Warnings about files that are neither a channel nor a reference of any case."""
    used = {file.image.path for file in files}
    left = [path for path in listing.images if path not in used]
    numbers = {path: match["channel"] for path in left if (match := CHANNEL_NAME.match(bare_name(path)))}
    images = set(image_paths(listing))
    beyond = [path for path in left if path in images and path in numbers and int(numbers[path]) >= len(names)]
    if beyond:
        why = f"channel numbers beyond the {len(names)} that dataset.json names"
        yield unused_files(beyond, why, "Name every channel in dataset.json, numbered from 0")
    if others := sorted(set(left) - set(beyond)):
        yield unused_files(others, "neither in an images... nor in a labels... folder, or not named CASE_0000")


def _channel_files(case_id: str, path: Path, channel: int, names: Sequence[str]) -> Iterable[FoundFile]:
    may_be_colour = channel == 0 and len(names) > 1 and path.suffix.lower() not in (".gz", ".nii", ".nrrd", ".mha")
    if may_be_colour and channels_or_one(path) == 3:  # nnU-Net stores red, green and blue in one file
        for plane, name in enumerate(names[:3]):
            yield FoundFile(case_id, path.parent, name, ImageFile(path, plane))
    elif channel < len(names):
        yield FoundFile(case_id, path.parent, names[channel], ImageFile(path))


def _listed_files(listed: object, path: Path, names: Sequence[str]) -> tuple[list[FoundFile], list[Problem]]:
    """Files of nnU-Net 2's optional `dataset` entry, {case: {"images": [...], "label": ...}}; problems of others."""
    if not isinstance(listed, Mapping):
        raise DataError("`dataset` is not a mapping of case ids to files", where=path)
    files: list[FoundFile] = []
    problems = []
    for case_id, entry in listed.items():
        found = _listed_case(case_id, entry, path.parent, names)
        if found is None:
            problems.append(outside(path, {case_id: entry}))
        else:
            files += found
    return files, problems


def _listed_case(case_id: str, entry: object, folder: Path, names: Sequence[str]) -> list[FoundFile] | None:
    """The files of a case; None where its id is not a file name, or a file is outside the data set."""
    if not isinstance(entry, dict) or not isinstance(entry.get("images"), list) or not is_file_name(case_id):
        return None
    kinds = dict(zip(names, entry["images"], strict=False))
    if entry.get("label"):
        kinds[LABEL] = entry["label"]
    paths = {kind: inside(folder, image) for kind, image in kinds.items()}
    files = [FoundFile(case_id, folder, kind, ImageFile(path)) for kind, path in paths.items() if path is not None]
    return files if len(files) == len(paths) else None


NNUNET = Layout(
    "nnunet",
    "nnU-Net raw data, version 1 or 2: imagesTr/CASE_0000, labelsTr, dataset.json",
    "dataset.json + imagesTr/CASE_0000.nii.gz + labelsTr/CASE.nii.gz",
    _recognise,
    _read,
)
