"""Weights from elsewhere: what is loaded, adapted, skipped and missing, and what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import segkit
from segkit.checkpoint.card import ModelCard
from segkit.checkpoint.model import read_source, save_model
from segkit.checkpoint.transfer import LoadReport, load_weights, plan_transfer
from segkit.errors import CheckpointError


class Encoder(nn.Module):
    """A stem that sees the image channels, with the running statistics of a batch norm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.stem = nn.Conv3d(channels, 2, 1, bias=False)
        self.norm = nn.BatchNorm3d(2)


class SmallNetwork(nn.Module):
    """An encoder, a decoder and two heads; names as a network of the table declares them."""

    def __init__(self, channels: int = 1, outputs: int = 2) -> None:
        super().__init__()
        self.encoder = Encoder(channels)
        self.decoder = nn.Conv3d(2, 2, 1)
        self.heads = nn.ModuleList([nn.Conv3d(2, outputs, 1), nn.Conv3d(2, outputs, 1)])
        self.divisor = (1, 1, 1)
        self.input_weights = ("encoder.stem.weight",)
        self.head_prefixes = ("heads.",)
        self.encoder_prefix = "encoder."


HEADS = ("heads.0.weight", "heads.0.bias", "heads.1.weight", "heads.1.bias")
BODY = (
    *("encoder.stem.weight", "encoder.norm.weight", "encoder.norm.bias", "encoder.norm.running_mean"),
    *("encoder.norm.running_var", "encoder.norm.num_batches_tracked", "decoder.weight", "decoder.bias"),
)


def trained(channels: int = 1, outputs: int = 2) -> SmallNetwork:
    """A network whose every tensor differs from a fresh one's."""
    network = SmallNetwork(channels, outputs)
    for number, tensor in enumerate(network.state_dict().values()):
        tensor.fill_(number + 1)
    return network


def save(path: Path, tensors: dict[str, Tensor], key: str | None = "state_dict") -> Path:
    torch.save(tensors if key is None else {key: tensors, "epoch": 1}, path)
    return path


def copies(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(("name", "key"), [("a.model", "state_dict"), ("a.pth", "network_weights"), ("a.pt", None)])
def test_everything_is_loaded_into_an_equal_network(tmp_path: Path, name: str, key: str | None) -> None:
    network = SmallNetwork()
    wrapped = {f"module.{name}": tensor for name, tensor in trained().state_dict().items()}
    report = segkit.load_weights(network, save(tmp_path / name, wrapped, key))
    assert same(copies(network), copies(trained()))
    assert (set(report.loaded), report.adapted, report.skipped, report.missing) == ({*BODY, *HEADS}, (), (), ())
    assert report.describe() == str(report) == "12 tensors loaded"


def test_half_precision_is_read_into_full(tmp_path: Path) -> None:
    network = SmallNetwork()
    half = {name: t.half() if t.is_floating_point() else t for name, t in trained().state_dict().items()}
    load_weights(network, save(tmp_path / "half.pt", half))
    assert same(copies(network), copies(trained()))


def test_other_channels_and_outputs(tmp_path: Path) -> None:
    network = SmallNetwork(channels=4, outputs=3)
    fresh = copies(network)
    report = load_weights(network, save(tmp_path / "a.pt", copies(trained())))
    state = network.state_dict()
    assert torch.equal(state["encoder.stem.weight"], torch.full((2, 4, 1, 1, 1), 0.25))
    assert torch.equal(state["encoder.norm.running_var"], torch.full((2,), 5.0))
    assert all(torch.equal(state[name], fresh[name]) for name in HEADS)
    assert report == LoadReport(
        loaded=BODY[1:],
        adapted=BODY[:1],
        skipped=HEADS,
        missing=HEADS,
        notes=("heads not loaded: their shapes differ",),
    )
    assert report.describe() == (
        "7 tensors loaded, 1 adapted to other image channels (encoder.stem.weight), "
        "4 of the file not used (heads.0.weight, heads.0.bias, ...), "
        "4 of the network unchanged (heads.0.weight, heads.0.bias, ...); heads not loaded: their shapes differ"
    )


@pytest.mark.parametrize(("rule", "expected"), [("mean", (0.5, 0.5)), ("repeat", (1, 1)), ("zero", (1, 0))])
def test_rules_for_channels(tmp_path: Path, rule: Any, expected: tuple[float, float]) -> None:
    network = SmallNetwork(channels=2)
    load_weights(network, save(tmp_path / "a.pt", copies(trained())), input_adapt=rule)
    assert network.encoder.stem.weight[0].flatten().tolist() == list(expected)


def test_channels_by_name_also_where_their_number_is_the_same(tmp_path: Path) -> None:
    source = copies(trained(channels=2))
    source["encoder.stem.weight"] = torch.tensor([1.0, 2.0]).view(1, 2, 1, 1, 1).repeat(2, 1, 1, 1, 1)
    network, path = SmallNetwork(channels=2), save(tmp_path / "a.pt", source)
    names = {"source_modalities": ["t1c", "t2f"], "modalities": ["FLAIR", "t1ce"]}
    report = load_weights(network, path, **names)
    assert network.encoder.stem.weight[0].flatten().tolist() == [2.0, 1.0]
    assert report.adapted == ("encoder.stem.weight",)
    assert report.notes == ("channels FLAIR, t1ce taken from t1c, t2f by name",)
    report = load_weights(network, path, source_modalities=["t1ce", "flair"], modalities=["t1c", "t2f"])
    assert network.encoder.stem.weight[0].flatten().tolist() == [1.0, 2.0]
    assert report.adapted == ()
    load_weights(network, path, input_adapt="repeat", **names)
    assert network.encoder.stem.weight[0].flatten().tolist() == [1.0, 2.0]


def test_heads_can_be_left_out_though_they_fit(tmp_path: Path) -> None:
    network = SmallNetwork()
    fresh = copies(network)
    report = load_weights(network, save(tmp_path / "a.pt", copies(trained())), heads="skip")
    assert torch.equal(network.heads[0].weight, fresh["heads.0.weight"])
    assert (report.skipped, report.missing, report.notes) == (HEADS, HEADS, ("heads not loaded: as requested",))


def test_a_head_is_taken_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    """A bias that fits is noise without its weight; other heads are taken all the same."""
    source = copies(trained())
    source["heads.1.weight"] = torch.ones(2, 3, 1, 1, 1)
    source["heads.2.bias"] = torch.ones(2)
    report = load_weights(SmallNetwork(), save(tmp_path / "a.pt", source))
    assert report.missing == HEADS[2:]
    assert set(report.skipped) == {*HEADS[2:], "heads.2.bias"}


def test_old_files_without_batch_counts(tmp_path: Path) -> None:
    source = copies(trained())
    del source["encoder.norm.num_batches_tracked"]
    report = load_weights(SmallNetwork(), save(tmp_path / "a.pt", source))
    assert report.missing == ("encoder.norm.num_batches_tracked",)


def _without(source: dict[str, Tensor]) -> None:
    del source["decoder.weight"], source["encoder.norm.running_mean"]


def _with_more(source: dict[str, Tensor]) -> None:
    source["attention.weight"] = torch.ones(1)


def _wider(source: dict[str, Tensor]) -> None:
    source["decoder.weight"] = torch.ones(3, 2, 1, 1, 1)


def _wider_stem(source: dict[str, Tensor]) -> None:
    source["encoder.stem.weight"] = torch.ones(3, 1, 1, 1, 1)


def _whole_numbers(source: dict[str, Tensor]) -> None:
    source["decoder.bias"] = torch.ones(2, dtype=torch.int8)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (_without, r"tensors missing from the file: 2 \(encoder\.norm\.running_mean, decoder\.weight\)"),
        (_with_more, r"tensors unknown to the network: 1 \(attention\.weight\)"),
        (_wider, r"tensors of another shape: 1 \(decoder\.weight: 3 x 2 x 1 x 1 x 1 in the file, 2 x 2 x 1 x"),
        (_wider_stem, r"tensors of another shape: 1 \(encoder\.stem\.weight: 3 x 1"),
        (_whole_numbers, r"tensors of another shape: 1 \(decoder\.bias: 2 of int8 in the file, 2 in the network"),
    ],
)
def test_strict_means_that_all_the_rest_is_there(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], None], complaint: str
) -> None:
    source = copies(trained())
    change(source)
    network = SmallNetwork()
    before, path = copies(network), save(tmp_path / "a.pt", source)
    with pytest.raises(CheckpointError, match=rf"does not fit SmallNetwork: {complaint}.*network\.family"):
        load_weights(network, path)
    assert same(copies(network), before), "a refused file changes nothing"
    report = load_weights(network, path, is_strict=False)
    assert "encoder.norm.weight" in report.loaded
    assert report.notes


def test_a_file_of_another_network_is_refused_strict_or_not(tmp_path: Path) -> None:
    path = save(tmp_path / "a.pt", {"x": torch.ones(1), "y": torch.ones(1)})
    for is_strict in (True, False):
        with pytest.raises(
            CheckpointError, match=r"does not fit SmallNetwork: .*tensors unknown to the network: 2 \(x, y\)"
        ):
            load_weights(SmallNetwork(), path, is_strict=is_strict)


@pytest.mark.parametrize("beginning", ["encoder.", "", "image_encoder."])
def test_an_encoder_alone(tmp_path: Path, beginning: str) -> None:
    """The encoder is loaded strictly, the rest keeps its fresh weights; a classifier beside it is left out."""
    encoder = {
        name.removeprefix("encoder."): t for name, t in copies(trained(3)).items() if name.startswith("encoder.")
    }
    source = {f"{beginning}{name}": tensor for name, tensor in encoder.items()}
    source |= {"fc.weight": torch.ones(5, 2), "fc.bias": torch.ones(5)}
    network = SmallNetwork(channels=1)
    report = load_weights(network, save(tmp_path / "a.pt", source))
    assert report.adapted == ("encoder.stem.weight",)
    assert network.encoder.stem.weight[0].flatten().tolist() == [3.0], "one channel sees the sum of three"
    assert report.skipped == ("fc.weight", "fc.bias")
    assert set(report.missing) == {"decoder.weight", "decoder.bias", *HEADS}
    assert report.notes == ("the file holds an encoder", "fc is the classifier that it was trained with")
    del source[f"{beginning}norm.weight"]
    with pytest.raises(CheckpointError, match=r"tensors missing from the file: 1 \(encoder\.norm\.weight\)"):
        load_weights(network, save(tmp_path / "b.pt", source))


def test_three_channels_first_and_then_adapting_is_the_same_as_at_once(tmp_path: Path) -> None:
    """The order that LVM-Med's file needs: its three channels are loaded, then made for the data."""
    encoder = {name.removeprefix("encoder."): torch.randn_like(t.float()) for name, t in copies(trained(3)).items()}
    encoder = {name: tensor for name, tensor in encoder.items() if name.startswith(("stem", "norm"))}
    encoder["norm.num_batches_tracked"] = torch.tensor(9)
    path = save(tmp_path / "rn.pt", encoder)
    three, one = SmallNetwork(channels=3), SmallNetwork(channels=1)
    load_weights(three, path)
    load_weights(one, path)
    adapted = three.encoder.stem.weight.sum(1, keepdim=True)
    torch.testing.assert_close(one.encoder.stem.weight, adapted)
    torch.testing.assert_close(one.encoder.norm.running_mean, three.encoder.norm.running_mean)


def test_a_network_that_declares_nothing_takes_equal_files_only(tmp_path: Path) -> None:
    source, network = nn.Linear(2, 3), nn.Linear(2, 3)
    load_weights(network, save(tmp_path / "a.pt", source.state_dict()))
    assert torch.equal(network.weight, source.weight)
    with pytest.raises(CheckpointError, match=r"does not fit Linear: tensors of another shape: 2 \(weight: 3 x 2"):
        load_weights(nn.Linear(2, 4), tmp_path / "a.pt")


def test_planning_needs_no_memory_and_loading_does(tmp_path: Path) -> None:
    with torch.device("meta"):
        network = SmallNetwork(channels=4)
    path = save(tmp_path / "a.pt", copies(trained()))
    report, tensors = plan_transfer(network, read_source(path))
    assert report.adapted == ("encoder.stem.weight",)
    assert tensors["encoder.stem.weight"].shape == (2, 4, 1, 1, 1)
    with pytest.raises(ValueError, match="on the meta device"):
        load_weights(network, path)


@pytest.fixture
def run(tmp_path: Path, make_card: Callable[..., ModelCard], tied_network: Callable[..., nn.Module]) -> Path:
    save_model(tmp_path / "run", tied_network(4, 3, 5).state_dict(), make_card())
    return tmp_path / "run"


def test_a_run_folder_knows_its_outputs(run: Path, tied_network: Callable[..., nn.Module]) -> None:
    network = tied_network(4, 3, 5)
    network.head_prefixes = ("head",)  # type: ignore[assignment]
    assert load_weights(network, run).missing == ()
    assert load_weights(network, run, outputs=("WT", "TC", "ET")).missing == ()
    report = load_weights(network, run / "model.safetensors", outputs=("A", "B", "C"))
    assert report.missing == ("head",)
    assert report.notes == ("heads not loaded: the outputs of the file are WT, TC, ET, not A, B, C",)


def test_a_run_folder_of_another_network_says_which(run: Path, tied_network: Callable[..., nn.Module]) -> None:
    with pytest.raises(CheckpointError, match=r"Build the network that it was trained as: tiny, size wide$"):
        load_weights(tied_network(4, 3, 6), run)


def test_facts_say_where_weights_come_from(run: Path, tmp_path: Path) -> None:
    facts = read_source(run).facts()
    assert facts["file"] == "model.safetensors"
    assert (facts["origin"], facts["licence"]) == ("tiny wide trained on phantom", "CC0")
    assert len(facts["sha256"]) == 64
    plain = read_source(save(tmp_path / "a.pt", {"w": torch.ones(1)})).facts()
    assert (plain["file"], plain["origin"]) == ("a.pt", "a weight file without a card")


def test_several_models_are_not_one(run: Path, tmp_path: Path) -> None:
    for fold in (0, 1):
        shutil.copytree(run, tmp_path / "folds" / f"fold_{fold}")
    with pytest.raises(CheckpointError, match=r"holds 2 models \(fold_0, fold_1\).*Name one of its folders"):
        load_weights(SmallNetwork(), tmp_path / "folds")
    with pytest.raises(CheckpointError, match="is not a file"):
        load_weights(SmallNetwork(), tmp_path / "nowhere.pth")
