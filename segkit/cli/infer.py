"""`segkit infer`: scans in, masks on their own grids out; and what it shares with `segkit inpaint`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any

import typer

from segkit.api import folder as api
from segkit.cli.options import (
    DryRunOption,
    JsonOption,
    console,
    print_json,
    print_left_out,
    print_stderr,
    print_table,
    verb,
)
from segkit.errors import on_one_line

if TYPE_CHECKING:
    from segkit.batch.manifest import CaseRecord

ENGINE = {
    "workers": Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Threads that read ahead; 0: no threads at all. Default: 1, 0 on one core. With ray: cases at a time, "
            "by default as many as the nodes have room for.",
        ),
    ],
    "threads": Annotated[
        int | None,
        typer.Option(min=1, help="CPU cores that compute a case, here or on a node. Default: all of this one."),
    ],
    "engine": Annotated[api.EngineName, typer.Option(help="This machine, or the nodes of a Ray cluster.")],
    "ray_address": Annotated[
        str | None,
        typer.Option(
            help="ray://HOST:10001, HOST:6379, auto or local. Default: RAY_ADDRESS, a cluster started here, else local",
            show_default=False,
        ),
    ],
    "results": Annotated[
        api.Results,
        typer.Option(
            help="With ray: nodes write to OUT (files), send results back (store), or each does what it can (auto)."
        ),
    ],
}
_SEGMENTATION = {
    "tta": Annotated[
        bool | None,
        typer.Option(
            "--tta/--no-tta",
            help="Average over mirrored inputs: better, up to 8 times slower. Default: only models of nnU-Net.",
        ),
    ],
    "allow_missing": Annotated[
        bool, typer.Option("--allow-missing", help="Continue without modalities that a case lacks; recorded.")
    ],
    "save_probabilities": Annotated[
        bool, typer.Option("--save-probabilities", help="Also write OUT/probabilities/<case>_<output>.")
    ],
    "uncertainty": Annotated[
        bool, typer.Option("--uncertainty", help="Also write OUT/uncertainty/<case>_entropy and <case>_disagreement.")
    ],
    "class_masks": Annotated[
        bool, typer.Option("--class-masks", help="Also write a mask of each class, OUT/classes/<case>_<class>.")
    ],
    "postprocessing": Annotated[
        bool,
        typer.Option(
            "--postprocessing/--no-postprocessing", help="Clean masks by the rules that training chose, if any."
        ),
    ],
    "keep_patient": Annotated[
        bool, typer.Option("--keep-patient", help="Copy the patient's name, numbers and dates into DICOM SEG files.")
    ],
    "num_parts": Annotated[int, typer.Option(min=1, help="Split the cases into N parts ...")],
    "part_id": Annotated[int, typer.Option(min=0, help="... and do the K-th of them, counted from 0.")],
}


@verb(api.infer, **ENGINE, **_SEGMENTATION)
def infer(dry_run: DryRunOption = False, json: JsonOption = False, quiet: bool = False, **options: Any) -> None:
    """Segment a volume, a case folder or a data folder; one mask a case and a manifest go to OUT.

    Cases that fail are named with the reason and do not stop the others; run the same command again to continue where
    it was interrupted.
    """

    def announce(task: Any) -> str:
        size = " x ".join(map(str, task.window))
        return f"{task.predictor.backend.name} computes windows of {size} voxels"

    screen = FolderScreen(
        doing="segmenting",
        announce=announce,
        describe=lambda plan: {
            "mask": str(*plan.paths("results")),
            "label_scheme": plan.label_scheme,
            "predicted": dict(plan.predicted),
        },
        files="mask",
        file_names=lambda plan: str(*plan.paths("results")),
    )
    with api.open_segmentation(taken_from(options), **options) as folder:
        screen.run(folder, dry_run=dry_run, as_json=json, quiet=quiet)


def taken_from(options: dict[str, Any]) -> api.FolderOptions:
    """The options that both commands have, which are removed from `options`."""
    return api.FolderOptions(**{one.name: options.pop(one.name) for one in fields(api.FolderOptions)})


@dataclass(frozen=True)
class FolderScreen:
    """How a command shows its work."""

    doing: str
    announce: Callable[[Any], str]
    """A line about the task before it starts."""
    describe: Callable[[Any], Mapping[str, object]]
    """A plan, for `--dry-run --json`."""
    files: str
    """Heading of the files in the table of `--dry-run`."""
    file_names: Callable[[Any], str]

    def run(self, folder: api.OpenFolder, *, dry_run: bool, as_json: bool, quiet: bool) -> None:
        """Do the cases of a folder and print the manifest, or print what would be done.

        Raises:
            RequestError: something asked for is not there or does not fit.
            typer.Exit: code 1 where a case failed, or an image belongs to no case.
        """
        left_out = folder.cohort.left_out
        print_left_out(left_out)
        if dry_run:
            self._print_plan(*folder.plan(), as_json=as_json)
            return
        if not quiet:
            print_stderr(self.announce(folder.task))
        with CaseProgress(self.doing, len(folder.cohort.cases), len(left_out), is_quiet=quiet) as progress:
            document = folder.run(progress.show)
        if as_json:
            print_json(document)
        if document["summary"]["failed"] or left_out:
            raise typer.Exit(1)

    def _print_plan(self, plans: Sequence[Any], decided: Sequence[CaseRecord], *, as_json: bool) -> None:
        if as_json:
            planned = [{"case": plan.case.id, "status": "planned", **self.describe(plan)} for plan in plans]
            others = [{"case": record.case, "status": record.status, "error": record.error} for record in decided]
            print_json({"cases": [*planned, *others]})
            return
        rows = [(plan.case.id, "planned", self.file_names(plan)) for plan in plans]
        rows += [(record.case, record.status, record.error or "done before") for record in decided]
        print_table("What would be done", ("case", "status", f"{self.files} or reason"), rows)


class CaseProgress:
    """How far a run over cases is: a bar on a terminal, one line a case elsewhere; failures are named in both."""

    def __init__(self, doing: str, total: int, left_out: int = 0, *, is_quiet: bool) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.doing = doing
        self.total = total
        self.left_out = left_out
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
            counts = self.counts | ({"left out": self.left_out} if self.left_out else {})
            print_stderr(", ".join(f"{count} {status}" for status, count in counts.items()), above=self.console)

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
