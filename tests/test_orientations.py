"""A scan in any of the 48 orientations, straight or oblique, gets its mask in its own array order, voxel by voxel."""

from __future__ import annotations

from itertools import permutations, product
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import segkit
import segkit.cli
from segkit.checkpoint.card import ModelCard
from segkit.checkpoint.model import save_model
from segkit.inference.predictor import Predictor
from segkit.labels import SCHEMES, outputs_of
from segkit.preparing.preprocessing import load_case
from segkit.reading.case import Case, ImageFile
from segkit.reading.files import write_labels
from segkit.reading.layouts.table import find_cases
from tests.helpers import run_segkit

SCHEME = SCHEMES["brats2017"]
THRESHOLDS = (25.5, 50.5, 75.5)
"""Above them WT, TC and ET; intensities are whole numbers, so that no rounding decides."""

ORIENTATIONS = [
    np.column_stack([axes, flips]) for axes in permutations(range(3)) for flips in product((1, -1), repeat=3)
]
"""nibabel's: for each axis of the file the axis of RAS it lies along, and whether it grows with it."""

STRAIGHT = np.array([[1.0, 0, 0, -40], [0, 1.5, 0, 25], [0, 0, 2.25, -7], [0, 0, 0, 1]])
_COS, _SIN = np.cos(np.deg2rad(20)), np.sin(np.deg2rad(20))
OBLIQUE = np.array([[_COS, -_SIN, 0, 0], [_SIN, _COS, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]) @ STRAIGHT


class Thresholds:
    """A network of one channel whose output k is the intensity above threshold k."""

    name = "thresholds"

    def __call__(self, windows: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.concatenate([windows - threshold for threshold in THRESHOLDS], axis=1)


def card(**changes: Any) -> ModelCard:
    """Intensities 0 to 100 reach the network as they are, in windows smaller than the scan."""
    document: dict[str, Any] = {
        "network": {"family": "stunet", "in_channels": 1, "out_channels": 3},
        "modalities": ("t1c",),
        "patch_size": (5, 4, 6),
        "divisor": (1, 1, 1),
        "normalisation": "ct-window",
        "ct_window": (0, 100),
        "ct_mean": 0,
        "ct_std": 1,
        "crop": "nonzero",
        "activation": "sigmoid",
        "outputs": [{"name": o.name, "label": o.label, "members": o.members} for o in outputs_of(SCHEME)],
        "label_scheme": SCHEME.to_json(),
        "training_data": {"identity": "none", "cases": 0},
    }
    return ModelCard.model_validate({**document, **changes})


def noise() -> NDArray[np.int16]:
    """Whole numbers from 1 to 100 in RAS, nothing around them, and not as much of it on one side as on the other."""
    values = np.zeros((11, 8, 9), np.int16)
    values[1:9, 2:8, 0:7] = np.random.default_rng(0).integers(1, 101, (8, 6, 7))
    return values


def stored(path: Path, orientation: NDArray[np.int64], affine: NDArray[np.float64]) -> Path:
    """The noise as a file of that orientation."""
    image = nib.Nifti1Image(noise(), affine)
    transform = nib.orientations.ornt_transform(np.column_stack([range(3), (1, 1, 1)]), orientation)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image.as_reoriented(transform), path)
    return path


def painted(values: NDArray[np.int16]) -> NDArray[np.uint8]:
    """ED 2, NCR 1 and ET 4 by their thresholds."""
    return np.select([values > 75, values > 50, values > 25], [4, 1, 2], 0).astype(np.uint8)


def test_there_are_48_orientations(tmp_path: Path) -> None:
    affines = {nib.load(stored(tmp_path / "a.nii", one, STRAIGHT)).affine.tobytes() for one in ORIENTATIONS}
    assert len(affines) == 48


@pytest.mark.parametrize("affine", [STRAIGHT, OBLIQUE], ids=["straight", "oblique"])
@pytest.mark.parametrize("working", ["RAS", "PIL", "KJI"])
def test_masks_in_every_orientation(tmp_path: Path, affine: NDArray[np.float64], working: str) -> None:
    predictor = Predictor(Thresholds(), card(orientation=working))
    for number, orientation in enumerate(ORIENTATIONS):
        path = stored(tmp_path / f"{number}.nii", orientation, affine)
        source = nib.load(path)
        loaded = load_case(Case("a", "a", {"t1c": ImageFile(path)}), ("t1c",), None)
        prediction = predictor.predict_loaded(loaded)
        expected = painted(np.asarray(source.dataobj))
        np.testing.assert_array_equal(prediction.labels, expected, err_msg=str(orientation))
        np.testing.assert_array_equal(prediction.affine, source.affine)
        if working == "RAS":
            write_labels(tmp_path / "mask.nii", prediction.labels, prediction.grid)
            mask = nib.load(tmp_path / "mask.nii")
            np.testing.assert_array_equal(np.asarray(mask.dataobj), expected)
            np.testing.assert_array_equal(mask.affine, source.affine)
    assert np.unique(expected).tolist() == [0, 1, 2, 4]


def test_the_command_paints_one_scan_alike_in_three_orientations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network with random weights: whatever it paints, it paints at the same place of the patient."""
    monkeypatch.setattr(segkit.cli, "VERBS", {"infer": segkit.cli.VERBS["infer"]})
    torch.manual_seed(0)
    network = segkit.build_model("revmbunet", size="tiny", in_channels=1, out_channels=3)
    divisor: Any = network.divisor
    run = tmp_path / "run"
    description = card(
        network={"family": "revmbunet", "size": "tiny", "in_channels": 1, "out_channels": 3},
        patch_size=tuple(max(16, size) for size in divisor),
        divisor=divisor,
        normalisation="zscore-nonzero",
    )
    save_model(run, network.state_dict(), description)
    for number in (0, 13, 46):
        name = f"BraTS2021_{number:05d}"
        stored(tmp_path / "data" / name / f"{name}_t1ce.nii.gz", ORIENTATIONS[number], OBLIQUE)
    arguments = ("-m", run, "-i", tmp_path / "data", "-o", tmp_path / "out", "--backend", "torch", "-d", "cpu")
    assert run_segkit("infer", *arguments) == 0
    masks = []
    for case in find_cases(tmp_path / "data").cases:
        source, mask = (nib.load(path) for path in (case.images["t1c"].path, tmp_path / "out" / f"{case.id}.nii.gz"))
        np.testing.assert_array_equal(mask.affine, source.affine)
        masks.append(np.asarray(nib.as_closest_canonical(mask).dataobj))
    assert len({tuple(nib.aff2axcodes(nib.load(path).affine)) for path in (tmp_path / "out").glob("*.nii.gz")}) == 3
    assert 0 < np.count_nonzero(masks[0]) < np.count_nonzero(noise())
    for mask in masks[1:]:
        np.testing.assert_array_equal(mask, masks[0])
