"""From logits on the prepared grid to a label map, or probabilities, on the grid of the input file.

The recorded preparation is walked back: logits are resampled linearly to the cropped box where the case was
resampled, the box is put into the whole volume, and the orientation is undone. Channels are decoded one after the
other, so beside the logits there are never more than two float planes of the volume, whatever the number of labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from segkit.data.preprocessing import Preparation
from segkit.errors import CheckpointError
from segkit.shapes import AnyArray, LabelMap

Activation = Literal["sigmoid", "softmax"]


def decode(logits: Tensor, preparation: Preparation, activation: Activation, values: Sequence[int]) -> LabelMap:
    """Label map (*source) uint8 on the input's grid, from logits (K, *prepared) on the CPU.

    Output k paints `values[k]`. Sigmoid outputs are painted where the logit is above 0 (probability above one half),
    later over earlier; softmax outputs where their logit is the largest, the first of equals. Outside the crop is 0.

    Raises:
        CheckpointError: the logits hold NaN.
    """
    return _to_source(_painted(logits, preparation.cropped_shape, activation, values), preparation)


def decode_prepared(logits: Tensor, activation: Activation, values: Sequence[int]) -> LabelMap:
    """Label map (*prepared) uint8 on the grid of the logits (K, *prepared), painted as `decode` paints.

    Raises:
        CheckpointError: the logits hold NaN.
    """
    return _painted(logits, tuple(logits.shape[1:]), activation, values)


def _painted(logits: Tensor, shape: tuple[int, ...], activation: Activation, values: Sequence[int]) -> LabelMap:
    _check(logits, values)
    paint = _paint_regions if activation == "sigmoid" else _paint_classes
    return paint(_planes(logits, shape), shape, values)


def probability_planes(
    logits: Tensor, preparation: Preparation, activation: Activation
) -> Iterator[NDArray[np.float32]]:
    """Probability of each output in turn, (*source) float32 in 0..1, on the input's grid.

    Outside the crop, where the network did not look, every output is 0 but the background of a softmax, which is 1.
    """
    if activation == "sigmoid":
        for plane in _planes(logits, preparation.cropped_shape):
            yield _to_source(plane.sigmoid().numpy(), preparation)
        return
    shares = logits.softmax(0)
    for position, plane in enumerate(_planes(shares, preparation.cropped_shape)):
        yield _to_source(plane.numpy(), preparation, fill=float(position == 0))


def mean_logits(members: Iterator[Tensor], activation: Activation) -> Tensor:
    """Logits (K, *prepared) whose probabilities are the mean of those of several models, added up one at a time.

    For softmax they are log-probabilities, which have the same argmax and the same softmax.
    """
    total, count = next(members), 1
    total = _probabilities(total, activation)
    for logits in members:
        total += _probabilities(logits, activation)
        count += 1
    total /= count
    tiny = torch.finfo(total.dtype).tiny
    if activation == "softmax":
        return total.clamp_(min=tiny).log_()
    return total.logit_(eps=1e-7)


def _probabilities(logits: Tensor, activation: Activation) -> Tensor:
    return logits.sigmoid() if activation == "sigmoid" else logits.softmax(0)


def _check(logits: Tensor, values: Sequence[int]) -> None:
    if len(logits) != len(values):
        raise CheckpointError(
            f"the network gave {len(logits)} outputs", expected=f"the {len(values)} of its model card"
        )
    for plane in logits:
        if bool(plane.isnan().any()):
            raise CheckpointError(
                "the network gave NaN",
                expected="finite logits",
                remedy="The training probably diverged: look at metrics.jsonl, and train with a smaller learning rate",
            )


def _planes(logits: Tensor, shape: tuple[int, ...]) -> Iterator[Tensor]:
    """Each channel (*shape), resampled linearly where the prepared grid is another; faces aligned, as on the way in."""
    mode = "trilinear" if len(shape) == 3 else "bilinear"
    for plane in logits:
        if tuple(plane.shape) == shape:
            yield plane
        else:
            yield functional.interpolate(plane[None, None], size=shape, mode=mode, align_corners=False)[0, 0]


def _paint_regions(planes: Iterator[Tensor], shape: tuple[int, ...], values: Sequence[int]) -> LabelMap:
    labels = np.zeros(shape, np.uint8)
    for plane, value in zip(planes, values, strict=True):
        labels[(plane > 0).numpy()] = value
    return labels


def _paint_classes(planes: Iterator[Tensor], shape: tuple[int, ...], values: Sequence[int]) -> LabelMap:
    best = next(planes).clone()
    labels = np.full(shape, values[0], np.uint8)
    for plane, value in zip(planes, values[1:], strict=True):
        is_better = plane > best
        labels[is_better.numpy()] = value
        torch.maximum(best, plane, out=best)
    return labels


def _to_source(box: AnyArray, preparation: Preparation, fill: float = 0) -> AnyArray:
    """An array of the cropped box (*cropped) in the whole volume, in the orientation of the input (*source)."""
    whole = np.full(preparation.reoriented_shape, fill, box.dtype)
    whole[preparation.crop_slices] = box
    return np.ascontiguousarray(preparation.reorientation.undo(whole))
