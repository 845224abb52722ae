"""The disk cache of prepared cases."""

from __future__ import annotations

import os
import pickle
import shutil
import stat
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from segkit.errors import DataError
from segkit.labels import SCHEMES, classes_scheme
from segkit.preparing.cache import PreparedStore, StoredCases, foreground_voxels, open_prepared
from segkit.preparing.preprocessing import PreprocessingConfig
from segkit.reading.case import Case, ImageFile

CONFIG = PreprocessingConfig(normalisation="zscore-nonzero", crop="nonzero")
SCHEME = SCHEMES["brats2017"]


@pytest.fixture
def case(tmp_path: Path) -> Case:
    image = np.zeros((6, 6, 6), np.float32)
    image[1:5, 1:5, 1:5] = np.arange(1, 65).reshape(4, 4, 4)
    labels = np.zeros((6, 6, 6), np.uint8)
    labels[1, 1, 1], labels[4, 4, 4], labels[4, 4, 3] = 1, 4, 4
    for name, array in (("image", image), ("labels", labels)):
        nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / f"{name}.nii.gz")
    files = {"t1c": ImageFile(tmp_path / "image.nii.gz")}
    return Case("näme 1", "1", files, ImageFile(tmp_path / "labels.nii.gz"), SCHEME)


def test_a_case_is_prepared_once_and_memory_mapped(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = PreparedStore(tmp_path / "cache")
    first = open_prepared(store.entry(case, ("t1c",), SCHEME, CONFIG))
    monkeypatch.setattr("segkit.preparing.cache.prepare", None)  # a second preparation would fail
    again = open_prepared(store.entry(case, ("t1c",), SCHEME, CONFIG))

    assert isinstance(again.image, np.memmap)
    assert again.id == "näme 1"
    assert np.array_equal(first.image, again.image)
    assert again.preparation.crop == ((1, 1, 1), (5, 5, 5))
    assert {value: voxels.tolist() for value, voxels in again.foreground.items()} == {1: [0], 4: [62, 63]}


def test_changed_content_or_settings_give_another_entry(case: Case, tmp_path: Path) -> None:
    store = PreparedStore(tmp_path / "cache")
    first = store.entry(case, ("t1c",), SCHEME, CONFIG)

    assert store.entry(case, ("t1c",), SCHEME, CONFIG.model_copy(update={"crop": "none"})) != first
    assert store.entry(case, ("t1c",), SCHEMES["brats2023"], CONFIG) != first
    changed = np.arange(1, 217, dtype=np.float32).reshape(6, 6, 6)
    nib.save(nib.Nifti1Image(changed, np.eye(4)), case.images["t1c"].path)
    assert store.entry(case, ("t1c",), SCHEME, CONFIG) != first
    assert (first / "case.json").exists()


def test_the_entry_does_not_depend_on_where_the_files_lie(case: Case, tmp_path: Path) -> None:
    store = PreparedStore(tmp_path / "cache")
    (tmp_path / "moved").mkdir()
    shutil.copy(case.images["t1c"].path, tmp_path / "moved" / "image.nii.gz")
    moved = Case(case.id, "1", {"t1c": ImageFile(tmp_path / "moved" / "image.nii.gz")}, case.label, SCHEME)

    assert store.entry(moved, ("t1c",), SCHEME, CONFIG) == store.entry(case, ("t1c",), SCHEME, CONFIG)


def test_an_interrupted_write_leaves_no_entry(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = PreparedStore(tmp_path / "cache")

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("segkit.preparing.cache.np.save", full_disk)
        with pytest.raises(DataError, match="cannot keep the prepared case näme 1 here: No space left"):
            store.entry(case, ("t1c",), SCHEME, CONFIG)

    assert list((tmp_path / "cache").iterdir()) == []
    assert store.entry(case, ("t1c",), SCHEME, CONFIG).exists()


def test_stray_files_do_no_harm(case: Case, tmp_path: Path) -> None:
    (tmp_path / "cache" / ".partial-old").mkdir(parents=True)

    assert open_prepared(PreparedStore(tmp_path / "cache").entry(case, ("t1c",), SCHEME, CONFIG)).image.shape == (
        1,
        4,
        4,
        4,
    )


def test_a_damaged_entry_names_its_folder(case: Case, tmp_path: Path) -> None:
    store = PreparedStore(tmp_path / "cache")
    folder = store.entry(case, ("t1c",), SCHEME, CONFIG)
    image = folder / "image.npy"
    image.write_bytes(image.read_bytes()[:140])

    with pytest.raises(DataError, match=rf"{folder.name}: this prepared case is damaged.*Delete the folder"):
        open_prepared(store.entry(case, ("t1c",), SCHEME, CONFIG))


def test_a_case_without_reference_has_no_labels(case: Case, tmp_path: Path) -> None:
    prepared = open_prepared(PreparedStore(tmp_path / "cache").entry(case, ("t1c",), None, CONFIG))

    assert prepared.labels is None
    assert prepared.foreground == {}


def test_an_unreadable_file_is_named(case: Case, tmp_path: Path) -> None:
    case.images["t1c"].path.unlink()

    with pytest.raises(DataError, match=r"image\.nii\.gz: cannot be read: No such file"):
        PreparedStore(tmp_path / "cache").entry(case, ("t1c",), SCHEME, CONFIG)


def test_stored_cases_travel_as_paths(case: Case, tmp_path: Path) -> None:
    folder = PreparedStore(tmp_path / "cache").entry(case, ("t1c",), SCHEME, CONFIG)
    cases = StoredCases([folder] * 3)
    copied = pickle.loads(pickle.dumps(cases))

    assert len(pickle.dumps(cases)) < 1000
    assert len(copied[:2]) == 2
    assert [prepared.id for prepared in copied] == ["näme 1"] * 3
    with pytest.raises(IndexError):
        cases[3]


def test_foreground_voxels_are_a_seeded_sample_of_bounded_size() -> None:
    labels = np.zeros((30, 30, 30), np.uint8)
    labels[:, :, 10:] = 1  # 18000 voxels
    labels[0, 0, 0] = 9

    voxels = foreground_voxels(labels, seed=3)

    assert voxels[9].tolist() == [0]
    assert len(voxels[1]) == 10_000
    assert len(np.unique(voxels[1])) == 10_000
    assert (labels.ravel()[voxels[1]] == 1).all()
    assert np.array_equal(voxels[1], foreground_voxels(labels, seed=3)[1])
    assert not np.array_equal(voxels[1], foreground_voxels(labels, seed=4)[1])


def test_pictures_are_stored_too(tmp_path: Path) -> None:
    from PIL import Image

    array = np.zeros((8, 9, 3), np.uint8)
    array[2:5, 3:6, 1] = 200
    Image.fromarray(array).save(tmp_path / "picture.png")
    Image.fromarray((array[..., 1] > 0).astype(np.uint8)).save(tmp_path / "mask.png")
    files = {name: ImageFile(tmp_path / "picture.png", channel) for channel, name in enumerate(("red", "green"))}
    vessel = classes_scheme("vessels", {"vessel": 1})
    case = Case("p", "p", files, ImageFile(tmp_path / "mask.png"), vessel)

    config = PreprocessingConfig(normalisation="zscore", crop="none")
    prepared = open_prepared(PreparedStore(tmp_path / "cache").entry(case, ("red", "green"), vessel, config))

    assert prepared.image.shape == (2, 8, 9)
    assert prepared.preparation.source_grid.shape == (8, 9)
    assert len(prepared.foreground[1]) == 9


@pytest.mark.skipif(os.name == "nt", reason="Windows has no permission bits")
@pytest.mark.parametrize(("umask", "folder_mode", "file_mode"), [(0o022, 0o755, 0o644), (0o007, 0o770, 0o660)])
def test_entries_can_be_read_by_whom_the_umask_allows(
    case: Case, tmp_path: Path, umask: int, folder_mode: int, file_mode: int
) -> None:
    before = os.umask(umask)
    try:
        entry = PreparedStore(tmp_path / "cache").entry(case, ("t1c",), SCHEME, CONFIG)
    finally:
        os.umask(before)
    assert stat.S_IMODE(entry.stat().st_mode) == folder_mode
    assert {stat.S_IMODE(path.stat().st_mode) for path in entry.iterdir()} == {file_mode}
