"""Weights and the card that says what they are, the resume state, and weights from elsewhere.

A run folder holds `model.safetensors` (best weights), `model.json` (the card) and `last.ckpt` with `previous.ckpt`
(the exact resume state). Nothing is ever executed from a weight file. The names below are loaded on first use: cards
are read without torch, weights are not.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from segkit.checkpoint.adapt import InputAdapt as InputAdapt
    from segkit.checkpoint.card import ModelCard as ModelCard
    from segkit.checkpoint.card import NetworkCard as NetworkCard
    from segkit.checkpoint.card import OutputCard as OutputCard
    from segkit.checkpoint.card import SchemeCard as SchemeCard
    from segkit.checkpoint.card import TrainingData as TrainingData
    from segkit.checkpoint.digest import file_sha256 as file_sha256
    from segkit.checkpoint.model import build_network as build_network
    from segkit.checkpoint.model import load_model as load_model
    from segkit.checkpoint.model import save_model as save_model
    from segkit.checkpoint.run_folder import CARD_NAME as CARD_NAME
    from segkit.checkpoint.run_folder import DAMAGED_NAME as DAMAGED_NAME
    from segkit.checkpoint.run_folder import LAST_NAME as LAST_NAME
    from segkit.checkpoint.run_folder import PREVIOUS_NAME as PREVIOUS_NAME
    from segkit.checkpoint.run_folder import WEIGHTS_NAME as WEIGHTS_NAME
    from segkit.checkpoint.run_folder import load_card as load_card
    from segkit.checkpoint.run_folder import model_folders as model_folders
    from segkit.checkpoint.source import WeightSource as WeightSource
    from segkit.checkpoint.source import read_source as read_source
    from segkit.checkpoint.state import load_state as load_state
    from segkit.checkpoint.state import save_state as save_state
    from segkit.checkpoint.tensors import load_weights_file as load_weights_file
    from segkit.checkpoint.tensors import save_weights as save_weights
    from segkit.checkpoint.transfer import HeadRule as HeadRule
    from segkit.checkpoint.transfer import LoadReport as LoadReport
    from segkit.checkpoint.transfer import TransferOptions as TransferOptions
    from segkit.checkpoint.transfer import load_weights as load_weights
    from segkit.checkpoint.transfer import plan_transfer as plan_transfer

_PUBLIC = {
    "adapt": ("InputAdapt",),
    "card": ("ModelCard", "NetworkCard", "OutputCard", "SchemeCard", "TrainingData"),
    "model": ("build_network", "load_model", "save_model"),
    "digest": ("file_sha256",),
    "run_folder": (
        *("CARD_NAME", "DAMAGED_NAME", "LAST_NAME", "PREVIOUS_NAME", "WEIGHTS_NAME"),
        *("load_card", "model_folders"),
    ),
    "source": ("WeightSource", "read_source"),
    "state": ("load_state", "save_state"),
    "tensors": ("load_weights_file", "save_weights"),
    "transfer": ("HeadRule", "LoadReport", "TransferOptions", "load_weights", "plan_transfer"),
}
_FILE_OF = {name: file for file, names in _PUBLIC.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _FILE_OF:
        raise AttributeError(f"module 'segkit.checkpoint' has no attribute {name!r}")
    return getattr(importlib.import_module(f"segkit.checkpoint.{_FILE_OF[name]}"), name)
