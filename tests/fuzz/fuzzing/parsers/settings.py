"""Settings: YAML files and `--set key=value`."""

from __future__ import annotations

from pathlib import Path

from fuzzing import seeds
from fuzzing.mutators.documents import mutated_settings, mutated_yaml
from fuzzing.parser import Files, Parser


def _configurations() -> list[Files]:
    from segkit.config import list_presets, preset_path

    presets = [preset_path(name).read_bytes() for name in list_presets()]
    return [{"config.yaml": content} for content in (seeds.CONFIG.encode(), *presets)]


def _config(_: Path, path: Path) -> None:
    from segkit.config import annotated_yaml, build_config, read_yaml
    from segkit.training.config import TrainConfig

    document = read_yaml(path)
    config = build_config(TrainConfig, [(str(path), document)])
    annotated_yaml(config)


def _override(_: Path, path: Path) -> None:
    from segkit.config import annotated_yaml, build_config, parse_overrides
    from segkit.training.config import TrainConfig

    settings = path.read_text(encoding="utf-8", errors="replace").split("\n")
    annotated_yaml(build_config(TrainConfig, [("--set", parse_overrides(settings))]))


PARSERS = (
    Parser("config", _configurations, {"": mutated_yaml}, _config, first_check="is not valid YAML|is not a mapping"),
    Parser(
        "override",
        lambda: [{"set.txt": seeds.SETTINGS.encode()}],
        {"": mutated_settings},
        _override,
        first_check="cannot be read|is not YAML",
    ),
)
