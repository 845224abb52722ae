"""`segkit convert labels` and `segkit convert headers`: copies in another label scheme, or with repaired headers."""

from __future__ import annotations

import re
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from segkit.cli.options import JsonOption, OutputOption, OverwriteOption, print_json, print_stderr, print_table, verb

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from segkit.reading.case import Case, Cohort
    from segkit.reading.conversion import ValueRange

app = typer.Typer(help="Copies with another label scheme, or with repaired headers.", no_args_is_help=True)

TargetOption = Annotated[str | None, typer.Option("--to", help="Label scheme of the copies, such as brats2023.")]
ValuesOption = Annotated[
    list[str] | None,
    typer.Option("--values", help="Instead of --to: VALUE=LABEL or LOWEST-HIGHEST=LABEL, several times."),
]
_VALUES = re.compile(r"(-?[\d.]+)(?:-(-?[\d.]+))?=(\d+)")


def _find(
    data: Path,
    *,
    layout: str | None = None,
    label_scheme: str | None = None,
    modalities: Mapping[str, str] | None = None,
    require_labels: bool = False,
) -> Cohort:
    from segkit.reading.layouts.table import find_cases

    return find_cases(
        data, layout=layout, modalities=modalities, label_scheme=label_scheme, require_labels=require_labels
    )


@app.command()
@verb(_find)
def labels(
    data: Path,
    output: OutputOption,
    to: TargetOption = None,
    values: ValuesOption = None,
    overwrite: OverwriteOption = False,
    json: JsonOption = False,
    quiet: bool = False,
    **reading: Any,
) -> None:
    """Copy the reference masks of DATA into another label scheme, tissue by tissue.

    Writes OUT/<case> and OUT/label_scheme.json; a tissue that the new scheme lacks becomes background and is reported.
    With --values masks of any values are mapped to labels, such as 205=1 or 128-255=1, and channels of 0 and 1 (one
    mask per class) by their number, from 1; 0 stays 0, and other values are an error.
    """
    from segkit.errors import DataError, RequestError
    from segkit.labels import SCHEMES
    from segkit.reading.conversion import map_values, translate_reference
    from segkit.reading.layouts.table import scheme_named

    ranges = [_read_range(text) for text in values or ()]
    if ranges and to is None:
        cohort = _find(data, require_labels=True, **{**reading, "label_scheme": None})
        _require_other_folder(data, output)

        def map_case(case: Case) -> str:
            return map_values(case, ranges, output, dims=cohort.dims, overwrite=overwrite)

        if _run(cohort.cases, map_case, title="Mapped labels", as_json=json, is_quiet=quiet):
            raise typer.Exit(1)
        return
    if ranges or to is None:
        raise RequestError("the new labels are not clear", expected="either --to SCHEME or --values VALUE=LABEL")
    target = scheme_named(to)
    if target.name not in SCHEMES:
        raise RequestError(f"there is no label scheme {to!r}", expected="one of " + ", ".join(SCHEMES))
    cohort = _find(data, require_labels=True, **reading)
    if cohort.scheme is None:
        remedy = "; ".join(problem.remedy for problem in cohort.problems if problem.is_fatal)
        raise RequestError("the label scheme of the references is unknown", where=data, remedy=remedy)
    if cohort.scheme.ignore is not None and target.ignore is None:
        target = scheme_named(f"{to},ignore={cohort.scheme.ignore}")

    def convert(case: Case) -> str:
        return translate_reference(case, target, output, dims=cohort.dims, overwrite=overwrite)

    _require_other_folder(data, output)
    failed = _run(cohort.cases, convert, title=f"Labels in {to}", as_json=json, is_quiet=quiet)
    try:
        text = dumps(target.to_json(), indent=2)
        (output / "label_scheme.json").write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise DataError(f"label_scheme.json cannot be written ({error.strerror})", where=output) from error
    if failed:
        raise typer.Exit(1)


@app.command()
@verb(_find)
def headers(
    data: Path,
    output: OutputOption,
    overwrite: OverwriteOption = False,
    json: JsonOption = False,
    quiet: bool = False,
    **reading: Any,
) -> None:
    """Copy DATA and correct files whose header differs from their case in its affine alone.

    The geometry of a case is that of the first modality that most of its modalities agree with. Files with another
    size or voxel size are refused, unless their affine is the default one that programs write without a header.
    """
    from segkit.reading.conversion import copy_path, files_of, repair_headers

    cohort = _find(data, **reading)
    _require_other_folder(data, output)
    root = cohort.root if cohort.root.is_dir() else cohort.root.parent
    for document in ("dataset.json", "dataset_description.json"):
        if (root / document).is_file():
            copy_path(root / document, output / document, overwrite=overwrite)
    owned = {path for case in cohort.cases for path in files_of(case)}

    def convert(case: Case) -> str:
        repaired = repair_headers(case, root, output, owned, overwrite=overwrite)
        return f"repaired {', '.join(repaired)}" if repaired else ""

    if _run(cohort.cases, convert, title="Headers", as_json=json, is_quiet=quiet):
        raise typer.Exit(1)


def _read_range(text: str) -> ValueRange:
    """`205=1` to (205, 205, 1), and `128-255=1` to (128, 255, 1)."""
    from segkit.errors import RequestError

    match = _VALUES.fullmatch(text)
    if match is None or int(match[3]) > 255:
        raise RequestError(f"--values {text!r} cannot be read", expected="VALUE=LABEL, such as 205=1 or 128-255=1")
    return float(match[1]), float(match[2] or match[1]), int(match[3])


def _run(cases: Sequence[Case], convert: Callable[[Case], str], *, title: str, as_json: bool, is_quiet: bool) -> int:
    """Convert case by case, report, and return the number of failures; a failure does not stop the other cases."""
    from segkit.errors import DataError

    rows = []
    for case in cases:
        try:
            rows.append({"case": case.id, "status": "done", "detail": convert(case)})
        except DataError as error:
            rows.append({"case": case.id, "status": "failed", "detail": str(error)})
    failed = [row for row in rows if row["status"] == "failed"]
    shown = failed if is_quiet else rows
    if as_json:
        print_json({"cases": rows})
    elif shown:
        print_table(title, ("case", "status", "detail"), [tuple(row.values()) for row in shown])
    if failed:
        print_stderr(f"{len(failed)} of {len(rows)} cases failed", style="red")
    return len(failed)


def _require_other_folder(data: Path, output: Path) -> None:
    """Refuse to write copies into the data folder, and create the output folder."""
    from segkit.errors import RequestError

    if output.resolve() == data.resolve() or data.resolve() in output.resolve().parents:
        found, remedy = "the copies would lie inside the data folder", "Choose a folder outside it"
        raise RequestError(found, where=output, remedy=remedy)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"the output folder cannot be created ({error.strerror})", where=output) from error
