"""Turn a run folder into a small folder to ship: weights in half precision and the card, nothing else.

Run with `python benchmarks/ship_weights.py RUN weights/NAME`. Halved weights are loaded back into a network of float32;
score them before shipping, as `docs/benchmarks.md` does.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from segkit.checkpoint.model import load_model, save_model
from segkit.checkpoint.run_folder import WEIGHTS_NAME, load_card
from segkit.checkpoint.tensors import load_weights_file

_OF_THE_MACHINE = ("platform", "cores")


def main() -> None:
    """Write the folder and say how large it is."""
    run, folder = Path(sys.argv[1]), Path(sys.argv[2])
    tensors = {
        name: tensor.half() if tensor.dtype == torch.float32 else tensor
        for name, tensor in load_weights_file(run / WEIGHTS_NAME).items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    card = load_card(run)
    versions = {name: version for name, version in card.versions.items() if name not in _OF_THE_MACHINE}
    save_model(folder, tensors, card.model_copy(update={"versions": versions}))
    load_model(folder)
    size_mb = (folder / WEIGHTS_NAME).stat().st_size / 1e6
    print(f"{folder}: {len(tensors)} tensors, {size_mb:.2f} MB")


if __name__ == "__main__":
    main()
