"""Case: the files of one scan session of one patient. Cohort: the cases of one data folder. Modality names.

File names are split into tokens at `-`, `_`, `.` and spaces and compared in lower case; longer sequences of tokens are
tried first (`T2-FLAIR` before `FLAIR`). Synonyms: those of BraTS 2012-2026, UPENN-GBM, BIDS and clinical exports.
"""

import logging
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from segkit.errors import DataError, Problem
from segkit.labels import LabelScheme

BRATS_MODALITIES = ("t1n", "t1c", "t2w", "t2f")
"""Canonical names and canonical channel order of the four BraTS sequences."""
LABEL = "label"
"""The kind of a file that holds the reference mask."""
IGNORED = "ignored"
"""The kind of a known file that is neither an image nor a reference, such as a brain mask."""

SYNONYMS: dict[str, tuple[str, ...]] = {
    "t1n": ("t1n", "t1", "t1w", "t1 native", "t1 pre", "t1pre"),
    "t1c": (
        *("t1c", "t1ce", "t1gd", "t1gad", "t1post", "t1km", "t1wce", "ct1", "t1cw", "ce t1", "ce t1w", "gd t1"),
        *("t1 c", "t1 ce", "t1 gd", "t1 gad", "t1 post", "t1 km", "t1w ce", "t1w gd", "t1w post", "t1gd w", "t1w gad"),
    ),
    "t2w": ("t2w", "t2", "t2 w"),
    "t2f": ("t2f", "flair", "fla", "fl", "t2flair", "t2 flair", "t2w flair", "flairw"),
    LABEL: (
        *("seg", "segm", "segmentation", "label", "labels", "lesion", "lesions", "gt", "ground truth", "groundtruth"),
        *("truth", "manual", "manual1", "1stho", "dseg", "annotation", "gtv", "tumor", "tumour", "mask", "ot"),
        *("otmulticlass", "lesion mask", "tumor mask", "tumour mask", "seg mask", "lesion seg", "tumor seg", "msk"),
        *("tumormask", "tumourmask", "lesionmask", "segmentations", "masks", "tumor segmentation", "wmh"),
        *("tumour segmentation", "lesion segmentation", "seg label", "mask label", "gt mask", "gt seg"),
    ),
    IGNORED: (
        *("brainmask", "brain mask", "bet mask", "mask brain", "fov", "fov mask", "2ndho", "manual2"),
        *("brain segmentation", "brain parenchyma segmentation", "parenchyma segmentation", "superpixels"),
    ),
}
"""Synonyms in lower case by canonical modality or kind of file; a space stands for any separator."""

_SEPARATORS = re.compile(r"[-_.\s]+")
_WORD = re.compile(r"\d+|[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[^\W\d_A-Za-z]+")
_NUMBERED_LABEL = re.compile(
    r"(?P<before>\d*)(?P<word>labels?|lbl|masks?|segm?|segmentation|gt)(?P<behind>\d*)", re.IGNORECASE
)
"""A word for references joined to the number of its case: `label0001`, `1Mask`."""
_KIND_OF: dict[tuple[str, ...], str] = {
    tuple(synonym.split()): kind for kind, synonyms in SYNONYMS.items() for synonym in synonyms
}
_LONGEST = max(len(sequence) for sequence in _KIND_OF)
_UNSPECIFIC = ("image", "mr", "mri")
"""Modalities of a model that name no sequence."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageFile:
    """A file on disk, or one channel of a file with several (4D NIfTI: last axis; picture: red, green, blue).

    A reference may have a file for each class: `parts` are then the label values and their masks in painting order,
    and `path` is the first of them.
    """

    path: Path
    channel: int | None = None
    parts: tuple[tuple[int, Path], ...] = ()

    def paths(self) -> tuple[Path, ...]:
        """All its files."""
        return tuple(path for _, path in self.parts) or (self.path,)


@dataclass(frozen=True)
class Case:
    """Files of one case by modality, in the cohort's channel order; `label` where a reference exists.

    `scheme` is the label scheme of its reference and its predicted mask. `problems` are findings of the layout.
    """

    id: str
    patient: str
    images: Mapping[str, ImageFile]
    label: ImageFile | None = None
    scheme: LabelScheme | None = None
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True)
class Cohort:
    """The cases of a data folder, with its layout, label scheme, and modalities in channel order.

    `scheme` is None without references, and where it is ambiguous (`problems` then names the option to pass). `dims` is
    3 for volumes and 2 for pictures.
    """

    root: Path
    layout: str
    scheme: LabelScheme | None
    modalities: tuple[str, ...]
    cases: tuple[Case, ...]
    problems: tuple[Problem, ...] = ()
    dims: int = 3
    licence: str | None = None
    files: Mapping[str, int] = field(default_factory=dict)
    """How many files of the folder are images and references of cases, other images, and no images."""

    @property
    def is_numbered(self) -> bool:
        """Whether all cases are named CASE_0000, CASE_0001 ..., which may as well be the channels of one case."""
        return self.layout != "nnunet" and all(re.fullmatch(r".+_\d{4}", case.id) for case in self.cases)

    @property
    def left_out(self) -> tuple[str, ...]:
        """The files that belong to no usable case, see `Problem.left_out`; relative to the folder."""
        paths = (Path(path) for problem in self.problems for path in problem.left_out)
        inside = (path.relative_to(self.root) if path.is_relative_to(self.root) else Path(path.name) for path in paths)
        return tuple(dict.fromkeys(path.as_posix() for path in inside))


def usable_only(cohort: Cohort, excluded: Collection[str] = ()) -> Cohort:
    """The cohort without the `excluded` cases, and without those that have a fatal problem, which are `left_out`.

    The problems of all other cases, and those that leave out files, are logged.
    """
    cases = [case for case in cohort.cases if case.id not in excluded]
    lost = [
        replace(problem, left_out=tuple(str(file.path) for file in case.images.values()))
        for case in cases
        for problem in case.problems
        if problem.is_fatal
    ]
    of_cases = [problem for case in cases for problem in case.problems]
    for problem in (*(problem for problem in cohort.problems if problem.left_out), *of_cases):
        _log.warning("%s", problem)
    usable = tuple(case for case in cases if not any(problem.is_fatal for problem in case.problems))
    return replace(cohort, cases=usable, problems=(*cohort.problems, *lost))


def is_file_name(text: str) -> bool:
    """Whether a text, such as a case id, is a plain file name, without separators or control characters."""
    return text not in ("", ".", "..") and text.isprintable() and not any(letter in "/\\:" for letter in text)


def file_name_of(name: str) -> str:
    """A name, such as that of a tissue, as part of a file name: `a/b` becomes `a_b`."""
    return "".join("_" if letter in "/\\:" or not letter.isprintable() else letter for letter in name)


@dataclass(frozen=True)
class NameParts:
    """A file name split into its `kind` (a modality, LABEL, IGNORED or None) and the `rest` of the name.

    `is_leading`: the kind is at the beginning, so that the rest does not identify the case. `word` is the synonym found
    (lower case, spaces as separators).
    """

    kind: str | None
    rest: str
    is_leading: bool = False
    word: str = ""


def canonical_modality(name: str) -> str | None:
    """The canonical name (t1n, t1c, t2w, t2f) of a modality in any spelling, else None."""
    kind = kind_of(name)
    return kind if kind in BRATS_MODALITIES else None


def kind_of(name: str) -> str | None:
    """The kind that a whole name means ("t1ce" -> "t1c", "seg" -> LABEL), else None."""
    return _KIND_OF.get(tuple(token for token in _SEPARATORS.split(name.lower()) if token))


def words_of(name: str) -> list[str]:
    """The words and numbers of a name in lower case; `GroundTruth`, `label0001` and `tumor-mask` have two each."""
    return [word.lower() for word in _WORD.findall(name)]


def split_name(stem: str) -> NameParts:
    """Find the kind in a file name without suffix: at its end, else at its start, else once in its middle."""
    spans = [match.span() for match in re.finditer(r"[^-_.\s]+", stem)]
    tokens = [stem[start:stop].lower() for start, stop in spans]
    for first, last in _windows(len(tokens)):
        kind = _KIND_OF.get(tuple(tokens[first:last]))
        if kind is None:
            continue
        before = stem[: spans[first][0]].rstrip("-_. ")
        after = stem[spans[last - 1][1] :].lstrip("-_. ")
        rest = "_".join(part for part in (before, after) if part)
        return NameParts(kind, rest, first == 0 and last < len(tokens), " ".join(tokens[first:last]))
    for start, stop in spans:
        if match := _NUMBERED_LABEL.fullmatch(stem, start, stop):
            number = match["before"] + match["behind"]
            return NameParts(LABEL, stem[:start] + number + stem[stop:], start == 0, match["word"].lower())
    return NameParts(None, stem)


def _windows(count: int) -> Iterable[tuple[int, int]]:
    """Token windows (first, last) in order of preference: suffixes, prefixes, then others; longest first in each."""
    lengths = range(min(_LONGEST, count), 0, -1)
    yield from ((count - length, count) for length in lengths)
    yield from ((0, length) for length in lengths)
    for length in lengths:
        yield from ((first, first + length) for first in range(1, count - length))


def in_channel_order(modalities: Iterable[str]) -> tuple[str, ...]:
    """Each modality once: canonical ones in canonical order, then the others in their order of appearance."""
    names: Sequence[str] = list(dict.fromkeys(modalities))
    canonical = [name for name in BRATS_MODALITIES if name in names]
    return (*canonical, *(name for name in names if name not in BRATS_MODALITIES))


def match_modalities(case: Case, wanted: Sequence[str], *, allow_missing: bool = False) -> Case:
    """The case with its images named as the model's input channels, without its reference.

    Synonyms match (`t1ce` is `t1c`). A model of one modality accepts the only image of a case under any name, unless it
    is known to be another sequence. Images numbered 0, 1, 2 ... or channel_0, channel_1 ... (nnU-Net, Decathlon, 4D
    files) are taken in order, except by models with BraTS modalities, whose numbers differ from source to source.
    Raises DataError where a modality is missing (unless `allow_missing` and at least one exists).
    """
    images = {name: case.images[found] for name, found in match_names(list(case.images), wanted).items()}
    missing = [name for name in wanted if name not in images]
    if missing and not (allow_missing and images):
        what = f"modalities {', '.join(missing)} are" if len(missing) > 1 else f"modality {missing[0]} is"
        found = f"{what} missing (found: {', '.join(case.images) or 'no image'})"
        remedy = "Add the missing files, or name the files with --modality NAME=SUFFIX"
        if all(map(_is_number, case.images)) and len(case.images) > len(wanted):
            remedy = "If each numbered file is a scan of its own, pass --layout folder; else name them with --modality"
        remedy += ", or pass --allow-missing to do without" if images else ""
        raise DataError(found, expected=f"{', '.join(wanted)}, as this model was trained on", remedy=remedy)
    return replace(case, images=images, label=None)


def match_names(found: Sequence[str], wanted: Sequence[str]) -> dict[str, str]:
    """The found name of each wanted modality that is there, by the rules of `match_modalities`."""
    if len(found) > len(wanted) and all(map(_is_number, (*found, *wanted))):
        return {}  # numbered scans, each a case, or another set of channels: the first ones are not the model's
    by_name = {plain_name(name): name for name in found}
    matched = {name: by_name[plain_name(name)] for name in wanted if plain_name(name) in by_name}
    return dict(zip(wanted, found, strict=True)) if not matched and _may_take_in_order(found, wanted) else matched


def plain_name(name: str) -> str:
    """A modality's canonical name, else its own in lower case."""
    return canonical_modality(name) or name.casefold()


def _may_take_in_order(found: Sequence[str], wanted: Sequence[str]) -> bool:
    if len(found) != len(wanted):
        return False
    if len(wanted) == 1:
        is_unspecific = wanted[0].casefold() in _UNSPECIFIC or _is_number(wanted[0])
        return is_unspecific or canonical_modality(found[0]) is None
    is_numbered = all(_is_number(name) for name in found)
    return is_numbered and not any(name in BRATS_MODALITIES for name in wanted)


def _is_number(name: str) -> bool:
    return channel_number(name) is not None


def channel_number(name: str) -> int | None:
    """The number of a channel without a name, "0" or "channel_0"; None for names."""
    digits = name.removeprefix("channel_")
    return int(digits) if digits.isdecimal() else None
