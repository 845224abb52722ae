"""`segkit export`: a trained network as ONNX files that need no torch."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from segkit.api.export import export_model
from segkit.cli.options import JsonOption, print_json, print_table, verb


@verb(
    export_model,
    run=Annotated[Path, typer.Option("-m", "--model", help="Run folder, cross-validation or nnU-Net's results.")],
    precision=Annotated[
        Literal["fp32", "fp16", "int8"],
        typer.Option(help="Write this one too, with its measured change of Dice; fp32 is always written."),
    ],
    data=Annotated[
        Path | None,
        typer.Option(
            "-i",
            "--input",
            help="Cases to compare, calibrate and score with; default: the validation cases of the run.",
        ),
    ],
    overwrite=Annotated[bool, typer.Option("--overwrite", help="Replace the export that is in the folder.")],
)
def export(json: JsonOption = False, quiet: bool = False, **options: Any) -> None:
    """Write model.onnx and model.json, checked against the trained network, or nothing.

    `segkit infer -m OUTPUT`, or of an inpainting model `segkit inpaint`, runs it with ONNX Runtime or OpenVINO.
    """
    document = export_model(**options)
    if json:
        print_json(document)
    elif not quiet:
        for written in document["models"]:
            _print(written)


def _print(written: dict[str, Any]) -> None:
    export, rows = written["export"], []
    for graph in export["graphs"]:
        for backend, seconds in graph["seconds"].items():
            of_fp32 = export["parity"][backend] if graph["precision"] == "fp32" else {}
            change = "" if graph["dice_change"] is None else f"{graph['dice_change']:+.4f}"
            approved = "yes" if graph["is_approved"] else "no"
            difference = of_fp32.get("largest_difference", "")
            rows.append((graph["file"], backend, f"{seconds:.4f}", difference, change, approved))
    rows.append(("torch, to compare", "torch", f"{export['parity']['torch']['seconds']:.4f}", "", "", ""))
    columns = ("graph", "backend", "s a window", "largest logit difference", "Dice change", "approved")
    print_table(f"{written['folder']} (real cases: {written['cases']})", columns, rows)
