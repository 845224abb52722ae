"""`segkit.infer`: masks of the scans of a folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segkit.api.arguments import AnyPath, CaseIds, device_name
from segkit.api.folder import BackendName, EngineName, FolderOptions, Loading, OpenFolder, Results, open_folder

if TYPE_CHECKING:
    from segkit.batch.manifest import CaseRecord
    from segkit.batch.segment import Segment
    from segkit.reading.case import Cohort


def infer(
    model: AnyPath | Sequence[AnyPath],
    scans: AnyPath,
    out: AnyPath,
    *,
    backend: BackendName = "auto",
    device: str = "auto",
    tta: bool = False,
    save_probabilities: bool = False,
    uncertainty: bool = False,
    postprocessing: bool = True,
    allow_missing: bool = False,
    label_scheme: str | None = None,
    keep_patient: bool = False,
    cases: CaseIds | None = None,
    layout: str | None = None,
    modalities: Mapping[str, str] | None = None,
    workers: int | None = None,
    threads: int | None = None,
    memory: str | float | None = None,
    engine: EngineName = "local",
    ray_address: str | None = None,
    results: Results = "auto",
    num_parts: int = 1,
    part_id: int = 0,
    overwrite: bool = False,
    on_record: Callable[[CaseRecord], None] | None = None,
) -> dict[str, Any]:
    """Segment a volume, a case folder or a data folder; returns the manifest, which is also `out/manifest.json`.

    `out/<case>.nii.gz` is uint8 on the grid of the scan, in its label scheme. A case that fails is recorded in the
    manifest (`summary["failed"]`, `cases[i]["error"]`) and does not stop the others; finished cases are skipped.
    `model` is a run folder or an export; several make an ensemble. `memory` is in GiB, or "8G". `cases` are ids, or a
    text file of them. `modalities` maps a modality to the suffix of its files. `on_record` is called after each case.
    The other arguments are the options of `segkit infer`.

    Raises:
        RequestError: the model, the scans or an option cannot be used; nothing was written.

    Example:
        >>> manifest = segkit.infer("run", "scans", "masks")  # doctest: +SKIP
        >>> manifest["summary"]["done"]  # doctest: +SKIP
        12
    """
    options = FolderOptions(
        scans, out, cases, backend, device_name(device), layout, modalities, workers, threads, memory,
        engine, ray_address, results, overwrite,
    )  # fmt: skip
    with open_segmentation(
        options, model, label_scheme=label_scheme, tta=tta, allow_missing=allow_missing,
        save_probabilities=save_probabilities, uncertainty=uncertainty, postprocessing=postprocessing,
        keep_patient=keep_patient, num_parts=num_parts, part_id=part_id,
    ) as folder:  # fmt: skip
        return folder.run(on_record)


def open_segmentation(
    options: FolderOptions,
    model: AnyPath | Sequence[AnyPath],
    *,
    label_scheme: str | None = None,
    tta: bool = False,
    allow_missing: bool = False,
    save_probabilities: bool = False,
    uncertainty: bool = False,
    postprocessing: bool = True,
    keep_patient: bool = False,
    num_parts: int = 1,
    part_id: int = 0,
) -> AbstractContextManager[OpenFolder]:
    """The folder that `infer` would segment, ready to be planned or run.

    Raises:
        RequestError: as `infer`.
    """
    models = [Path(model)] if isinstance(model, (str, os.PathLike)) else [Path(one) for one in model]

    def find(source: Path) -> tuple[Cohort, str | None]:
        from segkit.batch.cases import take_part

        return take_part(options.find_input(source), num_parts, part_id)

    def load(cohort: Cohort, loading: Loading) -> Segment:
        from segkit.batch.segment import Segment
        from segkit.inference.predictor import Predictor

        predictor = Predictor.load(
            models,
            loading.device,
            loading.backend,
            threads=loading.threads,
            uses_tta=tta,
            uses_postprocessing=postprocessing,
        )
        return Segment(predictor, allow_missing, save_probabilities, uncertainty, keep_patient, label_scheme)

    return open_folder(options, find, load, model=", ".join(map(str, models)), records_input=True)
