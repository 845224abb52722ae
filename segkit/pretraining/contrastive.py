"""Contrastive pre-training: two views of an image shall be more alike than views of different images.

SimCLR (Chen et al. 2020, arXiv 2002.05709, section 2.1): the mean over the encoder's deepest feature map passes a
projector of two layers, and equation 1 is the loss. All other images of the batch are negatives, also neighbouring
slices of the same patient, which look alike.
"""

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from segkit.config import Config
from segkit.losses.global_batch import batch_gather
from segkit.models.blocks import SegmentationNetwork
from segkit.models.sample_processes import SampleProcesses
from segkit.pretraining.encoder import freeze_decoder, retrieval_accuracy
from segkit.training.task import Batch


class ContrastiveConfig(Config):
    """Settings of projector and loss."""

    temperature: float = Field(default=0.1, gt=0)
    """Divisor of the cosines; the lower, the more the hardest negatives count."""
    width: int = Field(default=128, ge=1)
    """Features of a view in which views are compared."""
    hidden: int | None = Field(default=None, ge=1)
    """Width of the projector's hidden layer; None is that of the deepest feature map."""


class Contrast(nn.Module):
    """The network with a projector on top of its encoder, and the contrastive loss."""

    views = 2
    score = "retrieval"
    keeps_decoder = False

    def __init__(self, network: SegmentationNetwork, config: ContrastiveConfig, in_channels: int, dims: int) -> None:
        super().__init__()
        self.network = network
        self.config = config
        self._processes = SampleProcesses()
        width = freeze_decoder(network, in_channels, dims)
        hidden = config.hidden or width
        self.projector = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, config.width))

    def loss(self, batch: Batch) -> Tensor:
        """Contrastive loss of the views "first" and "second", each (B, C, *patch); negatives are those of all ranks."""
        first, second = self.project(batch)
        return nt_xent(batch_gather(first), batch_gather(second), self.config.temperature)

    @torch.no_grad()
    def measures(self, batch: Batch) -> dict[str, float]:
        """`retrieval`: share of images whose nearest view, among all of the batch, is their own; and the `loss`."""
        first, second = self.project(batch)
        return {
            "retrieval": retrieval_accuracy(first.cpu().numpy(), second.cpu().numpy()),
            "loss": float(nt_xent(first, second, self.config.temperature)),
        }

    def project(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Projected features (B, width) of both views, float32."""
        deepest = self._processes(self.network, torch.cat([batch["first"], batch["second"]]), "encode")[-1]
        with torch.autocast(deepest.device.type, enabled=False):
            first, second = self.projector(deepest.float().flatten(2).mean(2)).chunk(2)
        return first, second


def nt_xent(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """Normalised temperature-scaled cross-entropy, mean over all 2B views, a float32 scalar also under autocast.

    For a view i with the other view j of its image: -log(exp(cos_ij / t) / sum over k != i of exp(cos_ik / t)), with t
    the temperature. `first` and `second` are the features (B, F) of both views of each image.
    """
    with torch.autocast(first.device.type, enabled=False):
        views = functional.normalize(torch.cat([first, second]).float(), dim=1)  # (2B, F)
        is_itself = torch.eye(len(views), dtype=torch.bool, device=views.device)
        cosines = (views @ views.T).masked_fill(is_itself, -torch.inf)
        partners = torch.arange(len(views), device=views.device).roll(len(first))
        return functional.cross_entropy(cosines / temperature, partners)
