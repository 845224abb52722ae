"""What a predictor accepts and returns: one case as files or images in memory, and its mask."""

from __future__ import annotations

import difflib
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from segkit.errors import DataError
from segkit.inference.decode import Maps
from segkit.labels import LabelScheme
from segkit.preparing.preprocessing import LoadedCase, load_case, stack_modalities
from segkit.reading.case import SYNONYMS, Case, ImageFile, match_modalities, match_names, plain_name
from segkit.reading.files import write_labels
from segkit.reading.in_memory import ARRAY, PATH, kind_of, read_channels
from segkit.reading.itk import itk_image
from segkit.reading.layouts.table import find_cases
from segkit.reading.nifti import nifti_image
from segkit.reading.volume import Grid, Volume
from segkit.shapes import Affine, Image, LabelMap

if TYPE_CHECKING:
    import nibabel as nib

Scan: TypeAlias = Any
"""One case, see `read_scan`."""


@dataclass(frozen=True)
class Prediction:
    """A mask on the grid of the input: labels (*source) uint8 in the values of `label_scheme`."""

    labels: LabelMap = field(repr=False)
    grid: Grid
    label_scheme: LabelScheme
    probability_maps: Maps | None = field(default=None, repr=False)
    """One for each output of the card; None unless requested."""
    uncertainty_maps: Maps | None = field(default=None, repr=False)
    """Entropy and disagreement; None unless requested."""

    @property
    def affine(self) -> Affine:
        """Voxel indices of `labels` to millimetres in RAS+ world space, (4, 4)."""
        return self.grid.affine

    @functools.cached_property
    def probabilities(self) -> Image | None:
        """(K, *source) float32 in 0..1, one plane for each map."""
        return None if self.probability_maps is None else np.stack(list(self.probability_maps.arrays()))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the mask as uint8 with the affine, codes and units of the input, as `segkit infer` does.

        The suffix chooses the format (.nii.gz, .nii, .mgz, .nrrd, .mha; .png for pictures); without one it is .nii.gz,
        or .png. Missing folders are created; the file appears when it is complete. Returns the path of the file.

        Raises:
            DataError: the folder cannot be written to, the disk is full, or the suffix is none of these.
        """
        target = Path(path)
        if target.is_dir():
            raise DataError("is a folder", where=target, expected="the name of a file", remedy="Add a file name")
        if not target.suffix:
            target = target.with_name(target.name + (".nii.gz" if self.grid.dims == 3 else ".png"))
        write_labels(target, self.labels, self.grid)
        return target

    def to_nibabel(self) -> nib.Nifti1Image:
        """The mask as a NIfTI image, (D, H, W) uint8, with the header that `save` writes.

        Raises:
            DataError: it is the mask of a picture.
        """
        if self.grid.dims == 2:
            raise DataError("masks of pictures have no affine", expected="a volume", remedy="Use `labels` or `save`")
        return nifti_image(self.labels, self.grid)

    def to_sitk(self) -> Any:
        """The mask as a `SimpleITK.Image` of uint8, in ITK's LPS world; of a picture, with spacing 1 and origin 0.

        Raises:
            DataError: the axes of the input are not at right angles.
        """
        if self.grid.dims == 3:
            return itk_image(self.labels, self.grid, "the mask")
        import SimpleITK

        return SimpleITK.GetImageFromArray(self.labels)


def read_scan(
    scan: Scan,
    affine: ArrayLike | None,
    modalities: tuple[str, ...],
    dims: int,
    match: Callable[[Case], Case] | None = None,
) -> LoadedCase:
    """Load one case for a model of `modalities`, the channels of the result, and of `dims` (3 volumes, 2 pictures).

    `match` names the files of a path as `match_modalities` does, which is the default.

    Accepted are, alone or in a dict by modality name in any usual spelling (t1ce, T1Gd, flair ...), kinds mixed:

    - a path: an image file or DICOM folder; alone also a case folder;
    - a nibabel image: (D, H, W), channels last where there are several;
    - a `SimpleITK.Image`: its LPS world and (z, y, x) arrays are converted; components or time points are channels;
    - a MONAI `MetaTensor`: (D, H, W) or (C, D, H, W), with its affine in its own space (RAS, or LPS if it says so);
    - a segkit `Volume`: (D, H, W) or (H, W) with its grid;
    - a numpy array or torch tensor on any device: (D, H, W) or (C, D, H, W), as a pair (array, affine) or
      with `affine`: (4, 4), from voxel indices to millimetres in RAS+ world space, rounded to float32 as in NIfTI.

    Pictures are (H, W) or (C, H, W), rows and columns, and need no affine; of a MetaTensor too (MONAI reads them
    transposed unless `reverse_indexing=False`). An image with several channels gives the modalities in the order of
    `modalities`, except for BraTS modalities, which must be named. The grid and header of the result are those of the
    first modality.

    Raises:
        DataError: a type, shape or affine that cannot be used, a modality that is missing or given twice, grids that
            differ, NaN or infinite voxels, or a file that cannot be read.
    """
    by_name = isinstance(scan, Mapping)
    kinds = {kind_of(item) for item in (scan.values() if by_name else [scan])}
    if affine is not None and ARRAY not in kinds:
        remedy = "Omit it: files and images have their own"
        raise DataError("`affine` was passed without an array", expected="a numpy or torch array", remedy=remedy)
    names = _names_in(scan, modalities) if by_name else {}
    if kinds == {PATH}:
        if by_name:
            case = Case("case", "case", {wanted: ImageFile(Path(scan[name])) for wanted, name in names.items()})
        else:
            case = _only_case(Path(scan))
            case = match_modalities(case, modalities) if match is None else match(case)
        return load_case(case, modalities, None)
    if by_name:
        volumes = (_one_channel(scan[names[wanted]], affine, dims, names[wanted]) for wanted in modalities)
    else:
        planes, grid = read_channels(scan, affine, dims, "the scan")
        _refuse_other_channels(len(planes), modalities)
        volumes = (Volume(plane, grid) for plane in planes)
    named = ((channel, names.get(modalities[channel], "the scan"), volume) for channel, volume in enumerate(volumes))
    image, grid = stack_modalities(named, len(modalities))
    return LoadedCase("the scan", image, None, grid, (True,) * len(modalities))


def _only_case(path: Path) -> Case:
    cohort = find_cases(path)
    if cohort.is_numbered and len(cohort.cases) > 1:
        cohort = find_cases(path, layout="nnunet")
    if len(cohort.cases) != 1:
        found = f"holds {len(cohort.cases)} cases"
        raise DataError(found, where=path, expected="one", remedy="Use `segkit infer`")
    return cohort.cases[0]


def _names_in(scan: Mapping[Any, Any], modalities: Sequence[str]) -> dict[str, str]:
    """The key of each modality of the model."""
    wanted = ", ".join(modalities)
    first: dict[str, str] = {}
    for name in scan:
        if not isinstance(name, str):
            raise DataError(f"the key {name!r} is not the name of a modality", expected=f"{wanted} as keys")
        if (other := first.setdefault(plain_name(name), name)) != name:
            found = f"{other!r} and {name!r} name the same modality"
            raise DataError(found, expected="one image for each modality", remedy="Pass one of the two")
    names = match_names(list(scan), modalities)
    missing = [name for name in modalities if name not in names]
    if missing:
        spellings = {spelling: name for name in missing for spelling in (name, *SYNONYMS.get(name, ()))}
        unknown = {name: name.lower() for name in scan if name not in names.values()}
        nearest = {name: difflib.get_close_matches(lower, spellings, 1) for name, lower in unknown.items()}
        hints = [f"{near[0]!r} for {name!r}" for name, near in nearest.items() if near]
        several = len(missing) > 1
        raise DataError(
            f"modalit{'ies' if several else 'y'} {', '.join(missing)} {'are' if several else 'is'} missing"
            f" (found: {', '.join(scan) or 'no image'})",
            expected=f"{wanted}, as this model was trained on",
            remedy=f"Nearest names: {', '.join(hints)}" if hints else "Pass an image for each, by its name",
        )
    return names


def _refuse_other_channels(count: int, modalities: Sequence[str]) -> None:
    """Refuse an image without a modality name that is not all that the model needs."""
    numbers = [str(channel) for channel in range(count)]
    if count == len(modalities) == len(match_names(numbers, modalities)):
        return
    if len(modalities) == 1:
        remedy = "Pass one channel, such as scan[0]"
    else:
        source = "scan[{}]" if count == len(modalities) else "..."
        remedy = "Pass them by name: {" + ", ".join(
            f"{name!r}: {source.format(channel)}" for channel, name in enumerate(modalities)
        ) + "}"  # fmt: skip
    found = "one volume was given" if count == 1 else f"{count} channels without names were given"
    raise DataError(found, expected=", ".join(modalities), remedy=remedy)


def _one_channel(item: object, affine: ArrayLike | None, dims: int, name: str) -> Volume:
    planes, grid = read_channels(item, affine, dims, name)
    if len(planes) != 1:
        remedy = "Pass one channel for each modality name"
        raise DataError(f"holds {len(planes)} channels", where=name, expected="one", remedy=remedy)
    return Volume(planes[0], grid)
