"""The fingerprint of a cohort: the numbers from which a training run is planned (nnU-Net's term)."""

from __future__ import annotations

import logging
import time
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from segkit.config import Config
from segkit.errors import DataError
from segkit.preparing.preprocessing import LoadedCase, crop_box, load_case
from segkit.reading.case import Cohort
from segkit.reading.geometry import reorientation_to, reoriented_grid

_log = logging.getLogger(__name__)

_SAMPLED_VOXELS = 10_000  # most foreground voxels of one case in the intensity statistics
_AIR_HU = -200.0  # air in CT is far below this; MRI and pictures almost never have such low values


class Foreground(Config):
    """Intensities of the labelled voxels of all modalities together."""

    low: float
    """0.5th percentile."""
    high: float
    """99.5th percentile."""
    mean: float
    std: float


class Fingerprint(Config):
    """Properties of a cohort for planning, from a sample of its cases; axes are those after orientation to RAS."""

    cases: int
    """Cases in the cohort."""
    dims: int
    modalities: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    """Voxels of each sampled case."""
    cropped_shapes: tuple[tuple[int, ...], ...]
    """Voxels of each sampled case after the crop to voxels that are not 0 in any modality."""
    spacings_mm: tuple[tuple[float, ...], ...]
    """Spacing of each sampled case."""
    zero_fraction: float
    """Median over cases of the share of voxels that are exactly 0 in all modalities."""
    is_ct: bool
    """Whether the intensities are Hounsfield units: the only modality is called CT, or has air in these units."""
    foreground: Foreground
    seconds_per_case: float
    """Time that reading one case took."""

    @property
    def median_spacing_mm(self) -> tuple[float, ...]:
        """Median over the sampled cases, per axis."""
        return tuple(float(value) for value in np.median(np.array(self.spacings_mm), axis=0))


def take_fingerprint(cohort: Cohort, *, max_cases: int = 24) -> Fingerprint:
    """The fingerprint of up to `max_cases` cases, spread evenly over the cohort; unreadable ones are left out.

    Raises:
        DataError: no case can be read.
    """
    cases = cohort.cases
    if len(cases) > max_cases:
        cases = tuple(cases[round(index * (len(cases) - 1) / (max_cases - 1))] for index in range(max_cases))
    began = time.perf_counter()
    samples: list[_Sample] = []
    errors: list[DataError] = []
    for case in cases:
        try:
            loaded = load_case(case, cohort.modalities, cohort.scheme, allow_missing=True)
            samples.append(_sample(loaded, None if cohort.scheme is None else cohort.scheme.ignore))
        except DataError as error:
            _log.warning("left out of planning: %s", error)
            errors.append(error)
    if not samples:
        found = f"none of the {len(cases)} cases looked at can be read"
        remedy = f"The first error: {errors[0]}" if errors else "Check the folder"
        raise DataError(found, where=cohort.root, expected="at least one usable case", remedy=remedy)
    shapes, cropped_shapes, spacings_mm, zero_fractions, lowest, intensities = zip(*samples, strict=True)
    names = cohort.modalities
    return Fingerprint(
        cases=len(cohort.cases),
        dims=cohort.dims,
        modalities=names,
        shapes=shapes,
        cropped_shapes=cropped_shapes,
        spacings_mm=spacings_mm,
        zero_fraction=float(np.median(zero_fractions)),
        is_ct=len(names) == 1 and (names[0].lower() == "ct" or bool(np.median(lowest) < _AIR_HU)),
        foreground=_foreground(np.concatenate(intensities)),
        seconds_per_case=(time.perf_counter() - began) / len(samples),
    )


class _Sample(NamedTuple):
    shape: tuple[int, ...]
    cropped_shape: tuple[int, ...]
    spacing_mm: tuple[float, ...]
    zero_fraction: float
    lowest: float
    intensities: NDArray[np.float32]
    """Of a sample of the labelled voxels, in all modalities; without a reference, of the voxels above air."""


def _sample(loaded: LoadedCase, ignore: int | None) -> _Sample:
    image, turn = loaded.image, reorientation_to(loaded.grid)
    start, stop = crop_box(image, "nonzero")
    is_inside = image.max(axis=0) > _AIR_HU if loaded.labels is None else ~np.isin(loaded.labels, (0, ignore or 0))
    places = np.flatnonzero(is_inside)
    if len(places) > _SAMPLED_VOXELS:
        places = np.random.default_rng(0).choice(places, _SAMPLED_VOXELS, replace=False)
    return _Sample(
        shape=turn.target_shape,
        cropped_shape=tuple(stop[axis] - start[axis] for axis in turn.axes),
        spacing_mm=reoriented_grid(loaded.grid, turn).spacing_mm,
        zero_fraction=float((~image.any(axis=0)).mean()),
        lowest=float(image.min()),
        intensities=image.reshape(len(image), -1)[:, places].ravel(),
    )


def _foreground(intensities: NDArray[np.float32]) -> Foreground:
    if not intensities.size:
        return Foreground(low=0.0, high=0.0, mean=0.0, std=0.0)
    low, high = np.percentile(intensities, (0.5, 99.5))
    return Foreground(low=float(low), high=float(high), mean=float(intensities.mean()), std=float(intensities.std()))
