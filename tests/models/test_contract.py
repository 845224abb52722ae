"""What every network of the table promises, written once."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from segkit.config import build_config, configs_folder, read_yaml
from segkit.errors import RequestError
from segkit.models.blocks import SegmentationNetwork
from segkit.models.kernels.convolutions import SmallMapsInFloat32
from segkit.models.sample_processes import SampleProcesses
from segkit.models.table import MODELS, build_model, list_models
from segkit.training.config import TrainConfig
from tests.smallest import SMALLEST

_SMALL_DIVISOR: dict[tuple[str, int], dict[str, object]] = {
    # Forty steps on patches of twice a divisor of 32 would take minutes.
    ("stunet", 3): {"strides": ((2, 2, 2), (2, 2, 2), (1, 1, 1), (1, 1, 1), (1, 1, 1))},
}
ENTRIES = [(family, dims) for family, entry in MODELS.items() for dims in entry.dims]
WITH_ENCODER = [(family, dims) for family, dims in ENTRIES if family != "monai"]


def _build(family: str, dims: int, **arguments: object) -> nn.Module:
    return build_model(family, in_channels=2, out_channels=3, dims=dims, **{**SMALLEST[family], **arguments})  # type: ignore[arg-type]


def _two_divisors(model: nn.Module) -> tuple[int, ...]:
    """Spatial axes of two divisors each."""
    return tuple(2 * divisor for divisor in model.divisor)  # type: ignore[arg-type, union-attr]


def _without_randomness_and_batch_statistics(model: nn.Module) -> nn.Module:
    """Training mode, but for dropout and batch norm, whose results differ from those of evaluation by intent."""
    model.train()
    for module in model.modules():
        if isinstance(module, (_BatchNorm, _DropoutNd)):
            module.eval()
    return model


def test_every_family_has_a_smallest_form() -> None:
    assert set(SMALLEST) == set(MODELS)


@pytest.mark.parametrize(("family", "dims"), ENTRIES)
def test_training_gives_levels_and_evaluation_one_tensor(family: str, dims: int) -> None:
    model = _build(family, dims)
    shape = _two_divisors(model)
    x = torch.randn(1, 2, *shape)
    levels = _without_randomness_and_batch_statistics(model)(x)
    assert isinstance(levels, list)
    assert levels[0].shape == (1, 3, *shape)
    assert all(low.shape[2] < high.shape[2] for high, low in itertools.pairwise(levels))
    with torch.no_grad():
        logits = model.eval()(x)
    assert logits.shape == (1, 3, *shape)
    torch.testing.assert_close(logits, levels[0].detach(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("family", "dims"), ENTRIES)
def test_sizes_of_one_divisor_and_uneven_multiples_work(family: str, dims: int) -> None:
    model = _build(family, dims).eval()
    shape = tuple(divisor * (1 + axis) for axis, divisor in enumerate(model.divisor))  # type: ignore[arg-type]
    with torch.no_grad():
        assert model(torch.randn(1, 2, *shape)).shape == (1, 3, *shape)


@pytest.mark.parametrize(("family", "dims"), ENTRIES)
def test_every_parameter_learns(family: str, dims: int) -> None:
    model = _build(family, dims).train()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(2, 2, *_two_divisors(model))
    for _ in range(2):  # a zero-initialised scale lets the gradient through from the second step on
        optimiser.zero_grad()
        sum(level.square().mean() for level in model(x)).backward()
        optimiser.step()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


@pytest.mark.parametrize(("family", "dims"), ENTRIES)
def test_gradients_in_bfloat16_point_where_those_in_float32_do(family: str, dims: int) -> None:
    torch.manual_seed(0)
    model = _without_randomness_and_batch_statistics(_build(family, dims))
    x, target = torch.randn(2, 2, *_two_divisors(model)), torch.rand(2, 3, *_two_divisors(model)).round()
    gradients = []
    for enabled in (False, True):
        with SmallMapsInFloat32():
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                logits = model(x)[0]
            loss = nn.functional.binary_cross_entropy_with_logits(logits.float(), target)
            found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        gradients.append(torch.cat([one.flatten() for one in found if one is not None]))
    assert nn.functional.cosine_similarity(*gradients, dim=0) > 0.9


@pytest.mark.parametrize(("family", "dims"), ENTRIES)
def test_processes_for_samples_change_nothing(family: str, dims: int, two_threads: None) -> None:
    small = _SMALL_DIVISOR.get((family, dims), {})  # two processes hold it in float64
    model = _without_randomness_and_batch_statistics(_build(family, dims, **small).double())
    x = torch.randn(3, 2, *_two_divisors(model), dtype=torch.float64)
    weights = dict(model.named_parameters())
    found = []
    for run in (model, partial(SampleProcesses(), model)):
        levels = run(x)
        loss = sum((level * level.detach().cos()).sum() for level in levels)
        found.append((levels, torch.autograd.grad(loss, list(weights.values()), allow_unused=True)))
    (expected, gradients), (levels, in_processes) = found
    torch.testing.assert_close(levels, expected, rtol=1e-9, atol=1e-9)
    for name, of_batch, of_samples in zip(weights, gradients, in_processes, strict=True):
        assert (of_batch is None) == (of_samples is None), name
        if of_batch is not None:
            torch.testing.assert_close(of_samples, of_batch, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("family", "dims"), ENTRIES)
def test_overfits_one_patch(family: str, dims: int) -> None:
    model = _build(family, dims, **_SMALL_DIVISOR.get((family, dims), {})).train()
    x = torch.randn(1, 2, *_two_divisors(model))
    target = (x[:, :1] + x[:, 1:] > 0).float().expand(-1, 3, *(-1,) * dims)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = nn.functional.binary_cross_entropy_with_logits(model(x)[0], target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.35 * losses[0]


@pytest.mark.parametrize(("family", "dims"), ENTRIES)
def test_same_seed_same_weights_same_output(family: str, dims: int) -> None:
    outputs = []
    for _ in range(2):
        torch.manual_seed(5)
        model = _build(family, dims).eval()
        with torch.no_grad():
            outputs.append(model(torch.ones(1, 2, *model.divisor)))  # type: ignore[misc]
    assert torch.equal(outputs[0], outputs[1])


@pytest.mark.parametrize(("family", "dims"), ENTRIES)
def test_the_tensors_that_weights_from_elsewhere_look_for_are_there(family: str, dims: int) -> None:
    with torch.device("meta"):
        model = _build(family, dims)
    assert isinstance(model, SegmentationNetwork)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert model.input_weights
    assert {shapes[name][1] for name in model.input_weights} == {2}
    assert model.head_prefixes
    for prefix in model.head_prefixes:
        assert any(shape[0] == 3 for name, shape in shapes.items() if name.startswith(prefix)), prefix
    if (family, dims) not in WITH_ENCODER:
        assert not model.encoder_prefix
        return
    assert model.encoder_prefix
    encoder = {name for name in shapes if name.startswith(model.encoder_prefix)}
    assert encoder < set(shapes)
    assert encoder & set(model.input_weights)  # a decoder may look at the image as well


@pytest.mark.parametrize(("family", "dims"), WITH_ENCODER)
def test_the_encoder_alone_gives_its_features_finest_first(family: str, dims: int) -> None:
    model = _build(family, dims).eval()
    size = _two_divisors(model)
    features = model.encode(torch.randn(2, 2, *size))  # type: ignore[operator]
    assert all(level.shape[0] == 2 and level.dim() == 2 + dims for level in features)
    cells = [level.shape[2:].numel() for level in features]
    assert cells == sorted(cells, reverse=True)
    assert cells[-1] >= 2
    features[-1].square().mean().backward()
    learning = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert learning
    assert all(name.startswith(model.encoder_prefix) for name in learning)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["plain", "checkpoint", "reversible"])
def test_reversible_family_shares_weights_between_modes(mode: str) -> None:
    expected = _build("revmbunet", 3, mode="plain")
    model = _build("revmbunet", 3, mode=mode)
    model.load_state_dict(expected.state_dict(), strict=True)
    x = torch.randn(1, 2, 8, 8, 8)
    torch.testing.assert_close(model(x)[0], expected(x)[0])


def test_anisotropic_strides_set_the_divisor() -> None:
    model = _build("revmbunet", 3, strides=((1, 2, 2), (2, 2, 2)))
    assert model.divisor == (2, 4, 4)
    assert model.eval()(torch.randn(1, 2, 2, 8, 8)).shape == (1, 3, 2, 8, 8)


@pytest.mark.parametrize("family", MODELS)
def test_a_shipped_configuration_trains_the_family(family: str) -> None:
    files = sorted((configs_folder() / "presets").glob("*.yaml"))
    assert {path.stem for path in files} == {"tiny", "cpu", "default", "large"}
    families = {build_config(TrainConfig, [(str(path), read_yaml(path))]).network.family for path in _all(files)}
    assert family in families


def _all(presets: list[Path]) -> list[Path]:
    return [*presets, *sorted(configs_folder().glob("*.yaml"))]


def test_list_counts_without_allocating() -> None:
    infos = list_models()
    assert {info.name for info in infos} == set(MODELS)
    tiny = next(info for info in infos if info.size == "tiny")
    real = build_model("revmbunet", in_channels=4, out_channels=3, size="tiny")
    assert tiny.parameters == sum(parameter.numel() for parameter in real.parameters())


def test_wrong_requests_name_what_is_offered() -> None:
    with pytest.raises(RequestError, match=r"network 'unet' is not known; expected one of revmbunet"):
        build_model("unet", in_channels=1, out_channels=1)
    with pytest.raises(RequestError, match=r"no size 'XXL'; expected one of tiny, small, base, large"):
        build_model("revmbunet", in_channels=1, out_channels=1, size="XXL")
    with pytest.raises(RequestError, match="widths must be even"):
        build_model("revmbunet", in_channels=1, out_channels=1, widths=(5, 8))
    with pytest.raises(RequestError, match="do not have 3 entries each"):
        build_model("revmbunet", in_channels=1, out_channels=1, widths=(4, 8), strides=((2, 2),))
    with pytest.raises(RequestError, match="is not two or three whole numbers from 1 on"):
        build_model("revmbunet", in_channels=1, out_channels=1, widths=(4, 8), strides=((0, 2, 2),))
    with pytest.raises(RequestError, match=r"blocks names 2 levels, widths 3"):
        build_model("revmbunet", in_channels=1, out_channels=1, widths=(4, 8, 8), blocks=(1, 1))
