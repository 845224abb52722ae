"""What `segkit infer` and `segkit inpaint` share: their options, progress, and output."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from segkit.api.folder import EngineName, OpenFolder, Results
from segkit.api.folder import FolderOptions as ApiOptions
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
    read_modalities,
    set_verbosity,
)
from segkit.errors import on_one_line

if TYPE_CHECKING:
    from segkit.batch.manifest import CaseRecord

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
EngineOption = Annotated[EngineName, typer.Option("--engine", help="This machine, or the nodes of a Ray cluster.")]
AddressOption = Annotated[
    str | None,
    typer.Option(
        "--ray-address",
        help="ray://HOST:10001, HOST:6379, auto or local. Default: RAY_ADDRESS, a cluster started here, else local.",
        show_default=False,
    ),
]
ResultsOption = Annotated[
    Results,
    typer.Option(
        "--results",
        help="With ray: nodes write to OUT (files), send results back (store), or each does what it can (auto).",
    ),
]


@dataclass(frozen=True)
class FolderOptions:
    """The options of every verb that does the cases of a folder."""

    scans: InputOption
    out: OutputOption
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

    def for_api(self) -> ApiOptions:
        """The options as the functions of `segkit.api` take them."""
        shared = {one.name: getattr(self, one.name) for one in fields(ApiOptions) if one.name != "modalities"}
        return ApiOptions(**shared, modalities=read_modalities(self.modality))


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
                default=inspect.Parameter.empty if one.name in ("scans", "out") else one.default,
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


@dataclass(frozen=True)
class FolderVerb:
    """How a verb shows its work."""

    doing: str
    announce: Callable[[Any], str]
    """A line about the task before it starts."""
    describe: Callable[[Any], Mapping[str, object]]
    """A plan, for `--dry-run --json`."""
    files: str
    """Heading of the files in the table of `--dry-run`."""
    file_names: Callable[[Any], str]


def run_verb(options: FolderOptions, folder: OpenFolder, verb: FolderVerb) -> None:
    """Do the cases of a folder and print the manifest, or print what would be done.

    Raises:
        RequestError: something asked for is not there or does not fit.
        typer.Exit: code 1 where a case failed.
    """
    if options.dry_run:
        _print_plan(*folder.plan(), verb, as_json=options.json)
        return
    if not options.quiet:
        print_stderr(verb.announce(folder.task))
    with CaseProgress(verb.doing, len(folder.cohort.cases), is_quiet=options.quiet) as progress:
        document = folder.run(progress.show)
    if options.json:
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
