"""A frozen encoder in every family and memory mode: nothing of it moves, and the rest learns as it should."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import segkit
from segkit.checkpoint.card import ModelCard
from segkit.checkpoint.tensors import load_state
from segkit.labels import Output
from segkit.losses.dice_cross_entropy import SegmentationLoss
from segkit.training.config import OptimiserConfig, TrainingConfig
from segkit.training.loop import fit
from segkit.training.optim import encoder_of
from segkit.training.segmentation import SegmentationTask
from segkit.training.task import Score

SIDE = 16
_BATCH_NORMED = {"size": "tiny", "widths": (4, 8), "norm": "batch_per_step"}
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "revmbunet": ("revmbunet", {"size": "tiny", "widths": (4, 8), "mode": "plain"}),
    "revmbunet, checkpointed": ("revmbunet", {"size": "tiny", "widths": (4, 8), "mode": "checkpoint"}),
    "revmbunet, reversible": ("revmbunet", {"size": "tiny", "widths": (4, 8), "mode": "reversible"}),
    "r2unet": ("r2unet", _BATCH_NORMED),
    "r2unet, checkpointed": ("r2unet", {**_BATCH_NORMED, "mode": "checkpoint"}),
    "stunet": ("stunet", {"width": 2, "strides": ((2, 2), (2, 2), (1, 1), (1, 1), (1, 1))}),
    "stunet, checkpointed": (
        "stunet",
        {"width": 2, "strides": ((2, 2), (2, 2), (1, 1), (1, 1), (1, 1)), "mode": "checkpoint"},
    ),
    "smp": ("smp", {"encoder": "tu-regnetx_002", "encoder_depth": 3, "decoder_channels": (8, 8, 8)}),
    "vit": ("vit", {"size": "tiny", "width": 12, "neck": 8, "decoder_widths": (8, 8, 4, 4)}),
    "vit, checkpointed": (
        "vit",
        {"size": "tiny", "width": 12, "neck": 8, "decoder_widths": (8, 8, 4, 4), "mode": "checkpoint"},
    ),
}


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("segkit.training.journal.curves_figure", lambda path, rows: None)


class Discs(SegmentationTask):
    """Bright pixels are to be found; batch n is the same in every run."""

    def batches(self, start: int) -> Iterator[dict[str, Tensor]]:
        while True:
            image = torch.randn(2, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(start))
            yield {"image": image, "label": (image[:, 0] > 1).to(torch.uint8)}
            start += 1

    def validate(self, weights: Mapping[str, Tensor]) -> Score:
        self.model.eval()
        return Score(0.0)

    def save(self, run: Path, weights: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        pass


def discs(which: str) -> Discs:
    torch.manual_seed(3)
    family, arguments = NETWORKS[which]
    network = segkit.build_model(family, in_channels=1, out_channels=1, dims=2, **arguments)
    for name, buffer in network.named_buffers():
        if name.endswith("running_mean"):
            buffer.fill_(0.25)  # as of an encoder that has seen data
    card = ModelCard.model_validate(
        {
            "network": {"family": family, "in_channels": 1, "out_channels": 1},
            "modalities": ["a"],
            "dims": 2,
            "patch_size": [SIDE, SIDE],
            "divisor": [1, 1],
            "training_data": {"identity": "discs"},
        }
    )
    loss, nothing = SegmentationLoss("sigmoid", [Output("bright", 1, (1,))]), Any
    return Discs(network, card, loss, nothing, nothing, 2, nothing, frozen=encoder_of(network))  # type: ignore[arg-type]


def run(task: Discs, folder: Path, steps: int, *, resume: bool = False) -> None:
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    training = TrainingConfig(steps=steps, steps_per_epoch=2, ema_decay=0.5)
    optimisation = OptimiserConfig(lr=0.01, encoder_lr=0, schedule="poly", warmup=0)
    fit(task, folder, training, optimisation, device=torch.device("cpu"), resume=resume)


def parts(task: Discs, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Copies of what is of the encoder, and of the rest."""
    prefix: str = task.model.encoder_prefix  # type: ignore[assignment]
    copies = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    return (
        {name: tensor for name, tensor in copies.items() if name.startswith(prefix)},
        {name: tensor for name, tensor in copies.items() if not name.startswith(prefix)},
    )


@pytest.mark.parametrize("which", NETWORKS)
def test_the_encoder_stays_and_the_rest_learns(which: str, tmp_path: Path) -> None:
    task = discs(which)
    encoder, others = parts(task, task.model.state_dict())
    run(task, tmp_path, 2)
    state = load_state(tmp_path)
    for tensors in (state["model"], state["average"]["average"]):
        after, learnt = parts(task, tensors)
        assert all(torch.equal(after[name], tensor) for name, tensor in encoder.items())
        still = [name for name, tensor in others.items() if torch.equal(learnt[name], tensor)]
        learning = {name for name, p in task.model.named_parameters() if p.requires_grad}
        assert not learning & set(still), "every other parameter has moved"


@pytest.mark.parametrize("which", [name for name in NETWORKS if "," in name])
def test_memory_modes_learn_the_same(which: str) -> None:
    gradients = []
    for name in (which.partition(",")[0], which):
        task = discs(name)
        task.model.train()
        torch.autograd.backward(task.loss(next(task.batches(0))))
        gradients.append({name: parameter.grad for name, parameter in task.model.named_parameters()})
    plain, saving = gradients
    assert {name for name, gradient in plain.items() if gradient is None} >= {
        name
        for name in plain
        if name.startswith(task.model.encoder_prefix)  # type: ignore[arg-type]
    }
    for name, gradient in plain.items():
        torch.testing.assert_close(saving[name], gradient)


def test_a_resumed_run_equals_one_that_was_never_cut(tmp_path: Path) -> None:
    run(discs("r2unet"), tmp_path / "whole", 4)

    class CutError(Exception):
        """Stands for a power cut."""

    class Cut(Discs):
        def batches(self, start: int) -> Iterator[dict[str, Tensor]]:
            for number, batch in enumerate(super().batches(start)):
                if number == 2:
                    raise CutError
                yield batch

    cut = discs("r2unet")
    with pytest.raises(CutError):
        run(Cut(**vars(cut)), tmp_path / "cut", 4)
    run(discs("r2unet"), tmp_path / "cut", 4, resume=True)
    whole, resumed = load_state(tmp_path / "whole"), load_state(tmp_path / "cut")
    assert all(torch.equal(resumed["model"][name], tensor) for name, tensor in whole["model"].items())
    averages = whole["average"]["average"]
    assert all(torch.equal(resumed["average"]["average"][name], tensor) for name, tensor in averages.items())


def test_what_is_not_frozen_does_count(tmp_path: Path) -> None:
    """The check above would miss nothing: the same run without freezing moves the encoder and its statistics."""
    task = discs("r2unet")
    encoder, _ = parts(task, task.model.state_dict())
    for parameter in encoder_of(task.model).parameters():
        parameter.requires_grad_(True)
    task.frozen = None
    run(task, tmp_path, 2)
    after, _ = parts(task, load_state(tmp_path)["model"])
    moved = [name for name, tensor in encoder.items() if not torch.equal(after[name], tensor)]
    assert any(name.endswith("running_mean") for name in moved)


@pytest.mark.parametrize("dims", [2, 3])
def test_the_encoder_of_a_slicewise_network_is_the_planar_one(dims: int) -> None:
    network = segkit.build_model("vit", in_channels=1, out_channels=1, dims=dims, **NETWORKS["vit"][1])
    assert isinstance(encoder_of(network), nn.Module)
    assert set(dict(encoder_of(network).named_parameters())) == {
        name.removeprefix("encoder.") for name, _ in network.named_parameters() if name.startswith("encoder.")
    }
