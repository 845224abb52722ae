"""Copies of cases with repaired headers, or with reference masks in another label scheme (`segkit convert`)."""

import shutil
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import numpy as np

from segkit.errors import DataError, some
from segkit.labels import LabelScheme, translate, translation
from segkit.reading.case import Case, ImageFile
from segkit.reading.files import (
    VOLUME_SUFFIXES,
    count_channels,
    read_grid,
    read_label_values,
    read_reference,
    read_volume,
    suffix_of,
    write_image,
    write_labels,
)
from segkit.reading.geometry import format_size, has_default_affine, same_grid
from segkit.reading.layouts.schemes import present_values
from segkit.reading.pictures import PICTURE_SUFFIXES
from segkit.reading.volume import Grid, list_folder
from segkit.shapes import AnyArray

ValueRange = tuple[float, float, int]
"""Lowest and highest value, and the label that voxels from one to the other get."""

_DRIFT = 1e-3
"""Whole numbers stored with a scale factor are read as 204.99998."""
_KEPT = "kept, it exists already (--overwrite does it again)"
_WRITTEN_AS = {".nii": ".nii", ".nrrd": ".nrrd", ".mha": ".mha", ".mgz": ".mgz", ".mhd": ".mha"}
"""Formats that are kept; all others are written as .nii.gz, pictures as .png."""


def translate_reference(case: Case, target: LabelScheme, output: Path, *, dims: int, overwrite: bool) -> str:
    """Write the reference of a case to `output` as `<case>` in the values of `target`, tissue by tissue.

    Returns a note for the user: that the file exists already, which tissues became background, or "". Raises DataError
    where there is no reference in a known scheme, it holds other values, or a file cannot be read or written.
    """
    if case.label is None or case.scheme is None:
        raise DataError(f"case {case.id} has no reference in a known label scheme")
    path = _target_of(case, output, dims)
    if path.exists() and not overwrite:
        return _KEPT
    values, grid = read_reference(case.label)
    table, present = translation(case.scheme, target), present_values(values)
    if stray := sorted(present - set(table)):
        found = f"holds label values {', '.join(map(str, stray))} that scheme {case.scheme.name} does not know"
        raise DataError(found, where=case.label.path, remedy="Pass the scheme it was drawn in with --label-scheme")
    write_labels(path, translate(values, case.scheme, target), grid)
    lost = [tissue for tissue, value in case.scheme.values.items() if value in present and table[value] == 0]
    return f"{target.name} has no {', '.join(lost)}: now background" if lost else ""


def map_values(case: Case, ranges: Sequence[ValueRange], output: Path, *, dims: int, overwrite: bool) -> str:
    """Write the reference of a case to `output` as `<case>` with other values; 0 stays 0 unless a range holds it.

    Any values of voxels are accepted, below 0 and above 255 too. Of several channels of 0 and 1 (one-hot), the value of
    a voxel is the number of its channel, from 1, or from 0 where every voxel is in one of them, so that the first is
    the background. Returns a note for the user, as `translate_reference` does. Raises DataError where there is no
    reference, a value is in no range, or a file cannot be read or written.
    """
    path, label = _target_of(case, output, dims), case.label
    if label is None:
        raise DataError(f"case {case.id} has no reference")
    if path.exists() and not overwrite:
        return _KEPT
    values, grid = _values_of(label)
    values = np.where(np.abs(values - np.rint(values)) < _DRIFT, np.rint(values), values)
    mapped, is_known = np.zeros(values.shape, np.uint8), values == 0
    for low, high, new in ranges:
        inside = (values >= low) & (values <= high)
        mapped[inside], is_known[inside] = new, True
    if not is_known.all():
        others = some((f"{value:g}" for value in np.unique(values[~is_known])), 20)
        found = f"holds values that no --values maps: {others}"
        raise DataError(found, where=label.path, remedy="Add them, such as --values 205=1")
    write_labels(path, mapped, grid)
    return ""


def _values_of(label: ImageFile) -> tuple[AnyArray, Grid]:
    """The values of a reference as stored, (*spatial), or the numbers of its channels."""
    if label.parts:
        return read_reference(label)
    channels = 1 if suffix_of(label.path) in PICTURE_SUFFIXES else count_channels(label.path)
    if channels == 1 or label.channel is not None:
        volume = read_label_values(label.path, label.channel)
        return volume.array, volume.grid
    planes = [read_volume(label.path, channel) for channel in range(channels)]
    present = np.stack([plane.array == 1 for plane in planes])
    if not all(np.isin(plane.array, (0, 1)).all() for plane in planes) or present.sum(axis=0).max() > 1:
        found = f"the {channels} channels are not one mask per class: they overlap, or hold other values than 0 and 1"
        raise DataError(found, where=label.path, expected="one label per voxel")
    numbers = np.where(present.any(axis=0), present.argmax(axis=0) + 1, 0)
    return (numbers - 1 if numbers.all() else numbers), planes[0].grid


def _target_of(case: Case, output: Path, dims: int) -> Path:
    suffix = _WRITTEN_AS.get(suffix_of(case.label.path), ".nii.gz") if dims == 3 and case.label else ".png"
    return output / f"{case.id}{suffix}"


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
