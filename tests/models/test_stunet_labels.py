"""Labels of the released STU-Net weights."""

from __future__ import annotations

from segkit.checkpoint.nnunet import RELEASED_LABELS
from segkit.labels import SCHEMES, outputs_of


def test_104_structures_in_alphabetical_order() -> None:
    values = RELEASED_LABELS["stunet-totalsegmentator"].values
    assert list(values.values()) == list(range(1, 105))
    assert list(values) == sorted(set(values))
    assert (values["adrenal_gland_left"], values["liver"], values["spleen"]) == (1, 40, 77)
    assert values["vertebrae_T9"] == 104


def test_ribs_and_vertebrae_are_ordered_as_words() -> None:
    names = list(RELEASED_LABELS["stunet-totalsegmentator"].values)
    left = ["rib_left_1", "rib_left_10", "rib_left_11", "rib_left_12", *(f"rib_left_{rib}" for rib in range(2, 10))]
    assert names[48:60] == left
    assert names[60:72] == [name.replace("left", "right") for name in left]
    assert names[92:96] == ["vertebrae_T1", "vertebrae_T10", "vertebrae_T11", "vertebrae_T12"]


def test_nine_abdominal_organs() -> None:
    values = RELEASED_LABELS["stunet-abdomenatlas"].values
    assert (values["aorta"], values["IVC"], values["left kidney"], values["stomach"]) == (1, 3, 4, 9)
    assert len(values) == 9


def test_outputs_are_as_many_as_the_released_heads_have() -> None:
    assert {name: len(outputs_of(scheme)) for name, scheme in RELEASED_LABELS.items()} == {
        "stunet-totalsegmentator": 105,
        "stunet-abdomenatlas": 10,
    }
    assert not set(RELEASED_LABELS) & set(SCHEMES)
