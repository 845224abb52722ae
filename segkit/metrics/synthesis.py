"""Scores of inpainted tissue: those of the BraTS local-synthesis challenge, and structural similarity in 3D.

Both scale the intensities of prediction and reference to [0, 1] by the 0.5 and 99.5 percentiles of the voided image
(all of its voxels, background too; the lower one is at least 0) and clip. The challenge then compares the hole alone:
every voxel outside it is 0 in both images, so a structural similarity near the border compares zeros too.

SSIM is Wang et al., IEEE TIP 13(4), 2004: a Gaussian window of 11 voxels and sigma 1.5, K1 = 0.01 and K2 = 0.03, images
mirrored at their edges. The challenge's is two-dimensional, in the planes of the last two axes (sagittal ones of its
files); `ssim_3d` is not comparable with it, nor with the challenge's tables.
"""

import math

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from segkit.shapes import AnyArray, Mask

SYNTHESIS_SCORES = ("ssim", "mse", "rmse", "msle", "mae", "psnr", "psnr_eps", "psnr_01", "psnr_01_eps")
"""Keys of `synthesis_scores` in its order, with the challenge's names."""

_PERCENTILES = (0.5, 99.5)
_SIGMA, _RADIUS = 1.5, 5
_K1, _K2 = 0.01, 0.03
_EPSILON = float(np.finfo(np.float64).eps)

Values = NDArray[np.float64]


def synthesis_scores(prediction: AnyArray, reference: AnyArray, hole: Mask, voided: AnyArray) -> dict[str, float]:
    """The scores of the BraTS local-synthesis challenge over the voxels of the hole.

    `ssim`; `mse`, `rmse`, `mae` and `msle`, the mean squared difference of log(1 + intensity), after scaling to [0, 1];
    `psnr` in dB, whose peak is the range of the reference in the hole, to which the prediction is clipped; `psnr_01`
    with a peak of 1; `_eps`: not clipped, and finite for a perfect prediction. They agree to 1e-5 with version 0.0.12
    of the package `inpainting` of the challenge's organisers, which sums up all but `ssim` in single precision.

    Images (D, H, W) or (H, W) in the intensities of the file: `prediction` with its hole filled, `reference` the
    original, `voided` the input, 0 in all of its holes. `hole` are the voxels that are compared; the challenge takes
    those of its healthy mask. All scores are NaN where the hole is empty (the package stops there) or `voided` has no
    range.

    Raises:
        ValueError: If the shapes differ.
    """
    _check_shapes(prediction, reference, hole, voided)
    scale = _scale_of(voided)
    if scale is None or not hole.any():
        return dict.fromkeys(SYNTHESIS_SCORES, math.nan)
    found, truth = (_scaled(image[hole], scale) for image in (prediction, reference))
    error = float(np.mean((found - truth) ** 2))
    clipped = float(np.mean((np.clip(found, truth.min(), truth.max()) - truth) ** 2))
    peak = float(np.ptp(truth))
    return {
        "ssim": _ssim_in_planes(found, truth, hole),
        "mse": error,
        "rmse": math.sqrt(error),
        "msle": float(np.mean((np.log1p(found) - np.log1p(truth)) ** 2)),
        "mae": float(np.mean(np.abs(found - truth))),
        "psnr": _decibels(peak, clipped),
        "psnr_eps": _decibels(peak, error + _EPSILON),
        "psnr_01": _decibels(1.0, error),
        "psnr_01_eps": _decibels(1.0, error + _EPSILON),
    }


def ssim_3d(prediction: AnyArray, reference: AnyArray, hole: Mask, voided: AnyArray) -> float:
    """Structural similarity in three dimensions, mean over the voxels of the hole, at most 1.

    Arguments as in `synthesis_scores`, (D, H, W). The window of 11 x 11 x 11 voxels sees the images also around the
    hole; intensities are scaled as for the challenge, with a range of 1. NaN where the hole is empty or `voided` has no
    range.

    Raises:
        ValueError: If the shapes differ or are not those of volumes.
    """
    _check_shapes(prediction, reference, hole, voided)
    if hole.ndim != 3:
        raise ValueError(f"found images with {hole.ndim} axes; expected volumes (D, H, W)")
    scale = _scale_of(voided)
    if scale is None or not hole.any():
        return math.nan
    box = _box_around(hole, axes=(0, 1, 2))
    found, truth = (_scaled(image[box], scale) for image in (prediction, reference))
    return float(_ssim_map(found, truth, 1.0, axes=(0, 1, 2))[hole[box]].mean())


def _ssim_in_planes(found: Values, truth: Values, hole: Mask) -> float:
    """The challenge's SSIM of the values in a hole, (number of its voxels), with zeros around it."""
    axes = (hole.ndim - 2, hole.ndim - 1)
    box = _box_around(hole, axes)
    inside = hole[box]
    images = [np.zeros(inside.shape) for _ in range(2)]
    for image, values in zip(images, (found, truth), strict=True):
        image[inside] = values
    around = [] if hole.all() else [0.0]
    data_range = max(float(np.ptp(np.append(values, around))) for values in (found, truth))
    return float(_ssim_map(images[0], images[1], data_range, axes)[inside].mean())


def _ssim_map(first: Values, second: Values, data_range: float, axes: tuple[int, ...]) -> Values:
    """The similarity at each voxel, in windows along `axes`; NaN where two flat images have no range."""

    def window_mean(image: Values) -> Values:
        return np.asarray(ndimage.gaussian_filter(image, _SIGMA, radius=_RADIUS, mode="mirror", axes=axes))

    c1, c2 = (_K1 * data_range) ** 2, (_K2 * data_range) ** 2
    mean_1, mean_2 = window_mean(first), window_mean(second)
    variances = window_mean(first**2 + second**2) - mean_1**2 - mean_2**2
    covariance = window_mean(first * second) - mean_1 * mean_2
    with np.errstate(invalid="ignore"):
        luminance = (2 * mean_1 * mean_2 + c1) / (mean_1**2 + mean_2**2 + c1)
        return np.asarray(luminance * (2 * covariance + c2) / (variances + c2))


def _box_around(hole: Mask, axes: tuple[int, ...]) -> tuple[slice, ...]:
    """The box of the hole, with all voxels that a window along `axes` sees from it."""
    (tight,) = ndimage.find_objects(hole.view(np.uint8))
    margins = [_RADIUS if axis in axes else 0 for axis in range(hole.ndim)]
    return tuple(slice(max(s.start - m, 0), s.stop + m) for s, m in zip(tight, margins, strict=True))


def _scale_of(voided: AnyArray) -> tuple[float, float] | None:
    low, high = (float(value) for value in np.percentile(voided, _PERCENTILES))
    low = max(low, 0.0)
    return (low, high) if low < high else None


def _scaled(values: AnyArray, scale: tuple[float, float]) -> Values:
    low, high = scale
    return np.asarray((np.clip(values.astype(np.float64), low, high) - low) / (high - low))


def _decibels(peak: float, squared_error: float) -> float:
    if peak == 0:
        return math.nan if squared_error == 0 else -math.inf
    return 10 * math.log10(peak**2 / squared_error) if squared_error > 0 else math.inf


def _check_shapes(prediction: AnyArray, reference: AnyArray, hole: Mask, voided: AnyArray) -> None:
    shapes = {"prediction": prediction.shape, "hole": hole.shape, "voided image": voided.shape}
    for name, shape in shapes.items():
        if shape != reference.shape:
            raise ValueError(f"found a {name} of shape {shape}; expected {reference.shape}, that of the reference")
