"""The speed tables: variants compute the same, whatever their speed."""

from __future__ import annotations

import torch
from torch import nn

from segkit.bench import speed
from segkit.models.depthwise import DepthwiseConv3d


def test_training_variants_have_the_same_gradients() -> None:
    rows = list(speed.training("tiny", 16, 1, "cpu"))
    assert [row["variant"] for row in rows] == ["grouped Conv3d", "plain", "checkpoint", "reversible"]
    assert rows[0]["of_grouped"] == 1.0
    assert all(row["difference"] < 1e-5 and row["seconds"] > 0 for row in rows)


def test_inference_variants_have_the_same_logits() -> None:
    rows = list(speed.inference("tiny", 16, 1, "cpu"))
    assert [row["variant"] for row in rows][:2] == ["grouped Conv3d", "torch"]
    assert all(row["difference"] < 1e-4 for row in rows)


def test_the_reference_has_no_depthwise_layer_of_ours_and_the_same_weights() -> None:
    ours = speed._network("tiny", "plain", "cpu")
    reference = speed._with_grouped_convolution(speed._network("tiny", "plain", "cpu"))
    assert any(isinstance(module, DepthwiseConv3d) for module in ours.modules())
    assert not any(isinstance(module, DepthwiseConv3d) for module in reference.modules())
    assert sum(isinstance(m, nn.Conv3d) for m in ours.modules()) == sum(
        isinstance(m, nn.Conv3d) for m in reference.modules()
    )
    for (name, one), (other_name, two) in zip(ours.state_dict().items(), reference.state_dict().items(), strict=True):
        assert name == other_name
        assert torch.equal(one, two)
