from __future__ import annotations

import io
import math
import warnings
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from segkit.models.kernels import region_norm as region_norm_module
from segkit.models.kernels.region_norm import (
    Rule,
    Statistics,
    _by_formula,
    masks_of,
    normalise_regions,
    pool_channels,
)
from segkit.models.region_layers import (
    Learning,
    RegionNormBasic,
    RegionNormLearnable,
    detected_shares,
    resize_regions,
)

_EPSILON = 1e-5


def region_norm(x: Tensor, regions: Tensor, count: int = 2, *, rule: Rule | None = None) -> Tensor:
    """Each region normalised by its own mean and deviation, without gain and bias."""
    masks, channels = masks_of(x, regions, count), (x.shape[1], count)
    return normalise_regions(x, masks, masks, masks.new_ones(channels), masks.new_zeros(channels), rule or Rule())


@pytest.fixture
def in_many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """About a dozen voxels at a time, so that small maps are put together of parts as large ones are."""
    monkeypatch.setitem(region_norm_module._PART_BYTES, "cpu", 512)


def _case(dims: int = 3, *, count: int = 3, innermost: bool = False) -> tuple[Tensor, Tensor]:
    """Two pictures of 5 channels in float64, far from 0, and regions of at least 20 voxels."""
    generator = torch.Generator().manual_seed(dims)
    size = {2: (9, 16), 3: (5, 6, 8)}[dims]
    x = torch.randn(2, 5, *size, generator=generator, dtype=torch.float64) * 3 + 50
    regions = torch.randint(count, (2, 1, *size), generator=generator)
    if innermost:
        x = x.contiguous(memory_format=torch.channels_last if dims == 2 else torch.channels_last_3d)
    return x.requires_grad_(), regions


def _per_region(x: Tensor, regions: Tensor, stats: Statistics, count: int = 3) -> Tensor:
    """The formula, voxel values picked out region by region."""
    y = torch.zeros_like(x)
    pictures = [slice(None)] if stats == "batch" else [slice(i, i + 1) for i in range(len(x))]
    for picture in pictures:
        for channel in range(x.shape[1]):
            values, numbers = x[picture, channel], regions[picture, 0]
            for region in range(count):
                inside = values[numbers == region]
                epsilon = _EPSILON * numbers.numel() / len(inside)
                normal = (inside - inside.mean()) / (inside.var(correction=0) + epsilon).sqrt()
                y[picture, channel] = y[picture, channel].masked_scatter(numbers == region, normal)
    return y


@pytest.mark.usefixtures("in_many_parts")
@pytest.mark.parametrize("innermost", [False, True])
@pytest.mark.parametrize("stats", ["instance", "batch"])
@pytest.mark.parametrize("dims", [2, 3])
def test_each_region_by_itself(dims: int, stats: Statistics, innermost: bool) -> None:
    x, regions = _case(dims, innermost=innermost)
    weight = torch.randn(x.shape, dtype=torch.float64)
    ours = region_norm(x, regions, 3, rule=Rule(stats))
    reference = _per_region(x, regions, stats)
    torch.testing.assert_close(ours, reference, rtol=0, atol=1e-6)
    assert ours.stride() == x.stride()
    (of_ours,) = torch.autograd.grad((ours * weight).sum(), x)
    (of_reference,) = torch.autograd.grad((reference * weight).sum(), x)
    torch.testing.assert_close(of_ours, of_reference, rtol=0, atol=1e-6)


def test_float32_far_from_zero_in_many_parts() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 8, 40, 40, 40, generator=generator)  # 64000 voxels of 32 bytes: two parts on one core
    regions = (torch.arange(40) > 30).view(1, 1, 1, 1, 40).expand(1, 1, 40, 40, 40)
    torch.testing.assert_close(
        region_norm(x + regions * 100, regions).double(),
        _per_region(x.double() + regions * 100, regions.long(), "instance", 2),
        rtol=0,
        atol=5e-5,  # float32 tells values about 100 apart by 8e-6
    )


def test_two_regions_by_hand() -> None:
    x = torch.tensor([1.0, 3.0, 10.0, 30.0]).view(1, 1, 1, 4)
    regions = torch.tensor([0, 0, 1, 1]).view(1, 1, 1, 4)
    y = region_norm(x, regions, rule=Rule(epsilon=0.0, min_voxels=1))
    assert y.flatten().tolist() == pytest.approx([-1, 1, -1, 1])
    # N / S = 2: epsilon 1.5 counts as 3, and the variance of 1 and 3 is 1.
    damped = region_norm(x, regions, rule=Rule(epsilon=1.5, min_voxels=1))
    assert damped.flatten()[:2].tolist() == pytest.approx([-0.5, 0.5])


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("dims", [2, 3])
def test_one_region_is_instance_or_batch_norm(dims: int, number: int) -> None:
    x, regions = _case(dims)
    regions = torch.full_like(regions, number)
    kinds: dict[tuple[int, Statistics], Any] = {
        (2, "instance"): nn.InstanceNorm2d,
        (3, "instance"): nn.InstanceNorm3d,
        (2, "batch"): nn.BatchNorm2d,
        (3, "batch"): nn.BatchNorm3d,
    }
    for stats in ("instance", "batch"):
        norm = kinds[dims, stats](5, affine=False, track_running_stats=False)
        torch.testing.assert_close(region_norm(x, regions, rule=Rule(stats)), norm(x), rtol=0, atol=1e-9)


@pytest.mark.parametrize("stats", ["instance", "batch"])
def test_what_is_in_the_hole_never_changes_what_is_valid(stats: Statistics) -> None:
    x, regions = _case(3, count=2)
    changed = torch.where(regions == 1, -7 * x.detach() + 1000, x.detach())
    one, other = (region_norm(value, regions, rule=Rule(stats)) for value in (x, changed))
    valid = (regions == 0).expand_as(x)
    assert torch.equal(one[valid], other[valid])
    assert not torch.allclose(one[~valid], other[~valid])


@pytest.mark.parametrize("min_voxels", [0, 8])
@pytest.mark.parametrize("stats", ["instance", "batch"])
@pytest.mark.parametrize("voxels", [0, 1])
def test_few_voxels_stay_finite(voxels: int, stats: Statistics, min_voxels: int) -> None:
    x = torch.randn(2, 3, 4, 4, 4, requires_grad=True)
    regions = torch.zeros(2, 1, 4, 4, 4, dtype=torch.uint8)
    regions[0].view(-1)[:voxels] = 1
    y = region_norm(x, regions, 3, rule=Rule(stats, min_voxels=min_voxels))
    (gradient,) = torch.autograd.grad((y**3).sum(), x)
    assert y.isfinite().all()
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0


def test_a_small_region_takes_the_moments_of_all() -> None:
    x = torch.tensor([0.0, 2.0, 2.0, 4.0]).view(1, 1, 1, 4)  # of all: mean 2, variance 2
    regions = torch.tensor([0, 0, 0, 1]).view(1, 1, 1, 4)
    small = region_norm(x, regions, rule=Rule(epsilon=0.0, min_voxels=2))
    assert small.flatten()[3].item() == pytest.approx(2 / math.sqrt(2))
    assert region_norm(x, regions, rule=Rule(min_voxels=1)).flatten()[3].item() == 0


def test_a_voxel_in_no_region_comes_out_as_zero() -> None:
    x, regions = _case(3)
    y = region_norm(x, regions, 2)  # the third region has no number now
    assert y[(regions == 2).expand_as(x)].abs().max() == 0
    torch.testing.assert_close(region_norm(x, torch.where(regions == 2, -1, regions), 2), y)


@pytest.mark.parametrize("stats", ["instance", "batch"])
@pytest.mark.parametrize("dims", [2, 3])
def test_gradients_of_everything(dims: int, stats: Statistics) -> None:
    x, regions = _case(dims)
    x = x.detach()[:, :2, :2].contiguous().requires_grad_()
    regions = regions[:, :, :2]
    weights = torch.randn(2, 4, regions[0].numel(), dtype=torch.float64, requires_grad=True)
    gain, bias = (torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    masks = masks_of(x, regions, 3)

    def function(*values: Tensor) -> Tensor:
        return normalise_regions(values[0], masks, *values[1:], Rule(stats))

    assert torch.autograd.gradcheck(function, (x, weights, gain, bias))


@pytest.mark.usefixtures("in_many_parts")
@pytest.mark.parametrize("stats", ["instance", "batch"])
def test_the_gradient_is_that_of_the_formula(stats: Statistics) -> None:
    x, regions = _case(3)
    masks = masks_of(x, regions, 3)
    gain, bias = (torch.randn(5, 3, dtype=torch.float64) for _ in range(2))
    weight = torch.randn(x.shape, dtype=torch.float64)
    found = []
    for compute in (normalise_regions, _by_formula):
        y = compute(x, masks, masks, gain, bias, Rule(stats))
        found += torch.autograd.grad((y * weight).sum(), x)
    torch.testing.assert_close(*found, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    x, regions = _case(3)
    half = x.detach().to(dtype).requires_grad_()
    y = region_norm(half, regions, 3)
    y.float().square().sum().backward()
    assert y.dtype == half.grad.dtype == dtype
    expected = _per_region(half.detach().double(), regions, "instance")
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=2e-2)


def test_autocast_changes_nothing_of_a_float32_map() -> None:
    x, regions = _case(3)
    x = x.detach().float().requires_grad_()
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = region_norm(x, regions, 3)
            results.append((y, *torch.autograd.grad((y**3).sum(), x)))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_errors_tell_the_shapes() -> None:
    x, regions = _case(3)
    with pytest.raises(ValueError, match=r"regions of shape \(2, 1, 5, 6, 7\) for a map of shape \(2, 5, 5, 6, 8\)"):
        region_norm(x, regions[..., :7])
    with pytest.raises(ValueError, match=r"regions of type torch\.float32; expected booleans or whole numbers"):
        region_norm(x, regions.float())
    with pytest.raises(ValueError, match="statistics 'layer' are not one of instance, batch"):
        region_norm(x, regions, rule=Rule("layer"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="learning 'none' is not one of affine"):
        RegionNormLearnable(3, learning="none")  # type: ignore[arg-type]


def test_basic_layer_gives_each_region_its_affine() -> None:
    x, regions = _case(3)
    layer = RegionNormBasic(5, 3).double()
    torch.testing.assert_close(layer(x, regions), region_norm(x, regions, 3))
    nn.init.normal_(layer.gamma)
    nn.init.normal_(layer.beta)
    number = regions[:, 0]
    gamma, beta = (value[number].movedim(-1, 1) for value in (layer.gamma, layer.beta))
    torch.testing.assert_close(layer(x, regions), region_norm(x, regions, 3) * (1 + gamma) + beta)
    layer(x, regions).square().sum().backward()
    assert all(parameter.grad.abs().min() > 0 for parameter in layer.parameters())


def test_regions_are_resized_to_the_map() -> None:
    regions = torch.zeros(1, 1, 4, 4, dtype=torch.uint8)
    regions[..., 1] = 2  # one column, which nearest neighbours at every second column miss
    size = torch.Size((2, 2))
    assert resize_regions(regions, size).flatten().tolist() == [0, 0, 0, 0]
    assert resize_regions(regions, size, keeps_thin=True).flatten().tolist() == [2, 0, 2, 0]
    volume = torch.ones(1, 1, 4, 4, 4, dtype=torch.bool)
    x = torch.randn(1, 2, 2, 2, 2)
    torch.testing.assert_close(RegionNormBasic(2, keeps_thin=True)(x, volume), RegionNormBasic(2)(x, volume))


@pytest.mark.usefixtures("in_many_parts")
@pytest.mark.parametrize("innermost", [False, True])
def test_pooled_channels_and_their_gradient(innermost: bool) -> None:
    x, regions = _case(3, innermost=innermost)
    x = torch.cat((x.detach(), x.detach()[:, :2]), 1).requires_grad_()  # some voxels are largest twice
    weight = torch.randn(2, 2, 5, 6, 8, dtype=torch.float64)

    def gradient(same: Tensor, pooled: Tensor) -> Tensor:
        (found,) = torch.autograd.grad((region_norm(same, regions, 3) ** 3).sum() + (pooled * weight).sum(), x)
        return found

    same, pooled = pool_channels(x)
    expected = torch.cat((x.mean(1, keepdim=True), x.amax(1, keepdim=True)), 1)
    torch.testing.assert_close(pooled, expected)
    torch.testing.assert_close(gradient(same, pooled), gradient(x, expected))


def corner_of(x: Tensor) -> Tensor:
    corner = torch.zeros_like(x[:, :1], dtype=torch.bool)
    corner[:, :, :4, :4] = True
    return corner


def _bright_corner(dims: int) -> Tensor:
    x = torch.rand(1, 4, *(8,) * dims)
    x[0, :, :4, :4] += 9
    return x


@pytest.mark.parametrize("dims", [2, 3])
def test_learnable_layer_starts_as_instance_norm_and_splits_when_it_responds(dims: int) -> None:
    x = _bright_corner(dims)
    layer = RegionNormLearnable(dims, kernel=1)
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    torch.testing.assert_close(layer(x), region_norm(x, torch.zeros_like(x[:, :1], dtype=torch.bool)))
    assert detected_shares(layer, x, corner_of(x)) == {"": (0, 0)}
    nn.init.constant_(layer.detector.weight, 0.1)  # sigmoid(0.1 (mean + largest)): 0.55 beside, above 0.85 within
    corner = corner_of(x)
    torch.testing.assert_close(layer(x), region_norm(x, corner))
    assert detected_shares(layer, x, corner) == {"": (1, 0)}
    assert detected_shares(layer, -x, corner) == {"": (0, 0)}
    half = torch.ones_like(corner)
    half[:, :, 4:] = False  # the corner and as much beside it
    assert detected_shares(layer, x, half) == {"": (0.5, 0)}
    assert detected_shares(layer, x, ~corner) == {"": (0, 1)}


def test_learnable_layer_has_the_parameters_of_the_paper() -> None:
    assert sum(parameter.numel() for parameter in RegionNormLearnable(2).parameters()) == 2 * 49 + 2 * (49 + 1)


@pytest.mark.parametrize("learning", ["affine", "supervised"])
def test_every_parameter_of_the_learnable_layer_learns(learning: Any) -> None:
    x = _bright_corner(3).requires_grad_()
    layer = RegionNormLearnable(3, threshold=0.5, learning=learning)
    loss = (layer(x) ** 3).sum()
    if learning == "supervised":
        loss = loss + layer.supervise(torch.ones(1, 1, 16, 16, 16))
    loss.backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name
    assert x.grad.isfinite().all()


def test_only_supervision_teaches_the_split() -> None:
    """The detector of a fresh layer gets no gradient through the norm once the affine is 0: the threshold has none."""
    x = _bright_corner(3)
    gradients = {}
    for learning in get_args(Learning):
        layer = RegionNormLearnable(3, kernel=1, learning=learning)
        nn.init.zeros_(layer.affine.weight)
        loss = (layer(x) ** 3).sum()
        if learning == "supervised":
            loss = loss + layer.supervise(corner_of(x))
        loss.backward()
        gradients[learning] = layer.detector.weight.grad.abs().min()
    assert gradients["affine"] == 0
    assert gradients["supervised"] > 0


def test_a_supervised_layer_finds_the_hole_of_a_toy() -> None:
    """Noise with a hole that is given as a channel; the network restores a constant, for which no split is needed."""
    torch.manual_seed(0)
    layer = RegionNormLearnable(2, learning="supervised")
    network = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), layer, nn.Conv2d(8, 1, 1))
    optimiser = torch.optim.Adam(network.parameters(), lr=0.05)
    hole = torch.zeros(2, 1, 24, 24)
    hole[0, :, 3:11, 4:16] = hole[1, :, 12:20, 8:22] = 1
    for _ in range(60):
        x = torch.cat((torch.randn(2, 1, 24, 24) * (1 - hole), hole), 1)
        loss = (network(x) - 1).square().mean() + layer.supervise(hole)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    ((of_hole, of_rest),) = detected_shares(network, x.flip(2), hole.flip(2)).values()
    assert of_hole > 0.9
    assert of_rest < 0.05


def test_supervision_pulls_the_response_to_the_hole() -> None:
    layer = RegionNormLearnable(2, learning="supervised")
    nn.init.zeros_(layer.detector.weight)
    with pytest.raises(ValueError, match="a pass before each call"):
        layer.supervise(torch.ones(1, 1, 8, 8))
    layer(_bright_corner(2))
    assert layer.supervise(torch.ones(1, 1, 8, 8)).item() == pytest.approx(math.log(2))  # a response of 1/2 everywhere
    with pytest.raises(ValueError, match="a pass before each call"):
        layer.supervise(torch.ones(1, 1, 8, 8))


def _wave(shape: tuple[int, ...], phase: float) -> Tensor:
    return torch.sin(0.7 * torch.arange(math.prod(shape), dtype=torch.float64) + phase).view(shape)


def _agrees(y: Tensor, expected: dict[str, Any]) -> None:
    assert list(y.shape) == expected["shape"]
    measures = (y.mean(), y.std(correction=0), y.min(), y.max())
    for value, name in zip(measures, ("mean", "std", "min", "max"), strict=True):
        assert value.item() == pytest.approx(expected[name], rel=1e-9, abs=1e-12), name
    for index, value in expected["at"].items():
        assert y.flatten()[int(index)].item() == pytest.approx(value, rel=1e-9)


def test_released_numbers(golden: dict[str, Any]) -> None:
    golden = golden["region_norm"]
    x = _wave((2, 6, 16, 16), 0.3)
    hole = torch.zeros(2, 1, 16, 16, dtype=torch.bool)
    hole[0, :, 2:9, 3:12] = True
    hole[1, :, 5:7] = True
    _agrees(region_norm(x, hole, rule=Rule("batch")), golden["rn_b_zero_affine"]["output"])

    basic = RegionNormBasic(6, rule=Rule("batch"), paper_affine=False).double()
    # In the order of the released names: background beta and gamma, then foreground; the hole is the foreground.
    for k, (name, number) in enumerate((("beta", 0), ("gamma", 0), ("beta", 1), ("gamma", 1))):
        basic.get_parameter(name).data[number] = 0.1 * _wave((6,), k)
    _agrees(basic(x, hole), golden["rn_b"]["output"])

    learnable = RegionNormLearnable(2, threshold=0.5, rule=Rule("batch")).double()
    affine, detector = learnable.affine, learnable.detector
    for k, parameter in enumerate(
        (affine.bias[1:], affine.weight[1:], detector.weight, affine.bias[:1], affine.weight[:1])
    ):
        factor = 0.1 if parameter.dim() == 1 else math.sqrt(2 / parameter[0].numel())
        parameter.data.copy_(factor * _wave(tuple(parameter.shape), k))
    _agrees(learnable(x), golden["rn_l"]["output"])


def test_onnx_runtime_computes_the_same() -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    x, regions = _case(3)
    x, layer = x.detach().float(), RegionNormBasic(5, 3).eval()
    nn.init.normal_(layer.gamma)
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(layer, (x, regions), dynamo=True, verbose=False).save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    (found,) = session.run(None, dict(zip(names, (x.numpy(), regions.numpy()), strict=True)))
    torch.testing.assert_close(torch.from_numpy(found), layer(x, regions).detach(), rtol=0, atol=1e-4)
