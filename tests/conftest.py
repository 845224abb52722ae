"""Fixtures that every room uses."""

from __future__ import annotations

import json
import logging
import os
import signal
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from segkit.phantoms.layouts import write_phantoms

pytest_plugins = ["tests.step_models"]


@pytest.fixture(autouse=True, scope="session")
def _float32_on_every_processor() -> Iterator[None]:
    """Trainings of the tests, and of their fixtures, have the same results on processors with and without bfloat16."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cpu, "get_capabilities", dict)
        yield


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Operations of PyTorch share two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


DATA = Path(__file__).resolve().parent / "data"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Small real scans and pictures that may be redistributed: see tests/data/real/README.md."""
    return DATA / "real"


@pytest.fixture(scope="session")
def golden() -> dict[str, Any]:
    """Outputs of the released code of other projects: see tests/data/README.md."""
    document: dict[str, Any] = json.loads((DATA / "golden.json").read_text(encoding="utf-8"))
    return document


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data that may not be redistributed, beside the checkout.

    Where it is absent, a test that needs it is skipped, or fails if SEGKIT_REQUIRE_REAL_DATA is 1.
    """
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        reason = "real data that may not be redistributed (../shared/data) is not on this machine"
        if os.environ.get("SEGKIT_REQUIRE_REAL_DATA") == "1":
            pytest.fail(f"{reason}, and SEGKIT_REQUIRE_REAL_DATA is 1", pytrace=False)
        pytest.skip(reason)
    return folder


@pytest.fixture(scope="session")
def hostile_names() -> list[str]:
    """Names that files and label lists may hold, and that no page, table, spreadsheet or terminal may obey."""
    text = (Path(__file__).resolve().parent / "fuzz" / "hostile_names.json").read_text(encoding="utf-8")
    names: list[str] = json.loads(text)
    return names


@pytest.fixture(scope="session")
def phantom_data(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Folder of the first so many phantoms of 24 voxels, in the layout of BraTS 2023: to be read, not changed."""

    @cache
    def write(cases: int) -> Path:
        folder = tmp_path_factory.mktemp("my phantoms") / "data"
        write_phantoms(folder, range(1, cases + 1), convention="brats2023", size=24)
        return folder

    return write


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs that tests prepare stay out of the user's cache."""
    monkeypatch.setenv("SEGKIT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _log_level() -> None:
    """Verbs called in this process set how much the log tells; every test starts as the first did."""
    logging.getLogger("segkit").setLevel(logging.NOTSET)


@pytest.fixture
def signals_of_a_new_process() -> Iterator[None]:
    """SIGTERM and SIGINT as they are at first: other tests, or the shell that started these, may have changed them."""
    fresh = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in fresh.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
