"""Inpainting of the cases of a folder: the output files of a case, how they are computed and written."""

import functools
import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from segkit.batch.cases import refuse_other_dims
from segkit.batch.manifest import CaseRecord, TaskName
from segkit.batch.worker import CasePlan, Task
from segkit.errors import DataError, RequestError
from segkit.inference.backends import Backend
from segkit.inference.predictor import Stage
from segkit.inpainting.masks import HoleSource, enlarged, read_mask
from segkit.inpainting.predictor import InpaintingPredictor
from segkit.preparing.holes import brain_mask
from segkit.preparing.lesion_bank import BANK_NAME, Bank, BankedCase, image_path, lesion_path, read_bank
from segkit.preparing.preprocessing import LoadedCase, deviation_of_tissue, load_case
from segkit.reading.case import Case, Cohort, ImageFile, match_modalities
from segkit.reading.files import read_volume, rewrite_image, suffix_of, write_image, write_labels, written_atomically
from segkit.reading.layouts.brats import SYNTHESIS_LAYOUT
from segkit.reading.volume import Grid, in_type
from segkit.shapes import Image

NOTHING_MISSING = "nothing is missing: the image is unchanged"

_VOIDED = re.compile("(?<=t1n)-voided", re.IGNORECASE)
"""Part of the name of a voided scan of BraTS local synthesis that the whole one beside it lacks."""

Loaded = tuple[LoadedCase, NDArray[np.bool_] | None, bool]
"""The image, the mask (*spatial) if there is one, and whether the segmenter may use threads to read."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class InpaintPlan(CasePlan):
    """The files of a case, of the kinds results, hole, anomaly and bank.

    There is one result for each modality; those that are channels of one picture share it.
    """

    mask: ImageFile | None = None  # marks the hole
    segmented: Case | None = None  # without a mask: the images in which the segmenter finds the hole

    def inputs(self) -> list[Path]:
        """The files that are read."""
        files = [*self.case.images.values(), *([self.mask] if self.mask else [])]
        files += self.segmented.images.values() if self.segmented else []
        return list(dict.fromkeys(file.path for file in files))


@dataclass(frozen=True)
class InpaintRecord(CaseRecord):
    """The record of a case with the number of filled voxels, and a note for the user."""

    made_up_voxels: int = 0
    note: str | None = None


@dataclass(frozen=True)
class Filled:
    """An image (C, *spatial) with its hole (*spatial) filled, and the anomaly map (*spatial) if requested."""

    image: Image
    hole: NDArray[np.bool_]
    grid: Grid
    anomaly: NDArray[np.float32] | None


@dataclass(frozen=True)
class Inpaint(Task[InpaintPlan]):
    """Filling of `holes` by one model; the options are those of `segkit inpaint`."""

    predictor: InpaintingPredictor
    holes: HoleSource
    save_holes: bool = False  # also write the hole, as the mask `<case>_hole`
    anomaly: bool = False  # also write the anomaly map, as `<case>_anomaly`
    bank: Path | None = None  # folder of a bank of lesion-free copies, also written

    name: ClassVar[TaskName] = "inpainting"
    record_class: ClassVar[type[CaseRecord]] = InpaintRecord
    foreign_result: ClassVar[str] = "an image that was not made by this model with these holes"

    @functools.cached_property
    def identity(self) -> str:
        """The identity of the model and of the holes."""
        return f"{self.predictor.card.sha256[:16]}+{self.holes.identity}"

    def __getstate__(self) -> dict[str, Any]:
        """With the identity, which depends on the working directory; without the masks, which are in the plans."""
        holes = replace(self.holes, masks={}, complaints={})
        return {**self.__dict__, "identity": self.identity, "holes": holes}

    def backends(self) -> list[Backend]:
        """The backends of the model and of the segmenter."""
        segmenter = self.holes.segmenter
        return [self.predictor.backend, *(member.backend for member in (segmenter.members if segmenter else ()))]

    def with_backends(self, change: Callable[[Backend], Backend]) -> Self:
        """The same task computed by `change(backend)` for each backend."""
        predictor = replace(self.predictor, backend=change(self.predictor.backend))
        segmenter = self.holes.segmenter and self.holes.segmenter.with_backends(change)
        return replace(self, predictor=predictor, holes=replace(self.holes, segmenter=segmenter))

    def with_smaller_window(self) -> Self | None:
        """The same with smaller windows of holes or, once those are as small as a patch, of the segmenter."""
        if (predictor := self.predictor.with_smaller_window()) is not None:
            return replace(self, predictor=predictor)
        segmenter = self.holes.segmenter and self.holes.segmenter.with_smaller_window()
        return None if segmenter is None else replace(self, holes=replace(self.holes, segmenter=segmenter))

    def facts(self, model: str) -> dict[str, Any]:
        """See `Task.facts`."""
        return {**super().facts(model), "holes": self.holes.to_json()}

    def check(self, cohort: Cohort) -> None:
        """Raise a RequestError for pictures with a model of volumes, and for a bank of pictures."""
        if not (self.predictor.card.dims == 2 and cohort.dims == 3):  # a model of slices fills volumes
            refuse_other_dims(cohort, self.predictor.card.dims)
        if self.bank is not None and cohort.dims == 2:
            expected = "volumes, for a bank"
            raise RequestError("holds pictures", where=cohort.root, expected=expected, remedy="Omit --bank")

    def plan(self, case: Case, cohort: Cohort, output: Path) -> InpaintPlan:
        """The files of a case below `output`; DataError if a modality or the mask is missing."""
        modalities, segmenter = self.predictor.card.modalities, self.holes.segmenter
        segmented = None if segmenter is None else _matched(case, segmenter.card.modalities)
        matched = _matched(case, modalities)
        mask_suffix, map_suffix = (".nii.gz", ".nii.gz") if cohort.dims == 3 else (".png", ".tif")
        files = {"results": _targets(matched, cohort)}
        if self.save_holes:
            files["hole"] = (Path(f"{case.id}_hole{mask_suffix}"),)
        if self.anomaly:
            files["anomaly"] = (Path(f"{case.id}_anomaly{map_suffix}"),)
        if self.bank is not None:
            images = (image_path(Path(), case.id, modality) for modality in modalities)
            files["bank"] = (*images, lesion_path(Path(), case.id))
        return InpaintPlan(
            case=_with_truth(matched) if self.anomaly and cohort.layout == SYNTHESIS_LAYOUT else matched,
            folders=(output,) if self.bank is None else (output, self.bank),
            files=files,
            mask=None if segmenter else self.holes.mask_of(case),
            segmented=segmented,
        )

    def open_log(self, cohort: Cohort) -> Callable[[CaseRecord], None]:
        """A function that adds finished cases to the bank and logs notes.

        Raises:
            RequestError: the folder of the bank holds a bank of another model or of other holes.
        """
        bank, card, holes = None, self.predictor.card, self.holes.to_json()
        if self.bank is not None:
            model = {"sha256": card.sha256, "margin_mm": holes["margin_mm"], "lesions_sha256": holes["sha256"]}
            bank = BankWriter(self.bank, card.modalities, model)
        cases = {case.id: case for case in cohort.cases}

        def log(record: CaseRecord) -> None:
            if bank is not None and record.status != "failed":
                bank.add(cases[record.case])
            if isinstance(record, InpaintRecord) and record.note is not None:
                _log.warning("%s: %s", record.case, record.note)

        return log

    def read(self, plan: InpaintPlan, stage: Stage, *, uses_threads: bool) -> Loaded:
        """See `Loaded`."""
        with stage("read"):
            loaded = load_case(plan.case, tuple(plan.case.images), None, uses_threads=uses_threads)
            marked = None if plan.mask is None else read_mask(plan.mask, loaded.grid)
        return loaded, marked, uses_threads

    def compute(self, plan: InpaintPlan, loaded: Loaded, stage: Stage) -> Filled:
        """The image with its hole filled.

        Raises:
            DataError: the hole covers all of the image, or the model output is not finite.
        """
        case, marked, uses_threads = loaded
        image, grid = case.image, case.grid
        with stage("preprocess"):
            if marked is None:
                if self.holes.segmenter is None or plan.segmented is None:
                    raise ValueError("there is neither a mask nor a segmenter")
                prepared = self.holes.segmenter.read_case(plan.segmented, uses_threads=uses_threads)
                marked = self.holes.segmenter.predict_prepared(prepared).labels != 0
            hole = enlarged(marked, image, grid.spacing_mm, self.holes.margin_mm)
        if "anomaly" in plan.files and hole.any() and not image[:, hole].any():
            found = "the image is 0 in all of the hole, so there is nothing to compare with"
            expected = "for an anomaly map, the image before the region was removed"
            raise DataError(found, where=plan.case.id, expected=expected)
        with stage("predict"):
            filled = self.predictor.fill(image, hole, grid)
        if not np.isfinite(filled[:, hole]).all():
            raise DataError("the model output contains NaN or infinity", where=plan.case.id, remedy="Train it again")
        anomaly = None
        if "anomaly" in plan.files:
            with stage("decode"):
                anomaly = anomaly_map(image, filled, hole, grid.spacing_mm)
        return Filled(filled, hole, grid, anomaly)

    def write(self, plan: InpaintPlan, result: Filled) -> dict[str, Any]:
        """Write the images and the other requested files."""
        hole, images = result.hole.astype(np.uint8), plan.paths("results")
        if result.anomaly is not None:
            (anomaly,) = plan.paths("anomaly")
            write_image(anomaly, result.anomaly, result.grid)
        for path in plan.paths("hole"):
            write_labels(path, hole, result.grid)
        write_filled(list(plan.case.images.values()), images, result.image, result.hole, result.grid)
        if "bank" in plan.files:
            *copies, lesion = plan.paths("bank")
            for image, copy in zip(images, copies, strict=True):
                copy_file(image, copy)
            write_labels(lesion, hole, result.grid)
        count = int(np.count_nonzero(hole))
        return {"made_up_voxels": count, "note": None if count else NOTHING_MISSING}

    def read_results(self, plan: InpaintPlan) -> None:
        """See `Task.read_results`."""
        paths = plan.paths("results")
        for path in dict.fromkeys(paths):
            read_volume(path, None if len(set(paths)) == len(paths) else 0)


def _matched(case: Case, wanted: tuple[str, ...]) -> Case:
    """The case with its images under the modality names of a model; none may be missing."""
    try:
        return match_modalities(case, wanted)
    except DataError as error:
        remedy = "Add the files, or name the files with --modality NAME=SUFFIX"
        raise DataError(error.found, expected=error.expected, remedy=remedy) from error


def _targets(case: Case, cohort: Cohort) -> tuple[Path, ...]:
    """The file of each modality, below the output; the colours of a picture go to one file."""
    if cohort.dims == 3:
        mark = "-" if cohort.layout == SYNTHESIS_LAYOUT else "_"
        return tuple(Path(f"{case.id}{mark}{name}-inference.nii.gz") for name in case.images)
    files = list(case.images.values())
    # Other formats are lossy, or cannot hold numbers of 32 bits.
    suffix = ".tif" if any(suffix_of(file.path) in (".tif", ".tiff") for file in files) else ".png"
    if [file.channel for file in files] == [0, 1, 2] and len({file.path for file in files}) == 1:
        return (Path(f"{case.id}-inference{suffix}"),) * len(files)
    return tuple(Path(f"{case.id}_{name}-inference{suffix}") for name in case.images)


def _with_truth(case: Case) -> Case:
    """A case of the challenge with the complete image, which must be beside the voided one."""
    images = {}
    for name, file in case.images.items():
        whole = file.path.with_name(_VOIDED.sub("", file.path.name))
        if not whole.exists():
            found = "there is no complete image to compare with: in the voided one the hole is empty"
            expected = f"{whole.name} beside it, for an anomaly map"
            raise DataError(found, where=case.id, expected=expected, remedy="Omit --anomaly")
        images[name] = replace(file, path=whole)
    return replace(case, images=images)


SMOOTHING_MM = 1.0
"""Standard deviation of the Gaussian of anomaly maps, which suppresses single voxels of noise."""

_TRUNCATED = 4.0  # standard deviations at which the Gaussian ends


def write_filled(
    files: Sequence[ImageFile], targets: Sequence[Path], filled: Image, hole: NDArray[np.bool_], grid: Grid
) -> None:
    """Write images (C, *spatial), each to its target, in type and geometry of its file; DataError if that fails.

    Voxels outside the hole (*spatial) are those of the files. Images with one target are channels of a picture.
    """
    for target in dict.fromkeys(targets):
        indices = [index for index, one in enumerate(targets) if one == target]
        if len(indices) == 1:
            file = files[indices[0]]
            rewrite_image(target, file.path, hole, filled[indices[0], hole], file.channel)
            continue
        planes = [read_volume(files[index].path, files[index].channel).array.copy() for index in indices]
        for plane, index in zip(planes, indices, strict=True):
            plane[hole] = in_type(filled[index, hole], plane.dtype)
        write_image(target, np.stack(planes, -1), grid)  # (H, W, C)


def anomaly_map(
    image: Image,
    healthy: Image,
    hole: NDArray[np.bool_],
    spacing_mm: Sequence[float],
    smoothing_mm: float = SMOOTHING_MM,
) -> NDArray[np.float32]:
    """The difference of two images, |image - healthy|, smoothed, inside the brain.

    Each modality counts in units of its standard deviation over the brain outside the hole, so that sequences and
    scanners compare; of several modalities it is the mean.

    `image` is the scan (C, *spatial), 0 outside the brain; `healthy` the same with the `hole` (*spatial) filled;
    `smoothing_mm` the standard deviation of the Gaussian, 0 for none. The result is (*spatial), 0 and above; 0 outside
    the brain and away from the hole.
    """
    result = np.zeros(hole.shape, np.float32)
    if not hole.any():
        return result
    sigma = [smoothing_mm / spacing for spacing in spacing_mm]
    (box,) = ndimage.find_objects(hole.astype(np.uint8))
    reach = [int(_TRUNCATED * one + 0.5) for one in sigma]
    near = tuple(slice(max(0, one.start - more), one.stop + more) for one, more in zip(box, reach, strict=True))
    part = np.zeros(result[near].shape, np.float32)
    for scan, filled in zip(image, healthy, strict=True):
        difference = np.where(hole[near], np.abs(scan[near] - filled[near]), np.float32(0))
        smooth = ndimage.gaussian_filter(difference, sigma, mode="constant", truncate=_TRUNCATED)
        part += smooth / deviation_of_tissue(np.where(hole, np.float32(0), scan))
    result[near] = part / len(image)
    result[~brain_mask((image != 0).any(0))] = 0
    return result


class BankWriter:
    """A bank to which cases are added; `bank.json` names only cases whose files are complete.

    `model` describes the model and the holes, which all copies of a bank share.

    Raises:
        RequestError: the folder holds a bank of another model, of other modalities, or with other holes.
    """

    def __init__(self, folder: Path, modalities: tuple[str, ...], model: Mapping[str, Any]) -> None:
        self.folder = folder
        self._bank = Bank(modalities=modalities, cases=(), model=dict(model))
        if not (folder / BANK_NAME).exists():
            return
        before = read_bank(folder)
        if (before.modalities, before.model) != (self._bank.modalities, self._bank.model):
            found = "holds a bank that was made by another model or with other holes"
            raise RequestError(found, where=folder, remedy="Choose another folder for --bank")
        self._bank = before

    def add(self, case: Case) -> None:
        """Record a complete case on disk; raises DataError if the folder cannot be written."""
        entry = BankedCase(case=case.id, patient=case.patient)
        if entry in self._bank.cases:
            return
        others = (one for one in self._bank.cases if one.case != case.id)
        cases = sorted((*others, entry), key=lambda one: one.case)  # they are finished in any order
        self._bank = self._bank.model_copy(update={"cases": tuple(cases)})
        with written_atomically(self.folder / BANK_NAME) as temporary:
            text = json.dumps(self._bank.model_dump(), indent=2, ensure_ascii=False) + "\n"
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def copy_file(source: Path, target: Path) -> None:
    """Copy a file atomically; raises DataError if the folder cannot be written."""
    with written_atomically(target) as temporary:
        shutil.copyfile(source, temporary)
