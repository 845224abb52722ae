"""What the Decathlon's and nnU-Net's `dataset.json` have in common.

A `dataset.json` comes from anywhere, so that what it names lies inside its folder or is not read. Folders and files
there may be links to other disks: those were made by whoever owns the folder.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from segkit.errors import DataError, Problem
from segkit.reading.layouts.layout import FolderOptions, SchemeChoice
from segkit.reading.layouts.listing import Listing, bare_name, read_document
from segkit.reading.layouts.schemes import scheme_from_names, scheme_from_regions
from segkit.reading.modalities import canonical_modality

CHANNEL_NAME = re.compile(r"^(?P<case>.+)_(?P<channel>\d{4})$")
"""nnU-Net's file names: case, underscore, channel number of four digits."""


def find_document(listing: Listing) -> Path | None:
    """`dataset.json` of the folder, or of the data set whose `images...` folder (or one file of it) was given."""
    folders = [listing.root]
    if listing.root.name.lower().startswith("images"):
        folders.append(listing.root.parent)
    return next((folder / "dataset.json" for folder in folders if (folder / "dataset.json").is_file()), None)


def image_paths(listing: Listing) -> list[Path]:
    """The images proper: those in folders named images... where there are any, else all outside labels... folders."""
    inside = [path for path in listing.images if path.parent.name.lower().startswith("images")]
    return inside or [path for path in listing.images if not path.parent.name.lower().startswith("labels")]


def has_channel_names(listing: Listing) -> bool:
    """Whether the images are named CASE_0000 as nnU-Net wants them."""
    images = image_paths(listing)
    return bool(images) and all(CHANNEL_NAME.match(bare_name(path)) for path in images)


def lists_images_as_written(path: Path | None) -> bool:
    """Whether `training` of `dataset.json` names images that are there under just these names, as the Decathlon's does.

    nnU-Net's leaves out the channel numbers, or lists nothing; a four-digit number is then part of the case's name.
    """
    if path is None:
        return False
    try:
        entries = read_document(path).get("training")
    except DataError:
        return False  # reading the layout tells what is wrong with it
    images = [entry.get("image") for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    listed = (inside(path.parent, image) for image in images)
    return any(image is not None and image.exists() for image in listed)


def inside(folder: Path, entry: object) -> Path | None:
    """The file that an entry of `dataset.json` names; None where it names none, or one outside the folder."""
    if not isinstance(entry, str) or not _is_a_path(entry):
        return None
    path = Path(os.path.normpath(folder / entry))
    return path if path.is_relative_to(folder) and path != folder else None


def _is_a_path(text: str) -> bool:
    """Whether an operating system can be asked for it: encodable, without NUL, no name of more than 255 bytes."""
    try:
        return "\0" not in text and all(len(part) <= 255 for part in os.fsencode(text).split(b"/"))
    except UnicodeEncodeError:
        return False


def outside(where: Path, entry: object) -> Problem:
    """What is said of an entry that names no image inside the data set."""
    shown = repr(entry)
    shown = shown if len(shown) <= 200 else f"{shown[:200]} ..."
    remedy = "Name files below the folder of dataset.json; what lies elsewhere can be linked into it"
    return Problem(str(where), f"entry {shown} names no image inside the data set", remedy, is_fatal=False)


def channel_names(document: Mapping[str, Any], where: Path) -> tuple[str, ...]:
    """Modality names in channel order: canonical where all are distinct and any is known, else the data's own.

    Raises:
        DataError: there are none, or they are not numbered from 0.
    """
    named = document.get("channel_names") or document.get("modality")
    if not isinstance(named, Mapping) or not named:
        raise DataError(
            "names no image channels",
            where=where,
            expected='`channel_names` (nnU-Net 2) or `modality` (Decathlon), such as {"0": "T1w"}',
            remedy="Add it, or pass --layout folder to ignore dataset.json",
        )
    try:
        own = [str(named[str(index)]) for index in range(len(named))]
    except KeyError as error:
        raise DataError(f"has no channel {error} although it names {len(named)}", where=where) from error
    require_shown(own, where)
    names = [canonical_modality(name) or name for name in own]
    if len(set(names)) == len(names):
        return tuple(names)
    return tuple(f"{name}_{index}" for index, name in enumerate(own))


def document_scheme(
    document: Mapping[str, Any], modalities: tuple[str, ...], options: FolderOptions, where: Path
) -> SchemeChoice:
    """The scheme that `labels` describes: classes, or nnU-Net's regions with their `regions_class_order`."""
    if options.label_scheme is not None:
        return SchemeChoice(options.label_scheme)
    labels = document.get("labels")
    if not isinstance(labels, Mapping):
        problem = Problem(str(where), "names no labels", "Add `labels`, or pass --label-scheme NAME", is_fatal=False)
        return SchemeChoice(None, (problem,))
    notes = () if "ignore" not in labels else (_about_ignore(where),)
    try:
        named = _values_by_name(labels)
        require_shown(named, where)
        require_label_values(named)
        regions = {name: values for name, values in named.items() if values != (0,) and name.lower() != "ignore"}
        if any(len(values) > 1 for values in regions.values()):
            order = [int(value) for value in document["regions_class_order"]]
            return SchemeChoice(scheme_from_regions(regions, order, set(modalities)), notes)
        classes = {name: values[0] for name, values in named.items()}
        return SchemeChoice(scheme_from_names(classes, modalities), notes)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataError(
            f"`labels` cannot be understood ({error})",
            where=where,
            expected='{"name": value}, {"value": "name"}, or regions {"name": [values]} with `regions_class_order`',
        ) from error


def _values_by_name(labels: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Both spellings, {"1": "edema"} (Decathlon, nnU-Net 1) and {"edema": 1} (nnU-Net 2), as name to values."""
    if all(str(key).isdigit() and isinstance(value, str) for key, value in labels.items()):
        return {name: (int(value),) for value, name in labels.items()}
    return {
        str(name): tuple(sorted(int(value) for value in values)) if isinstance(values, list) else (int(values),)
        for name, values in labels.items()
    }


def require_label_values(named: Mapping[str, tuple[int, ...]]) -> None:
    """ValueError where a label value is none that a mask can hold, or a region has none."""
    strays = [value for values in named.values() for value in values if not 0 <= value <= 255]
    if strays:
        raise ValueError(f"values are {strays[:5]}, not from 0 to 255")
    if not all(named.values()) or any(len(values) > 1 and 0 in values for values in named.values()):
        raise ValueError("a region holds no value, or the background")


def require_shown(names: Iterable[str], where: Path) -> None:
    """Names of channels and labels become names of files and words on terminals."""
    odd = [name for name in names if not (isinstance(name, str) and name and name.isprintable())]
    if odd:
        raise DataError(f"holds names that cannot be shown: {odd[:3]}", where=where, expected="printable names")


def _about_ignore(where: Path) -> Problem:
    found = "voxels labelled `ignore` are not left out of training; their value counts as unknown"
    return Problem(str(where), found, "Set them to a class, or leave out the cases that have them", is_fatal=False)
