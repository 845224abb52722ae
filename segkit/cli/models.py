"""`segkit models`: the networks and their sizes."""

from __future__ import annotations

from segkit.cli.options import JsonOption, print_json, print_table


def models(as_json: JsonOption = False) -> None:
    """Networks and sizes, counted at 4 input and 3 output channels in 3D."""
    from dataclasses import asdict

    from segkit.models.table import list_models

    found = list_models()
    if as_json:
        print_json([asdict(model) for model in found])
        return
    print_table(
        "Networks (parameters at 4 inputs, 3 outputs, 3D)",
        ("name", "size", "parameters", "input divisor", "dims", "reference"),
        [
            (
                model.name,
                model.size,
                f"{model.parameters:,}",
                " x ".join(map(str, model.divisor)),
                " and ".join(f"{dims}D" for dims in model.dims),
                model.reference,
            )
            for model in found
        ],
    )
