"""`segkit.export_model`: a trained network as ONNX files that need no torch, or as a MONAI bundle."""

from pathlib import Path
from typing import Any, Literal

from segkit.api.arguments import AnyPath, CaseIds, read_case_ids
from segkit.errors import RequestError


def export_model(
    run: AnyPath,
    out: AnyPath,
    *,
    format: Literal["onnx", "monai-bundle"] = "onnx",
    precision: Literal["fp32", "fp16", "int8"] = "fp32",
    data: AnyPath | None = None,
    cases: CaseIds | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write model.onnx and model.json into `out`, checked against the trained network; `segkit.infer` takes `out`.

    Returns `{"output", "models": [{"folder", "export", "cases"}]}`, where "export" has the seconds per window and the
    largest difference of logits in each backend. `precision` is written besides fp32, with its measured change of Dice.
    `data` is a folder of cases to compare and to calibrate with, `cases` their ids or a text file of them; by default
    the validation cases of the run.

    With `format` "monai-bundle" it writes a bundle that `python -m monai.bundle run` computes without segkit; its masks
    are compared with those of `segkit.infer` on phantoms and on the cases of `data`. "models" is then
    `[{"folder", "parity": [{"case", "voxels", "different_voxels", "dice", "logit_difference"}]}]`.

    Raises:
        RequestError: a package is not installed, the model cannot be exported, or `out` is in use.
        CheckpointError: a graph differs from its network; `out` is not changed.
        DataError: the folder cannot be written to.

    Example:
        >>> segkit.export_model("run", "deployed")["models"][0]["folder"]  # doctest: +SKIP
        'deployed'
    """
    from segkit.exporting.cases import named_cases

    if cases is not None and data is None:
        raise RequestError("--cases names cases of a data folder", remedy="Add the folder: -i DATA")
    measuring = None if data is None else named_cases(Path(data), read_case_ids(cases))
    if format == "onnx":
        from segkit.exporting.onnx import export_models as write
    elif format == "monai-bundle":
        from segkit.exporting.bundle import export_bundle as write
    else:
        raise RequestError(f"format {format!r} is not known", expected="onnx or monai-bundle")
    return write(Path(run), Path(out), precision=precision, cases=measuring, overwrite=overwrite)
