"""One region of one case, and its lesions: connected components, their overlaps, the best one-to-one matching.

Voxels that touch at a corner are connected: 26 neighbours in a volume, 8 in a picture. All work is done inside the
boxes of the components.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import cc3d
import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from segkit.metrics.overlap import Box, dice, precision, sensitivity, specificity, volume_ml
from segkit.shapes import AnyArray, Mask, label_components

Scores = dict[str, float]
"""Metric name -> value of one region of one case; `segkit.metrics.registry` has the units. NaN is undefined."""

Pair = tuple[int, int]
"""A component of the reference and one of the prediction."""


@dataclass(frozen=True)
class RegionPair:
    """Prediction and reference of one region, (D, H, W) or (H, W), cut to the box that holds both.

    `judged_voxels` are those of the volume or of the region of interest, before the cut; `worst_mm` is the distance in
    this protocol where only one mask is empty.
    """

    prediction: Mask
    reference: Mask
    spacing_mm: tuple[float, ...]
    judged_voxels: int
    worst_mm: float

    @property
    def has_empty_mask(self) -> bool:
        """Whether at least one of the masks is empty."""
        return not (self.prediction.any() and self.reference.any())

    def if_empty(self, both: float, one: float) -> float:
        """The value of a metric where both masks are empty, or only one is."""
        return one if self.prediction.any() or self.reference.any() else both

    def overlap_scores(self) -> Scores:
        """Dice, sensitivity, precision (1 where both masks are empty, 0 where one is); specificity (1 for 0 / 0)."""
        names = ("dice", "sensitivity", "precision")
        if self.has_empty_mask:
            scores = dict.fromkeys(names, self.if_empty(1.0, 0.0))
        else:
            values = (score(self.prediction, self.reference) for score in (dice, sensitivity, precision))
            scores = dict(zip(names, values, strict=True))
        spared = specificity(self.prediction, self.reference, self.judged_voxels)
        return scores | {"specificity": 1.0 if math.isnan(spared) else spared}

    def volumes_ml(self) -> Scores:
        """Both volumes; pictures have none."""
        masks = {"prediction_ml": self.prediction, "reference_ml": self.reference}
        return {name: volume_ml(mask, self.spacing_mm) for name, mask in masks.items() if mask.ndim == 3}


@dataclass(frozen=True)
class Lesion:
    """One lesion of the reference; its scores are None where it was missed or the protocol does not measure them."""

    voxels: int
    volume_mm3: float
    is_matched: bool
    dice: float | None = None
    hd95_mm: float | None = None
    nsd: float | None = None

    def to_json(self) -> dict[str, float | bool | None]:
        """The entry of "lesions" in `scores.json`."""
        return {name.removeprefix("is_"): value for name, value in asdict(self).items()}


@dataclass(frozen=True)
class RegionScores:
    """Scores of one region, and its lesions where the protocol scores single ones."""

    scores: Scores
    lesions: tuple[Lesion, ...] = ()


@dataclass(frozen=True)
class Components:
    """The connected components of a mask: `ids` (0 outside), and the voxels and the box of component i + 1."""

    ids: AnyArray
    voxels: NDArray[np.int64]
    boxes: Sequence[Box]

    @property
    def count(self) -> int:
        """The number of components."""
        return len(self.voxels)

    def mask(self, component: int, box: Box) -> Mask:
        """Where a component lies within a box."""
        inside: Mask = self.ids[box] == component
        return inside


def components_of(mask: Mask) -> Components:
    """The connected components of a mask (D, H, W) or (H, W)."""
    return indexed(label_components(np.ascontiguousarray(mask)))


def indexed(ids: AnyArray) -> Components:
    """Components that are numbered already, 1 to n without a gap."""
    statistics = cc3d.statistics(np.ascontiguousarray(ids))
    boxes = [tuple(box) for box in statistics["bounding_boxes"][1:]]
    return Components(ids, statistics["voxel_counts"][1:].astype(np.int64), boxes)


def overlaps(prediction: Components, reference: Components) -> dict[Pair, int]:
    """(reference id, prediction id) -> shared voxels, for every pair that shares any."""
    shared = (prediction.ids > 0) & (reference.ids > 0)
    stride = prediction.count + 1
    codes = reference.ids[shared].astype(np.int64) * stride + prediction.ids[shared]
    pairs, counts = np.unique(codes, return_counts=True)
    return {divmod(int(pair), stride): int(count) for pair, count in zip(pairs, counts, strict=True)}


def match_one_to_one(scores: Mapping[Pair, float], bonus: float) -> dict[int, int]:
    """Reference id -> prediction id of the matching with the exactly largest sum of scores and of `bonus` per pair.

    `scores` are positive, by (reference id, prediction id); other pairs are never matched. A positive `bonus` prefers
    more pairs to fewer of the same sum.
    """
    matching: dict[int, int] = {}
    for pairs in _overlapping_groups(list(scores)):
        references, predictions = np.array(pairs).T
        rows, row_of = np.unique(references, return_inverse=True)
        columns, column_of = np.unique(predictions, return_inverse=True)
        gains = np.zeros((len(rows), len(columns)))
        gains[row_of, column_of] = [scores[pair] + bonus for pair in pairs]
        for row, column in zip(*linear_sum_assignment(gains, maximize=True), strict=True):
            if gains[row, column] > 0:
                matching[int(rows[row])] = int(columns[column])
    return matching


def _overlapping_groups(pairs: Sequence[Pair]) -> list[list[Pair]]:
    """The pairs in groups that have no component in common, which avoids a table of all against all."""
    if not pairs:
        return []
    first, second = np.array(pairs).T
    size = int(first.max()) + 1
    nodes = (first, second + size)  # ids of predictions behind those of references
    graph = coo_array((np.ones(len(pairs)), nodes), shape=(size + int(second.max()) + 1,) * 2)
    _, group_of = connected_components(graph, directed=False)
    groups: dict[int, list[Pair]] = {}
    for pair, group in zip(pairs, group_of[first].tolist(), strict=True):
        groups.setdefault(group, []).append(pair)
    return list(groups.values())


def box_around(boxes: Sequence[Box], shape: Sequence[int], margin: int = 0) -> Box:
    """The smallest box that holds all boxes, and `margin` voxels more on each side, within the shape."""
    starts = (max(min(side.start for side in sides) - margin, 0) for sides in zip(*boxes, strict=True))
    stops = (max(side.stop for side in sides) + margin for sides in zip(*boxes, strict=True))
    return tuple(slice(start, min(stop, size)) for start, stop, size in zip(starts, stops, shape, strict=True))
