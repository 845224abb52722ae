"""Every golden results folder of nnU-Net opens and loads strictly; see ../shared/data/nnunet_golden/README.md."""

import hashlib
import itertools
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage

import segkit
from segkit.checkpoint.model import load_model
from segkit.checkpoint.nnunet import open_results
from segkit.checkpoint.nnunet_card import make_card
from segkit.checkpoint.run_folder import load_card

REAL = Path(__file__).parents[1] / "data" / "real"
LABELS = {"Anterior": 1, "Posterior": 2}
FULL = "nnUNetTrainer__nnUNetPlans__3d_fullres"
GOLDEN = {
    f"Dataset401_Plain/{FULL}": ("plainunet", 1, 1),
    "Dataset402_ResEnc/nnUNetTrainer__nnUNetResEncUNetMPlans__3d_fullres": ("resencunet", 1, 1),
    "Dataset403_Flat/nnUNetTrainer__nnUNetPlans__2d": ("plainunet", 1, 1),
    f"Dataset404_TwoFolds/{FULL}": ("plainunet", 2, 1),
    f"Dataset405_Regions/{FULL}": ("plainunet", 1, 1),
    f"Dataset406_Ignore/{FULL}": ("plainunet", 1, 1),
    f"Dataset407_Ct/{FULL}": ("plainunet", 1, 1),
    f"Dataset408_MaskNorm/{FULL}": ("plainunet", 1, 2),
    f"Dataset409_Transposed/{FULL}": ("plainunet", 1, 1),
    f"Dataset410_Aniso/{FULL}": ("plainunet", 1, 1),
    "Dataset412_Cascade/nnUNetTrainer__nnUNetPlans__3d_lowres": ("plainunet", 1, 1),
    "Dataset412_Cascade/nnUNetTrainer__nnUNetPlans__3d_cascade_fullres": ("plainunet", 1, 3),
    f"Dataset413_OldPlans/{FULL}": ("plainunet", 1, 1),
    f"Dataset414_TorchRes/{FULL}": ("plainunet", 1, 1),
}
"""Folder -> family, folds, input channels of the network."""


@pytest.mark.parametrize(("name", "expected"), GOLDEN.items())
def test_every_fold_loads_strictly(shared_data: Path, name: str, expected: tuple[str, int, int]) -> None:
    results = open_results(shared_data / "nnunet_golden" / name)
    card = make_card(results)
    family, folds, channels = expected
    assert (card.network.family, len(results.checkpoints), card.network.in_channels) == (family, folds, channels)
    assert results.notices == ()
    for checkpoint in results.checkpoints:
        model = load_model(checkpoint.parent)
        patch = results.configuration["patch_size"]
        with torch.no_grad():
            assert model(torch.zeros(1, channels, *patch)).shape == (1, len(results.outputs), *patch)


def test_facts_of_labels(shared_data: Path) -> None:
    golden = shared_data / "nnunet_golden"
    regions, ignore = (open_results(golden / name / FULL) for name in ("Dataset405_Regions", "Dataset406_Ignore"))
    assert [(one.name, one.label, one.members) for one in regions.outputs] == [
        ("whole", 1, (1, 2)),
        ("posterior", 2, (2,)),
    ]
    assert (regions.has_regions, regions.foreground) == (True, (1, 2))
    assert (ignore.has_regions, [one.label for one in ignore.outputs]) == (False, [0, 1, 2])
    cascade = open_results(golden / "Dataset412_Cascade/nnUNetTrainer__nnUNetPlans__3d_cascade_fullres")
    assert (cascade.previous_stage, cascade.foreground) == ("3d_lowres", (1, 2))


def test_logits_of_a_window_are_those_of_nnunet(shared_data: Path) -> None:
    """A case smaller than the patch: z-score, padding with 0, the mean over all mirrored inputs; in half precision."""
    folder = shared_data / "nnunet_golden" / "Dataset402_ResEnc"
    document = json.loads((folder / "logits.json").read_text())
    model = load_model(folder / document["model"] / "fold_0")
    image = np.asarray(nib.load(folder / "inputs" / "plain_0000.nii.gz").dataobj, np.float32).transpose(2, 1, 0)
    (box,) = ndimage.find_objects(ndimage.binary_fill_holes(image != 0).astype(np.uint8))
    prepared = np.ascontiguousarray(image)[box]
    prepared = ((prepared - prepared.mean()) / prepared.std())[None]
    digest = hashlib.sha256(np.ascontiguousarray(prepared, "<f4").tobytes()).hexdigest()
    assert digest == document["prepared"]["plain"]["sha256_float32"]
    window = np.pad(prepared, ((0, 0), (3, 3), (4, 4), (4, 4)))  # 34 x 48 x 32 to 40 x 56 x 40
    x = torch.from_numpy(window)[None]
    with torch.inference_mode():
        every = [axes for count in range(4) for axes in itertools.combinations((2, 3, 4), count)]
        logits = sum(torch.flip(model(torch.flip(x, axes)), axes) for axes in every) / len(every)
    # Weighted by a Gaussian, the sum kept in half precision, and divided by the weight.
    middle = np.zeros(window.shape[1:])
    middle[20, 28, 20] = 1
    weight = ndimage.gaussian_filter(middle, (5, 7, 5), mode="constant")
    weight = torch.from_numpy(weight / (weight.max() / 10)).half()
    logits = ((logits[0] * weight).half() / weight.clamp(min=weight[weight > 0].min())).float()
    golden = document["logits"]["mirroring"]
    found = np.array([float(logits[c, z + 3, y + 4, x + 4]) for c, z, y, x in golden["positions"]])
    np.testing.assert_allclose(found, golden["values"], rtol=2**-10, atol=2**-11)
    assert np.count_nonzero(found != golden["values"]) <= 2  # none here; another processor may round another way


def test_fine_tuning_begins_where_inference_stands(shared_data: Path, tmp_path: Path) -> None:
    """A step that changes nothing: the Dice of the validation cases is that of the masks of the folder."""
    results = shared_data / "nnunet_golden/Dataset402_ResEnc/nnUNetTrainer__nnUNetResEncUNetMPlans__3d_fullres"
    data = REAL / "Task04_Hippocampus"
    nothing = {
        "optimiser": {"lr": 1e-12, "weight_decay": 0.0},
        "training": {"steps": 1, "ema_decay": 0.0, "workers": 0},
    }
    summary = segkit.train(data, tmp_path / "run", weights=results, device="cpu", postprocessing="none", **nothing)
    card = load_card(tmp_path / "run")
    assert (card.patch_size, card.preprocessing.orientation) == ((40, 56, 40), "KJI")
    assert card.network.arguments["widths"] == [4, 8, 16]
    predictor = segkit.Predictor.load(results, uses_tta=False)  # as in a validation
    for case, dice in summary.scores["cases"].items():
        reference = np.asarray(nib.load(data / "labelsTr" / f"{case}.nii.gz").dataobj)
        labels = predictor(data / "imagesTr" / f"{case}.nii.gz").labels
        expected = {name: overlap(labels == value, reference == value) for name, value in LABELS.items()}
        assert dice == pytest.approx(expected, abs=2e-3)


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    return float(2 * (one & other).sum() / (one.sum() + other.sum()))
