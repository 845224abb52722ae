"""nnU-Net's two U-Nets: names and counts of weights, and outputs that can be worked out by hand."""

import pytest
import torch
from torch import Tensor, nn

from segkit.errors import RequestError
from segkit.models.table import build_model


def _build(family: str, dims: int = 3, **arguments: object) -> nn.Module:
    return build_model(family, in_channels=1, out_channels=2, dims=dims, **arguments)  # type: ignore[arg-type]


def _shapes(model: nn.Module, start: str) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name.startswith(start)}


def test_names_and_shapes_of_the_plain_network() -> None:
    model = _build("plainunet", widths=(2, 4), blocks=1, kernels=((1, 3, 3), (3, 3, 3)), strides=((1, 2, 2),))
    norms = dict.fromkeys(("conv.bias", "norm.weight", "norm.bias"), (4,))
    expected = {"conv.weight": (4, 2, 3, 3, 3), **norms}
    assert _shapes(model, "encoder.stages.1.") == {f"encoder.stages.1.0.convs.0.{k}": v for k, v in expected.items()}
    assert _shapes(model, "decoder.transpconvs") == {
        "decoder.transpconvs.0.weight": (4, 2, 1, 2, 2),
        "decoder.transpconvs.0.bias": (2,),
    }
    assert _shapes(model, "decoder.stages.0.convs.0.conv.w") == {
        "decoder.stages.0.convs.0.conv.weight": (2, 4, 1, 3, 3)
    }
    assert _shapes(model, "decoder.seg_layers.0.weight") == {"decoder.seg_layers.0.weight": (2, 2, 1, 1, 1)}
    assert model.divisor == (1, 2, 2)


def test_names_and_shapes_of_bottleneck_blocks() -> None:
    """The stride is in the middle convolution; the shortcut has no bias, and its average pooling comes first."""
    model = _build("resencunet", dims=2, widths=(2, 8), blocks=1, bottleneck_widths=(1, 3), stem_width=4, norm="batch")
    kernels = {name: shape for name, shape in _shapes(model, "encoder.").items() if len(shape) == 4}
    assert kernels == {
        "encoder.stem.convs.0.conv.weight": (4, 1, 3, 3),
        "encoder.stages.0.blocks.0.conv1.conv.weight": (1, 4, 1, 1),
        "encoder.stages.0.blocks.0.conv2.conv.weight": (1, 1, 3, 3),
        "encoder.stages.0.blocks.0.conv3.conv.weight": (2, 1, 1, 1),
        "encoder.stages.0.blocks.0.skip.0.conv.weight": (2, 4, 1, 1),
        "encoder.stages.1.blocks.0.conv1.conv.weight": (3, 2, 1, 1),
        "encoder.stages.1.blocks.0.conv2.conv.weight": (3, 3, 3, 3),
        "encoder.stages.1.blocks.0.conv3.conv.weight": (8, 3, 1, 1),
        "encoder.stages.1.blocks.0.skip.1.conv.weight": (8, 2, 1, 1),
    }
    assert "encoder.stages.1.blocks.0.skip.1.conv.bias" not in model.state_dict()
    assert model.state_dict()["encoder.stem.convs.0.norm.running_mean"].shape == (4,)


@pytest.mark.parametrize(
    ("size", "parameters", "divisor"), [("M", 102_350_575, 32), ("L", 102_350_575, 32), ("XL", 141_890_738, 64)]
)
def test_presets_have_as_many_parameters_as_in_nnunet(size: str, parameters: int, divisor: int) -> None:
    with torch.device("meta"):
        model = build_model("resencunet", in_channels=1, out_channels=3, size=size)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert model.divisor == (divisor,) * 3


def test_a_block_whose_last_norm_is_zero_averages_over_its_stride() -> None:
    """leaky ReLU of 0 + the mean of 2 x 2 pixels: of (1, 2, 3, 6) it is 3, of four times -2 it is -0.02."""
    model = _build("resencunet", dims=2, widths=(1, 1), blocks=1).eval()
    block = model.encoder.stages[1].blocks[0]  # type: ignore[union-attr, index]
    nn.init.zeros_(block.conv2.norm.weight)
    image = torch.tensor([[1.0, 2.0, -2.0, -2.0], [3.0, 6.0, -2.0, -2.0]]).view(1, 1, 2, 4)
    with torch.no_grad():
        torch.testing.assert_close(block(image).flatten(), torch.tensor([3.0, -0.02]))


def test_the_decoder_takes_the_upsampled_map_before_the_skip() -> None:
    model = _build("plainunet", dims=2, widths=(1, 1), blocks=1, decoder_blocks=1).eval()
    seen: list[Tensor] = []
    model.decoder.stages[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))  # type: ignore[union-attr, index]
    nn.init.zeros_(model.decoder.transpconvs[0].weight)  # type: ignore[union-attr, index]
    nn.init.constant_(model.decoder.transpconvs[0].bias, 7.0)  # type: ignore[union-attr, index]
    with torch.no_grad():
        model(torch.randn(1, 1, 4, 4))
    assert (seen[0][:, 0] == 7).all()
    assert not (seen[0][:, 1] == 7).any()


@pytest.mark.parametrize("family", ["plainunet", "resencunet"])
def test_memory_modes_have_the_same_gradients(family: str) -> None:
    plain, checkpoint = (
        _build(family, size="tiny", mode=mode, norm="batch").train() for mode in ("plain", "checkpoint")
    )
    checkpoint.load_state_dict(plain.state_dict())
    x = torch.randn(2, 1, 8, 8, 8)
    for model in (plain, checkpoint):
        sum(level.square().mean() for level in model(x)).backward()
    for (name, one), other in zip(plain.named_parameters(), checkpoint.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=name)
    for one, other in zip(plain.buffers(), checkpoint.buffers(), strict=True):
        torch.testing.assert_close(one, other)


def test_heads_without_supervision_exist_and_are_frozen() -> None:
    model = _build("plainunet", size="tiny", supervised_levels=1).train()
    assert [head.weight.requires_grad for head in model.decoder.seg_layers] == [False, True]  # type: ignore[union-attr]
    assert len(model(torch.randn(1, 1, 8, 8, 8))) == 1


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ({"blocks": (1, 2)}, "blocks names 2 stages, but 3 widths need 3"),
        ({"decoder_blocks": (1, 2, 1)}, "decoder_blocks names 3 stages, but 3 widths need 2"),
        ({"kernels": ((3, 3, 3), (2, 3, 3), (3, 3, 3))}, "kernels are odd whole numbers"),
        ({"kernels": ((3, 3),) * 3}, "do not have 3 entries each"),
        ({"bottleneck_widths": (4,)}, "bottleneck_widths names 1 stages, widths 3"),
    ],
)
def test_stages_that_do_not_fit_together_are_refused(arguments: dict[str, object], found: str) -> None:
    with pytest.raises(RequestError, match=found):
        _build("resencunet", size="tiny", **arguments)
