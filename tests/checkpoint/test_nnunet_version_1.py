"""Result folders of nnU-Net 1 whose network is STU-Net, the released weights among them."""

from __future__ import annotations

import json
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import segkit
from segkit.checkpoint.run_folder import load_card
from segkit.checkpoint.transfer import load_weights
from segkit.errors import CheckpointError


def make_network(outputs: int) -> nn.Module:
    return segkit.build_model("stunet", in_channels=1, out_channels=outputs, width=2)


def released_plans(**changes: Any) -> OrderedDict[str, Any]:
    """The contents of the released `small_ep4k.model.pkl`, entries that nobody reads here left out."""
    plans = {
        "all_classes": list(range(1, 105)),
        "dataset_properties": {"intensityproperties": None},
        "modalities": {0: "nonCT"},
        "normalization_schemes": OrderedDict([(0, "nonCT")]),
        "num_classes": 104,
        "num_modalities": 1,
        "num_stages": 1,
        "plans_per_stage": {
            0: {
                "batch_size": 2,
                "current_spacing": np.array([1.5, 1.5, 1.5]),
                "do_dummy_2D_data_aug": np.bool_(False),
                "patch_size": np.array([128, 128, 128]),
                "pool_op_kernel_sizes": [[2, 2, 2], [2, 2, 2], [2, 2, 2], [2, 2, 2], [1, 1, 2]],
            }
        },
        "transpose_forward": [np.int64(0), 1, 2],
        "use_mask_for_norm": OrderedDict([(0, False)]),
        **changes,
    }
    init = ("", 0, "", "", False, 0, True, False, True)
    return OrderedDict(init=init, name="STUNetTrainer_small", plans=plans)


def write_released(folder: Path, name: str = "small_ep4k", **changes: Any) -> Path:
    """A released folder: Task101_TotalSegmentator/STUNetTrainer_small__nnUNetPlansv2.1/fold_0/small_ep4k.model."""
    result = folder / "Task101_TotalSegmentator" / "STUNetTrainer_small__nnUNetPlansv2.1"
    (result / "fold_0").mkdir(parents=True)
    network = make_network(outputs=1 + len(changes.get("all_classes", range(104))))
    document = {"epoch": 4000, "state_dict": network.state_dict(), "plot_stuff": ([np.float64(0.5)], [], [], [])}
    torch.save(document, result / "fold_0" / f"{name}.model")
    (result / "fold_0" / f"{name}.model.pkl").write_bytes(pickle.dumps(released_plans(**changes)))
    return result


def test_released_weights_of_version_1(tmp_path: Path) -> None:
    card = load_card(write_released(tmp_path))
    assert card.network.arguments["strides"] == (*((2, 2, 2),) * 4, (1, 1, 2))
    preprocessing = card.preprocessing
    assert (card.patch_size, card.divisor) == ((128, 128, 128), (16, 16, 32))
    assert (preprocessing.spacing_mm, preprocessing.orientation) == ((1.5, 1.5, 1.5), "KJI")
    assert (preprocessing.normalisation, card.segmentation.mirror_axes) == ("zscore", (0, 1, 2))
    assert card.training_data.identity == "nnU-Net: Task101_TotalSegmentator"
    names = {output.label: output.name for output in card.outputs}
    assert (len(names), names[0], names[40], names[104]) == (105, "background", "liver", "vertebrae_T9")


def test_other_results_of_version_1_number_their_labels(tmp_path: Path) -> None:
    result = write_released(tmp_path, "model_final_checkpoint", all_classes=[1, 2], modalities={0: "CT"})
    assert [output.name for output in load_card(result).outputs] == ["background", "label_1", "label_2"]
    (result / "dataset.json").write_text(
        json.dumps({"modality": {"0": "CT"}, "labels": {"background": 0, "left": 1, "right": 2}})
    )
    card = load_card(result)
    assert [output.name for output in card.outputs] == ["background", "left", "right"]
    assert card.modalities == ("CT",)
    with pytest.raises(CheckpointError, match="normalization_schemes is CT2, which segkit lacks"):
        load_card(write_released(tmp_path / "b", normalization_schemes={0: "CT2"}))


def test_ct_window_of_version_1(tmp_path: Path) -> None:
    measured = {"mean": 1.0, "sd": 2.0, "percentile_00_5": -3.0, "percentile_99_5": 4.0}
    changes = {"normalization_schemes": {0: "CT"}, "dataset_properties": {"intensityproperties": {0: measured}}}
    found = load_card(write_released(tmp_path, **changes)).preprocessing
    assert (found.normalisation, found.ct_window, found.ct_mean, found.ct_std) == ("ct-window", (-3.0, 4.0), 1.0, 2.0)


def test_plans_of_version_1_that_would_run_code(tmp_path: Path, burglar: Callable[[Path], object]) -> None:
    """Refused unrun; as JSON they are taken, and without them the weights still load by themselves."""
    result = write_released(tmp_path)
    pickled = result / "fold_0" / "small_ep4k.model.pkl"
    pickled.write_bytes(pickle.dumps({**released_plans(), "hook": burglar(tmp_path / "was_here")}))
    with pytest.raises(CheckpointError, match=r"carries code.*nothing in it was run.*plans as JSON"):
        load_card(result)
    assert not (tmp_path / "was_here").exists()
    text = json.dumps(released_plans(), default=lambda value: value.tolist())
    pickled.with_suffix(".json").write_text(text)
    assert load_card(result).patch_size == (128, 128, 128)
    pickled.unlink()
    assert load_card(result).patch_size == (128, 128, 128)
    pickled.with_suffix(".json").unlink()
    with pytest.raises(CheckpointError, match=r"holds no model\.json"):
        load_card(result)
    assert len(load_weights(make_network(outputs=105), result / "fold_0" / "small_ep4k.model").loaded) == 130
