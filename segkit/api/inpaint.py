"""`segkit.inpaint`: scans with what is missing, or their lesions, filled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segkit.api.arguments import AnyPath, CaseIds, read_case_ids
from segkit.api.folder import BackendName, EngineName, FolderOptions, Loading, OpenFolder, Results, open_folder
from segkit.errors import DataError, RequestError

if TYPE_CHECKING:
    from segkit.batch.manifest import CaseRecord
    from segkit.inpainting.inpaint import Inpaint
    from segkit.reading.case import Cohort

_THREE_WAYS = (
    "--mask FILE_OR_FOLDER for what is missing, --lesions MASKS_OR_MODEL for lesions to fill, or a folder of the BraTS "
    "inpainting task (-t1n-voided and -mask)"
)


def inpaint(
    model: AnyPath,
    scans: AnyPath,
    out: AnyPath,
    *,
    mask: AnyPath | None = None,
    lesions: AnyPath | None = None,
    margin: float = 5.0,
    anomaly: bool = False,
    bank: AnyPath | None = None,
    backend: BackendName = "auto",
    device: str = "auto",
    cases: CaseIds | None = None,
    layout: str | None = None,
    modalities: Mapping[str, str] | None = None,
    workers: int | None = None,
    threads: int | None = None,
    memory: str | float | None = None,
    engine: EngineName = "local",
    ray_address: str | None = None,
    results: Results = "auto",
    overwrite: bool = False,
    on_record: Callable[[CaseRecord], None] | None = None,
) -> dict[str, Any]:
    """Fill holes, or lesions, of the scans of a folder; returns the manifest, which is also `out/manifest.json`.

    What is filled is given by `mask` (a mask, or a folder with one for each case), by `lesions` (masks, a labelled
    folder or a segmentation model; enlarged by `margin` millimetres), or by a folder of the BraTS inpainting task. All
    other voxels stay bit for bit. `anomaly` also writes how far each scan is from the filled one. `bank` is a folder
    for lesion-free copies, for `segkit.train`. The other arguments are those of `segkit.infer`.

    Raises:
        RequestError: the model, the scans or an option cannot be used; nothing was written.

    Example:
        >>> segkit.inpaint("inpainter", "scans", "healthy", lesions="run")  # doctest: +SKIP
    """
    options = FolderOptions(
        scans, out, cases, backend, device, layout, modalities, workers, threads, memory, engine, ray_address, results,
        overwrite,
    )  # fmt: skip
    with open_inpainting(options, model, mask, lesions, margin, anomaly=anomaly, bank=bank) as folder:
        return folder.run(on_record)


def open_inpainting(
    options: FolderOptions,
    model: AnyPath,
    mask: AnyPath | None,
    lesions: AnyPath | None,
    margin: float,
    *,
    anomaly: bool,
    bank: AnyPath | None,
) -> AbstractContextManager[OpenFolder]:
    """The folder that `inpaint` would fill, ready to be planned or run.

    Raises:
        RequestError: as `inpaint`.
    """
    if mask is not None and lesions is not None:
        raise RequestError("--mask and --lesions both say what is filled", remedy="Give one of them")
    copies = None if bank is None else Path(bank)
    _refuse_bank_in_input(copies, Path(options.scans))
    if copies is not None and options.is_ray:
        copies = copies.absolute()  # nodes have working directories of their own
    if not options.is_ray and options.memory is not None and options.workers is None:
        options = replace(options, workers=0)  # a case that waits takes memory as well

    def find(source: Path) -> tuple[Cohort, str | None]:
        is_voided = mask is None and lesions is None
        return _find_voided(source, options) if is_voided else options.find_input(source), None

    def load(cohort: Cohort, loading: Loading) -> Inpaint:
        from segkit.inpainting.inpaint import Inpaint
        from segkit.inpainting.masks import find_lesions, find_masks, masks_of_cohort
        from segkit.inpainting.predictor import InpaintingPredictor

        predictor = InpaintingPredictor.load(Path(model), *loading)
        if mask is not None:
            holes = find_masks(cohort, Path(mask))
        elif lesions is not None:
            holes = find_lesions(cohort, Path(lesions), margin, *loading)
        else:
            holes = masks_of_cohort(cohort, Path(options.scans))
        return Inpaint(predictor, holes, save_holes=lesions is not None, anomaly=anomaly, bank=copies)

    return open_folder(options, find, load, model=str(Path(model)), bank=copies)


def _refuse_bank_in_input(bank: Path | None, scans: Path) -> None:
    if bank is not None and scans.is_dir() and bank.resolve().is_relative_to(scans.resolve()):
        raise RequestError(
            "lies in the input folder, where its copies would be taken for scans",
            where=bank,
            remedy="Choose another folder for --bank",
        )


def _find_voided(source: Path, options: FolderOptions) -> Cohort:
    """The cases of a folder of the BraTS inpainting task."""
    from segkit.batch.cases import choose_cases
    from segkit.reading.layouts.brats import SYNTHESIS_LAYOUT, find_voided

    if options.layout not in (None, SYNTHESIS_LAYOUT) or options.modalities:
        raise RequestError("nothing says what is missing of scans in another layout", expected=_THREE_WAYS)
    try:
        cohort = find_voided(source, exclude=Path(options.out).resolve())
    except DataError as error:
        raise RequestError(
            f"nothing says what is missing: {error.found}", where=source, expected=_THREE_WAYS
        ) from error
    return choose_cases(cohort, read_case_ids(options.cases))
