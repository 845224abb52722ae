"""`segkit infer`: scans in, masks on their own grids out."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer

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
    console,
    parse_gigabytes,
    print_json,
    print_table,
    read_case_ids,
    read_modalities,
    set_verbosity,
)
from segkit.cli.progress import CaseProgress

if TYPE_CHECKING:
    from segkit.data.case import Cohort
    from segkit.inference.cases import InferenceSettings
    from segkit.inference.pipeline import Executor
    from segkit.inference.predictor import Predictor

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
WorkersOption = Annotated[
    int | None,
    typer.Option(
        "--workers",
        min=0,
        help="Threads that read ahead; 0: no threads at all. Default: 1, 0 on one core. With ray: cases at a time, by "
        "default as many as the nodes have room for.",
    ),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        "--threads", min=1, help="CPU cores that compute a case, here or on a node. Default: all of this one."
    ),
]
EngineOption = Annotated[
    Literal["local", "ray"], typer.Option("--engine", help="This machine, or the nodes of a Ray cluster.")
]
AddressOption = Annotated[
    str | None,
    typer.Option(
        "--ray-address",
        help="ray://HOST:10001, HOST:6379, auto or local. Default: RAY_ADDRESS, a cluster started here, else local.",
        show_default=False,
    ),
]
ResultsOption = Annotated[
    Literal["auto", "files", "store"],
    typer.Option(
        "--results",
        help="With ray: nodes write to OUT (files), send masks back (store), or each does what it can (auto).",
    ),
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
    from segkit.data.archives import opened
    from segkit.errors import DataError, as_request
    from segkit.inference.cases import InferenceSettings
    from segkit.runtime import limit_memory

    settings = InferenceSettings(
        overwrites=overwrite,
        allows_missing=allow_missing,
        saves_probabilities=save_probabilities,
        saves_uncertainty=uncertainty,
        keeps_patient=keep_patient,
        label_scheme=label_scheme,
    )
    limits = Limits(workers, threads, None if memory is None else 1024 * parse_gigabytes(memory))
    cluster = _cluster_of(engine, ray_address, results)
    if cluster is not None:
        input, output = input.absolute(), output.absolute()
    elif limits.memory_mb is not None:
        limit_memory(limits.memory_mb)
    with contextlib.ExitStack() as stack:
        try:
            source = stack.enter_context(opened(input))
        except DataError as error:
            raise as_request(error) from error
        cohort, part = _find(source, output, layout, modality, cases, (num_parts, part_id))
        choices = {"threads": threads, "uses_tta": tta, "uses_postprocessing": postprocessing}
        if cluster is not None and device is not None and device.startswith("cuda"):
            predictor = _load_for_gpus(model, backend, choices)
        else:
            predictor = _load(model, backend, device, choices)
        names = ", ".join(str(path) for path in model)
        request = Request(predictor, cohort, output, settings, names, part, None if source != input else input)
        if dry_run:
            _tell_plan(request, limits, as_json=json)
            return
        document = _run(request, limits, cluster, is_quiet=quiet)
    if json:
        print_json(document)
    if document["summary"]["failed"]:
        raise typer.Exit(1)


class Limits(NamedTuple):
    """What a run may take: workers (None: as many as help), cores (None: all), MB of memory (None: what is free)."""

    workers: int | None
    threads: int | None
    memory_mb: float | None


class Cluster(NamedTuple):
    """Where a Ray cluster is, and how results come back from it."""

    address: str | None
    results: Literal["auto", "files", "store"]


def _cluster_of(engine: str, address: str | None, results: Literal["auto", "files", "store"]) -> Cluster | None:
    from segkit.errors import RequestError

    if engine == "ray":
        return Cluster(address, results)
    if address is not None or results != "auto":
        raise RequestError("--ray-address and --results are for a Ray cluster", remedy="Add --engine ray")
    return None


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
    from segkit.inference.cases import find_input, take_part

    cohort = find_input(
        source,
        layout=layout,
        modalities=read_modalities(modality),
        case_ids=read_case_ids(cases),
        exclude=output.resolve(),
    )
    return take_part(cohort, *part)


def _run(request: Request, limits: Limits, cluster: Cluster | None, *, is_quiet: bool) -> dict[str, Any]:
    from segkit.inference.folders import infer_folder

    predictor = request.predictor
    if not is_quiet:
        size = " x ".join(map(str, predictor.window))
        console().print(f"{predictor.backend.name} computes windows of {size} voxels", soft_wrap=True)
    executor = _local(limits) if cluster is None else _on_cluster(request, limits, cluster)
    with CaseProgress("segmenting", len(request.cohort.cases), is_quiet=is_quiet) as progress:
        return infer_folder(
            predictor,
            request.cohort,
            request.output,
            request.settings,
            executor=executor,
            memory_mb=limits.memory_mb,
            on_record=progress.show,
            model=request.model,
            part=request.part,
            data=request.data,
        )


def _local(limits: Limits) -> Executor:
    from segkit.inference.pipeline import LocalExecutor
    from segkit.runtime import available_cores

    return LocalExecutor(min(1, available_cores() - 1) if limits.workers is None else limits.workers)


def _on_cluster(request: Request, limits: Limits, cluster: Cluster) -> Executor:
    from segkit.cluster.executor import RayExecutor
    from segkit.cluster.share import Share
    from segkit.inference.backends import TorchBackend
    from segkit.inference.predictor import members_of

    backends = [member.backend for member in members_of(request.predictor)]
    on_gpu = any(isinstance(backend, TorchBackend) and backend.device.type == "cuda" for backend in backends)
    threads = limits.threads or (1 if on_gpu else max(backend.threads for backend in backends))
    share = Share(threads, int(on_gpu), limits.memory_mb)
    return RayExecutor(request.output, share, cluster.address, workers=limits.workers or None, results=cluster.results)


def _load_for_gpus(models: list[Path], backend: str, choices: dict[str, Any]) -> Predictor:
    """A predictor for GPUs of other machines: this one need not have any."""
    from segkit.errors import RequestError
    from segkit.inference.backends import TorchBackend
    from segkit.inference.predictor import members_of

    if backend not in ("auto", "torch"):
        raise RequestError(f"backend {backend} computes on a CPU", remedy="Pass --device cpu, or --backend torch")
    predictor = _load(models, "torch", "cpu", choices)
    for member in members_of(predictor):
        if isinstance(member.backend, TorchBackend):
            member.backend = TorchBackend(member.backend.network, "cuda")
    return predictor


def _load(models: list[Path], backend: str, device: str | None, choices: dict[str, Any]) -> Predictor:
    from segkit.errors import CheckpointError, as_request
    from segkit.inference.predictor import Predictor

    try:
        return Predictor.load(models, device or "auto", backend, **choices)
    except CheckpointError as error:
        raise as_request(error) from error


def _tell_plan(request: Request, limits: Limits, *, as_json: bool) -> None:
    from segkit.inference.cases import plan_cases
    from segkit.inference.folders import open_manifest
    from segkit.inference.forecast import fit_memory

    predictor = request.predictor
    manifest = open_manifest(predictor, request.cohort, request.output, request.model, request.part)
    tasks, decided = plan_cases(predictor, request.cohort, request.output, request.settings, manifest)
    tasks, _ = fit_memory(predictor, tasks, limits.memory_mb)
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
