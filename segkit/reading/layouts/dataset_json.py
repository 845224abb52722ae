"""The two layouts with a `dataset.json`: the Medical Segmentation Decathlon, and nnU-Net raw data, version 1 and 2.

A folder of CASE_0000 files without `dataset.json`, such as nnU-Net's inference input, is read too. The document may be
from an untrusted source, so only files below its folder are read. These may be links, which its owner created.
"""

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from segkit.errors import DataError, Problem, warning
from segkit.reading.case import LABEL, Case, Cohort, ImageFile, canonical_modality, in_channel_order, is_file_name
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
from segkit.reading.layouts.pairs import identity
from segkit.reading.layouts.schemes import (
    ignored_value,
    patient_of,
    scheme_by_values,
    scheme_from_names,
    scheme_from_regions,
)
from segkit.reading.volume import list_folder

_CHANNEL_NAME = re.compile(r"^(?P<case>.+)_(?P<channel>\d{4})$")
"""nnU-Net's file names without suffix: case, underscore, channel number of four digits."""
_MOST_CHANNELS = 16
"""More files than this under one name are numbered cases (scan_0000 ... scan_0099), not channels."""


def _find_document(listing: Listing) -> Path | None:
    """`dataset.json` in the folder, or above it where an `images...` folder (or one file of it) was given."""
    folders = [listing.root]
    if listing.root.name.lower().startswith("images"):
        folders.append(listing.root.parent)
    return next((folder / "dataset.json" for folder in folders if (folder / "dataset.json").is_file()), None)


def _image_paths(listing: Listing) -> list[Path]:
    """Images without references: those in folders named images..., else all outside of folders named labels..."""
    named = [path for path in listing.images if path.parent.name.lower().startswith("images")]
    return named or [path for path in listing.images if not path.parent.name.lower().startswith("labels")]


def _has_channel_names(listing: Listing) -> bool:
    """Whether all images are named CASE_0000, as nnU-Net requires."""
    images = _image_paths(listing)
    return bool(images) and all(_CHANNEL_NAME.match(bare_name(path)) for path in images)


def _lists_images_as_written(path: Path) -> bool:
    """Whether `training` lists existing images, as the Decathlon's does; nnU-Net's leaves out the channel numbers."""
    try:
        entries = read_document(path).get("training")
    except DataError:
        return False  # the layout reports it when it reads the document
    images = [entry.get("image") for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    listed = (_inside(path.parent, image) for image in images)
    return any(image is not None and image.exists() for image in listed)


def _inside(folder: Path, entry: object) -> Path | None:
    """The path that an entry of `dataset.json` names; None where it is not a path, or outside the folder.

    Backslashes are separators, as Windows writes them, unless there is a file with them in its name.
    """
    if not isinstance(entry, str):
        return None
    try:  # the operating system accepts no other text, no NUL, and no name of more than 255 bytes
        is_path = "\0" not in entry and all(len(part) <= 255 for part in os.fsencode(entry).split(b"/"))
    except UnicodeEncodeError:
        return None
    path = Path(os.path.normpath(folder / entry)) if is_path else folder
    if "\\" in entry and not (is_path and path.exists()):
        return _inside(folder, entry.replace("\\", "/"))
    return path if path.is_relative_to(folder) and path != folder else None


def _outside(where: Path, entry: object) -> Problem:
    shown = repr(entry)[:200] + (" ..." if len(repr(entry)) > 200 else "")
    remedy = "Name files below the folder of dataset.json; files elsewhere can be linked into it"
    return warning(where, f"entry {shown} names no image inside the data set", remedy)


def channel_names(document: Mapping[str, Any], where: Path) -> tuple[str, ...]:
    """Modality names in channel order, as canonical names where those are distinct, else numbered own names.

    Raises DataError where there are none, they are not numbered from 0, or they are not printable.
    """
    named = document.get("channel_names") or document.get("modality")
    if not isinstance(named, Mapping) or not named:
        expected = '`channel_names` (nnU-Net 2) or `modality` (Decathlon), such as {"0": "T1w"}'
        remedy = "Add it, or pass --layout folder to ignore dataset.json"
        raise DataError("names no image channels", where=where, expected=expected, remedy=remedy)
    numbers = {int(key): str(name) for key, name in named.items() if str(key).isdecimal()}  # "0", or "0000"
    if sorted(numbers) != list(range(len(named))):
        found = f"numbers its channels {', '.join(map(str, named))}"
        expected, remedy = (
            f"0 to {len(named) - 1}",
            "Correct the numbers, or pass --layout folder to ignore dataset.json",
        )
        raise DataError(found, where=where, expected=expected, remedy=remedy)
    own = [numbers[index] for index in range(len(numbers))]
    require_shown(own, where)
    names = [canonical_modality(name) or name for name in own]
    if len(set(names)) == len(names):
        return tuple(names)
    return tuple(f"{name}_{index}" for index, name in enumerate(own))


def _listed_order(kinds: Iterable[str], names: Sequence[str]) -> tuple[str, ...]:
    """Channel order: canonical modalities first, the data's own in the order `names` of `dataset.json`."""
    present = set(kinds)
    return in_channel_order(name for name in names if name in present)


def _licence_of(document: Mapping[str, Any]) -> str | None:
    return str(document.get("licence") or document.get("license") or "") or None


def document_scheme(
    document: Mapping[str, Any], modalities: tuple[str, ...], options: FolderOptions, where: Path
) -> SchemeChoice:
    """The scheme that `labels` describes: classes, or nnU-Net's regions with their `regions_class_order`.

    Raises DataError where `labels` is not in a known form.
    """
    if options.label_scheme is not None:
        return SchemeChoice(options.label_scheme)
    labels = document.get("labels")
    if not isinstance(labels, Mapping):
        return SchemeChoice(None, (warning(where, "names no labels", "Add `labels`, or pass --label-scheme NAME"),))
    try:
        named = _values_by_name(labels)
        require_shown(named, where)
        require_label_values(named)
        ignore = ignored_value(named)
        regions = {name: values for name, values in named.items() if values != (0,) and name.lower() != "ignore"}
        if any(len(values) > 1 for values in regions.values()):
            order = [int(value) for value in document["regions_class_order"]]
            scheme = scheme_from_regions(regions, order, set(modalities))
            return SchemeChoice(replace(scheme, ignore=None if ignore is None else ignore[0]))
        return SchemeChoice(scheme_from_names({name: values[0] for name, values in named.items()}, modalities))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        expected = '{"name": value}, {"value": "name"}, or regions {"name": [values]} with `regions_class_order`'
        raise DataError(f"`labels` cannot be understood ({error})", where=where, expected=expected) from error


def _values_by_name(labels: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Label values by name, from {"1": "edema"} (Decathlon, nnU-Net 1) or {"edema": 1} (nnU-Net 2)."""
    if all(str(key).isdigit() and isinstance(value, str) for key, value in labels.items()):
        return {name: (int(value),) for value, name in labels.items()}
    return {
        str(name): tuple(sorted(int(value) for value in values)) if isinstance(values, list) else (int(values),)
        for name, values in labels.items()
    }


def require_label_values(named: Mapping[str, tuple[int, ...]]) -> None:
    """ValueError where a label value does not fit into a mask (0 to 255), or a region is empty."""
    strays = [value for values in named.values() for value in values if not 0 <= value <= 255]
    if strays:
        raise ValueError(f"values are {strays[:5]}, not from 0 to 255")
    if not all(named.values()) or any(len(values) > 1 and 0 in values for values in named.values()):
        raise ValueError("a region holds no value, or the background")
    if len(ignored_value(named) or ()) > 1:
        raise ValueError("`ignore` has several values")


def require_shown(names: Iterable[str], where: Path) -> None:
    """DataError where a name, which may become a file name or terminal output, is not printable."""
    odd = [name for name in names if not (isinstance(name, str) and name and name.isprintable())]
    if odd:
        raise DataError(f"holds names that cannot be shown: {odd[:3]}", where=where, expected="printable names")


def _recognise_msd(listing: Listing) -> float:
    document = _find_document(listing)
    if document is None:
        return 0.05 if (listing.root / "imagesTr").is_dir() else 0.0
    is_decathlon = _lists_images_as_written(document) or not _has_channel_names(listing)
    return 0.9 if listing.volumes and is_decathlon else 0.05


def _read_msd(listing: Listing, options: FolderOptions) -> Cohort:
    """One 3D or 4D file per case; channels of a 4D file get the modality names of `dataset.json`."""
    path = _find_document(listing)
    if path is None:
        raise DataError("has no dataset.json", where=listing.root, remedy="Pass --layout folder to read it without")
    document = read_document(path)
    names = channel_names(document, path)
    pairs, problems = _listed_pairs(document, path)
    unlisted: list[Path] = []
    if listing.root != path.parent or listing.only is not None:
        references = dict(pairs)  # images that are not listed have no reference
        pairs = [(volume, references.get(volume)) for volume in listing.volumes]
    else:
        listed = {image for image, _ in pairs}
        unlisted = [volume for volume in listing.volumes if volume not in listed]
        pairs += [(volume, None) for volume in unlisted if volume.parent.name.lower() == "imagests"]
        unlisted = [volume for volume in unlisted if volume.parent.name.lower() == "imagestr"]
    files = []
    for image, label in pairs:
        channels = enumerate(names) if len(names) > 1 else [(None, names[0])]
        kinds = [(name, ImageFile(image, channel)) for channel, name in channels]
        kinds += [] if label is None else [(LABEL, ImageFile(label))]
        files += [FoundFile(bare_name(image), image.parent, kind, file) for kind, file in kinds]
    cases, more = build_cases(files, patient_of=patient_of, order=lambda kinds: _listed_order(kinds, names))
    if unlisted:
        problems.append(unused_files(unlisted, "not listed in dataset.json", "List them under `training`", cases=cases))
    return build_cohort(
        listing,
        "msd",
        cases,
        document_scheme(document, names, options, path),
        modalities=in_channel_order(names),
        problems=(*problems, *more),
        licence=_licence_of(document),
    )


def _listed_pairs(document: Mapping[str, Any], path: Path) -> tuple[list[tuple[Path, Path | None]], list[Problem]]:
    """(image, reference or None) for each entry of `training` and `test`; a problem for each one outside.

    An entry is {"image": ..., "label": ...}; a test image may be listed by its path alone.
    """
    pairs: list[tuple[Path, Path | None]] = []
    problems = []
    for listed in (document.get("training"), document.get("test")):
        for entry in listed if isinstance(listed, list) else ():
            files = entry if isinstance(entry, dict) else {"image": entry}
            image = _inside(path.parent, files.get("image"))
            if image is None:
                problems.append(_outside(path, files))
            else:
                pairs.append((image, _inside(path.parent, files.get("label"))))
    return pairs, problems


MSD = Layout(
    "msd",
    "Medical Segmentation Decathlon: dataset.json, imagesTr, labelsTr",
    "dataset.json + imagesTr/CASE.nii.gz + labelsTr/CASE.nii.gz",
    _recognise_msd,
    _read_msd,
)


def _recognise_nnunet(listing: Listing) -> float:
    if not _has_channel_names(listing):
        return 0.05 if _find_document(listing) or (listing.root / "imagesTr").is_dir() else 0.0
    if (path := _find_document(listing)) is not None:
        return 0.05 if _lists_images_as_written(path) else 1.0
    channels = _channels_by_case(listing)
    if len(channels) == 1 and not identity(next(iter(channels))[1]):
        return 0.05  # scan_0000, scan_0001 ... are numbered scans: no case has a name of its own
    is_whole = all(0 in found and max(found) < min(len(found), _MOST_CHANNELS) for found in channels.values())
    is_set = len(channels) > 1 or listing.root.name.lower().startswith("images") or set(*channels.values()) == {0}
    return 0.6 if is_whole and is_set else 0.05


def _read_nnunet(listing: Listing, options: FolderOptions) -> Cohort:
    path = _find_document(listing)
    document = {} if path is None else read_document(path)
    names = _numbered_names(listing, options) if path is None else channel_names(document, path)
    outsiders: list[Problem] = []
    if "dataset" in document and path:
        files, outsiders = _listed_files(document["dataset"], path, names)
    else:
        files = list(_files(listing, names))
    cases, problems = build_cases(files, patient_of=patient_of, order=lambda kinds: _listed_order(kinds, names))
    problems += [*outsiders, *_left_out(listing, files, names, cases)]
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
        licence=_licence_of(document),
    )


def _numbered_names(listing: Listing, options: FolderOptions) -> tuple[str, ...]:
    count = 1 + max((max(numbers) for numbers in _channels_by_case(listing).values()), default=0)
    given = {pattern.lstrip("_").lstrip("0") or "0": name for name, pattern in options.modalities.items()}
    return tuple(given.get(str(index), f"channel_{index}") for index in range(count))


def _channels_by_case(listing: Listing) -> dict[tuple[Path, str], set[int]]:
    channels: dict[tuple[Path, str], set[int]] = defaultdict(set)
    for path in _image_paths(listing):
        if match := _CHANNEL_NAME.match(bare_name(path)):
            channels[path.parent, match["case"]].add(int(match["channel"]))
    return channels


def _files(listing: Listing, names: Sequence[str]) -> Iterable[FoundFile]:
    """Files by folder name: labels... hold references, all others images."""
    for path in listing.images:
        if path.parent.name.lower().startswith("labels"):
            yield FoundFile(bare_name(path), path.parent, LABEL, ImageFile(path))
    for path in _image_paths(listing):
        if match := _CHANNEL_NAME.match(bare_name(path)):
            yield from _channel_files(match["case"], path, int(match["channel"]), names)
    if listing.root.name.lower().startswith("images"):  # the references are beside this folder
        labels = listing.root.parent / ("labels" + listing.root.name[len("images") :])
        cases = {case_id for _, case_id in _channels_by_case(listing)}
        for path in chain(*list_folder(labels)) if labels.is_dir() else ():
            if bare_name(path) in cases:
                yield FoundFile(bare_name(path), labels, LABEL, ImageFile(path))


def _left_out(
    listing: Listing, files: Iterable[FoundFile], names: Sequence[str], cases: Sequence[Case]
) -> Iterable[Problem]:
    used = {file.image.path for file in files}
    left = [path for path in listing.images if path not in used]
    numbers = {path: match["channel"] for path in left if (match := _CHANNEL_NAME.match(bare_name(path)))}
    images = set(_image_paths(listing))
    beyond = [path for path in left if path in images and path in numbers and int(numbers[path]) >= len(names)]
    if beyond:
        why = f"channel numbers beyond the {len(names)} that dataset.json names"
        yield unused_files(beyond, why, "Name every channel in dataset.json, numbered from 0")
    if others := sorted(set(left) - set(beyond)):
        why = "neither in an images... nor in a labels... folder, or not named CASE_0000"
        yield unused_files(others, why, cases=cases)


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
    found = {case_id: _listed_case(case_id, entry, path.parent, names) for case_id, entry in listed.items()}
    problems = [_outside(path, {case_id: listed[case_id]}) for case_id, files in found.items() if files is None]
    return [file for files in found.values() for file in files or ()], problems


def _listed_case(case_id: str, entry: object, folder: Path, names: Sequence[str]) -> list[FoundFile] | None:
    """The files of a case; None where its id is not a file name, or a file is outside the data set."""
    if not isinstance(entry, dict) or not isinstance(entry.get("images"), list) or not is_file_name(case_id):
        return None
    kinds = dict(zip(names, entry["images"], strict=False))
    if entry.get("label"):
        kinds[LABEL] = entry["label"]
    paths = {kind: _inside(folder, image) for kind, image in kinds.items()}
    files = [FoundFile(case_id, folder, kind, ImageFile(path)) for kind, path in paths.items() if path is not None]
    return files if len(files) == len(paths) else None


NNUNET = Layout(
    "nnunet",
    "nnU-Net raw data, version 1 or 2: imagesTr/CASE_0000, labelsTr, dataset.json",
    "dataset.json + imagesTr/CASE_0000.nii.gz + labelsTr/CASE.nii.gz",
    _recognise_nnunet,
    _read_nnunet,
)
