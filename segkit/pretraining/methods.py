"""The methods segkit knows: one visible table, name to builder and what becomes of the network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from segkit.checkpoint.card import ModelCard
from segkit.pretraining.config import MethodName, PretrainConfig
from segkit.pretraining.contrastive import Contrast
from segkit.pretraining.graph_matching import GraphMatching
from segkit.pretraining.masked import MaskedReconstruction


@dataclass(frozen=True)
class MethodEntry:
    """One method: its builder (settings, network, card), the views it wants, and whether it trains the decoder."""

    build: Callable[[PretrainConfig, nn.Module, ModelCard], nn.Module]
    views: int
    keeps_decoder: bool


METHODS: dict[MethodName, MethodEntry] = {
    "graph-matching": MethodEntry(
        build=lambda config, network, card: GraphMatching(
            network, config.graph_matching, card.network.in_channels, card.dims
        ),
        views=2,
        keeps_decoder=False,
    ),
    "masked": MethodEntry(
        build=lambda config, network, _: MaskedReconstruction(network, config.masked),
        views=1,
        keeps_decoder=True,
    ),
    "contrastive": MethodEntry(
        build=lambda config, network, card: Contrast(network, config.contrastive, card.network.in_channels, card.dims),
        views=2,
        keeps_decoder=False,
    ),
}
"""Name of the method -> entry."""


def build_method(config: PretrainConfig, network: nn.Module, card: ModelCard) -> nn.Module:
    """The method of these settings around a network, a `Method`."""
    return METHODS[config.method].build(config, network, card)
