"""The predictor in a notebook: volumes and paths in, masks on their own grids out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from segkit.checkpoint.model import load_model, save_model
from segkit.checkpoint.run_folder import load_card
from segkit.checkpoint.tensors import load_weights_file
from segkit.errors import CheckpointError, DataError, RequestError
from segkit.inference.backends import TorchBackend
from segkit.inference.predictor import Ensemble, Predictor
from segkit.labels import SCHEMES, classes_scheme
from segkit.preparing.preprocessing import LoadedCase
from segkit.reading.case import Case, ImageFile, match_modalities
from segkit.reading.volume import Grid, Volume

MakeRun = Callable[..., Path]
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


@pytest.mark.parametrize("letters", ["RAS", "LPS", "SAR", "PIL"])
def test_mask_lies_on_the_grid_of_the_volume(make_run: MakeRun, letters: str, scans: Any) -> None:
    predictor = Predictor.load(make_run())
    turn = nib.orientations.inv_ornt_aff(
        nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(letters)),
        (6, 5, 4),
    )
    prediction = predictor(Volume(scans.stairs(), Grid((6, 5, 4), turn)))
    assert np.array_equal(prediction.labels, scans.labels())
    assert prediction.labels.dtype == np.uint8
    assert np.array_equal(prediction.affine, turn)
    assert prediction.label_scheme is SCHEMES["brats2017"]
    assert prediction.probabilities is None


def test_volume_larger_than_the_window(make_run: MakeRun, scans: Any) -> None:
    shape = (20, 9, 11)
    prediction = Predictor.load(make_run())(Volume(scans.stairs(shape), Grid(shape, np.eye(4))))
    assert np.array_equal(prediction.labels, scans.labels(shape))


def test_resampled_case_comes_back_to_its_own_shape(make_run: MakeRun) -> None:
    predictor = Predictor.load(make_run(spacing_mm=(2, 2, 2), scheme=classes_scheme("organ", {"liver": 3})))
    values = np.zeros((12, 8, 8), np.float32)
    values[2:10, 2:6, 2:6] = 1
    prediction = predictor(Volume(values, Grid(values.shape, np.eye(4))))
    assert prediction.labels.shape == values.shape
    assert np.array_equal(np.unique(prediction.labels), [0, 3])
    assert (prediction.labels[3:9, 3:5, 3:5] == 3).all()


def test_classes_are_painted_with_their_own_values(make_run: MakeRun, scans: Any) -> None:
    predictor = Predictor.load(make_run(scheme=classes_scheme("organs", {"spleen": 7, "liver": 3})))
    prediction = predictor(Volume(np.clip(scans.stairs(), 0, 2), Grid((6, 5, 4), np.eye(4))), with_probabilities=True)
    assert np.array_equal(prediction.labels, scans.labels(painted=(3, 7, 7)))
    assert prediction.probabilities is not None
    assert prediction.probabilities.shape == (3, 6, 5, 4)
    np.testing.assert_allclose(prediction.probabilities.sum(0), 1, atol=3e-5)  # 16 bits each


def test_paths_by_modality_under_any_of_their_names(make_run: MakeRun, tmp_path: Path, scans: Any) -> None:
    predictor = Predictor.load(make_run(modalities=("t1c", "t2f")))
    half = scans.stairs() / 2
    paths = {name: scans.write(tmp_path / f"{name}.nii.gz", half) for name in ("FLAIR", "t1ce")}
    prediction = predictor(paths)
    assert np.array_equal(prediction.labels, scans.labels())
    with pytest.raises(DataError, match=r"modality t1c is missing \(found: FLAIR\)"):
        predictor({"FLAIR": paths["FLAIR"]})


def test_case_folder_and_single_file(make_run: MakeRun, tmp_path: Path, scans: Any) -> None:
    predictor = Predictor.load(str(make_run()))
    folder = scans.write_case(tmp_path / "data", "BraTS2021_00001", {"t1c": scans.stairs()})
    assert np.array_equal(predictor(folder).labels, scans.labels())
    assert np.array_equal(predictor(scans.write(tmp_path / "scan.nii", scans.stairs())).labels, scans.labels())
    scans.write_case(tmp_path / "data", "BraTS2021_00002", {"t1c": scans.stairs()})
    with pytest.raises(DataError, match="holds 2 cases; expected one"):
        predictor(tmp_path / "data")


def test_unusable_volumes_are_refused(make_run: MakeRun, scans: Any) -> None:
    volume = Volume(scans.stairs(), Grid((6, 5, 4), LPS))
    with pytest.raises(DataError, match="one volume was given; expected t1c, t2f"):
        Predictor.load(make_run("two", modalities=("t1c", "t2f")))(volume)
    predictor = Predictor.load(make_run())
    volume.array[0, 0, 0] = np.nan
    with pytest.raises(DataError, match="1 voxels are NaN or infinite"):
        predictor(volume)
    with pytest.raises(DataError, match="is a picture; expected a volume"):
        predictor(Volume(np.ones((4, 4)), Grid((4, 4), np.eye(4))))


def test_wrong_requests_are_refused(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    with pytest.raises(RequestError, match="backend 'tensorrt' is not known; expected one of auto, torch"):
        Predictor.load(run, backend="tensorrt")
    with pytest.raises(RequestError, match="device 'abacus' is not known"):
        Predictor.load(run, device="abacus")
    with pytest.raises(CheckpointError, match="is not a folder"):
        Predictor.load(tmp_path / "nothing")
    pretrained = make_run("encoder", task="pretraining", activation=None, label_scheme=None)
    with pytest.raises(RequestError, match="pretraining model, which makes no masks"):
        Predictor.load(pretrained)


def test_a_network_in_training_is_left_in_training(make_run: MakeRun, scans: Any) -> None:
    run = make_run()
    network = load_model(run).train()
    prediction = Predictor(TorchBackend(network), load_card(run))(Volume(scans.stairs(), Grid((6, 5, 4), LPS)))
    assert np.array_equal(prediction.labels, scans.labels())
    assert network.training


def test_mask_in_another_scheme(make_run: MakeRun, scans: Any) -> None:
    predictor = Predictor.load(make_run())
    loaded = LoadedCase("a", scans.stairs()[None], None, Grid((6, 5, 4), LPS), (True,))
    prediction = predictor.predict_loaded(loaded, SCHEMES["msd-brats"])
    assert np.array_equal(prediction.labels, scans.labels(painted=(1, 2, 3)))
    assert prediction.label_scheme.name == "msd-brats"


@pytest.mark.parametrize(("axes", "calls"), [(None, 8), ((0, 1), 4), ((), 1)])
def test_mirroring_uses_the_axes_of_the_training(
    make_run: MakeRun, axes: tuple[int, ...] | None, calls: int, scans: Any
) -> None:
    predictor = Predictor.load(make_run(mirror_axes=axes), uses_tta=True)
    seen, whole = [], predictor.backend

    class Counted:
        name = "counted"

        def __call__(self, windows: NDArray[np.float32]) -> NDArray[np.float32]:
            seen.append(1)
            return whole(windows)

    prediction = replace(predictor, backend=Counted())(Volume(scans.stairs(), Grid((6, 5, 4), LPS)))
    assert len(seen) == calls
    assert np.array_equal(prediction.labels, scans.labels())


def test_ensemble_is_the_mean_of_probabilities(make_run: MakeRun, tmp_path: Path) -> None:
    # Logit of the first region at intensity 1 is 5 + bias. Two models with biases 0 and -6 give probabilities
    # 0.993 and 0.269, mean 0.631: painted. With -12 in place of -6 it is 0.497: not painted.
    volume = Volume(np.ones((4, 4, 4), np.float32), Grid((4, 4, 4), LPS))
    runs = [make_run("a"), make_run("b", bias=-6.0), make_run("c", bias=-12.0)]
    assert (Predictor.load([runs[0], runs[1]])(volume).labels == 2).all()
    assert (Predictor.load([runs[0], runs[2]])(volume).labels == 0).all()
    prediction = Predictor.load([runs[0], runs[1]])(volume, with_probabilities=True)
    assert prediction.probabilities is not None
    np.testing.assert_allclose(prediction.probabilities[0], (0.993307 + 0.268941) / 2, atol=1e-5)


def test_folds_of_a_cross_validation_are_an_ensemble(make_run: MakeRun, tmp_path: Path) -> None:
    for fold in range(3):
        make_run(f"cv/fold_{fold}", bias=float(fold))
    predictor = Predictor.load(tmp_path / "cv")
    assert isinstance(predictor, Ensemble)
    assert len(predictor.members) == 3
    assert predictor.identity != Predictor.load(tmp_path / "cv" / "fold_0").identity


def test_models_that_differ_are_no_ensemble(make_run: MakeRun) -> None:
    runs = [make_run("a"), make_run("b", modalities=("t2f",), spacing_mm=(2, 2, 2))]
    with pytest.raises(RequestError, match=r"b: differs from .*a in modalities, spacing_mm"):
        Predictor.load(runs)


def test_can_paint_tells_schemes_that_lack_a_tissue(make_run: MakeRun) -> None:
    predictor = Predictor.load(make_run(scheme=SCHEMES["brats2024"]))
    assert not predictor.can_paint(SCHEMES["brats2023"])
    assert predictor.can_paint(SCHEMES["brats2024"])


def case_with(*names: str) -> Case:
    return Case("c", "c", {name: ImageFile(Path(f"{name}.nii.gz")) for name in names}, ImageFile(Path("seg.nii.gz")))


@pytest.mark.parametrize(
    ("found", "wanted", "taken"),
    [
        (("t2f", "t1c"), ("t1c", "t2f"), ("t1c", "t2f")),
        (("T1Gd", "extra"), ("t1c",), ("T1Gd",)),
        (("mri",), ("MRI",), ("mri",)),
        (("0",), ("MRI",), ("0",)),
        (("scan",), ("t1c",), ("scan",)),
        (("t1n",), ("MRI",), ("t1n",)),
        (("0", "1"), ("T2 map", "ADC"), ("0", "1")),
        (("channel_0", "channel_1"), ("PET", "CT"), ("channel_0", "channel_1")),
        (("t1n",), ("image",), ("t1n",)),
        (("t1n",), ("channel_0",), ("t1n",)),
        (("image",), ("CT",), ("image",)),
    ],
)
def test_modalities_are_matched_by_name(
    found: tuple[str, ...], wanted: tuple[str, ...], taken: tuple[str, ...]
) -> None:
    matched = match_modalities(case_with(*found), wanted)
    assert list(matched.images) == list(wanted)
    assert [file.path.name.removesuffix(".nii.gz") for file in matched.images.values()] == list(taken)
    assert matched.label is None


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        (("t2f",), ("t1c",)),
        (("0", "1", "2", "3"), ("t1n", "t1c", "t2w", "t2f")),
        (("channel_0", "channel_1"), ("t1c", "t2f")),
        (("channel_0", "channel_b"), ("PET", "CT")),
        (("t1n",), ("CT",)),
        (("a", "b"), ("MRI",)),
        (("a", "b"), ("x", "y")),
    ],
)
def test_modalities_are_never_guessed(found: tuple[str, ...], wanted: tuple[str, ...]) -> None:
    with pytest.raises(DataError, match="missing"):
        match_modalities(case_with(*found), wanted, allow_missing=True)


def test_missing_modalities_may_be_allowed() -> None:
    matched = match_modalities(case_with("t1c"), ("t1c", "t2f"), allow_missing=True)
    assert list(matched.images) == ["t1c"]
    with pytest.raises(DataError, match="pass --allow-missing to do without"):
        match_modalities(case_with("t1c"), ("t1c", "t2f"))


def test_swapping_weights_changes_the_identity(make_run: MakeRun) -> None:
    run = make_run()
    before = Predictor.load(run).identity
    weights = load_weights_file(run / "model.safetensors")
    save_model(run, {**weights, "bias": torch.ones(1)}, load_card(run))
    assert Predictor.load(run).identity != before
    assert Predictor.load(run, uses_tta=True).identity != Predictor.load(run).identity
