"""What `segkit infer` and `segkit inpaint` share: their options, and the way from options to a manifest."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_type_hints

import typer

from segkit.cli.engine import (
    AddressOption,
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
    console,
    print_json,
    print_stderr,
    print_table,
    read_case_ids,
    read_modalities,
    set_verbosity,
)
from segkit.errors import CheckpointError, DataError, as_request, on_one_line

if TYPE_CHECKING:
    from segkit.batch.manifest import CaseRecord
    from segkit.batch.worker import Task
    from segkit.reading.case import Cohort


@dataclass(frozen=True)
class FolderOptions:
    """The options of every verb that does the cases of a folder."""

    input: InputOption
    output: OutputOption
    cases: CasesOption = None
    backend: BackendOption = "auto"
    device: DeviceOption = None
    layout: LayoutOption = None
    modality: ModalitiesOption = None
    workers: WorkersOption = None
    threads: ThreadsOption = None
    memory: MemoryOption = None
    engine: EngineOption = "local"
    ray_address: AddressOption = None
    results: ResultsOption = "auto"
    overwrite: OverwriteOption = False
    dry_run: DryRunOption = False
    json: JsonOption = False
    quiet: QuietOption = False
    verbose: VerboseOption = False

    def find_input(self, source: Path) -> Cohort:
        """The cases that were asked for, of the input or of the folder that it was unpacked to."""
        from segkit.batch.cases import find_input

        return find_input(
            source,
            layout=self.layout,
            modalities=read_modalities(self.modality),
            case_ids=read_case_ids(self.cases),
            exclude=self.output.resolve(),
        )


def with_folder_options(verb: Callable[..., None]) -> Callable[..., None]:
    """The verb as Typer reads it: `FolderOptions`, which it takes as its first argument, and its own options."""
    kinds = get_type_hints(FolderOptions, include_extras=True)
    hints = get_type_hints(verb, vars(inspect.getmodule(verb)), include_extras=True)
    _, *own = inspect.signature(verb).parameters.values()
    parameters = [
        *(inspect.Parameter(one.name, one.kind, default=one.default, annotation=hints[one.name]) for one in own),
        *(
            inspect.Parameter(
                one.name,
                inspect.Parameter.POSITIONAL_OR_KEYWORD,
                default=inspect.Parameter.empty if one.name in ("input", "output") else one.default,
                annotation=kinds[one.name],
            )
            for one in fields(FolderOptions)
        ),
    ]
    parameters.sort(key=lambda one: one.default is not inspect.Parameter.empty)

    @functools.wraps(verb)
    def typed(**values: Any) -> None:
        options = FolderOptions(**{one.name: values.pop(one.name) for one in fields(FolderOptions)})
        set_verbosity(is_quiet=options.quiet, is_verbose=options.verbose)
        verb(options, **values)

    typed.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    typed.__annotations__ = {one.name: one.annotation for one in parameters}
    return typed


class Loading(NamedTuple):
    """How models are opened."""

    device: str
    backend: str
    threads: int | None


@dataclass(frozen=True)
class FolderVerb:
    """What a verb adds to the common way: how cases are found and its task is made, and how it prints them."""

    model: str
    """Name of the model in the manifest."""
    doing: str
    find: Callable[[Path], tuple[Cohort, str | None]]
    """The cases of the input, or of the folder it was unpacked to, and the name of this part of the work."""
    load: Callable[[Cohort, Loading], Task[Any]]
    announce: Callable[[Any], str]
    """A line about the task before it starts."""
    describe: Callable[[Any], Mapping[str, object]]
    """What `--dry-run --json` says of a plan."""
    files: str
    """Heading of the files in the table of `--dry-run`."""
    file_names: Callable[[Any], str]
    bank: Path | None = None
    """A second folder that results go to, absolute for Ray."""
    records_input: bool = False
    """Whether the manifest says where the images are."""


def run_verb(options: FolderOptions, verb: FolderVerb) -> None:
    """Find the cases, load the models, and do the task with every case, or say what would be done.

    Raises:
        RequestError: something asked for is not there or does not fit.
        typer.Exit: code 1 where a case failed.
    """
    from segkit.batch.cases import plan_cases
    from segkit.batch.runner import open_manifest, run_folder
    from segkit.reading.archives import opened

    o = options
    place = choose_engine(o.engine, o.ray_address, o.results, o.workers, o.threads, o.memory)
    input, output = place.path(o.input), place.path(o.output)
    with ExitStack() as stack:
        try:
            source = stack.enter_context(opened(input))
        except DataError as error:
            raise as_request(error) from error
        cohort, part = verb.find(source)
        try:
            with place.limited():
                task = verb.load(cohort, Loading(*place.loads_with(o.device, o.backend), o.threads))
        except CheckpointError as error:
            raise as_request(error) from error
        if place.has_gpus(o.device):
            task = task.with_backends(on_gpu)
        if o.dry_run:
            manifest = open_manifest(task, cohort, output, verb.model, part)
            plans, decided = plan_cases(task, cohort, output, manifest, overwrite=o.overwrite)
            _, plans, _ = task.fit_memory(plans, place.memory_mb)
            _print_plan(plans, decided, verb, as_json=o.json)
            return
        if not o.quiet:
            print_stderr(verb.announce(task))
        folders = [output, *([] if verb.bank is None else [verb.bank])]
        with CaseProgress(verb.doing, len(cohort.cases), is_quiet=o.quiet) as progress:
            document = run_folder(
                task,
                cohort,
                output,
                overwrite=o.overwrite,
                executor=executor_of(place, task.backends(), folders),
                memory_mb=place.memory_mb,
                on_record=progress.show,
                model=verb.model,
                part=part,
                data=input if verb.records_input and source == input else None,
            )
    if o.json:
        print_json(document)
    if document["summary"]["failed"]:
        raise typer.Exit(1)


def _print_plan(plans: Sequence[Any], decided: Sequence[CaseRecord], verb: FolderVerb, *, as_json: bool) -> None:
    if as_json:
        planned = [{"case": plan.case.id, "status": "planned", **verb.describe(plan)} for plan in plans]
        others = [{"case": record.case, "status": record.status, "error": record.error} for record in decided]
        print_json({"cases": [*planned, *others]})
        return
    rows = [(plan.case.id, "planned", verb.file_names(plan)) for plan in plans]
    rows += [(record.case, record.status, record.error or "done before") for record in decided]
    print_table("What would be done", ("case", "status", f"{verb.files} or reason"), rows)


class CaseProgress:
    """How far a run over cases is: a bar on a terminal, one line a case elsewhere; failures are named in both."""

    def __init__(self, doing: str, total: int, *, is_quiet: bool) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.doing = doing
        self.total = total
        self.counts = {"done": 0, "skipped": 0, "failed": 0}
        self.is_quiet = is_quiet
        self.console = console()
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        is_hidden = is_quiet or not self.console.is_terminal
        self.bar = Progress(*columns, console=self.console, disable=is_hidden)

    def __enter__(self) -> CaseProgress:
        self.bar.start()
        self.task = self.bar.add_task(self.doing, total=self.total)
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
        if not self.is_quiet:
            print_stderr(", ".join(f"{count} {status}" for status, count in self.counts.items()), above=self.console)

    def show(self, record: CaseRecord) -> None:
        """Count a case that ended, and print a line about it."""
        self.counts[record.status] += 1
        self.bar.advance(self.task)
        name = on_one_line(record.case)
        if record.error is not None:
            print_stderr(f"{name}: failed: {on_one_line(record.error)}", above=self.console)
        elif not self.is_quiet and not self.console.is_terminal:
            done = sum(self.counts.values())
            stages = ", ".join(f"{stage} {value:.1f} s" for stage, value in record.seconds.items() if value)
            line = f"[{done}/{self.total}] {name}: {record.status}" + (f" ({stages})" if stages else "")
            print_stderr(line, above=self.console)
