"""The expected time of a training run, from numbers that can be worked out by hand."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from segkit.labels import SCHEMES, classes_scheme
from segkit.preparing.fingerprint import Fingerprint, Foreground
from segkit.preparing.plan import PlanningRequest, plan_training
from segkit.reading.case import Case, Cohort, ImageFile
from segkit.training.config import DataConfig, NetworkConfig, PlanningConfig, TrainConfig, TrainingConfig
from segkit.training.segmentation_plan import estimate_minutes, estimate_training, seconds_of

BRATS = SCHEMES["brats2023"]
TINY = PlanningRequest("revmbunet", "tiny", patch_limit=32)


def fingerprint(shape: tuple[int, ...] = (40, 50, 60)) -> Fingerprint:
    return Fingerprint(
        cases=10,
        dims=3,
        modalities=("t1c",),
        shapes=(shape,),
        cropped_shapes=(shape,),
        spacings_mm=((1.0, 1.0, 1.0),),
        zero_fraction=0.5,
        is_ct=False,
        foreground=Foreground(low=-50, high=200, mean=60, std=30),
        seconds_per_case=6.0,
    )


def test_minutes_by_hand() -> None:
    plan = plan_training(fingerprint((64, 32, 32)), BRATS, TINY, memory_gb=4.0)
    training = TrainingConfig(steps=120, accumulate=2, steps_per_epoch=20, validate_every=2, validation_cases=4)
    config = TrainConfig(training=training, data=DataConfig(folds=2), overlap=0.5)

    # 10 cases x 6 s to prepare; 240 batches x 0.5 s; 3 x 4 cases x 3 windows (64 voxels, 32 each, half over) x 1 s
    assert plan.patch_size == (32, 32, 32)
    assert estimate_minutes(fingerprint((64, 32, 32)), plan, config, 0.5, 1.0) == pytest.approx((60 + 120 + 36) / 60)


def test_all_cases_of_the_fold_validate_without_a_limit() -> None:
    plan = plan_training(fingerprint((64, 32, 32)), BRATS, TINY, memory_gb=4.0)
    config = TrainConfig(training=TrainingConfig(steps=1), data=DataConfig(folds=4))

    # One validation of 10 / 4 cases, rounded up to 3, of 3 windows
    assert estimate_minutes(fingerprint((64, 32, 32)), plan, config, 0.0, 1.0) == pytest.approx((60 + 9) / 60)


def test_a_budget_is_the_estimate() -> None:
    plan = plan_training(fingerprint(), BRATS, TINY, memory_gb=4.0)
    config = TrainConfig(training=TrainingConfig(budget_minutes=30))

    assert estimate_minutes(fingerprint(), plan, config, 1e9, 1e9) == 30


def test_seconds_of_leaves_the_warm_up_out() -> None:
    calls: list[int] = []

    assert seconds_of(lambda: calls.append(1), repeats=3) < 0.1
    assert len(calls) == 4


def test_estimate_of_a_cohort(tmp_path: Path) -> None:
    """A case of 8 x 6 x 4 voxels of which 4 x 3 x 4 are not 0."""
    image, labels = np.zeros((8, 6, 4), np.float32), np.zeros((8, 6, 4), np.uint8)
    image[2:6, 1:4], labels[2:4, 1:4] = 5, 1
    files = tmp_path / "image.nii.gz", tmp_path / "labels.nii.gz"
    for path, array in zip(files, (image, labels), strict=True):
        nib.save(nib.Nifti1Image(array, np.diag([-1.0, -1.0, 1.0, 1.0])), path)
    scheme = classes_scheme("organ", {"organ": 1})
    case = Case("0", "0", {"t1c": ImageFile(files[0])}, ImageFile(files[1]), scheme)
    data = Cohort(tmp_path, "folder", scheme, ("t1c",), (case,))
    config = TrainConfig(
        network=NetworkConfig(family="revmbunet", size="tiny"),
        planning=PlanningConfig(patch_limit=16),
        training=TrainingConfig(steps=100),
    )

    plan, minutes = estimate_training(data, scheme, config, memory_gb=4.0)

    assert plan.patch_size == (4, 3, 4)  # what is not 0; too short for any stride
    assert 0 < minutes < 10
