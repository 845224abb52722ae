"""Fixtures that every room uses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


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


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    torch.manual_seed(0)
