"""What tests of several rooms use: the command line called in this process, scans on disk, run folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from numpy.typing import ArrayLike, NDArray
from torch import nn

import segkit
import segkit.cli
from segkit.checkpoint.card import ModelCard
from segkit.checkpoint.model import save_model
from segkit.labels import SCHEMES, LabelScheme, outputs_of

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
MODALITIES = ("t1n", "t1c", "t2w", "t2f")


def run_segkit(*arguments: object) -> int:
    """Exit code of `segkit ARGUMENTS`, called in this process."""
    with pytest.raises(SystemExit) as leave:
        segkit.cli.main([str(argument) for argument in arguments])
    return int(leave.value.code or 0)


def save_nifti(path: Path, array: NDArray[Any], affine: ArrayLike = LPS) -> Path:
    """Write a volume with the voxel type of the array, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.Nifti1Image(array, affine).to_filename(path)
    return path


def read_voxels(path: Path) -> NDArray[Any]:
    return np.asarray(nib.load(path).dataobj)


def write_segmentation_run(
    folder: Path,
    modalities: tuple[str, ...] = MODALITIES,
    scheme: LabelScheme = SCHEMES["brats2023"],
    *,
    seed: int = 0,
    widths: tuple[int, ...] | None = None,
    change: Callable[[nn.Module], object] | None = None,
    **card: Any,
) -> Path:
    """A run folder of the tiny RevMBUNet with random weights, which `change` may alter; `card` overrides its card."""
    torch.manual_seed(seed)
    arguments: dict[str, Any] = {} if widths is None else {"widths": widths}
    channels = {"in_channels": len(modalities), "out_channels": len(outputs_of(scheme))}
    network = segkit.build_model("revmbunet", size="tiny", **channels, **arguments)
    if change is not None:
        change(network)
    document: dict[str, Any] = {
        "network": {"family": "revmbunet", "size": "tiny", **channels, "arguments": arguments},
        "modalities": modalities,
        "patch_size": (16, 16, 16),
        "divisor": network.divisor,
        "activation": "sigmoid",
        "outputs": [{"name": o.name, "label": o.label, "members": o.members} for o in outputs_of(scheme)],
        "label_scheme": scheme.to_json(),
        "training_data": {"identity": "none", "cases": 0},
    }
    save_model(folder, network.state_dict(), ModelCard.model_validate(document | card))
    return folder


def write_inpainting_run(
    folder: Path, modalities: tuple[str, ...] = ("t1n",), context: str = "mirror", family: str = "inpainter"
) -> Path:
    """A run folder of a small inpainting network with random weights, none of them 0."""
    torch.manual_seed(0)
    count = len(modalities)
    sizes: dict[str, dict[str, Any]] = {
        "inpainter": {"widths": (4, 8), "context": context},
        "generator": {"width": 4, "blocks": 1},
    }
    network = segkit.build_model(family, in_channels=count, out_channels=count, **sizes[family])
    for parameter in network.parameters():
        if not parameter.any():  # scales, shifts and the head, which begin at 0
            nn.init.normal_(parameter, std=0.2)
    if family == "generator":  # its output is near the intensities of tissue
        nn.init.constant_(dict(network.named_parameters())[f"{network.head_prefixes[0]}bias"], 4.0)
    document: dict[str, Any] = {
        "task": "inpainting",
        "network": {"family": family, "in_channels": count, "out_channels": count, "arguments": sizes[family]},
        "modalities": modalities,
        "patch_size": (16, 16, 16),
        "divisor": network.divisor,
        "context": context,
        "training_data": {"identity": "none", "cases": 0},
    }
    save_model(folder, network.state_dict(), ModelCard.model_validate(document))
    return folder
