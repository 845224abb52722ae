"""The network that a run begins with: random weights, or weights from elsewhere."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from segkit.checkpoint import ModelCard, build_network, read_source
from segkit.checkpoint.transfer import TransferOptions, transfer
from segkit.errors import CheckpointError, as_request
from segkit.runtime import seed_everything
from segkit.training.config import TrainConfig
from segkit.training.folder import read_origin, write_origin

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FirstWeights:
    """A network before its first step.

    `facts` tell where its weights came from (empty: random ones); `report` has the names of all tensors by what became
    of them, and is empty for a resumed run, whose own weights replace these.
    """

    network: nn.Module = field(repr=False)
    facts: Mapping[str, str] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)

    def keep(self, run: Path) -> None:
        """Write `weights.json`, where there is something to tell."""
        if self.report:
            write_origin(run, self.facts, self.report)


def first_weights(card: ModelCard, config: TrainConfig, run: Path, *, is_resumed: bool) -> FirstWeights:
    """Build the network of a card and, for a run that is not resumed, load the weights that its settings name.

    Raises:
        RequestError: the weights cannot be read or do not fit the network.
    """
    seed_everything(config.training.seed)
    network = build_network(card)
    path = config.network.weights
    if is_resumed or path is None:
        return FirstWeights(network, read_origin(run) if is_resumed else {})
    options = TransferOptions(
        input_adapt=config.network.input_adapt,
        modalities=card.modalities,
        outputs=[output.name for output in card.outputs],
    )
    try:
        source = read_source(path)
        report = transfer(network, source, options)
    except CheckpointError as error:
        raise as_request(error) from error
    _log.info("weights of %s: %s", path, report)
    return FirstWeights(network, source.facts(), dataclasses.asdict(report))
