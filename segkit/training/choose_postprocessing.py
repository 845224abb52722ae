"""Choice of post-processing on the validation cases: sizes below which a component or a whole region is removed.

Outer regions come before those inside them. For each output, limits for its components and then for the whole region
are tried; the best is kept if the mean Dice rises by more than 0.001 and at most as many cases get worse as better. The
Dice is the mean over the output and those inside it, which are removed with it; as in BraTS, an empty region has Dice 1
if prediction and reference are both empty, 0 if only one is.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from segkit.checkpoint.card import Part, PostprocessingCard, SizeRule
from segkit.checkpoint.run_folder import CARD_NAME, load_card
from segkit.inference.postprocessing import PARTS, label_beneath, label_boxes, postprocess, region_box, smallest_voxels
from segkit.labels import Output
from segkit.metrics.overlap import dice_by_region, region_mask
from segkit.reading.files import written_atomically
from segkit.shapes import LabelMap, label_components

_log = logging.getLogger(__name__)

_FEWEST_CASES = 3
_LEAST_GAIN = 1e-3
_SAME = 1e-6
"""Dice values that differ by less are equal."""
_LIMITS_VOXELS = (5, 10, 20, 50, 100, 200, 500, 1000)
"""Limits to try, in voxels of the median spacing."""


@dataclass
class ScoredCases:
    """Predictions and references, compressed and cropped to their labels (BraTS: 0.1 MB a case)."""

    ids: list[str] = field(default_factory=list)
    spacings_mm: list[tuple[float, ...]] = field(default_factory=list)
    _packed: list[tuple[bytes, bytes, tuple[int, ...]]] = field(default_factory=list, repr=False)

    def add(self, case_id: str, prediction: LabelMap, reference: LabelMap, spacing_mm: Sequence[float]) -> None:
        """Add a case: both maps (D, H, W) or (H, W) uint8, spacing of each axis in mm."""
        box = region_box(label_boxes(prediction | reference), range(1, 256)) or (slice(0, 1),) * prediction.ndim
        predicted, expected = (zlib.compress(labels[box].tobytes(), 1) for labels in (prediction, reference))
        self.ids.append(case_id)
        self.spacings_mm.append(tuple(spacing_mm))
        self._packed.append((predicted, expected, prediction[box].shape))

    def take(self, others: ScoredCases) -> None:
        """Add those cases."""
        self.ids += others.ids
        self.spacings_mm += others.spacings_mm
        self._packed += others._packed

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[tuple[LabelMap, LabelMap, tuple[float, ...]]]:
        """Prediction and reference, of one shape and scheme, and their spacing in mm."""
        for (*packed, shape), spacing_mm in zip(self._packed, self.spacings_mm, strict=True):
            prediction, reference = (np.frombuffer(zlib.decompress(p), np.uint8).reshape(shape) for p in packed)
            yield prediction, reference, spacing_mm


def settle_postprocessing(
    run: Path, scored: ScoredCases, tissues: Mapping[int, str], *, is_wanted: bool = True
) -> dict[str, dict[str, float]] | None:
    """Choose the post-processing of a run and write it into its model.json; none unless `is_wanted`.

    Returns:
        Dice of each case and output with it (NaN if a region is in neither map), or None if none is chosen. They are
        slightly too high, because it was chosen on the same cases.
    """
    card = load_card(run)
    outputs = card.outputs
    ignore = card.scheme().ignore
    chosen = choose_postprocessing(scored, outputs, ignore) if is_wanted else None
    with written_atomically(run / CARD_NAME) as path:
        path.write_text(card.with_postprocessing(chosen).to_text(), encoding="utf-8")
    if chosen is None:
        return None
    for rule in chosen.rules:
        _log.info("post-processing: %s", describe_rule(rule, outputs, tissues, card.dims))
    regions = {output.name: output.members for output in outputs if output.label != 0}
    return {
        case_id: dice_by_region(postprocess(prediction, spacing_mm, outputs, chosen), reference, regions, ignore)
        for case_id, (prediction, reference, spacing_mm) in zip(scored.ids, scored, strict=True)
    }


def describe_rule(rule: SizeRule, outputs: Sequence[Output], tissues: Mapping[int, str], dims: int = 3) -> str:
    """A rule as text: "ET below 40 mm3 becomes NCR: mean Dice 0.810 -> 0.830"."""
    label = next(label_beneath(output, outputs) for output in outputs if output.name == rule.output)
    is_one = rule.part == "total"
    what = rule.output if is_one else f"{rule.output} components"
    size = f"{rule.smallest_mm3:g} {'mm3' if dims == 3 else 'pixels'}"
    change = f"become{'s' * is_one} {tissues[label]}" if label else f"{'is' if is_one else 'are'} removed"
    effect = "" if rule.dice is None else ": mean Dice {:.3f} -> {:.3f}".format(*rule.dice)
    return f"{what} below {size} {change}{effect}"


def choose_postprocessing(
    scored: ScoredCases, outputs: Sequence[Output], ignore: int | None = None
) -> PostprocessingCard | None:
    """The rules that improve these cases; None if none does, or with fewer than three cases.

    Voxels where the reference is `ignore` count for the size of a part, and not for the Dice.
    """
    if len(scored) < _FEWEST_CASES:
        return None
    voxel_mm3 = float(np.median([np.prod(spacing) for spacing in scored.spacings_mm]))
    limits = [float(f"{voxels * voxel_mm3:.3g}") for voxels in _LIMITS_VOXELS]
    rules: list[SizeRule] = []
    for together in _rounds(outputs):
        tables: dict[str, list[_Parts]] = {output.name: [] for output in together}
        before = PostprocessingCard(rules=tuple(rules))
        for prediction, reference, spacing_mm in scored:
            cleaned = postprocess(prediction, spacing_mm, outputs, before)
            boxes, counts = label_boxes(cleaned), _count_labels(reference)
            for output in together:
                inside = [other for other in outputs if set(other.members) <= set(output.members)]
                expected = np.array([counts[list(other.members)].sum() for other in inside])
                box = region_box(boxes, output.members) or (slice(0, 0),) * cleaned.ndim
                parts = _count_parts(cleaned[box], reference[box], output, inside, ignore)
                tables[output.name].append(_Parts(spacing_mm, *parts, expected))
        for output in together:
            rules += _rules_for(output, tables[output.name], limits)
    return PostprocessingCard(rules=tuple(rules), cases=len(scored)) if rules else None


def _rounds(outputs: Sequence[Output]) -> list[list[Output]]:
    """Outputs other than the background, grouped by how many others contain them; outer ones first."""
    rounds: dict[int, list[Output]] = {}
    for output in outputs:
        if output.label != 0:
            depth = sum(set(output.members) < set(other.members) for other in outputs)
            rounds.setdefault(depth, []).append(output)
    return [rounds[depth] for depth in sorted(rounds)]


@dataclass(frozen=True)
class _Parts:
    """Voxel counts of the N components of an output in a case; the K regions are the output and those inside it.

    voxels (N,); predicted (N, K): voxels of component n in region k of the prediction; overlap (N, K): those that are
    in region k of the reference, too; expected (K,): voxels of region k of the reference.
    """

    spacing_mm: tuple[float, ...]
    voxels: NDArray[np.int64]
    predicted: NDArray[np.int64]
    overlap: NDArray[np.int64]
    expected: NDArray[np.int64]

    def dice(self, limits: Mapping[Part, float]) -> float:
        """Mean Dice over the K regions after removal below these limits, in mm³."""
        smallest = {part: smallest_voxels(limit, self.spacing_mm) for part, limit in limits.items()}
        is_kept = self.voxels >= smallest.get("component", 0)
        if self.voxels[is_kept].sum() < smallest.get("total", 0):
            is_kept[:] = False
        size = self.predicted[is_kept].sum(axis=0) + self.expected
        overlap = self.overlap[is_kept].sum(axis=0)
        return float(np.where(size == 0, 1.0, 2 * overlap / np.maximum(size, 1)).mean())


def _count_parts(
    prediction: LabelMap, reference: LabelMap, output: Output, inside: Sequence[Output], ignore: int | None
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """`voxels`, `predicted` and `overlap` of `_Parts`, from the box around the output in both maps."""
    mask = region_mask(prediction, output.members)
    components = label_components(mask)
    count = int(components.max(initial=0))
    number, labels, truth = components[mask], prediction[mask], reference[mask]  # each (voxels of the region,)
    labels = labels if ignore is None else np.where(truth == ignore, np.uint8(0), labels)

    def count_each(where: NDArray[np.bool_]) -> NDArray[np.int64]:
        return np.bincount(number[where], minlength=count + 1)[1:]

    predicted = [region_mask(labels, other.members) for other in inside]
    right = [mine & region_mask(truth, other.members) for mine, other in zip(predicted, inside, strict=True)]
    in_region, overlap = (np.stack([count_each(where) for where in masks], axis=1) for masks in (predicted, right))
    return np.bincount(number, minlength=count + 1)[1:], in_region, overlap


def _count_labels(labels: LabelMap) -> NDArray[np.int64]:
    """Voxels of each value, (256,); slice by slice, because bincount converts its input to int64."""
    counts = np.zeros(256, np.int64)
    for plane in labels:
        counts += np.bincount(plane.ravel(), minlength=256)
    return counts


def _rules_for(output: Output, cases: Sequence[_Parts], limits_mm3: Sequence[float]) -> list[SizeRule]:
    chosen: dict[Part, float] = {}
    rules, now = [], np.array([case.dice({}) for case in cases])
    for part in PARTS:
        best, best_limit = now, 0.0
        for limit in limits_mm3:
            tried = np.array([case.dice({**chosen, part: limit}) for case in cases])
            is_fair = np.count_nonzero(tried < now - _SAME) <= np.count_nonzero(tried > now + _SAME)
            if is_fair and tried.mean() > best.mean() + _SAME:  # the smallest of equal limits
                best, best_limit = tried, limit
        if best.mean() > now.mean() + _LEAST_GAIN:
            dice = (round(float(now.mean()), 4), round(float(best.mean()), 4))
            rules.append(SizeRule(output=output.name, part=part, smallest_mm3=best_limit, dice=dice))
            now, chosen[part] = best, best_limit
    return rules
