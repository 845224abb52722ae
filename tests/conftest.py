"""Fixtures that every room uses."""

from __future__ import annotations

import json
import logging
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest_plugins = ["tests.step_models"]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data beside the checkout; tests that need it skip where it is not there."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("real data (../shared/data) is not on this machine")
    return folder


@pytest.fixture(scope="session")
def shared_specs() -> Path:
    """Golden values beside the checkout; tests that need them skip where they are not there."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "specs"
    if not folder.is_dir():
        pytest.skip("golden values (../shared/specs) are not on this machine")
    return folder


@pytest.fixture(scope="session")
def hostile_names() -> list[str]:
    """Names that files and label lists may hold, and that no page, table, spreadsheet or terminal may obey."""
    text = (Path(__file__).resolve().parent / "fuzz" / "hostile_names.json").read_text(encoding="utf-8")
    names: list[str] = json.loads(text)
    return names


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
