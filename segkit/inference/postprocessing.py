"""Removal of small components, or of small whole regions, from a label map.

Replacing a small enhancing tumour by necrosis is common in BraTS, where a few false voxels cost the whole score of a
case (Isensee et al., "nnU-Net for Brain Tumor Segmentation", arXiv 2011.00848). The sizes are chosen on validation
cases by `segkit.training.choose_postprocessing` and saved in the model card.

Voxels removed from a nested region get the label of the region around it (ET becomes NCR, TC with all inside it becomes
ED); those of the outermost region and of exclusive classes become background.
"""

import math
from collections.abc import Iterable, Sequence
from statistics import median_low

import numpy as np
from scipy import ndimage

from segkit.checkpoint.card import Part, PostprocessingCard, SizeRule
from segkit.errors import CheckpointError
from segkit.labels import Output
from segkit.metrics.overlap import region_mask
from segkit.shapes import LabelMap, Mask, without_small_components

Box = tuple[slice, ...]
"""An index of (D, H, W) or (H, W)."""
PARTS: tuple[Part, ...] = ("component", "total")
"""In the order in which they are removed."""
ROUNDING = 1e-3
"""Relative tolerance of the limit, for spacings such as 0.9999 mm."""


def postprocess(
    labels: LabelMap, spacing_mm: Sequence[float], outputs: Sequence[Output], config: PostprocessingCard | None
) -> LabelMap:
    """The label map after the rules of `config`, in their order; the map itself without rules.

    Labels are (D, H, W) or (H, W) uint8 in the values of the outputs; spacings are in mm, 1 on pictures.

    Raises:
        CheckpointError: a rule names an output that the network does not have.
    """
    if config is None or not config.rules:
        return labels
    cleaned, named = labels.copy(), {output.name: output for output in outputs if output.label != 0}
    for rule in config.rules:
        if rule.output not in named:
            raise CheckpointError(
                f"a post-processing rule names output {rule.output!r}",
                expected=f"one of {', '.join(named)}",
                remedy="The model card was edited: correct `postprocessing` in model.json, or set it to null",
            )
        output = named[rule.output]
        box = region_box(label_boxes(cleaned), output.members)
        if box is not None:
            view = cleaned[box]
            view[_too_small(region_mask(view, output.members), rule, spacing_mm)] = label_beneath(output, outputs)
    return cleaned


def agreed_rules(configs: Sequence[PostprocessingCard | None], outputs: Sequence[Output]) -> PostprocessingCard | None:
    """The rules of an ensemble: each limit is the lower median of the members' limits, 0 for those without one.

    So a rule needs more than half of the members, and two members take the lower limit. Measured Dice is dropped.
    """
    limits = [{(rule.output, rule.part): rule.smallest_mm3 for rule in c.rules} if c else {} for c in configs]
    rules = [
        SizeRule(output=output.name, part=part, smallest_mm3=limit)
        for output in outputs
        for part in PARTS
        if (limit := median_low([known.get((output.name, part), 0.0) for known in limits]))
    ]
    return PostprocessingCard(rules=tuple(rules), cases=sum(c.cases for c in configs if c)) if rules else None


def label_beneath(output: Output, outputs: Sequence[Output]) -> int:
    """The label of voxels removed from an output: that of the smallest output around it, else 0."""
    around = [o for o in outputs if set(output.members) < set(o.members) and o.label not in output.members]
    return min(around, key=lambda o: len(o.members)).label if around else 0


def smallest_voxels(smallest_mm3: float, spacing_mm: Sequence[float]) -> int:
    """The smallest number of voxels whose volume is not below a limit."""
    return math.ceil(smallest_mm3 * (1 - ROUNDING) / math.prod(spacing_mm))


def label_boxes(labels: LabelMap) -> list[Box | None]:
    """Bounding boxes of label values 1, 2 ... 255; None for values that are not in the map."""
    boxes: list[Box | None] = ndimage.find_objects(labels, max_label=255)
    return boxes


def region_box(boxes: Sequence[Box | None], members: Iterable[int]) -> Box | None:
    """The smallest box around the `label_boxes` of these values; None if there are none."""
    found = [box for value in members if (box := boxes[value - 1]) is not None]
    if not found:
        return None
    return tuple(
        slice(min(side.start for side in sides), max(side.stop for side in sides)) for sides in zip(*found, strict=True)
    )


def _too_small(mask: Mask, rule: SizeRule, spacing_mm: Sequence[float]) -> Mask:
    smallest = smallest_voxels(rule.smallest_mm3, spacing_mm)
    if rule.part == "total":
        return mask if np.count_nonzero(mask) < smallest else np.zeros_like(mask)
    return mask & ~without_small_components(mask, smallest)
