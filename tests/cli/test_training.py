"""Settings of the training commands: presets for every network family, and the command of a run with --resume."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from segkit.api.training import suited_presets
from segkit.config import (
    INPAINTING_PRESETS,
    PRESETS,
    PRETRAINING_PRESETS,
    Config,
    build_config,
    list_presets,
    parse_overrides,
    preset_layers,
)
from segkit.errors import RequestError
from segkit.inpainting.config import InpaintingConfig
from segkit.models.table import MODELS, configure, nearest_size
from segkit.pretraining.methods import PretrainConfig
from segkit.training.config import RunConfig, TrainConfig
from tests.helpers import run_segkit

CONFIGS: dict[str, type[RunConfig]] = {
    PRESETS: TrainConfig,
    PRETRAINING_PRESETS: PretrainConfig,
    INPAINTING_PRESETS: InpaintingConfig,
}
EVERY_PRESET = [(folder, name) for folder in CONFIGS for name in list_presets(folder)]


def settings_of(folder: str, preset: str, *settings: str) -> RunConfig:
    layers = [("--set", parse_overrides(settings))]
    return build_config(CONFIGS[folder], [*suited_presets(preset_layers(preset, folder), layers), *layers])


def network_of(folder: str, preset: str, *settings: str) -> Config:
    network = settings_of(folder, preset, *settings).network
    return configure(network.family, network.size, network.arguments)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize(("folder", "preset"), EVERY_PRESET)
def test_every_family_has_a_size_for_every_preset(folder: str, preset: str, family: str) -> None:
    assert type(network_of(folder, preset, f"network.family={family}")) is MODELS[family].config


@pytest.mark.parametrize(
    ("preset", "family", "size"),
    [
        ("tiny", "smp", "unet-small"),
        ("default", "smp", "unet"),
        ("large", "smp", "unet-resnet50"),
        ("tiny", "stunet", "S"),
        ("cpu", "stunet", "S"),
        ("default", "stunet", "B"),
        ("large", "stunet", "L"),
        ("cpu", "vit", "tiny"),  # tiny and base are equally near
        ("large", "vit", "base"),
        ("cpu", "r2unet", "small"),
        ("default", "generator", "paper"),
    ],
)
def test_the_nearest_size_is_taken_and_logged(
    preset: str, family: str, size: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="segkit"):
        network = settings_of(PRESETS, preset, f"network.family={family}").network
    assert (network.family, network.size) == (family, size)
    wanted = {"tiny": "tiny", "cpu": "small", "default": "base", "large": "large"}[preset]
    logged = f"size {wanted} does not exist for {family}; using {size}"
    assert (logged in caplog.messages) is (wanted != size)


def test_a_size_that_is_not_on_the_scale_gives_the_usual_one() -> None:
    assert nearest_size("revmbunet", "segformer") == "base"
    assert nearest_size("r2unet", "parity") == "parity"


def test_a_size_that_the_user_names_must_exist() -> None:
    with pytest.raises(RequestError, match="smp has no size 'tiny'"):
        network_of(PRESETS, "tiny", "network.family=smp", "network.size=tiny")


def test_arguments_of_the_preset_for_another_family_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="segkit"):
        network = settings_of(PRESETS, "large", "network.family=smp", "network.arguments.encoder=resnet18").network
    assert network.arguments == {"encoder": "resnet18"}
    assert "network.arguments.mode=reversible does not exist for smp; it is not used" in caplog.messages
    assert settings_of(PRESETS, "large", "network.family=revmbunet").network.arguments == {"mode": "reversible"}


def test_the_preset_is_unchanged_without_another_family() -> None:
    presets = preset_layers("large")
    assert suited_presets(presets, [("--set", {"network": {"family": "nonsense"}})]) == presets
    assert suited_presets(presets, [("--set", {"network": 3}), ("options", {})]) == presets


@pytest.mark.parametrize("given", ["option", "file"])
def test_another_method_does_not_resume_a_run(given: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("method: masked\n")
    (tmp_path / "file.yaml").write_text("method: inpainting\n")
    other = {"option": ("--method", "inpainting"), "file": ("--config", tmp_path / "file.yaml")}[given]
    assert run_segkit("pretrain", tmp_path, "-o", tmp_path / "run", "--resume", *other) == 2
    assert "settings differ from those of the run: method masked -> inpainting" in " ".join(
        capsys.readouterr().err.split()
    )
