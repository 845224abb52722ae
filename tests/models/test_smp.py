"""Networks of segmentation-models-pytorch: the library's names, our divisor, no download, batch norms that hold."""

from __future__ import annotations

import subprocess
import sys

import pytest
import segmentation_models_pytorch as library
import torch
import torchvision
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from segkit.errors import RequestError
from segkit.models.smp import SIZES, SmpConfig, build_smp
from segkit.models.table import build_model

_CHEAP: dict[str, object] = {"encoder": "tu-regnetx_002", "encoder_depth": 3, "decoder_channels": (16, 8, 8)}
_CLASSES = {
    "unet": library.Unet,
    "unetplusplus": library.UnetPlusPlus,
    "fpn": library.FPN,
    "deeplabv3plus": library.DeepLabV3Plus,
    "segformer": library.Segformer,
}


def _smp(dims: int = 2, in_channels: int = 1, **arguments: object) -> nn.Module:
    return build_model("smp", in_channels=in_channels, out_channels=2, dims=dims, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("architecture", _CLASSES)
def test_names_and_logits_are_those_of_the_library(architecture: str) -> None:
    model = _smp(architecture=architecture, encoder="resnet18").eval()
    theirs = _CLASSES[architecture]("resnet18", encoder_weights=None, in_channels=1, classes=2).eval()
    theirs.load_state_dict(model.state_dict(), strict=True)
    side = model.divisor[0]  # type: ignore[index]
    x = torch.randn(1, 1, side, 2 * side)
    with torch.no_grad():
        torch.testing.assert_close(model(x), theirs(x))


@pytest.mark.parametrize(
    ("arguments", "divisor"),
    [
        ({"architecture": "unet"}, 32),
        ({"architecture": "unet", "encoder_depth": 4}, 16),
        ({"architecture": "unetplusplus", "encoder_depth": 3}, 8),
        ({"architecture": "fpn"}, 32),
        ({"architecture": "fpn", "encoder_depth": 4}, 16),
        ({"architecture": "deeplabv3plus"}, 16),
        ({"architecture": "deeplabv3plus", "output_stride": 8}, 8),
        ({"architecture": "segformer", "encoder": "mit_b0"}, 32),
        # The keys of its first attention are pooled 8 x 8 at a quarter of the resolution.
        ({"architecture": "segformer", "encoder": "mit_b0", "encoder_depth": 4}, 32),
    ],
)
def test_sides_of_one_divisor_work(arguments: dict[str, object], divisor: int) -> None:
    model = _smp(**{"encoder": "resnet18", **arguments})
    assert model.divisor == (divisor, divisor)
    for is_training in (True, False):
        model.train(is_training)
        with torch.no_grad():
            made = model(torch.randn(1, 1, divisor, 3 * divisor))
        logits = made[0] if is_training else made
        assert logits.shape == (1, 2, divisor, 3 * divisor)


@pytest.mark.parametrize("architecture", ["unetplusplus", "fpn", "deeplabv3plus", "segformer"])
def test_the_library_asks_for_the_same_divisor(architecture: str) -> None:
    with torch.device("meta"):
        model = _smp(architecture=architecture, encoder="tu-resnet18")
        theirs = _CLASSES[architecture]("tu-resnet18", encoder_weights=None, in_channels=1, classes=2)
        side = model.divisor[0]  # type: ignore[index]
        theirs.check_input_shape(torch.empty(1, 1, side, 3 * side))
        if theirs.requires_divisible_input_shape:
            with pytest.raises(RuntimeError, match=f"divisible by {side}"):
                theirs.check_input_shape(torch.empty(1, 1, side // 2, side))


def test_resnet50_has_the_names_of_torchvision_without_the_classifier() -> None:
    with torch.device("meta"):
        model = _smp(in_channels=3, size="unet-resnet50")
        reference = torchvision.models.resnet50().state_dict()
    prefix: str = model.encoder_prefix  # type: ignore[assignment]
    ours = {n.removeprefix(prefix): v.shape for n, v in model.state_dict().items() if n.startswith(prefix)}
    assert ours == {name: value.shape for name, value in reference.items() if not name.startswith("fc.")}
    assert ours["conv1.weight"] == (64, 3, 7, 7)
    assert len(ours) == 318
    assert model.input_weights == ("encoder.conv1.weight",)


@pytest.mark.parametrize(
    ("encoder", "in_channels", "names"),
    [
        ("resnet18", 1, ("encoder.conv1.weight",)),
        ("resnet18", 3, ("encoder.conv1.weight",)),
        ("mobileone_s0", 1, ("encoder.stage0.rbr_conv.0.conv.weight", "encoder.stage0.rbr_scale.conv.weight")),
    ],
)
def test_input_weights_are_all_that_see_the_channels(encoder: str, in_channels: int, names: tuple[str, ...]) -> None:
    with torch.device("meta"):
        model = _smp(in_channels=in_channels, encoder=encoder)
    assert model.input_weights == names
    assert {model.state_dict()[name].shape[1] for name in names} == {in_channels}


def test_a_checkpoint_of_images_loads_into_the_form_for_volumes() -> None:
    planar, slicewise = _smp(2, **_CHEAP).eval(), _smp(3, **_CHEAP, slice_axis=2).eval()
    slicewise.load_state_dict(planar.state_dict(), strict=True)
    assert slicewise.divisor == (8, 8, 1)
    x = torch.randn(1, 1, 16, 8, 3)
    with torch.no_grad():
        logits = slicewise(x)
        for index in range(3):
            torch.testing.assert_close(logits[..., index], planar(x[..., index]))


def test_one_channel_with_a_neighbour_on_each_side_makes_three() -> None:
    with torch.device("meta"):
        state = _smp(3, encoder="resnet50", neighbours=1).state_dict()
    assert state["encoder.conv1.weight"].shape == (64, 3, 7, 7)


def test_a_single_value_per_channel_is_normalised_by_running_statistics() -> None:
    torch.manual_seed(0)
    model = _smp(encoder="resnet18").train()
    deepest: nn.BatchNorm2d = model.encoder.layer4[1].bn2  # type: ignore[union-attr, index, assignment]
    with torch.no_grad():
        model(torch.randn(1, 1, 32, 32))  # the deepest map is 1 x 1
    assert deepest.training
    assert deepest.num_batches_tracked == 0
    assert deepest.running_var.eq(1).all()  # type: ignore[union-attr]
    with torch.no_grad():
        model(torch.randn(2, 1, 32, 32))
    assert deepest.num_batches_tracked == 1


def test_training_with_a_pooled_branch_takes_a_batch_of_one() -> None:
    model = _smp(architecture="deeplabv3plus", encoder="tu-regnetx_002").train()
    model(torch.randn(1, 1, 32, 32))[0].sum().backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == []


def test_weights_that_the_depth_does_not_use_are_frozen() -> None:
    model = _smp(encoder="resnet18", encoder_depth=4).train()
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if name.startswith("encoder.layer4.")} != set()
    model(torch.randn(2, 1, 16, 16))[0].sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    "arguments", [_CHEAP, {"encoder": "mit_b0", "encoder_depth": 3, "decoder_channels": (16, 8, 8)}]
)
def test_sketches_have_the_shapes_of_the_network(arguments: dict[str, object]) -> None:
    shapes = {name: tensor.shape for name, tensor in _smp(3, **arguments).state_dict().items()}
    with torch.device("meta"):
        meta = _smp(3, **arguments)
    with FakeTensorMode():
        fake = _smp(3, **arguments).train()
        levels = fake(torch.empty(1, 1, *(2 * side for side in fake.divisor)))  # type: ignore[union-attr]
        levels[0].sum().backward()
    assert {name: tensor.shape for name, tensor in meta.state_dict().items()} == shapes
    assert {name: tensor.shape for name, tensor in fake.state_dict().items()} == shapes
    assert all(tensor.is_meta for tensor in meta.state_dict().values())
    assert all(isinstance(tensor, FakeTensor) for tensor in fake.state_dict().values())


def test_sizes_are_what_they_are_called() -> None:
    assert SIZES["unet"] == {}
    for size, values in SIZES.items():
        assert SmpConfig(**values).architecture == size.partition("-")[0]  # type: ignore[arg-type]


def test_looking_at_the_network_uses_up_no_random_numbers() -> None:
    config = SmpConfig(**_CHEAP, dropout=None)  # type: ignore[arg-type]
    torch.manual_seed(3)
    build_smp(config, 7, 2, 2)
    first = torch.rand(4)
    torch.manual_seed(3)
    build_smp(config, 7, 2, 2)  # this time the look is remembered
    assert torch.equal(torch.rand(4), first)


@pytest.mark.parametrize(
    ("encoder", "close"), [("resnt50", "resnet50"), ("mit_b9", "mit_b"), ("tu-convnext_tinny", "tu-convnext_tiny")]
)
def test_an_unknown_encoder_is_refused_with_close_names(encoder: str, close: str) -> None:
    with pytest.raises(RequestError, match=f"smp: encoder '{encoder}' is not known; close are .*{close}"):
        _smp(encoder=encoder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"decoder_channels": (8, 8)}, "decoder_channels names 2 widths, but unet at depth 5 has 5"),
        ({"decoder_channels": (8, 8, 8, 8, 0)}, "decoder_channels are numbers from 1 on"),
        ({"architecture": "fpn", "decoder_attention": "scse"}, "decoder_attention is an option of unet and unetplus"),
        ({**_CHEAP, "decoder_attention": "scse"}, "decoder_attention needs decoder_channels of 16 and more"),
        ({"dropout": 0.1}, "dropout is an option of fpn and deeplabv3plus, not of unet"),
        ({"architecture": "fpn", "encoder_depth": 3}, "fpn needs encoder_depth 4 or 5"),
        ({"architecture": "fpn", "decoder_channels": (64, 48)}, "multiple of 32"),
        ({"architecture": "deeplabv3plus", "encoder": "vgg11"}, "do not support dilated mode"),
        ({"architecture": "unetplusplus", "encoder": "mit_b0"}, "not support encoder_name=mit_b0"),
        ({"encoder": "resnet18", "encoder_weights": "lvm-med"}, "Wrong pretrained weights `lvm-med`"),
        ({"neighbours": 1}, "slice_axis and neighbours need data of three axes"),
    ],
)
def test_options_that_do_not_fit_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        _smp(**arguments)


def test_options_reach_the_library() -> None:
    model = _smp(**{**_CHEAP, "decoder_channels": (16, 16, 16)}, decoder_attention="scse")
    assert any("attention1.attention.cSE" in name for name in model.state_dict())
    deep = _smp(architecture="deeplabv3plus", encoder="tu-regnetx_002", dropout=0.25, atrous_rates=(1, 2, 3))
    assert [module.p for module in deep.modules() if isinstance(module, nn.Dropout)] == [0.25]
    dilations = {module.dilation[0] for module in deep.decoder.modules() if isinstance(module, nn.Conv2d)}  # type: ignore[union-attr]
    assert dilations == {1, 2, 3}


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    with pytest.raises(RequestError, match=r"segmentation-models-pytorch cannot be imported .*; install it"):
        _smp()


def test_the_library_is_imported_only_for_its_networks() -> None:
    code = "import sys, segkit.models.table; print('segmentation_models_pytorch' in sys.modules, 'timm' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
