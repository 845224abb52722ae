"""The same patients written in eight conventions reach the network as the same tensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from segkit.labels import outputs_of
from segkit.phantoms.layouts import PHANTOM_LAYOUTS, write_phantoms
from segkit.phantoms.phantom import PHANTOM_SCHEME, make_phantom
from segkit.preparing.augmentation import AugmentationConfig, training_transforms
from segkit.preparing.patch_sampling import PatchDataset
from segkit.preparing.preprocessing import PreprocessingConfig, load_case, prepare
from segkit.reading.layouts.table import find_cases

_SIZE, _SEED = 32, 5
_PREPROCESSING = PreprocessingConfig(normalisation="zscore-nonzero", crop="nonzero")


def _network_input(folder: Path) -> tuple[list[str], list[Tensor], list[Tensor]]:
    """Output names, and for each case and some random patches the image and its target planes."""
    cohort = find_cases(folder, require_labels=True)
    assert cohort.scheme is not None
    outputs = outputs_of(cohort.scheme)[:3]  # the resection cavity of 2024 is a fourth, empty here
    cases = sorted(cohort.cases, key=lambda case: case.id)
    prepared = [prepare(load_case(case, cohort.modalities, cohort.scheme), _PREPROCESSING) for case in cases]
    transforms = training_transforms(AugmentationConfig(mirror_axes=(0,)), (16, 16, 16), foreground_fraction=0.0)
    patches = PatchDataset(prepared, transforms, seed=3, length=4)
    items = [
        {"image": torch.from_numpy(np.array(case.image)), "label": torch.from_numpy(case.labels)} for case in prepared
    ]
    items += [patches[index] for index in range(len(patches))]
    planes = [
        torch.from_numpy(np.stack([np.isin(item["label"].numpy(), output.members) for output in outputs]))
        for item in items
    ]
    return [output.name for output in outputs], [item["image"] for item in items], planes


def _numbers_without_cavity() -> list[int]:
    """Two patients of the seed whom even the convention with resections leaves unoperated."""
    probability = PHANTOM_LAYOUTS["brats2024"].resection_probability
    cavity = PHANTOM_SCHEME.values["RC"]
    numbers = [
        number
        for number in range(12)
        if not (make_phantom(number, size=_SIZE, seed=_SEED, resection_probability=probability).labels == cavity).any()
    ]
    assert 2 <= len(numbers) < 12
    return numbers[:2]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], list[Tensor], list[Tensor]]:
    folder = tmp_path_factory.mktemp("brats2021")
    write_phantoms(folder, _numbers_without_cavity(), convention="brats2021", size=_SIZE, seed=_SEED)
    return _network_input(folder)


def test_eight_conventions() -> None:
    names = "brats2018 brats2020 brats2021 brats2023 brats2024 msd nnunet bids"
    assert sorted(PHANTOM_LAYOUTS) == sorted(names.split())


@pytest.mark.parametrize("convention", sorted(PHANTOM_LAYOUTS))
def test_same_tensors_in_every_convention(
    convention: str, expected: tuple[list[str], list[Tensor], list[Tensor]], tmp_path: Path
) -> None:
    write_phantoms(tmp_path, _numbers_without_cavity(), convention=convention, size=_SIZE, seed=_SEED)
    outputs, images, planes = _network_input(tmp_path)
    assert outputs == expected[0] == ["WT", "TC", "ET"]
    assert len(images) == 2 + 4
    for ours, theirs in zip((*images, *planes), (*expected[1], *expected[2]), strict=True):
        assert torch.equal(ours, theirs)
    assert images[0].shape[0] == 4
    assert planes[0][0].any()
