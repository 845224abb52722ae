"""From a data folder to a run folder: find, split, plan, prepare, fit, score.

Functions appear in the order in which they run. A run folder keeps everything: `config.yaml` (every setting, with what
planning chose and why), `split.json`, `metrics.jsonl`, `model.safetensors` with `model.json`, `validation.json`,
`figures/`, and the resume state.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from segkit.checkpoint import LAST_NAME, ModelCard, NetworkCard, OutputCard, SchemeCard, TrainingData, load_model
from segkit.config.loading import annotated_yaml, build_config, read_yaml
from segkit.data.case import Case, Cohort
from segkit.data.dataset import PatchDataset
from segkit.data.layouts.table import find_cases
from segkit.data.preprocessing import load_case
from segkit.data.splits import train_and_validation
from segkit.data.store import PreparedStore, StoredCases
from segkit.errors import DataError, RequestError
from segkit.inference.predictor import Predictor
from segkit.labels import LabelScheme, outputs_of
from segkit.losses.compound import SegmentationLoss
from segkit.metrics.overlap import dice_by_region
from segkit.models.table import build_model
from segkit.planning import Plan, plan_training, take_fingerprint
from segkit.report.figures import overlay_figure
from segkit.runtime import available_cores, available_memory_gb, environment, peak_rss_mb, seed_everything
from segkit.training.config import TrainConfig
from segkit.training.loop import fit
from segkit.training.segmentation import ENDLESS, SegmentationTask

_log = logging.getLogger(__name__)
