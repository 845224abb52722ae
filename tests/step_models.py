"""Run folders with a network whose masks can be told by eye, and scans to give it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
import pytest
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from segkit.checkpoint.card import ModelCard
from segkit.checkpoint.model import save_model
from segkit.config import Config
from segkit.labels import SCHEMES, LabelScheme, outputs_of
from segkit.models.table import MODELS, ModelEntry
from tests.helpers import LPS

MakeRun = Callable[..., Path]


class StepsConfig(Config):
    kind: Literal["above", "nearest"] = "above"


class Steps(nn.Module):
    """Logit k of the sum s of all channels: "above" 10 (s - k - 0.5); "nearest" -|s - k|. `bias` is added."""

    def __init__(self, config: StepsConfig, in_channels: int, out_channels: int, dims: int) -> None:
        super().__init__()
        self.kind = config.kind
        self.bias: Tensor
        self.steps: Tensor
        self.register_buffer("bias", torch.zeros(1))
        self.register_buffer("steps", torch.arange(out_channels, dtype=torch.float32).view(-1, *(1,) * dims))

    def forward(self, patches: Tensor) -> Tensor | list[Tensor]:
        total = patches.sum(1, keepdim=True)
        logits = 10 * (total - self.steps - 0.5) if self.kind == "above" else -(total - self.steps).abs()
        return [logits + self.bias] if self.training else logits + self.bias


BRATS_SUFFIXES = {"t1n": "t1", "t1c": "t1ce", "t2w": "t2", "t2f": "flair"}


class Scans:
    """Scans like flights of stairs: intensity 1, 2, 3 on three slabs along the first axis and 0 around them."""

    @staticmethod
    def stairs(shape: tuple[int, ...] = (6, 5, 4)) -> NDArray[np.float32]:
        values = np.zeros(shape, np.float32)
        values[1:4] = np.arange(1, 4).reshape(3, *(1,) * (len(shape) - 1))
        return values

    @staticmethod
    def labels(shape: tuple[int, ...] = (6, 5, 4), painted: tuple[int, int, int] = (2, 1, 4)) -> NDArray[np.uint8]:
        """What the first, second and third step are painted as; default: BraTS 2017."""
        labels = np.zeros(shape, np.uint8)
        labels[1:4] = np.asarray(painted).reshape(3, *(1,) * (len(shape) - 1))
        return labels

    @staticmethod
    def write(path: Path, values: ArrayLike, affine: ArrayLike = LPS) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        image = nib.Nifti1Image(np.asarray(values, np.float32), np.asarray(affine, np.float64))
        image.set_sform(image.affine, code=4)
        image.set_qform(image.affine, code=1)
        nib.save(image, path)
        return path

    def write_case(self, folder: Path, case_id: str, images: Mapping[str, ArrayLike], affine: ArrayLike = LPS) -> Path:
        """A case in the naming of BraTS 2021."""
        for modality, values in images.items():
            self.write(folder / case_id / f"{case_id}_{BRATS_SUFFIXES[modality]}.nii.gz", values, affine)
        return folder / case_id

    @staticmethod
    def read(path: Path) -> tuple[nib.Nifti1Image, NDArray[Any]]:
        image = nib.load(path)
        return image, np.asarray(image.dataobj)


@pytest.fixture
def scans() -> Scans:
    return Scans()


STEPS = ModelEntry(StepsConfig, Steps, {"base": {}}, (2, 3), "none")


@pytest.fixture
def steps_family(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "steps", STEPS)


def write_steps_run(
    folder: Path,
    modalities: tuple[str, ...] = ("t1c",),
    scheme: LabelScheme = SCHEMES["brats2017"],
    bias: float = 0.0,
    **changes: Any,
) -> Path:
    """A run folder of `Steps`; `changes` are of its card. MODELS must have the family: see `steps_family`.

    Intensities 0 to 100 reach the network as they are. With nested regions, intensity 1 is painted as the first
    region, 2 as the second, 3 and more as the third.
    """
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
    save_model(folder, network.state_dict(), ModelCard.model_validate({**document, **changes}))
    return folder


@pytest.fixture
def make_run(tmp_path: Path, steps_family: None) -> MakeRun:
    """Writes a run folder: `make_run(name, modalities=..., scheme=..., bias=..., **changes of the card)`."""

    def make(name: str = "run", *given: Any, **changes: Any) -> Path:
        return write_steps_run(tmp_path / name, *given, **changes)

    return make
