"""A bank of lesion-free copies of scans, and what training makes of it: real lesions in other, healthy-looking brains.

`segkit inpaint --bank` writes a bank; training only reads it and needs no inpainting model:

    bank.json                      modalities, cases with their patients, the model that made the copies
    CASE/CASE_MODALITY.nii.gz      the copy, on the grid of the scan
    CASE/CASE_lesion.nii.gz        1 where voxels are made up

Only copies of cases that train are used. A copy of a validation case would show its brain to the network, and one
with labelled voxels that were not made up would teach that a lesion is none.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from segkit.data.case import Case, ImageFile
from segkit.data.files import read_labels
from segkit.data.geometry import same_grid
from segkit.data.preprocessing import PreparedCase, PreprocessingConfig
from segkit.data.store import PreparedStore, StoredCases
from segkit.data.transplant import Transplant, cut_lesion
from segkit.errors import DataError, RequestError, some

_log = logging.getLogger(__name__)

BANK_NAME = "bank.json"
_MAKE = "`segkit inpaint --bank`"


class BankedCase(BaseModel):
    """A case of a bank."""

    model_config = ConfigDict(frozen=True)

    case: str
    patient: str


class Bank(BaseModel):
    """What `bank.json` says; `model` tells which model made the copies."""

    model_config = ConfigDict(frozen=True)

    version: Literal[1] = 1
    modalities: tuple[str, ...]
    cases: tuple[BankedCase, ...]
    model: dict[str, Any] = {}


def image_path(folder: Path, case_id: str, modality: str) -> Path:
    """Where a bank keeps the copy of one modality."""
    return folder / case_id / f"{case_id}_{modality}.nii.gz"


def lesion_path(folder: Path, case_id: str) -> Path:
    """Where a bank keeps the mask of the voxels that are made up."""
    return folder / case_id / f"{case_id}_lesion.nii.gz"


def read_bank(folder: Path) -> Bank:
    """What a bank says of itself.

    Raises:
        RequestError: there is none here, or this version cannot read it.
    """
    path = folder / BANK_NAME
    try:
        return Bank.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(
            f"holds no {BANK_NAME} that can be read", where=folder, expected=f"a folder written by {_MAKE}"
        ) from error
    except (ValidationError, UnicodeDecodeError) as error:
        raise RequestError(
            f"is damaged, or of another version: {error}", where=path, remedy=f"Make the bank again with {_MAKE}"
        ) from error


def find_copies(folder: Path, training: Sequence[Case], modalities: Sequence[str]) -> list[Case]:
    """The copies of training cases that a bank holds, with the mask of what is made up as their label.

    Copies of other cases, and of a case of that name of another patient, are left out with a message.

    Raises:
        RequestError: the bank cannot be read, lacks a modality, or holds no copy of a training case.
    """
    bank = read_bank(folder)
    if missing := [modality for modality in modalities if modality not in bank.modalities]:
        raise RequestError(
            f"the bank has no copies of {', '.join(missing)}; it has {', '.join(bank.modalities) or 'none'}",
            where=folder,
            expected=f"copies of {', '.join(modalities)}",
            remedy=f"Make a bank with a model that restores them all, with {_MAKE}",
        )
    patients = {case.id: case.patient for case in training}
    usable = [banked for banked in bank.cases if patients.get(banked.case) == banked.patient]
    if not usable:
        raise RequestError(
            f"none of its {len(bank.cases)} copies is of a case that trains",
            where=folder,
            expected="copies of training cases, by the names that they have here",
            remedy=f"Make a bank of this data with {_MAKE}",
        )
    if others := [banked.case for banked in bank.cases if banked not in usable]:
        names = some(others)
        _log.info(
            "%d of the bank's %d copies are left out, their cases do not train: %s", len(others), len(bank.cases), names
        )
    return [
        Case(
            banked.case,
            banked.patient,
            {modality: ImageFile(image_path(folder, banked.case, modality)) for modality in modalities},
            ImageFile(lesion_path(folder, banked.case)),
        )
        for banked in usable
    ]


def prepare_copies(
    copies: Sequence[Case],
    training: Mapping[str, Case],
    store: PreparedStore,
    modalities: tuple[str, ...],
    config: PreprocessingConfig,
    *,
    at_once: int = 1,
) -> StoredCases:
    """The copies prepared as the cases are, `at_once` at a time; those that cannot be used are named and left out.

    Args:
        copies: as `find_copies` gives them.
        training: the cases by id that they are copies of.
        store: keeps the prepared copies, beside the cases.
        modalities: in channel order.
        config: the settings that the cases were prepared with.
        at_once: how many are read at a time.

    Raises:
        DataError: none can be used.
    """
    with ThreadPoolExecutor(at_once) as pool:
        problems = pool.map(_lesion_left, copies, [training[copy.id] for copy in copies])
        skipped = {copy.id: problem for copy, problem in zip(copies, problems, strict=True) if problem is not None}
    free = [copy for copy in copies if copy.id not in skipped]
    folders, unreadable = store.entries(free, modalities, None, config, at_once=at_once)
    skipped |= unreadable
    for reason in skipped.values():
        _log.warning("copy left out: %s", reason)
    if not folders:
        raise DataError("no copy of the bank can be used", remedy=f"The first: {next(iter(skipped.values()))}")
    return StoredCases(list(folders.values()))


class LesionBank:
    """Puts other cases in the place of some of the training cases.

    For `lesion_share` of the draws a lesion of the case is moved into the copy of another case; for
    `lesion_free_share` of them there is a copy alone, whose labels are all 0; else the case stays as it is. It also
    stays where it has no lesion to move, and where no place in the other brain takes most of it.
    """

    def __init__(self, copies: Sequence[PreparedCase], *, lesion_share: float, lesion_free_share: float) -> None:
        self.copies = copies
        self.lesion_share = lesion_share
        self.lesion_free_share = lesion_free_share

    def exchange(self, case: PreparedCase, generator: np.random.Generator) -> tuple[PreparedCase, Transplant | None]:
        """The case to cut a patch from, and a lesion to lay over what was cut, if there is one.

        The labels of an exchanged case are all 0; its `foreground` is that of the lesion.
        """
        draw = generator.random()
        if draw < self.lesion_share:
            return self._with_lesion_of(case, generator)
        if draw < self.lesion_share + self.lesion_free_share:
            return _unlabelled(self.copies[int(generator.integers(len(self.copies)))]), None
        return case, None

    def _with_lesion_of(
        self, case: PreparedCase, generator: np.random.Generator
    ) -> tuple[PreparedCase, Transplant | None]:
        two = (self.copies[int(number)] for number in generator.permutation(len(self.copies))[:2])
        other = next((copy for copy in two if copy.id != case.id), None)
        values = sorted(case.foreground)
        if other is None or not values:
            return case, None
        voxels = case.foreground[values[generator.integers(len(values))]]
        voxel = np.unravel_index(int(voxels[generator.integers(len(voxels))]), case.image.shape[1:])
        transplant = cut_lesion(case, [int(place) for place in voxel]).moved_into(other.image, generator)
        if transplant is None:
            return case, None
        return replace(_unlabelled(other), foreground=transplant.foreground(other.image.shape[1:])), transplant


def _unlabelled(copy: PreparedCase) -> PreparedCase:
    return replace(copy, labels=np.broadcast_to(np.uint8(0), copy.image.shape[1:]), foreground={})


def _lesion_left(copy: Case, case: Case) -> str | None:
    """Why a copy is not free of the lesions that the reference of its case marks; None if it is."""
    if copy.label is None or case.label is None:
        raise ValueError(f"case {case.id} or its copy has no mask")
    try:
        made_up, grid = read_labels(copy.label.path)
        labels, label_grid = read_labels(case.label.path, case.label.channel)
    except DataError as error:
        return str(error)
    if (difference := same_grid(grid, label_grid)) is not None:
        return f"{copy.label.path}: it is not on the grid of the reference: {difference}"
    left = int(np.count_nonzero(labels[made_up == 0]))
    if left == 0:
        return None
    return (
        f"{copy.label.path}: {left} voxels that the reference {case.label.path} labels were not made up. "
        f"Make the bank with the references as --lesions"
    )
