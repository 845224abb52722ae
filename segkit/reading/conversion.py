"""Copies of cases with repaired headers, or with reference masks in another label scheme (`segkit convert`)."""

import shutil
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import numpy as np

from segkit.errors import DataError
from segkit.labels import LabelScheme, translate, translation
from segkit.reading.case import Case
from segkit.reading.files import (
    VOLUME_SUFFIXES,
    count_channels,
    read_grid,
    read_labels,
    read_volume,
    suffix_of,
    write_image,
    write_labels,
)
from segkit.reading.geometry import format_size, has_default_affine, same_grid
from segkit.reading.layouts.schemes import present_values
from segkit.reading.volume import Grid, list_folder

_WRITTEN_AS = {".nii": ".nii", ".nrrd": ".nrrd", ".mha": ".mha", ".mgz": ".mgz", ".mhd": ".mha"}
"""Formats that are kept; all others are written as .nii.gz, pictures as .png."""


def translate_reference(case: Case, target: LabelScheme, output: Path, *, dims: int, overwrite: bool) -> str:
    """Write the reference of a case to `output` as `<case>` in the values of `target`, tissue by tissue.

    Returns a note for the user: that the file exists already, which tissues became background, or "". Raises DataError
    where there is no reference in a known scheme, it holds other values, or a file cannot be read or written.
    """
    if case.label is None or case.scheme is None:
        raise DataError(f"case {case.id} has no reference in a known label scheme")
    suffix = _WRITTEN_AS.get(suffix_of(case.label.path), ".nii.gz") if dims == 3 else ".png"
    path = output / f"{case.id}{suffix}"
    if path.exists() and not overwrite:
        return "kept, it exists already (--overwrite does it again)"
    values, grid = read_labels(case.label.path, case.label.channel)
    table, present = translation(case.scheme, target), present_values(values)
    if stray := sorted(present - set(table)):
        found = f"holds label values {', '.join(map(str, stray))} that scheme {case.scheme.name} does not know"
        raise DataError(found, where=case.label.path, remedy="Pass the scheme it was drawn in with --label-scheme")
    write_labels(path, translate(values, case.scheme, target), grid)
    lost = [tissue for tissue, value in case.scheme.values.items() if value in present and table[value] == 0]
    return f"{target.name} has no {', '.join(lost)}: now background" if lost else ""


def files_of(case: Case) -> list[Path]:
    """The files of a case, each once."""
    images = [*case.images.values(), *([case.label] if case.label is not None else [])]
    return list(dict.fromkeys(image.path for image in images))


def repair_headers(case: Case, root: Path, output: Path, owned: Collection[Path], *, overwrite: bool) -> list[str]:
    """Copy the files of a case from `root` to `output` and return the names of those whose affine was repaired.

    The affine of a case is that of the first modality that most of its modalities agree with. Other volumes in a folder
    that belongs to this case alone are included. `owned` are the files of all cases. Raises DataError where a file
    differs in more than its header, or cannot be read or written.
    """
    files = files_of(case)
    if not case.images:
        raise DataError(f"case {case.id} has no image to take the geometry from")
    grids = [read_grid(path) for path in dict.fromkeys(image.path for image in case.images.values())]
    votes = [sum(same_grid(grid, other) is None for other in grids) for grid in grids]
    reference = grids[votes.index(max(votes))]
    repaired = []
    for path in (*files, *_companions(files, root, owned)):
        # References may be in a folder beside the data folder (labelsTr beside imagesTr).
        target = output / path.relative_to(root if path.is_relative_to(root) else path.parent.parent)
        if path.is_dir() or same_grid(read_grid(path), reference) is None:
            copy_path(path, target, overwrite=overwrite)
            continue
        _require_lost_header(path, read_grid(path), reference)
        if not target.exists() or overwrite:
            channels = count_channels(path)
            planes = [read_volume(path, channel).array for channel in range(channels)]
            write_image(target, np.stack(planes, axis=-1) if channels > 1 else planes[0], reference)
        repaired.append(path.name)
    return repaired


def copy_path(path: Path, target: Path, *, overwrite: bool) -> None:
    """Copy a file or a folder; an existing target is kept unless `overwrite`. Raises DataError."""
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


def _companions(files: Sequence[Path], root: Path, owned: Collection[Path]) -> Iterable[Path]:
    """Other volumes in the case's own folder: one that holds files of this case alone and is not the data folder."""
    folder = files[0].parent
    is_shared = any(path.parent == folder and path not in files for path in owned)
    if is_shared or (folder == root and len(owned) > len(files)):
        return []
    return [path for path in list_folder(folder)[1] if suffix_of(path) in VOLUME_SUFFIXES and path not in files]


def _require_lost_header(path: Path, grid: Grid, reference: Grid) -> None:
    """Refuse a file that is another scan rather than the same one with another header."""
    is_same_size = bool(np.allclose(grid.spacing_mm, reference.spacing_mm, rtol=1e-3))
    if grid.shape == reference.shape and (has_default_affine(grid) or is_same_size):
        return
    own, other = (
        f"{format_size(each.shape)} voxels of {format_size(each.spacing_mm)} mm" for each in (grid, reference)
    )
    found = f"has {own}, and its case {other}, so that more than its header differs"
    raise DataError(found, where=path, remedy="Resample it to the grid of its case with the tool that made it")
