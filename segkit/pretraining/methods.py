"""The pre-training methods: what each one offers, their settings, and the table of them."""

from collections.abc import Callable
from typing import Literal, Protocol

from pydantic import Field
from torch import Tensor, nn

from segkit.checkpoint.card import ModelCard
from segkit.models.blocks import SegmentationNetwork
from segkit.pretraining.contrastive import Contrast, ContrastiveConfig
from segkit.pretraining.graph_matching import GraphMatching, GraphMatchingConfig
from segkit.pretraining.masked import MaskedConfig, MaskedReconstruction
from segkit.pretraining.sources import ImagesConfig
from segkit.pretraining.views import ViewsConfig
from segkit.training.config import LoopConfig, NetworkConfig, OptimiserConfig, RunConfig
from segkit.training.task import Batch

MethodName = Literal["graph-matching", "masked", "contrastive"]


class PretrainConfig(RunConfig):
    """The settings of a pre-training run, as a YAML file or `--set` gives them."""

    method: MethodName = "graph-matching"
    """graph-matching: LVM-Med; masked: hidden blocks are reconstructed; contrastive: SimCLR."""
    network: NetworkConfig = NetworkConfig(family="smp", size="unet-resnet50")
    optimiser: OptimiserConfig = OptimiserConfig()
    training: LoopConfig = LoopConfig(steps=20_000)
    images: ImagesConfig = ImagesConfig()
    views: ViewsConfig = ViewsConfig()
    dims: Literal[2, 3] | None = None
    """3: crops of volumes; 2: their slices; None is 2 where the network is one for images (smp, vit), else 3 for
    volumes. Pictures are 2."""
    batch_size: int = Field(default=64, ge=2)
    """Images of a batch, a multiple of `graph_matching.nodes`."""
    validation_groups: int = Field(default=8, ge=1)
    """Groups of held-out images that are measured."""
    graph_matching: GraphMatchingConfig = GraphMatchingConfig()
    masked: MaskedConfig = MaskedConfig()
    contrastive: ContrastiveConfig = ContrastiveConfig()


class Method(Protocol):
    """A module around a network, with a loss without labels and measures on held-out images.

    A batch has B images: "first" and, where `views` is 2, "second" (B, C, *patch) float32, with "first_frame" and
    "second_frame" (B, dims, dims + 1) that map voxel indices of a view to mm in the image it was cut from.
    """

    network: SegmentationNetwork
    views: int
    """Views of each image that it needs, 1 or 2."""
    score: str
    """The measure that chooses the best checkpoint; higher is better."""
    keeps_decoder: bool
    """Whether it trains the decoder, which is then saved; heads never are."""

    def loss(self, batch: Batch) -> Tensor:
        """The loss, a scalar; random numbers come from torch's global generator of the CPU."""

    def measures(self, batch: Batch) -> dict[str, float]:
        """The measures of a batch of held-out images in evaluation mode, always the same for the same weights."""


METHODS: dict[MethodName, Callable[[PretrainConfig, SegmentationNetwork, ModelCard], nn.Module]] = {
    "graph-matching": lambda config, network, card: GraphMatching(
        network, config.graph_matching, card.network.in_channels, card.dims
    ),
    "masked": lambda config, network, _: MaskedReconstruction(network, config.masked),
    "contrastive": lambda config, network, card: Contrast(
        network, config.contrastive, card.network.in_channels, card.dims
    ),
}
"""Name of the method -> builder of its module, a `Method`."""
