"""The weights that a run begins with: how much of the encoder was found, and what binds those who use them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor

import segkit
from segkit.checkpoint.card import ModelCard
from segkit.config import build_config
from segkit.errors import RequestError
from segkit.training.config import TrainConfig
from segkit.training.run import FirstWeights, encoder_share, first_weights, percent

SMALL = {"size": "tiny", "arguments": {"widths": [4, 8]}}
VIT = {"width": 12, "depth": 2, "heads": 2, "global_blocks": [1], "image_size": 64, "neck": 8}


def begin(
    path: Path, family: str = "revmbunet", channels: int = 1, dims: int = 2, encoder_lr: float = 1.0, **network: Any
) -> FirstWeights:
    """The first weights of a run with one output."""
    document = {"network": {"family": family, **network, "weights": path}, "optimiser": {"encoder_lr": encoder_lr}}
    config = build_config(TrainConfig, [("test", document)])
    card = ModelCard.model_validate(
        {
            "network": {
                "family": family,
                "size": config.network.size,
                "in_channels": channels,
                "out_channels": 1,
                "arguments": config.network.arguments,
            },
            "dims": dims,
            "modalities": [f"channel {number}" for number in range(channels)],
            "patch_size": [16] * dims,
            "divisor": [1] * dims,
            "training_data": {"identity": "test"},
        }
    )
    return first_weights(card, config, path.parent / "run", resume=False)


def small_weights() -> dict[str, Tensor]:
    torch.manual_seed(4)
    network = segkit.build_model("revmbunet", in_channels=1, out_channels=1, dims=2, size="tiny", widths=(4, 8))
    return dict(network.state_dict())


def test_the_log_and_the_report_tell_the_share_of_the_encoder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "whole.pth"
    torch.save(small_weights(), path)
    with caplog.at_level(logging.INFO, "segkit"):
        begun = begin(path, **SMALL)
    assert f"weights of {path}: 100 % of the encoder; {len(small_weights())} tensors loaded" in caplog.text
    assert begun.report["encoder_share"] == 1.0
    assert "notice" not in begun.facts
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_part_of_an_encoder_is_enough_where_that_is_said(tmp_path: Path) -> None:
    weights = small_weights()
    gone = "encoder.stages.1.blocks.0.f.expand.weight"
    lost = weights.pop(gone).numel()
    torch.save(weights, tmp_path / "part.pth")
    with pytest.raises(RequestError, match=r"does not fit RevMBUNet: tensors missing from the file: 1 \(encoder\.st"):
        begin(tmp_path / "part.pth", **SMALL)
    network = segkit.build_model("revmbunet", in_channels=1, out_channels=1, dims=2, size="tiny", widths=(4, 8))
    share = 1 - lost / sum(parameter.numel() for parameter in network.encoder.parameters())  # type: ignore[union-attr]
    begun = begin(tmp_path / "part.pth", **SMALL, weights_share=share - 1e-6)
    assert begun.report["encoder_share"] == pytest.approx(share)
    assert begun.report["missing"] == (gone,)
    assert torch.equal(begun.network.state_dict()["encoder.stem.weight"], weights["encoder.stem.weight"])
    with pytest.raises(RequestError) as caught:
        begin(tmp_path / "part.pth", **SMALL, weights_share=share + 1e-3)
    message = str(caught.value)
    assert f"part.pth: holds {percent(share)} of the encoder's parameters; without {gone}" in message
    assert f"expected at least {percent(share + 1e-3)} (network.weights_share)" in message


def test_a_decoder_alone_is_no_encoder(tmp_path: Path) -> None:
    decoder = {name: tensor for name, tensor in small_weights().items() if name.startswith("decoder.")}
    torch.save(decoder, tmp_path / "decoder.pth")
    with pytest.raises(RequestError, match=r"holds 0 % of the encoder's parameters.*at least 10 %"):
        begin(tmp_path / "decoder.pth", **SMALL, weights_share=0.1)
    assert begin(tmp_path / "decoder.pth", **SMALL, weights_share=0).report["encoder_share"] == 0


def test_shares_count_numbers_and_round_down() -> None:
    network = segkit.build_model("smp", in_channels=1, out_channels=1, dims=2, encoder="tu-regnetx_002")
    encoder = [name for name in network.state_dict() if name.startswith("encoder.")]
    assert encoder_share(network, encoder) == 1
    assert encoder_share(network, [name for name in encoder if "running_" not in name]) == 1
    assert [percent(share) for share in (0, 0.5, 0.8999999, 0.9, 1)] == ["0 %", "50 %", "89.9 %", "90 %", "100 %"]


def test_freezing_random_weights_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "whole.pth"
    torch.save(small_weights(), path)
    begin(path, **SMALL, encoder_lr=0)
    assert not caplog.records
    config = build_config(TrainConfig, [("test", {"optimiser": {"encoder_lr": 0}})])
    card = ModelCard.model_validate(
        {
            "network": {**SMALL, "family": "revmbunet", "in_channels": 1, "out_channels": 1},
            "modalities": ["a"],
            "patch_size": [16, 16, 16],
            "divisor": [1, 1, 1],
            "training_data": {"identity": "test"},
        }
    )
    first_weights(card, config, tmp_path / "run", resume=False)
    assert "optimiser.encoder_lr=0 freezes an encoder of random weights" in caplog.text


def test_lvm_med_resnet50_as_it_is_released(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Torchvision's names without prefix and classifier, three channels, into a U-Net for one."""
    weights = torchvision.models.resnet50().state_dict()
    del weights["fc.weight"], weights["fc.bias"]
    torch.save(weights, tmp_path / "lvmmed_resnet.torch")
    begun = begin(tmp_path / "lvmmed_resnet.torch", "smp", size="unet-resnet50")
    assert begun.report["encoder_share"] == 1.0
    assert (len(begun.report["loaded"]), begun.report["adapted"]) == (317, ("encoder.conv1.weight",))
    assert begun.report["skipped"] == ()
    assert not [name for name in begun.report["missing"] if name.startswith("encoder.")]
    state = begun.network.state_dict()
    torch.testing.assert_close(state["encoder.conv1.weight"], weights["conv1.weight"].sum(1, keepdim=True))
    assert torch.equal(state["encoder.layer4.2.conv3.weight"], weights["layer4.2.conv3.weight"])
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "lvmmed_resnet.torch: LVM-Med's weights are for non-commercial use only" in warning.getMessage()
    assert begun.facts["notice"].startswith("LVM-Med's weights are for non-commercial use only (its licence texts say")


def test_lvm_med_vit_as_it_is_released(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Names of ImageEncoderViT without prefix and position table; the sizes here are small."""
    theirs = segkit.build_model("vit", in_channels=3, out_channels=1, dims=2, **VIT)
    weights = {name.removeprefix("encoder."): t for name, t in theirs.state_dict().items() if name.startswith("enc")}
    assert {"patch_embed.proj.weight", "blocks.1.attn.rel_pos_w", "neck.3.bias"} <= set(weights)
    assert "pos_embed" not in weights
    torch.save(weights, tmp_path / "lvmmed_vit.pth")
    begun = begin(tmp_path / "lvmmed_vit.pth", "vit", channels=3, arguments=VIT)
    assert (begun.report["encoder_share"], len(begun.report["loaded"])) == (1.0, len(weights))
    assert torch.equal(begun.network.state_dict()["encoder.neck.2.weight"], weights["neck.2.weight"])
    assert "non-commercial" in begun.facts["notice"]
    assert "non-commercial" in caplog.text
