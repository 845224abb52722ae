"""Result folders of nnU-Net."""

from __future__ import annotations

import shutil
from pathlib import Path

from fuzzing import seeds
from fuzzing.mutators.documents import mutated_json
from fuzzing.mutators.tensors import mutated_torch_zip
from fuzzing.parser import Files, Parser
from fuzzing.parsers.weights import PICKLE_CHECKS


def _result(folder: Path, _: Path) -> None:
    from segkit.checkpoint.model import load_model
    from segkit.checkpoint.run_folder import load_card

    result = folder / "result"
    (result / "fold_0").mkdir(parents=True)
    for name in ("plans.json", "dataset.json"):
        (folder / name).replace(result / name)
    shutil.copyfile(folder / "checkpoint_final.pth", result / "fold_0" / "checkpoint_final.pth")
    load_card(result)
    load_model(result)


def _results() -> list[Files]:
    import torch

    import segkit

    strides = ((1, 2, 2), (2, 2, 2), (2, 2, 2), (1, 1, 1), (1, 1, 1))
    network = segkit.build_model("stunet", in_channels=1, out_channels=3, width=1, depth=1, strides=strides)
    document = {
        "network_weights": network.state_dict(),
        "init_args": {"configuration": "3d_bigger", "plans": {}, "dataset_json": {}},
        "trainer_name": "STUNetTrainer_small",
        "inference_allowed_mirroring_axes": (0, 1, 2),
    }
    assert isinstance(network, torch.nn.Module)
    labels = {"background": 0, "left": 1, "right": 2}
    dataset = {"channel_names": {"0": "FLAIR"}, "labels": labels, "numTraining": 5, "licence": "CC0"}
    files = {
        "plans.json": seeds.as_json(seeds.PLANS_JSON),
        "dataset.json": seeds.as_json(dataset),
        "checkpoint_final.pth": seeds.torch_file(document),
    }
    return [{first: files[first], **files} for first in files]


PARSERS = (
    Parser(
        "nnunet-result",
        _results,
        {".json": mutated_json, "": mutated_torch_zip},
        _result,
        first_check=f"is not readable JSON|{PICKLE_CHECKS}",
    ),
)
