"""Folders of scans with holes: what is written, what stays as it was, and what one bad case does to the others."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import PIL.Image
import pytest
from numpy.typing import NDArray

from segkit.batch.cases import find_input
from segkit.batch.runner import run_folder
from segkit.batch.worker import LocalExecutor
from segkit.checkpoint.card import ModelCard
from segkit.errors import RequestError
from segkit.inpainting.inpaint import Inpaint
from segkit.inpainting.masks import HoleSource, enlarged, find_lesions, find_masks
from segkit.preparing.lesion_bank import read_bank
from segkit.reading.files import read_labels, read_volume
from segkit.reading.volume import Grid
from segkit.shapes import Image

SHAPE = (6, 5, 4)
LPS = np.diag([-1.0, -1.0, 2.0, 1.0])
HOLE = (slice(2, 4), slice(2, 4), slice(1, 3))


class _Backend:
    name = "torch"

    def __call__(self, windows: NDArray[np.float32]) -> NDArray[np.float32]:
        raise AssertionError("the constant needs no network")


class Constant:
    """Fills the hole of modality k with `value` + k."""

    backend = _Backend()

    def __init__(self, modalities: tuple[str, ...] = ("t1n",), value: float = 7.25, digest: str = "c", dims: int = 3):
        self.value = value
        self.filled: list[int] = []
        self.card = ModelCard.model_validate(
            {
                "task": "inpainting",
                "network": {"family": "inpainter", "in_channels": len(modalities), "out_channels": len(modalities)},
                "dims": dims,
                "modalities": modalities,
                "patch_size": (8,) * dims,
                "divisor": (4,) * dims,
                "sha256": digest * 64,
                "training_data": {"identity": "none"},
            }
        )

    def fill(self, image: Image, hole: NDArray[np.bool_], grid: Grid) -> Image:
        assert image.shape[1:] == hole.shape == grid.shape
        self.filled.append(int(hole.sum()))
        values = np.arange(len(image), dtype=np.float32).reshape(-1, *(1,) * hole.ndim) + np.float32(self.value)
        return np.where(hole, values, image)


def tissue(seed: int, dtype: Any = np.int16) -> NDArray[Any]:
    """Intensities from 100 on in all but the outermost voxels."""
    values = np.zeros(SHAPE, dtype)
    values[1:-1, 1:-1, 1:-1] = np.random.default_rng(seed).integers(100, 900, (4, 3, 2))
    return values


def hole_mask() -> NDArray[np.uint8]:
    mask = np.zeros(SHAPE, np.uint8)
    mask[HOLE] = 1
    return mask


def save(path: Path, values: NDArray[Any], affine: NDArray[np.float64] = LPS, **scale: float) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(values, affine)
    image.set_sform(affine, code=4)
    if scale:
        image.header.set_slope_inter(scale["slope"], scale["intercept"])
    nib.save(image, path)
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two cases of T1 and FLAIR."""
    for number, case in enumerate(("p1", "p2")):
        for offset, name in enumerate(("t1", "flair")):
            save(tmp_path / "data" / case / f"{case}_{name}.nii.gz", tissue(2 * number + offset))
    return tmp_path / "data"


@pytest.fixture
def masks(tmp_path: Path) -> Path:
    for case in ("p1", "p2"):
        save(tmp_path / "masks" / f"{case}-mask.nii.gz", hole_mask())
    return tmp_path / "masks"


def run(
    filler: Constant, data: Path, out: Path, masks: Path, overwrite: bool = False, workers: int = 0, **options: Any
) -> dict[str, Any]:
    cohort = find_input(data, exclude=out)
    task = Inpaint(filler, find_masks(cohort, masks), **options)
    executor = LocalExecutor(workers)
    document = run_folder(task, cohort, out, overwrite=overwrite, executor=executor, model="constant")
    assert json.loads(json.dumps(document)) == json.loads((out / "manifest.json").read_text())
    return document


def statuses(document: Mapping[str, Any]) -> dict[str, str]:
    return {entry["case"]: entry["status"] for entry in document["cases"]}


@pytest.mark.parametrize("workers", [0, 1])
def test_only_the_hole_changes(data: Path, masks: Path, tmp_path: Path, workers: int) -> None:
    out = tmp_path / "out"
    document = run(Constant(("t1n", "t2f")), data, out, masks, workers=workers)
    assert statuses(document) == {"p1": "done", "p2": "done"}
    assert [entry["made_up_voxels"] for entry in document["cases"]] == [8, 8]
    assert document["model"]["name"] == "constant"
    assert document["model"]["sha256"] == ["c" * 64]
    assert sorted(path.name for path in out.iterdir()) == [
        "manifest.json",
        *(f"p{number}_{name}-inference.nii.gz" for number in (1, 2) for name in ("t1n", "t2f")),
    ]
    for name, source, value in (("t1n", "t1", 7), ("t2f", "flair", 8)):
        before = nib.load(data / "p1" / f"p1_{source}.nii.gz")
        after = nib.load(out / f"p1_{name}-inference.nii.gz")
        assert after.get_data_dtype() == np.int16
        assert after.header.binaryblock == before.header.binaryblock
        voxels, expected = np.asarray(after.dataobj), np.asarray(before.dataobj).copy()
        expected[HOLE] = value  # 7.25 and 8.25, rounded
        assert np.array_equal(voxels, expected)


def test_scaled_integers_come_back_as_they_were(masks: Path, tmp_path: Path) -> None:
    raw = tissue(0)
    save(tmp_path / "data" / "p1" / "p1_t1.nii.gz", raw, slope=0.5, intercept=-10.0)
    assert statuses(run(Constant(), tmp_path / "data", tmp_path / "out", masks)) == {"p1": "done"}
    image = nib.load(tmp_path / "out" / "p1_t1n-inference.nii.gz")
    raw[HOLE] = round((7.25 + 10) / 0.5)
    assert np.array_equal(image.dataobj.get_unscaled(), raw)
    assert np.array_equal(image.get_fdata(), raw * 0.5 - 10)


def test_one_bad_case_does_not_stop_the_others(data: Path, masks: Path, tmp_path: Path) -> None:
    def renamed(case: str, name: str) -> Path:
        return save(data / case / f"{case}_t1.nii.gz", tissue(9)) if name == "image" else masks / f"{case}-mask.nii.gz"

    for case in ("p3", "p4", "p5", "p6", "p7"):
        renamed(case, "image")
    save(masks / "p3-mask.nii.gz", hole_mask()[:-1])
    save(masks / "p4-mask.nii.gz", hole_mask(), affine=np.diag([-1.0, -1.0, 3.0, 1.0]))
    save(masks / "p5-mask.nii.gz", hole_mask())
    (masks / "p5-mask.nii.gz").write_bytes((masks / "p5-mask.nii.gz").read_bytes()[:-12])
    save(masks / "p6-mask.nii.gz", hole_mask())
    (data / "p6" / "p6_t1.nii.gz").rename(data / "p6" / "p6_flair.nii.gz")
    document = run(Constant(), data, tmp_path / "out", masks)
    errors = {entry["case"]: entry["error"] for entry in document["cases"] if entry["status"] == "failed"}
    assert statuses(document)["p1"] == statuses(document)["p2"] == "done"
    assert sorted(errors) == ["p3", "p4", "p5", "p6", "p7"]
    assert "6 x 5 x 4 voxels and" in errors["p3"]
    assert "does not lie on the grid of the image" in errors["p4"]
    assert "truncated or damaged" in errors["p5"]
    assert "modality t1n is missing" in errors["p6"]
    assert "--allow-missing" not in errors["p6"]
    assert "there is no mask of case p7" in errors["p7"]
    assert not list((tmp_path / "out").glob("p[3-7]*"))


def test_a_case_with_nothing_missing_is_copied_with_a_note(data: Path, masks: Path, tmp_path: Path) -> None:
    save(masks / "p1-mask.nii.gz", np.zeros(SHAPE, np.uint8))
    document = run(Constant(), data, tmp_path / "out", masks)
    notes = {entry["case"]: entry["note"] for entry in document["cases"]}
    assert notes == {"p1": "nothing is missing: the image is unchanged", "p2": None}
    image = read_volume(tmp_path / "out" / "p1_t1n-inference.nii.gz").array
    assert np.array_equal(image, tissue(0))


def test_again_and_again(data: Path, masks: Path, tmp_path: Path) -> None:
    out, filler = tmp_path / "out", Constant()
    save(masks / "p2-mask.nii.gz", hole_mask()[:-1])
    assert statuses(run(filler, data, out, masks)) == {"p1": "done", "p2": "failed"}
    save(masks / "p2-mask.nii.gz", hole_mask())
    assert statuses(run(filler, data, out, masks)) == {"p1": "skipped", "p2": "done"}
    assert statuses(run(filler, data, out, masks)) == {"p1": "skipped", "p2": "skipped"}
    assert filler.filled == [8, 8]
    (out / "p1_t1n-inference.nii.gz").write_bytes(b"torn")
    assert statuses(run(filler, data, out, masks)) == {"p1": "done", "p2": "skipped"}
    assert statuses(run(filler, data, out, masks, anomaly=True)) == {"p1": "done", "p2": "done"}
    assert statuses(run(filler, data, out, masks, anomaly=True)) == {"p1": "skipped", "p2": "skipped"}
    assert statuses(run(filler, data, out, masks, overwrite=True)) == {"p1": "done", "p2": "done"}


def test_what_was_finished_before_an_interruption_is_kept(data: Path, masks: Path, tmp_path: Path) -> None:
    class Interrupted(Constant):
        def fill(self, image: Image, hole: NDArray[np.bool_], grid: Grid) -> Image:
            if self.filled:
                raise KeyboardInterrupt
            return super().fill(image, hole, grid)

    with pytest.raises(KeyboardInterrupt):
        run(Interrupted(), data, tmp_path / "out", masks, workers=1)
    document = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert statuses(document) == {"p1": "done"}
    assert document["remaining"] == ["p2"]
    assert statuses(run(Constant(), data, tmp_path / "out", masks)) == {"p1": "skipped", "p2": "done"}


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_no_image_is_not_written(data: Path, masks: Path, tmp_path: Path, value: float) -> None:
    document = run(Constant(value=value), data, tmp_path / "out", masks)
    assert statuses(document) == {"p1": "failed", "p2": "failed"}
    assert "the model output contains NaN or infinity" in document["cases"][0]["error"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["manifest.json"]


def test_images_of_another_model_or_other_masks_are_not_replaced(data: Path, masks: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(Constant(), data, out, masks)
    document = run(Constant(digest="d"), data, out, masks)
    assert statuses(document) == {"p1": "failed", "p2": "failed"}
    assert "an image that was not made by this model with these holes" in document["cases"][0]["error"]
    masks.rename(tmp_path / "others")
    assert statuses(run(Constant(), data, out, tmp_path / "others")) == {"p1": "failed", "p2": "failed"}


def test_anomaly_needs_something_in_the_hole(data: Path, masks: Path, tmp_path: Path) -> None:
    voided = tissue(0)
    voided[HOLE] = 0
    save(data / "p1" / "p1_t1.nii.gz", voided)
    document = run(Constant(), data, tmp_path / "out", masks, anomaly=True)
    assert statuses(document) == {"p1": "failed", "p2": "done"}
    assert "is 0 in all of the hole" in document["cases"][0]["error"]
    anomaly = nib.load(tmp_path / "out" / "p2_anomaly.nii.gz")
    assert anomaly.get_data_dtype() == np.float32
    values = anomaly.get_fdata()
    assert values[HOLE].min() > 0
    assert not values[tissue(2) == 0].any()


def test_a_bank_is_a_data_folder_without_lesions(data: Path, masks: Path, tmp_path: Path) -> None:
    bank = tmp_path / "bank"
    (masks / "p2-mask.nii.gz").unlink()
    document = run(Constant(("t1n", "t2f")), data, tmp_path / "out", masks, bank=bank)
    assert statuses(document) == {"p1": "done", "p2": "failed"}
    assert [case.case for case in read_bank(bank).cases] == ["p1"]
    assert read_bank(bank).modalities == ("t1n", "t2f")
    cohort = find_input(bank)
    assert [(case.id, list(case.images)) for case in cohort.cases] == [("p1", ["t1n", "t2f"])]
    labels, _ = read_labels(bank / "p1" / "p1_lesion.nii.gz")
    assert np.array_equal(labels, hole_mask())
    copy = read_volume(bank / "p1" / "p1_t2f.nii.gz").array
    assert np.array_equal(copy, read_volume(tmp_path / "out" / "p1_t2f-inference.nii.gz").array)
    (bank / "p1" / "p1_t1n.nii.gz").unlink()
    assert statuses(run(Constant(("t1n", "t2f")), data, tmp_path / "out", masks, bank=bank))["p1"] == "done"
    assert (bank / "p1" / "p1_t1n.nii.gz").exists()


def test_lesions_are_enlarged_in_millimetres_but_not_into_background() -> None:
    marked = np.zeros((9, 9, 9), bool)
    marked[4, 4, 4] = True
    image = np.ones((2, 9, 9, 9), np.float32)
    image[:, 3] = 0
    image[1, 3, 4, 4] = 5  # tissue in one of the modalities
    image[:, 4, 4, 4] = 0  # a cavity belongs to the lesion
    grown = enlarged(marked, image, (1.0, 2.0, 3.0), 2.0)
    # Reach: two voxels along the first axis, one along the second, none along the third.
    expected = {(4, 4, 4), (5, 4, 4), (6, 4, 4), (3, 4, 4), (2, 4, 4), (4, 3, 4), (4, 5, 4)}
    assert {tuple(place) for place in np.argwhere(grown).tolist()} == expected
    assert enlarged(marked, image, (1.0, 2.0, 3.0), 0.0) is marked


def test_the_references_of_a_data_folder_are_lesions(data: Path, tmp_path: Path) -> None:
    labels = np.zeros(SHAPE, np.uint8)
    labels[2, 2, 1], labels[3, 2, 1] = 1, 4
    for case in ("p1", "p2"):
        save(data / case / f"{case}_seg.nii.gz", labels)
    cohort = find_input(data)
    holes = find_lesions(cohort, data, 1.0, "cpu", "torch")
    filler = Constant()
    document = run_folder(Inpaint(filler, holes, save_holes=True), cohort, tmp_path / "out")
    assert document["holes"]["margin_mm"] == 1.0
    made_up, _ = read_labels(tmp_path / "out" / "p1_hole.nii.gz")
    # Voxels of 1 x 1 x 2 mm: the two labels, the ends of their row, and the tissue on either side of it.
    assert {tuple(place) for place in np.argwhere(made_up).tolist()} == {
        (1, 2, 1), (2, 2, 1), (3, 2, 1), (4, 2, 1), (2, 1, 1), (3, 1, 1), (2, 3, 1), (3, 3, 1)
    }  # fmt: skip


def test_masks_that_cannot_be_assigned(data: Path, masks: Path, tmp_path: Path) -> None:
    cohort = find_input(data)
    with pytest.raises(RequestError, match="is one mask, and there are 2 cases"):
        find_masks(cohort, masks / "p1-mask.nii.gz")
    with pytest.raises(RequestError, match="no such file or folder"):
        find_masks(cohort, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RequestError, match=r"holds no mask of any of the 2 cases; expected files such as p1\.nii\.gz"):
        find_masks(cohort, tmp_path / "empty")
    save(masks / "p1-seg.nii.gz", hole_mask())
    document = run(Constant(), data, tmp_path / "out", masks)
    assert statuses(document) == {"p1": "failed", "p2": "done"}
    assert "2 files could be the mask" in document["cases"][0]["error"]


def test_labels_that_are_named_like_their_images(tmp_path: Path) -> None:
    for case in ("p1", "p2"):
        save(tmp_path / "data" / "imagesTr" / f"{case}_0000.nii.gz", tissue(0))
        save(tmp_path / "data" / "labelsTr" / f"{case}.nii.gz", hole_mask())
        save(tmp_path / "msd" / "imagesTr" / f"{case}.nii.gz", tissue(0))
        save(tmp_path / "msd" / "labelsTr" / f"{case}.nii.gz", hole_mask())
    document = {"labels": {"0": "background", "1": "lesion"}, "numTraining": 2, "modality": {"0": "T1"}}
    pairs = [{"image": f"./imagesTr/{case}.nii.gz", "label": f"./labelsTr/{case}.nii.gz"} for case in ("p1", "p2")]
    (tmp_path / "msd" / "dataset.json").write_text(json.dumps({**document, "training": pairs, "test": []}))
    for root in (tmp_path / "data", tmp_path / "msd"):
        cohort = find_input(root)
        masks = find_masks(cohort, root).masks
        assert {case: file.path for case, file in masks.items()} == {
            case: root / "labelsTr" / f"{case}.nii.gz" for case in ("p1", "p2")
        }
    assert len(find_masks(find_input(tmp_path / "data"), tmp_path / "msd").masks) == 2


def test_results_never_take_the_place_of_input(data: Path, masks: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "p1_t1n-inference.nii.gz").symlink_to(data / "p1" / "p1_t1.nii.gz")
    document = run(Constant(), data, tmp_path / "out", masks, overwrite=True)
    assert statuses(document) == {"p1": "failed", "p2": "done"}
    assert "would replace an input file of the case" in document["cases"][0]["error"]


def test_a_model_of_slices_fills_volumes(data: Path, masks: Path, tmp_path: Path) -> None:
    assert statuses(run(Constant(dims=2), data, tmp_path / "out", masks)) == {"p1": "done", "p2": "done"}


def test_pictures(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    colours = rng.integers(1, 255, (8, 10, 3)).astype(np.uint8)
    (tmp_path / "data").mkdir()
    PIL.Image.fromarray(colours).save(tmp_path / "data" / "eye.png")
    mask = np.zeros((8, 10), np.uint8)
    mask[2:4, 5:9] = 255
    PIL.Image.fromarray(mask).save(tmp_path / "mask.png")
    cohort = find_input(tmp_path / "data")
    filler = Constant(cohort.modalities, dims=2)
    holes: HoleSource = find_masks(cohort, tmp_path / "mask.png")
    document = run_folder(Inpaint(filler, holes), cohort, tmp_path / "out")
    assert statuses(document) == {"eye": "done"}
    found = np.asarray(PIL.Image.open(tmp_path / "out" / "eye-inference.png"))
    colours[mask > 0] = (7, 8, 9)
    assert np.array_equal(found, colours)
    assert statuses(run_folder(Inpaint(filler, holes), cohort, tmp_path / "out")) == {"eye": "skipped"}
    with pytest.raises(RequestError, match="expected volumes, for a bank"):
        run_folder(Inpaint(filler, holes, bank=tmp_path / "bank"), cohort, tmp_path / "out")
    with pytest.raises(RequestError, match="holds pictures; expected volumes"):
        run_folder(Inpaint(Constant(cohort.modalities), holes), cohort, tmp_path / "out")
