"""`segkit export`: a trained network as ONNX files that need no torch, or as a MONAI bundle."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from segkit.api.export import export_model
from segkit.cli.options import JsonOption, print_json, print_table, verb


@verb(
    export_model,
    run=Annotated[Path, typer.Option("-m", "--model", help="Run folder, cross-validation or nnU-Net's results.")],
    format=Annotated[
        Literal["onnx", "monai-bundle"],
        typer.Option(help="ONNX files for `segkit infer`, or a bundle for `python -m monai.bundle run`."),
    ],
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
    """Write model.onnx and model.json, or a MONAI bundle, checked against the trained network, or nothing.

    `segkit infer -m OUTPUT`, or of an inpainting model `segkit inpaint`, runs it with ONNX Runtime or OpenVINO;
    `python -m monai.bundle run` a bundle.
    """
    document = export_model(**options)
    if json:
        print_json(document)
    elif not quiet:
        for written in document["models"]:
            _print_parity(written) if "parity" in written else _print(written)


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


def _print_parity(written: dict[str, Any]) -> None:
    columns = ("case", "voxels", "voxels that differ", "lowest Dice of a label", "difference of logits")
    rows = [tuple(map(str, case.values())) for case in written["parity"]]
    print_table(f"{written['folder']}: masks of MONAI and of segkit", columns, rows)
