"""segkit's data and preprocessing in MONAI."""

from __future__ import annotations

import copy
import pickle
import runpy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data import DataLoader, MetaTensor, decollate_batch
from monai.losses import DiceCELoss
from monai.metrics import DiceMetric
from monai.transforms import Invertd, LoadImaged
from PIL import Image

import segkit
from segkit.errors import DataError
from segkit.inference.predictor import Predictor
from segkit.labels import SCHEMES
from segkit.monai import LoadCased, Prepared, as_dataset, datalist
from segkit.preparing.preprocessing import PreprocessingConfig, load_case, prepare
from segkit.reading.layouts.table import find_cases
from tests.helpers import MODALITIES, save_nifti, write_segmentation_run

_CONFIG = PreprocessingConfig(spacing_mm=(1.0, 1.0, 2.0), normalisation="zscore-nonzero", crop="nonzero")


@pytest.fixture
def phantoms(phantom_data: Callable[[int], Path]) -> Path:
    return phantom_data(2)


@pytest.mark.filterwarnings("ignore:NvImgCodecPydicomReader")
def test_monai_reads_the_list_as_well(phantoms: Path) -> None:
    items = datalist(phantoms)
    assert [item["case"] for item in items] == [case.id for case in find_cases(phantoms).cases]
    ours = LoadCased()(items[0])
    theirs = LoadImaged(["image", "label"], reader="NibabelReader", ensure_channel_first=True)(items[0])
    assert ours["image"].shape == (4, 24, 24, 19)
    assert (ours["image"].dtype, ours["label"].dtype) == (torch.float32, torch.uint8)
    for key in ("image", "label"):
        np.testing.assert_array_equal(np.asarray(ours[key]), np.asarray(theirs[key]))
        np.testing.assert_array_equal(ours[key].affine, theirs[key].affine)
        assert ours[key].meta["filename_or_obj"] == theirs[key].meta["filename_or_obj"]


def test_a_file_of_four_dimensions_is_one_path(tmp_path: Path) -> None:
    planes = np.arange(2 * 4**3, dtype=np.float32).reshape(4, 4, 4, 2)
    path = save_nifti(tmp_path / "scan.nii.gz", planes)
    image = LoadCased()({"image": path})["image"]
    np.testing.assert_array_equal(np.asarray(image), planes.transpose(3, 0, 1, 2))


def test_labels_get_the_values_of_the_scheme(phantoms: Path) -> None:
    item = datalist(phantoms)[0]
    assert item["label_scheme"]["name"] == "brats2023"  # ET is 3
    of_file, of_2017 = LoadCased()(item)["label"], LoadCased(scheme=SCHEMES["brats2017"])(item)["label"]
    np.testing.assert_array_equal(np.asarray(of_2017), np.choose(np.asarray(of_file), [0, 1, 2, 4]))


def test_a_case_without_a_modality_is_named(tmp_path: Path) -> None:
    for case, names in (("BraTS-GLI-00001-000", MODALITIES), ("BraTS-GLI-00002-000", MODALITIES[:3])):
        for name in names:
            save_nifti(tmp_path / case / f"{case}-{name}.nii.gz", np.ones((4, 4, 4), np.float32))
    with pytest.raises(DataError, match=r"1 of 2 cases lack a modality: BraTS-GLI-00002-000"):
        datalist(tmp_path)


def test_prepared_is_the_preprocessing_of_segkit_and_can_be_undone(phantoms: Path) -> None:
    cohort = find_cases(phantoms)
    expected = prepare(load_case(cohort.cases[0], cohort.modalities, cohort.scheme), _CONFIG)
    transform = Prepared(_CONFIG)
    read = LoadCased()(datalist(phantoms)[0])
    item = transform(read)
    np.testing.assert_array_equal(np.asarray(item["image"]), expected.image)
    np.testing.assert_array_equal(np.asarray(item["label"])[0], expected.labels)
    # World positions: the first face of the crop, one half of the new spacing before the first centre.
    start, spacing = np.array(expected.preparation.crop[0]), np.array(expected.preparation.spacing_mm)
    # The phantom is LPS: reoriented to RAS its first two axes are flipped, so that they begin at the last voxel.
    corner = read["label"].affine.numpy() @ [23, 23, 0, 1]
    np.testing.assert_allclose(item["image"].affine[:3, 3], corner[:3] + start - 0.5 + spacing / 2, atol=1e-6)
    np.testing.assert_allclose(item["image"].pixdim, spacing)
    back = transform.inverse(item)
    np.testing.assert_array_equal(back["label"].affine, read["label"].affine)
    one, other = np.asarray(back["label"]) > 0, np.asarray(read["label"]) > 0
    assert back["label"].dtype == torch.uint8
    assert 2 * (one & other).sum() / (one.sum() + other.sum()) > 0.75  # slices of 2 mm do not keep all of 1 mm
    without_resampling = Prepared(_CONFIG.model_copy(update={"spacing_mm": None}))
    back = without_resampling.inverse(without_resampling(read))
    np.testing.assert_array_equal(np.asarray(back["label"]), np.asarray(read["label"]))


def test_invertd_brings_logits_to_the_grid_of_the_file_after_a_loader(phantoms: Path, tmp_path: Path) -> None:
    run = write_segmentation_run(
        tmp_path / "run", spacing_mm=(1.0, 1.0, 2.0), normalisation="zscore-nonzero", crop="nonzero"
    )
    transform = Prepared(run)
    (item,) = decollate_batch(next(iter(DataLoader(as_dataset(phantoms, transform), batch_size=1))))
    predictor = Predictor.load(run)
    prepared = predictor.read_case(find_cases(phantoms).cases[0])
    np.testing.assert_array_equal(np.asarray(item["image"]), prepared.image)
    slabs = list(predictor.slabs(prepared))
    item["pred"] = MetaTensor(np.concatenate([slab.logits for slab in slabs], slabs[0].axis + 1))
    logits = Invertd("pred", transform, orig_keys="image", nearest_interp=False)(item)["pred"]
    assert logits.shape == (3, *prepared.preparation.source_grid.shape)
    np.testing.assert_array_equal(logits.affine, prepared.preparation.source_grid.affine)
    painted = np.zeros(logits.shape[1:], np.uint8)
    for plane, output in zip(np.asarray(logits), predictor.card.outputs, strict=True):
        painted[plane > 0] = output.label
    labels = predictor.predict_prepared(prepared).labels
    assert np.unique(labels).size > 2
    np.testing.assert_array_equal(painted, labels)


def test_pictures(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    picture = np.arange(12, dtype=np.uint8).reshape(3, 4)
    Image.fromarray(picture).save(path)
    item = Prepared(PreprocessingConfig(normalisation="zscore", crop="none"))(LoadCased()({"image": path}))
    assert item["image"].shape == (1, 3, 4)
    assert float(item["image"].mean()) == pytest.approx(0, abs=1e-6)


def test_a_network_trains_with_losses_and_metrics_of_monai() -> None:
    widths = {"size": "tiny", "widths": (4, 8)}
    network = segkit.build_model("revmbunet", in_channels=1, out_channels=2, deep_supervision=False, **widths)
    assert list(network.state_dict()) == list(
        segkit.build_model("revmbunet", in_channels=1, out_channels=2, **widths).state_dict()
    )
    image = torch.randn(1, 1, 8, 8, 8)
    mask = torch.cat([image > 0, image > 1], 1).float()
    optimiser = torch.optim.AdamW(network.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        optimiser.zero_grad()
        loss = DiceCELoss(sigmoid=True)(network(image), mask)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    metric = DiceMetric(reduction="mean_batch")
    metric((network.eval()(image) > 0).float(), mask)
    assert metric.aggregate()[0] > 0.5
    for copied in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert isinstance(copied.train()(image), torch.Tensor)


def test_the_example_trains(tmp_path: Path) -> None:
    example = runpy.run_path(str(Path(__file__).resolve().parents[1] / "examples" / "in_monai.py"))
    losses, dice = example["main"](tmp_path, epochs=4)
    assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[:3])  # of the same three phantoms
    assert list(dice) == ["TC", "WT", "ET"]
    assert all(0 <= value <= 1 for value in dice.values())
