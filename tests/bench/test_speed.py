"""The speed tables: variants compute the same, whatever their speed."""

from __future__ import annotations

import torch
from torch import nn

from segkit.bench import speed
from segkit.bench.speed import build_network, with_library_layers
from segkit.models.kernels.convolutions import DepthwiseConv3d, PointwiseConv3d


def test_training_variants_have_the_same_gradients() -> None:
    rows = list(speed.measure("training", "tiny", 16, 1, "cpu"))
    assert [row["variant"] for row in rows] == [variant.name for variant in speed.TABLES["training"]]
    assert rows[0]["of_reference"] == 1.0
    assert all(row["difference"] < 1e-5 and row["seconds"] > 0 for row in rows)


def test_inference_variants_have_the_same_logits() -> None:
    for variant in speed.TABLES["inference"]:
        if speed._can_run(variant, "cpu"):
            logits = speed._work(variant, "tiny", 16, "cpu")()
            expected = speed._work(speed.TABLES["inference"][0], "tiny", 16, "cpu")()
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_the_reference_has_the_same_weights_in_layers_of_the_library_alone() -> None:
    ours, reference = build_network("tiny"), with_library_layers(build_network("tiny"), "library")
    assert any(isinstance(module, DepthwiseConv3d) for module in ours.modules())
    assert not any(isinstance(module, DepthwiseConv3d | PointwiseConv3d) for module in reference.modules())
    convolutions = [sum(isinstance(module, nn.Conv3d) for module in network.modules()) for network in (ours, reference)]
    assert convolutions[0] == convolutions[1]
    for one, two in zip(ours.parameters(), reference.parameters(), strict=True):
        assert torch.equal(one, two)


def test_the_median_is_of_ratios_within_a_round() -> None:
    assert speed._median_ratio([1.0, 10.0, 3.0], [2.0, 40.0, 3.0]) == 0.5  # 0.5, 0.25 and 1
