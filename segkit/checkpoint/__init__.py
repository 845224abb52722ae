"""Weights and the card that says what they are, the resume state, and weights from elsewhere.

A run folder holds `model.safetensors` (best weights), `model.json` (the card) and `last.ckpt` with `previous.ckpt`
(the exact resume state). Nothing is ever executed from a weight file.
"""

from __future__ import annotations

from segkit.checkpoint.adapt import InputAdapt
from segkit.checkpoint.card import ModelCard, NetworkCard, OutputCard, SchemeCard, TrainingData
from segkit.checkpoint.run_folder import (
    CARD_NAME,
    WEIGHTS_NAME,
    build_network,
    load_card,
    load_model,
    model_folders,
    save_model,
)
from segkit.checkpoint.source import WeightSource, read_source
from segkit.checkpoint.state import LAST_NAME, PREVIOUS_NAME, load_state, save_state
from segkit.checkpoint.tensors import file_sha256, load_weights_file, save_weights
from segkit.checkpoint.transfer import HeadRule, LoadReport, TransferOptions, load_weights, plan_transfer, transfer

__all__ = [
    "CARD_NAME",
    "LAST_NAME",
    "PREVIOUS_NAME",
    "WEIGHTS_NAME",
    "HeadRule",
    "InputAdapt",
    "LoadReport",
    "ModelCard",
    "NetworkCard",
    "OutputCard",
    "SchemeCard",
    "TrainingData",
    "TransferOptions",
    "WeightSource",
    "build_network",
    "file_sha256",
    "load_card",
    "load_model",
    "load_state",
    "load_weights",
    "load_weights_file",
    "model_folders",
    "plan_transfer",
    "read_source",
    "save_model",
    "save_state",
    "save_weights",
    "transfer",
]
