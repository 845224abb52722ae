"""`segkit convert labels` and `segkit convert headers`: copies in another label scheme, or with repaired headers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from segkit.cli.options import (
    DataArgument,
    JsonOption,
    LayoutOption,
    ModalitiesOption,
    OutputOption,
    OverwriteOption,
    QuietOption,
    SchemeOption,
    VerboseOption,
    print_json,
    print_table,
    read_modalities,
    set_verbosity,
    tell_aside,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from segkit.labels import LabelScheme
    from segkit.reading.case import Case
    from segkit.reading.volume import Grid

app = typer.Typer(help="Copies with another label scheme, or with repaired headers.", no_args_is_help=True)

_WRITTEN_AS = {".nii": ".nii", ".nrrd": ".nrrd", ".mha": ".mha", ".mgz": ".mgz", ".mhd": ".mha"}
"""Formats that are kept; all others are written as .nii.gz, pictures as .png."""

TargetOption = Annotated[str, typer.Option("--to", help="Label scheme of the copies, such as brats2023.")]


@app.command()
def labels(
    data: DataArgument,
    output: OutputOption,
    to: TargetOption,
    layout: LayoutOption = None,
    label_scheme: SchemeOption = None,
    modality: ModalitiesOption = None,
    overwrite: OverwriteOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Copy the reference masks of DATA into another label scheme, tissue by tissue.

    Writes OUT/<case> and OUT/label_scheme.json; a tissue that the new scheme lacks becomes background and is reported.
    """
    import json as json_module

    from segkit.errors import DataError, RequestError
    from segkit.labels import SCHEMES
    from segkit.reading.files import suffix_of
    from segkit.reading.layouts.table import find_cases

    set_verbosity(is_quiet=quiet, is_verbose=verbose)
    if to not in SCHEMES:
        raise RequestError(f"there is no label scheme {to!r}", expected="one of " + ", ".join(SCHEMES))
    target = SCHEMES[to]
    cohort = find_cases(
        data,
        layout=layout,
        modalities=read_modalities(modality),
        label_scheme=label_scheme,
        require_labels=True,
    )
    if cohort.scheme is None:
        raise RequestError(
            "the label scheme of the references cannot be told",
            where=data,
            remedy="; ".join(problem.remedy for problem in cohort.problems if problem.is_fatal),
        )

    def convert(case: Case) -> str:
        if case.label is None or case.scheme is None:
            raise DataError(f"case {case.id} has no reference in a known label scheme", where=cohort.root)
        suffix = _WRITTEN_AS.get(suffix_of(case.label.path), ".nii.gz") if cohort.dims == 3 else ".png"
        return _translate(case, case.scheme, target, output / f"{case.id}{suffix}", overwrite)

    _require_other_folder(data, output)
    failed = _run(cohort.cases, convert, title=f"Labels in {to}", as_json=json, is_quiet=quiet)
    try:
        text = json_module.dumps(target.to_json(), indent=2)
        (output / "label_scheme.json").write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise DataError(f"label_scheme.json cannot be written ({error.strerror})", where=output) from error
    if failed:
        raise typer.Exit(1)


@app.command()
def headers(
    data: DataArgument,
    output: OutputOption,
    layout: LayoutOption = None,
    label_scheme: SchemeOption = None,
    modality: ModalitiesOption = None,
    overwrite: OverwriteOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Copy DATA, giving files whose header disagrees in nothing but its affine the geometry of their case.

    The geometry of a case is that of its reference modality: the first one that most of its modalities agree with.
    Files of another size or voxel size show another scan and are refused, unless their header is plainly a lost one.
    """
    from segkit.reading.layouts.table import find_cases

    set_verbosity(is_quiet=quiet, is_verbose=verbose)
    cohort = find_cases(data, layout=layout, modalities=read_modalities(modality), label_scheme=label_scheme)
    _require_other_folder(data, output)
    root = cohort.root if cohort.root.is_dir() else cohort.root.parent
    for document in ("dataset.json", "dataset_description.json"):
        if (root / document).is_file():
            _copy(root / document, output / document, overwrite)
    owned = {path for case in cohort.cases for path in _files_of(case)}

    def convert(case: Case) -> str:
        return _repair(case, root, output, overwrite, owned)

    if _run(cohort.cases, convert, title="Headers", as_json=json, is_quiet=quiet):
        raise typer.Exit(1)


def _run(cases: Sequence[Case], convert: Callable[[Case], str], *, title: str, as_json: bool, is_quiet: bool) -> int:
    """Convert case by case, report, and return how many failed; one bad case does not stop the others."""
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
        tell_aside(f"{len(failed)} of {len(rows)} cases failed", style="red")
    return len(failed)


def _translate(case: Case, source: LabelScheme, target: LabelScheme, path: Path, overwrite: bool) -> str:
    import numpy as np

    from segkit.errors import DataError
    from segkit.labels import translate, translation
    from segkit.reading.files import read_labels, write_labels

    if path.exists() and not overwrite:
        return "kept, it exists already (--overwrite does it again)"
    if case.label is None:
        raise DataError(f"case {case.id} has no reference", where=path)
    values, grid = read_labels(case.label.path, case.label.channel)
    table = translation(source, target)
    present = {int(value) for value in np.unique(values)}
    if stray := sorted(present - set(table)):
        raise DataError(
            f"holds label values {', '.join(map(str, stray))} that scheme {source.name} does not know",
            where=case.label.path,
            remedy="Pass the scheme it was drawn in with --label-scheme",
        )
    write_labels(path, translate(values, source, target), grid)
    lost = [tissue for tissue, value in source.values.items() if value in present and table[value] == 0]
    return f"{target.name} has no {', '.join(lost)}: now background" if lost else ""


def _files_of(case: Case) -> list[Path]:
    """The files of a case, each once."""
    images = [*case.images.values(), *([case.label] if case.label is not None else [])]
    return list(dict.fromkeys(image.path for image in images))


def _repair(case: Case, root: Path, output: Path, overwrite: bool, owned: set[Path]) -> str:
    """Copy the files of a case, and what else lies in its own folder; those with a wrong header get the right one."""
    from segkit.reading.files import read_grid
    from segkit.reading.geometry import same_grid

    files = _files_of(case)
    reference = _geometry_of(case)
    repaired = []
    for path in (*files, *_companions(files, root, owned)):
        target = output / _place_below(root, path)
        if path.is_dir() or same_grid(read_grid(path), reference) is None:
            _copy(path, target, overwrite)
            continue
        _require_lost_header(path, read_grid(path), reference)
        if not target.exists() or overwrite:
            _rewrite(path, target, reference)
        repaired.append(path.name)
    return f"repaired {', '.join(repaired)}" if repaired else ""


def _place_below(root: Path, path: Path) -> Path:
    """The path relative to the data folder; references may lie in a folder beside it (labelsTr beside imagesTr)."""
    return path.relative_to(root if path.is_relative_to(root) else path.parent.parent)


def _geometry_of(case: Case) -> Grid:
    """The grid of the first modality that most of the case's modalities agree with."""
    from segkit.errors import DataError
    from segkit.reading.files import read_grid
    from segkit.reading.geometry import same_grid

    if not case.images:
        raise DataError(f"case {case.id} has no image to take the geometry from")
    grids = [read_grid(path) for path in dict.fromkeys(image.path for image in case.images.values())]
    votes = [sum(same_grid(grid, other) is None for other in grids) for grid in grids]
    return grids[votes.index(max(votes))]


def _companions(files: Sequence[Path], root: Path, owned: set[Path]) -> Iterable[Path]:
    """Other volumes in the case's own folder: one that holds files of this case alone and is not the data folder."""
    from segkit.reading.files import VOLUME_SUFFIXES, suffix_of

    folder = files[0].parent
    is_shared = any(path.parent == folder and path not in files for path in owned)
    if is_shared or (folder == root and len(owned) > len(files)):
        return []
    return [
        path
        for path in sorted(folder.iterdir())
        if suffix_of(path) in VOLUME_SUFFIXES and path not in files and not path.name.startswith(".")
    ]


def _require_lost_header(path: Path, grid: Grid, reference: Grid) -> None:
    """Refuse a file that is another scan rather than the same one with another header."""
    import numpy as np

    from segkit.errors import DataError

    is_default = bool(np.allclose(np.abs(grid.affine), np.eye(4), atol=1e-6))
    is_same_size = bool(np.allclose(grid.spacing_mm, reference.spacing_mm, rtol=1e-3))
    if grid.shape == reference.shape and (is_default or is_same_size):
        return
    raise DataError(
        f"has {_times(grid.shape)} voxels of {_times(grid.spacing_mm)} mm, and its case {_times(reference.shape)} of "
        f"{_times(reference.spacing_mm)} mm, so that more than its header differs",
        where=path,
        remedy="Resample it to the grid of its case with the tool that made it",
    )


def _rewrite(path: Path, target: Path, reference: Grid) -> None:
    """Write the voxels of `path` on the reference grid, every channel, integers in their own type."""
    import numpy as np

    from segkit.reading.files import count_channels, read_volume, write_image

    channels = count_channels(path)
    if channels == 1:
        write_image(target, read_volume(path).array, reference)
    else:
        planes = [read_volume(path, channel).array for channel in range(channels)]
        write_image(target, np.stack(planes, axis=-1), reference)


def _copy(path: Path, target: Path, overwrite: bool) -> None:
    import shutil

    from segkit.errors import DataError

    if target.exists() and not overwrite:
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            shutil.copytree(path, target, dirs_exist_ok=True, copy_function=shutil.copyfile)
        else:
            shutil.copyfile(path, target)
    except OSError as error:
        raise DataError(f"cannot be copied ({error.strerror})", where=path, remedy=f"Look at {target}") from error


def _require_other_folder(data: Path, output: Path) -> None:
    """Refuse to write copies into the data folder and make the output folder."""
    from segkit.errors import RequestError

    if output.resolve() == data.resolve() or data.resolve() in output.resolve().parents:
        raise RequestError(
            "the copies would lie inside the data folder", where=output, remedy="Choose a folder outside it"
        )
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"the output folder cannot be made ({error.strerror})", where=output) from error


def _times(numbers: Sequence[float]) -> str:
    return " x ".join(f"{number:.4g}" for number in numbers)
