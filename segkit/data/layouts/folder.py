"""A plain folder of volumes: no convention, only names that people give (see `grouping` and `modality`)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from segkit.data.case import Cohort, ImageFile
from segkit.data.files import count_channels
from segkit.data.layouts.channels import common_modalities, without_nameless
from segkit.data.layouts.grouping import IMAGE, group_files
from segkit.data.layouts.layout import FolderOptions, FoundFile, Layout, build_cases, build_cohort, unused_files
from segkit.data.layouts.listing import Listing, bare_name
from segkit.data.layouts.modality import IGNORED
from segkit.data.layouts.schemes import scheme_by_values
from segkit.errors import DataError, Problem

_TASK01_NAME = re.compile(r"^BRATS_\d{3}$")
_TASK01_CHANNELS = ("t2f", "t1n", "t1c", "t2w")
"""Channel order of the Decathlon's Task01_BrainTumour, for its files on their own."""


def _recognise(listing: Listing) -> float:
    if listing.volumes:
        return 0.3
    return 0.05 if any(path.is_dir() for path in listing.others) else 0.02


def _read(listing: Listing, options: FolderOptions) -> Cohort:
    channels = {name: int(pattern) for name, pattern in options.modalities.items() if pattern.isdigit()}
    patterns = {name: pattern for name, pattern in options.modalities.items() if name not in channels}
    grouping = group_files(listing.volumes, listing.root, patterns)
    found, problems = _with_channels(grouping.files, channels)
    files, nameless = without_nameless(found)
    cases, more = build_cases(files, patient_of=lambda case_id: grouping.patients[case_id])
    modalities, rare = common_modalities(cases, named=options.modalities)
    if ignored := [file.image.path for file in files if file.kind == IGNORED]:
        why = "fitting no --modality" if patterns else "neither an image nor a reference by their names"
        problems.append(unused_files(ignored, why, "Name modalities and reference with --modality name=suffix"))
    choice = scheme_by_values(cases, options, listing.root)
    problems += [*grouping.problems, *more, *nameless, *rare]
    return build_cohort(listing, "folder", cases, choice, modalities=modalities, problems=problems)


def _with_channels(files: Iterable[FoundFile], named: Mapping[str, int]) -> tuple[list[FoundFile], list[Problem]]:
    """Files of unknown modality that are 4D become one entry a channel, named by the user or by their number."""
    result: list[FoundFile] = []
    nameless: list[Path] = []
    for file in files:
        count = _channel_count(file.image.path) if file.kind == IMAGE else 1
        if count == 1:
            result.append(file)
            continue
        names = _channel_names(file.image.path, count, named)
        if names[0].startswith("channel_"):
            nameless.append(file.image.path)
        result += [
            FoundFile(file.case_id, file.folder, name, ImageFile(file.image.path, channel))
            for channel, name in enumerate(names)
        ]
    return result, [_nameless(nameless)] if nameless else []


def _channel_names(path: Path, count: int, named: Mapping[str, int]) -> Sequence[str]:
    name_of = {channel: name for name, channel in named.items()}
    if not named and count == len(_TASK01_CHANNELS) and _TASK01_NAME.match(bare_name(path)):
        return _TASK01_CHANNELS
    return [name_of.get(channel, f"channel_{channel}") for channel in range(count)]


def _channel_count(path: Path) -> int:
    try:
        return count_channels(path)
    except DataError:
        return 1  # the check reads the file itself and tells what is wrong with it


def _nameless(paths: Sequence[Path]) -> Problem:
    return Problem(
        str(paths[0]),
        "holds several channels, and nothing says which modality each of them is",
        "Name them by their number, such as --modality t2f=0 --modality t1n=1 --modality t1c=2 --modality t2w=3",
        is_fatal=False,
    )


FOLDER = Layout(
    "folder",
    "plain folder of volumes: a case a folder or a file, modalities by name or by --modality",
    "patient19/FLAIR.nii.gz, or p1_t1.nii.gz + p1_seg.nii.gz",
    _recognise,
    _read,
)
