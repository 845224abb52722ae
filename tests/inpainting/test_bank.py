"""A bank that grows case by case, and belongs to one model."""

from __future__ import annotations

from pathlib import Path

import pytest

from segkit.errors import RequestError
from segkit.inpainting.inpaint import BankWriter, copy_file
from segkit.preparing.lesion_bank import BankedCase, read_bank
from segkit.reading.case import Case

MODEL = {"sha256": "ab" * 32, "margin_mm": 5.0}


def test_cases_are_there_at_once_and_once(tmp_path: Path) -> None:
    bank = BankWriter(tmp_path, ("t1n", "t2f"), MODEL)
    assert not (tmp_path / "bank.json").exists()
    bank.add(Case("a-1", "a", {}))
    assert read_bank(tmp_path).cases == (BankedCase(case="a-1", patient="a"),)
    again = BankWriter(tmp_path, ("t1n", "t2f"), MODEL)
    again.add(Case("b-1", "b", {}))
    again.add(Case("a-1", "a", {}))
    document = read_bank(tmp_path)
    assert [(case.case, case.patient) for case in document.cases] == [("a-1", "a"), ("b-1", "b")]
    assert (document.version, document.modalities, document.model) == (1, ("t1n", "t2f"), MODEL)
    again.add(Case("a-1", "another", {}))
    assert [(case.case, case.patient) for case in read_bank(tmp_path).cases] == [("a-1", "another"), ("b-1", "b")]


@pytest.mark.parametrize(("modalities", "model"), [(("t1n",), MODEL), (("t1n", "t2f"), {**MODEL, "margin_mm": 3.0})])
def test_the_bank_of_another_model_is_refused(
    tmp_path: Path, modalities: tuple[str, ...], model: dict[str, object]
) -> None:
    BankWriter(tmp_path, ("t1n", "t2f"), MODEL).add(Case("a", "a", {}))
    with pytest.raises(RequestError, match="made by another model or with other holes"):
        BankWriter(tmp_path, modalities, model)


def test_copies_are_whole(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"voxels")
    copy_file(tmp_path / "source", tmp_path / "new folder" / "target.nii.gz")
    assert (tmp_path / "new folder" / "target.nii.gz").read_bytes() == b"voxels"
    with pytest.raises(Exception, match="missing"):
        copy_file(tmp_path / "missing", tmp_path / "other.nii.gz")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new folder", "source"]
