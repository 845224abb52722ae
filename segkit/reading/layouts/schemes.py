"""The label scheme of a folder: by BraTS case ids, by the names in its documents, else by the values of its references.

Values alone cannot distinguish BraTS 2023 from the Decathlon's Task01, which swap 1 and 2: such a folder gets no
scheme, but a problem that says which option to pass.
"""

import re
import shlex
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from segkit.errors import DataError, Problem, some, warning
from segkit.labels import SCHEMES, LabelScheme, classes_scheme, outputs_of
from segkit.reading.case import BRATS_MODALITIES, Case, ImageFile
from segkit.reading.files import read_reference
from segkit.reading.layouts.layout import FolderOptions, FoundFile, SchemeChoice, shown_classes

_Value = TypeVar("_Value")

_PATIENTS = (
    re.compile(r"^BraTS1[789]_(.+?)_\d+$", re.IGNORECASE),
    re.compile(r"^(brats_(?:2012|2013|tcia)_pat\d+)_\d+$", re.IGNORECASE),
    re.compile(r"^(UPENN-GBM-\d+)_\d+$", re.IGNORECASE),
    re.compile(r"^(BraTS-MEN-RT-\d+)-\d+$", re.IGNORECASE),
    re.compile(r"^(BraTS-[A-Za-z]+-\d+)-\d{3}$", re.IGNORECASE),
)


@dataclass(frozen=True)
class Convention:
    """The case ids of one generation of BraTS (`case_pattern`, in any case), and its label scheme."""

    name: str
    description: str
    case_pattern: str
    scheme: str
    example: str
    has_four_modalities: bool = True


def _early(name: str, title: str, case_pattern: str, case_id: str, folder: str = "") -> Convention:
    """A data set of 2017-2022, with labels 1, 2 and 4 and an underscore between case id and modality."""
    example = f"{folder}{case_id}/{case_id}_flair.nii.gz"
    return Convention(name, f"{title}: labels 1, 2, 4", case_pattern, "brats2017", example)


def _recent(
    name: str, description: str, kind: str = "", *, scheme: str = "brats2023", time_point: str = "000"
) -> Convention:
    """A data set of 2023 and later, with case ids such as BraTS-GLI-00000-000; `kind` "" is any but PED and MEN-RT."""
    pattern = rf"BraTS-{kind}-\d+-\d{{3}}" if kind else r"BraTS-(?!PED|MEN-RT)[A-Za-z]+-\d+(?:-\d{3})?"
    case_id = f"BraTS-{kind or 'GLI'}-00000-{time_point}"
    return Convention(name, description, pattern, scheme, f"{case_id}/{case_id}-t2f.nii.gz")


_AFTER_TREATMENT = "BraTS 2024 and later, glioma after treatment (time point 100 and above): labels 1-4"

CONVENTIONS = (
    Convention(
        "brats2015",
        "BRATS 2012-2015: labels 1-4 with 3 = non-enhancing tumour",
        r"brats_(?:2012|2013|tcia)_pat\d+_\d+",
        "brats2015",
        "brats_2013_pat0001_1/VSD.Brain.XX.O.MR_Flair.54512/*.mha",
    ),
    *(
        _early(
            f"brats20{year}",
            f"BraTS 20{year}",
            rf"BraTS{year}_[A-Za-z0-9]+_[A-Za-z0-9]+_\d+",
            f"BraTS{year}_CBICA_AAB_1",
            "HGG/",
        )
        for year in (17, 18, 19)
    ),
    _early("brats2020", "BraTS 2020", r"BraTS20_(?:Training|Validation|Testing|Test)_\d+", "BraTS20_Training_001"),
    _early("brats2021", "BraTS 2021", r"BraTS2021_\d+", "BraTS2021_00000"),
    _early("fets2022", "FeTS 2021 and 2022", r"FeTS(?:20)?2[12]_(?:Training_|Validation_)?\d+", "FeTS2022_00000"),
    Convention(
        "upenn",
        "UPENN-GBM: images_structural and images_segm, labels 1, 2, 4",
        r"UPENN-GBM-\d+_\d+",
        "brats2017",
        "images_structural/UPENN-GBM-00001_11/UPENN-GBM-00001_11_FLAIR.nii.gz",
    ),
    _recent("brats2023", "BraTS 2023 glioma, or several tumour kinds together: labels 1, 2, 3"),
    _recent("brats2023-ssa", "BraTS SSA of 2023 and later: labels 1, 2, 3", "SSA"),
    _recent("brats2023-men", "BraTS MEN of 2023 and later: labels 1, 2, 3", "MEN"),
    _recent("brats2023-met", "BraTS MET of 2023 and later: labels 1, 2, 3 (4 from 2025 on)", "MET"),
    _recent("brats2023-ped", "BraTS PED of 2023: labels 1, 2, 3", "PED"),
    _recent("brats-ped", "BraTS PED of 2024 and later: labels 1 ET, 2 NET, 3 CC, 4 ED", "PED", scheme="brats-ped"),
    _recent("brats2024", _AFTER_TREATMENT, scheme="brats2024", time_point="100"),
    Convention(
        "brats-men-rt",
        "BraTS meningioma radiotherapy: t1c and one label, GTV",
        r"BraTS-MEN-RT-\d+-\d+",
        "brats-men-rt",
        "BraTS-MEN-RT-0000-1/BraTS-MEN-RT-0000-1_t1c.nii.gz",
        has_four_modalities=False,
    ),
    Convention(
        "brats-inpainting",
        "BraTS local synthesis: t1n-voided and mask, with or without the whole t1n",
        r"BraTS-(?!MEN-RT)[A-Za-z]+-\d+(?:-\d{3})?",
        "brats2023",
        "BraTS-GLI-00000-000/BraTS-GLI-00000-000-t1n-voided.nii.gz",
        has_four_modalities=False,
    ),
)


_MOST_VALUES = 255
_SAMPLED_REFERENCES = 200
"""References read to find their values; `check` reads all of them and reports values this sample missed."""
MOST_CLASSES = 128
"""An image or a probability map has more different values than this; a mask has fewer."""
_NEARLY_WHITE, _BRIGHT, _FEWEST_NEAR, _LEAST_AT_THE_ENDS = 240, 127, 5, 0.9
"""Of masks of 0 and 255: what is next to 255, or at least grey; values from 240 to 254 of a compressed one, of which
FreeSurfer has four as labels; share of the voxels next to 0 and 255."""

_TISSUES = (
    ("RC", ("resection", "cavity", "rc")),
    ("CC", ("cyst", "cystic", "cc")),
    ("ED", ("edema", "oedema", "ed", "snfh", "peritumoral")),
    ("NCR", ("non enhancing", "nonenhancing", "necrosis", "necrotic", "ncr", "net", "netc", "ncr net")),
    ("ET", ("enhancing", "et", "gd enhancing", "enhancement")),
    ("GTV", ("gtv",)),
)
_CHOICES = (("brats2023", "1 = NCR, 2 = ED"), ("msd-brats", "1 = ED, 2 = NCR"))
_CHOICES_WITH_4 = (
    ("brats2024", "4 = resection cavity"),
    ("brats-ped", "1 = ET, 4 = ED"),
    ("brats2015", "3 = non-enhancing tumour, 4 = ET"),
)
_CLASS_WORDS = ("lesions", "lesion", "tumour", "tumor", "gtv")
_NAMELESS = frozenset({"background", "ignore"})


def patient_of(case_id: str) -> str:
    """The patient of a case: the same for all time points, and for BraTS 2017-2019 ids across the years."""
    matches = (pattern.match(case_id) for pattern in _PATIENTS)
    return next((match[1] for match in matches if match), case_id)


def scheme_from_names(labels: Mapping[str, int], modalities: Iterable[str]) -> LabelScheme:
    """The scheme of named classes: a known BraTS scheme where names, values and modalities agree, else own classes.

    At least two BraTS modalities are required, as names such as "edema" alone do not make a tumour data set.
    """
    classes = {name: value for name, value in labels.items() if value != 0 and name.lower() not in _NAMELESS}
    if len(set(modalities) & set(BRATS_MODALITIES)) >= 2:
        tissues = {_tissue_of(name): value for name, value in classes.items()}
        for scheme in SCHEMES.values():
            if len(tissues) == len(classes) and _as_named_in(scheme, tissues) == dict(scheme.values):
                return replace(scheme, ignore=ignored_value(labels))
    return classes_scheme("classes", classes, ignored_value(labels))


def ignored_value(labels: Mapping[str, _Value]) -> _Value | None:
    """The value of the label "ignore", in any case; None without one."""
    return next((value for name, value in labels.items() if name.lower() == "ignore"), None)


def scheme_from_regions(
    regions: Mapping[str, Sequence[int]], order: Sequence[int], modalities: set[str]
) -> LabelScheme:
    """The scheme of nnU-Net's region-based classes: each region is a union of label values and paints one of `order`.

    Tissues are named after the region that paints their value, else `label_<value>`.
    """
    painted = dict(zip(regions, order, strict=True))
    if len(modalities & set(BRATS_MODALITIES)) >= 2:
        wanted = {(tuple(sorted(members)), painted[name]) for name, members in regions.items()}
        for scheme in SCHEMES.values():
            if {(output.members, output.label) for output in outputs_of(scheme)} == wanted:
                return scheme
    tissue_of = {value: f"{name}_only" if len(regions[name]) > 1 else name for name, value in painted.items()}
    values = sorted({value for members in regions.values() for value in members})
    tissues = {value: tissue_of.get(value, f"label_{value}") for value in values}
    nested = (
        (name, tuple(tissues[value] for value in members), tissues[painted[name]]) for name, members in regions.items()
    )
    return LabelScheme("regions", {tissue: value for value, tissue in tissues.items()}, tuple(nested))


def scheme_by_classes(files: Sequence[FoundFile], options: FolderOptions) -> SchemeChoice | None:
    """The scheme of references that are one mask per class, by the names of the classes; None for others."""
    classes = shown_classes(files)
    if not classes or options.label_scheme is not None:
        return None
    if len(classes) > _MOST_VALUES:
        found = f"masks of {len(classes)} classes cannot be joined to a label map of values up to {_MOST_VALUES}"
        return SchemeChoice(None, (Problem(str(files[0].image.path.parent), found, "Keep the masks you need"),))
    return SchemeChoice(classes_scheme("classes", classes))


def scheme_by_values(cases: Sequence[Case], options: FolderOptions, where: Path) -> SchemeChoice:
    """The scheme of references without names, by their values and the modalities beside them."""
    if options.label_scheme is not None:
        return SchemeChoice(options.label_scheme)
    labelled = [case for case in cases if case.label is not None]
    names = [case.label.path.name for case in cases if case.label is not None]
    values = values_of(labelled) - {0}
    if not values:
        return SchemeChoice(None)
    if problem := one_foreground(labelled, values, where):
        return SchemeChoice(None, (problem,))
    if len(values) > MOST_CLASSES:
        note = f"files named as reference masks (such as {names[0]}) hold {len(values)} different values"
        remedy = "Name the reference masks with --modality label=SUFFIX and the images with --modality NAME=SUFFIX"
        return SchemeChoice(None, (Problem(str(where), f"{note}, as images do", remedy),))
    modalities = {modality for case in cases for modality in case.images}
    tumour_like = modalities & set(BRATS_MODALITIES)
    if values == {1, 2, 4} and len(tumour_like) == 4:
        note = "label values 1, 2, 4 beside the four BraTS modalities are read as BraTS 2017-2022"
        return SchemeChoice(SCHEMES["brats2017"], (warning(where, note),))
    if len(tumour_like) >= 2 and not tumour_like.isdisjoint(("t1c", "t2f")) and values in ({1, 2, 3}, {1, 2, 3, 4}):
        choices = _CHOICES_WITH_4 if 4 in values else _CHOICES
        meanings = " or ".join(f"--label-scheme {name} ({meaning})" for name, meaning in choices)
        listed = ", ".join(map(str, sorted(values)))
        found = f"label values {listed} mean different tissues in different data sets, and no name identifies this one"
        remedy = f"Choose {meanings}, or --label-scheme classes to train on plain classes"
        return SchemeChoice(None, (Problem(str(where), found, remedy),))
    if len(values) == 1:  # named as in the file name of the reference ("lesions")
        stem = names[0].split(".")[0].lower()
        name = next((word for word in _CLASS_WORDS if stem.endswith(word)), "label_1")
        return SchemeChoice(classes_scheme("classes", {name: values.pop()}))
    return SchemeChoice(classes_scheme("classes", {f"label_{value}": value for value in sorted(values)}))


def one_foreground(cases: Sequence[Case], values: set[int], where: Path) -> Problem | None:
    """The problem of masks whose only foreground has several values, which none of the classes is.

    It is 1 in some files and 255 in others, or nearly 255 after lossy compression or resizing. Values of classes are
    seldom from 240 to 254, where compression leaves several.
    """
    unless = "; if these are classes, pass --label-scheme=classes"
    command = shlex.join(["segkit", "convert", "labels", str(where), "-o", f"{where.name}-masks"])
    near = [value for value in values if _NEARLY_WHITE <= value < 255]
    is_few = len(values) > 1 and all(min(value, 255 - value) < 256 - _NEARLY_WHITE for value in values)
    is_many = len(near) >= _FEWEST_NEAR and (len(values) <= MOST_CLASSES or _are_black_and_white(cases))
    if 1 in values and len(values) > 1 and min(values - {1}) >= _BRIGHT and (groups := _names_by_value(cases)):
        listed = (f"{value} in {len(names)} ({some(names, 2)})" for value, names in sorted(groups.items()))
        found = f"the foreground of the reference masks is written in several ways: {' and '.join(listed)}"
        mapped = " ".join(f"--values {value}=1" for value in sorted(groups))
        return Problem(str(where), found, f"Write copies with `{command} {mapped}`{unless}")
    if near and (is_few or is_many):
        found = f"the reference masks hold {len(values)} values besides 0, several of them next to 0 and 255, as lossy "
        found += "compression or resizing leaves them of masks with one foreground"
        remedy = f"Threshold copies with `{command} --values 0-127=0 --values 128-255=1`{unless}"
        return Problem(str(where), found, remedy)
    return None


def _names_by_value(cases: Sequence[Case]) -> dict[int, list[str]]:
    """The names of references by the only value that each holds besides 0; empty where one holds several."""
    names: dict[int, list[str]] = defaultdict(list)
    for label in (case.label for case in _sampled(cases) if case.label is not None):
        own = values_in([label]) - {0}
        if len(own) > 1:
            return {}
        for value in own:
            names[value].append(label.path.name)
    return names


def _are_black_and_white(cases: Sequence[Case]) -> bool:
    """Whether nearly all voxels of the first references are next to 0 or 255."""
    counts = np.zeros(256, np.int64)
    for label in (case.label for case in cases[:5] if case.label is not None):
        with suppress(DataError):
            counts += np.bincount(read_reference(label)[0].ravel(), minlength=256)
    ends = counts[: 256 - _NEARLY_WHITE].sum() + counts[_NEARLY_WHITE:].sum()
    return bool(ends >= _LEAST_AT_THE_ENDS * counts.sum())


def _sampled(cases: Sequence[Case]) -> Sequence[Case]:
    return cases[:: max(1, len(cases) // _SAMPLED_REFERENCES)]


def values_of(cases: Sequence[Case], *, stop_at: int | None = None) -> set[int]:
    """Label values (0 included) of up to 200 references, evenly spread; unreadable ones are skipped."""
    return values_in((case.label for case in _sampled(cases) if case.label is not None), stop_at=stop_at)


def values_in(masks: Iterable[ImageFile], *, stop_at: int | None = None, most: int = 256) -> set[int]:
    """Label values (0 included) of masks; files that are unreadable, or have more than `most` values, are skipped."""
    values: set[int] = set()
    for mask in masks:
        try:
            present = present_values(read_reference(mask)[0])
        except DataError:
            continue
        values |= present if len(present) <= most else set()
        if stop_at in values:
            break
    return values


def present_values(labels: object) -> set[int]:
    """The values that occur in a label map, 0 included."""
    occurs = np.zeros(256, np.bool_)
    occurs[np.asarray(labels, np.uint8).ravel(order="K")] = True  # in memory order: no copy
    return {int(value) for value in np.flatnonzero(occurs)}


def _as_named_in(scheme: LabelScheme, tissues: Mapping[str, int]) -> dict[str, int]:
    """Tissues with NCR renamed to NET for a scheme whose only core without enhancement is NET."""
    has_one_core = "NET" in scheme.values and "NCR" not in scheme.values
    return {"NET" if name == "NCR" and has_one_core else name: value for name, value in tissues.items()}


def _tissue_of(name: str) -> str:
    words = f" {' '.join(re.findall(r'[a-z0-9]+', name.lower()))} "
    known = (tissue for tissue, synonyms in _TISSUES if any(f" {synonym} " in words for synonym in synonyms))
    return next(known, name)
