"""Label schemes: regions, painting, translation between years."""

from __future__ import annotations

import numpy as np
import pytest

from segkit.labels import (
    SCHEMES,
    Output,
    classes_scheme,
    outputs_of,
    painted_values,
    scheme_from_json,
    translate,
)


def _painting(name: str) -> list[tuple[str, int, tuple[int, ...]]]:
    return [(output.name, output.label, output.members) for output in outputs_of(SCHEMES[name])]


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        ("brats2015", [("WT", 2, (1, 2, 3, 4)), ("TC", 1, (1, 3, 4)), ("ET", 4, (4,))]),
        ("brats2017", [("WT", 2, (1, 2, 4)), ("TC", 1, (1, 4)), ("ET", 4, (4,))]),
        ("brats2023", [("WT", 2, (1, 2, 3)), ("TC", 1, (1, 3)), ("ET", 3, (3,))]),
        ("brats2024", [("WT", 2, (1, 2, 3)), ("TC", 1, (1, 3)), ("ET", 3, (3,)), ("RC", 4, (4,))]),
        ("msd-brats", [("WT", 1, (1, 2, 3)), ("TC", 2, (2, 3)), ("ET", 3, (3,))]),
        ("brats-ped", [("WT", 4, (1, 2, 3, 4)), ("TC", 2, (1, 2, 3)), ("CC", 3, (3,)), ("ET", 1, (1,))]),
        ("brats-men-rt", [("GTV", 1, (1,))]),
    ],
)
def test_outputs_of_every_year(scheme: str, expected: list[tuple[str, int, tuple[int, ...]]]) -> None:
    assert _painting(scheme) == expected


def test_every_scheme_is_listed_above() -> None:
    assert len(SCHEMES) == 7


@pytest.mark.parametrize("name", sorted(SCHEMES))
def test_encoding_then_painting_returns_the_labels(name: str) -> None:
    scheme = SCHEMES[name]
    kept = {value for tissue, value in scheme.values.items() if not (name == "brats2015" and tissue == "NET")}
    labels = np.array([[0, *sorted(kept)]], np.uint8)
    painted = np.zeros_like(labels)
    for output in outputs_of(scheme):
        painted[np.isin(labels, output.members)] = output.label
    np.testing.assert_array_equal(painted, labels)


def test_exclusive_classes_get_a_background_output() -> None:
    scheme = classes_scheme("hippocampus", {"background": 0, "Posterior": 2, "Anterior": 1})
    assert outputs_of(scheme) == (
        Output("background", 0, (0,)),
        Output("Anterior", 1, (1,)),
        Output("Posterior", 2, (2,)),
    )


def test_translation_goes_by_tissue() -> None:
    msd = np.array([0, 1, 2, 3], np.uint8)  # background, oedema, necrosis, enhancing
    assert translate(msd, SCHEMES["msd-brats"], SCHEMES["brats2017"]).tolist() == [0, 2, 1, 4]
    assert translate(msd, SCHEMES["msd-brats"], SCHEMES["brats2023"]).tolist() == [0, 2, 1, 3]
    old = np.array([0, 1, 2, 3, 4], np.uint8)  # 2015: non-enhancing tumour is 3
    assert translate(old, SCHEMES["brats2015"], SCHEMES["brats2017"]).tolist() == [0, 1, 2, 1, 4]
    new = np.array([4], np.uint8)  # a resection cavity is no tumour in schemes without one
    assert translate(new, SCHEMES["brats2024"], SCHEMES["brats2023"]).tolist() == [0]


def test_painted_values_follow_the_scheme_that_is_written() -> None:
    outputs = outputs_of(SCHEMES["brats2023"])
    assert painted_values(outputs, SCHEMES["brats2023"], SCHEMES["brats2017"]) == [2, 1, 4]
    assert painted_values(outputs, SCHEMES["brats2023"], SCHEMES["msd-brats"]) == [1, 2, 3]


def test_schemes_survive_json() -> None:
    custom = classes_scheme("organs", {"liver": 1, "spleen": 7})
    assert scheme_from_json(custom.to_json()) == custom
    assert scheme_from_json(SCHEMES["brats2024"].to_json()) == SCHEMES["brats2024"]
    with pytest.raises(TypeError, match="not a mapping"):
        scheme_from_json({"name": "organs", "labels": 3})
