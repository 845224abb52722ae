"""The table of well-known data sets: each of the zoo is recognised as what it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from segkit.reading.layouts.data_sets import DATA_SETS, data_set_of
from segkit.reading.layouts.table import find_cases
from tests.zoo import layouts as zoo

NAMED: dict[str, Callable[[Path], object]] = {
    "LiTS": zoo.lits,
    "BTCV": zoo.btcv,
    "KiTS": zoo.kits,
    "AMOS": zoo.amos,
    "FLARE": zoo.flare,
    "ACDC": zoo.acdc,
    "M&Ms-2": zoo.mnms2,
    "PROMISE12": zoo.promise12,
    "ISLES 2022": zoo.isles22,
    "WMH 2017": zoo.wmh,
    "UCSF-PDGM": zoo.ucsf_pdgm,
    "UPENN-GBM": zoo.upenn,
    "RHUH-GBM": zoo.rhuh,
    "MU-Glioma-Post": zoo.mu_glioma_post,
    "PI-CAI": zoo.picai,
    "TotalSegmentator": zoo.totalsegmentator,
    "ISIC 2018": zoo.isic,
    "Kvasir-SEG": zoo.kvasir,
    "DRIVE": zoo.drive,
    "STARE": zoo.stare,
    "HRF": zoo.hrf,
}


def test_the_table_is_the_list_of_the_tests() -> None:
    assert [data_set.name for data_set in DATA_SETS] == list(NAMED)


@pytest.mark.parametrize("name", NAMED)
def test_a_data_set_is_recognised_and_pairs_without_options(name: str, tmp_path: Path) -> None:
    NAMED[name](tmp_path)
    cohort = find_cases(tmp_path)
    found = data_set_of(cohort)
    assert found is not None
    assert found.name == name
    assert all(case.label is not None for case in cohort.cases)


def test_other_names_are_of_no_data_set(tmp_path: Path) -> None:
    zoo.numbered_cases(tmp_path)
    assert data_set_of(find_cases(tmp_path)) is None


def test_the_document_has_the_table() -> None:
    text = (Path(__file__).resolve().parents[3] / "docs" / "layouts.md").read_text(encoding="utf-8")
    for one in DATA_SETS:
        names = "seen" if one.seen else "from its description"
        assert f"| {one.name} | `{one.image}` | `{one.label}` | {one.source} | {names} |" in text
