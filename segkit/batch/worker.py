"""One case from its files to its mask, in three stages that a pipeline may overlap with those of other cases.

What jobs on cases have in common, whatever the task: the clock of their stages, and what they hold meanwhile.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path

from segkit.batch.executor import run_whole
from segkit.batch.manifest import STAGES, CaseRecord
from segkit.errors import DataError, SegkitError, is_memory_error
from segkit.inference.decode import Maps, outside_probabilities, probabilities, uncertainty
from segkit.inference.predictor import Predictor
from segkit.inference.sliding_window import Slab
from segkit.labels import LabelScheme
from segkit.preparing.preprocessing import PreparedCase, load_case
from segkit.reading.case import Case, file_name_of
from segkit.reading.dicom_seg import write_dicom_seg
from segkit.reading.files import read_grid, stem_of, write_labels
from segkit.reading.volume import Grid
from segkit.runtime import peak_rss_mb

PROBABILITIES, UNCERTAINTY = "probabilities", "uncertainty"
"""Sub-folders of the output for `<case>_<output>` and for `<case>_entropy`, `<case>_disagreement`."""
_UNCERTAINTIES = ("entropy", "disagreement")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CaseTask:
    """One case to segment: its images under the model's modality names, and where its mask goes, in which values."""

    case: Case
    target: Path
    scheme: LabelScheme
    missing_modalities: tuple[str, ...] = ()
    saves_probabilities: bool = False
    saves_uncertainty: bool = False
    dicom_target: Path | None = None
    """Where the mask also goes as a DICOM SEG, for images that are DICOM."""
    keeps_patient: bool = False
    """Copy name, numbers and dates of the patient into the DICOM SEG."""
    predicted: Mapping[str, float] = field(default_factory=dict)
    """What the case was expected to take, `peak_rss_mb` and `seconds`."""

    def inputs(self) -> list[Path]:
        """The files that are read."""
        return [file.path for file in self.case.images.values()]

    def moved_to(self, folders: Sequence[Path]) -> CaseTask:
        """The same with everything that is written in another folder, the only one, under the same names."""
        (folder,) = folders
        dicom_target = None if self.dicom_target is None else folder / self.dicom_target.name
        return replace(self, target=folder / self.target.name, dicom_target=dicom_target)


@dataclass(frozen=True)
class CaseWorker:
    """Segments cases with one predictor."""

    predictor: Predictor
    uses_threads: bool = True
    """Read the files of a case side by side."""

    def begin(self, task: CaseTask) -> CaseJob:
        """The work on one case, not yet started."""
        return CaseJob(self.predictor, task, uses_threads=self.uses_threads)

    def __call__(self, task: CaseTask) -> CaseRecord:
        """All of the work on one case, without threads; never raises but for what ends the whole program."""
        return run_whole(self.begin(task))


class CaseJob:
    """The stages of one case: `read`, then `compute` whose slabs go to `finish`, which may run at the same time."""

    def __init__(self, predictor: Predictor, task: CaseTask, *, uses_threads: bool = True) -> None:
        self.predictor = predictor
        self.uses_threads = uses_threads
        self.task = task
        self.clock = StageClock()
        self._prepared: PreparedCase | None = None
        self._window = predictor.window

    @functools.cached_property
    def waiting_bytes(self) -> int:
        """What the prepared image takes at most, as the header of its first file tells; 0 where it cannot be read."""
        channels = len(self.predictor.card.modalities)
        return image_bytes(self.task.case, channels, self.predictor.prepared_shape)

    def read(self) -> None:
        """Load and prepare the case.

        Raises:
            DataError: the files cannot be read or do not fit together.
        """
        task, predictor = self.task, self.predictor
        with self.clock.timed("read"):
            loaded = load_case(
                task.case,
                predictor.card.modalities,
                None,
                allow_missing=bool(task.missing_modalities),
                uses_threads=self.uses_threads,
            )
        self.grid = loaded.grid
        with self.clock.timed("preprocess"):
            self._prepared = predictor.prepare(loaded)
        self.preparation = self._prepared.preparation

    def compute(self) -> Iterator[Slab]:
        """Logits of the case, slab by slab; the prepared image is let go with the last."""
        if self._prepared is None:
            raise ValueError("nothing was read")
        self._window = self.predictor.window
        slabs = self.predictor.slabs(self._prepared)
        self._prepared = None
        while True:
            with self.clock.timed("predict"):
                slab = next(slabs, None)
            if slab is None:
                return
            yield slab

    def finish(self, slabs: Iterator[Slab]) -> CaseRecord:
        """Paint the mask from the slabs and write it, with the maps that were asked for.

        Raises:
            DataError: a file cannot be written.
        """
        task, predictor = self.task, self.predictor
        count = len(predictor.card.outputs)
        shares = Maps(self.preparation, count) if task.saves_probabilities else None
        doubts = Maps(self.preparation, len(_UNCERTAINTIES)) if task.saves_uncertainty else None

        def noted() -> Iterator[Slab]:
            while True:
                with self.clock.paused("decode"):  # waiting, or computing, is not decoding
                    slab = next(slabs, None)
                if slab is None:
                    return
                if shares is not None:
                    shares.add(probabilities(slab.logits, predictor.activation), slab)
                if doubts is not None:
                    doubts.add(uncertainty(slab, predictor.activation), slab)
                yield slab

        with self.clock.timed("decode"):
            labels = predictor.decode(noted(), self.preparation, task.scheme)
        with self.clock.timed("write"):
            if shares is not None:
                shares.write(_probability_paths(task, predictor), self.grid, _outside(predictor))
            if doubts is not None:
                doubts.write(_uncertainty_paths(task, predictor), self.grid, (0, 0))
            if task.dicom_target is not None:
                series = next(iter(task.case.images.values())).path
                segments = task.scheme.values
                write_dicom_seg(
                    task.dicom_target,
                    labels,
                    series,
                    segments,
                    model=predictor.identity,
                    keeps_patient=task.keeps_patient,
                )
            write_labels(task.target, labels, self.grid)
        return self._record(None)

    def again(self, error: BaseException) -> CaseJob | None:
        """The work anew with smaller windows, where memory ran out and there are smaller ones."""
        # The case before may have made them smaller while this one was computed.
        if not is_memory_error(error) or (self._window == self.predictor.window and not self.predictor.shrink()):
            return None
        size = " x ".join(map(str, self.predictor.window))
        _log.warning("%s: out of memory; once more, with windows of %s voxels", self.task.case.id, size)
        return CaseJob(self.predictor, self.task, uses_threads=False)

    def failed(self, error: BaseException) -> CaseRecord:
        """The record of the case when a stage raised `error`; with -v the trace is told too."""
        _log.debug("%s failed", self.task.case.id, exc_info=error)
        return self._record(sentence(error))

    def _record(self, error: str | None) -> CaseRecord:
        return CaseRecord(
            self.task.case.id,
            "done" if error is None else "failed",
            error,
            self.clock.rounded(),
            round(peak_rss_mb(), 1),
            self.predictor.backend.name,
            label_scheme=self.task.scheme.name,
            missing_modalities=self.task.missing_modalities,
            model=self.predictor.identity,
            window=self._window,
            predicted=self.task.predicted,
        )


def further_paths(task: CaseTask, predictor: Predictor) -> list[Path]:
    """The files that a task writes beside its mask."""
    shares = _probability_paths(task, predictor) if task.saves_probabilities else []
    doubts = _uncertainty_paths(task, predictor) if task.saves_uncertainty else []
    return shares + doubts + ([] if task.dicom_target is None else [task.dicom_target])


def _probability_paths(task: CaseTask, predictor: Predictor) -> list[Path]:
    return _paths(task, predictor, PROBABILITIES, [output.name for output in predictor.card.outputs])


def _uncertainty_paths(task: CaseTask, predictor: Predictor) -> list[Path]:
    return _paths(task, predictor, UNCERTAINTY, _UNCERTAINTIES)


def _paths(task: CaseTask, predictor: Predictor, folder: str, names: list[str] | tuple[str, ...]) -> list[Path]:
    suffix = ".tif" if predictor.card.dims == 2 else ".nii.gz"
    stem = stem_of(task.target)
    return [task.target.parent / folder / f"{stem}_{file_name_of(name)}{suffix}" for name in names]


def _outside(predictor: Predictor) -> list[float]:
    return outside_probabilities(len(predictor.card.outputs), predictor.activation)


def sentence(error: BaseException) -> str:
    """One line that a user without knowledge of Python understands."""
    text = " ".join(str(error).split())
    if isinstance(error, SegkitError):
        return text
    if is_memory_error(error):
        return (
            f"out of memory after {peak_rss_mb():.0f} MB. Close other programs, use a machine with more memory, "
            "or a model with a smaller patch or fewer outputs"
        )
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'a file'}: {error.strerror}"
    return (
        f"unexpected {type(error).__name__}: {text[:300]}. This is a fault of segkit: run again with -v for the trace"
    )


class StageClock:
    """The seconds of a case by stage, of `STAGES`."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)

    def timed(self, stage: str) -> AbstractContextManager[None]:
        """Add what is done meanwhile to a stage, also where it fails."""
        return self._counted(stage, 1)

    def paused(self, stage: str) -> AbstractContextManager[None]:
        """Take what is done meanwhile off a stage that is being timed."""
        return self._counted(stage, -1)

    def rounded(self) -> dict[str, float]:
        """The seconds as a manifest tells them."""
        return {stage: round(value, 4) for stage, value in self.seconds.items()}

    @contextmanager
    def _counted(self, stage: str, sign: int) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += sign * (time.perf_counter() - start)


def image_bytes(case: Case, channels: int, shape_of: Callable[[Grid], tuple[int, ...]]) -> int:
    """What an image of float32 takes, as the header of the case's first file tells; 0 where that cannot be read.

    `shape_of` tells how many voxels each axis of it has, of the grid of the file.
    """
    try:
        grid = read_grid(next(iter(case.images.values())).path)
    except DataError:
        return 0
    return 4 * channels * prod(shape_of(grid))
