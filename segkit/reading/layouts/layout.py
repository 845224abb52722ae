"""Layout, and how the files that a layout has identified become cases and a cohort."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from segkit.errors import DataError, Problem, some
from segkit.labels import LabelScheme
from segkit.reading.case import IGNORED, LABEL, Case, Cohort, ImageFile, in_channel_order
from segkit.reading.files import count_channels
from segkit.reading.layouts.listing import Listing

LEAST_SHARE = 0.5
"""A modality of fewer cases is not a channel of the cohort: as one, it would make all other cases incomplete."""


@dataclass(frozen=True)
class FolderOptions:
    """The user's options for a folder: file name patterns by modality, label scheme, and name of the layout."""

    modalities: Mapping[str, str] = field(default_factory=dict)
    label_scheme: LabelScheme | None = None
    layout: str | None = None


@dataclass(frozen=True)
class Layout:
    """One way to arrange a data folder.

    `recognise` scores a listing from 0 (not this layout) to 1 (certainly this one); scores below 0.1 only serve to name
    the nearest layouts. `read` turns the listing into a cohort, which may be empty. `example` shows one case.
    """

    name: str
    description: str
    example: str
    recognise: Callable[[Listing], float]
    read: Callable[[Listing, FolderOptions], Cohort]


@dataclass(frozen=True)
class FoundFile:
    """A file with its case, its folder and its kind: a modality, LABEL or IGNORED.

    Files of one case share `case_id` and `folder`; a reference may be in another folder and is then found by `case_id`.
    """

    case_id: str
    folder: Path
    kind: str
    image: ImageFile


@dataclass(frozen=True)
class SchemeChoice:
    """The label scheme of a cohort, None where it is unknown, and problems to report with it."""

    scheme: LabelScheme | None
    problems: tuple[Problem, ...] = ()


def build_cases(
    files: Iterable[FoundFile],
    *,
    patient_of: Callable[[str], str] = str,
    order: Callable[[Iterable[str]], tuple[str, ...]] = in_channel_order,
) -> tuple[list[Case], list[Problem]]:
    """Group files into cases, sorted by id; problems of one case are stored in it, the others are returned.

    A case id that occurs in two folders is read from the first one only, as results are named by case id.
    """
    images: dict[tuple[str, Path], list[FoundFile]] = defaultdict(list)
    references: dict[str, list[FoundFile]] = defaultdict(list)
    for file in files:
        if file.kind == LABEL:
            references[file.case_id].append(file)
        elif file.kind != IGNORED:
            images[file.case_id, file.folder].append(file)
    folders_of: dict[str, list[Path]] = defaultdict(list)
    for case_id, folder in sorted(images):
        folders_of[case_id].append(folder)
    cases, problems = [], []
    for case_id, folders in folders_of.items():
        labels = _own_labels(references.pop(case_id, []), folders)
        case = _build_case(case_id, patient_of(case_id), [*images[case_id, folders[0]], *labels], order)
        if len(folders) > 1:
            others = ", ".join(str(folder) for folder in folders[1:])
            found = f"case {case_id} also exists in {others}, which is left out"
            duplicate = Problem(str(folders[0]), found, "Rename or remove one of them")
            case = replace(case, problems=(*case.problems, duplicate))
        cases.append(case)
    lonely = sorted(file.image.path for files_of_id in references.values() for file in files_of_id)
    if lonely:
        remedy = "Name each reference like its image, or point to the folder that holds both"
        problems.append(unused_files(lonely, "references that belong to no image", remedy))
    return cases, problems


def _own_labels(labels: list[FoundFile], folders: Sequence[Path]) -> list[FoundFile]:
    """References of one case: those beside its images, else those in a folder without images of this case."""
    beside = [file for file in labels if file.folder == folders[0]]
    return beside or [file for file in labels if file.folder not in folders]


def _build_case(
    case_id: str, patient: str, files: Sequence[FoundFile], order: Callable[[Iterable[str]], tuple[str, ...]]
) -> Case:
    by_kind: dict[str, list[ImageFile]] = defaultdict(list)
    for file in files:
        by_kind[file.kind].append(file.image)
    problems = []
    for kind, found in by_kind.items():
        if len(found) > 1:
            paths = sorted(image.path for image in found)
            what = "reference mask" if kind == LABEL else f"modality {kind}"
            names = f"{len(paths)} files for the {what}: {', '.join(path.name for path in paths)}"
            remedy = f"Keep one of them, or name it with --modality {kind}=SUFFIX"
            problems.append(Problem(str(paths[0].parent), names, remedy))
    first = {kind: min(found, key=lambda image: str(image.path)) for kind, found in by_kind.items()}
    label = first.pop(LABEL, None)
    return Case(case_id, patient, {kind: first[kind] for kind in order(first)}, label, problems=tuple(problems))


def build_cohort(
    listing: Listing,
    layout: str,
    cases: Sequence[Case],
    choice: SchemeChoice,
    *,
    modalities: Sequence[str] | None = None,
    problems: Iterable[Problem] = (),
    dims: int = 3,
    licence: str | None = None,
) -> Cohort:
    """A cohort whose cases all carry its label scheme; modalities default to those that any case has."""
    if modalities is None:
        modalities = in_channel_order(modality for case in cases for modality in case.images)
    return Cohort(
        root=listing.only or listing.root,
        layout=layout,
        scheme=choice.scheme,
        modalities=tuple(modalities),
        cases=tuple(replace(case, scheme=case.scheme or choice.scheme) for case in cases),
        problems=(*listing.problems, *problems, *choice.problems),
        dims=dims,
        licence=licence,
    )


def unused_files(paths: Sequence[Path], why: str, remedy: str = "") -> Problem:
    """A warning about files that are left out: how many, why, and the first few names."""
    names = some((path.name for path in paths), 3)
    count = f"{len(paths)} file" + ("s" if len(paths) != 1 else "")
    return Problem(str(paths[0].parent), f"{count} left out, {why}: {names}", remedy, is_fatal=False)


def channels_or_one(path: Path) -> int:
    """The number of channels of a file, 1 where it cannot be read: the check reports why."""
    try:
        return count_channels(path)
    except DataError:
        return 1


def common_modalities(cases: Sequence[Case], named: Collection[str] = ()) -> tuple[tuple[str, ...], list[Problem]]:
    """Modalities, in channel order, that at least half of the cases have or that the user named; warnings about others.

    The cases keep their rare images for models that were trained with them.
    """
    counts = Counter(modality for case in cases for modality in case.images)
    common = {name for name, count in counts.items() if name in named or count >= LEAST_SHARE * len(cases)}
    rare: dict[tuple[Path, ...], list[str]] = defaultdict(list)
    for name in in_channel_order(name for name in counts if name not in common):
        rare[tuple(case.images[name].path for case in cases if name in case.images)].append(name)
    problems = [
        unused_files(
            paths,
            f"in training: {len(paths)} of {len(cases)} cases have {', '.join(names)}",
            f"Keep it with --modality {names[0]}=SUFFIX",
        )
        for paths, names in rare.items()
    ]
    return in_channel_order(name for case in cases for name in case.images if name in common), problems
