"""Which label scheme a folder uses: by the names its documents give, else by the values its references hold.

Values alone can never tell BraTS 2023 from the Decathlon's Task01, which swap 1 and 2: such a folder gets no scheme
but a problem that says what to type.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from segkit.data.case import BRATS_MODALITIES, Case
from segkit.data.files import read_labels
from segkit.data.layouts.layout import FolderOptions, SchemeChoice
from segkit.errors import DataError, Problem
from segkit.labels import SCHEMES, LabelScheme, classes_scheme, outputs_of

_SAMPLED_REFERENCES = 200
"""References read to learn values; `check` reads all of them and names the values this sample missed."""

_MOST_VALUES = 128
"""More different values than this are an image or a probability map and not labels."""

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
_NAMELESS = frozenset({"background", "ignore"})


def scheme_from_names(labels: Mapping[str, int], modalities: Iterable[str]) -> LabelScheme:
    """The scheme of named classes: a known BraTS scheme where names, values and modalities agree, else own classes.

    Names such as "edema" alone do not make a tumour data set, so at least two BraTS modalities are asked for.
    """
    classes = {name: value for name, value in labels.items() if value != 0 and name.lower() not in _NAMELESS}
    if len(set(modalities) & set(BRATS_MODALITIES)) >= 2:
        tissues = {_tissue_of(name): value for name, value in classes.items()}
        for scheme in SCHEMES.values():
            if len(tissues) == len(classes) and _as_named_in(scheme, tissues) == dict(scheme.values):
                return scheme
    return classes_scheme("classes", classes)


def scheme_from_regions(
    regions: Mapping[str, Sequence[int]], order: Sequence[int], modalities: set[str]
) -> LabelScheme:
    """The scheme of nnU-Net's region-based classes: each region is a union of label values and paints one of `order`.

    Tissues are named after the region that paints their value; values that no region paints are `label_<value>`.
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
    return LabelScheme(
        "regions",
        {tissue: value for value, tissue in tissues.items()},
        tuple(
            (name, tuple(tissues[value] for value in members), tissues[painted[name]])
            for name, members in regions.items()
        ),
    )


def scheme_by_values(cases: Sequence[Case], options: FolderOptions, where: Path) -> SchemeChoice:
    """The scheme of references without names, by what values they hold and which modalities go with them."""
    if options.label_scheme is not None:
        return SchemeChoice(options.label_scheme)
    labelled = [case for case in cases if case.label is not None]
    if not labelled:
        return SchemeChoice(None)
    values = values_of(labelled) - {0}
    if not values:
        return SchemeChoice(None)
    if len(values) > _MOST_VALUES:
        return SchemeChoice(None, (_not_labels(len(values), labelled[0], where),))
    modalities = {modality for case in cases for modality in case.images}
    tumour_like = modalities & set(BRATS_MODALITIES)
    if values == {1, 2, 4} and len(tumour_like) == 4:
        note = "label values 1, 2, 4 beside the four BraTS modalities are read as BraTS 2017-2022"
        return SchemeChoice(SCHEMES["brats2017"], (Problem(str(where), note, is_fatal=False),))
    if len(tumour_like) >= 2 and values in ({1, 2, 3}, {1, 2, 3, 4}):
        return SchemeChoice(None, (ambiguous(values, where),))
    if len(values) == 1:
        return SchemeChoice(classes_scheme("classes", {_class_name(labelled[0]): values.pop()}))
    return SchemeChoice(classes_scheme("classes", {f"label_{value}": value for value in sorted(values)}))


def ambiguous(values: Iterable[int], where: Path) -> Problem:
    """The problem of label values that mean different tissues in different years, with the options to choose from."""
    present = set(values)
    choices = _CHOICES_WITH_4 if 4 in present else _CHOICES
    options = " or ".join(f"--label-scheme {name} ({meaning})" for name, meaning in choices)
    listed = ", ".join(str(value) for value in sorted(present))
    return Problem(
        str(where),
        f"label values {listed} mean different tissues in different data sets, and no file or folder name tells which",
        f"Choose {options}, or --label-scheme classes to train on plain classes",
    )


def _not_labels(count: int, case: Case, where: Path) -> Problem:
    name = "" if case.label is None else f" (such as {case.label.path.name})"
    return Problem(
        str(where),
        f"what its name makes a reference mask{name} holds {count} different values and looks like an image",
        "Name the reference masks with --modality label=SUFFIX and the images with --modality NAME=SUFFIX",
    )


def values_of(cases: Sequence[Case], *, stop_at: int | None = None) -> set[int]:
    """Label values (0 included) of up to 200 references, evenly spread; unreadable ones are left to the check."""
    step = max(1, len(cases) // _SAMPLED_REFERENCES)
    values: set[int] = set()
    for case in cases[::step]:
        if case.label is None:
            continue
        try:
            labels, _ = read_labels(case.label.path, case.label.channel)
        except DataError:
            continue
        values |= present_values(labels)
        if stop_at in values:
            break
    return values


def present_values(labels: object) -> set[int]:
    """The values that occur in a label map, 0 included."""
    import numpy as np

    occurs = np.zeros(256, np.bool_)
    occurs[np.asarray(labels, np.uint8).ravel(order="K")] = True  # in the order of memory: files are not in C order
    return {int(value) for value in np.flatnonzero(occurs)}


def _as_named_in(scheme: LabelScheme, tissues: Mapping[str, int]) -> dict[str, int]:
    """Tissues with NCR called NET where the scheme knows but one core without enhancement, and calls it so."""
    has_one_core = "NET" in scheme.values and "NCR" not in scheme.values
    return {"NET" if name == "NCR" and has_one_core else name: value for name, value in tissues.items()}


def _tissue_of(name: str) -> str:
    words = " ".join(re.findall(r"[a-z0-9]+", name.lower()))
    padded = f" {words} "
    for tissue, synonyms in _TISSUES:
        if any(f" {synonym} " in padded for synonym in synonyms):
            return tissue
    return name


def _class_name(case: Case) -> str:
    """What the file name of a one-class reference calls it ("lesions"), else "label_1"."""
    stem = "" if case.label is None else case.label.path.name.split(".")[0].lower()
    return next((word for word in ("lesions", "lesion", "tumour", "tumor", "gtv") if stem.endswith(word)), "label_1")
