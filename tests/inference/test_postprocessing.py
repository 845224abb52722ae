"""What is removed from a label map, on maps whose components can be counted by eye."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from segkit.checkpoint.card import Part, PostprocessingCard, SizeRule
from segkit.errors import CheckpointError
from segkit.inference.postprocessing import agreed_rules, label_beneath, postprocess, smallest_voxels
from segkit.labels import SCHEMES, classes_scheme, outputs_of

NCR, ED, ET = 1, 2, 3
BRATS = outputs_of(SCHEMES["brats2023"])
ISOTROPIC = (1.0, 1.0, 1.0)


def rules(*given: tuple[str, Part, float], cases: int = 0) -> PostprocessingCard:
    chosen = tuple(SizeRule(output=output, part=part, smallest_mm3=limit) for output, part, limit in given)
    return PostprocessingCard(rules=chosen, cases=cases)


def tumour() -> NDArray[np.uint8]:
    """Along a line of 20 voxels: oedema around a core with enhancing parts of 2 and 4 voxels, and an island of 3."""
    line = np.array([0, ED, ED, NCR, ET, ET, NCR, ET, ET, ET, ET, ED, 0, 0, 0, ED, NCR, ET, 0, 0], np.uint8)
    return line.reshape(20, 1, 1)


def line(labels: NDArray[np.uint8]) -> list[int]:
    return labels.ravel().tolist()


def test_without_rules_the_map_is_as_it_was() -> None:
    labels = tumour()
    assert postprocess(labels, ISOTROPIC, BRATS, None) is labels
    assert postprocess(labels, ISOTROPIC, BRATS, rules()) is labels


def test_small_components_become_what_lies_around_them() -> None:
    labels = tumour()
    before = labels.copy()
    cleaned = postprocess(labels, ISOTROPIC, BRATS, rules(("ET", "component", 3)))
    assert line(cleaned) == [0, 2, 2, 1, 1, 1, 1, 3, 3, 3, 3, 2, 0, 0, 0, 2, 1, 1, 0, 0]
    assert np.array_equal(labels, before)
    assert cleaned.dtype == np.uint8


def test_a_removed_core_takes_the_enhancing_part_along() -> None:
    cleaned = postprocess(tumour(), ISOTROPIC, BRATS, rules(("TC", "component", 3)))
    assert line(cleaned) == [0, 2, 2, 1, 3, 3, 1, 3, 3, 3, 3, 2, 0, 0, 0, 2, 2, 2, 0, 0]


def test_a_removed_island_leaves_background() -> None:
    cleaned = postprocess(tumour(), ISOTROPIC, BRATS, rules(("WT", "component", 4)))
    assert line(cleaned) == [0, 2, 2, 1, 3, 3, 1, 3, 3, 3, 3, 2, 0, 0, 0, 0, 0, 0, 0, 0]


def test_the_whole_region_is_measured_by_its_sum() -> None:
    """ET has 2 + 4 + 1 voxels, none of them in a component of 7."""
    assert line(postprocess(tumour(), ISOTROPIC, BRATS, rules(("ET", "total", 7)))) == line(tumour())
    replaced = postprocess(tumour(), ISOTROPIC, BRATS, rules(("ET", "total", 8)))
    assert line(replaced) == [0, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 2, 0, 0, 0, 2, 1, 1, 0, 0]


def test_rules_follow_one_another() -> None:
    """Without its small components ET has 4 voxels left, which are too few for the second rule."""
    both = rules(("ET", "component", 3), ("ET", "total", 5))
    assert not (postprocess(tumour(), ISOTROPIC, BRATS, both) == ET).any()


def test_sizes_are_volumes() -> None:
    """A voxel of 1 x 2 x 3 mm has 6 mm³: components of 2, 4 and 1 voxels have 12, 24 and 6."""
    for limit, left in ((6, 7), (6.1, 6), (12, 6), (12.1, 4), (24, 4), (24.1, 0)):
        cleaned = postprocess(tumour(), (1.0, 2.0, 3.0), BRATS, rules(("ET", "component", limit)))
        assert np.count_nonzero(cleaned == ET) == left


def test_a_spacing_rounded_by_its_header_changes_nothing() -> None:
    assert smallest_voxels(40, (1.0, 1.0, 1.0)) == 40
    assert smallest_voxels(40, (0.9999, 0.9999, 0.9999)) == 40
    assert smallest_voxels(40, (1.0001, 1.0001, 1.0001)) == 40
    assert smallest_voxels(40, (1.0, 1.0, 3.0)) == 14


def test_voxels_that_touch_at_a_corner_are_one_component() -> None:
    volume = np.zeros((3, 3, 3), np.uint8)
    volume[0, 0, 0] = volume[1, 1, 1] = volume[2, 2, 2] = ET
    picture = volume[0] + volume[1] + volume[2]
    for labels in (volume, picture):
        spacing = (1.0,) * labels.ndim
        assert np.array_equal(postprocess(labels, spacing, BRATS, rules(("WT", "component", 3))), labels)
        assert not postprocess(labels, spacing, BRATS, rules(("WT", "component", 4))).any()


def test_exclusive_classes_leave_background_and_spare_one_another() -> None:
    outputs = outputs_of(classes_scheme("organs", {"liver": 1, "spleen": 2}))
    labels = np.array([[1, 1, 1, 0, 1, 2, 2, 0, 2]], np.uint8)
    cleaned = postprocess(labels, (1.0, 1.0), outputs, rules(("liver", "component", 2), ("spleen", "total", 3)))
    assert cleaned.tolist() == [[1, 1, 1, 0, 0, 2, 2, 0, 2]]


def test_what_lies_beneath() -> None:
    assert [label_beneath(output, BRATS) for output in BRATS] == [0, ED, NCR]
    children = outputs_of(SCHEMES["brats-ped"])  # ET 1, NET 2, CC 3, ED 4
    assert {output.name: label_beneath(output, children) for output in children} == {"WT": 0, "TC": 4, "CC": 2, "ET": 2}
    treated = outputs_of(SCHEMES["brats2024"])
    assert [label_beneath(output, treated) for output in treated if output.name == "RC"] == [0]


@pytest.mark.parametrize("name", ["SN", "background"])
def test_a_card_that_was_edited_wrongly_is_refused(name: str) -> None:
    outputs = outputs_of(classes_scheme("organs", {"liver": 1, "spleen": 2}))
    with pytest.raises(CheckpointError, match=rf"output '{name}'; expected one of liver, spleen.*set it to null"):
        postprocess(np.ones((2, 2), np.uint8), (1.0, 1.0), outputs, rules((name, "component", 2)))


def test_members_of_an_ensemble_agree_on_the_median() -> None:
    first = rules(("WT", "component", 50), ("ET", "component", 10), ("ET", "total", 40), cases=4)
    second = rules(("ET", "component", 30), ("ET", "total", 100), cases=3)
    agreed = agreed_rules([first, second, None], BRATS)
    assert agreed == rules(("ET", "component", 10), ("ET", "total", 40), cases=7)
    assert agreed_rules([first, None], BRATS) is None
    assert agreed_rules([second, second], BRATS) == rules(("ET", "component", 30), ("ET", "total", 100), cases=6)


def test_empty_maps_stay_empty() -> None:
    empty = np.zeros((3, 4, 5), np.uint8)
    assert not postprocess(empty, ISOTROPIC, BRATS, rules(("WT", "component", 4), ("ET", "total", 4))).any()
