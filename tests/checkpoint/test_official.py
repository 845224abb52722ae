"""Synthetic files with the names and shapes of the published ones: STU-Net's of every size, LVM-Med's encoders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import segkit
from segkit.checkpoint.model import WeightSource
from segkit.checkpoint.transfer import load_weights, plan_transfer
from segkit.errors import CheckpointError

SIZES = {"S": (16, 1), "B": (32, 1), "L": (64, 2), "H": (96, 3)}
TENSORS = {"S": 130, "B": 130, "L": 218, "H": 306}
PARAMETERS = {"S": 14_596_941, "B": 58_262_669, "L": 440_302_605, "H": 1_457_326_221}


def stunet_shapes(width: int, depth: int, channels: int = 1, outputs: int = 105) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a released STU-Net, written from the description of its state dict."""
    widths = [width * multiple for multiple in (1, 2, 4, 8, 16, 16)]
    shapes: dict[str, tuple[int, ...]] = {}

    def stage(prefix: str, inputs: int, own: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        for block in range(depth):
            for layer, shape in (
                ("conv1", (own, inputs if block == 0 else own, 3, 3, 3)),
                ("norm1", (own,)),
                ("conv2", (own, own, 3, 3, 3)),
                ("norm2", (own,)),
                *([("conv3", (own, inputs, 1, 1, 1))] if block == 0 else []),
            ):
                yield f"{prefix}.{block}.{layer}.weight", shape
                yield f"{prefix}.{block}.{layer}.bias", (own,)

    for level, (inputs, own) in enumerate(zip([channels, *widths], widths, strict=False)):
        shapes |= stage(f"conv_blocks_context.{level}", inputs, own)
    for step in range(5):
        below, own = widths[5 - step], widths[4 - step]
        shapes[f"upsample_layers.{step}.conv.weight"] = (own, below, 1, 1, 1)
        shapes[f"upsample_layers.{step}.conv.bias"] = (own,)
        shapes |= stage(f"conv_blocks_localization.{step}", 2 * own, own)
        shapes[f"seg_outputs.{step}.weight"] = (outputs, own, 1, 1, 1)
        shapes[f"seg_outputs.{step}.bias"] = (outputs,)
    return shapes


def filled(shapes: Mapping[str, tuple[int, ...]], device: str = "cpu") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    if device == "meta":
        return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    return {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("size", SIZES)
def test_every_size_loads_by_name_and_shape(size: str) -> None:
    """On the meta device, where even the largest needs no memory."""
    tensors = filled(stunet_shapes(*SIZES[size]), "meta")
    assert (len(tensors), sum(tensor.numel() for tensor in tensors.values())) == (TENSORS[size], PARAMETERS[size])
    with torch.device("meta"):
        same = segkit.build_model("stunet", size=size, in_channels=1, out_channels=105)
        other = segkit.build_model("stunet", size=size, in_channels=4, out_channels=3, strides=((1, 2, 2),) * 5)
    report, _ = plan_transfer(same, WeightSource(Path("official.model"), tensors))
    assert (len(report.loaded), report.adapted, report.skipped, report.missing) == (TENSORS[size], (), (), ())
    report, _ = plan_transfer(other, WeightSource(Path("official.model"), tensors))
    assert report.adapted == ("conv_blocks_context.0.0.conv1.weight", "conv_blocks_context.0.0.conv3.weight")
    heads = {f"seg_outputs.{step}.{kind}" for step in range(5) for kind in ("weight", "bias")}
    assert set(report.skipped) == set(report.missing) == heads
    assert len(report.loaded) == TENSORS[size] - 12


@pytest.fixture(scope="module")
def small() -> dict[str, Tensor]:
    return filled(stunet_shapes(*SIZES["S"]))


def write_official(folder: Path, kind: str, weights: Mapping[str, Tensor]) -> Path:
    """The file that the trainer of version 1 (`.model`) or 2 (`.pth`) writes, losses in numpy's numbers."""
    if kind == ".model":
        document = {
            "epoch": 4000,
            "state_dict": weights,
            "optimizer_state_dict": {"state": {}, "param_groups": [{"lr": 1e-4}]},
            "lr_scheduler_state_dict": None,
            "plot_stuff": ([np.float64(-0.7)], [np.float32(-0.6)], [], [np.array([0.8])]),
            "best_stuff": (None, np.float64(0.8), np.float64(-0.5)),
        }
    else:
        document = {
            "network_weights": weights,
            "optimizer_state": {"state": {}, "param_groups": [{"lr": 1e-4}]},
            "grad_scaler_state": {"scale": 65536.0},
            "logging": {"train_losses": [np.float32(-0.7)]},
            "_best_ema": np.float64(0.8),
            "current_epoch": 1000,
            "init_args": {"configuration": "3d_fullres", "fold": 0, "device": torch.device("cuda", 0)},
            "trainer_name": "STUNetTrainer_small",
            "inference_allowed_mirroring_axes": (0, 1, 2),
        }
    torch.save(document, folder / f"small{kind}")
    return folder / f"small{kind}"


@pytest.mark.parametrize("kind", [".model", ".pth"])
def test_official_files_load_strictly(tmp_path: Path, small: dict[str, Tensor], kind: str) -> None:
    path = write_official(tmp_path, kind, {f"module.{name}": tensor for name, tensor in small.items()})
    network = segkit.build_model("stunet", size="S", in_channels=1, out_channels=105)
    report = load_weights(network, path)
    assert len(report.loaded) == 130
    assert all(torch.equal(tensor, small[name]) for name, tensor in network.state_dict().items())


def test_fine_tuning_as_stunet_does_it(tmp_path: Path, small: dict[str, Tensor]) -> None:
    """Kernels repeated for four channels without dividing, heads fresh though their number fits."""
    path = write_official(tmp_path, ".model", small)
    network = segkit.build_model("stunet", size="S", in_channels=4, out_channels=105)
    load_weights(network, path, input_adapt="repeat", heads="skip")
    state = network.state_dict()
    for name in ("conv_blocks_context.0.0.conv1.weight", "conv_blocks_context.0.0.conv3.weight"):
        assert torch.equal(state[name], small[name].repeat(1, 4, 1, 1, 1))
    assert not torch.equal(state["seg_outputs.4.weight"], small["seg_outputs.4.weight"])
    assert torch.equal(state["upsample_layers.4.conv.weight"], small["upsample_layers.4.conv.weight"])


def test_a_file_of_the_wrong_size_names_what_differs(tmp_path: Path, small: dict[str, Tensor]) -> None:
    path = write_official(tmp_path, ".model", small)
    with torch.device("meta"):
        base = segkit.build_model("stunet", size="B", in_channels=1, out_channels=105)
    shape = (
        r"conv_blocks_context\.0\.0\.conv1\.weight: 16 x 1 x 3 x 3 x 3 in the file, 32 x 1 x 3 x 3 x 3 in the network"
    )
    with pytest.raises(CheckpointError, match=shape):
        load_weights(base, path)


def resnet50_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of torchvision's ResNet-50 with its classifier, under which LVM-Med publishes its encoder."""
    shapes: dict[str, tuple[int, ...]] = {}

    def convolution(name: str, norm: str, outputs: int, inputs: int, kernel: int) -> None:
        shapes[f"{name}.weight"] = (outputs, inputs, kernel, kernel)
        shapes.update({f"{norm}.{kind}": (outputs,) for kind in ("weight", "bias", "running_mean", "running_var")})
        shapes[f"{norm}.num_batches_tracked"] = ()

    convolution("conv1", "bn1", 64, 3, 7)
    inputs = 64
    for layer, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), start=1):
        for block in range(blocks):
            prefix = f"layer{layer}.{block}"
            for number, (into, out, kernel) in enumerate(
                ((inputs, width, 1), (width, width, 3), (width, 4 * width, 1)), start=1
            ):
                convolution(f"{prefix}.conv{number}", f"{prefix}.bn{number}", out, into, kernel)
            if block == 0:
                convolution(f"{prefix}.downsample.0", f"{prefix}.downsample.1", 4 * width, inputs, 1)
            inputs = 4 * width
    return {**shapes, "fc.weight": (1000, 2048), "fc.bias": (1000,)}


@pytest.fixture(scope="module")
def resnet50() -> dict[str, Tensor]:
    tensors = filled(resnet50_shapes())
    assert len(tensors) == 318 + 2
    return {name: tensor.long() if name.endswith("tracked") else tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("channels", [3, 1, 4])
def test_lvm_med_resnet50_into_a_planar_network(tmp_path: Path, resnet50: dict[str, Tensor], channels: int) -> None:
    """As loading the three channels first and then adapting them would give."""
    torch.save(resnet50, tmp_path / "lvmmed_resnet.torch")
    network = segkit.build_model("smp", size="unet-resnet50", in_channels=channels, out_channels=2, dims=2)
    report = load_weights(network, tmp_path / "lvmmed_resnet.torch")
    assert report.skipped == ("fc.weight", "fc.bias")
    assert len(report.loaded) + len(report.adapted) == 318
    assert report.missing
    assert all(name.startswith(("decoder.", "segmentation_head.")) for name in report.missing)
    state, stem = network.state_dict(), resnet50["conv1.weight"]
    expected = {3: stem, 1: stem.sum(1, keepdim=True), 4: torch.cat([stem, stem[:, :1]], 1) * 3 / 4}[channels]
    torch.testing.assert_close(state["encoder.conv1.weight"], expected)
    assert torch.equal(state["encoder.layer4.2.bn3.running_var"], resnet50["layer4.2.bn3.running_var"])


def test_lvm_med_resnet50_slice_by_slice(tmp_path: Path, resnet50: dict[str, Tensor]) -> None:
    torch.save({f"module.{name}": tensor for name, tensor in resnet50.items()}, tmp_path / "lvmmed_resnet.torch")
    arguments = {"in_channels": 1, "out_channels": 2, "dims": 3, "neighbours": 1}
    network = segkit.build_model("smp", size="unet-resnet50", **arguments)
    report = load_weights(
        network, tmp_path / "lvmmed_resnet.torch", modalities=["t2f"], source_modalities=["r", "g", "b"]
    )
    assert report.adapted == (), "one channel with its neighbours makes the three that the encoder knows"
    assert torch.equal(network.state_dict()["encoder.conv1.weight"], resnet50["conv1.weight"])


def vit_shapes(width: int = 768, depth: int = 12, heads: int = 12) -> dict[str, tuple[int, ...]]:
    """Names and shapes of SAM's ViT-B image encoder without position table, under which LVM-Med publishes its own."""
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embed.proj.weight": (width, 3, 16, 16),
        "patch_embed.proj.bias": (width,),
    }
    for block in range(depth):
        tokens = 64 if block in (2, 5, 8, 11) else 14
        for name, shape in (
            ("norm1", (width,)),
            ("attn.qkv", (3 * width, width)),
            ("attn.proj", (width, width)),
            ("norm2", (width,)),
            ("mlp.lin1", (4 * width, width)),
            ("mlp.lin2", (width, 4 * width)),
        ):
            shapes[f"blocks.{block}.{name}.weight"] = shape
            shapes[f"blocks.{block}.{name}.bias"] = shape[:1]
        for axis in "hw":
            shapes[f"blocks.{block}.attn.rel_pos_{axis}"] = (2 * tokens - 1, width // heads)
    for layer, shape in enumerate([(256, width, 1, 1), (256,), (256, 256, 3, 3), (256,)]):
        shapes[f"neck.{layer}.weight"] = shape
        if len(shape) == 1:
            shapes[f"neck.{layer}.bias"] = shape
    return shapes


def test_lvm_med_vit() -> None:
    tensors = filled(vit_shapes(), "meta")
    assert len(tensors) == 176
    with torch.device("meta"):
        network = segkit.build_model("vit", in_channels=3, out_channels=2, dims=2)
    report, _ = plan_transfer(network, WeightSource(Path("lvmmed_vit.pth"), tensors))
    assert (len(report.loaded), report.adapted, report.skipped) == (176, (), ())
    assert report.missing
    assert all(name.startswith(("decoder.", "heads.")) for name in report.missing)
    assert report.notes == ("the file holds an encoder",)


def test_the_image_encoder_of_sam_without_its_positions() -> None:
    tensors = filled({f"image_encoder.{name}": shape for name, shape in vit_shapes().items()}, "meta")
    tensors |= filled({"image_encoder.pos_embed": (1, 64, 64, 768), "mask_decoder.iou_token.weight": (1, 256)}, "meta")
    with torch.device("meta"):
        network = segkit.build_model("vit", in_channels=1, out_channels=2, dims=3)
    report, made = plan_transfer(network, WeightSource(Path("sam_vit_b.pth"), tensors))
    assert len(report.loaded) == 175
    assert report.adapted == ("encoder.patch_embed.proj.weight",)
    assert made["encoder.patch_embed.proj.weight"].shape == (768, 1, 16, 16)
    assert report.skipped == ("image_encoder.pos_embed", "mask_decoder.iou_token.weight")
    assert report.notes[1:] == (
        "pos_embed is a table of positions, which this encoder does not use",
        "mask_decoder is SAM's mask decoder",
    )
