"""`segkit.infer`, and what it shares with `segkit.inpaint`: options, the engine that does the cases, an open folder."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from segkit.api.arguments import AnyPath, CaseIds, parse_gigabytes, read_case_ids
from segkit.errors import CheckpointError, DataError, RequestError, as_request, is_memory_error

_log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from segkit.batch.manifest import CaseRecord
    from segkit.batch.segment import Segment
    from segkit.batch.worker import Executor, Task
    from segkit.inference.backends import Backend
    from segkit.reading.case import Cohort

BackendName: TypeAlias = Literal["auto", "torch", "onnxruntime", "openvino"]
EngineName: TypeAlias = Literal["local", "ray"]
Results: TypeAlias = Literal["auto", "files", "store"]

_LEAST_ROOM_MB = 64
"""Memory of the smallest case, with the libraries that are loaded for it."""


def infer(
    model: AnyPath | Sequence[AnyPath],
    scans: AnyPath,
    out: AnyPath,
    *,
    backend: BackendName = "auto",
    device: str = "auto",
    tta: bool | None = None,
    save_probabilities: bool = False,
    uncertainty: bool = False,
    class_masks: bool = False,
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
    `model` is a run folder or an export; several make an ensemble. `memory` is in GiB, or "8G". `cases` are ids, or
    a text file of them. `tta` None mirrors inputs for models of nnU-Net only, as nnU-Net does. `modalities` maps a
    modality to the suffix of its files. `on_record` is called after each case.
    The other arguments are the options of `segkit infer`.

    Raises:
        RequestError: the model, the scans or an option cannot be used; nothing was written.

    Example:
        >>> manifest = segkit.infer("run", "scans", "masks")  # doctest: +SKIP
        >>> manifest["summary"]["done"]  # doctest: +SKIP
        12
    """
    options = FolderOptions(
        scans, out, cases, backend, device, layout, modalities, workers, threads, memory, engine, ray_address, results,
        overwrite,
    )  # fmt: skip
    with open_segmentation(
        options, model, num_parts, part_id, tta=tta, postprocessing=postprocessing, allow_missing=allow_missing,
        save_probabilities=save_probabilities, uncertainty=uncertainty, class_masks=class_masks,
        keep_patient=keep_patient, label_scheme=label_scheme,
    ) as folder:  # fmt: skip
        return folder.run(on_record)


@contextmanager
def open_segmentation(
    options: FolderOptions,
    model: AnyPath | Sequence[AnyPath],
    num_parts: int,
    part_id: int,
    *,
    tta: bool | None,
    postprocessing: bool,
    **of_segment: Any,
) -> Iterator[OpenFolder]:
    """The folder that `infer` would segment, ready to be planned or run; `of_segment` are options of `Segment`.

    For a model of nnU-Net the files CASE_0000, CASE_0001 ... are the channels of a case, also if it is the only one.

    Raises:
        RequestError: as `infer`.
    """
    models = [Path(model)] if isinstance(model, (str, os.PathLike)) else [Path(one) for one in model]

    def find(source: Path, layout: str | None = options.layout) -> tuple[Cohort, str | None]:
        from segkit.batch.cases import take_part

        return take_part(replace(options, layout=layout).find_input(source), num_parts, part_id)

    def load(cohort: Cohort, loading: Loading) -> Segment:
        from segkit.batch.segment import Segment
        from segkit.inference.predictor import Predictor

        return Segment(
            Predictor.load(
                models, *loading[:2], threads=loading.threads, uses_tta=tta, uses_postprocessing=postprocessing
            ),
            **of_segment,
        )

    with open_folder(options, find, load, model=", ".join(map(str, models)), records_input=True) as folder:
        predictor = folder.task.predictor
        if (
            predictor.keeps_values
            and options.layout is None
            and _are_channels(folder.cohort, predictor.card.modalities)
        ):
            cohort, part = find(folder.cohort.root, "nnunet")
            folder = replace(folder, cohort=cohort, part=part)
        yield folder


def _are_channels(cohort: Cohort, modalities: Sequence[str]) -> bool:
    """Whether files are numbered like the channels of a case, and hold fewer than the model needs."""
    from segkit.reading.layouts.layout import channels_or_one

    first = next((file.path for case in cohort.cases for file in case.images.values()), None)
    return cohort.is_numbered and first is not None and channels_or_one(first) < len(modalities)


class Loading(NamedTuple):
    """How models are opened."""

    device: str
    backend: str
    threads: int | None


@dataclass(frozen=True)
class FolderOptions:
    """The arguments that `infer` and `inpaint` share; see `infer`.

    Raises:
        RequestError: options for a cluster without one, Ray is not installed, or the memory cannot be read.
    """

    scans: AnyPath
    out: AnyPath
    cases: CaseIds | None = None
    backend: BackendName = "auto"
    device: str = "auto"
    layout: str | None = None
    modalities: Mapping[str, str] | None = None
    workers: int | None = None
    threads: int | None = None
    memory: str | float | None = None
    engine: EngineName = "local"
    ray_address: str | None = None
    results: Results = "auto"
    overwrite: bool = False

    def __post_init__(self) -> None:
        if not self.is_ray and (self.ray_address is not None or self.results != "auto"):
            raise RequestError("--ray-address and --results are for a Ray cluster", remedy="Add --engine ray")
        if self.is_ray:
            from segkit.batch.ray_executor import require_ray

            require_ray()
        _ = self.memory_gb  # an unreadable size is reported now

    @property
    def is_ray(self) -> bool:
        """Whether cases are done on the nodes of a cluster."""
        return self.engine == "ray"

    @property
    def memory_gb(self) -> float | None:
        """GiB that a process may take; None: nearly all that is free."""
        return parse_gigabytes(self.memory)

    def find_input(self, source: Path) -> Cohort:
        """The requested cases of the input, or of the folder to which the input was unpacked."""
        from segkit.batch.cases import find_input

        return find_input(
            source,
            layout=self.layout,
            modalities=self.modalities,
            case_ids=read_case_ids(self.cases),
            exclude=Path(self.out).resolve(),
        )

    def path(self, path: AnyPath) -> Path:
        """A path as the engine takes it: nodes have working directories of their own."""
        return Path(path).absolute() if self.is_ray else Path(path)

    @contextmanager
    def limited_memory(self) -> Iterator[None]:
        """Limit this process to its memory while models are opened and after; with Ray the memory is that of nodes.

        Raises:
            RequestError: what was loaded before, or is loaded meanwhile, takes more.
        """
        from segkit.process_memory import limit_memory
        from segkit.runtime import device_name

        if self.memory_gb is None or self.is_ray:
            yield
            return
        if device_name(self.device) != "cpu":  # the drivers of GPUs reserve more addresses than they take memory
            _log.warning("--memory limits what is planned for the CPU; the process itself is not limited with a GPU")
            yield
            return

        limit_memory(self.memory_gb)
        try:
            _require_room()
            yield
            _require_room()
        except Exception as error:
            if not is_memory_error(error):
                raise
            limit_memory(None)  # so that there is memory for reporting the error
            raise RequestError(
                f"the models and what computes them take more than {self.memory_gb:.3g} GB",
                remedy="Pass a larger --memory; exported models take less than run folders, as they need no torch",
            ) from error

    @property
    def has_gpus(self) -> bool:
        """Whether cases are computed by GPUs of nodes; this machine need not have any."""
        return self.is_ray and self.device.startswith("cuda")

    def loading(self) -> Loading:
        """How models are opened here; for GPUs of nodes without one.

        Raises:
            RequestError: the backend computes on no GPU.
        """
        if not self.has_gpus:
            return Loading(self.device, self.backend, self.threads)
        if self.backend not in ("auto", "torch"):
            found = f"backend {self.backend} computes on a CPU"
            raise RequestError(found, remedy="Pass --device cpu, or --backend torch")
        return Loading("cpu", "torch", self.threads)

    def executor(self, backends: Iterable[Backend], folders: Sequence[Path]) -> Executor:
        """The executor of cases that `backends` compute and whose results go to `folders`."""
        from segkit.runtime import available_cores

        if not self.is_ray:
            from segkit.batch.worker import LocalExecutor

            return LocalExecutor(min(1, available_cores() - 1) if self.workers is None else self.workers)
        from segkit.batch.ray_executor import RayExecutor, Share
        from segkit.inference.backends import torch_backend

        backends = list(backends)
        found = [torch_backend(backend) for backend in backends]
        uses_gpu = any(one is not None and one.device.type == "cuda" for one in found)
        threads = self.threads or (1 if uses_gpu else max(backend.threads for backend in backends))
        share = Share(threads, int(uses_gpu), self.memory_gb)
        return RayExecutor(folders, share, self.ray_address, workers=self.workers or None, results=self.results)


def _require_room() -> None:
    from segkit.process_memory import room_mb

    if room_mb() < _LEAST_ROOM_MB:
        raise MemoryError


def on_gpu(backend: Backend) -> Backend:
    """The same backend for the GPU of the machine that opens it."""
    from segkit.inference.backends import TorchBackend, torch_backend

    found = torch_backend(backend)
    return backend if found is None else TorchBackend(found.network, "cuda", precision=found.precision)


@dataclass(frozen=True)
class OpenFolder:
    """A folder whose cases are found and whose models are loaded."""

    options: FolderOptions
    task: Task[Any]
    cohort: Cohort
    model: str
    """Name of the model in the manifest."""
    part: str | None = None
    """Name of this part of the work, where several processes share a folder."""
    data: Path | None = None
    """Where the images are, for the manifest."""
    bank: Path | None = None
    """A second folder that results go to."""

    @property
    def output(self) -> Path:
        """The output folder."""
        return self.options.path(self.options.out)

    def plan(self) -> tuple[list[Any], list[CaseRecord]]:
        """The plans of the cases that `run` would do, and the records of all others; nothing is written.

        Raises:
            RequestError: as `segkit.batch.runner.run_folder`.
        """
        from segkit.batch.cases import plan_cases
        from segkit.batch.runner import open_manifest

        manifest = open_manifest(self.task, self.cohort, self.output, self.model, self.part)
        plans, decided = plan_cases(self.task, self.cohort, self.output, manifest, overwrite=self.options.overwrite)
        return self.task.fit_memory(plans, self.options.memory_gb)[1], decided

    def run(self, on_record: Callable[[CaseRecord], None] | None = None) -> dict[str, Any]:
        """Do the cases; returns the manifest. `on_record` is called after each case.

        Raises:
            RequestError: as `segkit.batch.runner.run_folder`.
        """
        from segkit.batch.runner import run_folder

        folders = [self.output, *([] if self.bank is None else [self.bank])]
        return run_folder(
            self.task,
            self.cohort,
            self.output,
            overwrite=self.options.overwrite,
            executor=self.options.executor(self.task.backends(), folders),
            memory_gb=self.options.memory_gb,
            on_record=on_record or (lambda record: None),
            model=self.model,
            part=self.part,
            data=self.data,
        )


@contextmanager
def open_folder(
    options: FolderOptions,
    find: Callable[[Path], tuple[Cohort, str | None]],
    load: Callable[[Cohort, Loading], Task[Any]],
    *,
    model: str,
    bank: Path | None = None,
    records_input: bool = False,
) -> Iterator[OpenFolder]:
    """Unpack the input, find its cases and load the models; the unpacked files are deleted afterwards.

    `find` returns the cases of a folder and the name of this part of the work. The limit set by `memory` ends with the
    block.

    Raises:
        RequestError: an input, a model or an option is missing or does not fit.
    """
    from segkit.process_memory import limit_memory
    from segkit.reading.archives import opened

    input = options.path(options.scans)
    with ExitStack() as stack:
        try:
            source = stack.enter_context(opened(input))
        except DataError as error:
            raise as_request(error) from error
        cohort, part = find(source)
        if options.memory_gb is not None and not options.is_ray:
            stack.callback(limit_memory, None)
        try:
            with options.limited_memory():
                task = load(cohort, options.loading())
        except CheckpointError as error:
            raise as_request(error) from error
        if options.has_gpus:
            task = task.with_backends(on_gpu)
        data = input if records_input and source == input else None
        yield OpenFolder(options, task, cohort, model, part, data, bank)
