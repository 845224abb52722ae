"""Result folders of nnU-Net 2 whose network is STU-Net: cards, refusals, and masks through the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import nn

import segkit
import segkit.cli
from segkit.checkpoint.run_folder import load_card, model_folders
from segkit.checkpoint.transfer import load_weights
from segkit.errors import CheckpointError, RequestError
from segkit.preparing.preprocessing import LoadedCase
from segkit.reading.volume import Grid
from tests.helpers import run_segkit

PLANNED_STRIDES = [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2]]
OUR_STRIDES = ((1, 2, 2), (2, 2, 2), (2, 2, 2), (1, 1, 1), (1, 1, 1))


def make_network(channels: int = 1, outputs: int = 3, **arguments: object) -> nn.Module:
    shape = {"width": 2, "strides": OUR_STRIDES, **arguments}
    return segkit.build_model("stunet", in_channels=channels, out_channels=outputs, **shape)


def make_plans(**changes: Any) -> dict[str, Any]:
    """What nnU-Net 2.2 writes, without the entries that nobody reads here; `changes` are those of 3d_fullres."""
    configuration = {
        "batch_size": 2,
        "patch_size": [16, 32, 32],
        "spacing": [3.0, 1.0, 1.0],
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [True],
        "UNet_class_name": "PlainConvUNet",
        "num_pool_per_axis": [2, 3, 3],
        "pool_op_kernel_sizes": PLANNED_STRIDES,
        "conv_kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3], [3, 3, 3]],
    }
    return {
        "dataset_name": "Dataset007_Stairs",
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {
            "3d_fullres": {**configuration, **changes},
            "3d_bigger": {"inherits_from": "3d_fullres", "patch_size": [32, 64, 64]},
            "3d_cascade_fullres": {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"},
            "2d": {**configuration, "patch_size": [32, 32], "spacing": [1.0, 1.0]},
        },
        "foreground_intensity_properties_per_channel": {
            str(channel): {"mean": 40.0, "std": 20.0, "percentile_00_5": -10.0, "percentile_99_5": 90.0, "max": 200.0}
            for channel in range(2)
        },
    }


DATASET = {
    "channel_names": {"0": "FLAIR"},
    "labels": {"background": 0, "left": 1, "right": 2},
    "numTraining": 5,
    "licence": "CC0",
    "file_ending": ".nii.gz",
}


def write_result(
    result: Path,
    folds: tuple[str, ...] = ("fold_0",),
    *,
    network: nn.Module | None = None,
    plans: dict[str, Any] | None = None,
    dataset: dict[str, Any] = DATASET,
    trainer: str = "STUNetTrainer_small",
    configuration: str = "3d_fullres",
    name: str = "checkpoint_final.pth",
    **extra: object,
) -> Path:
    """A result of nnU-Net 2, with what its trainer saves beside the weights."""
    plans = plans or make_plans()
    for fold in folds:
        (result / fold).mkdir(parents=True)
        arguments = {"plans": plans, "configuration": configuration, "fold": 0, "dataset_json": dataset}
        document = {
            "network_weights": (network or make_network()).state_dict(),
            "optimizer_state": {"state": {}, "param_groups": [{"lr": 0.01, "momentum": 0.99}]},
            "grad_scaler_state": {"scale": 65536.0},
            "logging": {"ema_fg_dice": [np.float64(0.5)], "dice_per_class_or_region": [[np.float32(0.25)]]},
            "_best_ema": np.float64(0.5),
            "current_epoch": 1000,
            "init_args": {**arguments, "unpack_dataset": True, "device": torch.device("cuda", 0)},
            "trainer_name": trainer,
            "inference_allowed_mirroring_axes": (0, 1, 2),
            **extra,
        }
        torch.save(document, result / fold / name)
    (result / "plans.json").write_text(json.dumps(plans))
    (result / "dataset.json").write_text(json.dumps(dataset))
    return result


def test_card_says_what_the_plans_say(tmp_path: Path) -> None:
    card = load_card(write_result(tmp_path / "result"))
    assert (card.network.family, card.network.in_channels, card.network.out_channels) == ("stunet", 1, 3)
    assert card.network.arguments == {"strides": OUR_STRIDES, "width": 2, "depth": 1}
    assert (card.modalities, card.patch_size, card.divisor) == (("t2f",), (16, 32, 32), (4, 8, 8))
    preprocessing, segmentation = card.preprocessing, card.segmentation
    assert (preprocessing.spacing_mm, preprocessing.orientation) == ((3.0, 1.0, 1.0), "KJI")
    assert (preprocessing.normalisation, preprocessing.crop) == ("zscore-nonzero", "nonzero")
    assert (segmentation.mirror_axes, segmentation.activation) == ((0, 1, 2), "softmax")
    assert [(output.name, output.label) for output in card.outputs] == [("background", 0), ("left", 1), ("right", 2)]
    data = card.training_data
    assert (data.identity, data.licence, data.cases) == ("nnU-Net: Dataset007_Stairs", "CC0", 5)
    assert card.versions == {"nnunet": "2", "trainer": "STUNetTrainer_small"}


def test_model_has_the_weights_of_the_checkpoint(tmp_path: Path) -> None:
    network = make_network(depth=2)
    model = segkit.load_model(write_result(tmp_path / "result", network=network))
    assert not model.training
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in network.state_dict().items())


def test_sizes_go_by_their_names(tmp_path: Path) -> None:
    network = make_network(width=16)
    card = load_card(write_result(tmp_path / "result", network=network))
    assert (card.network.size, card.network.arguments) == ("S", {"strides": OUR_STRIDES})


def test_plans_inside_the_checkpoint_will_do(tmp_path: Path) -> None:
    result = write_result(tmp_path / "result")
    expected = load_card(result)
    (result / "plans.json").unlink()
    (result / "dataset.json").unlink()
    assert load_card(result) == expected


def test_configurations_inherit_and_new_plans_keep_strides_elsewhere(tmp_path: Path) -> None:
    """nnU-Net 2.4 and later write an `architecture`, and 2.3 and later let configurations inherit."""
    plans = make_plans(pool_op_kernel_sizes=None, architecture={"arch_kwargs": {"strides": [[1, 1, 1], [2, 2, 2]]}})
    card = load_card(write_result(tmp_path / "result", plans=plans, configuration="3d_bigger"))
    assert card.patch_size == (32, 64, 64)
    assert card.network.arguments["strides"] == ((2, 2, 2), *((1, 1, 1),) * 4)


@pytest.mark.parametrize(
    ("reader", "transpose", "orientation"),
    [
        ("SimpleITKIO", [0, 1, 2], "KJI"),
        ("NibabelIO", [2, 0, 1], "IKJ"),
        ("NibabelIOWithReorient", [0, 1, 2], "SAR"),
        ("SimpleITKIOWithReorient", [1, 0, 2], "ASR"),
    ],
)
def test_axes_are_those_that_the_reader_gave(
    tmp_path: Path, reader: str, transpose: list[int], orientation: str
) -> None:
    plans = {**make_plans(), "image_reader_writer": reader, "transpose_forward": transpose}
    assert load_card(write_result(tmp_path / "result", plans=plans)).preprocessing.orientation == orientation


@pytest.mark.parametrize(
    ("schemes", "masks", "expected"),
    [
        (["ZScoreNormalization"], [True], ("zscore-nonzero", None, None, None)),
        (["ZScoreNormalization"], [False], ("zscore", None, None, None)),
        (["CTNormalization"], [False], ("ct-window", (-10.0, 90.0), 40.0, 20.0)),
    ],
)
def test_normalisation(tmp_path: Path, schemes: list[str], masks: list[bool], expected: tuple[object, ...]) -> None:
    plans = make_plans(normalization_schemes=schemes, use_mask_for_norm=masks)
    found = load_card(write_result(tmp_path / "result", plans=plans)).preprocessing
    assert (found.normalisation, found.ct_window, found.ct_mean, found.ct_std) == expected


@pytest.mark.parametrize(
    ("schemes", "masks", "found"),
    [
        (["RescaleTo01Normalization"], [False], "RescaleTo01Normalization;"),
        (["NoNormalization"], [False], "NoNormalization;"),
        (
            ["CTNormalization", "ZScoreNormalization"],
            [False, False],
            "CTNormalization, ZScoreNormalization, which diff",
        ),
        (["ZScoreNormalization"] * 2, [False, True], "ZScoreNormalization, which differs from channel to channel;"),
    ],
)
def test_other_normalisations_are_refused(tmp_path: Path, schemes: list[str], masks: list[bool], found: str) -> None:
    plans = make_plans(normalization_schemes=schemes, use_mask_for_norm=masks)
    dataset = {**DATASET, "channel_names": {str(number): f"mr{number}" for number in range(len(schemes))}}
    result = write_result(tmp_path / "result", network=make_network(len(schemes)), plans=plans, dataset=dataset)
    with pytest.raises(CheckpointError, match=f"images are normalised with {found}"):
        load_card(result)


def test_regions_are_painted_in_their_order(tmp_path: Path) -> None:
    dataset = {
        "channel_names": {"0": "T1", "1": "T1ce"},
        "labels": {"background": 0, "whole_tumor": [1, 2, 3], "tumor_core": [2, 3], "enhancing": 3, "ignore": 4},
        "regions_class_order": [1, 2, 3],
    }
    plans = make_plans(normalization_schemes=["ZScoreNormalization"] * 2, use_mask_for_norm=[True] * 2)
    card = load_card(write_result(tmp_path / "result", network=make_network(2), plans=plans, dataset=dataset))
    assert card.segmentation.activation == "sigmoid"
    assert [(output.name, output.label, output.members) for output in card.outputs] == [
        ("whole_tumor", 1, (1, 2, 3)),
        ("tumor_core", 2, (2, 3)),
        ("enhancing", 3, (3,)),
    ]
    assert set(card.scheme().values.values()) == {1, 2, 3}


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"trainer": "nnUNetTrainer"}, r"the network of nnUNetTrainer is not STU-Net.*Segment with nnU-Net itself"),
        ({"configuration": "2d"}, "is a network of slices; expected one of volumes"),
        ({"configuration": "3d_cascade_fullres"}, "3d_cascade_fullres needs the masks of 3d_lowres as input"),
        ({"configuration": "3d_fulres"}, r"its plans cannot be understood \(KeyError: '3d_fulres'\)"),
        ({"network": make_network(outputs=4)}, "the network has 4 outputs, but its dataset.json names 3"),
        ({"network": make_network(2)}, "the network has 2 image channels, but its dataset.json names 1"),
        ({"network": nn.Linear(2, 2)}, "holds no STU-Net of volumes"),
        ({"dataset": {"labels": {"background": 0}}}, "names no image channels"),
        ({"dataset": {**DATASET, "labels": {"background": 0, "a": 1, "b": 3}}}, "its label values have gaps"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path: Path, changes: dict[str, Any], found: str) -> None:
    with pytest.raises(CheckpointError, match=found):
        load_card(write_result(tmp_path / "result", **changes))


def test_folds_make_an_ensemble(tmp_path: Path) -> None:
    result = write_result(tmp_path / "result", ("fold_10", "fold_2", "fold_all"))
    (result / "fold_3").mkdir()
    assert model_folders(result) == [result / "fold_2", result / "fold_10"]
    assert len(segkit.Predictor.load(result).digests) == 2
    with pytest.raises(CheckpointError, match=r"holds 2 models \(fold_2, fold_10\). Name one of its folders"):
        load_card(result)
    assert load_card(result / "fold_2").network.family == "stunet"
    trained_on_all = write_result(tmp_path / "all", ("fold_all",), name="checkpoint_best.pth")
    assert model_folders(trained_on_all) == [trained_on_all / "fold_all"]
    assert load_card(trained_on_all).network.family == "stunet"


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, burglar: Callable[[Path], object]) -> None:
    result = write_result(tmp_path / "result", my_hook=burglar(tmp_path / "was_here"))
    for load in (load_card, segkit.load_model, segkit.Predictor.load):
        with pytest.raises(CheckpointError, match=r"carries code.*nothing in it was run"):
            load(result)
    assert not (tmp_path / "was_here").exists()


def test_a_result_is_a_place_to_begin_from(tmp_path: Path) -> None:
    """Its modalities and labels are known, so channels and heads find their like."""
    dataset = {**DATASET, "channel_names": {"0": "T1ce", "1": "FLAIR"}}
    plans = make_plans(normalization_schemes=["ZScoreNormalization"] * 2, use_mask_for_norm=[True] * 2)
    source = make_network(2)
    result = write_result(tmp_path / "result", network=source, plans=plans, dataset=dataset)
    network = make_network(1)
    report = load_weights(network, result, modalities=["t2f"], outputs=["background", "left", "other"])
    name = "conv_blocks_context.0.0.conv3.weight"
    assert torch.equal(network.state_dict()[name], source.state_dict()[name][:, 1:])
    assert (len(report.loaded), len(report.adapted), len(report.missing)) == (118, 2, 10)
    assert (
        report.notes[0]
        == "heads not loaded: the outputs of the file are background, left, right, not background, left, other"
    )
    assert len(load_weights(network, result, outputs=["background", "left", "right"]).loaded) == 128


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    """A brain of noise in a box of zeros, turned and anisotropic: axes I, J, K of 1 x 1 x 3 mm."""
    values = np.zeros((30, 28, 12), np.float32)
    values[2:27, 1:26, 1:11] = np.random.default_rng(0).normal(100, 20, (25, 25, 10))
    affine = np.array([[0, 1.0, 0, 5], [-1.0, 0, 0, 7], [0, 0, -3.0, 9], [0, 0, 0, 1]])
    folder = tmp_path / "scans"
    folder.mkdir()
    nib.save(nib.Nifti1Image(values, affine), folder / "case_0000.nii.gz")
    return folder / "case_0000.nii.gz"


def test_the_network_sees_the_axes_of_its_training(tmp_path: Path, scan: Path) -> None:
    """nnU-Net's own way, written out: reverse the axes, crop, z-score inside the mask."""
    predictor = segkit.Predictor.load(write_result(tmp_path / "result"))
    image = nib.load(scan)
    values = np.asarray(image.dataobj)
    loaded = LoadedCase("case", values[None], None, Grid(values.shape, image.affine), (True,))
    box = values.transpose(2, 1, 0)[1:11, 1:26, 2:27]
    expected = (box - box.mean()) / box.std()
    np.testing.assert_allclose(predictor.prepare(loaded).image[0], expected, rtol=1e-5, atol=1e-5)


def test_infer_paints_what_the_network_says(tmp_path: Path, scan: Path) -> None:
    network = make_network()
    result = write_result(tmp_path / "result", network=network)
    assert run_segkit("infer", "-m", result, "-i", scan.parent, "-o", tmp_path / "masks", "-d", "cpu", "-q") == 0
    image, mask = nib.load(scan), nib.load(tmp_path / "masks" / "case.nii.gz")
    np.testing.assert_allclose(mask.affine, image.affine)
    box = np.asarray(image.dataobj).transpose(2, 1, 0)[1:11, 1:26, 2:27]
    padded = np.zeros((16, 32, 32), np.float32)  # one window of the plan's patch
    padded[3:13, 3:28, 3:28] = (box - box.mean()) / box.std()
    with torch.no_grad():
        logits = network.eval()(torch.from_numpy(padded)[None, None])[0]
    expected = np.zeros((12, 28, 30), np.uint8)
    expected[1:11, 1:26, 2:27] = logits.argmax(0).numpy()[3:13, 3:28, 3:28]
    painted = np.asarray(mask.dataobj)
    assert painted.any()
    assert (painted == expected.transpose(2, 1, 0)).mean() > 0.999


def test_infer_with_the_folds_of_a_cross_validation(tmp_path: Path, scan: Path) -> None:
    result = write_result(tmp_path / "result", ("fold_0", "fold_1"))
    out = tmp_path / "masks"
    assert run_segkit("infer", "-m", result, "-i", scan.parent, "-o", out, "-d", "cpu", "-q") == 0
    assert json.loads((out / "manifest.json").read_text())["summary"]["done"] == 1


def test_infer_with_another_network_of_nnunet_is_a_wrong_request(
    tmp_path: Path, scan: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = write_result(tmp_path / "result", trainer="nnUNetTrainer")
    assert run_segkit("infer", "-m", result, "-i", scan.parent, "-o", tmp_path / "masks", "-d", "cpu") == 2
    assert "the network of nnUNetTrainer is not STU-Net" in capsys.readouterr().err
    assert not (tmp_path / "masks").exists()


def test_members_of_an_ensemble_must_agree(tmp_path: Path) -> None:
    one = write_result(tmp_path / "one")
    other = write_result(tmp_path / "other", plans=make_plans(spacing=[1.0, 1.0, 1.0]))
    with pytest.raises(RequestError, match=r"differs from .* in spacing_mm"):
        segkit.Predictor.load([one, other])
