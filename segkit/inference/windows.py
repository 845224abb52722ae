"""Sliding windows: a volume of any size through a network that takes one patch size.

Windows overlap and are blended with a Gaussian weight, so a voxel is decided mostly by the windows that see it near
their centre (Isensee et al., nnU-Net, Nature Methods 2021, supplement 4). A volume smaller than the window is padded
with zeros, half on each side.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from monai.inferers import sliding_window_inference
from torch import Tensor

Network: TypeAlias = Callable[[Tensor], Tensor | Sequence[Tensor]]
"""Patches (B, C, *patch) to logits (B, K, *patch), or to a list of logits with full resolution first."""

_log = logging.getLogger(__name__)


def predict_logits(
    network: Network,
    image: Tensor,
    patch_size: Sequence[int],
    *,
    overlap: float = 0.5,
    batch_size: int = 1,
    device: torch.device | str = "cpu",
    mirror_axes: Sequence[int] = (),
) -> Tensor:
    """Logits (K, *spatial) float32 of an image (C, *spatial), on the CPU; axes are counted over *spatial.

    `mirror_axes` is test-time augmentation: logits are averaged over every combination of flips along these axes, so
    each axis doubles the work. On a GPU the blended volume is kept there, and on the CPU where it does not fit.
    """
    device = torch.device(device)
    window_network = _Mirrored(network, mirror_axes) if mirror_axes else _FirstOutput(network)

    def blend_on(stitching_device: torch.device, windows_at_once: int) -> Tensor:
        logits: Tensor = sliding_window_inference(
            image[None],
            tuple(patch_size),
            windows_at_once,
            window_network,
            overlap=overlap,
            mode="gaussian",
            sw_device=device,
            device=stitching_device,
        )
        return logits[0].cpu()

    with torch.inference_mode():
        try:
            return blend_on(device, batch_size)
        except torch.OutOfMemoryError:
            if device.type == "cpu":
                raise
            _log.warning("%s is out of memory; going on window by window, blending in main memory", device)
        torch.cuda.empty_cache()
        return blend_on(torch.device("cpu"), 1)


class _FirstOutput:
    """A network's full-resolution logits, whether it gives one tensor or a list."""

    def __init__(self, network: Network) -> None:
        self.network = network

    def __call__(self, patches: Tensor) -> Tensor:
        logits = self.network(patches)
        return (logits if isinstance(logits, Tensor) else logits[0]).float()


class _Mirrored(_FirstOutput):
    """The mean of a network's logits over all flips of its input along some spatial axes."""

    def __init__(self, network: Network, axes: Sequence[int]) -> None:
        super().__init__(network)
        self.flips = [
            tuple(axis + 2 for axis in chosen)
            for count in range(1, len(axes) + 1)
            for chosen in itertools.combinations(axes, count)
        ]

    def __call__(self, patches: Tensor) -> Tensor:
        total = super().__call__(patches).clone()
        for flip in self.flips:
            total += super().__call__(patches.flip(flip)).flip(flip)
        return total / (len(self.flips) + 1)
