"""`segkit inpaint`: scans with holes, or with lesions, in; the same scans without them out."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from segkit.cli.engine import (
    AddressOption,
    Engine,
    EngineOption,
    ResultsOption,
    ThreadsOption,
    WorkersOption,
    choose_engine,
    executor_of,
    on_gpu,
)
from segkit.cli.options import (
    BackendOption,
    CasesOption,
    DeviceOption,
    DryRunOption,
    InputOption,
    JsonOption,
    LayoutOption,
    MemoryOption,
    ModalitiesOption,
    OutputOption,
    OverwriteOption,
    QuietOption,
    VerboseOption,
    print_json,
    print_table,
    read_case_ids,
    read_modalities,
    set_verbosity,
    tell_aside,
)
from segkit.cli.progress import CaseProgress

if TYPE_CHECKING:
    from segkit.inpainting.cases import InpaintingSettings
    from segkit.inpainting.masks import HoleSource
    from segkit.inpainting.predictor import InpaintingPredictor
    from segkit.reading.case import Cohort

RunOption = Annotated[
    Path, typer.Option("-m", "--model", help="Run folder of `segkit pretrain --method inpainting`, or its export.")
]
MaskOption = Annotated[
    Path | None,
    typer.Option("--mask", help="What is missing: a mask, or a folder with one for each case.", show_default=False),
]
LesionsOption = Annotated[
    Path | None,
    typer.Option(
        "--lesions",
        help="Lesions to fill: a mask, a folder of masks or of labelled data, or a segmentation model to find them.",
        show_default=False,
    ),
]
MarginOption = Annotated[
    float, typer.Option("--margin", min=0.0, help="Millimetres of tissue around lesions that are filled as well.")
]
AnomalyOption = Annotated[
    bool, typer.Option("--anomaly", help="Also write OUT/<case>_anomaly: how far the scan is from the filled one.")
]
BankOption = Annotated[
    Path | None,
    typer.Option("--bank", help="Also write lesion-free copies here, for `segkit train`.", show_default=False),
]

_THREE_WAYS = (
    "--mask FILE_OR_FOLDER for what is missing, --lesions MASKS_OR_MODEL for lesions to fill, or a folder of the BraTS "
    "inpainting task (-t1n-voided and -mask)"
)


def inpaint(
    model: RunOption,
    input: InputOption,
    output: OutputOption,
    mask: MaskOption = None,
    lesions: LesionsOption = None,
    margin: MarginOption = 5.0,
    anomaly: AnomalyOption = False,
    bank: BankOption = None,
    cases: CasesOption = None,
    backend: BackendOption = "auto",
    device: DeviceOption = None,
    layout: LayoutOption = None,
    modality: ModalitiesOption = None,
    workers: WorkersOption = None,
    threads: ThreadsOption = None,
    memory: MemoryOption = None,
    engine: EngineOption = "local",
    ray_address: AddressOption = None,
    results: ResultsOption = "auto",
    overwrite: OverwriteOption = False,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Fill what is missing of scans, or their lesions; all other voxels come back as they were, bit for bit.

    What is missing is told by --mask, by --lesions, or by the folder itself where it is one of the BraTS inpainting
    task. One image a modality and a manifest go to OUT; a case of which nothing is missing is written as it is, with a
    note. Cases that fail do not stop the others, and the same command goes on where it was interrupted.
    """
    set_verbosity(is_quiet=quiet, is_verbose=verbose)
    from segkit.errors import DataError, RequestError, as_request
    from segkit.inpainting.cases import InpaintingSettings
    from segkit.reading.archives import opened

    if mask is not None and lesions is not None:
        raise RequestError("--mask and --lesions both say what is filled", remedy="Give one of them")
    _refuse_bank_in_input(bank, input)
    place = choose_engine(engine, ray_address, results, workers, threads, memory)
    output, bank = place.path(output), None if bank is None else place.path(bank)
    settings = InpaintingSettings(
        overwrites=overwrite, writes_holes=lesions is not None, writes_anomaly=anomaly, bank=bank
    )
    with contextlib.ExitStack() as stack:
        try:
            source = stack.enter_context(opened(place.path(input)))
        except DataError as error:
            raise as_request(error) from error
        if mask is None and lesions is None:
            cohort = _find_voided(source, output, layout, modality, cases)
        else:
            cohort = _find(source, output, layout, modality, cases)
        loading = (*place.loads_with(device, backend), threads)
        with place.limited():
            predictor = _load(model, loading)
            holes = _find_holes(cohort, input, mask, lesions, margin, loading)
        if place.has_gpus(device):
            predictor = _moved_to_gpus(predictor, holes)
        request = Request(predictor, cohort, output, holes, settings, str(model))
        if dry_run:
            _tell_plan(request, as_json=json)
            return
        document = _run(request, place, is_quiet=quiet)
    if json:
        print_json(document)
    if document["summary"]["failed"]:
        raise typer.Exit(1)


Loading = tuple[str, str, int | None]
"""Device, backend and threads that models are opened with."""


class Request(NamedTuple):
    """What is asked for, found and loaded."""

    predictor: InpaintingPredictor
    cohort: Cohort
    output: Path
    holes: HoleSource
    settings: InpaintingSettings
    model: str


def _refuse_bank_in_input(bank: Path | None, input: Path) -> None:
    from segkit.errors import RequestError

    if bank is not None and input.is_dir() and bank.resolve().is_relative_to(input.resolve()):
        raise RequestError(
            "lies in the input folder, where its copies would be taken for scans",
            where=bank,
            remedy="Choose another folder for --bank",
        )


def _find(source: Path, output: Path, layout: str | None, modality: list[str] | None, cases: Path | None) -> Cohort:
    from segkit.batch.cases import find_input

    return find_input(
        source,
        layout=layout,
        modalities=read_modalities(modality),
        case_ids=read_case_ids(cases),
        exclude=output.resolve(),
    )


def _find_voided(
    source: Path, output: Path, layout: str | None, modality: list[str] | None, cases: Path | None
) -> Cohort:
    """The cases of a folder of the inpainting task."""
    from segkit.batch.cases import choose_cases
    from segkit.errors import DataError, RequestError
    from segkit.reading.layouts.synthesis import SYNTHESIS_LAYOUT, find_voided

    if layout not in (None, SYNTHESIS_LAYOUT) or modality:
        raise RequestError("nothing says what is missing of scans in another layout", expected=_THREE_WAYS)
    try:
        cohort = find_voided(source, exclude=output.resolve())
    except DataError as error:
        raise RequestError(
            f"nothing says what is missing: {error.found}", where=source, expected=_THREE_WAYS
        ) from error
    ids = read_case_ids(cases)
    return cohort if ids is None else choose_cases(cohort, ids)


def _find_holes(
    cohort: Cohort, input: Path, mask: Path | None, lesions: Path | None, margin_mm: float, loading: Loading
) -> HoleSource:
    from segkit.inpainting.masks import find_lesions, find_masks, masks_of_cohort

    if mask is not None:
        return find_masks(cohort, mask)
    if lesions is not None:
        return find_lesions(cohort, lesions, margin_mm, *loading)
    return masks_of_cohort(cohort, input)


def _load(model: Path, loading: Loading) -> InpaintingPredictor:
    from segkit.errors import CheckpointError, as_request
    from segkit.inpainting.predictor import InpaintingPredictor

    try:
        return InpaintingPredictor.load(model, *loading)
    except CheckpointError as error:
        raise as_request(error) from error


def _moved_to_gpus(predictor: InpaintingPredictor, holes: HoleSource) -> InpaintingPredictor:
    """The predictor for the GPU of whoever opens it, and so the network that finds lesions, where there is one."""
    for member in holes.networks():
        member.backend = on_gpu(member.backend)
    return replace(predictor, backend=on_gpu(predictor.backend))


def _run(request: Request, place: Engine, *, is_quiet: bool) -> dict[str, Any]:
    from segkit.inpainting.folders import inpaint_folder

    if place.limit_mb is not None:
        place = place._replace(workers=place.workers or 0)  # a case that waits takes memory as well
    if not is_quiet:
        tell_aside(f"{request.predictor.backend.name} fills holes from {request.holes.origin}")
    backends = [request.predictor.backend, *(member.backend for member in request.holes.networks())]
    folders = [request.output, *([request.settings.bank] if request.settings.bank else [])]
    with CaseProgress("filling", len(request.cohort.cases), is_quiet=is_quiet) as progress:
        return inpaint_folder(
            request.predictor,
            request.cohort,
            request.output,
            request.holes,
            request.settings,
            executor=executor_of(place, backends, folders),
            on_record=progress.show,
            model=request.model,
        )


def _tell_plan(request: Request, *, as_json: bool) -> None:
    from segkit.inpainting.cases import plan_cases
    from segkit.inpainting.folders import open_manifest

    predictor, cohort, output, holes, settings, model = request
    manifest = open_manifest(predictor, cohort, output, holes, model)
    tasks, decided = plan_cases(predictor, cohort, output, holes, settings, manifest)
    planned = [
        {"case": task.case.id, "status": "planned", "files": [str(path) for path in task.paths()]} for task in tasks
    ]
    others = [{"case": record.case, "status": record.status, "error": record.error} for record in decided]
    if as_json:
        print_json({"cases": [*planned, *others]})
        return
    rows = [(task.case.id, "planned", ", ".join(path.name for path in task.paths())) for task in tasks]
    rows += [(record.case, record.status, record.error or "done before") for record in decided]
    print_table("What would be done", ("case", "status", "files or reason"), rows)
