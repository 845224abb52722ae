"""Transforms that the user names in the settings or gives from Python: which are accepted, and how they are applied."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from monai.transforms import Compose, RandBiasFieldd, RandFlipd, RandGaussianNoised, RandomizableTransform, RandRotated

from segkit.config import build_config
from segkit.errors import ConfigError, RequestError
from segkit.preparing.transforms import KeepBackground, run
from segkit.preparing.user_transforms import KNOWN, build_transforms, keeping_background, name_of, require_usable
from segkit.training.config import TrainConfig


def patch(shape: tuple[int, ...] = (12, 12, 12)) -> dict[str, torch.Tensor]:
    """Two modalities with a background of zeros, and a label of 3s in the middle."""
    generator = torch.Generator().manual_seed(0)
    image = torch.zeros(2, *shape)
    inner = tuple(slice(2, -2) for _ in shape)
    image[(slice(None), *inner)] = 1 + torch.rand(image[(slice(None), *inner)].shape, generator=generator)
    label = torch.zeros(1, *shape, dtype=torch.uint8)
    label[(slice(None), *(slice(4, -4) for _ in shape))] = 3
    return {"image": image, "label": label}


def config_of(*settings: Mapping[str, Any]) -> TrainConfig:
    return build_config(TrainConfig, [("my.yaml", {"training": {"transforms": list(settings)}})])


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ({"name": "RandBiasFeildd"}, "'RandBiasFeildd' is not one of .* images; did you mean 'RandBiasFieldd'?"),
        ({"name": "RandBiasField"}, "'RandBiasField' is not one of .* images; did you mean 'RandBiasFieldd'?"),
        ({"name": "RandBiasFieldd", "probability": 0.2}, "RandBiasFieldd has no argument 'probability'; .* 'prob'?"),
        ({"name": "RandGibbsNoised", "alfa": [0, 1]}, "RandGibbsNoised has no argument 'alfa'; did you mean 'alpha'?"),
        ({"name": "RandBiasFieldd", "keys": ["labels"]}, "'labels' is not a key of a patch; did you mean 'label'?"),
        ({"name": "RandBiasFieldd", "degree": 0}, "RandBiasFieldd does not accept its arguments: .*degree"),
        ({"name": "RandScaleIntensityd"}, "RandScaleIntensityd does not accept its arguments: .*'factors'"),
        ({"name": "RandBiasFieldd", "place": "befor"}, "place 'befor' is neither 'before' nor 'after'"),
        ({"name": "RandRotated", "keys": "image"}, "RandRotated moves voxels, so its keys must be 'image' and 'label'"),
        ({"name": "RandBiasFieldd", "prob": "$__import__('os')"}, "is an expression; only plain values are accepted"),
        ({"name": "RandAffined", "_target_": "os.system"}, "RandAffined has no argument '_target_'"),
        ({"_target_": "monai.transforms.RandFlipd"}, "None is not one of MONAI's dictionary transforms"),
        ({"name": "Lambdad", "func": "print"}, "'Lambdad' is not one of"),
        ({"name": "LoadImaged"}, "'LoadImaged' is not one of"),
        ({"name": "os.system"}, r"'os\.system' is not one of"),
    ],
)
def test_a_wrong_setting_gives_one_sentence_with_the_nearest_name(setting: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        config_of(setting)
    (problem,) = caught.value.problems
    assert problem.where == "my.yaml: training.transforms.0"


def test_all_wrong_settings_are_reported_together() -> None:
    with pytest.raises(ConfigError, match="2 problems"):
        config_of({"name": "RandFlip"}, {"name": "RandFlipd"}, {"name": "RandRotate"})


def test_nothing_that_reads_writes_or_calls_can_be_named() -> None:
    assert {"RandBiasFieldd", "RandGibbsNoised", "Rand3DElasticd", "RandSmoothDeformd"} <= set(KNOWN)
    assert not any(word in name for name in KNOWN for word in ("Load", "Save", "Lambda", "Vision", "CuCIM", "TorchIO"))


def test_settings_are_placed_before_and_after() -> None:
    settings = [{"name": "RandFlipd"}, {"name": "RandBiasFieldd", "place": "before"}, {"name": "RandGibbsNoised"}]

    assert [name_of(part) for part in build_transforms(settings, "before")] == ["RandBiasFieldd"]
    assert [name_of(part) for part in build_transforms(settings, "after")] == ["RandFlipd", "RandGibbsNoised"]


@pytest.mark.parametrize("name", ["RandAffined", "RandRotated", "RandZoomd", "RandGridDistortiond", "Rand3DElasticd"])
def test_spatial_ones_move_image_and_label_together(name: str) -> None:
    """The label, given as the image too, moves as the image does, and keeps its values."""
    arguments: dict[str, dict[str, Any]] = {
        "RandAffined": {"translate_range": [3, 3, 3], "padding_mode": "zeros"},
        "RandRotated": {"range_x": 0.5, "padding_mode": "zeros"},
        "RandZoomd": {"min_zoom": 1.5, "max_zoom": 1.5, "mode": "trilinear"},
        "RandGridDistortiond": {"num_cells": 3},
        "Rand3DElasticd": {"sigma_range": [1, 2], "magnitude_range": [5, 9], "translate_range": [3, 3, 3]},
    }
    (moved,) = build_transforms([{"name": name, "prob": 1.0, **arguments[name]}], "after")
    assert moved.keys == ("image", "label")
    assert moved.mode[1] == "nearest"
    before = patch()
    before["image"] = before["label"].float()
    after = run(Compose([moved]).set_random_state(3), before)

    assert not torch.equal(after["image"], before["image"])
    assert set(np.unique(after["label"])) == {0, 3}
    agree = ((after["image"] > 1.5) == (after["label"] > 1.5)).float().mean()
    assert agree > 0.97
    require_usable([moved], patch())


def test_intensities_leave_background_and_labels_alone() -> None:
    (noise,) = build_transforms([{"name": "RandGibbsNoised", "prob": 1.0, "alpha": [0.9, 0.9]}], "after")
    before = patch()
    after = run(Compose([noise]), before)

    assert isinstance(noise, KeepBackground)
    assert not torch.equal(after["image"], before["image"])
    assert not after["image"][before["image"] == 0].any()
    assert torch.equal(after["label"], before["label"])


def test_transforms_from_python_are_treated_alike() -> None:
    assert isinstance(keeping_background(RandBiasFieldd("image")), KeepBackground)
    both = RandFlipd(("image", "label"))
    assert keeping_background(both) is both
    with pytest.raises(ValueError, match="RandRotated moves voxels"):
        keeping_background(RandRotated("image"))


class _Unseeded(RandomizableTransform):
    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        return {**data, "image": data["image"] + float(np.random.default_rng().random())}


@pytest.mark.parametrize(
    ("setting", "found"),
    [
        ({"name": "RandSpatialCropd", "roi_size": [8, 8, 8], "random_size": False}, r"changes the shape of the image"),
        ({"name": "RandSpatialCropSamplesd", "roi_size": [8, 8, 8], "num_samples": 2}, "returns several patches"),
        ({"name": "Resized", "spatial_size": [6, 6, 6]}, r"from \(2, 12, 12, 12\) to \(2, 6, 6, 6\)"),
        ({"name": "Rand2DElasticd", "spacing": [5, 5], "magnitude_range": [1, 2]}, "fails on a patch of this data"),
        (
            {"name": "RandScaleIntensityd", "factors": 0.5, "keys": ["image", "label"]},
            "changes the values of the label",
        ),
        ({"name": "RandAffined", "rotate_range": 0.5, "mode": ["bilinear", "bilinear"]}, "changes the values of the"),
    ],
)
def test_what_does_not_keep_a_patch_a_patch_is_refused_whatever_its_probability(
    setting: dict[str, Any], found: str
) -> None:
    (transform,) = build_transforms([setting], "after")
    with pytest.raises(RequestError, match=rf"training\.transforms: {setting['name']} .*{found}"):
        require_usable([transform], patch())


def test_a_quarter_turn_fits_patches_with_equal_sides_only() -> None:
    (turn,) = build_transforms([{"name": "RandRotate90d"}], "after")
    require_usable([turn], patch())
    with pytest.raises(RequestError, match="RandRotate90d changes the shape of the image"):
        require_usable([turn], patch((12, 16, 12)))


def test_random_numbers_from_elsewhere_are_refused() -> None:
    with pytest.raises(RequestError, match="_Unseeded gives another result for the same seed"):
        require_usable([_Unseeded()], patch())


def test_the_check_leaves_the_transforms_as_they_were() -> None:
    noise = RandGaussianNoised("image", prob=0.25)
    require_usable([keeping_background(noise)], patch())
    assert noise.prob == 0.25
