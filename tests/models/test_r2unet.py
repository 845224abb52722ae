"""R2U-Net and RU-Net: their recurrence by hand, the popular form's size, and the trap of its shared norm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from segkit.errors import RequestError
from segkit.models.r2unet import (
    Norm,
    R2UNetConfig,
    RecurrentConvolution,
    RecurrentUnit,
    Share,
    build_recurrent_convolution,
)
from segkit.models.table import MODELS, build_model


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _convolution(*kernel: float, bias: float | None = None) -> nn.Conv2d:
    """One channel, 1 x 3, its kernel set by hand."""
    layer = nn.Conv2d(1, 1, (1, 3), padding=(0, 1), bias=bias is not None)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(kernel).view(1, 1, 1, 3))
        if layer.bias is not None and bias is not None:
            layer.bias.fill_(bias)
    return layer


def _by_hand(feed_forward: nn.Module, recurrent: nn.Module | None, *, steps: int, **more: Any) -> list[float]:
    norms = [nn.Identity() for _ in range(steps + 1)]
    layer = RecurrentConvolution(feed_forward=feed_forward, recurrent=recurrent, norms=norms, steps=steps, **more)
    found: list[float] = layer(torch.tensor([1.0, 2.0, -1.0]).view(1, 1, 1, 3)).flatten().tolist()
    return found


# The feed-forward kernel takes a voxel minus its left neighbour: [1, 2, -1] gives [1, 1, -3], so h_0 = [1, 1, 0].
# The recurrent kernel doubles the left neighbour: of h_0 that is [0, 2, 2], and h_1 = ReLU([1, 3, -1]) = [1, 3, 0].
# Of h_1 it is [0, 2, 6], and h_2 = ReLU([1, 3, 3]) = [1, 3, 3].
@pytest.mark.parametrize(("steps", "expected"), [(0, [1.0, 1.0, 0.0]), (1, [1.0, 3.0, 0.0]), (2, [1.0, 3.0, 3.0])])
def test_recurrence_by_hand(steps: int, expected: list[float]) -> None:
    assert _by_hand(_convolution(-1, 1, 0), _convolution(2, 0, 0), steps=steps) == expected


def test_accumulation_sums_the_activations_of_all_steps() -> None:
    found = _by_hand(_convolution(-1, 1, 0), _convolution(2, 0, 0), steps=2, accumulate=True)
    assert found == [1.0 + 1.0 + 1.0, 1.0 + 3.0 + 3.0, 0.0 + 0.0 + 3.0]


# Tied and with bias 1: f([1, 2, -1]) = [2, 2, -2], h_0 = [2, 2, 0]. Without the bias f(h_0) = [2, 0, -2], so that
# h_1 = ReLU([4, 2, -4]) = [4, 2, 0]; the naive f(x + h_0) = f([3, 4, -1]) = [3, 1, -5] + 1 = [4, 2, -4] agrees.
def test_tied_recurrence_by_hand_counts_the_bias_once() -> None:
    assert _by_hand(_convolution(-1, 1, 0, bias=1.0), None, steps=1) == [4.0, 2.0, 0.0]


@pytest.mark.parametrize("dims", [2, 3])
def test_tied_sum_equals_the_naive_convolution_of_the_sum(dims: int) -> None:
    layer = build_recurrent_convolution(4, dims, R2UNetConfig(steps=3, share="tied", norm="none", bias=True)).double()
    nn.init.normal_(layer.feed_forward.bias)  # type: ignore[arg-type]
    x = torch.randn(2, 4, *(5,) * dims, dtype=torch.float64)
    naive = torch.relu(layer.feed_forward(x))
    for _ in range(3):
        naive = torch.relu(layer.feed_forward(x + naive))
    torch.testing.assert_close(layer(x), naive)


@pytest.mark.parametrize(("share", "recurrent_calls"), [("separate", 2), ("tied", 0)])
def test_feed_forward_is_computed_once_and_activated_once_more_than_there_are_steps(
    share: Share, recurrent_calls: int
) -> None:
    layer = build_recurrent_convolution(4, 2, R2UNetConfig(steps=2, share=share))
    calls: dict[str, int] = dict.fromkeys(
        ("feed_forward", "recurrent", "activation", "norms.0", "norms.1", "norms.2"), 0
    )
    for name, part in layer.named_modules():
        if name in calls:
            part.register_forward_hook(lambda *_, name=name: calls.__setitem__(name, calls[name] + 1))
    layer(torch.randn(1, 4, 6, 6))
    once = {"feed_forward": 1, "norms.0": 1, "norms.1": 1, "norms.2": 1}
    assert calls == {**once, "recurrent": recurrent_calls, "activation": 3}


@pytest.mark.parametrize("share", ["separate", "tied"])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_loop_keeps_the_size_of_its_input(share: Share, steps: int) -> None:
    layers = nn.Sequential(
        *(build_recurrent_convolution(32, 2, R2UNetConfig(steps=steps, share=share, norm="none")) for _ in range(6))
    )
    x = torch.randn(2, 32, 24, 24).relu()
    with torch.no_grad():
        ratio = float(layers(x).square().mean() / x.square().mean()) ** (1 / 12)  # of the amplitude, per layer
    assert 0.6 < ratio < 1.4


def test_the_wrong_number_of_norms_is_refused() -> None:
    with pytest.raises(ValueError, match="2 recurrent steps need 3 norms or a single one, but got 2"):
        RecurrentConvolution(feed_forward=nn.Identity(), recurrent=None, norms=[nn.Identity()] * 2, steps=2)


def test_unit_adds_the_projected_input_only_with_a_residual() -> None:
    double, triple = nn.Conv2d(1, 1, 1, bias=False), nn.Conv2d(1, 1, 1, bias=False)
    nn.init.constant_(double.weight, 2.0)
    nn.init.constant_(triple.weight, 3.0)
    x = torch.full((1, 1, 1, 1), 5.0)
    assert RecurrentUnit(double, [triple], residual=False)(x).item() == 5 * 2 * 3
    assert RecurrentUnit(double, [triple], residual=True)(x).item() == 5 * 2 * 3 + 5 * 2


def test_popular_form_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        assert _parameters(build_model("r2unet", in_channels=3, out_channels=1, dims=2, size="parity")) == 39_091_393


@pytest.mark.parametrize(
    ("widths", "share", "expected"),
    [
        ((16, 32, 64, 128), "tied", 609_585),
        ((16, 32, 64, 128), "separate", 1_098_033),
        ((64, 128, 256, 512), "tied", 9_718_977),
        ((64, 128, 256, 512), "separate", 17_534_145),
    ],
)
def test_narrower_widths_in_the_popular_form(widths: tuple[int, ...], share: str, expected: int) -> None:
    with torch.device("meta"):
        model = build_model("r2unet", in_channels=3, out_channels=1, dims=2, size="parity", widths=widths, share=share)
    assert _parameters(model) == expected


def test_runet_is_r2unet_without_the_residual() -> None:
    recurrent = build_model("runet", in_channels=1, out_channels=2, dims=2, size="tiny").eval()
    residual = build_model("r2unet", in_channels=1, out_channels=2, dims=2, size="tiny").eval()
    recurrent.load_state_dict(residual.state_dict(), strict=True)
    x = torch.randn(1, 1, 8, 8)
    assert not torch.allclose(recurrent(x), residual(x))
    for unit in [m for m in residual.modules() if isinstance(m, RecurrentUnit)]:
        unit.residual = False
    torch.testing.assert_close(recurrent(x), residual(x))


def test_decoder_puts_the_skip_before_what_comes_from_below() -> None:
    model = build_model("r2unet", in_channels=1, out_channels=1, dims=2, size="tiny", widths=(2, 3), up="nearest")
    seen: list[Tensor] = []
    model.decoder.units[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))  # type: ignore[union-attr, index, operator]
    x = torch.randn(1, 1, 4, 4)
    model(x)
    features = model.encoder(x)  # type: ignore[operator]
    torch.testing.assert_close(seen[0][:, :2], features[0])
    torch.testing.assert_close(seen[0][:, 2:], model.decoder.ups[0](features[1]))  # type: ignore[union-attr, index, operator]


NORMS: tuple[Norm, ...] = ("instance", "group", "batch_per_step", "batch_shared", "none")


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("share", ["separate", "tied"])
def test_checkpoint_mode_changes_memory_only(dims: int, norm: Norm, share: str) -> None:
    arguments: dict[str, object] = {"size": "tiny", "widths": (4, 6), "norm": norm, "share": share}
    plain = build_model("r2unet", in_channels=1, out_channels=2, dims=dims, **arguments).double()  # type: ignore[arg-type]
    other = build_model("r2unet", in_channels=1, out_channels=2, dims=dims, mode="checkpoint", **arguments)  # type: ignore[arg-type]
    other = other.double()
    other.load_state_dict(plain.state_dict(), strict=True)
    x = torch.randn(2, 1, *(8,) * dims, dtype=torch.float64)
    outputs = [model(x)[0] for model in (plain, other)]
    torch.testing.assert_close(outputs[1], outputs[0])
    for output in outputs:
        output.square().sum().backward()
    for ours, expected in zip(other.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad)
    for (name, ours), (_, expected) in zip(other.named_buffers(), plain.named_buffers(), strict=True):
        torch.testing.assert_close(ours, expected, msg=name)


def test_batch_norms_count_one_batch_per_step_of_training() -> None:
    def counts(norm: Norm) -> set[int]:
        model = build_model(
            "r2unet", in_channels=1, out_channels=1, dims=2, size="tiny", norm=norm, mode="checkpoint", up="nearest"
        )
        model(torch.randn(2, 1, 8, 8))[0].sum().backward()
        return {int(count) for name, count in model.named_buffers() if name.endswith("num_batches_tracked")}

    assert counts("batch_per_step") == {1}
    assert counts("batch_shared") == {1, 3}  # up-sampling, and t + 1 activations through one norm: the trap


def test_checkpoint_mode_keeps_a_layer_s_input_only() -> None:
    def saved(mode: str) -> int:
        layer = build_recurrent_convolution(8, 2, R2UNetConfig(steps=2, mode=mode))  # type: ignore[arg-type]
        sizes: dict[int, int] = {}
        own = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
        kept: list[Tensor] = []  # alive, so that no storage is used twice

        def pack(tensor: Tensor) -> Tensor:
            kept.append(tensor)
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            layer(torch.randn(1, 8, 16, 16, requires_grad=True))
        return sum(size for pointer, size in sizes.items() if pointer not in own)

    activation = 8 * 16 * 16 * 4  # bytes, float32
    assert saved("checkpoint") <= activation
    assert saved("plain") >= 6 * activation


# In the popular code one batch norm serves all steps. Its running averages mix step 0 with the later ones, so that
# evaluation is another network than training; see benchmarks/norm_trap.py.
@pytest.mark.parametrize(("norm", "lowest", "highest"), [("batch_per_step", 0.0, 0.01), ("batch_shared", 0.2, 10.0)])
def test_evaluation_after_training_on_one_batch(norm: Norm, lowest: float, highest: float) -> None:
    layers = nn.Sequential(
        *(build_recurrent_convolution(16, 2, R2UNetConfig(share="tied", norm=norm)) for _ in range(4))
    )
    batch = torch.randn(4, 16, 16, 16)
    with torch.no_grad():
        for _ in range(200):
            trained = layers.train()(batch)
        change = (layers.eval()(batch) - trained).norm() / trained.norm()
    assert lowest <= change <= highest


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(
    "arguments",
    [
        {"size": "parity", "widths": (4, 6, 8)},
        {"norm": "none", "accumulate": True},
        {"norm": "group", "steps": 0},
        {"projection": "always", "up": "nearest", "share": "tied", "bias": True},
    ],
)
def test_the_other_forms_compute_in_both_dimensions(dims: int, arguments: dict[str, object]) -> None:
    model = build_model("r2unet", in_channels=2, out_channels=3, dims=dims, **{"widths": (4, 6, 8), **arguments})  # type: ignore[arg-type]
    x = torch.randn(2, 2, *(8,) * dims)
    (logits,) = model(x)
    assert logits.shape == (2, 3, *(8,) * dims)
    logits.square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    assert model.eval()(x).shape == logits.shape


def test_odd_strides_set_the_divisor() -> None:
    for up in ("transposed", "nearest"):
        model = build_model("r2unet", in_channels=1, out_channels=2, size="tiny", strides=((1, 2, 3), (2, 2, 1)), up=up)
        assert model.divisor == (2, 4, 3)
        assert model.eval()(torch.randn(1, 1, 4, 4, 9)).shape == (1, 2, 4, 4, 9)


def test_supervised_levels_add_heads_below_the_first() -> None:
    model = build_model("r2unet", in_channels=1, out_channels=2, dims=2, size="tiny", supervised_levels=2)
    assert [level.shape[2] for level in model(torch.randn(1, 1, 8, 8))] == [8, 4]
    with pytest.raises(RequestError, match="supervised_levels is 3"):
        build_model("r2unet", in_channels=1, out_channels=2, dims=2, size="tiny", supervised_levels=3)


@pytest.mark.parametrize(
    ("in_channels", "projection", "expected"),
    [
        (3, "when_needed", "encoder.units.0.projection.weight"),
        (8, "when_needed", "encoder.units.0.layers.0.feed_forward.weight"),
        (8, "always", "encoder.units.0.projection.weight"),
    ],
)
def test_the_tensor_that_sees_the_image_is_named(in_channels: int, projection: str, expected: str) -> None:
    model = build_model("r2unet", in_channels=in_channels, out_channels=1, size="tiny", projection=projection)
    assert model.input_weights == (expected,)
    assert model.state_dict()[expected].shape[1] == in_channels


def test_volumes_run_with_channels_innermost_also_from_one_channel() -> None:
    model = build_model("r2unet", in_channels=1, out_channels=1, size="tiny", widths=(4, 6))
    seen: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, RecurrentConvolution):
            module.register_forward_hook(lambda _module, _args, output: seen.append(output))
    model(torch.randn(2, 1, 8, 8, 8))  # a batch of one this small would take a kernel that turns it back
    assert len(seen) == 6
    assert all(x.is_contiguous(memory_format=torch.channels_last_3d) and not x.is_contiguous() for x in seen)


def test_wrong_requests_say_what_is_wrong() -> None:
    for arguments, message in (
        ({"widths": (8,)}, "widths must name at least two levels"),
        ({"widths": (8, 0)}, "widths must be at least 1"),
        ({"strides": ((2, 2, 2),)}, "strides names 1 steps, but 3 widths need 2"),
        ({"strides": ((2, 2), (2, 2))}, "do not have 3 entries each"),
        ({"strides": ((0, 2, 2), (2, 2, 2))}, "is not two or three whole numbers from 1 on"),
        ({"steps": -1}, "steps"),
        ({"norm": "batch"}, "norm"),
    ):
        with pytest.raises(RequestError, match=message):
            build_model("r2unet", in_channels=1, out_channels=1, size="tiny", **arguments)  # type: ignore[arg-type]


def test_sizes_of_both_families_differ_in_the_residual_only() -> None:
    expected = {size: {**values, "residual": False} for size, values in MODELS["r2unet"].sizes.items()}
    assert MODELS["runet"].sizes == expected
