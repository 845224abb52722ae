"""The rules of planning: each function returns a choice, most with a sentence that explains it.

Unless stated otherwise they follow nnU-Net (Isensee et al., Nature Methods 2021, "Automated method configuration").
"""

import re
from collections.abc import Iterator, Sequence

import numpy as np

from segkit.labels import LabelScheme
from segkit.preparing.fingerprint import Fingerprint
from segkit.preparing.preprocessing import Normalisation
from segkit.reading.case import BRATS_MODALITIES

Shape = tuple[int, ...]
Spacing = tuple[float, ...]

_SAME_SPACING = 0.01
_ANISOTROPIC = 3.0  # coarsest over finest spacing from which the coarse axis is treated on its own
_COARSE_PERCENTILE = 10
_BACKGROUND_SHARE = 0.25
_SMALLEST_FEATURE_MAP = 4
_STRIDE_RATIO = 2.0
_PICTURE_FACTOR = 2
"""Patches of pictures may be this many times longer than those of volumes, and batches this many times larger, as they
have one axis less. Longer patches instead of larger batches learn more slowly (`docs/benchmarks.md`)."""
_MODALITY_DROPOUT = 0.2  # share of the patches that lack a modality; most scans have all of them
_SIDES = {"left", "right", "l", "r", "lh", "rh"}


def target_spacing(spacings_mm: Sequence[Spacing]) -> tuple[Spacing, str]:
    """The median spacing; on an axis more than 3 times coarser than the finest, the 10th percentile of that axis.

    Without the exception, cases with thin slices would lose most of them. Pictures have no spacing.
    """
    spacings = np.array(spacings_mm)
    median = np.median(spacings, axis=0)
    if len(median) == 2:
        return tuple(median.tolist()), "pictures have no spacing, and are not resampled"
    target = median.copy()
    coarse = int(median.argmax())
    if median[coarse] / median.min() > _ANISOTROPIC:
        target[coarse] = max(np.percentile(spacings[:, coarse], _COARSE_PERCENTILE), median.min())
    chosen = tuple(round(float(value), 5) for value in target)
    shown = " x ".join(f"{value:g}" for value in chosen)
    if (np.abs(spacings - target) <= _SAME_SPACING * target).all():
        return chosen, f"all cases looked at have {shown} mm, so nothing is resampled"
    low, high = (" x ".join(f"{value:.3g}" for value in edge) for edge in (spacings.min(axis=0), spacings.max(axis=0)))
    which = "the median" if np.array_equal(target, median) else "the median, with the thin slices of the coarse axis"
    return chosen, f"{which} of spacings from {low} to {high} mm"


def choose_normalisation(fingerprint: Fingerprint) -> tuple[Normalisation, str]:
    """ct-window for Hounsfield units, zscore-nonzero where more than a quarter of a volume is exactly 0, else zscore.

    In pictures 0 is a colour: the blue channel of a retina is 0 over large areas.
    """
    share = f"{fingerprint.zero_fraction:.0%} of the voxels are exactly 0"
    if fingerprint.is_ct:
        low, high = fingerprint.foreground.low, fingerprint.foreground.high
        return "ct-window", f"CT: clipped to the labelled tissue's range, {low:.0f} to {high:.0f} HU"
    if fingerprint.dims == 2:
        return "zscore", "in pictures 0 is a colour, not background"
    if fingerprint.zero_fraction > _BACKGROUND_SHARE:
        return "zscore-nonzero", f"{share}: background, kept out of the statistics"
    return "zscore", f"{share}: too few for a background"


def choose_mirror_axes(scheme: LabelScheme, dims: int) -> tuple[Shape, str]:
    """All axes for tumour regions and pictures, left-right for organs, none where label names distinguish sides.

    nnU-Net mirrors organs on every axis too; in a short run on a CPU that learnt more slowly (`docs/benchmarks.md`).
    """
    words = {word for name in scheme.values for word in re.split(r"[^a-z]+", name.lower())}
    sides = sorted(words & _SIDES)
    if sides:
        return (), f"label names distinguish left and right ({', '.join(sides)})"
    if scheme.has_regions:
        return tuple(range(dims)), "tumour regions may lie anywhere and look alike from every side"
    if dims == 2:
        return (0, 1), "no label of these pictures names a side"
    return (0,), "the body looks alike on the left and right, but not at top and bottom or front and back"


def choose_modality_dropout(modalities: Sequence[str]) -> tuple[float, str]:
    """One patch in five lacks a modality if all are MRI sequences of BraTS; otherwise none does.

    Other channels, such as the colours of a picture, are not known to be missing in practice.
    """
    if len(modalities) < 2:
        return 0.0, "there is one modality"
    if all(modality in BRATS_MODALITIES for modality in modalities):
        return _MODALITY_DROPOUT, "scans may lack a sequence: `segkit infer --allow-missing`"
    return 0.0, "these channels are not known to be missing at times"


def choose_strides(shape: Shape, spacing_mm: Spacing, steps: int) -> tuple[Shape, ...]:
    """Stride per step and axis: 2, or 1 on axes that would shrink below 4 or are twice as coarse as the finest."""
    sizes, spacing = list(shape), list(spacing_mm)
    strides = []
    for _ in range(steps):
        is_long = [size >= 2 * _SMALLEST_FEATURE_MAP for size in sizes]
        # Without the axes that are too short to shrink further.
        finest = min((mm for mm, may_shrink in zip(spacing, is_long, strict=True) if may_shrink), default=0.0)
        stride = tuple(
            2 if may_shrink and mm < _STRIDE_RATIO * finest else 1
            for mm, may_shrink in zip(spacing, is_long, strict=True)
        )
        sizes = [size // factor for size, factor in zip(sizes, stride, strict=True)]
        spacing = [mm * factor for mm, factor in zip(spacing, stride, strict=True)]
        strides.append(stride)
    return tuple(strides)


def choose_slice_axis(shape: Shape, spacing_mm: Spacing) -> int:
    """The axis along which a volume is a stack of slices for a 2D network: the coarsest; of equal ones the shortest."""
    return max(range(len(shape)), key=lambda axis: (round(spacing_mm[axis], 2), -shape[axis]))


def patch_limits(spacing_mm: Spacing, limit: int) -> Shape:
    """Longest patch per axis: `limit` voxels (twice that in pictures), fewer on axes with much longer voxels."""
    if len(spacing_mm) == 2:
        limit *= _PICTURE_FACTOR
    finest = min(spacing_mm)
    return tuple(min(limit, round(limit * _STRIDE_RATIO * finest / mm)) for mm in spacing_mm)


def largest_batch(dims: int, limit: int) -> int:
    """Largest batch: `limit`, twice that for pictures."""
    return limit * _PICTURE_FACTOR if dims == 2 else limit


def largest_patch(median: Shape, limits: Shape, divisor: Shape) -> Shape:
    """The median case where it fits below the limits, in multiples of `divisor`."""
    return tuple(
        min(-(-size // step) * step, max(step, limit // step * step))
        for size, limit, step in zip(median, limits, divisor, strict=True)
    )


def smaller_patches(patch: Shape, median: Shape, divisor: Shape) -> Iterator[Shape]:
    """The patch, then smaller ones: each step shrinks the axis that covers most of the median case."""
    smallest = [min(size, 2 * step) for size, step in zip(patch, divisor, strict=True)]
    sizes = list(patch)
    while True:
        yield tuple(sizes)
        free = [axis for axis, size in enumerate(sizes) if size - divisor[axis] >= smallest[axis]]
        if not free:
            return
        widest = max(free, key=lambda axis: (sizes[axis] / median[axis], sizes[axis]))
        sizes[widest] -= divisor[widest]
