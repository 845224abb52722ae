"""One case from its files to the same files without what was missing, in stages that a pipeline may overlap."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from segkit.batch.executor import run_whole
from segkit.batch.manifest import CaseRecord
from segkit.batch.worker import StageClock, image_bytes, sentence
from segkit.checkpoint.card import ModelCard
from segkit.errors import DataError
from segkit.inference.backends import Backend
from segkit.inference.predictor import Predictor
from segkit.inpainting.anomaly import anomaly_map
from segkit.inpainting.bank import copy_file
from segkit.inpainting.masks import enlarged, read_mask
from segkit.preparing.lesion_bank import image_path, lesion_path
from segkit.preparing.preprocessing import load_case
from segkit.reading.case import Case, ImageFile
from segkit.reading.files import read_volume, rewrite_image, write_image, write_labels
from segkit.reading.volume import Grid, in_type
from segkit.runtime import peak_rss_mb
from segkit.shapes import Image

NOTHING_MISSING = "nothing is missing: the image is unchanged"

_log = logging.getLogger(__name__)


class Filler(Protocol):
    """What makes up the voxels of a hole: an `InpaintingPredictor`."""

    @property
    def card(self) -> ModelCard:
        """What the model restores."""
        ...

    @property
    def backend(self) -> Backend:
        """What computes it."""
        ...

    def fill(self, image: Image, hole: NDArray[np.bool_], grid: Grid) -> Image:
        """(C, *spatial) with the hole (*spatial) made up."""
        ...


@dataclass(frozen=True)
class FillingTask:
    """One case to fill: its images under the model's modality names, and a file for each of them to write.

    What is missing is marked by `mask` or, where that is None, found by the segmenter in `segmented`. Modalities that
    are channels of one picture share a target. `hole_target` takes what was made up as a mask, `anomaly_target` the
    anomaly map, `bank` is the folder of a bank; None where they are not wanted.
    """

    case: Case
    targets: Mapping[str, Path]
    mask: ImageFile | None = None
    segmented: Case | None = None
    hole_target: Path | None = None
    anomaly_target: Path | None = None
    bank: Path | None = None

    def paths(self) -> list[Path]:
        """Every file that will be there when the case is done."""
        paths = [*self.targets.values(), *(path for path in (self.hole_target, self.anomaly_target) if path)]
        if self.bank is not None:
            paths += [image_path(self.bank, self.case.id, modality) for modality in self.targets]
            paths.append(lesion_path(self.bank, self.case.id))
        return list(dict.fromkeys(paths))

    def inputs(self) -> list[Path]:
        """The files that are read."""
        files = [*self.case.images.values(), *([self.mask] if self.mask else [])]
        files += self.segmented.images.values() if self.segmented else []
        return list(dict.fromkeys(file.path for file in files))

    def moved_to(self, folders: Sequence[Path]) -> FillingTask:
        """The same with everything that is written in other folders, under the same names: the output, and a bank."""
        output, *banks = folders

        def moved(path: Path | None) -> Path | None:
            return None if path is None else output / path.name

        return replace(
            self,
            targets={modality: output / path.name for modality, path in self.targets.items()},
            hole_target=moved(self.hole_target),
            anomaly_target=moved(self.anomaly_target),
            bank=banks[0] if self.bank is not None else None,
        )


@dataclass(frozen=True)
class FillingRecord(CaseRecord):
    """What became of one case, with the number of voxels that were made up; `note` is what a user should know."""

    made_up_voxels: int = 0
    note: str | None = None


@dataclass(frozen=True)
class FillingWorker:
    """Fills cases with one model; `segmenter` finds what is missing of cases without a mask, enlarged by `margin_mm`.

    `identity` tells in the records how the cases were filled.
    """

    filler: Filler
    segmenter: Predictor | None = None
    margin_mm: float = 0.0
    identity: str = ""
    uses_threads: bool = True
    """Read the files of a case side by side."""

    def begin(self, task: FillingTask) -> FillingJob:
        """The work on one case, not yet started."""
        return FillingJob(self, task)

    def __call__(self, task: FillingTask) -> CaseRecord:
        """All of the work on one case, without threads; never raises but for what ends the whole program."""
        return run_whole(self.begin(task))


class FillingJob:
    """The stages of one case: `read`, then `compute`, whose one part, the filled image, goes to `finish`."""

    def __init__(self, worker: FillingWorker, task: FillingTask) -> None:
        self.worker = worker
        self.task = task
        self.modalities = tuple(task.targets)
        self.clock = StageClock()
        self._made_up = 0

    @functools.cached_property
    def waiting_bytes(self) -> int:
        """What the image takes, as the header of its first file tells; 0 where it cannot be read."""
        return image_bytes(self.task.case, len(self.modalities), lambda grid: grid.shape)

    def read(self) -> None:
        """Load the image and, where it has one, its mask.

        Raises:
            DataError: the files cannot be read or do not fit together.
        """
        with self.clock.timed("read"):
            loaded = load_case(self.task.case, self.modalities, None, uses_threads=self.worker.uses_threads)
            self.image, self.grid = loaded.image, loaded.grid
            self._marked = None if self.task.mask is None else read_mask(self.task.mask, self.grid)

    def compute(self) -> Iterator[Image]:
        """The image (C, *spatial) with its hole made up.

        Raises:
            DataError: nothing is known of the image but its hole, or what is made up is no image.
        """
        with self.clock.timed("preprocess"):
            marked = self._found() if self._marked is None else self._marked
            self.hole = enlarged(marked, self.image, self.grid.spacing_mm, self.worker.margin_mm)
        if self.task.anomaly_target is not None and self.hole.any() and not self.image[:, self.hole].any():
            raise DataError(
                "the image is 0 all over the hole, so there is nothing to compare with",
                where=self.task.case.id,
                expected="for an anomaly map, the image before anything was cut out of it",
            )
        with self.clock.timed("predict"):
            filled = self.worker.filler.fill(self.image, self.hole, self.grid)
        if not np.isfinite(filled[:, self.hole]).all():
            raise DataError("the model made up NaN or infinity", where=self.task.case.id, remedy="Train it again")
        yield filled

    def finish(self, parts: Iterator[Image]) -> FillingRecord:
        """Write the image, with what else was asked for.

        Raises:
            DataError: a file cannot be written.
        """
        task = self.task
        (filled,) = parts
        self._made_up = int(np.count_nonzero(self.hole))
        anomaly = None
        if task.anomaly_target is not None:
            with self.clock.timed("decode"):
                anomaly = anomaly_map(self.image, filled, self.hole, self.grid.spacing_mm)
        with self.clock.timed("write"):
            if task.anomaly_target is not None and anomaly is not None:
                write_image(task.anomaly_target, anomaly, self.grid)
            if task.hole_target is not None:
                write_labels(task.hole_target, self.hole.astype(np.uint8), self.grid)
            self._write_images(filled)
            if task.bank is not None:
                for modality, target in task.targets.items():
                    copy_file(target, image_path(task.bank, task.case.id, modality))
                write_labels(lesion_path(task.bank, task.case.id), self.hole.astype(np.uint8), self.grid)
        return self._record(None, None if self._made_up else NOTHING_MISSING)

    def again(self, error: BaseException) -> None:
        """Nothing: the windows are as small as they can be."""
        return

    def failed(self, error: BaseException) -> FillingRecord:
        """The record of the case when a stage raised `error`; with -v the trace is told too."""
        _log.debug("%s failed", self.task.case.id, exc_info=error)
        return self._record(sentence(error))

    def _found(self) -> NDArray[np.bool_]:
        """What the segmenter marks, (*spatial)."""
        segmenter, case = self.worker.segmenter, self.task.segmented
        if segmenter is None or case is None:
            raise ValueError("there is neither a mask nor a segmenter")
        loaded = load_case(case, segmenter.card.modalities, None, uses_threads=self.worker.uses_threads)
        found: NDArray[np.bool_] = segmenter.predict_loaded(loaded).labels != 0
        return found

    def _write_images(self, filled: Image) -> None:
        by_target: dict[Path, list[int]] = {}
        for index, target in enumerate(self.task.targets.values()):
            by_target.setdefault(target, []).append(index)
        files = [self.task.case.images[modality] for modality in self.modalities]
        for target, indices in by_target.items():
            if len(indices) == 1:
                file = files[indices[0]]
                rewrite_image(target, file.path, self.hole, filled[indices[0], self.hole], file.channel)
                continue
            planes = [read_volume(files[index].path, files[index].channel).array.copy() for index in indices]
            for plane, index in zip(planes, indices, strict=True):
                plane[self.hole] = in_type(filled[index, self.hole], plane.dtype)
            write_image(target, np.stack(planes, -1), self.grid)  # (H, W, C)

    def _record(self, error: str | None, note: str | None = None) -> FillingRecord:
        return FillingRecord(
            self.task.case.id,
            "done" if error is None else "failed",
            error,
            self.clock.rounded(),
            round(peak_rss_mb(), 1),
            self.worker.filler.backend.name,
            model=self.worker.identity,
            made_up_voxels=self._made_up,
            note=note,
        )
