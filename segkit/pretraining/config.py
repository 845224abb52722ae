"""The settings of a pre-training run: what a YAML file or `--set` can say."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from segkit.pretraining.contrastive import ContrastiveConfig
from segkit.pretraining.graph_matching import GraphMatchingConfig
from segkit.pretraining.masked import MaskedConfig
from segkit.pretraining.sources import ImagesConfig
from segkit.pretraining.views import ViewsConfig
from segkit.training.config import LoopConfig, NetworkConfig, OptimiserConfig, RunConfig

MethodName = Literal["graph-matching", "masked", "contrastive"]


class PretrainConfig(RunConfig):
    """A whole pre-training run."""

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
