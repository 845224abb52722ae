"""`segkit infer`: scans in, masks on their own grids out."""

from __future__ import annotations

import contextlib
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
    ModelOption,
    OutputOption,
    OverwriteOption,
    QuietOption,
    SchemeOption,
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
    from segkit.batch.cases import InferenceSettings
    from segkit.inference.predictor import Predictor
    from segkit.reading.case import Cohort

TtaOption = Annotated[bool, typer.Option("--tta", help="Average over mirrored inputs: better, up to 8 times slower.")]
MissingOption = Annotated[
    bool, typer.Option("--allow-missing", help="Go on without modalities that a case lacks; recorded.")
]
ProbabilitiesOption = Annotated[
    bool, typer.Option("--save-probabilities", help="Also write OUT/probabilities/<case>_<output>.")
]
UncertaintyOption = Annotated[
    bool, typer.Option("--uncertainty", help="Also write OUT/uncertainty/<case>_entropy and <case>_disagreement.")
]
PatientOption = Annotated[
    bool, typer.Option("--keep-patient", help="Copy the patient's name, numbers and dates into DICOM SEG files.")
]
PostprocessingOption = Annotated[
    bool,
    typer.Option("--postprocessing/--no-postprocessing", help="Clean masks by the rules that training chose, if any."),
]
NumPartsOption = Annotated[int, typer.Option("--num-parts", min=1, help="Split the cases into N parts ...")]
PartIdOption = Annotated[int, typer.Option("--part-id", min=0, help="... and do the K-th of them, counted from 0.")]


def infer(
    model: ModelOption,
    input: InputOption,
    output: OutputOption,
    cases: CasesOption = None,
    backend: BackendOption = "auto",
    device: DeviceOption = None,
    layout: LayoutOption = None,
    label_scheme: SchemeOption = None,
    modality: ModalitiesOption = None,
    tta: TtaOption = False,
    allow_missing: MissingOption = False,
    save_probabilities: ProbabilitiesOption = False,
    uncertainty: UncertaintyOption = False,
    postprocessing: PostprocessingOption = True,
    keep_patient: PatientOption = False,
    workers: WorkersOption = None,
    threads: ThreadsOption = None,
    memory: MemoryOption = None,
    engine: EngineOption = "local",
    ray_address: AddressOption = None,
    results: ResultsOption = "auto",
    num_parts: NumPartsOption = 1,
    part_id: PartIdOption = 0,
    overwrite: OverwriteOption = False,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Segment a volume, a case folder or a data folder; one mask a case and a manifest go to OUT.

    Cases that fail are named with the reason and do not stop the others; run the same command again to go on where
    it was interrupted.
    """
    set_verbosity(is_quiet=quiet, is_verbose=verbose)
    from segkit.batch.cases import InferenceSettings
    from segkit.errors import DataError, as_request
    from segkit.reading.archives import opened

    settings = InferenceSettings(
        overwrites=overwrite,
        allows_missing=allow_missing,
        saves_probabilities=save_probabilities,
        saves_uncertainty=uncertainty,
        keeps_patient=keep_patient,
        label_scheme=label_scheme,
    )
    place = choose_engine(engine, ray_address, results, workers, threads, memory)
    input, output = place.path(input), place.path(output)
    with contextlib.ExitStack() as stack:
        try:
            source = stack.enter_context(opened(input))
        except DataError as error:
            raise as_request(error) from error
        cohort, part = _find(source, output, layout, modality, cases, (num_parts, part_id))
        choices = {"threads": threads, "uses_tta": tta, "uses_postprocessing": postprocessing}
        with place.limited():
            predictor = _load(model, backend, device, choices, place)
        names = ", ".join(str(path) for path in model)
        request = Request(predictor, cohort, output, settings, names, part, None if source != input else input)
        if dry_run:
            _tell_plan(request, place.memory_mb, as_json=json)
            return
        document = _run(request, place, is_quiet=quiet)
    if json:
        print_json(document)
    if document["summary"]["failed"]:
        raise typer.Exit(1)


class Request(NamedTuple):
    """What is asked for, found and loaded."""

    predictor: Predictor
    cohort: Cohort
    output: Path
    settings: InferenceSettings
    model: str
    part: str | None
    data: Path | None
    """Where the images stay; None where they were unpacked for this run."""


def _find(
    source: Path,
    output: Path,
    layout: str | None,
    modality: list[str] | None,
    cases: Path | None,
    part: tuple[int, int],
) -> tuple[Cohort, str | None]:
    from segkit.batch.cases import find_input, take_part

    cohort = find_input(
        source,
        layout=layout,
        modalities=read_modalities(modality),
        case_ids=read_case_ids(cases),
        exclude=output.resolve(),
    )
    return take_part(cohort, *part)


def _run(request: Request, place: Engine, *, is_quiet: bool) -> dict[str, Any]:
    from segkit.batch.runner import infer_folder
    from segkit.inference.predictor import members_of

    predictor = request.predictor
    if not is_quiet:
        size = " x ".join(map(str, predictor.window))
        tell_aside(f"{predictor.backend.name} computes windows of {size} voxels")
    executor = executor_of(place, (member.backend for member in members_of(predictor)), [request.output])
    with CaseProgress("segmenting", len(request.cohort.cases), is_quiet=is_quiet) as progress:
        return infer_folder(
            predictor,
            request.cohort,
            request.output,
            request.settings,
            executor=executor,
            memory_mb=place.memory_mb,
            on_record=progress.show,
            model=request.model,
            part=request.part,
            data=request.data,
        )


def _load(models: list[Path], backend: str, device: str | None, choices: dict[str, Any], place: Engine) -> Predictor:
    from segkit.errors import CheckpointError, as_request
    from segkit.inference.predictor import Predictor, members_of

    try:
        predictor = Predictor.load(models, *place.loads_with(device, backend), **choices)
    except CheckpointError as error:
        raise as_request(error) from error
    if place.has_gpus(device):
        for member in members_of(predictor):
            member.backend = on_gpu(member.backend)
    return predictor


def _tell_plan(request: Request, memory_mb: float | None, *, as_json: bool) -> None:
    from segkit.batch.cases import plan_cases
    from segkit.batch.forecast import fit_memory
    from segkit.batch.runner import open_manifest

    predictor = request.predictor
    manifest = open_manifest(predictor, request.cohort, request.output, request.model, request.part)
    tasks, decided = plan_cases(predictor, request.cohort, request.output, request.settings, manifest)
    tasks, _ = fit_memory(predictor, tasks, memory_mb)
    planned = [
        {
            "case": task.case.id,
            "status": "planned",
            "mask": str(task.target),
            "label_scheme": task.scheme.name,
            "predicted": dict(task.predicted),
        }
        for task in tasks
    ]
    others = [{"case": record.case, "status": record.status, "error": record.error} for record in decided]
    if as_json:
        print_json({"cases": planned + others})
        return
    print_table(
        "What would be done",
        ("case", "status", "mask or reason"),
        [
            (row["case"], row["status"], row.get("mask") or row.get("error") or "done before")
            for row in planned + others
        ],
    )
