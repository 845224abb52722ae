"""`segkit config`: print every setting, or check a file before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from segkit.api.training import suited_presets
from segkit.cli.options import SetOption, print_stdout, read_settings, verb
from segkit.errors import ConfigError, Problem, RequestError

if TYPE_CHECKING:
    from segkit.training.config import RunConfig

app = typer.Typer(help="Show every setting, or check a configuration file.", no_args_is_help=True)

BarePresetOption = Annotated[
    str | None, typer.Option("--preset", help="tiny, cpu, default or large; without it the built-in values.")
]


Verb = Literal["train", "pretrain", "inpainting"]
VerbOption = Annotated[
    Verb,
    typer.Option("--for", help="The verb whose settings they are; inpainting: `segkit pretrain --method inpainting`."),
]


@app.command()
@verb()
def show(
    preset: BarePresetOption = None, settings: SetOption = None, verb: VerbOption = "train", quiet: bool = False
) -> None:
    """Print the settings of a run as YAML, each with what it means; null is decided by planning."""
    import segkit.config as configs

    presets = {"pretrain": configs.PRETRAINING_PRESETS, "inpainting": configs.INPAINTING_PRESETS}
    layers = [("--set", read_settings(settings))]
    suited = suited_presets(configs.preset_layers(preset, presets.get(verb, configs.PRESETS)), layers)
    config = configs.build_config(_config_of(verb), [*suited, *layers])
    print_stdout(configs.annotated_yaml(config).removesuffix("\n"))


@app.command()
@verb()
def validate(
    files: Annotated[list[Path], typer.Argument(help="Configuration files.")],
    settings: SetOption = None,
    verb: VerbOption = "train",
    quiet: bool = False,
) -> None:
    """Check configuration files; every problem is reported at once, with file, key and reason."""
    from segkit.config import build_config, read_yaml
    from segkit.models.table import configure

    problems: list[Problem] = []
    for file in files:
        try:
            config = build_config(_config_of(verb), [(str(file), read_yaml(file)), ("--set", read_settings(settings))])
            configure(config.network.family, config.network.size, config.network.arguments)
        except ConfigError as error:
            problems += error.problems
        except RequestError as error:
            problems.append(Problem(f"{file}: network", error.found, error.expected or ""))
    if problems:
        raise ConfigError(problems)
    if not quiet:
        print_stdout(f"{len(files)} file{'s' if len(files) != 1 else ''} valid")


def _config_of(verb: Verb) -> type[RunConfig]:
    if verb == "pretrain":
        from segkit.pretraining.methods import PretrainConfig

        return PretrainConfig
    if verb == "inpainting":
        from segkit.inpainting.config import InpaintingConfig

        return InpaintingConfig
    from segkit.training.config import TrainConfig

    return TrainConfig
