"""Real cases for an export: where they come from and what is cut out of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from segkit.checkpoint.model import load_model
from segkit.checkpoint.run_folder import load_card
from segkit.errors import RequestError
from segkit.exporting.cases import _evenly, _window, named_cases, validation_cases
from segkit.inference.backends import TorchBackend
from segkit.inference.predictor import Predictor


def test_the_first_window_is_the_middle_with_zeros_around_what_is_small() -> None:
    image = np.arange(12, dtype=np.float32).reshape(1, 6, 2)
    window = _window(image, (2, 4), None)
    np.testing.assert_array_equal(window, [[[[0, 4, 5, 0], [0, 6, 7, 0]]]])
    other = _window(image, (2, 2), np.random.default_rng(0))
    assert other.shape == (1, 1, 2, 2)
    assert other[0, 0, 0, 0] % 2 == 0


def test_validation_cases_of_a_run(run: Path, phantoms: Path) -> None:
    cases = validation_cases(run)
    assert cases is not None
    assert [case.id for case in cases.cohort.cases] == json.loads((run / "split.json").read_text())["validation"]
    card = load_card(run)
    predictor = Predictor(TorchBackend(load_model(run)), card)
    windows = cases.windows(predictor, 3)
    assert [window.shape for window in windows] == [(1, 4, *card.patch_size)] * 3
    (same, other) = cases.mean_dice([predictor, predictor])
    assert 0 <= same == other <= 1


def test_none_where_the_data_cannot_be_found(run: Path, tmp_path: Path) -> None:
    assert validation_cases(tmp_path) is None
    for name in ("split.json", "config.yaml"):
        shutil.copy(run / name, tmp_path / name)
    assert validation_cases(tmp_path) is not None
    split = json.loads((tmp_path / "split.json").read_text())
    (tmp_path / "split.json").write_text(json.dumps({**split, "data": ["/nowhere"]}))
    assert validation_cases(tmp_path) is None


def test_named_cases(phantoms: Path, tmp_path: Path) -> None:
    first, *_ = named_cases(phantoms).cohort.cases
    assert [case.id for case in named_cases(phantoms, [first.id]).cohort.cases] == [first.id]
    with pytest.raises(RequestError, match="do not exist: 'nobody'"):
        named_cases(phantoms, ["nobody"])
    with pytest.raises(RequestError, match="nothing"):
        named_cases(tmp_path / "nothing")


def test_many_cases_are_thinned_evenly(phantoms: Path) -> None:
    cases = named_cases(phantoms).cohort.cases
    assert _evenly(cases, 3) == cases
    assert _evenly(cases, 2) == (cases[0], cases[2])
