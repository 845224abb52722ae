"""Which voxels of a case are to be made up: those of a mask, or its lesions, marked in a mask or found by a model."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from segkit.checkpoint.run_folder import model_folders
from segkit.errors import CheckpointError, DataError, RequestError, as_request
from segkit.evaluation.pairing import match_files
from segkit.inference.predictor import Predictor
from segkit.preparing.holes import grow
from segkit.reading.case import Case, Cohort, ImageFile
from segkit.reading.files import read_labels
from segkit.reading.geometry import same_grid
from segkit.reading.layouts.layout import list_images
from segkit.reading.layouts.table import find_cases
from segkit.reading.volume import Grid
from segkit.shapes import Image

MARGIN_MM = 5.0
"""By how much lesions are enlarged, as in the BraTS local-synthesis task: what is beside a lesion is not healthy."""

_ROUNDING = 1.001
"""Spacings in headers differ in the 8th digit; a voxel at the margin itself belongs to the hole."""


@dataclass(frozen=True)
class HoleSource:
    """Where the holes of a run come from: a mask for each case id, or a model that finds lesions.

    `complaints` says of a case id why there is no one mask for it. What is marked is enlarged by `margin_mm`, but not
    into background.
    """

    origin: str
    masks: Mapping[str, ImageFile] = field(default_factory=dict)
    complaints: Mapping[str, str] = field(default_factory=dict)
    segmenter: Predictor | None = None
    margin_mm: float = 0.0

    @property
    def identity(self) -> str:
        """Tells holes of one origin from those of another."""
        name = f"{zlib.crc32(str(Path(self.origin).absolute()).encode(errors='backslashreplace')):08x}"
        found_by = name if self.segmenter is None else self.segmenter.identity
        return f"{found_by}+{self.margin_mm:g}mm"

    def mask_of(self, case: Case) -> ImageFile:
        """The mask of a case, by its absolute path.

        Raises:
            DataError: there is none, or several files could be it.
        """
        if case.id in self.complaints:
            raise DataError(self.complaints[case.id])
        if case.id not in self.masks:
            raise DataError(
                f"there is no mask of case {case.id}",
                where=self.origin,
                expected=f"a file such as {case.id}.nii.gz or {case.id}-mask.nii.gz",
                remedy="Add it, or leave the case out with --cases",
            )
        mask = self.masks[case.id]
        return replace(mask, path=mask.path.absolute())

    def to_json(self) -> dict[str, object]:
        """What the manifest tells."""
        return {
            "from": self.origin,
            "margin_mm": self.margin_mm,
            "sha256": [] if self.segmenter is None else self.segmenter.digests,
        }


def masks_of_cohort(cohort: Cohort, origin: Path) -> HoleSource:
    """The masks that the cases of the cohort have themselves; `origin` is where they stay, archive or folder."""
    return HoleSource(str(origin), {case.id: case.label for case in cohort.cases if case.label is not None})


def find_masks(cohort: Cohort, path: Path, margin_mm: float = 0.0) -> HoleSource:
    """The masks of the cases: files of a folder by their names, the references of a data folder, or one file.

    Raises:
        RequestError: there is nothing, no mask belongs to any case, or one mask was given for several cases.
    """
    if path.is_file():
        if len(cohort.cases) != 1:
            raise RequestError(
                f"is one mask, and there are {len(cohort.cases)} cases",
                where=path,
                expected="a folder with one for each case",
                remedy="Give such a folder, or name one case",
            )
        return HoleSource(str(path), {cohort.cases[0].id: ImageFile(path)}, margin_mm=margin_mm)
    masks, complaints = _by_name(cohort.cases, path)
    if len(masks) < len(cohort.cases):  # names of files do not tell which of them are masks; layouts do
        masks = {**_references(cohort, path), **masks}
        complaints = {case_id: complaint for case_id, complaint in complaints.items() if case_id not in masks}
    if not complaints and masks.keys().isdisjoint(case.id for case in cohort.cases):
        raise RequestError(
            f"holds no mask of any of the {len(cohort.cases)} cases",
            where=path,
            expected=f"files such as {cohort.cases[0].id}.nii.gz or {cohort.cases[0].id}-mask.nii.gz",
        )
    return HoleSource(str(path), masks, complaints, margin_mm=margin_mm)


def find_lesions(
    cohort: Cohort, path: Path, margin_mm: float, device: str, backend: str, threads: int | None = None
) -> HoleSource:
    """Lesions to be made up: masks as in `find_masks`, or a trained segmentation model, of which every output counts.

    The model is opened as by `Predictor.load`.

    Raises:
        RequestError: as `find_masks`, or the model cannot be used.
    """
    if not _is_model(path):
        return find_masks(cohort, path, margin_mm)
    try:
        segmenter = Predictor.load(path, device, backend, threads=threads)
    except CheckpointError as error:
        raise as_request(error) from error
    if segmenter.card.dims != cohort.dims:
        kinds = {2: "pictures", 3: "volumes"}
        raise RequestError(
            f"is a model of {kinds[segmenter.card.dims]}", where=path, expected=f"one of {kinds[cohort.dims]}"
        )
    return HoleSource(str(path), segmenter=segmenter, margin_mm=margin_mm)


def read_mask(mask: ImageFile, grid: Grid) -> NDArray[np.bool_]:
    """What a mask marks, (*grid.shape): every voxel that is not 0.

    Raises:
        DataError: it cannot be read, or is not on the grid of the image.
    """
    labels, mask_grid = read_labels(mask.path, mask.channel)
    difference = same_grid(grid, mask_grid)
    if difference is not None:
        raise DataError(
            f"does not lie on the grid of the image: {difference}", where=mask.path, expected="the mask of this image"
        )
    marked: NDArray[np.bool_] = labels != 0
    return marked


def enlarged(
    marked: NDArray[np.bool_], image: Image, spacing_mm: Sequence[float], margin_mm: float
) -> NDArray[np.bool_]:
    """What is marked (*spatial) with all tissue within `margin_mm` of it; tissue is what any modality shows.

    Distances are between voxel centres; pixels of pictures, which have no spacing, count as 1 mm.
    """
    if margin_mm <= 0 or not marked.any():
        return marked
    tissue: NDArray[np.bool_] = (image != 0).any(0)
    return marked | (grow(marked, _ROUNDING * margin_mm, spacing_mm) & tissue)


def _references(cohort: Cohort, path: Path) -> dict[str, ImageFile]:
    """The references of a data folder, by case id; none where the folder holds masks alone."""
    if path.resolve() != cohort.root.resolve():
        try:
            cohort = find_cases(path, require_labels=True)
        except DataError:
            return {}
    return {case.id: case.label for case in cohort.cases if case.label is not None}


def _by_name(cases: Sequence[Case], path: Path) -> tuple[dict[str, ImageFile], dict[str, str]]:
    try:
        files = list_images(path).images
    except DataError as error:
        raise as_request(error) from error
    images = {file.path.resolve() for case in cases for file in case.images.values()}
    found, complaints = match_files(cases, [file for file in files if file.resolve() not in images], path, role="mask")
    return {case_id: ImageFile(file) for case_id, file in found.items()}, complaints


def _is_model(path: Path) -> bool:
    try:
        return bool(model_folders(path))
    except CheckpointError:
        return False
