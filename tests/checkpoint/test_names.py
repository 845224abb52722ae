"""Which tensor of a file is which of a network."""

from __future__ import annotations

import pytest

from segkit.checkpoint.transfer import match_names, other_part

NETWORK = ("encoder.stem.weight", "encoder.stem.bias", "decoder.weight", "heads.0.weight")


def test_names_of_the_network_itself_stay() -> None:
    assert match_names(NETWORK, NETWORK, "encoder.") == {name: name for name in NETWORK}


@pytest.mark.parametrize("beginning", ["", "image_encoder.", "encoder.", "backbone."])
def test_encoder_files_are_read_below_the_prefix(beginning: str) -> None:
    file = [f"{beginning}stem.weight", f"{beginning}stem.bias", "fc.weight"]
    found = match_names(file, NETWORK, "encoder.")
    assert [found[name] for name in file] == ["encoder.stem.weight", "encoder.stem.bias", "fc.weight"]


def test_without_an_encoder_names_must_meet_as_they_are() -> None:
    assert match_names(["stem.weight"], NETWORK, "") == {"stem.weight": "stem.weight"}


def test_parts_beside_an_encoder_are_known() -> None:
    assert other_part("fc.weight") == "fc is the classifier that it was trained with"
    assert other_part("image_encoder.pos_embed") == "pos_embed is a table of positions, which this encoder does not use"
    assert other_part("mask_decoder.transformer.layers.0.norm1.weight") == "mask_decoder is SAM's mask decoder"
    assert other_part("layer1.0.conv1.weight") is None
