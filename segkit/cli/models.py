"""`segkit models`: the networks and their sizes, or what a folder with a model is and expects."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from segkit.cli.options import JsonOption, print_json, print_stdout, print_table, verb
from segkit.errors import RequestError, as_request, on_one_line


@verb()
def models(
    action: Annotated[Literal["show"] | None, typer.Argument(help="show: describe the model in FOLDER.")] = None,
    folder: Annotated[
        Path | None, typer.Argument(help="Run folder, nnU-Net's results, MONAI bundle or export.")
    ] = None,
    in_channels: Annotated[int, typer.Option("--in-channels", min=1, help="Image channels to count with.")] = 4,
    out_channels: Annotated[int, typer.Option("--out-channels", min=1, help="Outputs to count with.")] = 3,
    as_json: JsonOption = False,
    quiet: bool = False,
) -> None:
    """Networks and sizes: parameters, tensors of the state dict, what each axis must be a multiple of."""
    if action is not None:
        if folder is None:
            raise RequestError("segkit models show needs a folder", expected="segkit models show FOLDER")
        _show(folder, as_json=as_json)
        return
    from dataclasses import asdict

    from segkit.models.table import list_models

    found = list_models(in_channels, out_channels)
    if as_json:
        print_json([asdict(model) for model in found])
        return
    print_table(
        f"Networks at {in_channels} inputs and {out_channels} outputs (3D where there is one)",
        ("name", "size", "parameters", "tensors", "input divisor", "dims", "reference"),
        [
            (
                model.name,
                model.size,
                f"{model.parameters:,}",
                model.tensors,
                " x ".join(map(str, model.divisor)),
                " and ".join(f"{dims}D" for dims in model.dims),
                model.reference,
            )
            for model in found
        ],
    )


def _show(folder: Path, *, as_json: bool) -> None:
    from segkit.errors import CheckpointError

    try:
        found = describe(folder)
    except CheckpointError as error:
        raise as_request(error) from error
    if as_json:
        print_json(found)
        return
    for key, value in found.items():
        if value not in (None, [], {}, ""):
            print_stdout(on_one_line(f"{key + ':':16}{_in_words(value)}"))


def describe(folder: Path) -> dict[str, Any]:
    """What a folder with a model is, what it expects, and what of it is not honoured, for `--json`.

    Axes are those of the network: of `orientation`, or K, J and I for the last, second and first axis of the file.

    Raises:
        CheckpointError: there is no model, or it cannot be used.
    """
    from segkit.checkpoint.nnunet import fold_folders, open_results
    from segkit.checkpoint.run_folder import load_card, model_folders

    folders = model_folders(folder)
    card = load_card(folders[0])
    found: dict[str, Any] = {
        "kind": "MONAI bundle" if card.bundle else "segkit",
        "task": card.task,
        "models": [one.name for one in folders],
        "network": card.network.family,
        "size": card.network.size,
        "arguments": card.network.arguments,
        "channels": {f"{number:04d}": name for number, name in enumerate(card.modalities)},
        "outputs": {output.name: output.label for output in card.outputs},
        "spacing_mm": card.preprocessing.spacing_mm,
        "orientation": card.preprocessing.orientation,
        "patch_size": card.patch_size,
        "normalisation": card.preprocessing.normalisation,
    }
    if fold_folders(folder):
        results = open_results(folder)
        found |= {
            "kind": f"results of nnU-Net {results.version}",
            "configuration": results.configuration_name,
            "trainer": results.trainer,
            "previous_stage": results.previous_stage,
            "mirror_axes": results.mirror_axes,
            "normalisation": results.configuration["normalization_schemes"],
            "not_honoured": list(results.notices),
        }
    return found


def _in_words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {one}" for key, one in value.items())
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
