"""The table of layouts, and `find_cases`, which turns any folder, case or file into a cohort."""

import difflib
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from segkit.errors import DataError, RequestError
from segkit.labels import SCHEMES, LabelScheme, classes_scheme
from segkit.reading.archives import is_archive
from segkit.reading.case import LABEL, Cohort
from segkit.reading.files import UNREAD_REMEDY, is_unread_image, suffix_of
from segkit.reading.layouts.bids import BIDS
from segkit.reading.layouts.brats import BRATS_LAYOUTS
from segkit.reading.layouts.dataset_json import MSD, NNUNET
from segkit.reading.layouts.folder import FOLDER, FOLDER2D
from segkit.reading.layouts.layout import FolderOptions, Layout, Listing, bare_name, list_images, unused_files
from segkit.reading.layouts.patients import patients_by_id
from segkit.reading.layouts.schemes import values_of

LAYOUTS: dict[str, Layout] = {
    **BRATS_LAYOUTS,
    "msd": MSD,
    "nnunet": NNUNET,
    "bids": BIDS,
    "folder": FOLDER,
    "folder2d": FOLDER2D,
}
"""Every layout by name; the names of `BRATS_LAYOUTS` are those of `schemes.CONVENTIONS`."""
PLAIN_CLASSES = "classes"
"""`label_scheme` with one class for every value of the references."""

_Named = TypeVar("_Named")
_LOWEST_SCORE = 0.1
_COMMON = ("brats2021", "msd", "folder")


def find_cases(
    root: str | os.PathLike[str],
    *,
    layout: str | None = None,
    modalities: Mapping[str, str] | None = None,
    label_scheme: str | None = None,
    require_labels: bool = False,
    exclude: Path | None = None,
) -> Cohort:
    """The cases of a data folder, one case folder, or one image file.

    Args:
        root: the folder or file; links are followed, hidden files left out.
        layout: a name of `LAYOUTS`; None recognises it.
        modalities: modality name to suffix, glob pattern or channel number of its files, where names are not
            recognised; the name `label` is the reference mask.
        label_scheme: a name of `labels.SCHEMES`, or "classes": one class per value; None finds it by names or values.
            With an ignored value: "classes,ignore=255".
        require_labels: leave out cases without a reference, and refuse a folder that has none.
        exclude: a folder below `root` to leave out, such as one for results.

    Raises:
        DataError: nothing found, nothing recognised, or no references where they are required.
        RequestError: unknown layout or label scheme.

    Example:
        >>> cohort = segkit.find_cases("data")  # doctest: +SKIP
        >>> cohort.layout, [case.id for case in cohort.cases]  # doctest: +SKIP
        ('brats2021', ['BraTS2021_00000', 'BraTS2021_00002'])
    """
    listing = list_images(Path(root), exclude)
    scheme = None if label_scheme is None else scheme_named(label_scheme)
    options = FolderOptions(dict(modalities or {}), scheme, layout)
    chosen = _choose_layout(listing, options)
    cohort = chosen.read(listing, options)
    if not cohort.cases:
        raise _nothing_found(listing, f"no images that make a case of layout {chosen.name}")
    one = listing.root if listing.volumes == (listing.root,) else listing.only
    if one is not None and chosen is FOLDER and len(cohort.cases) == 1:
        name = bare_name(one)  # not the name of the folder above one file, or one DICOM series
        cohort = replace(cohort, cases=(replace(cohort.cases[0], id=name, patient=name),))
    patients = patients_by_id(cohort.cases)
    cohort = replace(cohort, cases=tuple(replace(case, patient=patients[case.id]) for case in cohort.cases))
    if scheme is not None and scheme.name == PLAIN_CLASSES:
        cohort = _with_plain_classes(cohort, scheme.ignore)
    cohort = replace(cohort, files=_count_files(listing, cohort))
    return _labelled_only(cohort) if require_labels else cohort


def _count_files(listing: Listing, cohort: Cohort) -> dict[str, int]:
    images = {image.path for case in cohort.cases for image in case.images.values()}
    references = {path for case in cohort.cases if case.label is not None for path in case.label.paths()}
    left_out = {Path(path) for problem in cohort.problems for path in problem.left_out}
    companions = len(set(listing.images) - images - references - left_out)
    others = len(listing.others)
    return {"images": len(images), "references": len(references), "companions": companions, "others": others}


def recognise(listing: Listing) -> list[tuple[float, Layout]]:
    """Every layout with its score, best first; of equal scores the most common ones."""
    scored = [(layout.recognise(listing), layout) for layout in LAYOUTS.values()]
    return sorted(scored, key=lambda pair: (-pair[0], pair[1].name not in _COMMON))


def _choose_layout(listing: Listing, options: FolderOptions) -> Layout:
    if options.layout is not None:
        return _named("layout", options.layout, LAYOUTS)
    score, best = recognise(listing)[0]
    if score < _LOWEST_SCORE:
        raise _nothing_found(listing, "no layout matches")
    is_reference_only = set(options.modalities) == {LABEL} and best is BIDS
    if options.modalities and best.name not in ("folder", "folder2d", "nnunet") and not is_reference_only:
        return FOLDER if listing.volumes else FOLDER2D
    return best


def scheme_named(name: str) -> LabelScheme:
    """The label scheme of this name, with or without ",ignore=VALUE"; that of `PLAIN_CLASSES` has no values yet.

    Raises RequestError for other names, and for a value that is a class or not from 1 to 255.
    """
    name, comma, value = name.partition(",ignore=")
    scheme = _named("label scheme", name, {**SCHEMES, PLAIN_CLASSES: classes_scheme(PLAIN_CLASSES, {})})
    if not comma:
        return scheme
    if not value.isdecimal() or not 0 < int(value) < 256 or int(value) in scheme.values.values():
        found = f"label scheme {name} cannot ignore the value {value!r}"
        raise RequestError(found, expected="a value from 1 to 255 that is not one of its classes")
    return replace(scheme, ignore=int(value))


def _named(what: str, name: str, known: Mapping[str, _Named]) -> _Named:
    if name in known:
        return known[name]
    close = difflib.get_close_matches(name, known, n=1)
    remedy = f"Did you mean {close[0]!r}?" if close else None
    raise RequestError(f"there is no {what} {name!r}", expected="one of " + ", ".join(known), remedy=remedy)


def _with_plain_classes(cohort: Cohort, ignore: int | None) -> Cohort:
    values = sorted(values_of([case for case in cohort.cases if case.label is not None]) - {0, ignore})
    scheme = classes_scheme(PLAIN_CLASSES, {f"label_{value}": value for value in values}, ignore) if values else None
    return replace(cohort, scheme=scheme, cases=tuple(replace(case, scheme=scheme) for case in cohort.cases))


def _labelled_only(cohort: Cohort) -> Cohort:
    labelled = tuple(case for case in cohort.cases if case.label is not None)
    if not labelled:
        found = f"none of the {len(cohort.cases)} cases has a reference mask"
        expected = f"masks as in {LAYOUTS[cohort.layout].example}"
        remedy = "See what `segkit check` finds, or name the masks with --modality label=SUFFIX"
        raise DataError(found, where=cohort.root, expected=expected, remedy=remedy)
    paths = [next(iter(case.images.values())).path for case in cohort.cases if case.label is None]
    problems = [unused_files(paths, "cases without a reference mask")] if paths else []
    return replace(cohort, cases=labelled, problems=(*cohort.problems, *problems))


def _nothing_found(listing: Listing, found: str) -> DataError:
    nearest = "; ".join(f"{layout.name} ({layout.example})" for _, layout in recognise(listing)[:3])
    counts = Counter(suffix_of(path) or "(no suffix)" for path in (*listing.images, *listing.others))
    contents = ", ".join(f"{count} {suffix}" for suffix, count in counts.most_common(5)) or "no files"
    remedy = "Point to the folder that holds the cases, or describe its files with --modality name=suffix"
    if any(map(is_unread_image, listing.others)):
        remedy = UNREAD_REMEDY
    if any(is_archive(path) for path in listing.others):
        remedy = "Unpack the archives and point to the folder"
    expected = f"one of these layouts, the nearest ones: {nearest}"
    where = listing.only or listing.root
    return DataError(f"{found}; the folder holds {contents}", where=where, expected=expected, remedy=remedy)
