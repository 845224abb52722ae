"""Segmentation of the cases of a folder: the output files of a case, how they are computed and written."""

import importlib.util
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from segkit.batch.cases import refuse_other_dims
from segkit.batch.forecast import fit_memory
from segkit.batch.manifest import TaskName
from segkit.batch.worker import CasePlan, Task
from segkit.errors import RequestError
from segkit.inference.backends import Backend
from segkit.inference.predictor import UNCERTAINTIES, Predictor, Stage
from segkit.inference.scans import Prediction
from segkit.labels import SCHEMES, LabelScheme
from segkit.preparing.preprocessing import PreparedCase
from segkit.reading.case import Case, Cohort, file_name_of
from segkit.reading.dicom_seg import is_dicom_source, write_dicom_seg
from segkit.reading.files import read_labels, write_labels
from segkit.reading.volume import Grid

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SegmentPlan(CasePlan):
    """The files of a case, of the kinds results, classes, probabilities, uncertainty and dicom."""

    scheme: LabelScheme
    """That of the mask."""

    @property
    def label_scheme(self) -> str:
        """Name of the label scheme of the mask."""
        return self.scheme.name


@dataclass(frozen=True)
class Segment(Task[SegmentPlan]):
    """Segmentation with one predictor; the options are those of `segkit infer`."""

    predictor: Predictor
    allow_missing: bool = False
    """Fill missing modalities with zeros; recorded."""
    save_probabilities: bool = False
    """Also write the probability of each output, as `probabilities/<case>_<output>`."""
    uncertainty: bool = False
    """Also write entropy and disagreement, as `uncertainty/<case>_entropy` and `uncertainty/<case>_disagreement`."""
    class_masks: bool = False
    """Also write a mask of 0 and 1 for each class, as `classes/<case>_<class>`."""
    keep_patient: bool = False
    """Copy name, numbers and dates of the patient into DICOM SEG files."""
    label_scheme: str | None = None
    """Label scheme of the masks; None: that of the input's layout, else that of the training data."""

    name: ClassVar[TaskName] = "segmentation"
    foreign_result: ClassVar[str] = "a mask that was not made by this model with these options"

    @property
    def identity(self) -> str:
        """The identity of the predictor."""
        return self.predictor.identity

    @property
    def window(self) -> tuple[int, ...]:
        """Voxels of the predictor's windows."""
        return self.predictor.window

    def backends(self) -> list[Backend]:
        """The backends of the members of the ensemble."""
        return [member.backend for member in self.predictor.members]

    def with_backends(self, change: Callable[[Backend], Backend]) -> Self:
        """The same task computed by `change(backend)` for each backend."""
        return replace(self, predictor=self.predictor.with_backends(change))

    def facts(self, model: str) -> dict[str, Any]:
        """See `Task.facts`."""
        predictor, facts = self.predictor, super().facts(model)
        more = {"label_scheme": predictor.scheme.name, "sha256": predictor.digests, "tta": predictor.uses_tta}
        return {"model": {**facts["model"], **more}}

    def check(self, cohort: Cohort) -> None:
        """RequestError for pictures with a model of volumes, the reverse, or a scheme without all tissues."""
        refuse_other_dims(cohort, self.predictor.dims)
        self._requested_scheme()

    def label_scheme_for(self, case: Case, cohort: Cohort) -> str:
        """Name of the label scheme of a case's mask."""
        return self._scheme_for(case, cohort).name

    def _scheme_for(self, case: Case, cohort: Cohort) -> LabelScheme:
        """The requested scheme, else that of the input if it has all tissues of the model, else that of training."""
        of_input = None if self.predictor.keeps_values else case.scheme or cohort.scheme
        named = self._requested_scheme() or of_input
        return self.predictor.scheme if named is None or not self.predictor.can_paint(named) else named

    def _requested_scheme(self) -> LabelScheme | None:
        name, predictor = self.label_scheme, self.predictor
        if name is None:
            return None
        scheme = predictor.scheme if name == predictor.scheme.name else SCHEMES.get(name)
        if scheme is None:
            raise RequestError(f"label scheme {name!r} is not known", expected=f"one of {', '.join(SCHEMES)}")
        if not predictor.can_paint(scheme):
            found = f"label scheme {name} lacks tissues of this model ({', '.join(predictor.scheme.values)})"
            raise RequestError(found, expected=f"{predictor.scheme.name}, or another scheme with these tissues")
        return scheme

    def plan(self, case: Case, cohort: Cohort, output: Path) -> SegmentPlan:
        """The files of a case below `output`; raises DataError if a modality is missing."""
        wanted = self.predictor.card.modalities
        matched = self.predictor.match(case, allow_missing=self.allow_missing)
        mask_suffix, map_suffix = (".png", ".tif") if cohort.dims == 2 else (".nii.gz", ".nii.gz")

        def maps(folder: str, names: Sequence[str]) -> tuple[Path, ...]:
            return tuple(Path(folder, f"{case.id}_{file_name_of(name)}{map_suffix}") for name in names)

        files: dict[str, tuple[Path, ...]] = {"results": (Path(f"{case.id}{mask_suffix}"),)}
        scheme = self._scheme_for(case, cohort)
        if self.class_masks:
            names = [f"{case.id}_{file_name_of(name)}{mask_suffix}" for name in scheme.values]
            files["classes"] = tuple(Path("classes", name) for name in names)
        if self.save_probabilities:
            files["probabilities"] = maps("probabilities", [one.name for one in self.predictor.card.outputs])
        if self.uncertainty:
            files["uncertainty"] = maps("uncertainty", UNCERTAINTIES)
        if _can_write_dicom_seg(matched):
            files["dicom"] = (Path(f"{case.id}.dcm"),)
        missing = tuple(name for name in wanted if name not in matched.images)
        return SegmentPlan(case=matched, folders=(output,), files=files, missing_modalities=missing, scheme=scheme)

    def fit_memory(self, plans: list[SegmentPlan], memory_gb: float | None) -> tuple[Self, list[SegmentPlan], bool]:
        """See `segkit.batch.forecast.fit_memory`."""
        predictor, plans, has_room = fit_memory(self.predictor, plans, memory_gb)
        return replace(self, predictor=predictor), plans, has_room

    def with_smaller_window(self) -> Self | None:
        """See `Task.with_smaller_window`."""
        predictor = self.predictor.with_smaller_window()
        return None if predictor is None else replace(self, predictor=predictor)

    def prepared_shape(self, grid: Grid) -> tuple[int, ...]:
        """Most voxels per axis of the prepared image."""
        return self.predictor.prepared_shape(grid)

    def read(self, plan: SegmentPlan, stage: Stage, *, uses_threads: bool) -> PreparedCase:
        """The prepared case."""
        allows = self.allow_missing
        return self.predictor.read_case(plan.case, allow_missing=allows, uses_threads=uses_threads, stage=stage)

    def compute(self, plan: SegmentPlan, loaded: PreparedCase, stage: Stage) -> Prediction:
        """The mask, with the requested maps."""
        return self.predictor.predict_prepared(
            loaded,
            plan.scheme,
            with_probabilities="probabilities" in plan.files,
            with_uncertainty="uncertainty" in plan.files,
            stage=stage,
        )

    def write(self, plan: SegmentPlan, result: Prediction) -> dict[str, Any]:
        """Write the maps, the DICOM SEG, the masks of classes and, last, the mask."""
        if result.probability_maps is not None:
            result.probability_maps.write(plan.paths("probabilities"))
        if result.uncertainty_maps is not None:
            result.uncertainty_maps.write(plan.paths("uncertainty"))
        for path in plan.paths("dicom"):
            series = next(iter(plan.case.images.values())).path
            labels, values = result.labels, plan.scheme.values
            write_dicom_seg(path, labels, series, values, model=self.identity, keeps_patient=self.keep_patient)
        if paths := plan.paths("classes"):
            for path, value in zip(paths, plan.scheme.values.values(), strict=True):
                write_labels(path, (result.labels == value).astype(np.uint8), result.grid)
        (target,) = plan.paths("results")
        write_labels(target, result.labels, result.grid)
        return {}

    def read_results(self, plan: SegmentPlan) -> None:
        """See `Task.read_results`."""
        (target,) = plan.paths("results")
        read_labels(target)


def _can_write_dicom_seg(case: Case) -> bool:
    if not is_dicom_source(case):
        return False
    if importlib.util.find_spec("highdicom") is None:
        _log.info("%s: install segkit[dicom] for a DICOM SEG beside the mask", case.id)
        return False
    return True
