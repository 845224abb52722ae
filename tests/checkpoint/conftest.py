"""A tiny network and its card, and a pickle that would run code."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from segkit.checkpoint.card import ModelCard
from segkit.config import Config
from segkit.labels import SCHEMES, outputs_of
from segkit.models.table import MODELS, ModelEntry


class TinyConfig(Config):
    width: int = 2


class TiedNetwork(nn.Module):
    """Two layers that share one weight, and a weight that is a transposed view."""

    def __init__(self, in_channels: int, out_channels: int, width: int) -> None:
        super().__init__()
        self.encoder = nn.Linear(in_channels, width, bias=False)
        self.twin = nn.Linear(in_channels, width, bias=False)
        self.twin.weight = self.encoder.weight
        self.head = nn.Parameter(torch.randn(width, out_channels).T)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = (self.encoder(x) + self.twin(x)) @ self.head.T
        return logits


@pytest.fixture(autouse=True)
def _tiny_family(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(config: TinyConfig, in_channels: int, out_channels: int, dims: int) -> nn.Module:
        return TiedNetwork(in_channels, out_channels, config.width)

    entry = ModelEntry(TinyConfig, build, {"base": {}, "wide": {"width": 5}}, (2, 3), "none")
    monkeypatch.setitem(MODELS, "tiny", entry)


@pytest.fixture
def tied_network() -> type[TiedNetwork]:
    """Builds (in_channels, out_channels, width)."""
    return TiedNetwork


@pytest.fixture
def make_card() -> Callable[..., ModelCard]:
    """The card of the tiny family's wide size, 4 channels in and 3 out, with changes."""

    def make(**changes: Any) -> ModelCard:
        scheme = SCHEMES["brats2017"]
        document: dict[str, Any] = {
            "task": "segmentation",
            "network": {"family": "tiny", "size": "wide", "in_channels": 4, "out_channels": 3},
            "modalities": ["t1n", "t1c", "t2w", "t2f"],
            "patch_size": [16, 16, 16],
            "divisor": [8, 8, 8],
            "activation": "sigmoid",
            "outputs": [{"name": o.name, "label": o.label, "members": o.members} for o in outputs_of(scheme)],
            "label_scheme": scheme.to_json(),
            "training_data": {"identity": "phantom", "licence": "CC0", "cases": 3, "fold": 1},
        }
        return ModelCard.model_validate({**document, **changes})

    return make


class Burglar:
    """Pickles to a call that makes a folder."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.trace),)


@pytest.fixture
def burglar() -> type[Burglar]:
    """Takes the folder that unpickling it would make."""
    return Burglar
