"""Inpainting of the cases of a folder: the output files of a case, how they are computed and written."""

import functools
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from segkit.batch.cases import refuse_other_dims
from segkit.batch.manifest import CaseRecord, TaskName
from segkit.batch.worker import CasePlan, Task
from segkit.errors import DataError, RequestError
from segkit.inference.backends import Backend
from segkit.inference.predictor import Stage
from segkit.inpainting.masks import HoleSource, enlarged, read_mask
from segkit.inpainting.outputs import BankWriter, anomaly_map, copy_file, write_filled
from segkit.inpainting.predictor import InpaintingPredictor
from segkit.preparing.lesion_bank import image_path, lesion_path
from segkit.preparing.preprocessing import LoadedCase, load_case
from segkit.reading.case import Case, Cohort, ImageFile, match_modalities
from segkit.reading.files import read_volume, suffix_of, write_image, write_labels
from segkit.reading.layouts.brats import SYNTHESIS_LAYOUT
from segkit.reading.volume import Grid
from segkit.shapes import Image

NOTHING_MISSING = "nothing is missing: the image is unchanged"

_VOIDED = re.compile("(?<=t1n)-voided", re.IGNORECASE)
"""Part of the name of a voided scan of BraTS local synthesis that the whole one beside it lacks."""

Loaded = tuple[LoadedCase, NDArray[np.bool_] | None, bool]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class InpaintPlan(CasePlan):
    """The files of a case, of the kinds results, hole, anomaly and bank.

    There is one result for each modality; those that are channels of one picture share it.
    """

    mask: ImageFile | None = None
    """Marks the hole."""
    segmented: Case | None = None
    """Without a mask: the images in which the segmenter finds the hole."""

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
    save_holes: bool = False
    """Also write the hole, as the mask `<case>_hole`."""
    anomaly: bool = False
    """Also write the anomaly map, as `<case>_anomaly`."""
    bank: Path | None = None
    """Folder of a bank of lesion-free copies, also written."""

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
        bank = None
        if self.bank is not None:
            holes = self.holes.to_json()
            model = {"margin_mm": holes["margin_mm"], "lesions_sha256": holes["sha256"]}
            card = self.predictor.card
            bank = BankWriter(self.bank, card.modalities, {"sha256": card.sha256, **model})
        cases = {case.id: case for case in cohort.cases}

        def log(record: CaseRecord) -> None:
            if bank is not None and record.status != "failed":
                bank.add(cases[record.case])
            if isinstance(record, InpaintRecord) and record.note is not None:
                _log.warning("%s: %s", record.case, record.note)

        return log

    def read(self, plan: InpaintPlan, stage: Stage, *, uses_threads: bool) -> Loaded:
        """The image, the mask (*spatial) if there is one, and whether the segmenter may use threads to read."""
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
            raise DataError(
                "the image is 0 in all of the hole, so there is nothing to compare with",
                where=plan.case.id,
                expected="for an anomaly map, the image before the region was removed",
            )
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
            raise DataError(
                "there is no complete image to compare with: in the voided one the hole is empty",
                where=case.id,
                expected=f"{whole.name} beside it, for an anomaly map",
                remedy="Omit --anomaly",
            )
        images[name] = replace(file, path=whole)
    return replace(case, images=images)
