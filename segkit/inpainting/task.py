"""The inpainting task: a network that fills holes, scored on holes in images of held-out patients."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from segkit.checkpoint.card import ModelCard
from segkit.checkpoint.model import save_model
from segkit.checkpoint.run_folder import WEIGHTS_NAME
from segkit.checkpoint.tensors import load_weights_file
from segkit.inpainting.dataset import HoleDataset
from segkit.losses.restoration import RestorationConfig, adversarial_terms, restoration_loss, ssim_map
from segkit.models.region_layers import RegionNormLearnable
from segkit.training.batches import endless_batches
from segkit.training.distributed import Ranks
from segkit.training.task import Batch, Score, borrowed

_NETWORK = "network."
"""Prefix of the network's tensors in a `Restoration`."""


class Restoration(nn.Module):
    """A network and, for adversarial training, a discriminator."""

    def __init__(self, network: nn.Module, discriminator: nn.Module | None = None) -> None:
        super().__init__()
        self.network = network
        self.discriminator = discriminator

    def forward(self, x: Tensor) -> Tensor:
        """The restored image (B, C, *spatial) of what `stack_inputs` gives; in training mode at full resolution."""
        found = self.network(x)
        return found if isinstance(found, Tensor) else cast(Tensor, found[0])


@dataclass
class InpaintingTask:
    """A network, its training patches, and the held-out holes that choose its best weights."""

    model: nn.Module
    """A `Restoration`."""
    card: ModelCard
    patches: HoleDataset
    held_out: HoleDataset
    restoration: RestorationConfig
    batch_size: int
    supervision: float = 0.0
    adversarial_weight: float = 0.0
    workers: int | None = None
    ranks: Ranks = field(default_factory=Ranks)
    images: Mapping[str, int] = field(default_factory=dict)
    """Number of training cases, by data folder."""
    method_name: str = "inpainting"
    _held_out: dict[int, Batch] = field(default_factory=dict, repr=False)

    def batches(self, start: int) -> Iterator[Batch]:
        """Endless batches from number `start` on, see `HoleDataset`."""
        return endless_batches(self.patches, self.batch_size, start, self.workers, self.ranks)

    def loss(self, batch: Batch) -> Tensor:
        """Loss of a batch on the model's device."""
        found = self.model(batch["x"])
        loss = restoration_loss(found, batch["image"], batch["hole"], self.restoration)
        supervised = [layer for layer in self._detectors() if layer.learning == "supervised"]
        for layer in supervised:
            # Missing voxels whose content is unknown are holes for the layer, too.
            missing = batch["x"][:, batch["image"].shape[1] :][:, :1]
            loss = loss + self.supervision / len(supervised) * layer.supervise(missing)
        discriminator = cast(Restoration, self.model).discriminator
        if discriminator is not None:
            # One backward pass for both: the gradient of each term reaches its own network only.
            of_network, of_discriminator = adversarial_terms(discriminator, found, batch["image"])
            loss = loss + self.adversarial_weight * of_network + of_discriminator
        return loss

    def validate(self, weights: Mapping[str, Tensor]) -> Score:
        """SSIM in the holes of held-out patients with these weights.

        Details are the measures, and the share of voxels that RN-L detected in the last training pass, averaged over
        its layers.
        """
        measures = self.measure(weights)
        shares = [float(layer.detected_share) for layer in self._detectors()]
        detected = {"detected_share": sum(shares) / len(shares)} if shares else {}
        return Score(measures["ssim"], {"measures": measures | detected})

    @torch.no_grad()
    def measure(self, weights: Mapping[str, Tensor]) -> dict[str, float]:
        """Means over the voxels of all held-out holes, in units of the normalised image.

        "ssim", "mae" and "mse" of the network, and "mse_rough" of the first fill, which is its input.
        """
        with borrowed(self.model, weights):
            self.model.eval()
            of_each = self.ranks.map(self._sums_in_hole, range(len(self.held_out)))
        totals = {name: sum(sums[name] for sums in of_each) for name in of_each[0]}
        voxels = max(totals.pop("voxels"), 1.0)
        return {name: total / voxels for name, total in totals.items()}

    def _sums_in_hole(self, number: int) -> dict[str, float]:
        """Sums over the voxels of one held-out hole, and how many there are."""
        if number not in self._held_out:
            self._held_out[number] = {name: value[None] for name, value in self.held_out[number].items()}
        device, settings = next(self.model.parameters()).device, self.restoration
        x, image, hole = (self._held_out[number][name].to(device) for name in ("x", "image", "hole"))
        found = torch.where(hole, self.model(x).float(), image)
        error = (found - image).abs()
        window, data_range = settings.ssim_window, settings.data_range
        maps = {
            "ssim": ssim_map(found - settings.darkest, image - settings.darkest, window=window, data_range=data_range),
            "mae": error,
            "mse": error.square(),
            "mse_rough": (x[:, : image.shape[1]] - image).square(),
        }
        sums = {name: float((values.mean(1, keepdim=True) * hole.float()).sum()) for name, values in maps.items()}
        return {**sums, "voxels": float(hole.sum())}

    def _detectors(self) -> list[RegionNormLearnable]:
        return [layer for layer in self.model.modules() if isinstance(layer, RegionNormLearnable)]

    def save(self, run: Path, weights: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Write model.safetensors, without a discriminator, and model.json."""
        kept = {name.removeprefix(_NETWORK): value for name, value in weights.items() if name.startswith(_NETWORK)}
        training = self.card.training_data.model_copy(update=dict(facts))
        save_model(run, kept, self.card.model_copy(update={"training_data": training}))

    def take_best(self, run: Path) -> None:
        """Load the network's weights that `save` wrote last."""
        cast(Restoration, self.model).network.load_state_dict(load_weights_file(run / WEIGHTS_NAME))
