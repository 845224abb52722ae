"""STU-Net: the released architecture, weight for weight."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from segkit.errors import RequestError
from segkit.losses.dice_cross_entropy import deep_supervision_weights
from segkit.models.stunet import SIZES, StuNet
from segkit.models.table import build_model
from segkit.preparing.memory import step_cost

RELEASED_STRIDES = ((2, 2, 2), (2, 2, 2), (2, 2, 2), (2, 2, 2), (1, 1, 2))
"""Strides of the released TotalSegmentator plan."""


def _build(in_channels: int = 1, out_channels: int = 2, dims: int = 3, size: str = "S", **arguments: Any) -> StuNet:
    model = build_model("stunet", in_channels=in_channels, out_channels=out_channels, dims=dims, size=size, **arguments)
    assert isinstance(model, StuNet)
    return model


def _on_meta(size: str, dims: int = 3, in_channels: int = 1) -> StuNet:
    with torch.device("meta"):
        return _build(in_channels, 105, dims, size)


@pytest.mark.parametrize(
    ("size", "parameters", "tensors"),
    [("S", 14_596_941, 130), ("B", 58_262_669, 130), ("L", 440_302_605, 218), ("H", 1_457_326_221, 306)],
)
def test_counts_are_the_published_ones(size: str, parameters: int, tensors: int) -> None:
    model = _on_meta(size)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert len(model.state_dict()) == tensors


def _published_shapes(widths: list[int], depth: int, inputs: int, outputs: int, dims: int) -> dict[str, list[int]]:
    """Every name of a released file with its shape."""
    three, one = [3] * dims, [1] * dims
    shapes: dict[str, list[int]] = {}

    def conv(name: str, out: int, into: int, kernel: list[int]) -> None:
        shapes[f"{name}.weight"] = [out, into, *kernel]
        shapes[f"{name}.bias"] = [out]

    def stage(name: str, width: int, into: int) -> None:
        for block in range(depth):
            conv(f"{name}.{block}.conv1", width, into if block == 0 else width, three)
            conv(f"{name}.{block}.conv2", width, width, three)
            for norm in ("norm1", "norm2"):
                shapes[f"{name}.{block}.{norm}.weight"] = shapes[f"{name}.{block}.{norm}.bias"] = [width]
        conv(f"{name}.0.conv3", width, into, one)

    for d in range(6):
        stage(f"conv_blocks_context.{d}", widths[d], inputs if d == 0 else widths[d - 1])
    for u in range(5):
        conv(f"upsample_layers.{u}.conv", widths[4 - u], widths[5 - u], one)
        stage(f"conv_blocks_localization.{u}", widths[4 - u], 2 * widths[4 - u])
        conv(f"seg_outputs.{u}", outputs, widths[4 - u], one)
    return shapes


@pytest.mark.parametrize(
    ("size", "widths", "depth"),
    [
        ("S", [16, 32, 64, 128, 256, 256], 1),
        ("B", [32, 64, 128, 256, 512, 512], 1),
        ("L", [64, 128, 256, 512, 1024, 1024], 2),
        ("H", [96, 192, 384, 768, 1536, 1536], 3),
    ],
)
@pytest.mark.parametrize("dims", [2, 3])
def test_names_and_shapes_are_the_released_ones(size: str, widths: list[int], depth: int, dims: int) -> None:
    found = {name: list(tensor.shape) for name, tensor in _on_meta(size, dims, in_channels=4).state_dict().items()}
    assert found == _published_shapes(widths, depth, 4, 105, dims)


def test_a_few_released_shapes_of_size_b() -> None:
    state = _on_meta("B").state_dict()
    assert state["conv_blocks_context.0.0.conv1.weight"].shape == (32, 1, 3, 3, 3)
    assert state["conv_blocks_context.5.0.conv3.weight"].shape == (512, 512, 1, 1, 1)
    assert state["upsample_layers.1.conv.weight"].shape == (256, 512, 1, 1, 1)
    assert state["conv_blocks_localization.0.0.conv1.weight"].shape == (512, 1024, 3, 3, 3)
    assert state["seg_outputs.0.weight"].shape == (105, 512, 1, 1, 1)


def _wave(shape: list[int], phase: int) -> Tensor:
    return torch.sin(0.7 * torch.arange(math.prod(shape), dtype=torch.float64) + phase).reshape(shape)


def _fill(model: nn.Module) -> None:
    """Weights as the golden file describes them, each a wave whose phase is the rank of its name."""
    state = model.state_dict()
    for rank, name in enumerate(sorted(state)):
        tensor = state[name]
        wave = _wave(list(tensor.shape), rank)
        if tensor.dim() > 1:
            tensor.copy_(wave * math.sqrt(2 / (tensor.numel() / tensor.shape[0])))
        else:
            tensor.copy_((1 if name.endswith("weight") else 0) + 0.1 * wave)


@pytest.mark.parametrize("name", ["S_in1_out3", "S_in4_out3"])
def test_outputs_are_those_of_the_released_code(name: str, golden: dict[str, Any]) -> None:
    golden = golden["stunet"]
    assert set(golden) == {"S_in1_out3", "S_in4_out3"}
    expected = golden[name]
    shape = json.loads(expected["input"].removeprefix("wave(").removesuffix(", 0)"))
    model = _build(shape[1], 3, strides=expected["strides"]).double()
    _fill(model)
    with torch.no_grad():
        levels = model.train()(_wave(shape, 0))
    for level, values in zip(levels, expected["outputs_full_resolution_first"], strict=True):
        assert list(level.shape) == values["shape"]
        found = [level.mean(), level.std(correction=0), level.min(), level.max()]
        found += [level.flatten()[int(index)] for index in values["at"]]
        wanted = [values[key] for key in ("mean", "std", "min", "max")] + list(values["at"].values())
        torch.testing.assert_close(torch.stack(found), torch.tensor(wanted, dtype=torch.float64), rtol=1e-9, atol=0)


def _as_published(
    state: dict[str, Tensor], x: Tensor, strides: tuple[tuple[int, ...], ...], *, skip_first: bool = False
) -> list[Tensor]:
    """The network written out with functions, upsampling before its convolution; logits full resolution first."""
    conv = functional.conv2d if x.dim() == 4 else functional.conv3d

    def apply(name: str, x: Tensor, stride: tuple[int, ...] | int = 1, padding: int = 0) -> Tensor:
        result: Tensor = conv(x, state[f"{name}.weight"], state[f"{name}.bias"], stride, padding)
        return result

    def normalise(name: str, x: Tensor) -> Tensor:
        return functional.instance_norm(x, weight=state[f"{name}.weight"], bias=state[f"{name}.bias"])

    def stage(name: str, x: Tensor, stride: tuple[int, ...] | int = 1) -> Tensor:
        block = 0
        while f"{name}.{block}.conv1.weight" in state:
            y = apply(f"{name}.{block}.conv1", x, stride if block == 0 else 1, 1)
            y = functional.leaky_relu(normalise(f"{name}.{block}.norm1", y), 0.01)
            y = normalise(f"{name}.{block}.norm2", apply(f"{name}.{block}.conv2", y, 1, 1))
            x = functional.leaky_relu(y + (apply(f"{name}.0.conv3", x, stride) if block == 0 else x), 0.01)
            block += 1
        return x

    skips = [stage("conv_blocks_context.0", x)]
    for d, stride in enumerate(strides, start=1):
        skips.append(stage(f"conv_blocks_context.{d}", skips[-1], stride))
    x, logits = skips.pop(), []
    for u, stride in enumerate(reversed(strides)):
        x = functional.interpolate(x, scale_factor=tuple(map(float, stride)), mode="nearest")
        parts = (apply(f"upsample_layers.{u}.conv", x), skips.pop())
        x = stage(f"conv_blocks_localization.{u}", torch.cat(parts[::-1] if skip_first else parts, dim=1))
        logits.insert(0, apply(f"seg_outputs.{u}", x))
    return logits


@pytest.mark.parametrize(
    ("strides", "shape"),
    [(RELEASED_STRIDES, (1, 2, 32, 32, 64)), (((2, 2), (2, 2), (2, 2), (1, 2), (1, 1)), (2, 2, 16, 32))],
)
def test_convolving_before_upsampling_changes_nothing(
    strides: tuple[tuple[int, ...], ...], shape: tuple[int, ...]
) -> None:
    model = _build(2, 3, len(shape) - 2, width=3, depth=2, strides=strides).double().train()
    _fill(model)
    x, state = _wave(list(shape), 1), model.state_dict()
    with torch.no_grad():
        levels = model(x)
    for level, expected in zip(levels, _as_published(state, x, strides), strict=True):
        torch.testing.assert_close(level, expected, rtol=1e-9, atol=1e-10)
    # The comparison sees the order of the concatenation, which no shape gives away.
    swapped = _as_published(state, x, strides, skip_first=True)
    assert all((level - other).abs().max() > 0.1 for level, other in zip(levels, swapped, strict=True))


@pytest.mark.parametrize("supervised_levels", [1, 5])
def test_checkpointing_changes_memory_and_nothing_else(supervised_levels: int) -> None:
    strides = ((2, 2, 2), (2, 2, 2), (1, 1, 2), (1, 1, 1), (1, 1, 1))
    plain, saving = (
        _build(width=2, depth=2, strides=strides, supervised_levels=supervised_levels, mode=mode).double().train()
        for mode in ("plain", "checkpoint")
    )
    saving.load_state_dict(plain.state_dict(), strict=True)
    x = torch.randn(1, 1, 8, 8, 16, dtype=torch.float64)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for model, image in zip((plain, saving), inputs, strict=True):
        sum(level.square().mean() for level in model(image)).backward()
    for level, expected in zip(saving(x), plain(x), strict=True):
        torch.testing.assert_close(level, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-9, atol=1e-12)
    for (name, ours), theirs in zip(saving.named_parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)


def test_gradients_survive_what_is_done_in_place() -> None:
    strides = ((2, 2), (1, 2), (1, 1), (1, 1), (1, 1))
    model = _build(dims=2, width=1, strides=strides, supervised_levels=1).double().train()
    _fill(model)
    x = torch.randn(1, 1, 4, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda image: model(image)[0], x)


def test_size_h_is_built_and_counted_without_memory() -> None:
    def saved(mode: str) -> int:
        def loss(levels: list[Tensor], labels: Tensor) -> Tensor:
            return torch.stack([level.mean() for level in levels]).sum()

        return step_cost(lambda: _build(1, 105, size="H", mode=mode), (1, 1, 128, 128, 128), loss).saved

    plain, checkpointed = saved("plain"), saved("checkpoint")
    assert plain > 20 * 2**30
    # At least its blocks' own inputs are kept: three of 96 channels at full resolution on either way.
    assert 6 * 96 * 128**3 * 4 < checkpointed < 0.25 * plain


def test_released_strides_set_divisor_and_levels() -> None:
    model = _build(1, 3, width=2, strides=RELEASED_STRIDES).train()
    assert model.divisor == (16, 16, 32)
    x = torch.randn(1, 1, 32, 32, 64)
    with torch.no_grad():
        levels, features = model(x), model.encode(x)
    assert [feature.shape[1] for feature in features] == [2, 4, 8, 16, 32, 32]
    assert features[-1].shape[2:] == (2, 2, 2)
    assert [tuple(level.shape[2:]) for level in levels] == [
        (32, 32, 64),
        (16, 16, 32),
        (8, 8, 16),
        (4, 4, 8),
        (2, 2, 4),
    ]


@pytest.mark.parametrize(("dims", "is_training"), [(2, True), (2, False), (3, True), (3, False)])
def test_one_voxel_at_the_bottom_gives_its_shift(dims: int, is_training: bool) -> None:
    model = _build(dims=dims, width=1).train(is_training)
    assert model.divisor == (32,) * dims
    norm = model.conv_blocks_context[-1][0].norm2
    nn.init.uniform_(norm.bias)
    found: list[Tensor] = []
    norm.register_forward_hook(lambda _module, _inputs, output: found.append(output.clone()))
    result = model(torch.randn(1, 1, *(32,) * dims))
    torch.testing.assert_close(found[0].flatten(), norm.bias)
    logits = result[0] if is_training else result
    logits.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_convolutions_start_he_normal_without_bias() -> None:
    state = _build(3, 4).state_dict()
    weight = state["conv_blocks_context.5.0.conv2.weight"]  # 256 x 256 x 27 draws
    assert float(weight.std()) == pytest.approx(math.sqrt(2 / (1 + 0.01**2) / (256 * 27)), rel=5e-3)
    assert float(weight.abs().max()) > 4 * float(weight.std())  # a uniform distribution would end at 1.7
    assert float(state["upsample_layers.0.conv.weight"].std()) == pytest.approx(math.sqrt(2 / 256), rel=2e-2)
    biases = [value for name, value in state.items() if name.endswith("bias")]
    assert len(biases) == 65
    assert not any(bias.any() for bias in biases)


def test_four_supervised_levels_are_the_loss_of_nnunet() -> None:
    model = _build(width=1, supervised_levels=4).train()
    levels = model(torch.randn(1, 1, 32, 32, 32))
    assert [level.shape[-1] for level in levels] == [32, 16, 8, 4]
    # nnU-Net: 1, 1/2, 1/4, 1/8 and 0 for the coarsest, divided by their sum.
    assert deep_supervision_weights(len(levels)) == pytest.approx([8 / 15, 4 / 15, 2 / 15, 1 / 15])
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["seg_outputs.0.weight", "seg_outputs.0.bias"]
    sum(level.square().mean() for level in levels).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_evaluation_computes_the_main_head_alone() -> None:
    model = _build(width=1)
    called: list[int] = []
    for index, head in enumerate(model.seg_outputs):
        head.register_forward_hook(lambda *_, index=index: called.append(index))
    x = torch.randn(1, 1, 32, 32, 32)
    with torch.no_grad():
        model.eval()(x)
        assert called == [4]
        model.train()(x)
    assert called == [4, 0, 1, 2, 3, 4]


@pytest.mark.parametrize("mode", ["plain", "checkpoint"])
def test_trains_in_bfloat16(mode: str) -> None:
    strides = ((2, 2, 2), (2, 2, 2), (1, 1, 1), (1, 1, 1), (1, 1, 1))
    model = _build(width=4, strides=strides, mode=mode).train()
    x = torch.randn(1, 1, 16, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        levels = model(x)
        sum(level.float().square().mean() for level in levels).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    with torch.no_grad():
        expected = model(x)[0]
    assert float((levels[0].detach() - expected).abs().max()) < 0.1 * float(expected.abs().max())


def test_wrong_requests_say_what_is_wrong() -> None:
    with pytest.raises(RequestError, match="strides names 4 steps, but STU-Net has 5"):
        _build(strides=RELEASED_STRIDES[1:])
    with pytest.raises(RequestError, match="is not two or three whole numbers from 1 on"):
        _build(strides=((0, 2, 2), *RELEASED_STRIDES[1:]))
    with pytest.raises(RequestError, match="do not have 2 entries each"):
        _build(dims=2, strides=RELEASED_STRIDES)
    with pytest.raises(RequestError, match="supervised_levels: Input should be less than or equal to 5"):
        _build(supervised_levels=6)
    with pytest.raises(RequestError, match=r"mode: Input should be 'plain' or 'checkpoint'"):
        _build(mode="reversible")
    with pytest.raises(RequestError, match=r"no size 'base'; expected one of S, B, L, H"):
        _build(size="base")


def test_sizes_differ_in_width_and_depth_alone() -> None:
    assert {size: tuple(values.values()) for size, values in SIZES.items()} == {
        "S": (16, 1),
        "B": (32, 1),
        "L": (64, 2),
        "H": (96, 3),
    }
