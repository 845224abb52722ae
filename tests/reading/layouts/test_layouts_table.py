from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from segkit.errors import DataError, RequestError
from segkit.labels import SCHEMES
from segkit.reading.layouts.layout import Listing
from segkit.reading.layouts.table import LAYOUTS, find_cases

Write = Callable[..., Path]


def test_table_is_keyed_by_name_and_scores_nothing_low() -> None:
    assert len(LAYOUTS) == 22
    for name, layout in LAYOUTS.items():
        assert layout.name == name
        assert layout.recognise(Listing(Path("/nowhere"))) < 0.1


def test_nothing_recognised_names_what_is_there_and_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"holds 1 \.txt; expected one of these layouts, the nearest ones: .*;.*;"):
        find_cases(tmp_path)


def test_references_alone_are_no_cases(volume: Write, tmp_path: Path) -> None:
    volume("a_seg.nii.gz")
    with pytest.raises(DataError, match="no images that make a case"):
        find_cases(tmp_path)


def test_unknown_names_are_refused_with_a_guess(volume: Write, tmp_path: Path) -> None:
    volume("a.nii.gz")
    with pytest.raises(RequestError, match="Did you mean 'brats2021'"):
        find_cases(tmp_path, layout="brats201")
    with pytest.raises(RequestError, match="Did you mean 'msd-brats'"):
        find_cases(tmp_path, label_scheme="msd-brat")


def test_layout_can_be_forced(volume: Write, tmp_path: Path) -> None:
    volume("BraTS2021_00001/BraTS2021_00001_t1.nii.gz")
    assert find_cases(tmp_path, layout="folder").layout == "folder"
    with pytest.raises(DataError, match="no images that make a case of layout bids"):
        find_cases(tmp_path, layout="bids")


def test_required_labels(volume: Write, tmp_path: Path) -> None:
    volume("a_t1.nii.gz")
    with pytest.raises(DataError, match="none of the 1 cases has a reference mask"):
        find_cases(tmp_path, require_labels=True)
    volume("b_t1.nii.gz")
    volume("b_seg.nii.gz", (1,))
    cohort = find_cases(tmp_path, require_labels=True)
    assert [case.id for case in cohort.cases] == ["b"]
    assert "cases without a reference mask: a_t1.nii.gz" in cohort.problems[-1].found


def test_results_inside_the_data_can_be_excluded(volume: Write, tmp_path: Path) -> None:
    for name in ("data/a_t1", "data/b_t1", "results/c_t1", "results/d_t1"):
        volume(f"{name}.nii.gz")
    assert [case.id for case in find_cases(tmp_path).cases] == ["a", "b", "c", "d"]
    assert [case.id for case in find_cases(tmp_path, exclude=tmp_path / "results").cases] == ["a", "b"]


def test_root_may_be_relative(volume: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    volume("BraTS2021_00001/BraTS2021_00001_t1.nii.gz")
    monkeypatch.chdir(tmp_path / "BraTS2021_00001")
    cohort = find_cases(Path())
    assert [(cohort.layout, case.id) for case in cohort.cases] == [("brats2021", "BraTS2021_00001")]


def test_the_documentation_lists_every_layout_and_scheme() -> None:
    text = (Path(__file__).resolve().parents[3] / "docs" / "layouts.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `([\w-]+)` \|", text, re.MULTILINE)
    assert listed == [*LAYOUTS, *SCHEMES]
