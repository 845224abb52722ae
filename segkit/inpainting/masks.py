"""The voxels of a case to fill: those of a mask, or its lesions, from a mask or found by a model."""

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
from segkit.reading.files import read_reference
from segkit.reading.geometry import same_grid
from segkit.reading.layouts.layout import list_images
from segkit.reading.layouts.table import find_cases
from segkit.reading.volume import Grid
from segkit.shapes import Image

MARGIN_MM = 5.0
"""Enlargement of lesions, as in the BraTS local-synthesis task: tissue beside a lesion is not healthy."""

_ROUNDING = 1.001  # spacings in headers differ in the 8th digit; a voxel at the margin itself belongs to the hole


@dataclass(frozen=True)
class HoleSource:
    """The source of the holes of a run: a mask for each case id, or a model that finds lesions.

    `complaints` are reasons, by case id, why there is not one mask. Masks are enlarged by `margin_mm`, but not into
    background.
    """

    origin: str
    masks: Mapping[str, ImageFile] = field(default_factory=dict)
    complaints: Mapping[str, str] = field(default_factory=dict)
    segmenter: Predictor | None = None
    margin_mm: float = 0.0

    @property
    def identity(self) -> str:
        """Depends on the path of the masks, or the segmenter, and the margin."""
        name = f"{zlib.crc32(str(Path(self.origin).absolute()).encode(errors='backslashreplace')):08x}"
        found_by = name if self.segmenter is None else self.segmenter.identity
        return f"{found_by}+{self.margin_mm:g}mm"

    def mask_of(self, case: Case) -> ImageFile:
        """The mask of a case, by its absolute path; DataError if there is none, or several files fit."""
        if case.id in self.complaints:
            raise DataError(self.complaints[case.id])
        if case.id not in self.masks:
            found, remedy = f"there is no mask of case {case.id}", "Add it, or leave the case out with --cases"
            expected = f"a file such as {case.id}.nii.gz or {case.id}-mask.nii.gz"
            raise DataError(found, where=self.origin, expected=expected, remedy=remedy)
        mask = self.masks[case.id]
        return replace(mask, path=mask.path.absolute())

    def to_json(self) -> dict[str, object]:
        """The entry of the manifest."""
        digests = [] if self.segmenter is None else self.segmenter.digests
        return {"from": self.origin, "margin_mm": self.margin_mm, "sha256": digests}


def masks_of_cohort(cohort: Cohort, origin: Path) -> HoleSource:
    """The masks of the cohort's own cases; `origin` is its archive or folder."""
    return HoleSource(str(origin), {case.id: case.label for case in cohort.cases if case.label is not None})


def find_masks(cohort: Cohort, path: Path, margin_mm: float = 0.0) -> HoleSource:
    """The masks of the cases: files of a folder by their names, the references of a data folder, or one file.

    Raises:
        RequestError: no mask belongs to a case, or one mask was given for several cases.
    """
    if path.is_file():
        if len(cohort.cases) != 1:
            found, remedy = f"is one mask, and there are {len(cohort.cases)} cases", "Pass such a folder, or --cases"
            raise RequestError(found, where=path, expected="a folder with one mask for each case", remedy=remedy)
        return HoleSource(str(path), {cohort.cases[0].id: ImageFile(path)}, margin_mm=margin_mm)
    masks, complaints = _by_name(cohort.cases, path)
    if len(masks) < len(cohort.cases):  # file names do not show which files are masks; layouts do
        masks = {**_references(cohort, path), **masks}
        complaints = {case_id: complaint for case_id, complaint in complaints.items() if case_id not in masks}
    if not complaints and masks.keys().isdisjoint(case.id for case in cohort.cases):
        found, first = f"holds no mask of any of the {len(cohort.cases)} cases", cohort.cases[0].id
        raise RequestError(found, where=path, expected=f"files such as {first}.nii.gz or {first}-mask.nii.gz")
    return HoleSource(str(path), masks, complaints, margin_mm=margin_mm)


def find_lesions(
    cohort: Cohort, path: Path, margin_mm: float, device: str, backend: str, threads: int | None = None
) -> HoleSource:
    """Lesions to fill: masks as in `find_masks`, or all outputs of a segmentation model, loaded by `Predictor.load`.

    Raises:
        RequestError: as `find_masks`, or the model cannot be used.
    """
    try:
        model_folders(path)
    except CheckpointError:
        return find_masks(cohort, path, margin_mm)
    try:
        segmenter = Predictor.load(path, device, backend, threads=threads)
    except CheckpointError as error:
        raise as_request(error) from error
    if segmenter.card.dims != cohort.dims:
        kinds = {2: "pictures", 3: "volumes"}
        found = f"is a model of {kinds[segmenter.card.dims]}"
        raise RequestError(found, where=path, expected=f"one of {kinds[cohort.dims]}")
    return HoleSource(str(path), segmenter=segmenter, margin_mm=margin_mm)


def read_mask(mask: ImageFile, grid: Grid) -> NDArray[np.bool_]:
    """The voxels of a mask that are not 0, (*grid.shape); DataError if it cannot be read or has another grid."""
    labels, mask_grid = read_reference(mask)
    if (difference := same_grid(grid, mask_grid)) is not None:
        found = f"does not lie on the grid of the image: {difference}"
        raise DataError(found, where=mask.path, expected="the mask of this image")
    return np.asarray(labels != 0)


def enlarged(
    marked: NDArray[np.bool_], image: Image, spacing_mm: Sequence[float], margin_mm: float
) -> NDArray[np.bool_]:
    """A mask (*spatial) with all tissue (not 0 in some modality) within `margin_mm`, between voxel centres.

    Pixels of pictures, which have no spacing, count as 1 mm.
    """
    if margin_mm <= 0 or not marked.any():
        return marked
    tissue: NDArray[np.bool_] = (image != 0).any(0)
    return marked | (grow(marked, _ROUNDING * margin_mm, spacing_mm) & tissue)


def _references(cohort: Cohort, path: Path) -> dict[str, ImageFile]:
    """The references of a data folder, by case id; none if the folder holds only masks."""
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
