"""A case: the files of one scan session of one patient, and a cohort: the cases of one data folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from segkit.errors import Problem
from segkit.labels import LabelScheme

BRATS_MODALITIES = ("t1n", "t1c", "t2w", "t2f")
"""Canonical names and canonical channel order of the four BraTS sequences."""


@dataclass(frozen=True)
class ImageFile:
    """A file on disk, or one channel of a file with several (4D NIfTI: last axis; picture: red, green, blue)."""

    path: Path
    channel: int | None = None


@dataclass(frozen=True)
class Case:
    """Files of one case by modality, in the cohort's channel order; `label` where a reference exists.

    `scheme` is the label scheme in which this case's reference is written and its mask is to be written.
    `problems` are findings of the layout itself (two files for one modality, a missing modality ...).
    """

    id: str
    patient: str
    images: Mapping[str, ImageFile]
    label: ImageFile | None = None
    scheme: LabelScheme | None = None
    problems: tuple[Problem, ...] = ()


def is_file_name(text: str) -> bool:
    """Whether a text, such as a case id that results are named by, is the name of a file and no way to another."""
    return text not in ("", ".", "..") and text.isprintable() and not any(letter in "/\\:" for letter in text)


def file_name_of(name: str) -> str:
    """A name, such as that of a tissue, as part of a file name: `a/b` is `a_b`, and `..` leads nowhere."""
    return "".join("_" if letter in "/\\:" or not letter.isprintable() else letter for letter in name)


@dataclass(frozen=True)
class Cohort:
    """What a data folder holds: its layout, its label scheme, its modalities in channel order, its cases.

    `scheme` is None where the folder has no references or where they cannot be told from names and values; `problems`
    then says what to type. `dims` is 3 for volumes and 2 for pictures.
    """

    root: Path
    layout: str
    scheme: LabelScheme | None
    modalities: tuple[str, ...]
    cases: tuple[Case, ...]
    problems: tuple[Problem, ...] = ()
    dims: int = 3
    licence: str | None = None
