"""Run folders with a network whose masks can be told by eye."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from stairs import MakeRun, Steps, StepsConfig

from segkit.checkpoint import ModelCard, save_model
from segkit.labels import SCHEMES, LabelScheme, outputs_of
from segkit.models.table import MODELS, ModelEntry


@pytest.fixture(autouse=True)
def _steps_family(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "steps", ModelEntry(StepsConfig, Steps, {"base": {}}, (2, 3), "none"))


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Writes a run folder: `make_run(name, modalities=..., scheme=..., bias=..., **changes of the card)`.

    Intensities 0 to 100 reach the network as they are. With nested regions, intensity 1 is painted as the first
    region, 2 as the second, 3 and more as the third.
    """

    def make(
        name: str = "run",
        modalities: tuple[str, ...] = ("t1c",),
        scheme: LabelScheme = SCHEMES["brats2017"],
        bias: float = 0.0,
        **changes: Any,
    ) -> Path:
        outputs = outputs_of(scheme)
        kind = "above" if scheme.has_regions else "nearest"
        dims = changes.get("dims", 3)
        network = Steps(StepsConfig(kind=kind), len(modalities), len(outputs), dims)
        network.bias.fill_(bias)
        document: dict[str, Any] = {
            "network": {
                "family": "steps",
                "in_channels": len(modalities),
                "out_channels": len(outputs),
                "arguments": {"kind": kind},
            },
            "modalities": modalities,
            "patch_size": (8,) * dims,
            "divisor": (1,) * dims,
            "normalisation": "ct-window",
            "ct_window": (0, 100),
            "ct_mean": 0,
            "ct_std": 1,
            "activation": "sigmoid" if scheme.has_regions else "softmax",
            "outputs": [{"name": o.name, "label": o.label, "members": o.members} for o in outputs],
            "label_scheme": scheme.to_json(),
            "training_data": {"identity": "made for the test", "cases": 1},
        }
        save_model(tmp_path / name, network.state_dict(), ModelCard.model_validate({**document, **changes}))
        return tmp_path / name

    return make
