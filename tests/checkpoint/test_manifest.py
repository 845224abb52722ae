"""Every entry of weights/manifest.yaml against the network that it names, on the meta device."""

from __future__ import annotations

import itertools
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import segkit
from segkit.checkpoint.model import WeightSource
from segkit.checkpoint.nnunet import RELEASED_LABELS
from segkit.checkpoint.transfer import plan_transfer
from segkit.config import parse_overrides

_FOLDER = Path(__file__).resolve().parents[2] / "weights"
ENTRIES: dict[str, dict[str, Any]] = yaml.safe_load((_FOLDER / "manifest.yaml").read_text())["weights"]


def test_the_published_weights_are_listed() -> None:
    sizes = [f"stunet-{size}-{data}" for size in "SBLH" for data in ("totalsegmentator", "abdomenatlas")]
    assert set(ENTRIES) >= {*sizes, "stunet-B-ct-org", "stunet-B-feta21", "stunet-B-brats21"}
    assert set(ENTRIES) >= {"lvm-med-resnet50", "lvm-med-vit-b"}


@pytest.mark.parametrize("name", ENTRIES)
def test_entry_belongs_to_a_network_of_the_table(name: str) -> None:
    entry = ENTRIES[name]
    with torch.device("meta"):
        network = segkit.build_model(
            entry["family"],
            size=entry["size"],
            in_channels=entry["in_channels"],
            out_channels=entry["out_channels"],
            dims=entry["dims"],
            **entry.get("arguments", {}),
        )
    prefix: str = network.encoder_prefix if entry["covers"] == "encoder" else ""  # type: ignore[assignment]
    tensors = {key.removeprefix(prefix): t for key, t in network.state_dict().items() if key.startswith(prefix)}
    shapes = [(key, list(tensor.shape)) for key, tensor in tensors.items()]
    assert len(shapes) == entry["tensors"]
    assert dict(shapes[:1]) == entry["first"]
    assert dict(shapes[-1:]) == entry["last"]
    report, _ = plan_transfer(network, WeightSource(Path(entry["file"]), tensors))
    assert (len(report.loaded), report.adapted, report.skipped) == (entry["tensors"], (), ())
    assert bool(report.missing) == (entry["covers"] == "encoder")


@pytest.mark.parametrize("name", ENTRIES)
def test_entry_says_origin_terms_and_how_to_load_it(name: str) -> None:
    entry = ENTRIES[name]
    assert entry["covers"] in ("network", "encoder")
    assert all(entry[key] for key in ("licence", "terms", "evidence", "trained_on", "file"))
    assert all(url.startswith("https://") for url in entry.get("origin", ()))
    words = shlex.split(entry["load"])
    assert words[0] == "segkit"
    if words[1] == "train":
        settings = parse_overrides(word for before, word in itertools.pairwise(words) if before == "--set")
        assert settings["network"] == {"family": entry["family"], "size": entry["size"]}
        assert words[words.index("--weights") + 1] == entry["file"]
    if "labels" in entry:
        assert len(RELEASED_LABELS[entry["labels"]].values) == entry["out_channels"] - 1


def test_lvm_med_is_marked_as_non_commercial() -> None:
    for name in ("lvm-med-resnet50", "lvm-med-vit-b"):
        assert "non-commercial" in ENTRIES[name]["licence"]
        for licence in ("CC BY-NC-ND 2.0", "CC BY-NC-SA 4.0", "CC BY-NC 2.0"):
            assert licence in ENTRIES[name]["terms"]
