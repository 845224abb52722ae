"""Banks of lesion-free copies: which copies may be used, and what patches they give."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from segkit.config import build_config
from segkit.errors import ConfigError, DataError, RequestError
from segkit.preparing.augmentation import AugmentationConfig, training_transforms
from segkit.preparing.cache import PreparedStore, foreground_voxels
from segkit.preparing.lesion_bank import LesionBank, find_copies, image_path, lesion_path, prepare_copies, read_bank
from segkit.preparing.patch_sampling import PatchDataset
from segkit.preparing.preprocessing import Preparation, PreparedCase, PreprocessingConfig
from segkit.reading.case import Case, ImageFile
from segkit.reading.geometry import Reorientation
from segkit.reading.volume import Grid

SHAPE = (12, 12, 12)
PREPROCESSING = PreprocessingConfig(normalisation="zscore-nonzero", crop="nonzero")


def prepared_case(number: int, *, has_lesion: bool) -> PreparedCase:
    """A brain of `number`, if asked for with a lesion brighter by 100."""
    image, labels = np.full((1, *SHAPE), number, np.float32), np.zeros(SHAPE, np.uint8)
    if has_lesion:
        image[0, 5:7, 5:7, 5:7], labels[5:7, 5:7, 5:7] = number + 100, 1
    turn = Reorientation((0, 1, 2), (False,) * 3, SHAPE)
    preparation = Preparation(Grid(SHAPE, np.eye(4)), turn, ((0, 0, 0), SHAPE), SHAPE, (1.0,) * 3)
    return PreparedCase(str(number), image, labels, preparation, foreground_voxels(labels, 0))


CASES = [prepared_case(number, has_lesion=True) for number in (1, 2, 3)]
COPIES = [replace(prepared_case(number, has_lesion=False), labels=None) for number in (1, 2)]


def dataset(bank: LesionBank | None, cases: Sequence[PreparedCase] = CASES, **settings: object) -> PatchDataset:
    augmentation = AugmentationConfig(**{"enabled": False, **settings})
    transforms = training_transforms(augmentation, (8, 8, 8), foreground_fraction=1.0, bank=bank)
    return PatchDataset(cases, transforms, seed=4, length=200)


def bank_of(lesion_share: float, lesion_free_share: float = 0.0) -> LesionBank:
    return LesionBank(COPIES, lesion_share=lesion_share, lesion_free_share=lesion_free_share)


def test_a_lesion_in_another_brain() -> None:
    """Case i shows its lesion, 100 brighter than what is around it, in the copy of a case that is not its own."""
    data = dataset(bank_of(1.0))
    for index in range(30):
        item, own = data[index], int(data.case_number(index)) + 1
        brain = set(item["image"][0][item["label"] == 0].tolist())
        assert len(brain) == 1
        assert brain <= {1.0, 2.0} - {float(own)}
        assert 1 <= np.count_nonzero(item["label"]) <= 8
        assert (item["image"][0][item["label"] == 1] == brain.pop() + 100).all()


def test_a_copy_alone_has_nothing_in_it() -> None:
    data = dataset(bank_of(0.0, 1.0))
    items = [data[index] for index in range(20)]

    assert {float(item["image"].min()) for item in items} == {1.0, 2.0}
    assert all(item["image"].max() == item["image"].min() and not item["label"].any() for item in items)


def test_shares_are_kept_and_other_patches_are_what_they_are_without_shares() -> None:
    """Of 200 patches 60 +- 6.5 with a lesion moved and 20 +- 4.2 with none, three deviations allowed."""
    with_bank, without = dataset(bank_of(0.3, 0.1)), dataset(bank_of(0.0))
    moved = empty = 0
    for index in range(200):
        item, plain = with_bank[index], without[index]
        if torch.equal(item["image"], plain["image"]):
            assert torch.equal(item["label"], plain["label"])
        elif item["label"].any():
            moved += 1
        else:
            empty += 1
    assert 41 <= moved <= 79
    assert 8 <= empty <= 32


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # on a machine of one core
def test_items_depend_on_seed_and_index_only() -> None:
    settings = {"enabled": True, "mirror_axes": (0, 1), "rotation_probability": 0.5}
    data = dataset(bank_of(0.5, 0.2), **settings)

    by_workers = DataLoader(data, batch_size=1, num_workers=2, sampler=range(12))
    for index, item in reversed(list(enumerate(by_workers))):
        alone = dataset(bank_of(0.5, 0.2), **settings)[index]
        assert torch.equal(item["image"][0], alone["image"])
        assert torch.equal(item["label"][0], alone["label"])


def test_a_case_that_has_no_lesion_or_no_other_brain_stays() -> None:
    healthy, own = prepared_case(3, has_lesion=False), CASES[0]
    generator = np.random.default_rng(0)

    assert bank_of(1.0).exchange(healthy, generator) == (healthy, None)
    only = LesionBank(COPIES[:1], lesion_share=1.0, lesion_free_share=0.0)
    assert only.exchange(own, generator)[0] is own


def test_shares_above_all_are_refused() -> None:
    with pytest.raises(ConfigError, match="lesion_share and lesion_free_share are more than 1 together"):
        build_config(AugmentationConfig, [("test", {"lesion_share": 0.95})])


def write_bank(folder: Path, cases: Sequence[tuple[str, str]], modalities: Sequence[str] = ("t1n", "t2f")) -> None:
    """Copies of 3s and one 4; made up is the half of the volume with the lower first index."""
    for case_id, _ in cases:
        (folder / case_id).mkdir(parents=True)
        image = np.full((4, 4, 4), 3, np.float32)
        image[0, 0, 0] = 4
        for modality in modalities:
            nib.save(nib.Nifti1Image(image, np.eye(4)), image_path(folder, case_id, modality))
        made_up = np.zeros((4, 4, 4), np.uint8)
        made_up[:2] = 1
        nib.save(nib.Nifti1Image(made_up, np.eye(4)), lesion_path(folder, case_id))
    entries = [{"case": case_id, "patient": patient} for case_id, patient in cases]
    document = {"version": 1, "modalities": list(modalities), "cases": entries, "model": {"sha256": "ab"}}
    (folder / "bank.json").write_text(json.dumps(document))


def labelled_case(folder: Path, case_id: str, patient: str, voxel: tuple[int, int, int]) -> Case:
    labels = np.zeros((4, 4, 4), np.uint8)
    labels[voxel] = 1
    path = folder / f"{case_id}_seg.nii.gz"
    nib.save(nib.Nifti1Image(labels, np.eye(4)), path)
    return Case(case_id, patient, {}, ImageFile(path))


def test_copies_of_other_cases_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """b validates; c is a case of another patient who has the same name here."""
    write_bank(tmp_path, [("a", "1"), ("b", "2"), ("c", "3")])
    training = [Case("a", "1", {}), Case("c", "9", {})]

    with caplog.at_level(logging.INFO, logger="segkit"):
        copies = find_copies(tmp_path, training, ("t2f",))

    assert [copy.id for copy in copies] == ["a"]
    assert copies[0].images == {"t2f": ImageFile(tmp_path / "a" / "a_t2f.nii.gz")}
    assert "2 of 3 copies of the bank are not of training cases and are left out: b, c" in caplog.text
    assert read_bank(tmp_path).model == {"sha256": "ab"}


def test_a_bank_of_other_cases_only_is_refused(tmp_path: Path) -> None:
    write_bank(tmp_path, [("b", "2")])
    with pytest.raises(RequestError, match="none of its 1 copies is of a training case; expected copies"):
        find_copies(tmp_path, [Case("a", "1", {})], ("t1n",))


def test_a_bank_without_a_modality_is_refused(tmp_path: Path) -> None:
    write_bank(tmp_path, [("a", "1")])
    with pytest.raises(RequestError, match="no copies of t1c; it has t1n, t2f; expected copies of t1n, t1c"):
        find_copies(tmp_path, [Case("a", "1", {})], ("t1n", "t1c"))


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, r"contains no readable bank\.json"), ("{}", r"bank\.json: is damaged.*modalities")],
)
def test_a_folder_that_is_no_bank_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "bank.json").write_text(text)
    with pytest.raises(RequestError, match=rf"(?s){message}"):
        read_bank(tmp_path)


def test_copies_are_prepared_as_cases_are(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The lesion of b lies in the half that was not filled in; of c a file is missing."""
    write_bank(tmp_path / "bank", [("a", "1"), ("b", "2"), ("c", "3")])
    cases = {
        "a": labelled_case(tmp_path, "a", "1", (1, 2, 3)),
        "b": labelled_case(tmp_path, "b", "2", (2, 2, 3)),
        "c": labelled_case(tmp_path, "c", "3", (0, 0, 0)),
    }
    image_path(tmp_path / "bank", "c", "t2f").unlink()
    copies = find_copies(tmp_path / "bank", list(cases.values()), ("t1n", "t2f"))
    store = PreparedStore(tmp_path / "cache")

    usable = prepare_copies(copies, cases, store, ("t1n", "t2f"), PREPROCESSING)

    assert [(copy.id, copy.image.shape, copy.labels) for copy in usable] == [("a", (2, 4, 4, 4), None)]
    assert "1 labelled voxels of " in caplog.text
    assert "c_t2f.nii.gz: cannot be read" in caplog.text
    with pytest.raises(DataError, match=r"no copy of the bank can be used.*were not filled in.*--lesions"):
        prepare_copies(copies[1:2], cases, store, ("t1n", "t2f"), PREPROCESSING)
