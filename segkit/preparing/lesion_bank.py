"""A bank of lesion-free copies of scans, and real lesions moved into them as training data.

`segkit inpaint --bank` writes a bank; training reads it and needs no inpainting model:

    bank.json                      modalities, cases with their patients, the model that made the copies
    CASE/CASE_MODALITY.nii.gz      the copy, on the grid of the scan
    CASE/CASE_lesion.nii.gz        1 where voxels were filled in

Only copies of training cases are used: a copy of a validation case would show its brain to the network. A copy with
labelled voxels that were not filled in is refused, because it would show a lesion that is labelled as background.

A *lesion* is a connected component of the labelled voxels of a prepared case. It is moved into the copy of another
case with its labels: its image is matched to the new surroundings, and its border is blended. *Tissue* are the voxels
that are not 0 in every modality. A lesion is cut off where the tissue of either brain ends, so the background stays
exactly 0. Moving lesions between scans is the idea of CarveMix (Zhang et al., MICCAI 2021, arXiv 2108.06883), without
matching and blending.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from monai.transforms import RandomizableTransform
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError
from scipy import ndimage

from segkit.errors import DataError, RequestError, some
from segkit.preparing.cache import PreparedStore, StoredCases, cases_at_once
from segkit.preparing.preprocessing import PreparedCase, PreprocessingConfig
from segkit.preparing.transforms import IMAGE, LABEL, generator_from
from segkit.reading.case import Case, ImageFile
from segkit.reading.files import read_labels, read_reference
from segkit.reading.geometry import same_grid
from segkit.shapes import AnyArray, Image, LabelMap, overlap

_log = logging.getLogger(__name__)

BANK_NAME = "bank.json"
_MAKE = "`segkit inpaint --bank`"

_BORDER = 3  # voxels around a lesion over which its image is blended into the other; fewer across thick slices
_SHIFT = 0.25  # largest shift of a lesion from its relative position, as a share of the sides of the volume
_TRIES = 8
_ENOUGH_TISSUE, _LEAST_TISSUE = 0.9, 0.5
"""Shares of a lesion in tissue: enough to stop the search for a place, and the least that is accepted."""
_MOST_VOXELS_TRIED = 1000


class BankedCase(BaseModel, frozen=True):
    """A case of a bank."""

    case: str
    patient: str


class Bank(BaseModel, frozen=True):
    """The content of `bank.json`; `model` describes the model that made the copies."""

    version: Literal[1] = 1
    modalities: tuple[str, ...]
    cases: tuple[BankedCase, ...]
    model: dict[str, Any] = {}


def image_path(folder: Path, case_id: str, modality: str) -> Path:
    """Where a bank keeps the copy of one modality."""
    return folder / case_id / f"{case_id}_{modality}.nii.gz"


def lesion_path(folder: Path, case_id: str) -> Path:
    """Where a bank keeps the mask of the voxels that were filled in."""
    return folder / case_id / f"{case_id}_lesion.nii.gz"


def read_bank(folder: Path) -> Bank:
    """The `bank.json` of a bank.

    Raises:
        RequestError: there is no bank in this folder, or this version cannot read it.
    """
    path = folder / BANK_NAME
    try:
        return Bank.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        found, expected = f"contains no readable {BANK_NAME}", f"a folder written by {_MAKE}"
        raise RequestError(found, where=folder, expected=expected) from error
    except (ValidationError, UnicodeDecodeError) as error:
        found, remedy = f"is damaged or of another version: {error}", f"Make the bank again with {_MAKE}"
        raise RequestError(found, where=path, remedy=remedy) from error


def find_copies(folder: Path, training: Sequence[Case], modalities: Sequence[str]) -> list[Case]:
    """The copies of training cases in a bank, with the mask of the filled voxels as their label.

    Copies of other cases, also of a case with the same name but another patient, are left out with a message.

    Raises:
        RequestError: the bank cannot be read, lacks a modality, or has no copy of a training case.
    """
    bank = read_bank(folder)
    if missing := [modality for modality in modalities if modality not in bank.modalities]:
        found = f"the bank has no copies of {', '.join(missing)}; it has {', '.join(bank.modalities) or 'none'}"
        remedy = f"Make a bank with {_MAKE} and a model that restores them all"
        raise RequestError(found, where=folder, expected=f"copies of {', '.join(modalities)}", remedy=remedy)
    patients = {case.id: case.patient for case in training}
    usable = [banked for banked in bank.cases if patients.get(banked.case) == banked.patient]
    if not usable:
        found, expected = f"none of its {len(bank.cases)} copies is of a training case", "copies of the training cases"
        raise RequestError(found, where=folder, expected=expected, remedy=f"Make a bank of this data with {_MAKE}")
    if others := [banked.case for banked in bank.cases if banked not in usable]:
        count = f"{len(others)} of {len(bank.cases)}"
        _log.info("%s copies of the bank are not of training cases and are left out: %s", count, some(others))

    def copy_of(case: str, patient: str) -> Case:
        images = {modality: ImageFile(image_path(folder, case, modality)) for modality in modalities}
        return Case(case, patient, images, ImageFile(lesion_path(folder, case)))

    return [copy_of(banked.case, banked.patient) for banked in usable]


def prepare_copies(
    copies: Sequence[Case],
    training: Mapping[str, Case],
    store: PreparedStore,
    modalities: tuple[str, ...],
    config: PreprocessingConfig,
    *,
    memory_gb: float | None = None,
) -> StoredCases:
    """The copies of training cases (by id), prepared like the cases; unusable ones are left out with a warning.

    Raises:
        DataError: none can be used.
    """
    with ThreadPoolExecutor(cases_at_once(copies, modalities, memory_gb)) as pool:
        problems = pool.map(_lesion_left, copies, [training[copy.id] for copy in copies])
        skipped = {copy.id: problem for copy, problem in zip(copies, problems, strict=True) if problem is not None}
    free = [copy for copy in copies if copy.id not in skipped]
    folders, unreadable = store.entries(free, modalities, None, config, memory_gb=memory_gb)
    skipped |= unreadable
    for reason in skipped.values():
        _log.warning("copy left out: %s", reason)
    if not folders:
        raise DataError("no copy of the bank can be used", remedy=f"The first error: {next(iter(skipped.values()))}")
    return StoredCases(list(folders.values()))


class LesionBank(RandomizableTransform):  # type: ignore[misc]
    """Replaces some of the training cases by copies with or without a lesion: a transform of {"case": PreparedCase}.

    For `lesion_share` of the draws a lesion of the case is moved into the copy of another case. For
    `lesion_free_share` of them a copy is used unchanged, with labels that are all 0. Otherwise the case is used itself,
    also if it has no lesion or the other brain has no place for it.
    """

    def __init__(self, copies: Sequence[PreparedCase], *, lesion_share: float, lesion_free_share: float) -> None:
        super().__init__()
        self.copies = copies
        self.lesion_share = lesion_share
        self.lesion_free_share = lesion_free_share

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """The case to cut a patch from, and "lesion", see `exchange`."""
        case, lesion = self.exchange(data["case"], generator_from(self.R))
        return {"case": case, "lesion": lesion}

    def exchange(self, case: PreparedCase, generator: np.random.Generator) -> tuple[PreparedCase, Transplant | None]:
        """The case to cut a patch from, and the lesion to paste into that patch, if there is one.

        A copy has labels that are all 0, and the `foreground` of the lesion.
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
    """Why a copy still shows lesions of the reference of its case; None if it shows none."""
    if copy.label is None or case.label is None:
        raise ValueError(f"case {case.id} or its copy has no mask")
    try:
        filled, grid = read_labels(copy.label.path)
        labels, label_grid = read_reference(case.label)
    except DataError as error:
        return str(error)
    if (difference := same_grid(grid, label_grid)) is not None:
        return f"{copy.label.path}: it is not on the grid of the reference: {difference}"
    left = int(np.count_nonzero(labels[filled == 0]))
    found = f"{copy.label.path}: {left} labelled voxels of {case.label.path} were not filled in"
    return f"{found}. Make the bank with the references as --lesions" if left else None


@dataclass(frozen=True)
class Transplant:
    """A lesion matched to its new surroundings, whose first voxel is at voxel `corner` of the new volume.

    image: (C, *box) float32; labels: (*box) uint8, 0 outside the lesion; weight: (*box) float32, the share of `image`
    in the result, from 1 in the lesion to 0 around it.
    """

    corner: tuple[int, ...]
    image: Image = field(repr=False)
    labels: LabelMap = field(repr=False)
    weight: NDArray[np.float32] = field(repr=False)

    def foreground(self, shape: Sequence[int]) -> dict[int, NDArray[np.intp]]:
        """Flat C-order indices, in a volume of `shape`, of the lesion's voxels by label value."""
        voxels = np.nonzero(self.labels)
        flat = np.ravel_multi_index([axis + first for axis, first in zip(voxels, self.corner, strict=True)], shape)
        values = self.labels[voxels]
        return {int(value): flat[values == value] for value in np.unique(values)}

    def paste_into(self, sample: Mapping[str, AnyArray], start: Sequence[int]) -> dict[str, AnyArray]:
        """A copy, with the lesion, of a sample that starts at voxel `start` of the new volume.

        A sample is "image" (C, *region) float32 and "label" (1, *region) uint8.
        """
        image, labels = np.array(sample[IMAGE]), np.array(sample[LABEL])
        own, other = overlap(self.corner, self.labels.shape, start, labels.shape[1:])
        part = image[(slice(None), *other)]
        part += self.weight[own] * (self.image[(slice(None), *own)] - part)
        lesion = self.labels[own]
        np.copyto(labels[0][other], lesion, where=lesion > 0)
        return {IMAGE: image, LABEL: labels}


@dataclass(frozen=True)
class Lesion:
    """A lesion and the voxels around it: the arrays of a `Transplant` before matching.

    `middle` is the middle of their box as a share of the sides of the source volume.
    """

    image: Image = field(repr=False)
    labels: LabelMap = field(repr=False)
    weight: NDArray[np.float32] = field(repr=False)
    middle: tuple[float, ...]

    def moved_into(self, volume: Image, generator: np.random.Generator) -> Transplant | None:
        """The lesion at a place in `volume` (C, *spatial) where most of it lies in tissue; None if there is none.

        Places are drawn around its position in the source volume, relative to the size; that position is tried last.
        """
        shape = np.array(volume.shape[1:])
        own = np.array(self.middle) * shape - np.array(self.labels.shape) / 2
        shifts = [generator.uniform(-_SHIFT, _SHIFT, len(shape)) for _ in range(_TRIES)]
        voxels = np.argwhere((self.labels > 0) & (self.weight > 0))
        voxels = voxels[:: 1 + len(voxels) // _MOST_VOXELS_TRIED]
        best, best_share = None, _LEAST_TISSUE
        for shift in [*shifts, np.zeros(len(shape))]:
            corner = tuple(np.rint(own + shift * shape).astype(int).tolist())
            share = _share_in_tissue(volume, voxels + corner)
            if share >= best_share:
                best, best_share = corner, share
            if share >= _ENOUGH_TISSUE:
                break
        return None if best is None else self.matched(volume, best)

    def matched(self, volume: Image, corner: Sequence[int]) -> Transplant:
        """The lesion with its first voxel at `corner` of `volume` (C, *spatial), cut off where there is no tissue.

        Each modality is shifted by the difference of the mean intensities around the lesion.
        """
        own, other = overlap(corner, self.labels.shape, (0,) * len(corner), volume.shape[1:])
        there, image, labels = volume[(slice(None), *other)], self.image[(slice(None), *own)], self.labels[own]
        weight = self.weight[own] * there.any(axis=0)
        shell = (weight > 0) & (labels == 0)
        if shell.any():
            offset = there[:, shell].mean(axis=1) - image[:, shell].mean(axis=1)
            image = image + offset.reshape(-1, *(1,) * labels.ndim)
        return Transplant(tuple(max(first, 0) for first in corner), image, np.where(weight > 0, labels, 0), weight)


def cut_lesion(case: PreparedCase, voxel: Sequence[int]) -> Lesion:
    """The lesion at a labelled `voxel` of a case with a reference; voxels that touch at a corner are connected."""
    if case.labels is None:
        raise ValueError(f"case {case.id} has no reference")
    parts, _ = ndimage.label(case.labels, structure=np.ones((3,) * case.labels.ndim))
    number = parts[tuple(voxel)]
    if number == 0:
        raise ValueError(f"voxel {tuple(voxel)} of case {case.id} has no label")
    tight = ndimage.find_objects(parts, number)[number - 1]
    box = tuple(slice(max(side.start - _BORDER, 0), side.stop + _BORDER) for side in tight)
    image, labels = np.asarray(case.image[(slice(None), *box)]), case.labels[box]
    is_lesion = parts[box] == number
    is_usable = image.any(axis=0) & (is_lesion | (labels == 0))  # another lesion would come without its labels
    sides_mm = np.array(case.preparation.spacing_mm)
    distance = ndimage.distance_transform_edt(~is_lesion, sampling=sides_mm / sides_mm.min())
    weight = np.where(is_usable, np.clip(1 - distance / (_BORDER + 1), 0, 1), 0).astype(np.float32)
    shape = case.labels.shape
    middle = tuple((side.start + size / 2) / whole for side, size, whole in zip(box, labels.shape, shape, strict=True))
    return Lesion(image, np.where(is_lesion, labels, 0), weight, middle)


def _share_in_tissue(volume: Image, voxels: NDArray[np.intp]) -> float:
    """Share of the voxels (N, axes) that lie inside `volume` (C, *spatial) and in its tissue."""
    is_inside = ((voxels >= 0) & (voxels < volume.shape[1:])).all(axis=1)
    if not is_inside.any():
        return 0.0
    is_tissue = volume[(slice(None), *voxels[is_inside].T)].any(axis=0)
    return float(is_tissue.sum()) / len(voxels)
