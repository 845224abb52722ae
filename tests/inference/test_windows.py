"""Windows over volumes of any size, blended to what one whole pass would give."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from segkit.inference import windows
from segkit.inference.windows import predict_logits


def double(patches: Tensor) -> Tensor:
    return torch.cat([2 * patches, -patches], dim=1)


@pytest.mark.parametrize("shape", [(8, 8, 8), (11, 9, 20), (3, 8, 5), (1, 1, 1)])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_blending_a_voxelwise_network_gives_its_values(shape: tuple[int, ...], batch_size: int) -> None:
    image = torch.randn(1, *shape)
    logits = predict_logits(double, image, (8, 8, 8), batch_size=batch_size)
    assert logits.shape == (2, *shape)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, torch.cat([2 * image, -image]), rtol=1e-4, atol=1e-5)


def test_pictures_have_two_axes() -> None:
    image = torch.randn(3, 10, 7)
    logits = predict_logits(lambda patches: patches[:, :1].clone(), image, (4, 8), overlap=0.25)
    torch.testing.assert_close(logits, image[:1], rtol=1e-4, atol=1e-5)


def test_small_volumes_are_padded_with_zeros_half_on_each_side() -> None:
    seen: list[Tensor] = []

    def remember(patches: Tensor) -> Tensor:
        seen.append(patches)
        return patches.clone()

    predict_logits(remember, torch.ones(1, 2, 3, 4), (4, 4, 4))
    (patch,) = seen
    assert patch.shape == (1, 1, 4, 4, 4)
    assert patch[0, 0, :, 0, 0].tolist() == [0, 1, 1, 0]
    assert patch[0, 0, 1, :, 0].tolist() == [1, 1, 1, 0]


def test_windows_overlap_by_half() -> None:
    corners = []

    def count(patches: Tensor) -> Tensor:
        corners.extend(patches[:, 0, 0, 0, 0].tolist())
        return patches.clone()

    image = torch.arange(8.0)[None, :, None, None].expand(1, 8, 4, 4)
    predict_logits(count, image, (4, 4, 4), overlap=0.5)
    assert corners == [0.0, 2.0, 4.0]


def test_of_deep_supervision_only_full_resolution_is_used() -> None:
    image = torch.randn(1, 8, 8, 8)
    logits = predict_logits(lambda patches: [patches + 1, patches[..., ::2, ::2, ::2]], image, (8, 8, 8))
    torch.testing.assert_close(logits, image + 1)


def test_mirroring_averages_over_all_flips() -> None:
    def shift(patches: Tensor) -> Tensor:
        return patches.roll(1, dims=2)

    image = torch.zeros(1, 4, 4, 4)
    image[0, 1] = 1.0
    logits = predict_logits(shift, image, (4, 4, 4), mirror_axes=(0,))
    # Shifted forward the plane lies at 2; flipped, shifted and flipped back it lies at 0.
    assert logits[0, :, 0, 0].tolist() == [0.5, 0.0, 0.5, 0.0]


def test_mirroring_three_axes_calls_the_network_eight_times() -> None:
    calls = 0

    def count(patches: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return patches.clone()

    image = torch.randn(1, 4, 4, 4)
    logits = predict_logits(count, image, (4, 4, 4), mirror_axes=(0, 1, 2))
    assert calls == 8
    torch.testing.assert_close(logits, image)


def test_no_gradient_is_kept() -> None:
    weight = torch.ones(1, requires_grad=True)
    logits = predict_logits(lambda patches: patches * weight, torch.ones(1, 4, 4, 4), (4, 4, 4))
    assert not logits.requires_grad


def test_a_full_gpu_falls_back_to_main_memory(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[tuple[str, int]] = []

    def full(inputs: Tensor, patch: object, batch: int, network: object, **options: object) -> Tensor:
        asked.append((str(options["device"]), batch))
        if str(options["device"]) != "cpu":
            raise torch.OutOfMemoryError
        return inputs

    monkeypatch.setattr(windows, "sliding_window_inference", full)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    with caplog.at_level(logging.WARNING):
        logits = predict_logits(double, torch.ones(1, 4, 4, 4), (4, 4, 4), batch_size=2, device="cuda")
    assert asked == [("cuda", 2), ("cpu", 1)]
    assert logits.shape == (1, 4, 4, 4)
    assert "out of memory" in caplog.text
