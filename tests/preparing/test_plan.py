"""Planning: the rules by hand, the memory count against known networks, the plan as a whole."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import nn

from segkit.errors import DataError, RequestError
from segkit.labels import SCHEMES, classes_scheme
from segkit.preparing.fingerprint import Fingerprint, Foreground, take_fingerprint
from segkit.preparing.memory import (
    StepCost,
    Volumes,
    estimate_memory_gb,
    has_room_to_keep,
    slab_share,
    step_bytes,
    step_cost,
    window_bytes,
)
from segkit.preparing.plan import Plan, PlanningRequest, plan_training
from segkit.preparing.plan_rules import (
    choose_mirror_axes,
    choose_modality_dropout,
    choose_normalisation,
    choose_strides,
    largest_batch,
    largest_patch,
    patch_limits,
    smaller_patches,
    target_spacing,
)
from segkit.preparing.preprocessing import PreprocessingConfig
from segkit.reading.case import Case, Cohort, ImageFile

BRATS = SCHEMES["brats2023"]
TINY = PlanningRequest("revmbunet", "tiny", patch_limit=32)


def fingerprint(shape: tuple[int, ...] = (40, 50, 60), **changes: object) -> Fingerprint:
    values = {
        "cases": 10,
        "dims": len(shape),
        "modalities": ("t1c",),
        "shapes": (shape,),
        "cropped_shapes": (shape,),
        "spacings_mm": ((1.0,) * len(shape),),
        "zero_fraction": 0.5,
        "is_ct": False,
        "foreground": Foreground(low=-50, high=200, mean=60, std=30),
        "seconds_per_case": 6.0,
    }
    return Fingerprint(**{**values, **changes})


def cohort(folder: Path, cases: int = 3, value: float = 5.0, modality: str = "t1c", spacing: float = 1.0) -> Cohort:
    """Cases of 8 x 6 x 4 voxels that hold `value` in 4 x 3 x 4 of them, of which 2 x 3 x 4 are labelled 1."""
    image = np.zeros((8, 6, 4), np.float32)
    image[2:6, 1:4] = value
    labels = np.zeros((8, 6, 4), np.uint8)
    labels[2:4, 1:4] = 1
    affine = np.diag([-1.0, -1.0, spacing, 1.0])
    scheme = classes_scheme("organ", {"organ": 1})
    found = []
    for number in range(cases):
        files = {name: folder / f"{number}_{name}.nii.gz" for name in ("image", "labels")}
        nib.save(nib.Nifti1Image(image, affine), files["image"])
        nib.save(nib.Nifti1Image(labels, affine), files["labels"])
        found.append(
            Case(str(number), str(number), {modality: ImageFile(files["image"])}, ImageFile(files["labels"]), scheme)
        )
    return Cohort(folder, "folder", scheme, (modality,), tuple(found))


def test_fingerprint_by_hand(tmp_path: Path) -> None:
    taken = take_fingerprint(cohort(tmp_path, spacing=2.0))

    assert taken.cases == 3
    assert taken.shapes == ((8, 6, 4),) * 3
    assert taken.cropped_shapes == ((4, 3, 4),) * 3
    assert taken.median_spacing_mm == (1.0, 1.0, 2.0)
    assert taken.zero_fraction == pytest.approx(1 - 48 / 192)
    assert (taken.foreground.mean, taken.foreground.std) == (5.0, 0.0)
    assert not taken.is_ct
    assert Fingerprint(**json.loads(taken.model_dump_json())) == taken


def test_fingerprint_looks_at_a_spread_of_cases(tmp_path: Path) -> None:
    taken = take_fingerprint(cohort(tmp_path, cases=9), max_cases=4)

    assert taken.cases == 9
    assert len(taken.shapes) == 4


def test_fingerprint_knows_ct_by_name_and_by_air(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()

    assert take_fingerprint(cohort(tmp_path / "a", modality="CT")).is_ct
    assert take_fingerprint(cohort(tmp_path / "b", value=-900.0)).is_ct


def test_fingerprint_leaves_damaged_cases_out(tmp_path: Path) -> None:
    data = cohort(tmp_path)
    (tmp_path / "1_image.nii.gz").write_bytes(b"damaged")

    assert len(take_fingerprint(data).shapes) == 2
    for number in (0, 2):
        (tmp_path / f"{number}_image.nii.gz").unlink()
    with pytest.raises(DataError, match="none of the 3 cases looked at can be read"):
        take_fingerprint(data)


def test_target_spacing_is_the_median() -> None:
    spacing, reason = target_spacing([(1.0, 1.0, 1.0), (1.0, 1.0, 2.0), (1.0, 1.0, 2.5)])

    assert spacing == (1.0, 1.0, 2.0)
    assert reason == "the median of spacings from 1 x 1 x 1 to 1 x 1 x 2.5 mm"


def test_equal_spacings_need_no_resampling() -> None:
    assert target_spacing([(1.0, 1.0, 1.0), (1.001, 1.0, 1.0)])[1].endswith("nothing is resampled")


def test_a_coarse_axis_takes_its_tenth_percentile() -> None:
    spacings = [(0.5, 0.5, float(slice_mm)) for slice_mm in range(2, 13)]  # 2 to 12 mm; 10th percentile 3 mm

    assert target_spacing(spacings)[0] == (0.5, 0.5, 3.0)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"is_ct": True}, "ct-window"),
        ({"zero_fraction": 0.26}, "zscore-nonzero"),
        ({"zero_fraction": 0.25}, "zscore"),
        ({"zero_fraction": 0.9, "dims": 2}, "zscore"),
    ],
)
def test_normalisation(changes: dict[str, object], expected: str) -> None:
    assert choose_normalisation(fingerprint(**changes))[0] == expected


@pytest.mark.parametrize(
    ("scheme", "dims", "expected"),
    [
        (BRATS, 3, (0, 1, 2)),
        (classes_scheme("x", {"liver": 1, "spleen": 2}), 3, (0,)),
        (classes_scheme("x", {"kidney_left": 1, "kidney_right": 2}), 3, ()),
        (classes_scheme("x", {"Kidney L": 1}), 3, ()),
        (classes_scheme("x", {"left optic disc": 1}), 2, ()),
        (classes_scheme("x", {"bright spot": 1}), 2, (0, 1)),
    ],
)
def test_mirror_axes(scheme: object, dims: int, expected: tuple[int, ...]) -> None:
    assert choose_mirror_axes(scheme, dims)[0] == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("modalities", "expected", "reason"),
    [
        (("t1n", "t1c", "t2w", "t2f"), 0.2, "may lack a sequence"),
        (("t1c", "t2f"), 0.2, "may lack a sequence"),
        (("t1c",), 0, "one modality"),
        (("red", "green", "blue"), 0, "not known to be missing"),
        (("t2w", "adc"), 0, "not known to be missing"),
    ],
)
def test_modality_dropout(modalities: tuple[str, ...], expected: float, reason: str) -> None:
    chosen, why = choose_modality_dropout(modalities)
    assert chosen == expected
    assert reason in why


def test_strides_wait_for_coarse_axes_and_spare_short_ones() -> None:
    assert choose_strides((64, 64, 64), (1.0, 1.0, 1.0), 2) == ((2, 2, 2), (2, 2, 2))
    assert choose_strides((64, 64, 20), (0.5, 0.5, 2.0), 3) == ((2, 2, 1), (2, 2, 1), (2, 2, 2))
    assert choose_strides((32, 16, 7), (1.0, 1.0, 1.0), 3) == ((2, 2, 1), (2, 2, 1), (2, 1, 1))


def test_patch_limits() -> None:
    assert patch_limits((1.0, 1.0, 1.0), 64) == (64, 64, 64)
    assert patch_limits((0.5, 0.5, 4.0), 128) == (128, 128, 32)
    assert patch_limits((1.0, 1.0), 64) == (128, 128)
    assert (largest_batch(3, 2), largest_batch(2, 2)) == (2, 4)


def test_largest_patch_is_the_median_in_multiples() -> None:
    assert largest_patch((35, 51, 134), (64, 64, 64), (8, 8, 8)) == (40, 56, 64)
    assert largest_patch((35, 51, 134), (50, 50, 50), (8, 8, 8)) == (40, 48, 48)
    assert largest_patch((5, 5, 5), (8, 8, 8), (16, 16, 16)) == (16, 16, 16)


def test_patches_shrink_where_they_cover_most() -> None:
    patches = list(smaller_patches((32, 32), (32, 64), (8, 8)))

    assert patches == [(32, 32), (24, 32), (16, 32), (16, 24), (16, 16)]


class TwoConvs(nn.Module):
    """1 -> 4 -> 2 channels, kernel 1, ReLU between them; 8 + 10 parameters."""

    divisor = (1, 1, 1)

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(1, 4, 1)
        self.second = nn.Conv3d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu())


def mean_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return logits.mean()


def test_bytes_by_hand() -> None:
    voxels = 10**3
    shape = (1, 1, 10, 10, 10)

    cost = step_cost(TwoConvs, shape, mean_loss)
    assert cost.weights == 18 * 4
    assert cost.saved == 4 * voxels * (1 + 4)  # input and ReLU output; one storage each
    # At the widest moment of inference the first layer's output and its ReLU live beside the input.
    assert window_bytes(TwoConvs, shape) == 4 * voxels * (1 + 4 + 4)
    assert cost.window == window_bytes(TwoConvs, shape)
    # In the backward pass at the least: input and labels, ReLU output, its gradient, that of the logits.
    step = step_bytes(TwoConvs, shape, mean_loss)
    assert 4 * voxels * (1 + 4 + 4 + 2) < step < 4 * voxels * (1 + 4 + 4 + 4 + 2)
    assert cost.peak == step


def test_step_bytes_grow_with_the_patch_and_fall_with_checkpoints() -> None:
    def chain(*, is_checkpointed: bool) -> nn.Module:
        class Chain(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layers = nn.ModuleList([nn.Sequential(nn.Conv3d(2, 2, 1), nn.SiLU(), nn.SiLU()) for _ in range(8)])

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                for layer in self.layers:
                    if is_checkpointed:
                        x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
                    else:
                        x = layer(x)
                return x

        return Chain()

    plain = step_bytes(lambda: chain(is_checkpointed=False), (1, 2, 16, 16, 16), mean_loss)
    twice = step_bytes(lambda: chain(is_checkpointed=False), (2, 2, 16, 16, 16), mean_loss)
    checkpointed = step_bytes(lambda: chain(is_checkpointed=True), (1, 2, 16, 16, 16), mean_loss)

    assert twice == pytest.approx(2 * plain, rel=0.01)
    assert checkpointed < 0.6 * plain


def test_counting_allocates_nothing() -> None:
    """2048^3 voxels in 4 channels would be 128 GiB."""
    assert step_cost(TwoConvs, (1, 1, 2048, 2048, 2048), mean_loss).saved == 4 * 2048**3 * 5


def test_scaled_cost_keeps_weights_and_gradients() -> None:
    assert StepCost(weights=10, saved=100, peak=210, window=40).scaled(0.5) == StepCost(10, 50, 110, 20)


def test_memory_takes_the_largest_phase() -> None:
    cost = StepCost(weights=0, saved=2**30, peak=2**30, window=0)
    small = Volumes(channels=1, outputs=1, prepared_voxels=0, source_voxels=0)
    large = Volumes(channels=1, outputs=1, prepared_voxels=2**29, source_voxels=0)

    assert estimate_memory_gb(cost, small) == pytest.approx(0.92 + 0.18 + 1, abs=0.01)
    # Half a billion voxels: the image, 1.5 times a logit and a weight of all of them or of a quarter, three of a byte.
    assert estimate_memory_gb(cost, large) == pytest.approx(0.92 + 0.18 + (4 * (1 + 1.5 * 2) + 3) * 0.5, abs=0.01)
    in_slabs = estimate_memory_gb(cost, large, slab=slab_share((512, 1024, 1024), (128, 512, 1024)))
    assert in_slabs == pytest.approx(0.92 + 0.18 + (4 * (1 + 1.5 * 2 / 4) + 3) * 0.5, abs=0.01)
    for volumes in (small, large):  # a GPU holds a window of the volume
        assert estimate_memory_gb(cost, volumes, device=torch.device("cuda")) == pytest.approx(1.6, abs=0.01)


def test_weights_count_for_adam_and_the_moving_average() -> None:
    cost = StepCost(weights=2**30, saved=0, peak=0, window=0)
    nothing = Volumes(channels=1, outputs=1, prepared_voxels=0, source_voxels=0)

    with_average = estimate_memory_gb(cost, nothing)
    in_three_processes = estimate_memory_gb(cost, nothing, sample_processes=3)
    assert in_three_processes - with_average == pytest.approx(
        4.0 - 1.0
    )  # a validation has one copy of the weights more
    assert with_average - estimate_memory_gb(cost, nothing, has_average=False) == pytest.approx(1.0)


def test_plan_for_brats_like_data() -> None:
    plan = plan_training(fingerprint(cropped_shapes=((30, 40, 21),)), BRATS, TINY, memory_gb=4.0)

    assert plan.preprocessing.normalisation == "zscore-nonzero"
    assert plan.preprocessing.crop == "nonzero"
    assert plan.preprocessing.spacing_mm == (1.0, 1.0, 1.0)
    assert plan.mirror_axes == (0, 1, 2)
    assert plan.divisor == (4, 4, 4)
    assert plan.patch_size == (32, 32, 24)
    assert plan.batch_size == 2
    assert plan.arguments == {"mode": "plain"}
    assert 0.8 < plan.memory_gb < 4.0
    assert set(plan.reasons) == {
        "preprocessing.spacing_mm",
        "preprocessing.normalisation",
        "preprocessing.crop",
        "augmentation.mirror_axes",
        "augmentation.modality_dropout",
        "planning.patch_size",
        "planning.batch_size",
        "network.arguments",
    }
    assert all("\n" not in reason for reason in plan.reasons.values())
    assert Plan(**json.loads(plan.model_dump_json())) == plan


def test_plan_for_ct_has_the_window_of_the_foreground() -> None:
    plan = plan_training(fingerprint(is_ct=True), classes_scheme("x", {"liver": 1}), TINY, memory_gb=4.0)

    assert plan.preprocessing.normalisation == "ct-window"
    assert plan.preprocessing.crop == "none"
    assert plan.preprocessing.ct_window == (-50, 200)
    assert (plan.preprocessing.ct_mean, plan.preprocessing.ct_std) == (60, 30)


def test_what_the_user_chose_stays() -> None:
    chosen = PreprocessingConfig(spacing_mm=(2.0, 2.0, 2.0), normalisation="zscore", crop="none")
    request = PlanningRequest(
        "revmbunet",
        "tiny",
        arguments={"mode": "reversible", "strides": ((2, 2, 2), (2, 2, 1))},
        patch_size=(16, 16, 8),
        batch_size=3,
        preprocessing=chosen,
        mirror_axes=(1,),
        modality_dropout=0.1,
    )
    plan = plan_training(fingerprint(), BRATS, request, memory_gb=4.0)

    assert plan.preprocessing == chosen
    assert (plan.patch_size, plan.batch_size, plan.mirror_axes) == ((16, 16, 8), 3, (1,))
    assert plan.modality_dropout == 0.1
    assert plan.arguments == {"mode": "reversible", "strides": ((2, 2, 2), (2, 2, 1))}
    assert plan.divisor == (4, 4, 2)
    assert plan.reasons == {}


def test_less_memory_gives_a_smaller_mode_then_a_smaller_batch_then_a_smaller_patch() -> None:
    big = fingerprint((200, 200, 200), modalities=("t1n", "t1c", "t2w", "t2f"))
    request = PlanningRequest("revmbunet", "tiny", patch_limit=96)
    modes = [("plain", 1), ("checkpoint", 1), ("reversible", 1), ("reversible", 4)]

    memory_gb, ranks = 16.0, []
    for _ in range(9):
        plan = plan_training(big, BRATS, request, memory_gb)
        assert plan.memory_gb <= memory_gb
        mode = modes.index((plan.arguments["mode"], plan.arguments.get("chunks", 1)))
        ranks.append((-int(np.prod(plan.patch_size)), -plan.batch_size, mode))
        memory_gb = plan.memory_gb - 0.02

    assert ranks[0] == (-(96**3), -2, 0)
    assert ranks == sorted(ranks)
    assert len(set(ranks)) == 9
    assert {batch for _, batch, _ in ranks} == {-2, -1}
    assert ranks[-1][0] > -(96**3)
    assert "made smaller than 96 x 96 x 96 to fit" in plan.reasons["planning.patch_size"]


def test_too_little_memory_is_refused_with_the_least_that_is_needed() -> None:
    with pytest.raises(RequestError, match=r"revmbunet needs \d\.\d GB at the least, but 0\.5 GB may be used"):
        plan_training(fingerprint(), BRATS, TINY, memory_gb=0.5)


@pytest.mark.parametrize(
    ("patch", "message"),
    [((16, 16), "has 2 sizes; expected 3"), ((16, 16, 10), r"16 x 16 x 10 does not suit.*multiples of 4 x 4 x 4")],
)
def test_an_unsuitable_patch_is_refused(patch: tuple[int, ...], message: str) -> None:
    request = PlanningRequest("revmbunet", "tiny", patch_size=patch)

    with pytest.raises(RequestError, match=message):
        plan_training(fingerprint(), BRATS, request, memory_gb=4.0)


def test_short_axes_get_strides_of_their_own() -> None:
    plan = plan_training(fingerprint((32, 32, 6)), BRATS, TINY, memory_gb=4.0)

    assert plan.arguments["strides"] == ((2, 2, 1), (2, 2, 1))
    assert plan.patch_size == (32, 32, 6)
    assert "strides of 1 on axes" in plan.reasons["network.arguments"]


def test_pictures_are_planned_in_two_axes() -> None:
    plan = plan_training(fingerprint((300, 40)), classes_scheme("v", {"vessel": 1}), TINY, memory_gb=4.0)

    assert (plan.patch_size, plan.batch_size) == ((64, 40), 4)  # twice the limit for volumes, each
    assert plan.mirror_axes == (0, 1)
    assert plan.reasons["planning.batch_size"].startswith("the limit")
    assert plan.reasons["preprocessing.spacing_mm"] == "pictures have no spacing, and are not resampled"


@pytest.mark.parametrize(
    ("arguments", "memory_gb", "expected"),
    [
        ({}, 2.7, True),
        ({}, 2.5, False),
        ({"mode": "reversible"}, 2.7, True),
        ({"mode": "checkpoint"}, 4.9, False),
        ({"mode": "checkpoint"}, 5.1, True),
        ({"mode": "reversible", "chunks": 4}, 4.9, False),
    ],
)
def test_freed_memory_is_kept_where_there_is_room_for_gaps(
    arguments: dict[str, object], memory_gb: float, expected: bool
) -> None:
    assert has_room_to_keep(arguments, 2.0, memory_gb) is expected
