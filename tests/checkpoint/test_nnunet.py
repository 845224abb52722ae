"""Results folders of nnU-Net 2: cards, networks, refusals, and masks of a STU-Net through the command line."""

from __future__ import annotations

import json
import pickle
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
from segkit.checkpoint.nnunet import open_results
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
        "UNet_base_num_features": 2,
        "unet_max_num_features": 8,
        "n_conv_per_stage_encoder": [2, 2, 2, 2],
        "n_conv_per_stage_decoder": [2, 2, 2],
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
    ("schemes", "masks"),
    [
        (["RescaleTo01Normalization"], [False]),
        (["NoNormalization"], [False]),
        (["CTNormalization", "ZScoreNormalization"], [False, False]),
        (["ZScoreNormalization"] * 2, [False, True]),
    ],
)
def test_other_normalisations_are_left_out_of_the_card(tmp_path: Path, schemes: list[str], masks: list[bool]) -> None:
    plans = make_plans(normalization_schemes=schemes, use_mask_for_norm=masks)
    dataset = {**DATASET, "channel_names": {str(number): f"mr{number}" for number in range(len(schemes))}}
    result = write_result(tmp_path / "result", network=make_network(len(schemes)), plans=plans, dataset=dataset)
    assert load_card(result).preprocessing.normalisation is None


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
        ({"configuration": "2d"}, "holds no STU-Net of 2 axes"),
        ({"configuration": "3d_cascade_fullres"}, "has 1 image channels, but its dataset.json names 3"),
        ({"configuration": "3d_fulres"}, r"its plans cannot be understood \(KeyError: '3d_fulres'\)"),
        ({"network": make_network(outputs=4)}, "the network has 4 outputs, but its dataset.json names 3"),
        ({"network": make_network(2)}, "the network has 2 image channels, but its dataset.json names 1"),
        ({"network": nn.Linear(2, 2)}, "holds no PlainConvUNet of 3 axes"),
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
    request = ("infer", "-m", result, "-i", scan.parent, "-o", tmp_path / "masks", "-d", "cpu", "-q", "--no-tta")
    assert run_segkit(*request, "--backend", "torch") == 0
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
    request = ("infer", "-m", result, "-i", scan.parent, "-o", out, "-d", "cpu", "-q", "--backend", "torch")
    assert run_segkit(*request) == 0
    assert json.loads((out / "manifest.json").read_text())["summary"]["done"] == 1


def test_infer_with_an_unknown_network_is_a_wrong_request(
    tmp_path: Path, scan: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plans = make_plans(UNet_class_name="nnunetv2.nets.UMambaBot.UMambaBot")
    result = write_result(tmp_path / "result", network=nn.Linear(2, 2), plans=plans)
    assert run_segkit("infer", "-m", result, "-i", scan.parent, "-o", tmp_path / "masks", "-d", "cpu") == 2
    assert "the network UMambaBot is not known; expected STU-Net or one of PlainConvUNet" in capsys.readouterr().err
    assert not (tmp_path / "masks").exists()


def test_members_of_an_ensemble_must_agree(tmp_path: Path) -> None:
    one = write_result(tmp_path / "one")
    other = write_result(tmp_path / "other", plans=make_plans(spacing=[1.0, 1.0, 1.0]))
    with pytest.raises(RequestError, match=r"differs from .* in spacing_mm"):
        segkit.Predictor.load([one, other])


def plain_network() -> nn.Module:
    """The network that `make_plans` names: widths 2, 4, 8, 8."""
    kernels = ((1, 3, 3), *((3, 3, 3),) * 3)
    shape = {"widths": (2, 4, 8, 8), "kernels": kernels, "strides": ((1, 2, 2), (2, 2, 2), (2, 2, 2))}
    return segkit.build_model("plainunet", in_channels=1, out_channels=3, **shape)


def test_plans_before_version_2_4_name_a_plain_network(tmp_path: Path) -> None:
    network = plain_network()
    result = write_result(tmp_path / "result", network=network, trainer="nnUNetTrainer")
    card = load_card(result)
    assert (card.network.family, card.divisor) == ("plainunet", (4, 8, 8))
    model = segkit.load_model(result)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in network.state_dict().items())


def test_second_names_are_dropped_and_heads_of_training_may_be_absent(tmp_path: Path) -> None:
    weights = plain_network().state_dict()
    weights |= {f"decoder.{name}": tensor for name, tensor in weights.items() if name.startswith("encoder.")}
    weights |= {"encoder.stages.0.0.convs.0.all_modules.0.weight": torch.ones(1)}
    for name in [name for name in weights if name.startswith(("decoder.seg_layers.0.", "decoder.seg_layers.1."))]:
        del weights[name]
    model = segkit.load_model(write_result(tmp_path / "result", network_weights=weights))
    assert torch.equal(model.state_dict()["decoder.seg_layers.2.weight"], weights["decoder.seg_layers.2.weight"])
    del weights["decoder.seg_layers.2.bias"]
    with pytest.raises(CheckpointError, match=r"do not fit 'plainunet'.*seg_layers\.2\.bias"):
        segkit.load_model(write_result(tmp_path / "other", network_weights=weights))


def architecture(name: str, **changes: object) -> dict[str, Any]:
    """What nnU-Net 2.4 and later write about a network of two stages."""
    arguments = {
        **{"n_stages": 2, "features_per_stage": [2, 4], "kernel_sizes": [[3, 3, 3]] * 2, "conv_bias": True},
        **{"strides": [[1, 1, 1], [2, 2, 2]], "n_blocks_per_stage": [1, 2], "n_conv_per_stage_decoder": [1]},
        **{"norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d", "norm_op_kwargs": {"eps": 1e-5, "affine": True}},
        **{
            "conv_op": "torch.nn.modules.conv.Conv3d",
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
    }
    return {"network_class_name": f"anywhere.{name}", "arch_kwargs": {**arguments, **changes}}


def test_batch_norm_and_bottlenecks_are_taken_from_weights_and_plans(tmp_path: Path) -> None:
    """The plans of nnUNetTrainerBN name instance norm."""
    shape = {"widths": (2, 4), "blocks": (1, 2), "bottleneck_widths": (3, 3), "norm": "batch", "slope": 0.0}
    network = segkit.build_model("resencunet", in_channels=1, out_channels=3, **shape)
    changes = {"block": "dna.BottleneckD", "bottleneck_channels": 3, "nonlin": "torch.nn.ReLU"}
    plans = make_plans(architecture=architecture("ResidualEncoderUNet", **changes))
    result = write_result(tmp_path / "result", network=network, plans=plans, trainer="nnUNetTrainerBN")
    loaded, x = segkit.load_model(result), torch.randn(1, 1, 4, 4, 4)
    with torch.no_grad():
        assert torch.equal(loaded(x), network.eval()(x))


@pytest.mark.parametrize(
    ("plans", "found"),
    [
        (make_plans(preprocessor_name="MyPreprocessor"), "preprocessor_name is MyPreprocessor, which segkit lacks"),
        ({**make_plans(), "image_reader_writer": "Tiff3DIO"}, "image_reader_writer is Tiff3DIO"),
        ({**make_plans(), "label_manager": "MyLabels"}, "label_manager is MyLabels"),
        (make_plans(normalization_schemes=["MyNorm"]), "normalization_schemes is MyNorm"),
        (make_plans(resampling_fn_data="my_resampling"), "resampling_fn_data is my_resampling"),
        (make_plans(resampling_fn_data_kwargs={"order_z": 1}), "resamples data with order_z 1; expected order_z 0"),
        (make_plans(resampling_fn_probabilities_kwargs={"order": 3}), "resamples probabilities with order 3"),
        (make_plans(resampling_fn_seg_kwargs={"is_seg": False}), "resamples seg with is_seg False"),
        (make_plans(resampling_fn_data_kwargs={"mode": "nearest"}), "resamples data with mode nearest"),
        (make_plans(architecture=architecture("Primus")), "the network Primus is not known"),
        (
            make_plans(
                architecture=architecture("ResidualEncoderUNet", norm_op="torch.nn.GroupNorm", block="a.MyBlock")
            ),
            "ResidualEncoderUNet has norm_op GroupNorm, block MyBlock, which segkit lacks",
        ),
        (
            make_plans(
                architecture=architecture("ResidualEncoderUNet", squeeze_excitation=True, nonlin="torch.nn.GELU")
            ),
            "ResidualEncoderUNet has squeeze_excitation, nonlin GELU, which segkit lacks",
        ),
    ],
)
def test_code_that_segkit_lacks_is_refused_by_name(tmp_path: Path, plans: dict[str, Any], found: str) -> None:
    network = segkit.build_model("resencunet", in_channels=1, out_channels=3, widths=(2, 4), blocks=(1, 2))
    with pytest.raises(CheckpointError, match=found):
        load_card(write_result(tmp_path / "result", network=network, plans=plans))


def test_notices_name_what_is_not_honoured(tmp_path: Path, burglar: Callable[[Path], object]) -> None:
    result = write_result(tmp_path / "result", network=plain_network(), trainer="nnUNetTrainer_ours")
    folder = result / "crossval_results_folds_0_1"
    folder.mkdir()
    (folder / "postprocessing.pkl").write_bytes(pickle.dumps(burglar(tmp_path / "was_here")))
    trainer, pickled = open_results(result).notices
    assert trainer.startswith("trainer nnUNetTrainer_ours is not known")
    assert pickled.startswith(f"{Path('crossval_results_folds_0_1', 'postprocessing.pkl')}: ignored")
    assert not (tmp_path / "was_here").exists()


@pytest.mark.parametrize(
    "trainer",
    ["nnUNetTrainer", "nnUNetTrainer_onlyMirror01_1500ep", "nnUNetTrainerDA5Segord0", "nnUNetTrainerAdan1en3"],
)
def test_trainers_of_nnunet_itself_are_known(tmp_path: Path, trainer: str) -> None:
    assert open_results(write_result(tmp_path / "result", network=plain_network(), trainer=trainer)).notices == ()


def test_folds_and_checkpoints_are_chosen_by_name(tmp_path: Path) -> None:
    result = write_result(tmp_path / "result", ("fold_0", "fold_1", "fold_all"))
    (result / "fold_1" / "checkpoint_best.pth").write_bytes((result / "fold_1" / "checkpoint_final.pth").read_bytes())
    names = [path.relative_to(result).as_posix() for path in open_results(result).checkpoints]
    assert names == ["fold_0/checkpoint_final.pth", "fold_1/checkpoint_final.pth"]
    assert open_results(result, ["all"]).checkpoints == (result / "fold_all" / "checkpoint_final.pth",)
    chosen = open_results(result, ["1"], "checkpoint_best")
    assert (chosen.checkpoints, chosen.configuration_name) == (
        (result / "fold_1" / "checkpoint_best.pth",),
        "3d_fullres",
    )
    with pytest.raises(CheckpointError, match=r"fold_0: has no checkpoint_best"):
        open_results(result, checkpoint="checkpoint_best")


def test_show_says_what_a_folder_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = write_result(tmp_path / "result", ("fold_0", "fold_1"), network=plain_network(), trainer="Mine")
    assert run_segkit("models", "show", result, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["kind"], found["trainer"], found["models"]) == ("results of nnU-Net 2", "Mine", ["fold_0", "fold_1"])
    assert (found["channels"], found["spacing_mm"], found["orientation"]) == ({"0000": "t2f"}, [3.0, 1.0, 1.0], "KJI")
    assert found["not_honoured"] == ["trainer Mine is not known: masks differ if it changes more than the training"]
    assert run_segkit("models", "show", result) == 0
    assert "outputs:        background 0, left 1, right 2\n" in capsys.readouterr().out
    assert run_segkit("models", "show", tmp_path) == 2
    assert run_segkit("models", "show") == 2
