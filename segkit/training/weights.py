"""The network with its first weights: random or from a file."""

import dataclasses
import logging
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from segkit.checkpoint.card import ModelCard
from segkit.checkpoint.model import build_network, read_source
from segkit.checkpoint.transfer import TransferOptions, transfer
from segkit.errors import CheckpointError, RequestError, as_request, some
from segkit.models.blocks import SegmentationNetwork
from segkit.runtime import seed_everything
from segkit.training.config import RunConfig
from segkit.training.folder import ORIGIN_NAME, read_object, write_json

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FirstWeights:
    """A network before its first step, with the origin of its weights (`facts`, empty for random weights).

    `report` has the names of all tensors by how they were loaded, and the share of the encoder that was found; it is
    empty for a resumed run, which loads its own weights later.
    """

    network: SegmentationNetwork = field(repr=False)
    facts: Mapping[str, str] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)

    def completed(self, card: ModelCard) -> ModelCard:
        """The card with the divisor of the network and the origin of its weights."""
        facts = {"initial_weights": dict(self.facts)} if self.facts else {}
        data = card.training_data.model_copy(update=facts)
        return card.model_copy(update={"divisor": tuple(self.network.divisor), "training_data": data})

    def keep(self, run: Path) -> None:
        """Write `weights.json`, unless the weights are random or those of a resumed run."""
        if self.report:
            write_json(run / ORIGIN_NAME, {**self.facts, "report": dict(self.report)})


def first_weights(
    card: ModelCard, config: RunConfig, run: Path, *, resume: bool, is_shape_only: bool = False
) -> FirstWeights:
    """Build the network of a card and, unless the run is resumed, load the weights of the settings.

    With `is_shape_only` the network is on the meta device, without memory; rank 0 has its weights.

    Raises:
        RequestError: the weights cannot be read or do not fit the network, or hold too little of the encoder.
    """
    seed_everything(config.training.seed)
    if is_shape_only:
        with torch.device("meta"):
            return FirstWeights(build_network(card))
    network = build_network(card)
    path = config.network.weights
    if resume:
        return FirstWeights(network, {k: v for k, v in read_object(run / ORIGIN_NAME).items() if isinstance(v, str)})
    if path is None:
        if config.optimiser.encoder_lr == 0 and not config.network.arguments.get("encoder_weights"):
            _log.warning("optimiser.encoder_lr=0 freezes an encoder of random weights: name others with --weights")
        return FirstWeights(network)
    options = TransferOptions(
        input_adapt=config.network.input_adapt,
        is_strict=config.network.weights_share == 1,
        modalities=card.modalities,
        outputs=[output.name for output in card.outputs],
    )
    try:
        source = read_source(path)
        report = transfer(network, source, options)
    except CheckpointError as error:
        raise as_request(error) from error
    share, least = encoder_share(network, {*report.loaded, *report.adapted}), config.network.weights_share
    if share < least:
        lacking = some(name for name in report.missing if name.startswith(network.encoder_prefix))
        raise RequestError(
            f"holds {percent(share)} of the encoder's parameters; {'; '.join((f'without {lacking}', *report.notes))}",
            where=source.file,
            expected=f"at least {percent(least)} (network.weights_share)",
            remedy="Choose the network.family and network.size that it was trained as, or lower network.weights_share",
        )
    _log.info("weights of %s: %s of the encoder; %s", path, percent(share), report)
    return FirstWeights(network, source.facts(), {**dataclasses.asdict(report), "encoder_share": share})


def encoder_share(network: SegmentationNetwork, names: Collection[str]) -> float:
    """Share of the encoder's parameters, 0 to 1 by number of elements, that are among `names` of the state dict."""
    sizes = {name: p.numel() for name, p in network.named_parameters() if name.startswith(network.encoder_prefix)}
    return sum(size for name, size in sizes.items() if name in names) / sum(sizes.values())


def percent(share: float) -> str:
    """`99.9 %`, rounded down: a share below a limit must not be shown as the limit."""
    return f"{math.floor(1000 * share + 1e-9) / 10:g} %"
