"""`segkit models`: the networks and their sizes."""

from typing import Annotated

import typer

from segkit.cli.options import JsonOption, print_json, print_table, verb


@verb()
def models(
    in_channels: Annotated[int, typer.Option("--in-channels", min=1, help="Image channels to count with.")] = 4,
    out_channels: Annotated[int, typer.Option("--out-channels", min=1, help="Outputs to count with.")] = 3,
    as_json: JsonOption = False,
    quiet: bool = False,
) -> None:
    """Networks and sizes: parameters, tensors of the state dict, what each axis must be a multiple of."""
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
