"""Boxes of an array that may reach outside of it, and the boxes that the separate holes of an image lie in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import cc3d
import numpy as np
from numpy.typing import NDArray

from segkit.shapes import zeros_and_ones

_Item = TypeVar("_Item", bound=np.generic)


@dataclass(frozen=True)
class Box:
    """First voxel and size along each axis; what reaches outside of an array is 0 there and is never written."""

    start: tuple[int, ...]
    size: tuple[int, ...]

    def cut(self, array: NDArray[_Item]) -> NDArray[_Item]:
        """(..., *size) of (..., *spatial)."""
        result: NDArray[_Item] = np.zeros((*array.shape[: array.ndim - len(self.size)], *self.size), array.dtype)
        there, here = self._overlap(array.shape)
        result[here] = array[there]
        return result

    def paste(self, values: NDArray[_Item], array: NDArray[_Item], where: NDArray[np.bool_]) -> None:
        """Write values (..., *size) into (..., *spatial) where a mask (*size) says."""
        there, here = self._overlap(array.shape)
        np.copyto(array[there], values[here], where=where[here[1:]])

    def _overlap(self, shape: Sequence[int]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Where the box lies in an array, and the array in the box."""
        there: list[Any] = [...]
        here: list[Any] = [...]
        for start, length, total in zip(self.start, self.size, shape[len(shape) - len(self.size) :], strict=True):
            first = min(max(0, start), total)
            last = max(first, min(total, start + length))
            there.append(slice(first, last))
            here.append(slice(first - start, last - start))
        return tuple(there), tuple(here)


def boxes_of(hole: NDArray[np.bool_]) -> list[Box]:
    """The bounding boxes of the separate parts of (*spatial); parts whose boxes touch go together."""
    labels = cc3d.connected_components(zeros_and_ones(hole if hole.ndim == 3 else hole[..., None]))
    slices = [found for found in cc3d.statistics(labels)["bounding_boxes"][1:] if found is not None]
    open_ = [[(int(one.start), int(one.stop)) for one in found][: hole.ndim] for found in slices]
    done: list[Box] = []
    while open_:
        box = open_.pop()
        near = [other for other in open_ if _touch(box, other)]
        if near:
            open_ = [other for other in open_ if other not in near]
            together = zip(box, *near, strict=True)
            open_.append([(min(first for first, _ in axis), max(last for _, last in axis)) for axis in together])
        else:
            done.append(Box(tuple(first for first, _ in box), tuple(last - first for first, last in box)))
    return done


def _touch(first: Sequence[tuple[int, int]], second: Sequence[tuple[int, int]]) -> bool:
    return all(a[0] <= b[1] and b[0] <= a[1] for a, b in zip(first, second, strict=True))
