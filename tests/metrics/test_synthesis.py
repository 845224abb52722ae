"""Scores of made-up tissue: values by hand, MONAI for SSIM in 3D, and what the challenge's own package says.

Expected values of `test_agrees_with_the_package_of_the_challenge` were printed by PyPI `inpainting` 0.0.12
(torchmetrics 1.9.0, torch 2.15.0) from `generate_metrics` on the arrays of `golden_case`, in an environment of its own;
`benchmarks/inpainting_metrics.py` repeats the comparison on real and drawn cases.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from monai.metrics.regression import compute_ssim_and_cs

from segkit.metrics.synthesis import SYNTHESIS_SCORES, ssim_3d, synthesis_scores

WEIGHT = 1 / np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2)).sum()
"""What the middle of a Gaussian window of 11 voxels counts along one axis."""

# fmt: off
GOLDEN = (
    {"ssim": 0.9125354492823332, "mse": 0.013935652561485767, "rmse": 0.11804936826229095,
     "msle": 0.007208078633993864, "mae": 0.10269360989332199, "psnr": 17.612924111021155,
     "psnr_eps": 17.335992031622084, "psnr_01": 18.558727264404297, "psnr_01_eps": 18.558727264404297},
    {"ssim": 0.9666985016376697, "mse": 0.015901045873761177, "rmse": 0.1260993480682373,
     "msle": 0.007032552734017372, "mae": 0.10878010094165802, "psnr": 17.98574185696566,
     "psnr_eps": 17.985743094993538, "psnr_01": 17.985742568969727, "psnr_01_eps": 17.985742568969727},
)
# fmt: on


def golden_case(number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Prediction, reference, hole and voided image: a box in a corner, or scattered voxels over a lifted background."""
    i, j, k = np.indices((3, 9, 10))
    reference = ((37 * i + 11 * j * j + 5 * i * k + k * k * j) % 101).astype(np.float32)
    prediction = reference + ((13 * i + 7 * j + 17 * k * k) % 41 - 20).astype(np.float32)
    if number == 0:
        hole = (i > 0) & (j > 2) & (k > 5)
        return prediction, reference, hole, reference * ~hole
    return prediction + 30, reference + 30, (i * 90 + j * 10 + k) % 7 == 0, reference + 30


def percentiles_1_and_199() -> np.ndarray:
    """An image (13, 77) of the values 0 to 200 in steps of 0.2, whose 0.5 and 99.5 percentiles are 1 and 199."""
    return np.arange(1001, dtype=np.float32).reshape(13, 77) / 5


def spot(value: float, *index: int, shape: tuple[int, ...]) -> np.ndarray:
    image = np.zeros(shape, np.float32)
    image[index] = value
    return image


@pytest.mark.parametrize("number", [0, 1])
def test_agrees_with_the_package_of_the_challenge(number):
    assert synthesis_scores(*golden_case(number)) == pytest.approx(GOLDEN[number], abs=1e-5)


def test_differences_by_hand():
    voided = percentiles_1_and_199()
    hole = np.zeros(voided.shape, bool)
    hole[1, 10:12] = True
    reference, prediction = np.full_like(voided, 1e6), np.full_like(voided, np.nan)  # nothing beyond the hole counts
    reference[hole], prediction[hole] = (100, 199), (50.5, 300)  # 0.5 and 1 against 0.25 and, clipped, 1
    scores = synthesis_scores(prediction, reference, hole, voided)
    assert tuple(scores) == SYNTHESIS_SCORES
    assert scores["mse"] == pytest.approx(1 / 32)
    assert scores["rmse"] == pytest.approx(math.sqrt(1 / 32))
    assert scores["mae"] == pytest.approx(1 / 8)
    assert scores["msle"] == pytest.approx(math.log(1.25 / 1.5) ** 2 / 2)
    assert scores["psnr_01"] == pytest.approx(10 * math.log10(32))
    assert scores["psnr_01_eps"] == pytest.approx(10 * math.log10(32))
    assert scores["psnr_eps"] == pytest.approx(10 * math.log10(0.5**2 * 32))  # the reference runs from 0.5 to 1
    assert scores["psnr"] == math.inf  # 0.25 is clipped to the reference's 0.5


def test_the_lower_percentile_is_never_below_zero():
    voided = percentiles_1_and_199() - 100  # percentiles -99 and 99: intensities are divided by 99
    hole = np.zeros(voided.shape, bool)
    hole[0, 0] = True
    reference, prediction = np.full_like(voided, 49.5), np.full_like(voided, -80)
    assert synthesis_scores(prediction, reference, hole, voided)["mae"] == pytest.approx(0.5)


@pytest.mark.parametrize("index", [(6, 20), (0, 0), (12, 76)], ids=["inside", "first corner", "last corner"])
def test_ssim_of_a_single_voxel_sees_zeros_around_it(index):
    # Mirrored at its edges, an image shows a corner voxel once, so corners count as the middle does.
    voided = percentiles_1_and_199()
    truth, found, weight = 0.8, 0.5, WEIGHT**2
    reference = np.full_like(voided, 1e6)
    reference[index], prediction = 1 + 198 * truth, np.full_like(voided, 1 + 198 * found)
    hole = spot(1, *index, shape=voided.shape) > 0
    c1, c2 = (0.01 * truth) ** 2, (0.03 * truth) ** 2  # the larger of the two ranges: from 0 to the truth
    mean, other = weight * truth, weight * found
    luminance = (2 * mean * other + c1) / (mean**2 + other**2 + c1)
    covariance, variances = weight * truth * found - mean * other, weight * (truth**2 + found**2) - mean**2 - other**2
    expected = luminance * (2 * covariance + c2) / (variances + c2)
    assert synthesis_scores(prediction, reference, hole, voided)["ssim"] == pytest.approx(expected, rel=1e-5)


def test_ssim_is_that_of_the_planes_across_the_first_axis():
    prediction, reference, hole, voided = golden_case(0)
    voided[:] = np.where(np.arange(10) < 5, 0, 100)  # the scale of each plane is that of the whole
    hole[2] = False
    changed = prediction.copy()
    changed[2] += 50
    expected = synthesis_scores(prediction[1], reference[1], hole[1], voided[1])  # a plane by itself
    assert expected["ssim"] < 0.99
    assert synthesis_scores(changed, reference, hole, voided) == pytest.approx(expected)


def test_3d_ssim_of_flat_volumes():
    shape = (9, 8, 7)
    voided = np.zeros(shape, np.float32)
    voided[:5] = 4  # percentiles 0 and 4
    hole = np.zeros(shape, bool)
    hole[2:5, 3, 0:2] = True
    prediction, reference = np.full(shape, 1, np.float32), np.full(shape, 2, np.float32)
    expected = (2 * 0.25 * 0.5 + 1e-4) / (0.25**2 + 0.5**2 + 1e-4)
    assert ssim_3d(prediction, reference, hole, voided) == pytest.approx(expected)
    assert ssim_3d(reference, reference, hole, voided) == 1


@pytest.mark.parametrize("index", [(7, 6, 8), (0, 0, 0)], ids=["inside", "corner"])
def test_3d_ssim_of_a_single_voxel(index):
    shape = (14, 15, 16)
    hole, voided = spot(1, *index, shape=shape) > 0, np.zeros(shape, np.float32)
    voided[:7] = 1
    found, weight = 0.5, WEIGHT**3
    mean, variance = weight * found, weight * found**2 - (weight * found) ** 2
    expected = 1e-4 / (mean**2 + 1e-4) * 9e-4 / (variance + 9e-4)
    score = ssim_3d(spot(found, *index, shape=shape), np.zeros(shape, np.float32), hole, voided)
    assert score == pytest.approx(expected, rel=1e-6)


def test_3d_ssim_agrees_with_monai():
    random = np.random.default_rng(2)
    reference = random.random((17, 20, 18)).astype(np.float32)
    voided = np.zeros_like(reference)
    voided[:9] = 1  # intensities are in [0, 1] already
    hole = np.zeros(reference.shape, bool)
    hole[6:9, 5:14, 7:12] = True
    prediction = np.where(hole, random.random(reference.shape), reference).astype(np.float32)
    tensors = [torch.from_numpy(image)[None, None].double() for image in (prediction, reference)]
    similarity, _ = compute_ssim_and_cs(*tensors, 3, [11] * 3, [1.5] * 3, data_range=1.0)  # no padding: 5 voxels less
    expected = similarity[0, 0].numpy()[hole[5:-5, 5:-5, 5:-5]].mean()
    assert 0 < expected < 0.9
    assert ssim_3d(prediction, reference, hole, voided) == pytest.approx(expected, abs=1e-6)


def test_3d_ssim_sees_five_voxels_around_the_hole_and_no_more():
    reference = np.random.default_rng(4).random((16, 6, 6)).astype(np.float32)
    hole = np.zeros(reference.shape, bool)
    hole[2:4] = True
    near, far = reference.copy(), reference.copy()
    near[8], far[9] = 0, 0
    assert ssim_3d(near, reference, hole, reference) < 1
    assert ssim_3d(far, reference, hole, reference) == 1


def test_a_perfect_prediction():
    _, reference, hole, voided = golden_case(0)
    scores = synthesis_scores(reference, reference, hole, voided)
    assert scores["ssim"] == 1
    assert [scores[name] for name in ("mse", "rmse", "mae", "msle")] == [0, 0, 0, 0]
    assert scores["psnr"] == scores["psnr_01"] == math.inf
    assert 100 < scores["psnr_eps"] <= scores["psnr_01_eps"] < 160


def test_a_flat_reference_has_no_peak():
    prediction, reference, hole, voided = golden_case(0)
    reference[hole] = 40
    scores = synthesis_scores(prediction, reference, hole, voided)
    assert math.isnan(scores["psnr"])
    assert scores["psnr_eps"] == -math.inf
    assert math.isfinite(scores["psnr_01"])


def test_nothing_to_compare_is_nan():
    prediction, reference, hole, voided = golden_case(0)
    for arguments in ((prediction, reference, hole & False, voided), (prediction, reference, hole, voided * 0)):
        scores = synthesis_scores(*arguments)
        assert tuple(scores) == SYNTHESIS_SCORES
        assert all(math.isnan(value) for value in scores.values())
        assert math.isnan(ssim_3d(*arguments))


def test_two_images_that_are_zero_in_the_hole_have_no_ssim():
    _, reference, hole, voided = golden_case(0)
    scores = synthesis_scores(reference * ~hole, reference * ~hole, hole, voided)
    assert math.isnan(scores["ssim"])
    assert scores["mse"] == 0


@pytest.mark.parametrize("position", [0, 2, 3])
@pytest.mark.parametrize("score", [synthesis_scores, ssim_3d])
def test_shapes_that_differ_are_refused(score, position):
    arguments = list(golden_case(0))
    arguments[position] = arguments[position][1:]
    name = {0: "prediction", 2: "hole", 3: "voided image"}[position]
    with pytest.raises(ValueError, match=rf"found a {name} of shape \(2, 9, 10\); expected \(3, 9, 10\)"):
        score(*arguments)


def test_3d_ssim_needs_volumes():
    with pytest.raises(ValueError, match=r"found images with 2 axes; expected volumes"):
        ssim_3d(*(array[0] for array in golden_case(0)))
