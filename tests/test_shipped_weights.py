"""The weights that ship: small, whole, and as good as they are said to be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from segkit.checkpoint.run_folder import WEIGHTS_NAME, load_card
from segkit.checkpoint.tensors import load_weights_file
from segkit.inference.predictor import Predictor
from segkit.reading.files import read_volume

FOLDER = Path(__file__).parents[1] / "weights" / "hippocampus-revmbunet"


def test_they_are_small_and_say_what_they_are() -> None:
    assert (FOLDER / WEIGHTS_NAME).stat().st_size < 10e6
    card = load_card(FOLDER)
    assert card.training_data.licence == "CC-BY-SA 4.0"
    assert {"platform", "cores"}.isdisjoint(card.versions)
    assert {tensor.dtype for tensor in load_weights_file(FOLDER / WEIGHTS_NAME).values()} == {torch.float16}


@pytest.mark.parametrize("case", ["hippocampus_014", "hippocampus_023"])
def test_they_segment_cases_that_were_held_out(real_data: Path, case: str) -> None:
    folder = real_data / "Task04_Hippocampus"
    prediction = Predictor.load(FOLDER)(folder / "imagesTr" / f"{case}.nii.gz")
    reference = np.asarray(read_volume(folder / "labelsTr" / f"{case}.nii.gz").array)
    for label in (1, 2):
        ours, theirs = prediction.labels == label, reference == label
        assert 2 * (ours & theirs).sum() / (ours.sum() + theirs.sum()) > 0.8
