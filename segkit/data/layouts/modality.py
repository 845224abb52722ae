"""What a file name says: modality, reference mask, or neither.

Names are cut into tokens at `-`, `_`, `.` and spaces, and compared without regard to case, so that `_t1` can never be
taken for the beginning of `_t1ce`. Longer sequences of tokens are tried first (`T2-FLAIR` before `FLAIR`, `t1n-voided`
before `t1n`). Synonyms are those of BraTS 2012-2026, UPENN-GBM, BIDS and common clinical exports.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from segkit.data.case import BRATS_MODALITIES

LABEL = "label"
"""The kind of a file that holds the reference mask."""

IGNORED = "ignored"
"""The kind of a file that is known and neither an image nor a reference, such as a brain mask."""

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
    ),
    IGNORED: ("brainmask", "brain mask", "bet mask", "mask brain", "fov", "fov mask", "2ndho", "manual2"),
}
"""Canonical name, or kind of file, to what people call it; a space stands for any separator."""

_SEPARATORS = re.compile(r"[-_.\s]+")
_KIND_OF: dict[tuple[str, ...], str] = {
    tuple(synonym.split()): kind for kind, synonyms in SYNONYMS.items() for synonym in synonyms
}
_LONGEST = max(len(sequence) for sequence in _KIND_OF)


@dataclass(frozen=True)
class NameParts:
    """A file name taken apart: `kind` (a modality, LABEL, IGNORED or None) and the `rest` of the name.

    `is_leading` says that the kind stood at the beginning, so that the rest describes rather than identifies; `word` is
    what told the kind, in small letters and with spaces for separators.
    """

    kind: str | None
    rest: str
    is_leading: bool = False
    word: str = ""


def canonical_modality(name: str) -> str | None:
    """The canonical name (t1n, t1c, t2w, t2f) of what a person or a `dataset.json` calls a modality, else None."""
    kind = _KIND_OF.get(tuple(token for token in _SEPARATORS.split(name.lower()) if token))
    return kind if kind in BRATS_MODALITIES else None


def kind_of(name: str) -> str | None:
    """The kind that a whole name stands for ("t1ce" -> "t1c", "seg" -> LABEL), else None."""
    return _KIND_OF.get(tuple(token for token in _SEPARATORS.split(name.lower()) if token))


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
    return NameParts(None, stem)


def _windows(count: int) -> Iterable[tuple[int, int]]:
    """Token windows (first, last) in order of trust: suffixes, prefixes, then anywhere; longest first in each."""
    lengths = range(min(_LONGEST, count), 0, -1)
    yield from ((count - length, count) for length in lengths)
    yield from ((0, length) for length in lengths)
    for length in lengths:
        yield from ((first, first + length) for first in range(1, count - length))


def in_channel_order(modalities: Iterable[str]) -> tuple[str, ...]:
    """Each modality once: canonical ones in canonical order, then the others in the order in which they came."""
    names: Sequence[str] = list(dict.fromkeys(modalities))
    canonical = [name for name in BRATS_MODALITIES if name in names]
    return (*canonical, *(name for name in names if name not in BRATS_MODALITIES))
