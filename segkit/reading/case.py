"""Case: the files of one scan session of one patient. Cohort: the cases of one data folder."""

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

    `scheme` is the label scheme of this case's reference and of its predicted mask. `problems` are findings of the
    layout itself (two files for one modality, a missing modality ...).
    """

    id: str
    patient: str
    images: Mapping[str, ImageFile]
    label: ImageFile | None = None
    scheme: LabelScheme | None = None
    problems: tuple[Problem, ...] = ()


def is_file_name(text: str) -> bool:
    """Whether a text, such as a case id, is a plain file name, without separators or control characters."""
    return text not in ("", ".", "..") and text.isprintable() and not any(letter in "/\\:" for letter in text)


def file_name_of(name: str) -> str:
    """A name, such as that of a tissue, as part of a file name: `a/b` becomes `a_b`."""
    return "".join("_" if letter in "/\\:" or not letter.isprintable() else letter for letter in name)


@dataclass(frozen=True)
class Cohort:
    """The cases of a data folder, with its layout, label scheme, and modalities in channel order.

    `scheme` is None where the folder has no references, or where names and values do not determine it; `problems` then
    names the option to pass. `dims` is 3 for volumes and 2 for pictures.
    """

    root: Path
    layout: str
    scheme: LabelScheme | None
    modalities: tuple[str, ...]
    cases: tuple[Case, ...]
    problems: tuple[Problem, ...] = ()
    dims: int = 3
    licence: str | None = None
