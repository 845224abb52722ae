"""The paper's generator: its parameters layer by layer, its layers one by one, what of its input it looks at."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from segkit.errors import RequestError
from segkit.models.blocks import Slicewise
from segkit.models.generator import Generator, GeneratorConfig, MirroredConv2d, build_generator
from segkit.models.region_layers import RegionNormBasic, RegionNormLearnable
from segkit.models.table import build_model

TINY = GeneratorConfig(width=4, blocks=2)


def _tiny(**arguments: object) -> Generator:
    torch.manual_seed(0)
    generator = build_generator(TINY.model_copy(update=arguments), 3, 3, 2)
    assert isinstance(generator, Generator)
    return generator


def _case(size: tuple[int, int] = (16, 20)) -> tuple[Tensor, Tensor]:
    """Two images of 3 channels from 0 to 1, and holes of 8 x 8 and 4 x 12 pixels."""
    image = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))
    hole = torch.zeros(2, 1, *size, dtype=torch.bool)
    hole[0, :, 4:12, 4:12] = True
    hole[1, :, 8:12, 8:20] = True
    return image, hole


def _with_hole(image: Tensor, hole: Tensor) -> Tensor:
    return torch.cat((image, hole.to(image.dtype)), 1)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_paper_size_has_the_parameters_of_its_table() -> None:
    generator = build_model("generator", in_channels=3, out_channels=3, dims=2, size="paper", output="unit")
    assert isinstance(generator, Generator)

    def conv(inputs: int, outputs: int, kernel: int) -> int:
        return inputs * outputs * kernel**2 + outputs

    def basic(channels: int) -> int:
        return 2 * 2 * channels  # scale and shift of hole and valid

    learnable = 2 * 7**2 + (7**2 + 1) + (7**2 + 1)  # response of mean and largest; scale and shift of the response
    expected = {
        "encoder.0": conv(3, 64, 7) + basic(64),
        "encoder.1": conv(64, 128, 4) + basic(128),
        "encoder.2": conv(128, 256, 4) + basic(256),
        "middle": 8 * 2 * (conv(256, 256, 3) + learnable),
        "decoder.0": conv(256, 512, 3) + learnable,
        "decoder.1": conv(128, 256, 3) + learnable,
        "head": conv(64, 3, 7),
    }
    assert {name: _count(generator.get_submodule(name)) for name in expected} == expected
    assert learnable == 198
    assert list(expected.values()) == [9_728, 131_712, 525_568, 9_444_448, 1_180_358, 295_366, 9_411]
    assert _count(generator) == sum(expected.values()) == 11_596_591


def _released_order(generator: Generator, image: Tensor, hole: Tensor) -> Tensor:
    """The layers as the released code puts them one behind the other, with the weights of `generator`."""

    def conv(part: nn.Module, name: str, x: Tensor, stride: int = 1, padding: int = 0, dilation: int = 1) -> Tensor:
        weight, bias = part.get_parameter(f"{name}.weight"), part.get_parameter(f"{name}.bias")
        return nn.functional.conv2d(x, weight, bias, stride, padding, dilation)

    mask = hole.float()
    x = image * (1 - mask) + mask
    first, second, third = generator.encoder
    x = first.norm(conv(first, "conv", nn.ReflectionPad2d(3)(x)), hole).relu()
    x = second.norm(conv(second, "conv", x, stride=2, padding=1), hole).relu()
    x = third.norm(conv(third, "conv", x, stride=2, padding=1), hole).relu()
    for block in generator.middle:
        y = block.norm1(conv(block, "conv1", nn.ReflectionPad2d(2)(x), dilation=2)).relu()
        x = x + block.norm2(conv(block, "conv2", nn.ReflectionPad2d(1)(y)))
    for up in generator.decoder:
        x = up.norm(nn.PixelShuffle(2)(conv(up, "conv", x, padding=1))).relu()
    return (conv(generator, "head", nn.ReflectionPad2d(3)(x)).tanh() + 1) / 2


def test_the_layers_follow_each_other_as_released() -> None:
    image, hole = _case()
    generator = _tiny(output="unit").eval()
    with torch.no_grad():
        found = generator(_with_hole(image, hole))
        torch.testing.assert_close(found, _released_order(generator, image, hole))
    assert found.shape == image.shape
    assert 0 < found.min() < found.max() < 1


def test_every_parameter_learns_but_those_that_a_norm_takes_away() -> None:
    image, hole = _case()
    generator = _tiny().double()
    (found,) = generator(_with_hole(image, hole).double())
    (found - image).square().mean().backward()
    # What a bias adds to a whole region, RN-B subtracts with the region's mean. RN-L's detector sees it before.
    without = {f"encoder.{stage}.conv.bias" for stage in range(3)}
    largest = {name: parameter.grad.abs().max().item() for name, parameter in generator.named_parameters()}
    assert {name for name, gradient in largest.items() if gradient < 1e-12} == without
    for norm in (part for part in generator.modules() if isinstance(part, RegionNormBasic)):
        for parameter in (norm.gamma, norm.beta):
            assert (parameter.grad.abs().max(1).values > 0).all()  # of valid pixels and of the hole


def test_biases_are_zero_at_first() -> None:
    generator = _tiny()
    biases = [parameter for name, parameter in generator.named_parameters() if name.endswith("bias")]
    # 3 + 2 x 2 + 2 + 1 convolutions; RN-L's scale and shift in 2 x 2 + 2 layers.
    assert len(biases) == 10 + 6
    assert not any(bias.any() for bias in biases)


@pytest.mark.parametrize("output", ["linear", "unit"])
def test_what_the_image_holds_in_the_hole_does_not_matter(output: str) -> None:
    image, hole = _case()
    generator = _tiny(output=output).eval()
    with torch.no_grad():
        expected = generator(_with_hole(image, hole))
        assert torch.equal(generator(_with_hole(torch.where(hole, torch.nan, image), hole)), expected)
        filled = torch.where(hole, 1.0 if output == "unit" else 0.0, image)
        assert torch.equal(generator(_with_hole(filled, hole)), expected)
        assert not torch.allclose(generator(_with_hole(torch.where(hole, 0.5, image), ~hole)), expected)


def test_an_image_alone_has_no_hole_and_further_channels_are_not_looked_at() -> None:
    image, hole = _case()
    generator = _tiny().eval()
    with torch.no_grad():
        assert torch.equal(generator(image), generator(_with_hole(image, torch.zeros_like(hole))))
        mirrored = torch.cat((_with_hole(image, hole), image.flip(3), hole.float()), 1)
        assert torch.equal(generator(mirrored), generator(_with_hole(image, hole)))


def test_linear_output_is_not_bounded() -> None:
    image, hole = _case()
    generator = _tiny().eval()
    with torch.no_grad():
        generator.head.bias += 7
        found = generator(_with_hole(image, hole))
    assert found.max() > 7


def test_statistics_of_an_image_or_of_the_batch() -> None:
    image, hole = _case()
    x = _with_hole(image, hole)
    with torch.no_grad():
        alone = _tiny().eval()
        torch.testing.assert_close(alone(x)[:1], alone(x[:1]))
        together = _tiny(statistics="batch").eval()
        assert not torch.allclose(together(x)[:1], together(x[:1]), atol=1e-3)
    norms = [part for part in together.modules() if isinstance(part, (RegionNormBasic, RegionNormLearnable))]
    assert len(norms) == 3 + 2 * 2 + 2
    assert {norm.rule.stats for norm in norms} == {"batch"}


def test_options_reach_the_layers() -> None:
    generator = _tiny(paper_affine=False, threshold=0.6)
    basic = [part for part in generator.modules() if isinstance(part, RegionNormBasic)]
    learnable = [part for part in generator.modules() if isinstance(part, RegionNormLearnable)]
    assert [norm.paper_affine for norm in basic] == [False] * 3
    assert [norm.threshold for norm in learnable] == [0.6] * 6
    assert {norm.detector.kernel_size for norm in learnable} == {(7, 7)}


def test_features_of_the_encoder_at_each_resolution() -> None:
    image, hole = _case()
    features = _tiny().encode(_with_hole(image, hole))
    assert [tuple(level.shape) for level in features] == [(2, 4, 16, 20), (2, 8, 8, 10), (2, 16, 4, 5)]


def test_a_map_is_mirrored_at_its_border_or_repeated_where_it_is_too_small() -> None:
    conv = MirroredConv2d(1, 1, 3, dilation=2)
    with torch.no_grad():
        conv.weight.zero_()[0, 0, 1, 0] = 1  # looks two pixels to the left
        conv.bias.zero_()
        three = torch.tensor([[1.0, 2, 3]] * 3)[None, None]
        assert conv(three)[0, 0, 0].tolist() == [3, 2, 1]
        assert conv(three[..., 1:])[0, 0, 0].tolist() == [2, 2]


def test_volumes_are_restored_slice_by_slice() -> None:
    image, hole = _case()
    slices = _with_hole(image, hole)
    planar, network = _tiny().eval(), build_generator(TINY, 3, 3, 3).eval()
    network.load_state_dict(planar.state_dict())
    assert isinstance(network, Slicewise)
    with torch.no_grad():
        volume = slices.movedim(0, 1)[None]  # (1, 4, 2, 16, 20)
        torch.testing.assert_close(network(volume)[0].movedim(1, 0), planar(slices))


def test_slices_of_neighbours_are_refused() -> None:
    with pytest.raises(RequestError, match="neighbours must be 0: a slice comes with its own hole"):
        build_model("generator", in_channels=3, out_channels=3, dims=3, neighbours=1)
