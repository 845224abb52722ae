"""segkit: train, run and score medical image segmentation.

The public names below are loaded on first use, so `import segkit` is instant; nothing inside the package imports them.
Libraries that report to their makers are kept from it before any of them is loaded.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from segkit.runtime import refuse_telemetry

if TYPE_CHECKING:
    from segkit.checkpoint.model import load_model as load_model
    from segkit.checkpoint.transfer import LoadReport as LoadReport
    from segkit.checkpoint.transfer import load_weights as load_weights
    from segkit.inference.predictor import Predictor as Predictor
    from segkit.inference.scans import Prediction as Prediction
    from segkit.models.table import ModelInfo as ModelInfo
    from segkit.models.table import build_model as build_model
    from segkit.models.table import list_models as list_models

_PUBLIC = {
    "build_model": "segkit.models.table",
    "list_models": "segkit.models.table",
    "ModelInfo": "segkit.models.table",
    "load_model": "segkit.checkpoint.model",
    "load_weights": "segkit.checkpoint.transfer",
    "LoadReport": "segkit.checkpoint.transfer",
    "Predictor": "segkit.inference.predictor",
    "Prediction": "segkit.inference.scans",
}

__all__ = [
    "LoadReport",
    "ModelInfo",
    "Prediction",
    "Predictor",
    "build_model",
    "list_models",
    "load_model",
    "load_weights",
]


refuse_telemetry()


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'segkit' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return __all__
